"""Compares a quantized denoiser with its original on the same seeds, every figure in one result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from ..progress import Progress, silent
from ..trajectory import Conditioning, DenoiserCall, pick
from . import metrics
from .extractors import INSTALL_SENTENCE, Lite0, Lpips, load_lite0, load_lpips
from .frechet import MIN_IMAGES, FrechetResult, frechet_distance
from .kernel import MIN_VECTORS, KernelResult, kernel_distance
from .sampling import (
    IMAGE_CHANNELS,
    Trajectory,
    batches,
    demand_images,
    device_of,
    image_seeds,
    in_batches,
    sample_shape,
    shape_of_call,
    to_uint8,
)
from .sizes import file_bytes
from .timing import PairTiming, time_pair

FRECHET_NAME = "Frechet distance (EfficientNet-Lite0)"
KERNEL_NAME = "Kernel distance (EfficientNet-Lite0)"


@dataclass(frozen=True)
class EvaluationConfig:
    """What to measure.

    Args:
        num_images, num_inference_steps, seed, batch_size: of the sampling.
        use_extractors: measure LPIPS and the Frechet distance where their networks are installed.
        frechet_dimensions: principal components of the features; 1280 keeps all, given 5120 images or more.
        bootstrap_resamples: of the spread of resampling of the Frechet distance.
        timing_batch_sizes, timing_pairs: of the interleaved timing; an empty tuple times nothing.
        kept_images: returned as uint8 for the report.
        cache_dir: where the LPIPS weights lie; None is the platform's cache.

    Raises:
        ValueError: for a count or batch size below 1, or a count below 0 where nothing may be wanted.
    """

    num_images: int = 16
    num_inference_steps: int = 50
    seed: int = 0
    batch_size: int = 8
    use_extractors: bool = True
    frechet_dimensions: int = 32
    bootstrap_resamples: int = 200
    timing_batch_sizes: tuple[int, ...] = (1, 8)
    timing_pairs: int = 20
    kept_images: int = 16
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("num_images", "num_inference_steps", "batch_size", "frechet_dimensions", "timing_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"EvaluationConfig: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("bootstrap_resamples", "kept_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"EvaluationConfig: {name} must not be negative, got {getattr(self, name)}")
        if min(self.timing_batch_sizes, default=1) < 1:
            raise ValueError(
                f"EvaluationConfig: timing_batch_sizes must be at least 1 each, got {self.timing_batch_sizes}"
            )


@dataclass(frozen=True)
class EvaluationResult:
    """Everything `compare` measured; decibels are against the reference model, infinite where both are equal.

    Args:
        config: as given.
        timesteps: [M] as given to the denoiser, in the order of its calls.
        psnr_db, sqnr_db: final samples, all pixels of all images pooled.
        psnr_per_image_db, sqnr_per_image_db: [N].
        noise_sqnr_same_input_db: [M], noise predictions when both models see the reference model's samples
            (teacher forced): the error one step makes.
        noise_sqnr_own_trajectory_db: [M], noise predictions when each model follows its own samples: the
            error that has accumulated.
        lpips, lpips_per_image: mean and [N]; None without the network.
        frechet: quantized against reference samples; None without the network.
        frechet_reference_real, frechet_quantized_real: each model against real images; None without these.
        kernel, kernel_reference_real, kernel_quantized_real: kernel distances of the same sets, which few
            images do not bias; None where there is no Frechet distance.
        missing: one sentence for everything that is None.
        timings: per batch size.
        reference_bytes, quantized_bytes: of the weight files; None without paths.
        reference_images, quantized_images: [K, H, W, C] uint8.
    """

    config: EvaluationConfig
    timesteps: np.ndarray
    psnr_db: float
    sqnr_db: float
    psnr_per_image_db: np.ndarray
    sqnr_per_image_db: np.ndarray
    noise_sqnr_same_input_db: np.ndarray
    noise_sqnr_own_trajectory_db: np.ndarray
    lpips: float | None
    lpips_per_image: np.ndarray | None
    frechet: FrechetResult | None
    frechet_reference_real: FrechetResult | None
    frechet_quantized_real: FrechetResult | None
    missing: tuple[str, ...]
    timings: tuple[PairTiming, ...]
    reference_bytes: int | None
    quantized_bytes: int | None
    reference_images: np.ndarray = field(repr=False)
    quantized_images: np.ndarray = field(repr=False)
    kernel: KernelResult | None = None
    kernel_reference_real: KernelResult | None = None
    kernel_quantized_real: KernelResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types without the images; infinite decibels become the strings "inf" and "-inf"."""
        values = asdict(self)
        del values["reference_images"], values["quantized_images"]
        plain: dict[str, Any] = _plain(values)
        return plain


