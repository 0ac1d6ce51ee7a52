"""Every kind of scheduler: those that come back to timesteps, visit more than asked, or count in noise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

import adpdm
from adpdm import QuantConfig, SearchConfig
from adpdm.nn import quant_layers
from adpdm.schedulers import identity, model_input
from adpdm.testing import ONE_BLOCK, tiny_unet
from adpdm.trajectory import Sampler

STEPS = 5

# (scheduler, settings, calls, different timesteps) for STEPS steps
KINDS: list[tuple[str, dict[str, Any], int, int]] = [
    ("DDPMScheduler", {}, 5, 5),
    ("DDIMScheduler", {}, 5, 5),
    ("DPMSolverMultistepScheduler", {}, 5, 5),
    ("DPMSolverSinglestepScheduler", {}, 5, 5),
    ("EulerDiscreteScheduler", {}, 5, 5),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 5, 5),
    ("EulerAncestralDiscreteScheduler", {}, 5, 5),
    ("HeunDiscreteScheduler", {}, 9, 5),
    ("KDPM2DiscreteScheduler", {}, 9, 9),
    ("KDPM2AncestralDiscreteScheduler", {}, 9, 9),
    ("DEISMultistepScheduler", {}, 5, 5),
    ("UniPCMultistepScheduler", {}, 5, 5),
    ("PNDMScheduler", {"skip_prk_steps": True}, 6, 5),
    ("PNDMScheduler", {}, 14, 8),
    ("LCMScheduler", {}, 5, 5),
    ("EDMEulerScheduler", {}, 5, 5),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 5, 5),
    ("FlowMatchHeunDiscreteScheduler", {}, 9, 5),
]
IDS = [name.removesuffix("Scheduler") + "-".join(["", *map(str, changes)]) for name, changes, _, _ in KINDS]


def make_scheduler(name: str, changes: dict[str, Any]) -> Any:
    return getattr(diffusers, name)(**changes)


def config(**changes: Any) -> QuantConfig:
    values: dict[str, Any] = {
        "num_groups": 3,
        "num_inference_steps": STEPS,
        "histogram_images": 2,
        "grouping": "dp",
        "correct_bias": False,
    }
    return QuantConfig(**{**values, **changes})


def walk(denoiser: Any, scheduler: Any) -> list[tuple[float, int, Tensor]]:
    """Timestep, step index and groups of every call of the scheduler, on a sample of its own."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 1, 8, 8, generator=generator)
    seen = []
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            pred = denoiser(model_input(scheduler, sample, timestep), timestep).sample
            sample = scheduler.step(pred, timestep, sample).prev_sample
            step = denoiser.adpdm_step
            seen.append((float(timestep), int(step.step_index), step.group_index.clone()))
    return seen


@pytest.mark.parametrize(("name", "changes", "calls", "steps"), KINDS, ids=IDS)
def test_every_call_has_the_groups_of_its_timestep(
    name: str, changes: dict[str, Any], calls: int, steps: int, tmp_path: Path
) -> None:
    denoiser, scheduler = tiny_unet(**ONE_BLOCK), make_scheduler(name, changes)
    report = adpdm.quantize(denoiser, config(), scheduler=scheduler)
    assert len(report.timesteps) == steps
    assert report.timesteps == sorted(set(report.timesteps), reverse=True)
    seen = walk(denoiser, scheduler)
    assert len(seen) == calls
    step = denoiser.adpdm_step
    for timestep, index, groups in seen:
        assert report.timesteps[index] == pytest.approx(timestep, rel=1e-6, abs=1e-6)
        assert torch.equal(groups, step.table[index])
    assert {index for _, index, _ in seen} == set(range(steps))
    denoiser.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert [index for _, index, _ in walk(loaded, scheduler)] == [index for _, index, _ in seen]


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_search_on_a_scheduler_that_comes_back(name: str) -> None:
    denoiser, scheduler = tiny_unet(**ONE_BLOCK), make_scheduler(name, {})
    settings = config(
        grouping="search",
        calibration_images=12,
        round_size=2,
        search=SearchConfig(num_steps=6, refit_steps=2, batch_size=2),
    )
    report = adpdm.quantize(denoiser, settings, scheduler=scheduler)
    assert len(report.trace.visits) == len(report.trace.step_weights) == STEPS
    assert sum(report.trace.visits) == 6
    assert len(report.trace.mmd) == 6
    assert [len(q["group_index"]) for q in report.trace.quantizers][0] == STEPS


