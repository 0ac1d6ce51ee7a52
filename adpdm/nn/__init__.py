"""Quantized twins of torch layers, fused forms of blocks, and what puts them into a denoiser."""

from . import blocks as blocks  # enters its fused forms
from . import embedding_blocks as embedding_blocks
from . import joint_blocks as joint_blocks
from . import transformer_blocks as transformer_blocks
from .adapters import adapters_of, mark_equalized, refuse_adapters, watch_adapters, without_adapters
from .coded import CodedLayer
from .fusion import (
    FusionInfo,
    block_around,
    describe_fusion,
    fuse_blocks,
    summarize_fusion,
    unfuse_blocks,
    unfused,
)
from .hooks import has_state_hooks, input_of, reason_to_stay
from .layers import QuantConv2d, QuantLayer, QuantLinear
from .loaded import (
    LoadedConv2d,
    LoadedLayer,
    LoadedLinear,
    float_twin,
    load_layer,
    loaded_layers,
    runs_on_kernels,
)
from .swap import Coverage, LayerInfo, describe_layers, quant_layers, swap_layers, to_channels_last

__all__ = [
    "CodedLayer",
    "Coverage",
    "FusionInfo",
    "LayerInfo",
    "LoadedConv2d",
    "LoadedLayer",
    "LoadedLinear",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "adapters_of",
    "block_around",
    "describe_fusion",
    "describe_layers",
    "float_twin",
    "fuse_blocks",
    "has_state_hooks",
    "input_of",
    "load_layer",
    "loaded_layers",
    "mark_equalized",
    "quant_layers",
    "reason_to_stay",
    "refuse_adapters",
    "runs_on_kernels",
    "summarize_fusion",
    "swap_layers",
    "to_channels_last",
    "unfuse_blocks",
    "unfused",
    "watch_adapters",
    "without_adapters",
]
