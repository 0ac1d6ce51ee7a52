"""Figures of the demo: every number that was measured stands in the place that is named after it."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adpdm import QuantConfig, demo, graph, report
from adpdm.demo import Run, Scale, build_report, captured_timings, report_data, save_overview
from adpdm.evaluate import EvaluationConfig, EvaluationResult, PairTiming
from adpdm.evaluate.frechet import FrechetResult
from adpdm.testing import ONE_BLOCK, tiny_pipeline, tiny_unet

TIMESTEPS = [900.0, 500.0, 100.0]
# What `adpdm quantize` tells of two layers.
RECORD: dict[str, Any] = {
    "config": {"weight_bits": 4, "activation_bits": 6, "grouping": "dp", "selection": "srm"},
    "timesteps": TIMESTEPS,
    "layers": [
        {"name": "conv", "bits": None, "reason": "input or output layer", "macs": 25},
        {"name": "mid", "bits": [4, 6], "reason": "", "macs": 75},
    ],
    "coverage": {"macs": 0.75, "parameters": 0.5},
    "trace": {
        "seconds": {"trajectories": 2.0, "search": 3.5},
        "warnings": ["it ended undecided"],
        "quantizers": [
            {
                "name": "conv",
                "observed": [[-2.0, 2.0], [-2.0, 2.5], [-2.0, 3.0]],
                "covered": [[-1.5, 2.25], [-1.75, 2.75]],
                "group_index": [0, 1, 1],
            },
            {
                "name": "mid",
                "observed": [[-1.0, 1.0], [-1.0, 2.0], [-1.0, 4.0]],
                "covered": [[-0.5, 1.5], [-0.75, 3.5]],
                "group_index": [0, 0, 1],
            },
        ],
        "group_gain": {
            "conv": {"gain_db": 0.5, "limit_db": 1.0},
            "mid": {"gain_db": 1.5, "limit_db": 4.0},
        },
        "rounds": [
            {"step_index": 1, "entropy": [0.11, 0.12, 0.13], "score": [0.21, 0.22, 0.23]},
            {"step_index": 2, "entropy": [0.14, 0.15, 0.16], "score": [0.24, 0.25, 0.26]},
        ],
        "mmd": [0.7, 0.8],
        "outcome": {"gap_db": 0.375, "moved": 0.125, "max_importance": 0.9375},
        "correction": {
            "weights": [[1.0, 0.0], [0.9, 0.01], [0.8, 0.02]],
            "energy_left": [1.0, 0.95, 0.85],
        },
    },
}


def frechet(distance: float) -> FrechetResult:
    return FrechetResult(distance, distance - 0.5, distance + 0.25, (6, 7), 32, 0.875, 200)


def timing(batch_size: int, seconds: float, speedup: float) -> PairTiming:
    return PairTiming(batch_size, 3, seconds, seconds / 4, speedup, speedup - 0.5, speedup + 0.25)


def evaluation(base: float) -> EvaluationResult:
    """Different numbers everywhere, other ones for another `base`."""
    images = np.arange(2 * 2 * 2, dtype=np.uint8).reshape(2, 2, 2, 1)
    return EvaluationResult(
        config=EvaluationConfig(num_images=5, seed=9),
        timesteps=np.array(TIMESTEPS),
        psnr_db=base + 1,
        sqnr_db=base + 2,
        psnr_per_image_db=np.array([base + 3, base + 4]),
        sqnr_per_image_db=np.array([base + 5, base + 6]),
        noise_sqnr_same_input_db=np.array([base + 7, base + 8, base + 12]),
        noise_sqnr_own_trajectory_db=np.array([base + 10, base + 11, base + 13]),
        lpips=base / 1000,
        lpips_per_image=np.array([base / 2000, base / 3000]),
        frechet=frechet(base + 16),
        frechet_reference_real=frechet(base + 18),
        frechet_quantized_real=frechet(base + 20),
        missing=("One thing was not measured.",),
        timings=(timing(1, base / 100, 4.25), timing(8, base / 50, 5.25)),
        reference_bytes=int(1000 * base),
        quantized_bytes=int(250 * base),
        reference_images=images,
        quantized_images=images + int(base),
    )


def plain(value: Any) -> Any:
    """Dataclasses and arrays as nested dicts and lists, which `==` compares."""
    if is_dataclass(value):
        return {name: plain(x) for name, x in vars(value).items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.fixture(scope="module")
def data() -> report.ReportData:
    """What the report of one model shows."""
    shown: list[report.ReportData] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda out, data: shown.append(data))
        build_report(Path("r.html"), RECORD, {"conv": 31.5, "mid": 32.5}, evaluation(40.0), "adpdm report")
    return shown[0]


def test_samples_of_the_original_come_before_those_of_the_quantized_model(data: report.ReportData) -> None:
    (images,) = data.images
    assert (images.name, images.psnr_db) == ("W4A6", 41.0)
    assert images.reference.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert images.quantized.flatten().tolist() == [40, 41, 42, 43, 44, 45, 46, 47]


def test_curves_are_of_the_same_input_and_of_the_own_trajectory(data: report.ReportData) -> None:
    same, own = map(plain, data.step_curves)
    common = {"timesteps": TIMESTEPS, "family": "W4A6"}
    assert same == {
        "name": "W4A6, same input",
        "sqnr_db": [47.0, 48.0, 52.0],
        "is_dashed": False,
        **common,
    }
    assert own == {
        "name": "W4A6, own trajectory",
        "sqnr_db": [50.0, 51.0, 53.0],
        "is_dashed": True,
        **common,
    }


def test_scores_are_of_the_final_samples(data: report.ReportData) -> None:
    (score,) = data.scores
    assert score == report.SampleScore(
        "W4A6",
        num_images=5,
        psnr_db=41.0,
        sqnr_db=42.0,
        lpips=0.04,
        frechet=56.0,
        frechet_low=55.5,
        frechet_high=56.25,
        frechet_dimensions=32,
    )


def test_a_model_is_a_row_of_the_comparison(data: report.ReportData) -> None:
    (row,) = data.comparison
    assert row == report.ComparisonRow(
        "dp",
        "W4A6",
        psnr_db=41.0,
        psnr_spread_db=None,
        num_seeds=1,
        sqnr_db=49.0,  # mean over the steps, same input
        soft_hard_gap_db=0.375,
        lpips=0.04,
        frechet=56.0,
        seconds=5.5,
    )


def test_sizes_and_times_are_told_beside_those_of_the_original(data: report.ReportData) -> None:
    assert data.sizes == (report.ModelSize("original", 40_000), report.ModelSize("W4A6", 10_000))
    first, second = (replace(time, note="") for time in data.times)
    assert first == report.StepTime("W4A6", 1, 0.4, 0.1, 4.25, 3.75, 4.5)
    assert second == report.StepTime("W4A6", 8, 0.8, 0.2, 5.25, 4.75, 5.5)
    assert data.summary == (
        "W4A6 in integer arithmetic reproduces the full-precision samples at 41.0 dB PSNR, "
        "runs 4.25 times as fast at batch 1, 5.25 times as fast at batch 8, "
        "and its weights take 25% of the original."
    )


def test_of_a_stored_model_the_time_of_its_calibration_is_told(data: report.ReportData) -> None:
    assert data.notes[-1] == "Calibration took 0.1 minutes."


def test_layers_have_their_groups_ranges_and_errors(data: report.ReportData) -> None:
    (groups,) = map(plain, data.group_maps)
    assert groups == {
        "name": "W4A6",
        "layer_names": ("conv", "mid"),
        "timesteps": TIMESTEPS,
        "group_index": [[0, 1, 1], [0, 0, 1]],
        "num_groups": 2,
        "moved_share": 0.125,
        "gains_db": (1.0, 1.5, 2.5),
    }
    wider, narrower = map(plain, data.ranges)  # the one that changes more is shown first
    assert wider == {
        "layer_name": "mid",
        "timesteps": TIMESTEPS,
        "observed": [[-1.0, 1.0], [-1.0, 2.0], [-1.0, 4.0]],
        "covered": [[-0.5, 1.5], [-0.5, 1.5], [-0.75, 3.5]],
        "group_index": [0, 0, 1],
    }
    assert narrower["layer_name"] == "conv"
    assert narrower["covered"] == [[-1.5, 2.25], [-1.75, 2.75], [-1.75, 2.75]]
    (sqnr,) = map(plain, data.layer_sqnr)
    assert sqnr == {"name": "W4A6", "layer_names": ("conv", "mid"), "sqnr_db": [31.5, 32.5]}


def test_selection_and_correction_are_told_by_step(data: report.ReportData) -> None:
    assert plain(data.selection) == {
        "method": "srm",
        "timesteps": TIMESTEPS,
        "chosen": [1, 2],
        "entropy": [[0.11, 0.12, 0.13], [0.14, 0.15, 0.16]],
        "score": [[0.21, 0.22, 0.23], [0.24, 0.25, 0.26]],
        "mmd": [0.7, 0.8],
    }
    (correction,) = map(plain, data.corrections)
    assert correction == {
        "name": "W4A6",
        "timesteps": TIMESTEPS,
        "weights": [[1.0, 0.0], [0.9, 0.01], [0.8, 0.02]],
        "energy_left": [1.0, 0.95, 0.85],
    }
    assert data.max_importance == 0.9375


@pytest.fixture
def runs() -> list[Run]:
    captured = (timing(1, 0.16, 8.5),)
    return [
        Run("W8A8", RECORD, evaluation(40.0), {"mid": 33.0}, captured, "float32"),
        Run("W4A8", RECORD, evaluation(20.0), {"mid": 23.0}, original="float32"),
    ]


def test_several_runs_stand_in_their_order_under_their_names(runs: list[Run]) -> None:
    data = report_data(runs, [], "adpdm demo", 7, "It took long.", ["W6A6: to compare."])
    assert (data.command, data.seed) == ("adpdm demo", 7)
    assert [(x.name, x.psnr_db) for x in data.images] == [("W8A8", 41.0), ("W4A8", 21.0)]
    assert [(x.name, x.psnr_db) for x in data.scores] == [("W8A8", 41.0), ("W4A8", 21.0)]
    assert [(x.name, x.sqnr_db.tolist()) for x in data.layer_sqnr] == [("W8A8", [33.0]), ("W4A8", [23.0])]
    assert [(x.name, x.num_bytes) for x in data.sizes] == [
        ("float32", 40000),
        ("W8A8", 10000),
        ("W4A8", 5000),
    ]
    assert [(x.name, x.batch_size, x.speedup) for x in data.times] == [
        ("W8A8", 1, 4.25),
        ("W8A8", 8, 5.25),
        ("W8A8 captured", 1, 8.5),
        ("W4A8", 1, 4.25),
        ("W4A8", 8, 5.25),
    ]
    assert "runs 8.50 times as fast at batch 1 (captured, without Python)" in data.summary
    assert data.notes == (
        "W8A8: it ended undecided.",
        "W4A8: it ended undecided.",
        "W6A6: to compare.",
        "One thing was not measured.",
        "It took long.",
    )


def test_terminal_is_told_runs_and_then_the_comparison(runs: list[Run]) -> None:
    main = [report.ComparisonRow("search", "W8A8", 41.0), report.ComparisonRow("search", "W4A8", 21.0)]
    compared = [
        report.ComparisonRow("dp", "W6A6", 25.0, 0.5, 3),
        report.ComparisonRow("search", "W6A6", 29.0),
    ]
    assert demo._summary_rows(runs, [*main, *compared]) == {
        "W8A8": "PSNR 41.00 dB, 4.25x at batch 1, 5.25x at batch 8 (captured: 8.50x at batch 1), "
        "weights 25.0% of the original",
        "W4A8": "PSNR 21.00 dB, 4.25x at batch 1, 5.25x at batch 8, weights 25.0% of the original",
        "W6A6 dp": "PSNR 25.00 ± 0.50 dB",
        "W6A6 search": "PSNR 29.00 dB",
    }


def test_overview_has_a_row_of_the_original_and_one_of_each_run(runs: list[Run], tmp_path: Path) -> None:
    save_overview(runs, tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as image:
        pixels = np.asarray(image)[::3, ::3]  # of tiles of 2 x 2 that were enlarged threefold
    original = np.array([[0, 1, 4, 5], [2, 3, 6, 7]])
    assert pixels.tolist() == [*original.tolist(), *(original + 40).tolist(), *(original + 20).tolist()]


# ---- what is measured --------------------------------------------------------------------------------------


def test_captured_timings_are_of_the_original_against_the_captured_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, quantized = (tiny_unet(seed, **ONE_BLOCK) for seed in (0, 1))
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = [model(sample, 500).sample for model in (reference, quantized)]
    asked: list[tuple[int, int]] = []

    def time_pair(first: Any, second: Any, size: int, device: torch.device, pairs: int) -> PairTiming:
        asked.append((size, pairs))
        assert (graph.is_captured(reference), graph.is_captured(quantized)) == (False, True)
        assert torch.equal(first().sample, wanted[0])
        assert torch.equal(second().sample, wanted[1])
        return timing(size, 0.4, 4.25)

    monkeypatch.setattr(demo, "time_pair", time_pair)
    config = EvaluationConfig(seed=3, timing_batch_sizes=(2,), timing_pairs=5)
    assert captured_timings(reference, quantized, config) == (timing(2, 0.4, 4.25),)
    assert asked == [(2, 5)]


# Of the first seed; the second has 20 dB more.
PSNR_DB = {"shared": 20.0, "uniform": 22.0, "dp": 25.0, "search": 29.0}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets quantizing and sampling have known outcomes, a second longer each; what they were asked for."""
    asked: list[Any] = []

    def quantize(denoiser: Any, config: QuantConfig, **_: Any) -> Any:
        asked.append(config)
        denoiser.error = 2 * 10 ** (-PSNR_DB[config.grouping] / 20)  # of images from -1 to 1
        searched = config.grouping == "search"
        outcome = SimpleNamespace(gap_db=0.375) if searched else None
        warnings = ["it ended undecided"] if searched else []
        return SimpleNamespace(trace=SimpleNamespace(outcome=outcome, warnings=warnings))

    def generate(denoiser: Any, scheduler: Any, count: int, steps: int, seed: int, batch: int) -> Any:
        asked.append((count, steps, seed, batch))
        error = getattr(denoiser, "error", 0.0) * 10.0 ** (3 - seed)
        return SimpleNamespace(samples=torch.full((count, 1, 2, 2), seed / 100 + error, dtype=torch.float64))

    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 23.0, 30.0, 34.0])
    monkeypatch.setattr(demo, "quantize", quantize)
    monkeypatch.setattr(demo, "generate", generate)
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    return asked


