"""Partitions the steps of a layer into groups: equal blocks, one each, or the dynamic-programming optimum.

Histograms come to the CPU for this: many operations on few numbers, with equal results for every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import QuantConfig, RangeMethod
from .qparams import StepErrors, best_range, block_index, block_ranges, step_errors
from .quantizers import ActivationQuantizer

# Errors of clipping have one sign: they add up over elements and steps where those of rounding average out.
CLIP_WEIGHT = 4.0  # method.md section 4: 1, 4 and 16 were measured
UNCHOSEN_WEIGHT = 1e-6  # steps that the selection left out only decide where a group holds no chosen step


def uniform_table(num_steps: int, num_groups: int) -> Tensor:
    """Group of every step for equal blocks, [T] i32 on the CPU."""
    return (torch.arange(num_steps, device="cpu") * num_groups // num_steps).to(torch.int32)


def dynamic_programming_table(error: Tensor, num_groups: int, method: RangeMethod) -> Tensor:
    """Group of every step for the partition into contiguous groups with the least error, [T] i32.

    Args: error [T, R], see `StepErrors`; each group pays for the one range that suits its steps best, or with
    `minmax` for the one that covers them (R in the order of `block_ranges`).
    Exact in O(num_groups * T^2) after O(T^2 R) for the costs. Source: method.md section 4.
    """
    return tables_from_cost(_block_costs(error, method), num_groups)


def _block_costs(error: Tensor, method: RangeMethod) -> Tensor:
    """cost[i, j] = error of steps [i, j) under their range, [T + 1, T + 1] f64, infinite for j <= i."""
    steps = error.shape[0]
    prefix = torch.cat([error.new_zeros(1, error.shape[1]), error.cumsum(0)])
    cost = error.new_full((steps + 1, steps + 1), float("inf"))
    for i in range(steps):
        of_blocks = prefix[i + 1 :] - prefix[i]  # [ends, R]
        if method != "minmax":
            cost[i, i + 1 :] = of_blocks.amin(1)
        else:
            ends = block_index(i, steps) + torch.arange(steps - i, device=error.device)
            cost[i, i + 1 :] = of_blocks.gather(1, ends[:, None])[:, 0]
    return cost


def tables_from_cost(cost: Tensor, num_groups: int) -> Tensor:
    """The optimal table for block costs [T + 1, T + 1]."""
    steps = cost.shape[0] - 1
    best = cost[0].clone()  # best[j]: cheapest partition of [0, j) into the groups so far
    cuts = []
    for _ in range(num_groups - 1):
        candidates = best[:, None] + cost
        best, cut = candidates.min(0)
        cuts.append(cut)
    table = cost.new_zeros(steps, dtype=torch.int32)
    end = steps
    for group in range(num_groups - 1, -1, -1):
        start = int(cuts[group - 1][end]) if group else 0
        table[start:end] = group
        end = start
    return table


def initial_tables(
    quantizers: Sequence[ActivationQuantizer], errors: Sequence[StepErrors], config: QuantConfig
) -> list[Tensor]:
    """Starting table [T] i32 of every quantizer by the grouping of the config."""
    steps = errors[0].error.shape[0]
    groups = config.groups_per_layer(steps)
    if config.grouping in ("shared", "per_step", "uniform"):
        return [uniform_table(steps, groups)] * len(quantizers)
    if not config.shared_groups:
        return [dynamic_programming_table(e.error, groups, config.range_method) for e in errors]
    # One partition for the net: each layer counts by its error relative to the best single range.
    cost = sum(
        _block_costs(e.error, config.range_method) / e.error.sum(0).min().clamp_min(1e-30) for e in errors
    )
    assert isinstance(cost, Tensor)
    return [tables_from_cost(cost, groups)] * len(quantizers)


def all_step_errors(
    quantizers: Sequence[ActivationQuantizer], importance: Tensor, method: RangeMethod
) -> list[StepErrors]:
    """Error tables of every quantizer on the CPU, its steps weighted by importance [T] f64."""
    weight = importance.clamp_min(UNCHOSEN_WEIGHT)[:, None]
    result = []
    for q in quantizers:
        counts, extrema = _statistics(q)
        candidates = block_ranges(extrema) if method == "minmax" else None
        raw = step_errors(counts, extrema, q.num_bits, candidates, _clip_weight(method))
        result.append(StepErrors(raw.low, raw.high, raw.error * weight))
    return result


@dataclass(frozen=True)
class GroupGain:
    """By how much groups lower the quantization error of one tensor against one range for all steps, in dB.

    Every range is the one with the least error on the steps that share it, weighted as in the partition.
    `limit_db` is what a range for every step would gain: no grouping can do better.
    """

    gain_db: float
    limit_db: float


def group_gain(errors: StepErrors, table: Tensor) -> GroupGain:
    """What the groups of table [T] i32 gain on one tensor, and the most that any groups could."""
    error = errors.error
    grouped = sum(float(error[table == g].sum(0).min()) for g in table.unique().tolist())
    return GroupGain(_gain_db(error, grouped), _gain_db(error, float(error.amin(1).sum())))


def _gain_db(error: Tensor, remaining: float) -> float:
    """One range for all steps over `remaining`; 0 where nothing is lost at all."""
    shared = float(error.sum(0).min())
    return 10 * math.log10(shared / remaining) if remaining > 0 else 0.0


def fit_ranges(
    quantizer: ActivationQuantizer,
    errors: StepErrors,
    table: Tensor,
    num_groups: int,
    importance: Tensor,
    method: RangeMethod,
) -> None:
    """Give each group the range with the least error on the histogram of its own steps, or their extrema.

    A group without steps takes the range over all steps: finite, unused, and a start for the search.
    """
    counts, all_extrema = _statistics(quantizer)
    weight = importance.clamp_min(UNCHOSEN_WEIGHT)
    shares = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    lows, highs = [], []
    for group in range(num_groups):
        mine = table == group
        if not bool(mine.any()):
            mine = torch.ones_like(mine)
        extrema = all_extrema[mine]
        candidate = int(errors.error[mine].sum(0).argmin())
        start = (float(errors.low[candidate]), float(errors.high[candidate]))
        density = (shares[mine] * weight[mine, None]).sum(0)
        outer = torch.stack([extrema[:, 0].min(), extrema[:, 1].max()])
        if method == "minmax":
            low, high = outer.tolist()
        else:
            clip_weight = _clip_weight(method)
            low, high = best_range(density / density.sum(), outer, quantizer.num_bits, start, clip_weight)
        lows.append(low)
        highs.append(high)
    low_ends, high_ends = (torch.tensor(ends, device="cpu") for ends in (lows, highs))
    quantizer.set_ranges(low_ends, high_ends, table)


def _clip_weight(method: RangeMethod) -> float:
    return CLIP_WEIGHT if method == "clip_weighted" else 1.0


def _statistics(quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor]:
    """Counts [T, HISTOGRAM_BINS] i64 and extrema [T, 2] f32 of a quantizer that has observed, on the CPU."""
    assert quantizer.counts is not None
    assert quantizer.extrema is not None
    return quantizer.counts.cpu(), quantizer.extrema.cpu()
