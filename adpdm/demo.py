"""The demo: one trained model at several settings, compared with its original, told in one report."""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import report as page
from .calibrate import CalibrationTrace
from .config import Grouping, QuantConfig, SearchConfig
from .denoisers import find_denoiser, load_pipeline
from .evaluate import (
    EvaluationConfig,
    EvaluationResult,
    PairTiming,
    compare,
    generate,
    psnr,
    time_pair,
)
from .evaluate.layers import probe_layers
from .evaluate.sampling import sample_shape, to_uint8
from .files import filling, replacing
from .graph import capture, release
from .info import gather_info
from .layer_runs import recorded_coverage
from .pipeline import quantize
from .progress import Progress

MAIN_BITS = ((8, 8), (4, 8))
COMPARISON_BITS = (6, 6)
COMPARISON_GROUPINGS: tuple[Grouping, ...] = ("shared", "uniform", "dp", "search")
SHOWN_RANGES = 4  # layers whose activation ranges are drawn: those whose range changes most
TIMED_STEP = 500  # timestep of the captured calls, in the middle of the training steps


@dataclass(frozen=True)
class Scale:
    """How much work the demo does."""

    images: int = 16
    seeds: int = 3  # of the comparison
    search_steps: int = 160
    calibration_images: int = 128
    steps: int = 50  # of the sampler, for calibration and samples
    timing_pairs: int = 20


QUICK = Scale(images=4, seeds=1, search_steps=16, calibration_images=32, steps=10, timing_pairs=3)


@dataclass(frozen=True)
class Run:
    """One quantized configuration with what is known about it."""

    name: str
    stored: dict[str, Any]  # as `QuantizationReport.to_dict`
    evaluation: EvaluationResult
    layer_sqnr: dict[str, float]
    captured: tuple[PairTiming, ...] = ()  # without Python, see graph.py
    original: str = "original"  # the name of what `evaluation.reference_bytes` are of

    @property
    def timings(self) -> list[tuple[str, PairTiming]]:
        """All that was timed, each with the name of the way it ran."""
        eager = [(self.name, t) for t in self.evaluation.timings]
        return eager + [(f"{self.name} captured", t) for t in self.captured]


def bits_name(bits: tuple[int, int]) -> str:
    """W8A8 for (8, 8)."""
    return f"W{bits[0]}A{bits[1]}"


