"""Scales and zero-points from ranges, and the closed-form quantization error that chooses ranges."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adpdm import qparams, reference

GROUP = torch.zeros(1, dtype=torch.int32)
finite = st.floats(-(2.0**100), 2.0**100, width=32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 0.0), (3.0, 3.0), (-3.0, -3.0), (1e-45, 1e-45), (-3e38, 3e38), (-1e-30, 0.0), (5.0, -5.0)],
)
def test_range_to_qparams_is_finite_and_positive_for_degenerate_ranges(
    low: float, high: float, bits: int
) -> None:
    scale, zero_point = qparams.range_to_qparams(torch.tensor([low]), torch.tensor([high]), bits)
    assert bool((scale > 0).all())
    assert bool(scale.isfinite().all())
    assert bool((1 / scale).isfinite().all())
    quant_min, quant_max = reference.signed_range(bits)
    assert quant_min <= int(zero_point) <= quant_max


@given(a=finite, b=finite, bits=st.integers(2, 8))
def test_range_to_qparams_represents_zero_exactly(a: float, b: float, bits: int) -> None:
    scale, zero_point = qparams.range_to_qparams(torch.tensor([min(a, b)]), torch.tensor([max(a, b)]), bits)
    codes = reference.quantize(torch.zeros(1), scale, zero_point, GROUP, bits)
    assert float(reference.dequantize(codes, scale, zero_point, GROUP, torch.float32)) == 0.0
    assert int(codes) == int(zero_point)


@given(a=st.floats(-1024, 1024, width=32), b=st.floats(-1024, 1024, width=32), bits=st.integers(2, 8))
def test_range_to_qparams_covers_the_range_up_to_half_a_step(a: float, b: float, bits: int) -> None:
    low, high = torch.tensor([min(a, b)]), torch.tensor([max(a, b)])
    scale, zero_point = qparams.range_to_qparams(low, high, bits)
    bottom, top = qparams.qparams_to_range(scale.double(), zero_point, bits)
    # Rounding the zero-point shifts the range by half a step; 2^-23 of it is the float32 scale.
    slack = float(scale) * (0.5 + 2**bits * 2.0**-23)
    assert float(bottom) <= min(min(a, b), 0.0) + slack
    assert float(top) >= max(max(a, b), 0.0) - slack


# ---- weights -----------------------------------------------------------------------------------------------


def squared_error(row: list[float], scale: float, bound: int) -> float:
    """Error of one channel by the formula, in Python floats."""
    return sum((min(max(round(w / scale), -bound), bound) * scale - w) ** 2 for w in row)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weight_scale_mse_equals_brute_force(bits: int, generator: torch.Generator) -> None:
    weight = torch.randn(5, 3, 2, 2, generator=generator) ** 3  # heavy tails, so that clipping pays
    bound = 2 ** (bits - 1) - 1
    scale = qparams.weight_scale_mse(weight, bits)
    ratios = set()
    for row, got in zip(weight.flatten(1).double().tolist(), scale.tolist(), strict=True):
        largest = max(map(abs, row))
        errors = {r: squared_error(row, largest * r / bound, bound) for r in qparams.CLIP_RATIOS}
        best = min(errors, key=errors.__getitem__)
        ratios.add(best)
        assert got == pytest.approx(largest * best / bound, rel=2**-23)  # returned as float32
    assert len(ratios) > 1  # the search chose, it did not fall back to one ratio


@pytest.mark.parametrize("shape", [(7, 9, 3, 3), (5, 100), (1, 3), (3, 1)])
def test_weights_are_quantized_the_same_in_chunks(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    weight = torch.randn(shape, generator=generator)
    if len(shape) == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    scale = qparams.weight_scale_mse(weight, 4)
    codes = qparams.weight_codes(weight, scale, 4)
    assert codes.shape == weight.shape
    monkeypatch.setattr(qparams, "CHUNK", 170)  # two rows of the first, one of the second
    assert torch.equal(qparams.weight_scale_mse(weight, 4), scale)
    assert torch.equal(qparams.weight_codes(weight, scale, 4), codes)


@given(seed=st.integers(0, 2**31), bits=st.integers(2, 8))
def test_weight_scale_mse_is_not_worse_than_max_abs(seed: int, bits: int) -> None:
    row = torch.randn(1, 20, generator=torch.Generator().manual_seed(seed))
    bound = 2 ** (bits - 1) - 1
    values = row[0].double().tolist()
    ours = squared_error(values, float(qparams.weight_scale_mse(row, bits)), bound)
    # Returning float32 moves every value by up to 2^-24 of itself, the vector by that much of its norm.
    plain = squared_error(values, max(map(abs, values)) / bound, bound) ** 0.5
    assert ours**0.5 <= plain + 2.0**-24 * sum(v * v for v in values) ** 0.5


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_codes_of_channels_without_positive_weights(bits: int) -> None:
    # Known defect elsewhere: a scale from the signed maximum is negative or zero here and gives NaN.
    weight = torch.tensor([[-4.0, -2.0, -1.0], [-1e-3, 0.0, -1e-3], [0.0, 0.0, 0.0]])
    scale = qparams.weight_scale_mse(weight, bits)
    codes = qparams.weight_codes(weight, scale, bits)
    bound = 2 ** (bits - 1) - 1
    assert bool((scale > 0).all())
    assert bool(scale.isfinite().all())
    assert codes.dtype == torch.int8
    assert int(codes.min()) == -bound  # symmetric: the code -2^(b-1) is never used
    assert codes[2].tolist() == [0, 0, 0]


def test_weight_codes_clamp_what_the_clip_cut_off() -> None:
    codes = qparams.weight_codes(torch.tensor([[10.0, -10.0, 0.5]]), torch.tensor([1.0]), 4)
    assert codes.tolist() == [[7, -7, 0]]  # 0.5 is a tie and goes to even


# ---- histograms --------------------------------------------------------------------------------------------


def test_histogram_edges_agree_with_the_observer() -> None:
    low, high = qparams.histogram_edges()
    zero = reference.HISTOGRAM_SIDE_BINS
    every = torch.arange(reference.HISTOGRAM_BINS)
    assert torch.equal(reference.histogram_bin((low + high) / 2), every)
    # A positive bin owns its lower edge, the float below belongs to the bin before; mirrored below zero.
    inner = torch.nextafter(high[zero + 1 :].float(), torch.tensor(0.0))
    assert torch.equal(reference.histogram_bin(low[zero + 1 :]), every[zero + 1 :])
    assert torch.equal(reference.histogram_bin(inner), every[zero + 1 :])
    assert torch.equal(low, -high.flip(0))


def direct_error(
    low: float, high: float, bits: int, left: float, right: float, clip_weight: float = 1.0
) -> tuple[float, float]:
    """Mean squared error of uniform data in [left, right] by the midpoint rule, and a bound on the rule."""
    scale, zero_point = qparams.range_to_qparams(torch.tensor([low]), torch.tensor([high]), bits)
    quant_min, quant_max = reference.signed_range(bits)
    points = 100_000
    x = left + (right - left) * (torch.arange(points, dtype=torch.float64) + 0.5) / points
    q = ((x / scale.double()).round() + zero_point).clamp(quant_min, quant_max)
    error = (q - zero_point) * scale.double() - x
    bottom, top = ((end - zero_point) * scale.double() for end in (quant_min, quant_max))
    error *= torch.where((x < bottom) | (x > top), clip_weight**0.5, 1.0)
    # The integrand is Lipschitz with 2 max|error|: the rule errs by at most that times a quarter of a step.
    slack = float(error.abs().max()) * clip_weight**0.5 * (right - left) / points / 2
    return float(error.square().mean()), slack


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("clip_weight", [1.0, 7.0])
def test_bin_errors_equal_a_direct_sum(bits: int, clip_weight: float) -> None:
    ranges = [(-1.0, 1.0), (-0.3, 2.0), (0.0, 1.5), (-2.0, 0.0)]
    edges = qparams.histogram_edges()
    # Far inside, wider than a step, across a clip and far outside, on both sides of zero.
    bins = reference.histogram_bin(torch.tensor([0.01, 0.26, 1.01, 1.51, 7.9, -0.02, -0.301, -1.97, -5.0]))
    lows, highs = (torch.tensor(side, dtype=torch.float64) for side in zip(*ranges, strict=True))
    actual = qparams.bin_errors(lows, highs, bits, (-100.0, 100.0), bins, clip_weight)
    for r, b in itertools.product(range(len(ranges)), range(len(bins))):
        left, right = (float(edge[bins[b]]) for edge in edges)
        wanted, slack = direct_error(*ranges[r], bits, left, right, clip_weight)
        assert float(actual[r, b]) == pytest.approx(wanted, abs=slack, rel=1e-9)


def test_bin_errors_of_constant_data_count_the_one_value() -> None:
    # Trimmed to [0.7, 0.7] the bin has no width; it must not count as free of error under any range.
    bins = reference.histogram_bin(torch.tensor([0.7]))
    low, high = torch.tensor([0.0, 0.0]).double(), torch.tensor([1.0, 0.5]).double()
    actual = qparams.bin_errors(low, high, 2, (0.7, 0.7), bins)
    # Steps of 1/3: 0.7 goes to 2/3; and clipping at 0.5 leaves 0.2. Scales are float32.
    assert actual[:, 0].tolist() == pytest.approx([(0.7 - 2 / 3) ** 2, 0.2**2], rel=1e-5)
    weighted = qparams.bin_errors(low, high, 2, (0.7, 0.7), bins, clip_weight=7.0)
    assert weighted[:, 0].tolist() == pytest.approx([(0.7 - 2 / 3) ** 2, 7 * 0.2**2], rel=1e-5)


def test_bin_errors_trim_the_outermost_bin_to_the_extrema() -> None:
    bins = reference.histogram_bin(torch.tensor([1.01]))  # [1, 1 + 1/32), but the data ends at 1.01
    low, high = torch.tensor([-1.0]).double(), torch.tensor([1.005]).double()
    wanted, slack = direct_error(-1.0, 1.005, 8, 1.0, 1.01)
    actual = qparams.bin_errors(low, high, 8, (-1.0, 1.01), bins)
    assert float(actual) == pytest.approx(wanted, abs=slack, rel=1e-9)


def observed(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Histograms [T, HISTOGRAM_BINS] and extrema [T, 2] of one tensor per step."""
    counts = torch.zeros(len(rows), reference.HISTOGRAM_BINS, dtype=torch.int64)
    extrema = torch.tensor([float("inf"), -float("inf")]).repeat(len(rows), 1)
    for step, row in enumerate(rows):
        reference.observe(row, counts, extrema, torch.tensor([step]))
    return counts, extrema


