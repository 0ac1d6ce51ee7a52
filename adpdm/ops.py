"""The bridge to the native operators: thin typed wrappers and autograd formulas.

Shapes, dtypes and formulas of every operator stand in `reference.py`; this is the only Python file that
touches `torch.ops.adpdm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _native as _native  # loads the extension, which registers torch.ops.adpdm
from . import fake_kernels as fake_kernels  # registered beside the operators
from . import reference
from .operands import Activation as Activation
from .operands import ConvGeometry as ConvGeometry
from .operands import Epilogue as Epilogue
from .operands import OutputQuantizer as OutputQuantizer

_ops = torch.ops.adpdm


@dataclass(frozen=True)
class Segment:
    """One input of an integer layer with its quantizer and the weight columns it meets."""

    codes: Tensor  # [N, C, H, W] channels_last or [*, K], i8; or packed, [N, H, W, C/2] or [*, K/2] u8
    scale: Tensor  # [G] f32
    zero_point: Tensor  # [G] i32
    group_index: Tensor  # [1] i32
    weight: Tensor  # packed by pack_weight
    weight_scale: Tensor  # [O] f32
    weight_sum: Tensor  # [O] i32


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_index: Tensor,
    num_bits: int,
    channels_last: bool = False,
    hadamard: int = 0,
) -> Tensor:
    """Return int8 codes of x under the current group; see `reference.quantize`.

    Args:
        hadamard: rotate channels [*, C] first, as `hadamard` does; 0 for none.
    """
    return _ops.quantize.default(  # type: ignore[no-any-return]
        x, scale, zero_point, group_index, num_bits, channels_last, hadamard
    )


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, group_index: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the real values of int8 codes; see `reference.dequantize`."""
    return _ops.dequantize(codes, scale, zero_point, group_index, dtype)  # type: ignore[no-any-return]


def quantize_int4(x: Tensor, scale: Tensor, zero_point: Tensor, group_index: Tensor) -> Tensor:
    """Return packed 4-bit codes; see `reference.quantize_int4`."""
    return _ops.quantize_int4(x, scale, zero_point, group_index)  # type: ignore[no-any-return]


def dequantize_int4(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_index: Tensor,
    num_columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the real values of packed 4-bit codes; see `reference.dequantize_int4`."""
    return _ops.dequantize_int4(  # type: ignore[no-any-return]
        packed, scale, zero_point, group_index, num_columns, dtype
    )


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes in [-8, 7] two to a byte; see `reference.pack_int4`."""
    return _ops.pack_int4(codes)  # type: ignore[no-any-return]


def unpack_int4(packed: Tensor, num_columns: int) -> Tensor:
    """Inverse of `pack_int4`."""
    return _ops.unpack_int4(packed, num_columns)  # type: ignore[no-any-return]


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_index: Tensor,
    quant_min: int,
    quant_max: int,
    channel_axis: int = -1,
) -> Tensor:
    """Quantize and dequantize x, differentiable in x, scale and zero_point; see `reference.fake_quantize`."""
    return _ops.fake_quantize(  # type: ignore[no-any-return]
        x, scale, zero_point, group_index, quant_min, quant_max, channel_axis
    )


