"""What schedulers of diffusers do differently around a step: the first sample, the input of the denoiser."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def first_sample(scheduler: Any, noise: Tensor) -> Tensor:
    """The sample [N, ...] that a trajectory starts from; schedulers of flow matching start from the noise."""
    start: Tensor = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    return start


def model_input(scheduler: Any, sample: Tensor, timestep: Tensor) -> Tensor:
    """The sample as the denoiser wants it: schedulers over sigmas scale it, those of flow matching do not."""
    scale = getattr(scheduler, "scale_model_input", None)
    seen: Tensor = sample if scale is None else scale(sample, timestep)
    return seen
