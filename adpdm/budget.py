"""Fits a quantization into a span of time: times the denoiser, estimates, and takes work out until it fits.

The estimate counts forward passes of one image. What each phase takes was measured on the two shipped models
(docs/quantize.md says how near it comes); a machine that is busy with something else takes longer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .config import QuantConfig
from .correction import CORRECTION_IMAGES
from .trajectory import Sampler

# In forward passes of one image, for each image and call of a trajectory:
OBSERVE = 1.3  # with histograms
FIT_8_BITS = 0.9  # partition, bias correction
FIT_FEWER_BITS = 2.6  # also rounding of weights, sensitivity of layers
TRAIN = 4.5  # an image of an optimizer step: forward and backward through mixtures
HELD_OUT_TRAJECTORIES = 3  # of the search: full precision, before, after
RESERVE = 1.3  # what is not counted
PARTITION_SECONDS = 3.0  # depends on layers and steps more than on the denoiser

SHORT_SECONDS = 0.5  # a forward pass of one image below this is timed in batches, as calibration runs it
TIMED_PASSES = 3
FEWEST_SEARCH_STEPS = 20
FEWEST_HISTOGRAM_IMAGES = 4
SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)  # of the search


@dataclass(frozen=True)
class BudgetPlan:
    """Settings that fit, and what they should take.

    Args:
        image_seconds: of a forward pass, per image.
        wanted_seconds: estimate of the settings that were asked for.
        seconds: estimate of `config`.
    """

    config: QuantConfig
    image_seconds: float
    wanted_seconds: float
    seconds: float

    @property
    def options(self) -> str:
        """The settings that may have been reduced, as options of `adpdm quantize`."""
        c = self.config
        words = f"--grouping {c.grouping} --histogram-images {c.histogram_images}"
        if c.searches:
            words += f" --images {c.calibration_images} --search-steps {c.search.num_steps}"
        return words


def fit_budget(sampler: Sampler, config: QuantConfig, seconds: float) -> BudgetPlan:
    """Reduce the search, then the calibration images, then give the search up, until the estimate fits.

    Args:
        seconds: for the whole of `adpdm.quantize`.

    Raises:
        ValueError: where not even the least calibration fits, with the time that takes.
    """
    if not seconds > 0:
        raise ValueError(f"budget: wanted a positive time, got {seconds:g} s")
    image_seconds, num_calls = time_image(sampler, config), len(sampler.calls)
    wanted = estimate(config, num_calls, image_seconds)
    least = wanted
    for candidate in reductions(config):
        least = estimate(candidate, num_calls, image_seconds)
        if least <= seconds:
            return BudgetPlan(candidate, image_seconds, wanted, least)
    raise ValueError(
        f"budget: wanted at most {seconds:g} s, the least calibration takes about {least:.3g} s here "
        f"({image_seconds:.3g} s for an image and step, {num_calls} steps); give more time, or calibrate for "
        "fewer steps"
    )


@torch.no_grad()
def time_image(sampler: Sampler, config: QuantConfig) -> float:
    """Seconds of a forward pass, per image: the quickest of a few."""
    first = _time_batch(sampler, 1)
    if first > SHORT_SECONDS:
        return first
    batch = config.round_size
    return min(_time_batch(sampler, batch) for _ in range(TIMED_PASSES)) / batch


def _time_batch(sampler: Sampler, batch: int) -> float:
    sample = torch.zeros(batch, *sampler.sample_shape, device=sampler.device)
    conditions = sampler.conditions(0, batch)
    sampler.predict(sample, sampler.calls[0], conditions)
    start = time.perf_counter()
    sampler.predict(sample, sampler.calls[0], conditions).sum().item()  # waits for a GPU
    return time.perf_counter() - start


def estimate(config: QuantConfig, num_calls: int, image_seconds: float) -> float:
    """Seconds of `adpdm.quantize`, for a denoiser that takes `image_seconds` for each image of a pass."""
    rows = 1 if config.guidance_scale == 1 else 2  # of an image, with its condition and with none
    fewer_bits = min(config.weight_bits, config.activation_bits) < 8
    observed = rows * config.histogram_images
    passes = observed * num_calls * (OBSERVE + (FIT_FEWER_BITS if fewer_bits else FIT_8_BITS))
    if config.searches:
        search = config.search
        generated = rows * config.calibration_images * num_calls / 2  # selected steps lie anywhere
        trained = (search.num_steps + search.refit_steps) * search.batch_size * TRAIN
        passes += generated + trained + HELD_OUT_TRAJECTORIES * rows * search.batch_size * num_calls
    if config.correct_prediction:
        fits = 3 if config.searches else 1  # to judge it before and after; of the finished model
        passes += fits * min(rows * CORRECTION_IMAGES, observed) * num_calls
    return PARTITION_SECONDS + RESERVE * passes * image_seconds


def reductions(config: QuantConfig) -> Iterator[QuantConfig]:
    """`config`, then the same with less and less work."""
    yield config
    images = config.histogram_images
    fewer = [n for n in (images, images // 2, images // 4) if n >= FEWEST_HISTOGRAM_IMAGES] or [images]
    for histogram_images in fewer:
        reduced = replace(config, histogram_images=histogram_images)
        if config.searches:
            yield from (_with_search(reduced, share) for share in SHARES)
    for histogram_images in fewer:
        without = "dp" if config.searches else config.grouping
        yield replace(config, histogram_images=histogram_images, grouping=without)


def _with_search(config: QuantConfig, share: float) -> QuantConfig:
    """The search with a share of its images and optimizer steps."""
    search = config.search
    steps = min(search.num_steps, max(FEWEST_SEARCH_STEPS, round(search.num_steps * share)))
    images = min(config.calibration_images, max(config.round_size, round(config.calibration_images * share)))
    return replace(config, calibration_images=images, search=replace(search, num_steps=steps))
