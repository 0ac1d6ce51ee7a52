"""Calibration: what the search is fed, what is recorded, and how it resumes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

import adpdm
from adpdm import QuantConfig, SearchConfig, calibrate, reference
from adpdm.calibrate import step_weights
from adpdm.pipeline import QuantizationReport
from adpdm.search import Batch, GroupSearch, SearchOutcome
from adpdm.testing import ddim_scheduler, tiny_unet
from adpdm.timesteps import mmd_trace
from adpdm.trajectory import PROBE_SEED, PROBE_SIZE, SEED_STRIDE, Sampler

STEPS, HISTOGRAM_IMAGES, SELECTED_IMAGES = 5, 3, 10
SMALL: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}


def config(**changes: Any) -> QuantConfig:
    values: dict[str, Any] = {
        "num_groups": 2,
        "num_inference_steps": STEPS,
        "calibration_images": SELECTED_IMAGES,
        "round_size": 4,  # rounds of 4, 4 and 2 images
        "histogram_images": HISTOGRAM_IMAGES,
        "search": SearchConfig(num_steps=9, refit_steps=2, batch_size=2),
    }
    return QuantConfig(**{**values, **changes})


class Recorded:
    """A calibration whose optimizer batches were watched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, settings: QuantConfig) -> None:
        self.batches: list[Batch] = []
        plain = GroupSearch.train_step

        def watched(search: GroupSearch, batch: Batch) -> float:
            self.batches.append(batch)
            return plain(search, batch)

        monkeypatch.setattr(GroupSearch, "train_step", watched)
        self.report: QuantizationReport = adpdm.quantize(
            tiny_unet(**SMALL), settings, scheduler=ddim_scheduler()
        )


def float_trajectory(images: int) -> tuple[Tensor, Tensor, Sampler]:
    """Inputs and noise predictions [T, images, 1, 8, 8] of the plain float model, one image at a time."""
    unet = tiny_unet(**SMALL).to(memory_format=torch.channels_last)
    sampler = Sampler(unet, ddim_scheduler(), (1, 8, 8), STEPS)
    runs = [sampler.run(0, i, 1) for i in range(images)]
    return torch.cat([r.samples for r in runs], 1), torch.cat([r.noise_preds for r in runs], 1), sampler


def test_search_sees_inputs_of_the_sampler_at_their_own_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    # Known defect elsewhere: calibration images clamped to [0, 1] and re-noised out of distribution.
    recorded = Recorded(monkeypatch, config())
    samples, preds, sampler = float_trajectory(HISTOGRAM_IMAGES + SELECTED_IMAGES)
    assert len(recorded.batches) == 9 + 2
    for batch in recorded.batches:
        assert batch.sample.shape == (2, 1, 8, 8)
        assert float(batch.timestep) == float(sampler.timesteps[batch.step_index])
        known, wanted = samples[batch.step_index], preds[batch.step_index]
        for sample, target in zip(batch.sample, batch.target, strict=True):
            distance = (known - sample).abs().amax((1, 2, 3))
            # Batches of one and of four may take other kernels: five steps of float32 rounding at size one.
            assert float(distance.min()) < 1e-4
            assert float((wanted[distance.argmin()] - target).abs().max()) < 1e-4


