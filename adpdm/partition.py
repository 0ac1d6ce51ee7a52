"""Partitions the steps of a layer into groups: equal blocks, one each, or the dynamic-programming optimum.

Histograms come to the CPU for this: many operations on few numbers, with equal results for every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import QuantConfig, RangeMethod
from .processes import ALONE, Processes
from .qparams import StepErrors, best_range, block_index, block_ranges, few_ranges, step_errors
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


def partition(
    quantizers: Sequence[ActivationQuantizer],
    importance: Tensor,
    config: QuantConfig,
    processes: Processes = ALONE,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> list[GroupGain]:
    """Give quantizers that have observed their groups of steps and their ranges, by the config.

    Args:
        importance: [T] f64, of every step.
        processes: that share the quantizers.
        watch: called with (quantizers done, in total) of this process.

    Returns: what the groups gain on each of them.
    """
    costs = [1.0] * len(quantizers)
    own = processes.share(costs)
    fixed = None if _is_optimised(config) else fixed_table(config, len(importance))
    observed = all_step_errors([quantizers[i] for i in own], importance, config.range_method, fixed)
    errors = dict(zip(own, observed, strict=True))
    num_groups = config.groups_per_layer(len(importance))
    shared = None
    if config.shared_groups and _is_optimised(config):
        relative = {i: [relative_costs(e.error, config.range_method)] for i, e in errors.items()}
        shared = shared_table([cost for (cost,) in processes.gather(costs, relative)], num_groups)
    made: dict[int, list[Tensor]] = {}
    for i, error in errors.items():
        table = initial_table(error.error, config) if shared is None else shared
        gain = group_gain(error, table)
        ranges = group_ranges(quantizers[i], error, table, num_groups, importance, config.range_method)
        gains = torch.tensor([gain.gain_db, gain.limit_db], dtype=torch.float64, device="cpu")
        made[i] = [table, *ranges, gains]
        watch(len(made), len(own))
    result = []
    for quantizer, (table, low, high, gains) in zip(quantizers, processes.gather(costs, made), strict=True):
        quantizer.set_ranges(low, high, table)
        result.append(GroupGain(*gains.tolist()))
    return result


def _is_optimised(config: QuantConfig) -> bool:
    return config.grouping not in ("shared", "per_step", "uniform")


def initial_table(error: Tensor, config: QuantConfig) -> Tensor:
    """Starting table [T] i32 of a quantizer with errors [T, R] by the grouping of the config."""
    steps = len(error)
    if _is_optimised(config):
        return dynamic_programming_table(error, config.groups_per_layer(steps), config.range_method)
    return fixed_table(config, steps)


def fixed_table(config: QuantConfig, num_steps: int) -> Tensor:
    """Table [T] i32 of a grouping that is not optimised."""
    return uniform_table(num_steps, config.groups_per_layer(num_steps))


def relative_costs(error: Tensor, method: RangeMethod) -> Tensor:
    """Block costs [T + 1, T + 1] f64 relative to the error of the best single range."""
    return _block_costs(error, method) / error.sum(0).min().clamp_min(1e-30)


def shared_table(costs: Sequence[Tensor], num_groups: int) -> Tensor:
    """One partition for the net, [T] i32: each layer counts by its relative costs [T + 1, T + 1]."""
    return tables_from_cost(sum(costs[1:], costs[0]), num_groups)


def all_step_errors(
    quantizers: Sequence[ActivationQuantizer],
    importance: Tensor,
    method: RangeMethod,
    fixed: Tensor | None = None,
) -> list[StepErrors]:
    """Error tables of every quantizer on the CPU, its steps weighted by importance [T] f64.

    Args:
        fixed: table [T] i32 of the groups, where no other partition will be asked for.
    """
    weight = importance.clamp_min(UNCHOSEN_WEIGHT)[:, None]
    result = []
    for q in quantizers:
        counts, extrema = _statistics(q)
        candidates = None
        if method == "minmax":
            candidates = block_ranges(extrema) if fixed is None else few_ranges(extrema, fixed)
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


def group_ranges(
    quantizer: ActivationQuantizer,
    errors: StepErrors,
    table: Tensor,
    num_groups: int,
    importance: Tensor,
    method: RangeMethod,
) -> tuple[Tensor, Tensor]:
    """Range (low, high) [G] f32 of each group with the least error on its own steps, or their extrema.

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
    return torch.tensor(lows, device="cpu"), torch.tensor(highs, device="cpu")


def _clip_weight(method: RangeMethod) -> float:
    return CLIP_WEIGHT if method == "clip_weighted" else 1.0


def _statistics(quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor]:
    """Counts [T, HISTOGRAM_BINS] i64 and extrema [T, 2] f32 of a quantizer that has observed, on the CPU."""
    assert quantizer.counts is not None
    assert quantizer.extrema is not None
    return quantizer.counts.cpu(), quantizer.extrema.cpu()