def test_one_group_per_step_means_per_visited_timestep() -> None:
    denoiser = tiny_unet(**ONE_BLOCK)
    scheduler = make_scheduler("KDPM2DiscreteScheduler", {})
    adpdm.quantize(denoiser, config(grouping="per_step"), scheduler=scheduler)
    assert {q.num_groups for layer in quant_layers(denoiser).values() for q in layer.quantizers} == {9}
    assert [index for _, index, _ in walk(denoiser, scheduler)] == list(range(9))


def test_calls_of_one_timestep_share_a_histogram() -> None:
    scheduler = make_scheduler("HeunDiscreteScheduler", {})
    sampler = Sampler(tiny_unet(**ONE_BLOCK), scheduler, (1, 8, 8), STEPS)
    assert sampler.step_of_call == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len(sampler.timesteps) == STEPS
    run = sampler.run(0, 0, 2)
    assert len(run.samples) == len(run.noise_preds) == len(run.sensitivity) == 9
    assert not torch.equal(run.samples[1], run.samples[2])  # the corrector sees another sample


def test_stochasticity_is_that_of_pipelines() -> None:
    """Pipelines pass an eta of 0; the step of TCD has 0.3 otherwise, which adds noise."""
    scheduler, denoiser = make_scheduler("TCDScheduler", {}), tiny_unet(**ONE_BLOCK)
    sampler = Sampler(denoiser, scheduler, (1, 8, 8), STEPS)
    run = sampler.run(0, 0, 2)
    path = copy.deepcopy(sampler.scheduler)
    sample = run.samples[0]
    for timestep, prediction in zip(sampler.calls, run.noise_preds, strict=True):
        sample = path.step(prediction, timestep, sample, eta=0.0).prev_sample
    assert torch.allclose(run.final, sample, atol=1e-5)


def test_more_groups_than_visited_timesteps_are_refused() -> None:
    denoiser = tiny_unet(**ONE_BLOCK)
    # Four training timesteps for five steps: 3, 2, 2, 1, 1.
    scheduler = make_scheduler("DPMSolverMultistepScheduler", {"num_train_timesteps": 4})
    message = "num_groups must be at most 3, the number of different timesteps .*; got 4"
    with pytest.raises(ValueError, match=message):
        adpdm.quantize(denoiser, config(num_groups=4), scheduler=scheduler)
    assert not quant_layers(denoiser)
    assert not denoiser._forward_pre_hooks


def test_noise_objective_scales_the_input_by_the_noise_of_its_own_timestep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from adpdm.search_run import SearchRun

    scheduler = make_scheduler("EulerDiscreteScheduler", {})
    scales: dict[int, float] = {}
    original = SearchRun._batch

    def watched(self: SearchRun, trajectory: Any, call: int, images: Tensor, draw: int) -> Any:
        batch = original(self, trajectory, call, images, draw)
        noised = self.sampler.scheduler.add_noise(
            trajectory.final[images], batch.target, batch.timestep.expand(len(images))
        )
        scales[call] = float((noised / batch.sample).median())
        return batch

    monkeypatch.setattr(SearchRun, "_batch", watched)
    search = SearchConfig(num_steps=4, refit_steps=0, batch_size=2, objective="noise")
    settings = config(grouping="search", calibration_images=4, round_size=2, search=search)
    adpdm.quantize(tiny_unet(**ONE_BLOCK), settings, scheduler=scheduler)
    scheduler.set_timesteps(STEPS)
    assert len(scales) == STEPS  # the held-out batches show every call
    for call, scale in scales.items():
        assert scale == pytest.approx(float((scheduler.sigmas[call] ** 2 + 1).sqrt()), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "predicts"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, "velocity of a flow"),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}, "v_prediction"),
    ],
)
def test_noise_objective_is_refused_where_no_noise_is_predicted(
    name: str, changes: dict[str, Any], predicts: str
) -> None:
    message = rf"objective 'noise' needs a denoiser that predicts the noise; .*{name} predicts: {predicts}"
    settings = config(search=SearchConfig(objective="noise"))
    with pytest.raises(ValueError, match=message):
        adpdm.quantize(tiny_unet(**ONE_BLOCK), settings, scheduler=make_scheduler(name, changes))


def test_identity_is_that_of_the_settings_not_of_how_they_were_given(tmp_path: Path) -> None:
    made = diffusers.DDIMScheduler()
    made.save_pretrained(tmp_path)
    stored = diffusers.DDIMScheduler.from_pretrained(tmp_path)
    stored.register_to_config(_use_default_values=["beta_start", "beta_end"])  # a set's order, in any order
    assert identity(stored) == identity(made)
    assert identity(diffusers.DDIMScheduler(clip_sample=False)) != identity(made)
    assert identity(diffusers.DDPMScheduler()) != identity(made)
