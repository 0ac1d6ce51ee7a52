"""What schedulers of diffusers do differently around a step: first sample, input and output."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

STEPS_IN_FULL = ("timesteps", "sigmas")  # arguments of `set_timesteps` that list all steps


def set_steps(scheduler: Any, num_inference_steps: int, schedule: dict[str, Any]) -> None:
    """Set the steps of a scheduler; where the schedule lists them, most want their number left out."""
    number = inspect.signature(scheduler.set_timesteps).parameters.get("num_inference_steps")
    is_optional = number is not None and number.default is not inspect.Parameter.empty
    if lists_steps(schedule) and is_optional:
        scheduler.set_timesteps(**schedule)
    else:
        scheduler.set_timesteps(num_inference_steps, **schedule)


def lists_steps(schedule: dict[str, Any]) -> bool:
    """Whether a schedule says itself which steps there are."""
    return any(schedule.get(name) is not None for name in STEPS_IN_FULL)


def first_sample(scheduler: Any, noise: Tensor) -> Tensor:
    """The sample [N, ...] that a trajectory starts from; schedulers of flow matching start from the noise."""
    start: Tensor = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    return start


def model_input(scheduler: Any, sample: Tensor, timestep: Tensor) -> Tensor:
    """The sample as the denoiser wants it: schedulers over sigmas scale it, those of flow matching do not."""
    scale = getattr(scheduler, "scale_model_input", None)
    seen: Tensor = sample if scale is None else scale(sample, timestep)
    return seen


def used_output(scheduler: Any, output: Tensor, channels: int) -> Tensor:
    """What the scheduler wants of an output [N, C or 2 C, *]: without variances that it did not learn."""
    learned = str(getattr(scheduler.config, "variance_type", "")).startswith("learned")
    return output[:, :channels] if output.shape[1] == 2 * channels and not learned else output


def step_arguments(scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    """What else `step` takes: generators of the images where it draws noise, an eta of 0 as pipelines do."""
    values = {"generator": generators, "eta": 0.0}
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in values.items() if name in accepted}


def in_channels_last(sample: Tensor) -> Tensor:
    """Images [N, C, H, W] as convolutions want them; other samples as they are."""
    return sample.contiguous(memory_format=torch.channels_last) if sample.dim() == 4 else sample


def identity(scheduler: Any) -> str:
    """Class and settings in words, the same in every process.

    Names with an underscore are left out: they say how a config was made, in an order that differs.
    """
    settings = sorted((k, v) for k, v in dict(scheduler.config).items() if not k.startswith("_"))
    return f"{type(scheduler).__name__} {settings}"
