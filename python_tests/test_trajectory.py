"""How a denoiser is called: what the fingerprint of a call tells apart, and samplers with other steps."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.utils._pytree import tree_flatten

from adpdm import DenoiserCall
from adpdm.fingerprint import fingerprint_of, named_tensors
from adpdm.pipeline_checks import make_sampler
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_unet
from adpdm.trajectory import Sampler


def test_fingerprint_tells_schedules_of_tensors_apart() -> None:
    schedules: list[dict[str, Any]] = [
        {"sigmas": torch.tensor([1.0, 0.5])},
        {"sigmas": torch.tensor([1.0, 0.9])},
        {"sigmas": torch.tensor([1.0, 0.5], dtype=torch.float64)},
        {"timesteps": torch.tensor([1.0, 0.5])},
        {"sigmas": [1.0, 0.5]},
    ]
    found = [DenoiserCall(schedule=schedule).fingerprint for schedule in schedules]
    assert len(set(found)) == len(schedules)
    assert DenoiserCall(schedule={"sigmas": torch.tensor([1.0, 0.5])}).fingerprint == found[0]
    constant = DenoiserCall(constants={"sigmas": torch.tensor([1.0, 0.5])})
    assert constant.fingerprint not in found


def test_fingerprint_tells_arrays_apart_that_print_alike() -> None:
    values = np.linspace(1.0, 0.1, 2000)
    others = [values + 1e-12, np.where(np.arange(2000) == 1000, 0.0, values), values.astype(np.float32)]
    found = [DenoiserCall(schedule={"sigmas": x}).fingerprint for x in (values, *others)]
    assert len(set(found)) == len(found)
    assert DenoiserCall(schedule={"sigmas": values.copy()}).fingerprint == found[0]


def test_fingerprint_without_tensors_in_the_schedule_is_that_of_saved_searches_and_samples() -> None:
    """Format 4 of sample sets: constants by their bytes, all else in words."""
    constants = {"ids": torch.arange(3), "flag": True}
    call = DenoiserCall((4, 8, 8), constants, 0.5, {"mu": 0.8})
    _, structure = tree_flatten([constants, {"mu": 0.8}])
    words = f"(4, 8, 8) 0.5 {structure} [True, 0.8]"
    assert call.fingerprint == fingerprint_of(named_tensors(constants), words)


@pytest.mark.parametrize(
    ("kind", "schedule", "calls"),
    [
        (diffusers.EulerDiscreteScheduler, {"timesteps": [900, 600, 300]}, 3),
        (diffusers.EulerDiscreteScheduler, {"sigmas": np.array([9.0, 5.0, 1.0, 0.0])}, 3),
        (diffusers.DPMSolverMultistepScheduler, {"timesteps": [900, 600, 300]}, 3),
        (diffusers.DDPMScheduler, {"timesteps": [900, 600, 300]}, 3),
        (diffusers.HeunDiscreteScheduler, {"timesteps": [900, 600, 300]}, 5),
        (FlowMatchEulerDiscreteScheduler, {"timesteps": [900.0, 600.0, 300.0]}, 3),
    ],
)
def test_listed_steps_are_taken_as_they_are(kind: Any, schedule: dict[str, Any], calls: int) -> None:
    given = (kind(), (1, 8, 8), 3, None, DenoiserCall(schedule=schedule), None)
    sampler = make_sampler(tiny_unet(**ONE_BLOCK), *given)
    assert len(sampler.calls) == calls
    if "timesteps" in schedule:
        assert sampler.timesteps.tolist() == schedule["timesteps"]
    wrong = (kind(), (1, 8, 8), 7, None, DenoiserCall(schedule=schedule), None)
    with pytest.raises(ValueError, match=r"must list config.num_inference_steps=7 steps, got [35]$"):
        make_sampler(tiny_unet(**ONE_BLOCK), *wrong)


def test_schedules_that_a_scheduler_does_not_take_are_refused() -> None:
    call = DenoiserCall(schedule={"timesteps": [900, 600, 300]})
    message = r"hold arguments of DDIMScheduler.set_timesteps, which takes .*; got \['timesteps'\]$"
    with pytest.raises(ValueError, match=message):
        make_sampler(tiny_unet(**ONE_BLOCK), ddim_scheduler(), (1, 8, 8), 3, None, call, None)


@pytest.mark.parametrize(
    ("schedule", "calls"),
    [({}, 3), ({"sigmas": [1.0, 0.8, 0.6, 0.4, 0.2]}, 5), ({"timesteps": [900.0] * 5}, 5)],
    ids=["mu", "sigmas", "timesteps"],
)
def test_other_numbers_of_steps_are_taken_unless_the_schedule_lists_them(
    schedule: dict[str, Any], calls: int
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    call = DenoiserCall(schedule={"mu": 0.8, **schedule})  # which dynamic shifting needs
    sampler = Sampler(tiny_unet(**ONE_BLOCK), scheduler, (1, 8, 8), 5, call=call)
    assert len(sampler.calls) == 5
    other = sampler.with_steps(3)
    assert len(other.calls) == calls
    assert (other is sampler) == (calls == 5)