def test_replay_decides_between_cached_and_selected_images(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, _, _ = float_trajectory(HISTOGRAM_IMAGES + SELECTED_IMAGES)
    for replay in (0.0, 1.0):
        with monkeypatch.context() as patch:
            search = SearchConfig(num_steps=9, refit_steps=2, batch_size=2, replay=replay)
            recorded = Recorded(patch, config(search=search))
        chosen = [row["step_index"] for row in recorded.report.trace.rounds]
        for batch in recorded.batches:
            distance = (samples[batch.step_index] - batch.sample[0]).abs().amax((1, 2, 3))
            is_cached = int(distance.argmin()) < HISTOGRAM_IMAGES
            assert is_cached == (replay == 1.0)
            assert is_cached or batch.step_index in chosen


def test_noise_objective_trains_on_the_noise_that_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    search = SearchConfig(num_steps=6, refit_steps=0, batch_size=2, objective="noise")
    recorded = Recorded(monkeypatch, config(search=search))
    scheduler = ddim_scheduler()
    unet = tiny_unet(**SMALL)
    finals = [Sampler(unet, scheduler, (1, 8, 8), STEPS).run(0, i, 1).final for i in range(HISTOGRAM_IMAGES)]
    cached = torch.cat(finals)
    found = 0
    for batch in recorded.batches:
        alpha = scheduler.alphas_cumprod[int(batch.timestep)]
        image = (batch.sample - (1 - alpha).sqrt() * batch.target) / alpha.sqrt()
        distance = (cached - image[0]).abs().amax((1, 2, 3)).min()
        found += bool(distance < 1e-4 / float(alpha.sqrt()))
    assert found > 0
    assert len({float(b.target.sum()) for b in recorded.batches}) == len(recorded.batches)


def test_trace_tells_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config()
    report = Recorded(monkeypatch, settings).report
    trace = report.trace
    quantizers = sum(2 if x.split else 1 for x in report.layers if x.bits)
    assert trace.histogram_bytes == quantizers * STEPS * reference.HISTOGRAM_BINS * 8
    assert trace.trajectory_bytes == 2 * STEPS * HISTOGRAM_IMAGES * 64 * 4
    assert sorted(trace.seconds) == ["bias correction", "partition", "search", "trajectories"]
    assert [row["round"] for row in trace.rounds] == [0, 1, 2]
    assert sum(trace.visits) == 3
    assert all(trace.visits[row["step_index"]] for row in trace.rounds)
    assert len(trace.losses) == 9 + 2
    assert all(math.isfinite(loss) for loss in trace.losses)
    samples, _, _ = float_trajectory(HISTOGRAM_IMAGES)
    wanted = mmd_trace(samples, [row["step_index"] for row in trace.rounds])
    assert trace.mmd == pytest.approx(wanted, abs=1e-4)
    assert len(trace.quantizers) == quantizers
    for row in trace.quantizers:
        assert len(row["observed"]) == len(row["group_index"]) == STEPS
        assert set(row["group_index"]) <= {0, 1}
        assert all(low <= high for low, high in row["observed"])
        assert all(low <= 0 <= high for low, high in row["covered"])


def test_observed_ranges_are_those_of_the_float_model(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Recorded(monkeypatch, config(grouping="dp", histogram_images=2)).report
    row = next(r for r in report.trace.quantizers if r["name"] == "mid_block.resnets.0.conv1")
    unet = tiny_unet(**SMALL)
    seen: list[Tensor] = []
    unet.mid_block.resnets[0].conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sampler = Sampler(unet, ddim_scheduler(), (1, 8, 8), STEPS)
    for image in range(2):
        sampler.run(0, image, 1)
    for k in range(STEPS):
        both = torch.cat([seen[k], seen[STEPS + k]])
        assert row["observed"][k] == pytest.approx([float(both.min()), float(both.max())], abs=1e-4)


def test_undecided_search_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Recorded(monkeypatch, config()).report.trace  # nine steps decide nothing
    assert trace.outcome is not None
    assert trace.outcome.max_importance < 0.9
    assert trace.warnings == [
        f"the search ended undecided: mean largest importance weight {trace.outcome.max_importance:.2f}, "
        "wanted at least 0.9; more search steps or a larger entropy_weight harden it"
    ]


def test_outcome_gap_is_the_ratio_of_losses_in_db() -> None:
    assert SearchOutcome(1e-3, 2e-3, 0.95, 0.0).gap_db == pytest.approx(10 * math.log10(2))
    assert SearchOutcome(1e-3, 1e-4, 0.95, 0.0).gap_db == pytest.approx(-10)


def test_one_group_needs_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, config(num_groups=1))
    assert recorded.batches == []
    assert recorded.report.trace.outcome is None


@pytest.mark.parametrize(
    "changes",
    [{"num_inference_steps": 1, "num_groups": 1}, {"num_inference_steps": 2}, {"calibration_images": 1}],
)
def test_few_steps_and_images_are_enough(monkeypatch: pytest.MonkeyPatch, changes: dict[str, int]) -> None:
    # Known defect elsewhere: crash for T <= 30.
    recorded = Recorded(monkeypatch, config(**changes))
    assert sum(recorded.report.trace.visits) >= 1


# ---- how much a step counts --------------------------------------------------------------------------------


def test_sensitivity_is_what_the_scheduler_makes_of_an_error() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    sampler = Sampler(tiny_unet(**SMALL), scheduler, (1, 8, 8), STEPS)
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
    unet, ours = tiny_unet(**SMALL), scheduler()
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


def test_step_weights_are_relative_sensitivities_with_a_floor() -> None:
    weights = step_weights(torch.tensor([0.0, 1.0, 3.0, 0.001], dtype=torch.float64))
    assert float(weights.mean()) == pytest.approx(1.0)
    assert float(weights[2] / weights[1]) == pytest.approx(3.0)
    assert float(weights[0]) == float(weights[3]) > 0
    assert step_weights(torch.zeros(3, dtype=torch.float64)).tolist() == [1.0, 1.0, 1.0]


# ---- resuming ----------------------------------------------------------------------------------------------


def test_foreign_state_file_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    adpdm.quantize(tiny_unet(**SMALL), config(), scheduler=ddim_scheduler(), state_file=state)
    with pytest.raises(ValueError, match="belongs to another model, configuration or version"):
        adpdm.quantize(tiny_unet(**SMALL), config(seed=1), scheduler=ddim_scheduler(), state_file=state)
    with pytest.raises(ValueError, match="belongs to another model, configuration or version"):
        adpdm.quantize(tiny_unet(1, **SMALL), config(), scheduler=ddim_scheduler(), state_file=state)


def test_truncated_state_file_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    state.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ValueError, match=r"state.safetensors is no search state.*remove it"):
        adpdm.quantize(tiny_unet(**SMALL), config(), scheduler=ddim_scheduler(), state_file=state)


def test_state_file_is_replaced_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "below" / "state.safetensors"

    def broken(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "save_file", broken)
        with pytest.raises(OSError, match="disk full"):
            adpdm.quantize(tiny_unet(**SMALL), config(), scheduler=ddim_scheduler(), state_file=state)
    assert not state.exists()