def test_groupings_are_compared_over_the_same_seeds(measured: list[Any]) -> None:
    scale = Scale(images=4, seeds=2, search_steps=8, calibration_images=32, steps=10)
    told: list[tuple[str, int, int]] = []
    rows, warnings = demo._compare_groupings(
        tiny_pipeline(**ONE_BLOCK), (6, 6), 2, scale, lambda *step: told.append(step)
    )
    gaps = {"search": 0.375}
    assert rows == [
        report.ComparisonRow(
            grouping,
            "W6A6",
            psnr_db=pytest.approx(first + 10),
            psnr_spread_db=pytest.approx(10 * 2**0.5),
            num_seeds=2,
            soft_hard_gap_db=gaps.get(grouping),
            seconds=seconds,
        )
        for (grouping, first), seconds in zip(PSNR_DB.items(), (1.0, 2.0, 3.0, 4.0), strict=True)
    ]
    configs = [x for x in measured if isinstance(x, QuantConfig)]
    assert {(c.weight_bits, c.activation_bits, c.weight_rounding, c.raised_layers) for c in configs} == {
        (6, 6, "nearest", 0.0)
    }
    assert [x for x in measured if isinstance(x, tuple)] == 5 * [(4, 10, 3, 4), (4, 10, 4, 4)]
    assert told == [("W6A6 comparison", done, 4) for done in (1, 2, 3, 4)]
    assert warnings[0] == "W6A6 search: it ended undecided."
    assert len(warnings) == 2