def compare(
    reference: Any,
    quantized: Any,
    scheduler: Any,
    config: EvaluationConfig | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    conditioning: Conditioning | None = None,
    call: DenoiserCall | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    real_images: Tensor | None = None,  # [M, C, H, W] float in [-1, 1]
    paths: tuple[Path, Path] | None = None,
    progress: Progress = silent,
) -> EvaluationResult:
    """Measures `quantized` against `reference` on the same seeds.

    Args:
        reference, quantized: denoisers, (sample, timestep=[B], **conditioning) -> noise prediction.
        scheduler: diffusers scheduler as it will be used; copied.
        shape: of one sample, (C, H, W); None takes it from `call`, or from the reference's config.
        conditioning: keyword tensors with `num_images` rows, or dicts of them.
        call: what else both denoisers are given, as for `adpdm.quantize`.
        decode: final samples -> images [N, C, H, W] in [-1, 1], for latent diffusion; None takes the samples
            themselves, which must be images of 1 or 3 channels.
        real_images: for the Frechet distance of each model to the data.
        paths: folders or files of both models' weights, for their sizes.
        progress: called with (phase, done, total).

    Raises:
        ValueError: a setting or shape does not fit, or a feature network is damaged; before anything runs.
    """
    config = config or EvaluationConfig()
    shape, conditioning = shape or shape_of_call(call) or sample_shape(reference), dict(conditioning or {})
    _check_given(conditioning, config.num_images, shape, decode, real_images)
    sizes = tuple(file_bytes(path) for path in paths) if paths else (None, None)
    networks = (load_lpips(config.cache_dir), load_lite0()) if config.use_extractors else (None, None)
    pair = _PairedSampling(reference, quantized, scheduler, config, shape, conditioning, call)
    samples = pair.run(progress)
    if decode is not None:
        with torch.no_grad():
            samples = (decode(samples[0]), decode(samples[1]))
    images = tuple(x.float().clamp(-1, 1).cpu() for x in samples)
    features = _measure_features(images, real_images, networks, config, progress)
    timings = _measure_times(reference, quantized, pair, config, progress)
    return EvaluationResult(
        config=config,
        timesteps=pair.timesteps,
        psnr_db=metrics.psnr(images[0], images[1]),
        sqnr_db=metrics.sqnr(images[0], images[1]),
        psnr_per_image_db=metrics.psnr_per_image(images[0], images[1]),
        sqnr_per_image_db=metrics.sqnr_per_image(images[0], images[1]),
        noise_sqnr_same_input_db=metrics.pooled_sqnr(pair.signal, pair.error_same_input),
        noise_sqnr_own_trajectory_db=metrics.pooled_sqnr(pair.signal, pair.error_own_trajectory),
        timings=timings,
        reference_bytes=sizes[0],
        quantized_bytes=sizes[1],
        reference_images=to_uint8(images[0][: config.kept_images]),
        quantized_images=to_uint8(images[1][: config.kept_images]),
        **features,
    )


def _check_given(
    conditioning: Conditioning,
    num_images: int,
    shape: tuple[int, ...],
    decode: Callable[[Tensor], Tensor] | None,
    real: Tensor | None,
) -> None:
    for path, value in tree_flatten_with_path(conditioning)[0]:
        if len(value) != num_images:
            name = ".".join(str(getattr(key, "key", key)) for key in path)
            raise ValueError(f"compare: {name} must have num_images={num_images} rows, got {len(value)}")
    if decode is None:
        demand_images("compare", shape)
    if real is None:
        return
    if real.dim() != 4 or real.shape[1] not in IMAGE_CHANNELS or len(real) < MIN_VECTORS:
        raise ValueError(
            f"compare: real_images must be [M, C, H, W] with {IMAGE_CHANNELS} channels, at least "
            f"{MIN_VECTORS} of them, got {tuple(real.shape)}"
        )


