"""Finds the layers of a denoiser, says what becomes integer and why not, and swaps in quantized twins."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import MAX_BITS, QuantConfig
from ..reference_hadamard import hadamard_block
from ..step import StepState
from .hooks import reason_to_stay
from .layers import QuantConv2d, QuantLayer, QuantLinear
from .loaded import runs_on_kernels

# The embedding path sees a finite set of inputs, one per timestep (method.md section 8): full precision.
EMBEDDING_PATTERNS = (
    "*time_embedding.*",
    "*time_emb_proj",
    "*time_proj",
    "*add_embedding.*",
    "*class_embedding*",
    "*encoder_hid_proj*",  # of images or texts
    "image_proj.*",
    "*adaln_single.*",
    "*time_text_embed.*",
    "*_embedder.*",
    "*norm*.linear",
    "proj_out_1",  # scale and shift of the last norm of DiT
)
# Of exactly these: who derives from them may compute something else, or read the weight without a call.
LAYER_CLASSES = (nn.Conv2d, nn.Linear)
# Where diffusers casts to the dtype of a weight or of the first parameter, which codes have not.
CAST_TO_WEIGHT = ("*.image_embeds", "*time_embedder.*", "*delta_embedder.*")
PROCESSOR_PATTERN = "*.processor.*"  # of IP-Adapters, say: their processors come and go, and are not saved
INPUT_OUTPUT_NAMES = ("conv_in", "conv_out", "proj_out", "pos_embed.proj", "x_embedder", "proj_out_2")


@dataclass(frozen=True)
class LayerInfo:
    """One convolution or linear layer as found by tracing a forward pass."""

    name: str
    macs: int  # multiply-accumulates for one sample
    parameters: int
    bits: tuple[int, int] | None  # (weight, activation), None when it stays in full precision
    reason: str  # why it stays, empty when it is quantized
    split: int | None  # input channels of the first half of a skip concatenation
    hadamard: int = 0  # input channels that are rotated together, 0 for none

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Coverage:
    """Share of the work and of the weights that runs in integers."""

    layers: int
    total_layers: int
    macs: float
    parameters: float

    @classmethod
    def of(cls, layers: list[LayerInfo]) -> Coverage:
        chosen = [layer for layer in layers if layer.bits is not None]
        macs, parameters = (sum(getattr(x, k) for x in layers) for k in ("macs", "parameters"))
        return cls(
            len(chosen),
            len(layers),
            sum(x.macs for x in chosen) / max(macs, 1),
            sum(x.parameters for x in chosen) / max(parameters, 1),
        )

    def __str__(self) -> str:
        return (
            f"{self.layers} of {self.total_layers} layers, {self.macs:.1%} of the multiply-accumulates, "
            f"{self.parameters:.1%} of the layer parameters"
        )


class _CatRecorder(TorchFunctionMode):
    """Remembers the channel concatenations of two tensors while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat) and isinstance(out, Tensor) and out.dim() == 4:
            parts = args[0] if args else (kwargs or {}).get("tensors", ())
            dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
            if len(parts) == 2 and dim == 1:
                self.outputs.append((out, parts[0].shape[1]))
        return out

    def split_of(self, x: object) -> int | None:
        return next((first for out, first in self.outputs if out is x), None)


def _layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not isinstance(module, QuantLayer):
            yield name, module


def _layer_macs(layer: nn.Conv2d | nn.Linear, output: Tensor) -> int:
    """Multiply-accumulates of one sample of the batch."""
    per_output = layer.weight[0].numel()
    return output[0].numel() * per_output if output.shape[0] else 0


def describe_layers(
    denoiser: nn.Module, config: QuantConfig, forward: Callable[[], object]
) -> list[LayerInfo]:
    """Trace one forward pass and decide for every layer.

    Args:
        denoiser: module with float layers.
        config: bits and patterns; a pattern that matches no layer is an error.
        forward: runs the denoiser once on a representative input.
    """
    macs: dict[str, int] = {}
    splits: dict[str, int] = {}
    names = {module: name for name, module in _layers(denoiser)}
    recorder = _CatRecorder()

    def after_layer(module: nn.Module, args: Any, output: Any) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        work = _layer_macs(module, output) if isinstance(output, Tensor) else 0  # of a forward of its own
        macs[names[module]] = macs.get(names[module], 0) + work

    def before_module(module: nn.Module, args: tuple[Any, ...]) -> None:
        first = recorder.split_of(args[0]) if args else None
        if first is None:
            return
        # A block gets the concatenation; its layers that read all of these channels are the ones to split.
        for child in [module, *module.children()]:
            if isinstance(child, nn.Conv2d) and child in names and child.in_channels == args[0].shape[1]:
                splits[names[child]] = first

    handles = [m.register_forward_hook(after_layer) for m in names]
    handles += [m.register_forward_pre_hook(before_module) for m in denoiser.modules()]
    try:
        with torch.no_grad(), recorder:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return _decide(denoiser, config, macs, splits if config.split_skip_connections else {})


