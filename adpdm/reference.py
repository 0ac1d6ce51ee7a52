"""Plain-torch twins of every native operator: the oracle of the tests and the formulas in readable form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, group_index: Tensor, num_bits: int) -> Tensor:
    """Codes of x under the current group's quantizer: int8, same shape.

    Args: x [*] f32|bf16|f16; scale [G] f32; zero_point [G] i32; group_index [1] i32; num_bits 2..8.
    Source: method.md section 2. NaN gives quant_min, infinities saturate.
    """
    quant_min, quant_max = signed_range(num_bits)
    group = int(group_index)
    q = _rounded_quotient(x, scale[group]) + zero_point[group].float()
    return q.clamp(quant_min, quant_max).to(torch.int8)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, group_index: Tensor, dtype: torch.dtype
) -> Tensor:
    """Real values (q - zero_point) * scale of int8 codes [*], computed in float32, returned as dtype."""
    group = int(group_index)
    return ((codes.float() - zero_point[group].float()) * scale[group]).to(dtype)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes in [-8, 7], [*, K] i8, into [*, ceil(K/32) * 16] u8: byte j = k_j | k_(j+16) << 4."""
    columns = codes.shape[-1]
    blocks = math.ceil(columns / INT4_BLOCK)
    padded = F.pad(codes.to(torch.int16), (0, blocks * INT4_BLOCK - columns))
    halves = padded.unflatten(-1, (blocks, 2, INT4_BLOCK // 2)) & 0xF
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
    """sum_g importance[g] * Q_g(x): the mixture of quantized values of the search (method.md section 4).

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
    dtype: torch.dtype,
) -> Tensor:
    """Dequantise and add exact int accumulators [*, O]: per segment one fused multiply-add onto the bias."""
    total = torch.zeros_like(accumulators[0], dtype=torch.float64)
    if bias is not None:
        total += bias.double()
    for s, acc in enumerate(accumulators):
        group = int(group_indices[s])
        centred = (acc - zero_points[s][group].long() * weight_sums[s].long()).float()
        factor = scales[s][group] * weight_scales[s]  # rounded to float32, as the kernels do
        # float64 holds the product exactly; adding then rounding once is the fused multiply-add up to
        # double rounding, which cannot exceed one unit in the last place.
        total = (total + centred.double() * factor.double()).float().double()
    return total.to(dtype)


def linear(
    inputs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    group_indices: Sequence[Tensor],
    weight_codes: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    weight_sums: Sequence[Tensor],
    bias: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Integer linear layer over one or two segments: inputs [*, K_s] i8 codes, weight_codes [O, K_s] i8.

    Unlike the native op it takes plain codes, not packed weights. Returns [*, O] dtype.
    """
    accumulators = [
        (x.double() @ w.double().t()).round().long() for x, w in zip(inputs, weight_codes, strict=True)
    ]
    return _segment_sum(
        accumulators, scales, zero_points, group_indices, weight_scales, weight_sums, bias, dtype
    )


def conv2d(
    inputs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    group_indices: Sequence[Tensor],
    weight_codes: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    weight_sums: Sequence[Tensor],
    bias: Tensor | None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Integer convolution: inputs [N, C_s, H, W] i8 codes, weight_codes [O, C_s/groups, kh, kw] i8.

    The halo holds real 0, i.e. the segment's zero-point code. Returns [N, O, Ho, Wo] dtype, channels_last.
    """
    accumulators = []
    for s, (x, w) in enumerate(zip(inputs, weight_codes, strict=True)):
        halo = float(zero_points[s][int(group_indices[s])])
        padded = F.pad(x.double(), (padding[1], padding[1], padding[0], padding[0]), value=halo)
        acc = F.conv2d(padded, w.double(), None, stride, 0, dilation, groups)
        accumulators.append(acc.round().long().permute(0, 2, 3, 1))
    out = _segment_sum(
        accumulators, scales, zero_points, group_indices, weight_scales, weight_sums, bias, dtype
    )
    return out.permute(0, 3, 1, 2)