def test_step_errors_match_the_data_behind_the_histogram(generator: torch.Generator) -> None:
    rows = [torch.randn(20_000, generator=generator) * s for s in (0.5, 2.0)]
    errors = qparams.step_errors(*observed(rows), num_bits=4)
    assert errors.error.shape == (2, len(errors.low))
    for step, row in enumerate(rows):
        for r in range(0, len(errors.low), 37):
            scale, zero_point = qparams.range_to_qparams(errors.low[r : r + 1], errors.high[r : r + 1], 4)
            values = reference.fake_quantize(row, scale, zero_point.float(), GROUP, -8, 7)
            squares = (values - row).double().square()
            # Where in its bin each of 20 000 elements lies is left to chance: five standard errors.
            slack = 5 * float(squares.std()) / 20_000**0.5
            assert float(errors.error[step, r]) == pytest.approx(float(squares.mean()), abs=slack)


@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "constant", "zero"])
def test_best_range_is_not_worse_than_its_start(kind: str, generator: torch.Generator) -> None:
    noise = torch.randn(5000, generator=generator)
    values = {
        "normal": noise,
        "positive": noise.abs(),
        "negative": -noise.abs(),
        "constant": torch.full((100,), 0.7),
        "zero": torch.zeros(100),
    }[kind]
    counts, extrema = observed([values])
    errors = qparams.step_errors(counts, extrema, 4)
    start = int(errors.error[0].argmin())
    bounds = (float(errors.low[start]), float(errors.high[start]))
    low, high = qparams.best_range(counts[0], extrema[0], 4, bounds)
    assert low <= 0 <= high

    def error(a: float, b: float) -> float:
        pair = (torch.tensor([a]).double(), torch.tensor([b]).double())
        occupied = counts[0].nonzero().flatten()
        limits = (float(extrema[0, 0]), float(extrema[0, 1]))
        return float(qparams.bin_errors(*pair, 4, limits, occupied) @ counts[0, occupied].double())

    # The middle of the grid is the start up to the rounding of linspace.
    assert error(low, high) <= error(*bounds) * (1 + 1e-9) + 1e-30


def test_best_range_clips_outliers() -> None:
    values = torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([4.0])])
    counts, extrema = observed([values])
    low, high = qparams.best_range(counts[0], extrema[0], 4, (-1.0, 1.2))
    # One element of 100 001 at 4 costs (4 - high)^2 / 1e5 = 8e-5, a range up to 4 costs (5/15)^2/12 = 9e-3.
    assert high < 1.5
    assert low == pytest.approx(-1.0, abs=2 / 15)
