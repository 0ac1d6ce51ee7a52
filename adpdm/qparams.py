"""From ranges and histograms to scales and zero-points: the arithmetic of calibration, without modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import (
    HISTOGRAM_BINS,
    HISTOGRAM_MIN_EXPONENT,
    HISTOGRAM_OCTAVE_BINS,
    HISTOGRAM_SIDE_BINS,
    signed_range,
)

MIN_SCALE = 2.0**-60  # keeps 1 / scale finite in float32 with room to spare
CLIP_RATIOS = tuple(1.0 - 0.01 * i for i in range(61))  # 1.00 .. 0.40 of max|w|
CANDIDATES_PER_SIDE = 16  # candidate bounds of a range, each side of zero
TIGHTEST_CLIP = 0.3  # candidates go down to this fraction of the smallest step's extremum
CHUNK = 2**17  # elements of a weight at a time: their float64 copies stay in the cache (1 MB each)
REFINEMENTS = 3  # rounds of a local 9 x 9 grid around the best candidate


def range_to_qparams(low: Tensor, high: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Scale [*] f32 and zero-point [*] i32 of an asymmetric quantizer that covers [low, high] and real 0.

    A degenerate range (low == high == 0) gives scale 1: finite, positive, and exact for the zeros it saw.
    """
    quant_min, quant_max = signed_range(num_bits)
    low, high = low.double().clamp(max=0.0), high.double().clamp(min=0.0)
    width = high - low
    scale = torch.where(width > 0, (width / (quant_max - quant_min)).clamp_min(MIN_SCALE), 1.0)
    zero_point = (quant_min - low / scale).round().clamp(quant_min, quant_max)
    return scale.float(), zero_point.to(torch.int32)


