"""Partitions of timesteps: the dynamic programme against all partitions, and the ranges fitted to groups."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from adpdm import QuantConfig, reference
from adpdm.config import RangeMethod
from adpdm.partition import (
    all_step_errors,
    dynamic_programming_table,
    fixed_table,
    group_gain,
    group_ranges,
    initial_table,
    partition,
    relative_costs,
    shared_table,
    uniform_table,
)
from adpdm.qparams import StepErrors, qparams_to_range, step_errors
from adpdm.quantizers import ActivationQuantizer
from adpdm.step import StepState


def contiguous_partitions(steps: int, groups: int) -> list[list[range]]:
    """Every way to cut `steps` into `groups` non-empty blocks."""
    cuts = itertools.combinations(range(1, steps), groups - 1)
    return [[range(a, b) for a, b in zip((0, *cut), (*cut, steps), strict=True)] for cut in cuts]


def cost_of(blocks: list[range], error: Tensor) -> float:
    """Each block pays for the one range that suits its steps best."""
    return sum(float(error[list(block)].sum(0).min()) for block in blocks)


def blocks_of(table: Tensor) -> list[range]:
    """The blocks of a table, after checking that they are contiguous and in order."""
    values, counts = torch.unique_consecutive(table, return_counts=True)
    assert values.tolist() == list(range(len(values)))
    ends = counts.cumsum(0).tolist()
    return [range(end - count, end) for end, count in zip(ends, counts.tolist(), strict=True)]


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dynamic_programming_equals_brute_force(groups: int, seed: int) -> None:
    error = torch.rand(8, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    blocks = blocks_of(dynamic_programming_table(error, groups, "mse"))
    assert len(blocks) == groups
    best = min(cost_of(p, error) for p in contiguous_partitions(8, groups))
    assert cost_of(blocks, error) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("groups", [1, 3, 7])
def test_dynamic_programming_uses_every_group_when_nothing_is_at_stake(groups: int) -> None:
    table = dynamic_programming_table(torch.zeros(7, 4, dtype=torch.float64), groups, "mse")
    assert len(blocks_of(table)) == groups


def test_group_gain_of_literal_errors() -> None:
    """Two ranges, each right for half of the steps: separated they lose 1, one alone loses 20.5."""
    error = torch.tensor([[0.0, 10.0], [0.5, 10.0], [10.0, 0.5], [10.0, 0.0]], dtype=torch.float64)
    errors = StepErrors(torch.zeros(2), torch.ones(2), error)
    gain = group_gain(errors, torch.tensor([0, 0, 1, 1], dtype=torch.int32))
    assert gain.gain_db == pytest.approx(10 * math.log10(20.5 / 1.0))
    assert gain.limit_db == gain.gain_db
    assert group_gain(errors, torch.tensor([0, 1, 0, 1], dtype=torch.int32)).gain_db < gain.gain_db
    assert group_gain(errors, torch.zeros(4, dtype=torch.int32)).gain_db == 0


def test_group_gain_is_zero_where_nothing_is_lost() -> None:
    errors = StepErrors(torch.zeros(1), torch.ones(1), torch.zeros(3, 1, dtype=torch.float64))
    assert group_gain(errors, torch.zeros(3, dtype=torch.int32)).limit_db == 0


@pytest.mark.parametrize("seed", range(5))
def test_group_gain_lies_between_one_range_and_one_per_step(seed: int) -> None:
    error = torch.rand(9, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    errors = StepErrors(torch.zeros(6), torch.ones(6), error)
    gain = group_gain(errors, dynamic_programming_table(error, 3, "mse"))
    assert 0 < gain.gain_db < gain.limit_db


def test_uniform_table_literal() -> None:
    assert uniform_table(10, 3).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert uniform_table(10, 3).dtype == torch.int32


@pytest.mark.parametrize(("steps", "groups"), [(50, 8), (30, 8), (7, 7), (5, 1), (1, 1)])
def test_uniform_table_blocks_differ_by_one_step_at_most(steps: int, groups: int) -> None:
    sizes = [len(block) for block in blocks_of(uniform_table(steps, groups))]
    assert len(sizes) == groups
    assert max(sizes) - min(sizes) <= 1


# ---- tables of whole networks ------------------------------------------------------------------------------


def observers(rows_per_layer: list[list[Tensor]], groups: int, bits: int = 4) -> list[ActivationQuantizer]:
    """Quantizers that have observed one tensor per step."""
    steps = len(rows_per_layer[0])
    state = StepState(len(rows_per_layer), steps)
    quantizers = []
    for slot, rows in enumerate(rows_per_layer):
        quantizer = ActivationQuantizer(bits, groups, slot, state)
        quantizer.start_observing(steps)
        for step, row in enumerate(rows):
            state.set_step(step)
            quantizer(row)
        quantizers.append(quantizer)
    return quantizers


def noise(scales: list[float], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4000, generator=generator) * s for s in scales]


def ones(steps: int) -> Tensor:
    """Every step counts alike."""
    return torch.ones(steps, dtype=torch.float64)


def config(grouping: str, groups: int, steps: int, shared: bool = False) -> QuantConfig:
    return QuantConfig(
        grouping=grouping,  # type: ignore[arg-type]
        num_groups=groups,
        num_inference_steps=steps,
        shared_groups=shared,
        activation_bits=4,
    )


@pytest.mark.parametrize(
    ("grouping", "wanted"),
    [
        ("shared", [0, 0, 0, 0]),
        ("uniform", [0, 0, 1, 1]),
        ("per_step", [0, 1, 2, 3]),
        ("dp", [0, 1, 1, 1]),  # only step 0 differs
        ("search", [0, 1, 1, 1]),  # starts from the dynamic programme
    ],
)
def test_initial_table_by_grouping(grouping: str, wanted: list[int]) -> None:
    quantizers = observers([noise([10.0, 1.0, 1.0, 1.0])], 2)
    (errors,) = all_step_errors(quantizers, ones(4), "mse")
    assert initial_table(errors.error, config(grouping, 2, 4)).tolist() == wanted


def test_own_tables_differ_and_shared_ones_agree() -> None:
    # The second layer asks for its cut with a hundred times the error; relative to itself it weighs the same.
    quantizers = observers([noise([9.0, 1.0, 1.0, 1.0]), noise([100.0, 100.0, 100.0, 300.0], 1)], 2)
    errors = all_step_errors(quantizers, ones(4), "mse")
    own = [initial_table(e.error, config("dp", 2, 4)) for e in errors]
    assert [t.tolist() for t in own] == [[0, 1, 1, 1], [0, 0, 0, 1]]
    shared = shared_table([relative_costs(e.error, "mse") for e in errors], 2)
    relative = [e.error / e.error.sum(0).min() for e in errors]
    costs = {tuple(map(len, p)): sum(cost_of(p, e) for e in relative) for p in contiguous_partitions(4, 2)}
    assert tuple(map(len, blocks_of(shared))) == min(costs, key=costs.__getitem__)
    assert min(costs, key=costs.__getitem__) == (1, 3)  # not what absolute errors would have chosen


def test_visits_weigh_the_steps() -> None:
    quantizers = observers([noise([1.0, 2.0, 4.0])], 1)
    plain, weighted = (
        all_step_errors(quantizers, torch.tensor(v).double(), "mse")[0].error for v in ([1, 1, 1], [3, 1, 1])
    )
    assert torch.equal(weighted[0], 3 * plain[0])
    assert torch.equal(weighted[1:], plain[1:])


def mean_error(quantizer: ActivationQuantizer, group: int, row: Tensor) -> float:
    """Mean squared error of a row under one group of a fitted quantizer."""
    index = torch.tensor([group], dtype=torch.int32)
    values = reference.fake_quantize(row, quantizer.scale, quantizer.zero_point.float(), index, -8, 7)
    return float((values - row).double().square().mean())


def fit(
    rows: list[Tensor], table: list[int], groups: int, visits: list[int], method: RangeMethod = "mse"
) -> ActivationQuantizer:
    quantizer = observers([rows], groups)[0]
    importance = torch.tensor(visits, dtype=torch.float64)
    errors = all_step_errors([quantizer], importance, method)[0]
    group_of = torch.tensor(table, dtype=torch.int32)
    ranges = group_ranges(quantizer, errors, group_of, groups, importance, method)
    quantizer.set_ranges(*ranges, group_of)
    return quantizer


def test_group_ranges_fit_each_group_to_its_own_steps() -> None:
    rows = noise([1.0, 1.0, 8.0, 8.0])
    own, shared = fit(rows, [0, 0, 1, 1], 2, [1] * 4), fit(rows, [0, 0, 0, 0], 1, [1] * 4)
    assert own.table.tolist() == [0, 0, 1, 1]
    # 4 bits over a range 8 times too wide cost 64 times the noise; clipping takes some of that back.
    assert mean_error(own, 0, rows[0]) < mean_error(shared, 0, rows[0]) / 10
    assert mean_error(own, 1, rows[2]) < mean_error(own, 0, rows[2]) / 10


def test_group_ranges_does_not_depend_on_steps_that_were_not_selected() -> None:
    rows = noise([1.0, 30.0])
    fitted, alone = fit(rows, [0, 0], 1, [1, 0]), fit(rows[:1], [0], 1, [1])
    # Step 1 counts 1e-6 of step 0: its error of about 30^2 adds 1e-3, less than a twentieth of the optimum.
    assert mean_error(fitted, 0, rows[0]) < 1.2 * mean_error(alone, 0, rows[0])


def test_group_ranges_gives_an_empty_group_a_finite_range() -> None:
    quantizer = fit(noise([1.0, 2.0]), [0, 0], 3, [1, 1])
    assert quantizer.num_groups == 3
    assert bool((quantizer.scale > 0).all())
    assert bool(quantizer.scale.isfinite().all())
    assert torch.equal(quantizer.scale[1], quantizer.scale[2])


def test_group_ranges_of_constant_activations() -> None:
    quantizer = fit([torch.full((10,), 0.5), torch.zeros(10)], [0, 1], 2, [1, 1])
    assert bool((quantizer.scale > 0).all())
    assert mean_error(quantizer, 0, torch.full((10,), 0.5)) < (0.5 / 15 / 2) ** 2  # half a step of [0, 0.5]
    assert mean_error(quantizer, 1, torch.zeros(10)) == 0.0


def test_step_errors_are_per_element() -> None:
    # A step seen twice as often must not count twice: E is a mean over elements.
    once, twice = observers([noise([1.0])], 1)[0], observers([[noise([1.0])[0].repeat(2)]], 1)[0]
    a, b = (all_step_errors([q], ones(1), "mse")[0] for q in (once, twice))
    assert isinstance(a, StepErrors)
    torch.testing.assert_close(a.error, b.error, rtol=1e-12, atol=0)


def extremes(low: float, high: float) -> Tensor:
    """One value at each end of a range, many within a tenth of it."""
    body = torch.randn(5000, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    return torch.cat([torch.tensor([low, high]), (high - low) / 30 * body])


def test_group_ranges_minmax_covers_all_that_the_group_saw() -> None:
    rows = [extremes(-1.0, 2.0), extremes(-3.0, 1.0), extremes(-0.5, 0.5)]
    quantizer = fit(rows, [0, 0, 1], 2, [1, 1, 1], "minmax")
    low, high = qparams_to_range(quantizer.scale.double(), quantizer.zero_point.double(), quantizer.num_bits)
    # The zero-point is an integer, so the ends move by up to half a step of 5/15 and 1/15.
    torch.testing.assert_close(low, torch.tensor([-3.0, -0.5]).double(), rtol=0, atol=5 / 30)
    torch.testing.assert_close(high, torch.tensor([2.0, 0.5]).double(), rtol=0, atol=5 / 30)
    clipped = fit(rows, [0, 0, 1], 2, [1, 1, 1], "mse")
    assert bool((clipped.scale < quantizer.scale).all()), "outliers are worth clipping, or this says nothing"


def test_group_ranges_clips_less_where_clipping_counts_more() -> None:
    rows = [extremes(-1.0, 2.0), extremes(-3.0, 1.0)]
    widest, weighted, plain = (
        fit(rows, [0, 0], 1, [1, 1], method).scale for method in ("minmax", "clip_weighted", "mse")
    )
    assert float(plain) < float(weighted) <= float(widest)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_dynamic_programming_with_minmax_equals_brute_force(groups: int) -> None:
    rows = [extremes(-a, b) for a, b in ((1, 2), (1, 3), (4, 1), (0.2, 0.1), (0.3, 0.1), (2, 2))]
    quantizer = observers([rows], 1)[0]
    assert quantizer.counts is not None
    assert quantizer.extrema is not None
    error = all_step_errors([quantizer], ones(len(rows)), "minmax")[0].error

    def cost(blocks: list[range]) -> float:
        total = 0.0
        for block in blocks:
            seen = quantizer.extrema[list(block)]
            bounds = (seen[:, :1].min(0).values.double(), seen[:, 1:].max(0).values.double())
            of_range = step_errors(quantizer.counts, quantizer.extrema, quantizer.num_bits, bounds).error
            total += float(of_range[list(block)].sum())
        return total

    blocks = blocks_of(dynamic_programming_table(error, groups, "minmax"))
    best = min(cost(p) for p in contiguous_partitions(len(rows), groups))
    assert cost(blocks) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("grouping", ["shared", "uniform", "per_step"])
def test_minmax_of_fixed_groups_tries_few_ranges(grouping: str) -> None:
    rows = [extremes(-a, b) for a, b in ((1, 2), (1, 3), (4, 1), (0.2, 0.1), (0.3, 0.1), (2, 2), (1, 1))]
    steps = len(rows)
    settings = config(grouping, 3, steps).replace(range_method="minmax")
    quantizer = observers([rows], 1)[0]
    fixed = fixed_table(settings, steps)
    few, every = (all_step_errors([quantizer], ones(steps), "minmax", t)[0] for t in (fixed, None))
    groups = int(fixed.max()) + 1
    assert few.error.shape == (steps, groups + steps + 1)
    assert every.error.shape == (steps, steps * (steps + 1) // 2)
    # Those of the groups, of single steps and of all are among those of all blocks, with the same errors.
    for low, high, error in zip(few.low, few.high, few.error.t(), strict=True):
        (same,) = ((every.low == low) & (every.high == high)).nonzero()[:1, 0]
        torch.testing.assert_close(error, every.error[:, same], rtol=1e-12, atol=0)
    for group in range(groups):
        seen = quantizer.extrema[fixed == group]  # type: ignore[index]
        assert (float(few.low[group]), float(few.high[group])) == (float(seen.min()), float(seen.max()))
    partition([quantizer], ones(steps), settings)
    low, high = qparams_to_range(quantizer.scale.double(), quantizer.zero_point.double(), quantizer.num_bits)
    assert quantizer.table.tolist() == fixed.tolist()
    torch.testing.assert_close(high - low, (few.high - few.low)[:groups], rtol=1e-6, atol=0)


def test_partition_makes_few_ranges_of_fixed_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(extrema: Tensor) -> None:
        raise AssertionError("made the ranges of all blocks")

    monkeypatch.setattr("adpdm.partition.block_ranges", refuse)
    quantizer = observers([noise([1.0, 2.0, 3.0])], 2)[0]
    partition([quantizer], ones(3), config("uniform", 2, 3).replace(range_method="minmax"))
    with pytest.raises(AssertionError, match="all blocks"):
        partition([quantizer], ones(3), config("dp", 2, 3).replace(range_method="minmax"))
