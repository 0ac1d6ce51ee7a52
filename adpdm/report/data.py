"""What a report shows: frozen dataclasses of plain arrays, checked when made; every part may be absent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class ImageSet:
    """Samples of both models from the same seeds.

    Args:
        name: of the configuration, such as "W8A8".
        reference, quantized: [N, H, W, 1 or 3] uint8.
        psnr_db: of all images pooled; None when it was not measured.
        note: one sentence more for the caption.

    Raises:
        ValueError: for images of other shapes or dtypes, or none.
    """

    name: str
    reference: np.ndarray
    quantized: np.ndarray
    psnr_db: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("reference", "quantized"):
            array = getattr(self, name)
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or array.size == 0:
                raise ValueError(
                    f"ImageSet {self.name}: {name} must be [N, H, W, 1 or 3] uint8, "
                    f"got {array.shape} {array.dtype}"
                )
        if self.reference.shape != self.quantized.shape:
            raise ValueError(
                f"ImageSet {self.name}: quantized must have the shape {self.reference.shape}, "
                f"got {self.quantized.shape}"
            )


@dataclass(frozen=True)
class GroupMap:
    """Which quantization function every layer uses at every step.

    Args:
        name: of the configuration.
        layer_names: L, in the order of the network.
        timesteps: [T] different ones as given to the denoiser, noisiest first.
        group_index: [L, T] integer.
        num_groups: G.
        moved_share: share of (layer, step) entries that left the group the dynamic programming gave them.
        gains_db: by which the partition lowers the quantization error of the layers' inputs against one range
            for all steps: median, largest, and the median of what a range for every step would gain.

    Raises:
        ValueError: for arrays of other shapes, and groups that there are not.
    """

    name: str
    layer_names: tuple[str, ...]
    timesteps: np.ndarray
    group_index: np.ndarray
    num_groups: int
    moved_share: float | None = None
    gains_db: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        wanted = (len(self.layer_names), len(self.timesteps))
        _shape(f"GroupMap {self.name}: group_index", self.group_index, wanted)
        if (
            self.group_index.size
            and not 0 <= self.group_index.min() <= self.group_index.max() < self.num_groups
        ):
            raise ValueError(
                f"GroupMap {self.name}: group_index must be in [0, {self.num_groups - 1}], "
                f"got {self.group_index.min()} to {self.group_index.max()}"
            )


@dataclass(frozen=True)
class LayerRange:
    """Activations of one layer over the trajectory, and the ranges its quantizers cover.

    Args:
        layer_name: of the layer.
        timesteps: [T], noisiest first.
        observed: [T, 2] smallest and largest activation of each step.
        covered: [T, 2] range of the quantizer of that step's group.
        group_index: [T] integer.

    Raises:
        ValueError: for arrays of other shapes.
    """

    layer_name: str
    timesteps: np.ndarray
    observed: np.ndarray
    covered: np.ndarray
    group_index: np.ndarray

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        for name, shape in (("observed", (steps, 2)), ("covered", (steps, 2)), ("group_index", (steps,))):
            _shape(f"LayerRange {self.layer_name}: {name}", getattr(self, name), shape)


@dataclass(frozen=True)
class LayerSqnr:
    """SQNR of every layer's output in one configuration.

    Args:
        name: of the configuration.
        layer_names: L, in the order of the network.
        sqnr_db: [L].

    Raises:
        ValueError: for an array of another shape.
    """

    name: str
    layer_names: tuple[str, ...]
    sqnr_db: np.ndarray

    def __post_init__(self) -> None:
        _shape(f"LayerSqnr {self.name}: sqnr_db", self.sqnr_db, (len(self.layer_names),))


@dataclass(frozen=True)
class StepCurve:
    """SQNR of the noise prediction at every call of the denoiser.

    Args:
        name: such as "W8A8, same input".
        timesteps: [M] as given to the denoiser, in the order of its calls, some twice under schedulers
            that come back; equal for all curves of a report.
        sqnr_db: [M].
        is_dashed: drawn dashed; the caption calls solid "same input" and dashed "own trajectory".
        family: curves of one family share a colour; empty takes the name.

    Raises:
        ValueError: for an array of another shape.
    """

    name: str
    timesteps: np.ndarray
    sqnr_db: np.ndarray
    is_dashed: bool = False
    family: str = ""

    def __post_init__(self) -> None:
        _shape(f"StepCurve {self.name}: sqnr_db", self.sqnr_db, (len(self.timesteps),))


@dataclass(frozen=True)
class StepCorrection:
    """How the predictions of one configuration are weighed against their samples.

    Args:
        name: of the configuration.
        timesteps: [T], noisiest first.
        weights: [T, 2] of prediction and sample; 1 and 0 where a step is left alone.
        energy_left: [T] squared error of the prediction with the correction over that without.

    Raises:
        ValueError: for arrays of other shapes.
    """

    name: str
    timesteps: np.ndarray
    weights: np.ndarray
    energy_left: np.ndarray

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        for name, shape in (("weights", (steps, 2)), ("energy_left", (steps,))):
            _shape(f"StepCorrection {self.name}: {name}", getattr(self, name), shape)


@dataclass(frozen=True)
class SelectionTrace:
    """How the timesteps of the calibration images were chosen.

    Args:
        method: srm, uniform, normal or random.
        timesteps: [T], noisiest first.
        chosen: [R] step index of each round.
        entropy: [R, T] normalised entropy of the importance weights, mean over layers, when the round chose;
            or None.
        score: [R, T] surrogate that the choice maximised; or None for methods without one.
        mmd: [R] maximum mean discrepancy between all and chosen steps after the round; or None.

    Raises:
        ValueError: for arrays of other shapes, and steps that there are not.
    """

    method: str
    timesteps: np.ndarray
    chosen: np.ndarray
    entropy: np.ndarray | None = None
    score: np.ndarray | None = None
    mmd: np.ndarray | None = None

    def __post_init__(self) -> None:
        rounds, steps = len(self.chosen), len(self.timesteps)
        for name, shape in (("entropy", (rounds, steps)), ("score", (rounds, steps)), ("mmd", (rounds,))):
            if getattr(self, name) is not None:
                _shape(f"SelectionTrace: {name}", getattr(self, name), shape)
        if rounds and not 0 <= self.chosen.min() <= self.chosen.max() < steps:
            raise ValueError(
                f"SelectionTrace: chosen must be in [0, {steps - 1}], "
                f"got {self.chosen.min()} to {self.chosen.max()}"
            )


@dataclass(frozen=True)
class ComparisonRow:
    """One way to group timesteps at one bit width; None where it was not measured.

    Args:
        grouping: shared, uniform, per_step, dp, search or any other name of a method.
        bits: such as "W6A6"; rows with equal bits stand together.
        psnr_db, psnr_spread_db: final samples, mean and sample standard deviation over the seeds.
        num_seeds: of the spread.
        sqnr_db: of the noise predictions.
        soft_hard_gap_db: teacher loss after hardening minus before.
        lpips, frechet: means over the seeds.
        seconds: of the calibration.
    """

    grouping: str
    bits: str
    psnr_db: float | None
    psnr_spread_db: float | None = None
    num_seeds: int = 1
    sqnr_db: float | None = None
    soft_hard_gap_db: float | None = None
    lpips: float | None = None
    frechet: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class SampleScore:
    """How the final samples of one configuration differ from full precision; None where it was not measured.

    Args:
        name: of the configuration.
        num_images: behind all numbers of this row.
        psnr_db, sqnr_db: all pixels pooled.
        lpips: mean, AlexNet.
        frechet, frechet_low, frechet_high: distance on EfficientNet-Lite0 features, and 95 % of those of
            resampled sets, which do not contain the bias of few images.
        frechet_dimensions: principal components of the features that were kept.
    """

    name: str
    num_images: int
    psnr_db: float | None = None
    sqnr_db: float | None = None
    lpips: float | None = None
    frechet: float | None = None
    frechet_low: float | None = None
    frechet_high: float | None = None
    frechet_dimensions: int | None = None


@dataclass(frozen=True)
class ModelSize:
    """Bytes of the weights of one model; the first of a report is the original.

    Raises:
        ValueError: for less than a byte.
    """

    name: str
    num_bytes: int

    def __post_init__(self) -> None:
        if self.num_bytes < 1:
            raise ValueError(f"ModelSize {self.name}: num_bytes must be at least 1, got {self.num_bytes}")


@dataclass(frozen=True)
class StepTime:
    """Denoiser time of the original and one configuration, from interleaved pairs.

    Args:
        name: of the configuration.
        batch_size: images per call.
        reference_seconds, quantized_seconds: medians.
        speedup, speedup_low, speedup_high: median and quartiles of the paired ratio reference / quantized.
        note: such as the kernel and the number of threads.
    """

    name: str
    batch_size: int
    reference_seconds: float
    quantized_seconds: float
    speedup: float
    speedup_low: float
    speedup_high: float
    note: str = ""


@dataclass(frozen=True)
class LayerRun:
    """How one layer of the quantized model runs.

    Args:
        name: of the layer.
        runs: in integers as part of a block, in integers by itself, or in full precision; "integer" where it
            was not recorded which of the first two.
        reason: why it is not fused, or why it stays in full precision; empty for the others.
        block: around it, with its class; empty where there is none.
        macs_share: of the model's multiply-accumulates, 0 to 1; None where it was not measured.
    """

    name: str
    runs: Literal["fused", "per layer", "float", "integer"]
    reason: str = ""
    block: str = ""
    macs_share: float | None = None


@dataclass(frozen=True)
class Coverage:
    """What runs in integers, and how.

    Args:
        macs_share, parameters_share: 0 to 1.
        layers: in the order of the network.
        fused_blocks: that run as one; None where it was not recorded.
    """

    macs_share: float
    parameters_share: float
    layers: tuple[LayerRun, ...] = ()
    fused_blocks: int | None = None


@dataclass(frozen=True)
class ReportData:
    """Everything of one report; a part that is empty or None appears as a sentence that it was not measured.

    Args:
        title, summary: head of the page; summary is one or two plain sentences.
        command, seed: that made the run.
        versions: name to version (adpdm, torch, CPU features).
        config: settings as a flat or nested mapping of plain values.
        max_importance: largest importance weight before hardening, mean over (layer, step), of the first map.
        notes: sentences on what is missing or unusual.

    Raises:
        ValueError: for curves over different timesteps.
    """

    title: str
    command: str
    seed: int
    summary: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[ImageSet, ...] = ()
    group_maps: tuple[GroupMap, ...] = ()
    ranges: tuple[LayerRange, ...] = ()
    layer_sqnr: tuple[LayerSqnr, ...] = ()
    step_curves: tuple[StepCurve, ...] = ()
    corrections: tuple[StepCorrection, ...] = ()
    selection: SelectionTrace | None = None
    comparison: tuple[ComparisonRow, ...] = ()
    scores: tuple[SampleScore, ...] = ()
    sizes: tuple[ModelSize, ...] = ()
    times: tuple[StepTime, ...] = ()
    coverage: Coverage | None = None
    max_importance: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for curve in self.step_curves[1:]:
            if not np.array_equal(curve.timesteps, self.step_curves[0].timesteps):
                raise ValueError(
                    f"ReportData: step curve {curve.name} must have the timesteps of "
                    f"{self.step_curves[0].name}"
                )


def _shape(name: str, array: np.ndarray, wanted: tuple[int, ...]) -> None:
    if array.shape != wanted:
        raise ValueError(f"{name} must have the shape {wanted}, got {array.shape}")