def qparams_to_range(scale: Tensor, zero_point: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Real values of the smallest and the largest code."""
    quant_min, quant_max = signed_range(num_bits)
    return (quant_min - zero_point) * scale, (quant_max - zero_point) * scale


# ---- weights -----------------------------------------------------------------------------------------------


def weight_scale_mse(weight: Tensor, num_bits: int, ratios: Sequence[float] = CLIP_RATIOS) -> Tensor:
    """Per-output-channel symmetric scale with the least squared error over clipping ratios of max|w|.

    Args: weight [O, *] float; ratios in (0, 1]. Returns scale [O] f32, finite and positive also for all-zero
    channels.
    Source: method.md section 2.
    """
    return torch.cat([_scale_of_rows(weight[rows], num_bits, ratios) for rows in _chunks(weight)])


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight [O, *] to be quantized at a time, at least one slice.

    Trying 61 ratios on 7.4 M weights takes 128 ns each so, 1549 at once (one thread of an EPYC, CPU time).
    """
    rows = max(1, CHUNK // max(1, weight[:1].numel()))
    return (slice(i, i + rows) for i in range(0, max(1, weight.shape[0]), rows))


def _chunks(weight: Tensor) -> Iterator[slice]:
    """The same where it is the cache that counts; a GPU wants the whole weight."""
    return row_chunks(weight) if weight.device.type == "cpu" else iter([slice(None)])


def _scale_of_rows(weight: Tensor, num_bits: int, ratios: Sequence[float]) -> Tensor:
    flat = weight.detach().flatten(1).double()
    bound = 2 ** (num_bits - 1) - 1
    largest = flat.abs().amax(1)
    best_error = torch.full_like(largest, float("inf"))
    best_scale = torch.ones_like(largest)
    for ratio in ratios:
        scale = torch.where(largest > 0, (largest * ratio / bound).clamp_min(MIN_SCALE), 1.0)
        error = (_symmetric_codes(flat, scale, bound) * scale[:, None] - flat).square().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale.float()


def weight_codes(weight: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """Codes of weight [O, *] under scale [O], int8 in [-(2^(b-1)-1), 2^(b-1)-1]."""
    bound = 2 ** (num_bits - 1) - 1
    exact = scale.double()
    codes = [
        _symmetric_codes(weight[rows].detach().flatten(1).double(), exact[rows], bound).to(torch.int8)
        for rows in _chunks(weight)
    ]
    return torch.cat(codes).view(weight.shape)


def _symmetric_codes(flat: Tensor, scale: Tensor, bound: int) -> Tensor:
    return (flat / scale[:, None]).round().clamp(-bound, bound)


# ---- activations: errors of candidate ranges from histograms -----------------------------------------------


def histogram_edges(device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Lower and upper edge of every histogram bin, [HISTOGRAM_BINS] f64 each; the zero bin is [0, 0]."""
    slot = torch.arange(HISTOGRAM_SIDE_BINS + 1, dtype=torch.float64, device=device)
    octave = (slot / HISTOGRAM_OCTAVE_BINS).floor()
    fraction = slot / HISTOGRAM_OCTAVE_BINS - octave
    edge = torch.exp2(octave + HISTOGRAM_MIN_EXPONENT) * (1 + fraction)
    zero = slot.new_zeros(1)
    low = torch.cat([-edge[1:].flip(0), zero, edge[:-1]])
    high = torch.cat([-edge[:-1].flip(0), zero, edge[1:]])
    assert low.numel() == HISTOGRAM_BINS
    return low, high


def _rounding_integral(u: Tensor) -> Tensor:
    """Integral of (v - rint(v))^2 from 0 to u: a unit holds 1/12, the rest e^3/3."""
    nearest = u.round()
    return nearest / 12 + (u - nearest) ** 3 / 3


def bin_errors(
    low: Tensor,
    high: Tensor,
    num_bits: int,
    extrema: tuple[float, float],
    bins: Tensor,
    clip_weight: float = 1.0,
) -> Tensor:
    """Mean squared quantization error within some bins for each candidate range, [R, len(bins)] f64.

    The density inside a bin is taken as uniform, for which the error has a closed form, so that also bins
    wider than a quantization step count rightly. Args: low, high [R] f64; extrema: true (min, max) of the
    data, which trim the outermost bins; bins: indices i64, the occupied ones; clip_weight: of the error of
    values outside of the range.
    """
    scale, zero_point = range_to_qparams(low, high, num_bits)
    scale = scale.double()
    bottom, top = qparams_to_range(scale, zero_point.double(), num_bits)
    left, right = (edge[bins].clamp(*extrema) for edge in histogram_edges(bins.device))

    def integral(x: Tensor) -> Tensor:
        inside = torch.minimum(torch.maximum(x, bottom[:, None]), top[:, None])
        below, above = (x - bottom[:, None]).clamp(max=0), (x - top[:, None]).clamp(min=0)
        rounding = _rounding_integral(inside / scale[:, None]) * scale[:, None] ** 3
        return rounding + clip_weight * (below**3 + above**3) / 3

    width = right - left
    mean = (integral(right) - integral(left)) / width.clamp_min(1e-300)
    # A bin trimmed to one value (constant data, or the zero bin) costs the error of that value.
    rounded = (left / scale[:, None]).round() * scale[:, None]
    at_point = torch.minimum(torch.maximum(rounded, bottom[:, None]), top[:, None]) - left
    is_outside = (left < bottom[:, None]) | (left > top[:, None])
    of_point = at_point.square() * torch.where(is_outside, clip_weight, 1.0)
    return torch.where(width > 0, mean.clamp_min(0.0), of_point)


def candidate_ranges(extrema: Tensor) -> tuple[Tensor, Tensor]:
    """Candidate (low, high) pairs of a layer from its per-step extrema [T, 2]: a geometric grid, [R] f64."""
    lows, highs = extrema[:, 0].double().clamp(max=0).abs(), extrema[:, 1].double().clamp(min=0)
    low, high = (_geometric_grid(side) for side in (lows, highs))
    grid = torch.cartesian_prod(-low, high)
    return grid[:, 0], grid[:, 1]


def _geometric_grid(magnitudes: Tensor) -> Tensor:
    largest = magnitudes.max()
    if largest == 0:
        return magnitudes.new_zeros(1)
    smallest = magnitudes[magnitudes > 0].min().clamp_min(largest * 2.0**-12) * TIGHTEST_CLIP
    exponent = torch.linspace(0, 1, CANDIDATES_PER_SIDE, dtype=torch.float64, device=magnitudes.device)
    return largest * (smallest / largest) ** exponent


def block_ranges(extrema: Tensor) -> tuple[Tensor, Tensor]:
    """Range that covers the steps [i, j) for every i < j, [T * (T + 1) / 2] f64, in the order of block_index.

    Args: extrema [T, 2] f32.
    """
    steps = extrema.shape[0]
    lows = [extrema[i:, 0].double().cummin(0).values for i in range(steps)]
    highs = [extrema[i:, 1].double().cummax(0).values for i in range(steps)]
    return torch.cat(lows), torch.cat(highs)


def few_ranges(extrema: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Range that covers each group of table [T] i32, each step, and all of them, [G + T + 1] f64 each.

    What a partition that is fixed asks of `block_ranges`, whose number goes by T squared: at T = 1000 half a
    million, 4 GB of errors. Args: extrema [T, 2] f32.
    """
    groups = [extrema[table == group] for group in table.unique()]
    covered = torch.stack([torch.stack([x[:, 0].min(), x[:, 1].max()]) for x in (*groups, extrema)])
    low, high = torch.cat([covered, extrema]).double().unbind(1)
    return low, high


def block_index(first: int, steps: int) -> int:
    """Where the ranges of the blocks that begin with step `first` begin: one for each end."""
    return first * steps - first * (first - 1) // 2


@dataclass(frozen=True)
class StepErrors:
    """Squared error of every step under every candidate range of one layer."""

    low: Tensor  # [R] f64
    high: Tensor  # [R] f64
    error: Tensor  # [T, R] f64, sums over elements, divided by the number of elements of the step


def step_errors(
    counts: Tensor,
    extrema: Tensor,
    num_bits: int,
    candidates: tuple[Tensor, Tensor] | None = None,
    clip_weight: float = 1.0,
) -> StepErrors:
    """E[k][r] of method.md section 4 from counts [T, HISTOGRAM_BINS] i64 and extrema [T, 2] f32.

    Args: candidates: (low, high) [R] f64 each; by default those of `candidate_ranges`; clip_weight: see
        `bin_errors`.
    """
    low, high = candidate_ranges(extrema) if candidates is None else candidates
    bounds = (float(extrema[:, 0].min()), float(extrema[:, 1].max()))
    occupied = _occupied(counts.sum(0))
    errors = bin_errors(low, high, num_bits, bounds, occupied, clip_weight)
    density = counts[:, occupied].double() / counts.sum(1, keepdim=True).clamp_min(1)
    return StepErrors(low, high, density @ errors.t())


def _occupied(counts: Tensor) -> Tensor:
    """Indices of the bins [HISTOGRAM_BINS] that hold anything: a third of them, typically."""
    return counts.nonzero().flatten()


def best_range(
    counts: Tensor, extrema: Tensor, num_bits: int, start: tuple[float, float], clip_weight: float = 1.0
) -> tuple[float, float]:
    """Refine a range by local search on the histogram of the steps that share it.

    Args: counts [HISTOGRAM_BINS], weighted sum over the steps; extrema [2]; start: the best candidate;
        clip_weight: see `bin_errors`.
    """
    bounds = (float(extrema[0]), float(extrema[1]))
    occupied = _occupied(counts)
    density = counts[occupied].double()
    low, high = start
    spread = 0.2
    for _ in range(REFINEMENTS):
        factor = torch.linspace(1 - spread, 1 + spread, 9, dtype=torch.float64, device=counts.device)
        grid = torch.cartesian_prod(low * factor, high * factor) if high > 0 and low < 0 else None
        lows = grid[:, 0] if grid is not None else low * factor
        highs = grid[:, 1] if grid is not None else high * factor
        error = bin_errors(lows, highs, num_bits, bounds, occupied, clip_weight) @ density
        best = int(error.argmin())
        low, high = float(lows[best]), float(highs[best])
        spread /= 4
    return low, high