class _PairedSampling:
    """Steps both models side by side and adds up the energies of their noise predictions.

    signal, error_same_input, error_own_trajectory: [M] float64, sums over all images.
    """

    def __init__(
        self,
        reference: Any,
        quantized: Any,
        scheduler: Any,
        config: EvaluationConfig,
        shape: tuple[int, ...],
        conditioning: Conditioning,
        call: DenoiserCall | None,
    ) -> None:
        self.reference, self.quantized, self.scheduler = reference, quantized, scheduler
        self.config, self.shape, self.conditioning, self.call = config, shape, conditioning, call
        self.device = device_of(reference)
        self.timesteps = self.trajectory([0]).given_timesteps
        self.signal, self.error_same_input, self.error_own_trajectory = np.zeros((3, len(self.timesteps)))

    def trajectory(self, seeds: list[int]) -> Trajectory:
        """A batch at its beginning."""
        steps = self.config.num_inference_steps
        return Trajectory(self.scheduler, steps, seeds, self.shape, self.device, self.call)

    @torch.no_grad()
    def run(self, progress: Progress) -> tuple[Tensor, Tensor]:
        """Final samples of both models, [N, C, H, W]."""
        config, steps = self.config, len(self.timesteps)
        seeds, slices = (
            image_seeds(config.seed, config.num_images),
            list(batches(config.num_images, config.batch_size)),
        )
        finals: list[tuple[Tensor, Tensor]] = []
        for number, rows in enumerate(slices):
            ours, theirs = self.trajectory(seeds[rows]), self.trajectory(seeds[rows])
            extra = pick(self.conditioning, rows)
            for k in range(steps):
                self._step(ours, theirs, k, extra)
                progress("sampling both models", number * steps + k + 1, len(slices) * steps)
            finals.append((ours.sample, theirs.sample))
        return torch.cat([f[0] for f in finals]), torch.cat([f[1] for f in finals])

    def _step(self, ours: Trajectory, theirs: Trajectory, k: int, extra: Conditioning) -> None:
        inputs, own_inputs = ours.model_input(k), theirs.model_input(k)
        wanted = ours.predict(self.reference, inputs, k, extra)
        same_input = ours.predict(self.quantized, inputs, k, extra)
        # at the first step both trajectories are still the same noise
        own = same_input if k == 0 else theirs.predict(self.quantized, own_inputs, k, extra)
        signal, error = metrics.energies(wanted, same_input)
        self.signal[k] += signal
        self.error_same_input[k] += error
        self.error_own_trajectory[k] += metrics.energies(wanted, own)[1]
        ours.advance(wanted, k)
        theirs.advance(own, k)


def _measure_features(
    images: tuple[Tensor, ...],
    real: Tensor | None,
    networks: tuple[Lpips | None, Lite0 | None],
    config: EvaluationConfig,
    progress: Progress,
) -> dict[str, Any]:
    """LPIPS, Frechet and kernel distances, or None and the sentence that says why."""
    values: dict[str, Any] = dict.fromkeys(
        ("lpips", "lpips_per_image", "frechet", "frechet_reference_real", "frechet_quantized_real")
    )
    missing: list[str] = []
    lpips, lite0 = networks
    why = (
        f"To measure it {INSTALL_SENTENCE}."
        if config.use_extractors
        else "It was switched off (use_extractors)."
    )
    if lpips is None:
        missing.append(f"LPIPS (AlexNet) was not measured. {why}")
    else:
        distances = in_batches(lpips.distance, config.batch_size, "LPIPS", progress, *images).astype(float)
        values.update(lpips=float(distances.mean()), lpips_per_image=distances)
    if lite0 is None:
        missing.append(f"{FRECHET_NAME}, and the kernel distance with it, was not measured. {why}")
    elif config.num_images < MIN_IMAGES:
        missing.append(
            f"{FRECHET_NAME}, and the kernel distance with it, was not measured: it needs at least "
            f"{MIN_IMAGES} images."
        )
    else:
        what = "EfficientNet-Lite0 features"
        sets = [in_batches(lite0.features, config.batch_size, what, progress, x) for x in images]
        values["frechet"] = _frechet(sets[0], sets[1], config, is_paired=True)
        values["kernel"] = kernel_distance(sets[0], sets[1], seed=config.seed, is_paired=True)
        if real is not None:
            data = in_batches(lite0.features, config.batch_size, what, progress, real)
            values["frechet_reference_real"] = _frechet(data, sets[0], config)
            values["frechet_quantized_real"] = _frechet(data, sets[1], config)
            values["kernel_reference_real"] = kernel_distance(data, sets[0], seed=config.seed)
            values["kernel_quantized_real"] = kernel_distance(data, sets[1], seed=config.seed)
    values["missing"] = tuple(missing)
    return values


def _frechet(
    a: np.ndarray, b: np.ndarray, config: EvaluationConfig, is_paired: bool = False
) -> FrechetResult:
    return frechet_distance(
        a,
        b,
        dimensions=config.frechet_dimensions,
        resamples=config.bootstrap_resamples,
        seed=config.seed,
        is_paired=is_paired,
    )


def _measure_times(
    reference: Any, quantized: Any, pair: _PairedSampling, config: EvaluationConfig, progress: Progress
) -> tuple[PairTiming, ...]:
    """One paired timing per batch size, in the middle of the trajectory."""
    timings, middle = [], len(pair.timesteps) // 2
    for number, size in enumerate(config.timing_batch_sizes):
        path = pair.trajectory(image_seeds(config.seed, size))
        # conditioning has one row per image: cycle through them
        extra = pick(pair.conditioning, torch.arange(size) % config.num_images)
        calls = [partial(path.predict, x, path.sample, middle, extra) for x in (reference, quantized)]
        timings.append(time_pair(calls[0], calls[1], size, pair.device, config.timing_pairs))
        progress("timing", number + 1, len(config.timing_batch_sizes))
    return tuple(timings)


def _plain(value: Any) -> Any:
    """Nested JSON types."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