def fake_quantize_mixture(
    x: Tensor, scale: Tensor, zero_point: Tensor, importance: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """Mix G fake quantizers, differentiable in all four tensors; see `reference.fake_quantize_mixture`."""
    return _ops.fake_quantize_mixture(  # type: ignore[no-any-return]
        x, scale, zero_point, importance, quant_min, quant_max
    )


def hadamard(x: Tensor, block: int) -> Tensor:
    """Rotate channels [*, C] to float32, differentiable; see `reference_hadamard.hadamard`."""
    return _ops.hadamard.default(x, block)  # type: ignore[no-any-return]


def observe(x: Tensor, counts: Tensor, extrema: Tensor, step_index: Tensor) -> None:
    """Add x to one step's histogram and extrema in place; see `reference.observe`."""
    _ops.observe(x, counts, extrema, step_index)


def set_step(
    timestep: Tensor,
    timesteps: Tensor,
    table: Tensor,
    correction: Tensor | None,
    step_index: Tensor,
    group_index: Tensor,
    current_correction: Tensor,
) -> None:
    """Write the nearest step and its rows, on the CPU; see `reference.set_step`."""
    current = (step_index, group_index, current_correction)
    _ops.set_step.default(timestep, timesteps, table, correction, *current)


def pack_weight(codes: Tensor, num_bits: int, groups: int = 1) -> Tensor:
    """Rearrange weight codes [O, C/groups, kh, kw] or [O, K] i8 for the kernels of their device, opaque."""
    return _ops.pack_weight(codes, num_bits, groups)  # type: ignore[no-any-return]


def linear(
    segments: Sequence[Segment], epilogue: Epilogue, out_features: int, weight_bits: int, dtype: torch.dtype
) -> Tensor:
    """Integer linear layer over one or two segments, [*, O] dtype or int8 codes; see `reference.linear`."""
    return _ops.linear.default(  # type: ignore[no-any-return]
        *igemm_arguments(segments, epilogue, out_features, weight_bits, dtype)
    )


def conv2d(
    segments: Sequence[Segment],
    epilogue: Epilogue,
    geometry: ConvGeometry,
    weight_bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Integer convolution over one or two segments, [N, O, Ho, Wo] channels_last; see `reference.conv2d`."""
    return _ops.conv2d.default(  # type: ignore[no-any-return]
        *igemm_arguments(segments, epilogue, geometry.numbers(), weight_bits, dtype)
    )


def igemm_arguments(
    segments: Sequence[Segment],
    epilogue: Epilogue,
    outputs: int | list[int],
    weight_bits: int,
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    """The arguments of the schemas of linear and conv2d; outputs is out_features or the geometry."""
    if not 1 <= len(segments) <= 2:
        raise ValueError(f"linear and conv2d: wanted 1 or 2 segments, got {len(segments)}")
    e, q = epilogue, epilogue.quantizer
    return (
        *_segment_tensors(segments[0]),
        [] if len(segments) == 1 else _segment_tensors(segments[1]),
        e.bias,
        e.row_scale,
        e.row_bias,
        e.residual,
        [] if q is None else list(q.unrotated),
        outputs,
        weight_bits,
        int(e.activation),
        e.output_scale,
        0 if q is None else q.num_bits,
        dtype,
    )


def _segment_tensors(s: Segment) -> tuple[Tensor, ...]:
    return (s.codes, s.scale, s.zero_point, s.group_index, s.weight, s.weight_scale, s.weight_sum)


def group_norm_quantize(
    inputs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    modulation: Tensor | None,
    quantizer: OutputQuantizer,
    norm_groups: int,
    eps: float,
    activation: Activation,
) -> Tensor:
    """Normalise one or two concatenated inputs, int8 codes [N, C, H, W] channels_last; see `reference`.

    Where the quantizer's channels are rotated: one input, on the CPU.
    """
    q = quantizer
    end = (q.num_bits, q.hadamard)
    return _ops.group_norm_quantize.default(  # type: ignore[no-any-return]
        inputs, weight, bias, modulation, *q.qparams, norm_groups, eps, int(activation), *end
    )


def group_norm_quantize_each(
    inputs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    quantizers: Sequence[OutputQuantizer],
    norm_groups: int,
    eps: float,
    activation: Activation,
) -> list[Tensor]:
    """Normalise two concatenated inputs, int8 codes of each under its own quantizer; see `reference`."""
    first, second = inputs
    qparams = [x for q in quantizers for x in q.unrotated]
    bits = [q.num_bits for q in quantizers]
    return list(
        _ops.group_norm_quantize_each.default(
            first, second, weight, bias, qparams, norm_groups, eps, int(activation), bits
        )
    )


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    modulation: Tensor | None,
    quantizer: OutputQuantizer,
    eps: float,
) -> Tensor:
    """Normalise x [*, C] along its last dimension, int8 codes; see `reference.layer_norm_quantize`."""
    q = quantizer
    return _ops.layer_norm_quantize.default(  # type: ignore[no-any-return]
        x, weight, bias, modulation, *q.qparams, eps, q.num_bits, q.hadamard
    )


# Without FMA instructions these kernels would multiply in software: torch's are the quicker ones there.
HAS_FAST_ATTENTION = HAS_FAST_EMBEDDING = _native.build_info()["isa"] != "portable"
# Products of 8-bit codes take less time than float32 ones only where one instruction sums four of them.
HAS_FAST_INT8_ATTENTION = _native.build_info()["isa"] in ("avx_vnni", "avx512", "amx")


def attention_quantize(
    query: Tensor, key: Tensor, value: Tensor, quantizer: OutputQuantizer, heads: int, int8: bool = False
) -> Tensor:
    """Attention of each head in int8 codes [N, L, C], on the CPU; see `reference.attention_quantize`.

    Args:
        int8: multiply codes of 8 bits, exactly, instead of floats.
    """
    q = quantizer
    return _ops.attention_quantize.default(  # type: ignore[no-any-return]
        query, key, value, *q.qparams, heads, q.num_bits, int8, q.hadamard
    )


def timestep_embedding(
    waves: Tensor,
    first: torch.nn.Linear,
    second: torch.nn.Linear,
    table: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Embedding [N, D] of timesteps and classes, on the CPU; see `reference_embedding.timestep_embedding`."""
    layers = (first.weight, first.bias, second.weight, second.bias)
    return _ops.timestep_embedding.default(waves, *layers, table, labels)  # type: ignore[no-any-return]


def silu_linear(x: Tensor, layer: torch.nn.Linear) -> Tensor:
    """layer(silu(x)), [N, O] f32 of x [N, K] f32, on the CPU; see `reference_embedding.silu_linear`."""
    return _ops.silu_linear.default(x, layer.weight, layer.bias)  # type: ignore[no-any-return]


def adaptive_rows(embedding: Tensor, layer: torch.nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Modulation and gate of both parts of a block, on the CPU; see `reference_embedding.adaptive_rows`."""
    return _ops.adaptive_rows.default(embedding, layer.weight, layer.bias)  # type: ignore[no-any-return]


# ---- autograd ----------------------------------------------------------------------------------------------


def _save_fake_quantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, group_index, *rest = inputs
    # The next step writes another index into the same tensor, which autograd does not see.
    ctx.save_for_backward(x, scale, zero_point, group_index.clone())
    ctx.rest = rest


def _fake_quantize_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = _ops.fake_quantize_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (*grads, None, None, None, None)


def _save_mixture(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _mixture_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = _ops.fake_quantize_mixture_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (*grads, None, None)


torch.library.register_autograd(
    "adpdm::fake_quantize", _fake_quantize_grad, setup_context=_save_fake_quantize
)
torch.library.register_autograd("adpdm::fake_quantize_mixture", _mixture_grad, setup_context=_save_mixture)


def _save_block(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.block = inputs
    ctx.dtype = x.dtype


def _hadamard_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return hadamard(grad, ctx.block).to(ctx.dtype), None  # symmetric


torch.library.register_autograd("adpdm::hadamard", _hadamard_grad, setup_context=_save_block)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "adpdm: wanted first derivatives of fake_quantize, got a gradient of its gradient "
        "(create_graph=True), which it does not have"
    )


for _op in ("adpdm::fake_quantize_backward", "adpdm::fake_quantize_mixture_backward"):
    torch.library.register_autograd(_op, _no_second_derivative)


# ---- devices without kernels: models with float inputs run there as well, and unpack their weights ---------

torch.library.register_kernel("adpdm::pack_int4", None, reference.pack_int4)
torch.library.register_kernel("adpdm::unpack_int4", None, reference.unpack_int4)