def _decide(
    denoiser: nn.Module, config: QuantConfig, macs: dict[str, int], splits: dict[str, int]
) -> list[LayerInfo]:
    found = dict(_layers(denoiser))
    excluded(found, config.modules_to_not_convert)  # refuses patterns that name nothing
    # In the order they run, so that reports follow the data and errors name the first layer concerned.
    order = {name: i for i, name in enumerate(macs)}
    infos = []
    for name, layer in sorted(found.items(), key=lambda item: order.get(item[0], len(order))):
        reason = reason_to_keep(name, layer, config, name in macs)
        bits = None if reason else _bits(name, config)
        split = splits.get(name) if bits and getattr(layer, "groups", 1) == 1 else None
        rotates = bits is not None and rotates_inputs(config)
        block = hadamard_block(layer.in_features) if rotates and isinstance(layer, nn.Linear) else 0
        infos.append(LayerInfo(name, macs.get(name, 0), layer.weight.numel(), bits, reason, split, block))
    if not any(info.bits for info in infos):
        reasons = sorted({info.reason for info in infos})
        raise ValueError(f"no layer left to quantize; why each stays as it is: {', '.join(reasons)}")
    return infos


def rotates_inputs(config: QuantConfig) -> bool:
    """Whether linear layers rotate the channels of their inputs, if the config leaves that open.

    At 8 bits, where results are close to float ones, the time counts for more (docs/accuracy.md).
    """
    if config.hadamard != "auto":
        return config.hadamard == "on"
    return min(config.weight_bits, config.activation_bits) < MAX_BITS


def _bits(name: str, config: QuantConfig) -> tuple[int, int]:
    if name in INPUT_OUTPUT_NAMES:
        assert config.input_output_bits is not None
        return config.input_output_bits, config.input_output_bits
    return config.weight_bits, config.activation_bits


def reason_to_keep(name: str, layer: nn.Conv2d | nn.Linear, config: QuantConfig, runs: bool) -> str:
    """Why a layer stays in full precision; empty when it is quantized.

    Args:
        runs: whether a forward pass was seen to reach it.
    """
    if any(_means(pattern, name) for pattern in config.modules_to_not_convert):
        return "excluded by modules_to_not_convert"
    if any(fnmatch.fnmatch(name, pattern) for pattern in EMBEDDING_PATTERNS):
        return "embedding path"
    if fnmatch.fnmatch(name, PROCESSOR_PATTERN):
        return "of an attention processor"
    if name in INPUT_OUTPUT_NAMES and config.input_output_bits is None:
        return "input or output layer"
    if type(layer) not in LAYER_CLASSES:
        return f"{type(layer).__name__} derives from a layer and may have a forward of its own"
    if not runs_on_kernels(layer):
        return f"padding {layer.padding!r} with mode {layer.padding_mode!r} is not supported"
    if changed := reason_to_stay(layer):
        return changed
    if not runs:
        return "not reached by the traced forward pass"
    return ""


def excluded(layers: Collection[str], patterns: Iterable[str]) -> set[str]:
    """Names of the layers that stay float by `modules_to_not_convert`.

    A pattern is the name of a layer, of a module with layers inside, or any part of a dotted name; `*`, `?`
    and `[...]` mean in it what they do in a shell.

    Raises:
        ValueError: for a pattern that matches no layer.
    """
    kept: set[str] = set()
    for pattern in patterns:
        found = {name for name in layers if _means(pattern, name)}
        if not found:
            raise ValueError(
                f"modules_to_not_convert: pattern {pattern!r} matches no layer; "
                f"layers are e.g. {sorted(layers)[:5]}"
            )
        kept |= found
    return kept


def _means(pattern: str, layer: str) -> bool:
    """Whether a pattern of `excluded` means a layer."""
    return fnmatch.fnmatchcase(f".{layer}.", f"*.{pattern}.*")


def swap_layers(
    denoiser: nn.Module, layers: list[LayerInfo], num_groups: int, make_step: Callable[[int], StepState]
) -> StepState:
    """Replace the chosen layers by quantized twins and attach the step state as `adpdm_step`.

    Args:
        layers: decisions of `describe_layers`.
        num_groups: G of every activation quantizer.
        make_step: builds the step state for a number of slots.
    """
    chosen = [layer for layer in layers if layer.bits is not None]
    step = make_step(sum(1 if layer.split is None else 2 for layer in chosen))
    slot = 0
    for info in chosen:
        assert info.bits is not None
        parent_name, _, child_name = info.name.rpartition(".")
        parent = denoiser.get_submodule(parent_name)
        layer = getattr(parent, child_name)
        kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
        twin = kind.of(layer, info.bits, num_groups, slot, step, info.split, info.hadamard)
        # An item of a ModuleList or Sequential is reached by its number, which setattr handles as well.
        setattr(parent, child_name, twin)
        slot += len(twin.quantizers)
    denoiser.add_module("adpdm_step", step)
    return step


def to_channels_last(module: nn.Module) -> None:
    """Bring all images and kernels of a module into channels_last.

    `module.to(memory_format=...)` asks it of five dimensions too, those of Conv3d, where torch refuses.
    """

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    module._apply(convert)


def quant_layers(denoiser: nn.Module) -> dict[str, QuantLayer]:
    """Quantized layers by name, in the order of their slots, which is the order in which they run."""
    layers = [(name, m) for name, m in denoiser.named_modules() if isinstance(m, QuantLayer)]
    return dict(sorted(layers, key=lambda item: item[1].quantizers[0].slot))
