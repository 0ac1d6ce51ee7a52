"""Plain-torch twins of every native operator: the oracle of the tests and the formulas in readable form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import Activation, ConvGeometry, Epilogue, OutputQuantizer
from .reference_attention import attend
from .reference_hadamard import hadamard as rotate

HISTOGRAM_OCTAVE_BINS = 32  # bins per power of two
HISTOGRAM_MIN_EXPONENT = -16  # |x| < 2^-16 counts as zero
HISTOGRAM_OCTAVES = 32  # up to 2^16; above goes to the last bin
HISTOGRAM_SIDE_BINS = HISTOGRAM_OCTAVE_BINS * HISTOGRAM_OCTAVES
HISTOGRAM_BINS = 2 * HISTOGRAM_SIDE_BINS + 1  # negative | zero | positive
INT4_BLOCK = 32  # codes packed together: byte j holds code j and code j + 16
MAX_QUOTIENT = 65536.0  # saturates at every bit width: clamping to it never changes a code


def signed_range(num_bits: int) -> tuple[int, int]:
    """Return (quant_min, quant_max) of signed `num_bits` codes."""
    return -(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1


def _rounded_quotient(x: Tensor, scale: Tensor) -> Tensor:
    """rint(x / scale) by the float32 reciprocal, saturated; NaN goes to the lower bound."""
    quotient = x.float() * (1.0 / scale)
    return torch.nan_to_num(quotient, nan=-MAX_QUOTIENT).clamp(-MAX_QUOTIENT, MAX_QUOTIENT).round()


def _expand(values: Tensor, x: Tensor, channel_axis: int) -> Tensor:
    """Shape a scalar [] or per-channel [C] parameter so that it broadcasts against x."""
    if channel_axis < 0:
        return values
    shape = [1] * x.dim()
    shape[channel_axis] = -1
    return values.reshape(shape)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_index: Tensor,
    num_bits: int,
    channels_last: bool = False,
) -> Tensor:
    """Codes of x under the current group's quantizer: int8, same shape.

    Args: x [*] f32|bf16|f16; scale [G] f32; zero_point [G] i32; group_index [1] i32; num_bits 2..8;
    channels_last: x is [N, C, H, W], and its codes get that memory format.
    Source: method.md section 2. NaN gives quant_min, infinities saturate.
    """
    quant_min, quant_max = signed_range(num_bits)
    group = int(group_index)
    q = _rounded_quotient(x, scale[group]) + zero_point[group].float()
    codes = q.clamp(quant_min, quant_max).to(torch.int8)
    return codes.contiguous(memory_format=torch.channels_last) if channels_last else codes


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, group_index: Tensor, dtype: torch.dtype
) -> Tensor:
    """Real values (q - zero_point) * scale of int8 codes [*], computed in float32, returned as dtype."""
    group = int(group_index)
    return ((codes.float() - zero_point[group].float()) * scale[group]).to(dtype)


def int4_row_bytes(num_columns: int) -> int:
    """Bytes of a row of packed 4-bit codes: ceil(K/32) * 16."""
    return (num_columns + INT4_BLOCK - 1) // INT4_BLOCK * (INT4_BLOCK // 2)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes in [-8, 7], [*, K] i8, into [*, ceil(K/32) * 16] u8: byte j = k_j | k_(j+16) << 4."""
    columns = codes.shape[-1]
    padded = F.pad(codes.to(torch.int16), (0, 2 * int4_row_bytes(columns) - columns))
    halves = padded.unflatten(-1, (-1, 2, INT4_BLOCK // 2)) & 0xF
    packed: Tensor = (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2).to(torch.uint8)
    return packed


def unpack_int4(packed: Tensor, num_columns: int) -> Tensor:
    """Inverse of `pack_int4`: [*, ceil(K/32) * 16] u8 to [*, K] i8."""
    blocks = packed.to(torch.int16).unflatten(-1, (-1, INT4_BLOCK // 2))
    nibbles = torch.stack((blocks & 0xF, blocks >> 4), dim=-2).flatten(-3)
    signed = ((nibbles ^ 8) - 8).to(torch.int8)
    return signed[..., :num_columns].contiguous()


def quantize_int4(x: Tensor, scale: Tensor, zero_point: Tensor, group_index: Tensor) -> Tensor:
    """4-bit codes of x [*, K], packed along the last dimension: [*, ceil(K/32) * 16] u8; the tail is 0."""
    return pack_int4(quantize(x, scale, zero_point, group_index, 4))


def dequantize_int4(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_index: Tensor,
    num_columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Real values [*, K] of packed 4-bit codes [*, ceil(K/32) * 16] u8."""
    return dequantize(unpack_int4(packed, num_columns), scale, zero_point, group_index, dtype)


def _fake_quantize_parts(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (value, inside mask, d/dscale, d/dzero_point) of broadcastable f32 scale and zero_point."""
    zero_point = zero_point.clamp(quant_min, quant_max).round()
    rounded = _rounded_quotient(x, scale)
    unclamped = rounded + zero_point
    inside = (unclamped >= quant_min) & (unclamped <= quant_max)
    steps = unclamped.clamp(quant_min, quant_max) - zero_point
    d_scale = torch.where(inside, rounded - x.float() * (1.0 / scale), steps)
    d_zero_point = torch.where(inside, torch.zeros_like(steps), -scale.expand_as(steps))
    return steps * scale, inside, d_scale, d_zero_point


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_index: Tensor,
    quant_min: int,
    quant_max: int,
    channel_axis: int = -1,
) -> Tensor:
    """Quantize and dequantize x with learnable parameters; gradients are those of `fake_quantize_backward`.

    Args: x [*] f32|bf16|f16; scale, zero_point [G] f32, or [G, C] with channel_axis >= 0; group_index [1]
    i32. A real-valued zero_point acts as its nearest code. Returns x's shape and dtype.
    """
    group = int(group_index)
    s, z = (_expand(p[group], x, channel_axis) for p in (scale, zero_point))
    return _fake_quantize_parts(x, s, z, quant_min, quant_max)[0].to(x.dtype)


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_index: Tensor,
    quant_min: int,
    quant_max: int,
    channel_axis: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """LSQ gradients (Esser et al. 2020) for x, scale and zero_point; rows of other groups get 0."""
    group = int(group_index)
    s, z = (_expand(p[group], x, channel_axis) for p in (scale, zero_point))
    _, inside, d_scale, d_zero_point = _fake_quantize_parts(x, s, z, quant_min, quant_max)
    grads = []
    for derivative in (d_scale, d_zero_point):
        product = grad.double() * derivative.double()
        dims = [d for d in range(x.dim()) if d != channel_axis]
        total = (
            product.sum(dims)
            if dims and channel_axis >= 0
            else product.sum()
            if channel_axis < 0
            else product
        )
        row = torch.zeros_like(scale)
        row[group] = total.to(scale.dtype)
        grads.append(row)
    return grad * inside.to(grad.dtype), grads[0], grads[1]


def fake_quantize_mixture(
    x: Tensor, scale: Tensor, zero_point: Tensor, importance: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """sum_g importance[g] * Q_g(x): the mixture of quantized values of the search (method.md section 6).

    Args: x [*] f32|bf16|f16; scale, zero_point, importance [G] f32. Returns x's shape and dtype.
    Groups are added in ascending order in float32.
    """
    total = torch.zeros_like(x, dtype=torch.float32)
    for s, z, weight in zip(scale, zero_point, importance, strict=True):
        total = total + weight * _fake_quantize_parts(x, s, z, quant_min, quant_max)[0]
    return total.to(x.dtype)


def fake_quantize_mixture_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    importance: Tensor,
    quant_min: int,
    quant_max: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the mixture for x, scale [G], zero_point [G] and importance [G]."""
    grad_x = torch.zeros_like(x, dtype=torch.float32)
    rows: list[Tensor] = []
    g64 = grad.double()
    for s, z, weight in zip(scale, zero_point, importance, strict=True):
        value, inside, d_scale, d_zero_point = _fake_quantize_parts(x, s, z, quant_min, quant_max)
        grad_x = grad_x + weight * inside.float()
        parts = (weight.double() * d_scale.double(), weight.double() * d_zero_point.double(), value.double())
        rows.append(torch.stack([(g64 * part).sum() for part in parts]))
    sums = torch.stack(rows).to(scale.dtype) if rows else scale.new_zeros(0, 3)
    return (grad.float() * grad_x).to(x.dtype), sums[:, 0], sums[:, 1], sums[:, 2]


def histogram_bin(x: Tensor) -> Tensor:
    """Bin of each element: slices of the float32 bit pattern, see HISTOGRAM_* (int64, x's shape)."""
    bits = x.float().contiguous().view(torch.int32).long()
    slot = ((bits & 0x7FFFFFFF) >> 18) - ((127 + HISTOGRAM_MIN_EXPONENT) << 5)
    offset = slot.clamp(-1, HISTOGRAM_SIDE_BINS - 1) + 1
    return HISTOGRAM_SIDE_BINS + torch.where(bits < 0, -offset, offset)


def observe(x: Tensor, counts: Tensor, extrema: Tensor, step_index: Tensor) -> None:
    """Add x [*] to the histogram row and widen the extrema of one step, in place.

    Args: counts [T, HISTOGRAM_BINS] i64; extrema [T, 2] f32: min, max, from +inf, -inf on; NaN sticks as NaN.
    """
    if x.numel() == 0:
        return
    row = int(step_index)
    counts[row] += torch.bincount(histogram_bin(x).flatten(), minlength=HISTOGRAM_BINS)
    values = x.float()
    extrema[row, 0] = torch.minimum(extrema[row, 0], values.min())
    extrema[row, 1] = torch.maximum(extrema[row, 1], values.max())


def _segment_sum(
    accumulators: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    group_indices: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    weight_sums: Sequence[Tensor],
    bias: Tensor | None,
) -> Tensor:
    """Dequantise and add exact int accumulators [*, O]: per segment one fused multiply-add onto the bias."""
    total = torch.zeros_like(accumulators[0], dtype=torch.float64)
    if bias is not None:
        total += bias.double()
    for s, acc in enumerate(accumulators):
        group = int(group_indices[s])
        centred = (acc - zero_points[s][group].long() * weight_sums[s].long()).float()
        factor = scales[s][group] * weight_scales[s]  # rounded to float32, as the kernels do
        total = (total + centred.double() * factor.double()).float().double()
    return total.float()


def activate(y: Tensor, activation: Activation) -> Tensor:
    """The activation of y [*, O] f32 along its last dimension, computed in float64, [*, O] or [*, O / 2]."""
    if activation is Activation.SILU:
        return F.silu(y.double()).float()
    if activation is Activation.GEGLU:
        value, gate = y[..., 0::2].double(), y[..., 1::2].double()
        return (value * F.gelu(gate)).float()
    if activation in (Activation.GELU, Activation.GELU_TANH):
        return F.gelu(y.double(), approximate="none" if activation is Activation.GELU else "tanh").float()
    return y


def finish(y: Tensor, epilogue: Epilogue, dtype: torch.dtype) -> Tensor:
    """The rest of an epilogue for y [images, *, O] f32 that holds the bias: dtype, or int8 codes.

    The residual has its channels last here. Every step rounds to float32.
    """
    rows = (-1, *[1] * (y.dim() - 2), y.shape[-1])
    if epilogue.row_scale is not None:
        y = y * epilogue.row_scale.reshape(rows)
    if epilogue.row_bias is not None:
        y = y + epilogue.row_bias.reshape(rows)
    if epilogue.residual is not None:
        y = y + epilogue.residual.float()
    y = activate(y * epilogue.output_scale, epilogue.activation)
    if epilogue.quantizer is None:
        return y.to(dtype)
    q = epilogue.quantizer
    return quantize(y, q.scale, q.zero_point, q.group_index, q.num_bits)


def linear(
    inputs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    group_indices: Sequence[Tensor],
    weight_codes: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    weight_sums: Sequence[Tensor],
    epilogue: Epilogue,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Integer linear layer over one or two segments: inputs [*, K_s] i8 codes, weight_codes [O, K_s] i8.

    Unlike the native op it takes plain codes, not packed weights or activations. Returns [*, O], under GEGLU
    [*, O / 2], of dtype, or int8 codes where the epilogue has a quantizer.
    """
    accumulators = [
        (x.double() @ w.double().t()).round().long() for x, w in zip(inputs, weight_codes, strict=True)
    ]
    y = _segment_sum(
        accumulators, scales, zero_points, group_indices, weight_scales, weight_sums, epilogue.bias
    )
    rows = epilogue.row_bias if epilogue.row_scale is None else epilogue.row_scale
    if rows is None:
        return finish(y, epilogue, dtype)
    images = y.reshape(rows.shape[0], -1, y.shape[-1])
    if epilogue.residual is not None:
        epilogue = replace(epilogue, residual=epilogue.residual.reshape(images.shape))
    result = finish(images, epilogue, dtype)
    return result.reshape(*y.shape[:-1], result.shape[-1])


def conv2d(
    inputs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    group_indices: Sequence[Tensor],
    weight_codes: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    weight_sums: Sequence[Tensor],
    epilogue: Epilogue,
    geometry: ConvGeometry,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Integer convolution: inputs [N, C_s, H, W] i8 codes, weight_codes [O, C_s/groups, kh, kw] i8.

    The halo holds real 0, i.e. the segment's zero-point code. Returns [N, O, Ho, Wo], under GEGLU
    [N, O / 2, Ho, Wo], channels_last, of dtype, or int8 codes where the epilogue has a quantizer.
    """
    g = geometry
    top, left = g.padding
    bottom, right = g.padding if g.padding_end is None else g.padding_end
    accumulators = []
    for s, (x, w) in enumerate(zip(inputs, weight_codes, strict=True)):
        halo = float(zero_points[s][int(group_indices[s])])
        seen = x.double().repeat_interleave(g.upsample, 2).repeat_interleave(g.upsample, 3)
        padded = F.pad(seen, (left, right, top, bottom), value=halo)
        acc = F.conv2d(padded, w.double(), None, g.stride, 0, g.dilation, g.groups)
        accumulators.append(acc.round().long().permute(0, 2, 3, 1))
    y = _segment_sum(
        accumulators, scales, zero_points, group_indices, weight_scales, weight_sums, epilogue.bias
    )
    if epilogue.residual is not None:
        epilogue = replace(epilogue, residual=epilogue.residual.permute(0, 2, 3, 1))
    return finish(y, epilogue, dtype).permute(0, 3, 1, 2)


def _codes(y: Tensor, q: OutputQuantizer) -> Tensor:
    y = rotate(y, q.hadamard) if q.hadamard else y  # y [*, C]
    return quantize(y, q.scale, q.zero_point, q.group_index, q.num_bits)


def _normalize(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of x over dims, computed in float64, kept as float32."""
    mean = x.double().mean(dims, keepdim=True)
    variance = (x.double() - mean).square().mean(dims, keepdim=True)
    return mean.float(), (1.0 / (variance + eps).sqrt()).float()


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c in float64, rounded to float32: a fused multiply-add up to double rounding."""
    return (a.double() * b.double() + c.double()).float()


def _affine(
    x: Tensor,
    moments: tuple[Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    modulation: Sequence[Tensor] | None,  # scale, shift
) -> Tensor:
    """(x - mean) * rstd * weight + bias, then y * (1 + scale) + shift: one fma each; operands broadcast."""
    mean, rstd = moments
    factor = rstd if weight is None else rstd * weight
    offset = _fma(-mean, factor, torch.zeros(()) if bias is None else bias)
    y = _fma(x.float(), factor, offset)
    return y if modulation is None else _fma(y, 1.0 + modulation[0], modulation[1])


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
    """Codes of the normalised concatenation of inputs [N, C_s, H, W] f32|bf16|f16: [N, C, H, W] i8.

    Args: weight, bias [C] f32; modulation [N, 2C] f32 (scale, shift), y * (1 + scale) + shift.
    """
    x = torch.cat([part.float() for part in inputs], 1)
    stats = _normalize(x.reshape(x.shape[0], norm_groups, -1), (2,), eps)
    mean, rstd = (m[:, :, 0].repeat_interleave(x.shape[1] // norm_groups, 1)[..., None, None] for m in stats)
    rows = [None if row is None else row[:, None, None] for row in (weight, bias)]
    parts = None if modulation is None else modulation[:, :, None, None].chunk(2, 1)
    y = activate(_affine(x, (mean, rstd), rows[0], rows[1], parts), activation)
    return _codes(y.permute(0, 2, 3, 1), quantizer).permute(0, 3, 1, 2)


def group_norm_quantize_each(
    inputs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    quantizers: Sequence[OutputQuantizer],
    norm_groups: int,
    eps: float,
    activation: Activation,
) -> list[Tensor]:
    """Codes i8 of two inputs [N, C_s, H, W] normalised as one, each under its own quantizer."""
    rows, rest = (weight, bias, None), (norm_groups, eps, activation)
    first, second = (group_norm_quantize(inputs, *rows, q, *rest) for q in quantizers)
    return [first[:, : inputs[0].shape[1]], second[:, inputs[0].shape[1] :]]


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    modulation: Tensor | None,
    quantizer: OutputQuantizer,
    eps: float,
) -> Tensor:
    """Codes of x [*, C] f32|bf16|f16 normalised along its last dimension: [*, C] i8.

    Args: weight, bias [C] f32; modulation [images, 2C] f32 (scale, shift), images dividing the rows evenly.
    """
    rows = x.float().reshape(1 if modulation is None else modulation.shape[0], -1, x.shape[-1])
    parts = None if modulation is None else modulation[:, None].chunk(2, 2)
    y = _affine(rows, _normalize(rows, (2,), eps), weight, bias, parts).reshape(x.shape)
    return _codes(y, quantizer)


def attention_quantize(
    query: Tensor, key: Tensor, value: Tensor, quantizer: OutputQuantizer, heads: int, int8: bool = False
) -> Tensor:
    """Codes [N, L, C] i8 of softmax(query key^T / sqrt(D)) value per head; key, value [N, M, C].

    With `int8`, both products are those of 8-bit codes.
    """
    return _codes(attend(query, key, value, heads, int8).float(), quantizer)


def set_step(
    timestep: Tensor,
    timesteps: Tensor,
    table: Tensor,
    correction: Tensor | None,
    step_index: Tensor,
    group_index: Tensor,
    current_correction: Tensor,
) -> None:
    """Write the first of the nearest timesteps and its rows of the tables, in place.

    Args:
        timestep: [1] of any type.
        timesteps: [T] f32.
        table, correction: [T, S] i32, [T, 2] f32.
        step_index, group_index, current_correction: [1] i32, [S] i32, [2] f32.
    """
    step = (timesteps - timestep.float()).abs().argmin(0, keepdim=True)
    step_index.copy_(step)
    group_index.copy_(table.index_select(0, step)[0])
    if correction is not None:
        current_correction.copy_(correction.index_select(0, step)[0])
