"""The bridge to the native operators: thin typed wrappers, autograd formulas and shape-only (fake) kernels.

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
) -> Tensor:
    """Return int8 codes of x under the current group; see `reference.quantize`."""
    return _ops.quantize.default(  # type: ignore[no-any-return]
        x, scale, zero_point, group_index, num_bits, channels_last
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
        [] if q is None else list(q.qparams),
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
    """Normalise one or two concatenated inputs, int8 codes [N, C, H, W] channels_last; see `reference`."""
    q = quantizer
    return _ops.group_norm_quantize.default(  # type: ignore[no-any-return]
        inputs, weight, bias, modulation, *q.qparams, norm_groups, eps, int(activation), q.num_bits
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
    qparams = [x for q in quantizers for x in q.qparams]
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
        x, weight, bias, modulation, *q.qparams, eps, q.num_bits
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
        query, key, value, *q.qparams, heads, q.num_bits, int8
    )


def class_embedding(
    waves: Tensor, first: torch.nn.Linear, second: torch.nn.Linear, table: Tensor, labels: Tensor
) -> Tensor:
    """Embedding [N, D] of timesteps and classes, on the CPU; see `reference.class_embedding`."""
    layers = (first.weight, first.bias, second.weight, second.bias)
    return _ops.class_embedding.default(waves, *layers, table, labels)  # type: ignore[no-any-return]


def adaptive_rows(embedding: Tensor, layer: torch.nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Modulation and gate of both parts of a block, on the CPU; see `reference.adaptive_rows`."""
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


# ---- fake kernels: shapes, dtypes and strides only, for torch.compile and opcheck --------------------------


def _packed_shape(x: Tensor) -> list[int]:
    return [*x.shape[:-1], reference.int4_row_bytes(x.shape[-1])]


def _dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of x's shape, dense, in channels_last where x is (also a channel slice of such)."""
    channels_last = x.dim() == 4 and x.stride(1) == 1 and (x.shape[1] > 1 or x.stride(3) == x.shape[1])
    layout = torch.channels_last if channels_last and not x.is_contiguous() else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout)


@torch.library.register_fake("adpdm::quantize")
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_index: Tensor,
    num_bits: int,
    channels_last: bool = False,
) -> Tensor:
    if channels_last:
        return torch.empty(x.shape, dtype=torch.int8, device=x.device, memory_format=torch.channels_last)
    return _dense_like(x, torch.int8)


@torch.library.register_fake("adpdm::dequantize")
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, group_index: Tensor, dtype: torch.dtype) -> Tensor:
    return _dense_like(codes, dtype)


@torch.library.register_fake("adpdm::quantize_int4")
def _(x: Tensor, scale: Tensor, zero_point: Tensor, group_index: Tensor) -> Tensor:
    return x.new_empty(_packed_shape(x), dtype=torch.uint8)


@torch.library.register_fake("adpdm::dequantize_int4")
def _(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_index: Tensor,
    num_columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty([*packed.shape[:-1], num_columns], dtype=dtype)


@torch.library.register_fake("adpdm::pack_int4")
def _(codes: Tensor) -> Tensor:
    return codes.new_empty(_packed_shape(codes), dtype=torch.uint8)


@torch.library.register_fake("adpdm::unpack_int4")
def _(packed: Tensor, num_columns: int) -> Tensor:
    return packed.new_empty([*packed.shape[:-1], num_columns], dtype=torch.int8)


@torch.library.register_fake("adpdm::hadamard")
def _(x: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.register_fake("adpdm::fake_quantize")
def _(x: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    return _dense_like(x, x.dtype)


@torch.library.register_fake("adpdm::fake_quantize_backward")
def _(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _dense_like(x, x.dtype), torch.empty_like(scale), torch.empty_like(zero_point)


@torch.library.register_fake("adpdm::fake_quantize_mixture")
def _(x: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    return _dense_like(x, x.dtype)


@torch.library.register_fake("adpdm::fake_quantize_mixture_backward")
def _(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, importance: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (torch.empty_like(scale), torch.empty_like(zero_point), torch.empty_like(importance))
    return (_dense_like(x, x.dtype), *rows)


@torch.library.register_fake("adpdm::observe")
def _(x: Tensor, counts: Tensor, extrema: Tensor, step_index: Tensor) -> None:
    return None


@torch.library.register_fake("adpdm::set_step")
def _(timestep: Tensor, *rest: Any) -> None:
    return None


def _results(outputs: int, activation: int) -> int:
    return outputs // 2 if activation == Activation.GEGLU else outputs


@torch.library.register_fake("adpdm::linear")
def _(x: Tensor, *rest: Any) -> Tensor:
    out_features, _, activation, _, output_bits, dtype = rest[-6:]
    shape = [*x.shape[:-1], _results(out_features, activation)]
    return x.new_empty(shape, dtype=torch.int8 if output_bits else dtype)


@torch.library.register_fake("adpdm::conv2d")
def _(x: Tensor, *rest: Any) -> Tensor:
    g, _, activation, _, output_bits, dtype = rest[-6:]
    size = x.shape[1:3] if x.dtype == torch.uint8 else x.shape[2:]
    shape = [x.shape[0], _results(g[0], activation), *ConvGeometry.from_numbers(g).output_size(*size)]
    dtype = torch.int8 if output_bits else dtype
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("adpdm::group_norm_quantize")
def _(inputs: list[Tensor], *rest: Any) -> Tensor:
    batch, _, *size = inputs[0].shape
    shape = [batch, sum(x.shape[1] for x in inputs), *size]
    return torch.empty(shape, dtype=torch.int8, device=inputs[0].device, memory_format=torch.channels_last)


@torch.library.register_fake("adpdm::group_norm_quantize_each")
def _(first: Tensor, second: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    layout = torch.channels_last
    a, b = (
        torch.empty(x.shape, dtype=torch.int8, device=x.device, memory_format=layout) for x in (first, second)
    )
    return a, b


@torch.library.register_fake("adpdm::layer_norm_quantize")
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@torch.library.register_fake("adpdm::attention_quantize")
def _(query: Tensor, *rest: Any) -> Tensor:
    return torch.empty(query.shape, dtype=torch.int8, device=query.device)


@torch.library.register_fake("adpdm::class_embedding")
def _(waves: Tensor, *rest: Any) -> Tensor:
    *_, table, labels = rest
    return waves.new_empty([labels.shape[0], table.shape[1]])


@torch.library.register_fake("adpdm::adaptive_rows")
def _(embedding: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = weight.shape[0] // 6
    modulation, gate = ((embedding.shape[0], width) for width in (2 * channels, channels))
    first, second = ((embedding.new_empty(modulation), embedding.new_empty(gate)) for _ in range(2))
    return (*first, *second)
