"""How much a step counts: what the scheduler makes of an error at it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from adpdm.calibrate import weights_of_calls
from adpdm.testing import ONE_BLOCK, tiny_unet
from adpdm.trajectory import PROBE_SEED, PROBE_SIZE, SEED_STRIDE, Sampler

STEPS = 5


def test_sensitivity_is_what_the_scheduler_makes_of_an_error() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    sampler = Sampler(tiny_unet(**ONE_BLOCK), scheduler, (1, 8, 8), STEPS)
    run = sampler.run(0, 0, 2)
    alphas = [float(scheduler.alphas_cumprod[int(t)]) for t in sampler.timesteps]
    alphas.append(float(scheduler.final_alpha_cumprod))
    generator = torch.Generator().manual_seed(PROBE_SEED)
    energy = float(torch.randn(2, 1, 8, 8, generator=generator).square().mean())
    for k, (a, b) in enumerate(itertools.pairwise(alphas)):
        # x' = sqrt(b) (x - sqrt(1-a) e) / sqrt(a) + sqrt(1-b) e, of which the factor of e matters.
        factor = math.sqrt(1 - b) - math.sqrt(b * (1 - a) / a)
        # A difference of float32 samples of size s, for a probe of 1 % times the factor.
        size = float(run.samples[k].abs().max()) / math.sqrt(a)
        slack = 8 * 2.0**-24 * size / (PROBE_SIZE * abs(factor))
        assert float(run.sensitivity[k]) == pytest.approx(factor**2 * energy, rel=2 * slack + 1e-6)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_probing_leaves_the_trajectory_alone(scheduler: Any) -> None:
    # Both remember or draw something in a step: probing must neither advance nor consume it.
    unet, ours = tiny_unet(**ONE_BLOCK), scheduler()
    run = Sampler(unet, ours, (1, 8, 8), STEPS).run(3, 0, 1)
    ours.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(3 * SEED_STRIDE)
    sample = torch.randn(1, 1, 8, 8, generator=generator) * ours.init_noise_sigma
    sample = sample.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for timestep in ours.timesteps:
            pred = unet(sample, timestep).sample
            sample = ours.step(pred, timestep, sample, generator=[generator]).prev_sample
    assert torch.equal(run.final, sample)


def test_weights_of_calls_are_relative_sensitivities_with_a_floor() -> None:
    weights = weights_of_calls(torch.tensor([0.0, 1.0, 3.0, 0.001], dtype=torch.float64))
    assert float(weights.mean()) == pytest.approx(1.0)
    assert float(weights[2] / weights[1]) == pytest.approx(3.0)
    assert float(weights[0]) == float(weights[3]) > 0
    assert weights_of_calls(torch.zeros(3, dtype=torch.float64)).tolist() == [1.0, 1.0, 1.0]
