"""Quantized twins of torch layers, fused forms of blocks, and what puts them into a denoiser."""

from . import blocks as blocks  # enters its fused forms
from . import transformer_blocks as transformer_blocks
from .fusion import FusionInfo, describe_fusion, fuse_blocks, summarize_fusion, unfuse_blocks, unfused
from .layers import QuantConv2d, QuantLayer, QuantLinear
from .swap import Coverage, LayerInfo, describe_layers, quant_layers, swap_layers

__all__ = [
    "Coverage",
    "FusionInfo",
    "LayerInfo",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "describe_fusion",
    "describe_layers",
    "fuse_blocks",
    "quant_layers",
    "summarize_fusion",
    "swap_layers",
    "unfuse_blocks",
    "unfused",
]