def run_demo(
    model: Path, out: Path, seed: int, is_quick: bool, progress: Progress, command: str
) -> dict[str, Any]:
    """Quantize `model` at the main bit widths, compare groupings, write models and report below `out`.

    Raises:
        ValueError: there is no `model`.
    """
    scale = QUICK if is_quick else Scale()
    if not model.exists():
        raise ValueError(
            f"demo: --model {model} does not exist; run from the repository, or name a model folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    pipe = load_pipeline(model, local_files_only=True)
    runs = [_main_run(pipe, bits, model, out, seed, scale, progress) for bits in MAIN_BITS]
    rows = [_row_of(run) for run in runs]
    compared, warnings = _compare_groupings(pipe, COMPARISON_BITS, seed, scale, progress)
    rows += compared
    took = _took("The whole run", time.perf_counter() - started)
    data = report_data(runs, rows, command, seed, took, warnings)
    path = page.write_report(out / "report.html", data)
    save_overview(runs, out / "samples.png")
    values = {
        "report": str(path),
        "seconds": time.perf_counter() - started,
        "comparison": [row.__dict__ for row in rows],
        "runs": {run.name: run.evaluation.to_dict() for run in runs},
        "summary": _summary_rows(runs, rows),
    }
    with replacing(out / "demo.json") as temporary:
        temporary.write_text(json.dumps(values, indent=1))
    return values


def _config(bits: tuple[int, int], grouping: Grouping, seed: int, scale: Scale) -> QuantConfig:
    return QuantConfig(
        weight_bits=bits[0],
        activation_bits=bits[1],
        grouping=grouping,
        num_inference_steps=scale.steps,
        calibration_images=scale.calibration_images,
        seed=seed,
        search=SearchConfig(num_steps=scale.search_steps, refit_steps=scale.search_steps // 4),
    )


def _main_run(
    pipe: Any, bits: tuple[int, int], model: Path, out: Path, seed: int, scale: Scale, progress: Progress
) -> Run:
    name = bits_name(bits)
    quantized = copy.deepcopy(pipe)
    label = _labelled(progress, name)
    report = quantize(quantized, _config(bits, "search", seed, scale), progress=label)
    folder = out / name.lower()
    _save_model(quantized, folder)
    config = EvaluationConfig(scale.images, scale.steps, seed + 1, timing_pairs=scale.timing_pairs)
    original, denoiser = find_denoiser(pipe), find_denoiser(quantized)
    original.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    result = compare(original, denoiser, pipe.scheduler, config, paths=(model, folder), progress=label)
    # The shipped file is float16; sizes are told against the float32 network that was quantized.
    float_bytes = sum(p.numel() * p.element_size() for p in original.parameters())
    result = replace(result, reference_bytes=float_bytes)
    probes = probe_layers(original, denoiser, pipe.scheduler, scale.steps, seed)
    captured = captured_timings(original, denoiser, config)
    return Run(name, report.to_dict(), result, probes, captured, original="float32")


def _save_model(pipe: Any, folder: Path) -> None:
    """Save a pipeline as a whole or not at all, in place of what an earlier demo left in `folder`."""
    with tempfile.TemporaryDirectory(".tmp", f"{folder.name}.", folder.parent) as scratch:
        fresh, earlier = Path(scratch) / "fresh", Path(scratch) / "earlier"
        with filling(fresh) as parts:
            pipe.save_pretrained(parts)
        try:
            if os.path.lexists(folder):
                folder.rename(earlier)
            fresh.rename(folder)
        except BaseException:
            if os.path.lexists(earlier) and not os.path.lexists(folder):
                earlier.rename(folder)
            raise


@torch.no_grad()
def captured_timings(
    reference: nn.Module, quantized: nn.Module, config: EvaluationConfig
) -> tuple[PairTiming, ...]:
    """A denoiser call without Python (`adpdm.graph.capture`) against the original, per batch size."""
    shape, timestep, timings = sample_shape(reference), torch.tensor(TIMED_STEP), []
    capture(quantized)
    try:
        for size in config.timing_batch_sizes:
            sample = torch.randn(size, *shape, generator=torch.Generator().manual_seed(config.seed))
            calls = [partial(model, sample, timestep=timestep) for model in (reference, quantized)]
            timings.append(time_pair(calls[0], calls[1], size, sample.device, config.timing_pairs))
    finally:
        release(quantized)
    return tuple(timings)


def _labelled(progress: Progress, name: str) -> Progress:
    return lambda phase, done, total: progress(f"{name} {phase}", done, total)


def _compare_groupings(
    pipe: Any, bits: tuple[int, int], seed: int, scale: Scale, progress: Progress
) -> tuple[list[page.ComparisonRow], list[str]]:
    """PSNR of final samples per grouping at the same bits, over several seeds; and all warnings.

    Every layer has these bits and weights are rounded to nearest, as in the literature. What else is on by
    default helps all groupings alike: rotated and equalized channels, corrected biases and predictions.
    """
    name = bits_name(bits)
    label = _labelled(progress, name)
    original = find_denoiser(pipe)
    seeds = [seed + 1 + i for i in range(scale.seeds)]
    wanted = [_samples(original, pipe.scheduler, scale, s) for s in seeds]
    rows, warnings = [], []
    for index, grouping in enumerate(COMPARISON_GROUPINGS):
        denoiser = copy.deepcopy(original)
        started = time.perf_counter()
        report = quantize(
            denoiser,
            _config(bits, grouping, seed, scale).replace(weight_rounding="nearest", raised_layers=0.0),
            scheduler=pipe.scheduler,
            progress=_labelled(label, grouping),
        )
        seconds = time.perf_counter() - started
        values = [
            psnr(w, _samples(denoiser, pipe.scheduler, scale, s)) for w, s in zip(wanted, seeds, strict=True)
        ]
        outcome = report.trace.outcome
        warnings += [f"{name} {grouping}: {sentence}." for sentence in report.trace.warnings]
        rows.append(
            page.ComparisonRow(
                grouping,
                name,
                statistics.fmean(values),
                statistics.stdev(values) if len(values) > 1 else None,
                len(values),
                soft_hard_gap_db=None if outcome is None else outcome.gap_db,
                seconds=seconds,
            )
        )
        label("comparison", index + 1, len(COMPARISON_GROUPINGS))
    warnings.append(
        f"{name}: to compare groupings alone, every layer has these bits and weights are rounded to nearest; "
        "the defaults would give higher figures."
    )
    return rows, warnings


def _samples(denoiser: nn.Module, scheduler: Any, scale: Scale, seed: int) -> Tensor:
    return generate(denoiser, scheduler, scale.images, scale.steps, seed, scale.images).samples


def _row_of(run: Run) -> page.ComparisonRow:
    outcome = run.stored["trace"]["outcome"]
    e = run.evaluation
    return page.ComparisonRow(
        run.stored["config"]["grouping"],
        run.name,
        e.psnr_db,
        sqnr_db=float(np.mean(e.noise_sqnr_same_input_db)),
        soft_hard_gap_db=None if outcome is None else outcome["gap_db"],
        lpips=e.lpips,
        frechet=None if e.frechet is None else e.frechet.distance,
        seconds=sum(run.stored["trace"]["seconds"].values()),
    )


def _summary_rows(runs: Sequence[Run], rows: Sequence[page.ComparisonRow]) -> dict[str, str]:
    """The demo in a few lines for the terminal."""
    lines = {}
    for run in runs:
        e = run.evaluation
        speed = _speeds(e.timings, "x")
        if run.captured:
            speed += f" (captured: {_speeds(run.captured, 'x')})"
        share = (e.quantized_bytes or 0) / (e.reference_bytes or 1)
        lines[run.name] = f"PSNR {e.psnr_db:.2f} dB, {speed}, weights {share:.1%} of the original"
    for row in rows[len(runs) :]:
        spread = "" if row.psnr_spread_db is None else f" ± {row.psnr_spread_db:.2f}"
        lines[f"{row.bits} {row.grouping}"] = f"PSNR {row.psnr_db:.2f}{spread} dB"
    return lines


def _speeds(timings: Sequence[PairTiming], unit: str) -> str:
    return ", ".join(f"{t.speedup:.2f}{unit} at batch {t.batch_size}" for t in timings)


# ---- report ------------------------------------------------------------------------------------------------


def report_data(
    runs: Sequence[Run],
    rows: Sequence[page.ComparisonRow],
    command: str,
    seed: int,
    took: str,
    warnings: Sequence[str] = (),
) -> page.ReportData:
    """Arrange runs as the report wants them; the first run is the main one, warnings are of other runs.

    Args:
        took: a sentence on the time.
    """
    main = runs[0]
    trace = main.stored["trace"]
    timesteps = np.array(main.stored["timesteps"])
    notes = [f"{run.name}: {sentence}." for run in runs for sentence in run.stored["trace"]["warnings"]]
    notes += [*warnings, *dict.fromkeys(s for run in runs for s in run.evaluation.missing)]
    return page.ReportData(
        title="adpdm: quantized against full precision",
        command=command,
        seed=seed,
        summary=_sentence(main),
        versions=gather_info(),
        config=main.stored["config"],
        images=tuple(
            page.ImageSet(
                r.name, r.evaluation.reference_images, r.evaluation.quantized_images, r.evaluation.psnr_db
            )
            for r in runs
        ),
        group_maps=tuple(_group_map(run, timesteps) for run in runs),
        ranges=_ranges(trace["quantizers"], timesteps),
        layer_sqnr=tuple(
            page.LayerSqnr(r.name, tuple(r.layer_sqnr), np.array(list(r.layer_sqnr.values()))) for r in runs
        ),
        step_curves=tuple(curve for run in runs for curve in _curves(run)),
        corrections=tuple(c for run in runs if (c := _correction(run, timesteps)) is not None),
        selection=_selection(trace, timesteps, main.stored["config"]["selection"]),
        comparison=tuple(rows),
        scores=tuple(_score(run) for run in runs),
        sizes=_sizes(runs),
        times=tuple(_time(name, t) for run in runs for name, t in run.timings),
        coverage=recorded_coverage(main.stored),
        max_importance=None if trace["outcome"] is None else trace["outcome"]["max_importance"],
        notes=(*notes, took),
    )


def _took(what: str, seconds: float) -> str:
    return f"{what} took {seconds / 60:.1f} minutes."


def _sentence(run: Run) -> str:
    e = run.evaluation
    speed = _speeds(run.captured or e.timings, " times as fast")
    speed += " (captured, without Python)" if run.captured else ""
    share = (e.quantized_bytes or 0) / (e.reference_bytes or 1)
    return (
        f"{run.name} in integer arithmetic reproduces the full-precision samples at {e.psnr_db:.1f} dB PSNR, "
        f"runs {speed}, and its weights take {share:.0%} of the original."
    )


def _group_map(run: Run, timesteps: np.ndarray) -> page.GroupMap:
    quantizers, outcome = run.stored["trace"]["quantizers"], run.stored["trace"]["outcome"]
    return page.GroupMap(
        run.name,
        tuple(q["name"] for q in quantizers),
        timesteps,
        np.array([q["group_index"] for q in quantizers]),
        max(len(q["covered"]) for q in quantizers),
        None if outcome is None else outcome["moved"],
        _gains(run.stored["trace"].get("group_gain")),
    )


def _gains(stored: dict[str, dict[str, float]] | None) -> tuple[float, float, float] | None:
    """Median and largest gain of the partition and its limit; None for a model saved without them."""
    return CalibrationTrace(group_gain=stored).summarize_gain() if stored else None


def _ranges(quantizers: Sequence[dict[str, Any]], timesteps: np.ndarray) -> tuple[page.LayerRange, ...]:
    """The layers whose activation range varies most over the trajectory."""

    def variation(q: dict[str, Any]) -> float:
        width = np.ptp(np.array(q["observed"]), axis=1)
        return math.log(max(width.max(), 1e-9) / max(width.min(), 1e-9))

    chosen = sorted(quantizers, key=variation, reverse=True)[:SHOWN_RANGES]
    result = []
    for q in chosen:
        groups = np.array(q["group_index"])
        result.append(
            page.LayerRange(
                q["name"], timesteps, np.array(q["observed"]), np.array(q["covered"])[groups], groups
            )
        )
    return tuple(result)


def _curves(run: Run) -> list[page.StepCurve]:
    e = run.evaluation
    return [
        page.StepCurve(f"{run.name}, same input", e.timesteps, e.noise_sqnr_same_input_db, family=run.name),
        page.StepCurve(
            f"{run.name}, own trajectory", e.timesteps, e.noise_sqnr_own_trajectory_db, True, family=run.name
        ),
    ]


def _correction(run: Run, timesteps: np.ndarray) -> page.StepCorrection | None:
    """How predictions are corrected; None where they are not, or in what was stored before they were."""
    stored = run.stored["trace"].get("correction") or {}
    if min(stored.get("energy_left", []), default=1.0) >= 1:
        return None
    weights, left = np.array(stored["weights"]), np.array(stored["energy_left"])
    return page.StepCorrection(run.name, timesteps, weights, left)


def _selection(trace: dict[str, Any], timesteps: np.ndarray, method: str) -> page.SelectionTrace | None:
    rounds = trace["rounds"]
    if not rounds:
        return None
    return page.SelectionTrace(
        method,
        timesteps,
        np.array([row["step_index"] for row in rounds]),
        np.array([row["entropy"] for row in rounds]),
        np.array([row["score"] for row in rounds]) if method == "srm" else None,
        np.array(trace["mmd"]),
    )


def _score(run: Run) -> page.SampleScore:
    e, f = run.evaluation, run.evaluation.frechet
    interval = (None, None, None, None) if f is None else (f.distance, f.low, f.high, f.dimensions)
    return page.SampleScore(run.name, e.config.num_images, e.psnr_db, e.sqnr_db, e.lpips, *interval)


def _sizes(runs: Sequence[Run]) -> tuple[page.ModelSize, ...]:
    original = page.ModelSize(runs[0].original, runs[0].evaluation.reference_bytes or 0)
    return (original, *(page.ModelSize(run.name, run.evaluation.quantized_bytes or 0) for run in runs))


def _time(name: str, timing: PairTiming) -> page.StepTime:
    info = gather_info()
    note = f"{info['instruction set']}, {torch.get_num_threads()} threads"
    return page.StepTime(
        name,
        timing.batch_size,
        timing.reference_seconds,
        timing.quantized_seconds,
        timing.speedup,
        timing.speedup_low,
        timing.speedup_high,
        note,
    )


def build_report(
    out: Path, stored: dict[str, Any], probes: dict[str, float], evaluation: EvaluationResult, command: str
) -> None:
    """Write the report of one saved model.

    Args:
        stored: what `quantize` wrote beside the model.
        probes: of `probe_layers`.
        evaluation: a fresh one.
    """
    bits = (stored["config"]["weight_bits"], stored["config"]["activation_bits"])
    run = Run(bits_name(bits), stored, evaluation, probes)
    took = _took("Calibration", sum(stored["trace"]["seconds"].values()))
    page.write_report(out, report_data([run], [_row_of(run)], command, evaluation.config.seed, took))


def save_overview(runs: Sequence[Run], path: Path, columns: int = 12) -> None:
    """One PNG with a row of full-precision samples and a row of each run's, same seeds in the same column."""
    rows = [runs[0].evaluation.reference_images, *(run.evaluation.quantized_images for run in runs)]
    pixels = np.concatenate([row[:columns] for row in rows])  # [rows * columns, H, W, C] u8
    samples = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    save_image_grid(samples, path, columns=len(rows[0][:columns]))


def save_image_grid(
    samples: Tensor,  # [N, C, H, W] float in [-1, 1]
    path: Path,
    enlarge: int = 3,
    columns: int | None = None,
) -> None:
    """Write samples as one PNG, each pixel `enlarge` wide; as square as possible without `columns`."""
    pixels = to_uint8(samples)
    columns = columns or math.ceil(math.sqrt(len(pixels)))
    tiles = np.concatenate([pixels, np.zeros_like(pixels[:1]).repeat(-len(pixels) % columns, 0)])
    tiles = tiles.reshape(-1, columns, *tiles.shape[1:]).swapaxes(1, 2)
    grid = tiles.reshape(tiles.shape[0] * tiles.shape[1], -1, tiles.shape[-1])
    grid = grid.repeat(enlarge, 0).repeat(enlarge, 1)
    with replacing(path) as temporary:
        Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid).save(temporary, format="png")
