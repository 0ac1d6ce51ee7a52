"""What the search is fed and judged by: steps by their weights, images under their conditions, correction."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, HeunDiscreteScheduler
from torch import Tensor, nn

import adpdm
from adpdm import QuantConfig, SearchConfig, calibrate, correction
from adpdm.calibrate import weights_of_calls
from adpdm.correction import attach_correction, detach_correction, fit_correction
from adpdm.progress import silent
from adpdm.quantizers.activation import Mode
from adpdm.replay import Replay
from adpdm.search import Batch, GroupSearch
from adpdm.search_run import HOLDOUT_BATCHES, SearchRun
from adpdm.step import StepState
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_transformer, tiny_unet
from adpdm.trajectory import Sampler, pick

STEPS, HISTOGRAM_IMAGES, SELECTED_IMAGES, BATCH = 5, 3, 6, 2
SEARCH = SearchConfig(num_steps=28, refit_steps=2, batch_size=BATCH, replay=0.5)


def config(**changes: Any) -> QuantConfig:
    """Settings with as little as possible besides the search."""
    values: dict[str, Any] = {
        "num_groups": 2,
        "num_inference_steps": STEPS,
        "calibration_images": SELECTED_IMAGES,
        "round_size": 4,  # rounds of 4 and 2 images
        "histogram_images": HISTOGRAM_IMAGES,
        "weight_rounding": "nearest",
        "equalization": "off",
        "raised_layers": 0.0,
        "correct_bias": False,
        "correct_prediction": False,
        "search": SEARCH,
    }
    return QuantConfig(**{**values, **changes})


def float_sampler() -> Sampler:
    """Of the model before it is quantized; step and call are the same."""
    unet = tiny_unet(**ONE_BLOCK).to(memory_format=torch.channels_last)
    return Sampler(unet, ddim_scheduler(), (1, 8, 8), STEPS)


class Fed:
    """A calibration whose search keeps the batches that it is given instead of training on them."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, denoiser: Any, settings: QuantConfig, **given: Any
    ) -> None:
        self.trained: list[Batch] = []
        self.held_out: list[Batch] = []
        self.predicted: list[Tensor] = []  # of `trained`, if there are conditions, in full precision
        judge = GroupSearch.mean_loss

        @torch.no_grad()
        def keep(search: GroupSearch, batch: Batch) -> float:
            self.trained.append(batch)
            if batch.conditioning:
                mode = search.quantizers[0].mode
                search.set_mode(Mode.FLOAT)
                self.predicted.append(search.predict(batch))
                search.set_mode(mode)
            return 0.0

        def keep_held_out(search: GroupSearch, batches: list[Batch]) -> float:
            self.held_out = batches
            return judge(search, batches)

        with monkeypatch.context() as patch:
            patch.setattr(GroupSearch, "train_step", keep)
            patch.setattr(GroupSearch, "mean_loss", keep_held_out)
            self.trace = adpdm.quantize(denoiser, settings, scheduler=ddim_scheduler(), **given).trace


# ---- weights of steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ([0.1, 0.8, 0.1], [1, 1, 1, 1]),  # at 1/8, 3/8, 5/8 and 7/8 of the sum
        ([1.0, 1.0, 1.0, 1.0], [0, 1, 2, 3]),
        ([4.0, 2.0, 2.0], [0, 0, 1, 2]),
    ],
)
def test_replayed_calls_are_more_where_an_error_counts_more(weights: list[float], wanted: list[int]) -> None:
    unused: Any = None
    replay = Replay(unused, {}, unused, torch.tensor(weights, dtype=torch.float64), silent)
    assert replay.calls(4) == wanted


@pytest.mark.parametrize("weigh_steps", [True, False])
def test_batches_count_by_the_root_of_the_sensitivity_of_their_step(
    monkeypatch: pytest.MonkeyPatch, weigh_steps: bool
) -> None:
    fed = Fed(monkeypatch, tiny_unet(**ONE_BLOCK), config(weigh_steps=weigh_steps))
    sampler = float_sampler()
    weights = weights_of_calls(sampler.run(0, 0, HISTOGRAM_IMAGES).sensitivity)
    assert float(weights.max() / weights.min()) > 10  # else nothing would show
    if not weigh_steps:
        weights = torch.ones(STEPS, dtype=torch.float64)
    # Differences of float32 samples for a probe of 1 %: batches of another size may round otherwise.
    assert fed.trace.step_weights == pytest.approx(weights.tolist(), rel=1e-4)
    roots = weights.sqrt()
    drawn = roots / roots.sum()  # how often each step is, see the next test
    timesteps = sampler.timesteps.tolist()
    for batch in fed.trained:
        step = timesteps.index(float(batch.timestep))
        # The loss of uniform draws weighed by the whole weight, in expectation.
        assert batch.weight == pytest.approx(float(weights[step] / STEPS / drawn[step]), rel=1e-4)
    for batch in fed.held_out:  # spread evenly, so the whole weight is theirs
        step = timesteps.index(float(batch.timestep))
        assert batch.weight == pytest.approx(float(weights[step]), rel=1e-4)
    assert len({float(batch.timestep) for batch in fed.trained}) > 2
    assert {float(batch.timestep) for batch in fed.held_out} == set(timesteps)


def test_cached_steps_are_drawn_by_the_root_of_their_sensitivity(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = 1000
    search = SearchConfig(num_steps=draws, refit_steps=0, batch_size=1, replay=1.0)
    fed = Fed(monkeypatch, tiny_unet(**ONE_BLOCK), config(search=search))
    sampler = float_sampler()
    roots = weights_of_calls(sampler.run(0, 0, HISTOGRAM_IMAGES).sensitivity).sqrt()
    timesteps = [float(batch.timestep) for batch in fed.trained]
    for timestep, share in zip(sampler.timesteps.tolist(), (roots / roots.sum()).tolist(), strict=True):
        # Three standard deviations of a binomial share; without the root, three steps are five off.
        slack = 3 * (share * (1 - share) / draws) ** 0.5
        assert timesteps.count(timestep) / draws == pytest.approx(share, abs=slack)


def test_step_counts_by_all_calls_at_its_timestep() -> None:
    scheduler = HeunDiscreteScheduler()  # of second order: asks twice at all timesteps but the first
    trace = adpdm.quantize(
        tiny_unet(**ONE_BLOCK), config(grouping="dp", num_inference_steps=3), scheduler=scheduler
    ).trace
    sampler = Sampler(tiny_unet(**ONE_BLOCK), scheduler, (1, 8, 8), 3)
    first, *others = weights_of_calls(sampler.run(0, 0, HISTOGRAM_IMAGES).sensitivity).tolist()
    sums = [first, others[0] + others[1], others[2] + others[3]]
    wanted = [3 * of_step / sum(sums) for of_step in sums]
    assert trace.step_weights == pytest.approx(wanted, rel=1e-4)


# ---- steps that count, without a search --------------------------------------------------------------------


def scales(settings: QuantConfig) -> Tensor:
    """Of all quantizers and groups, [Q, G]."""
    unet = tiny_unet(**ONE_BLOCK)
    adpdm.quantize(unet, settings.replace(activation_bits=4), scheduler=ddim_scheduler())
    return torch.stack([x for name, x in unet.state_dict().items() if name.endswith(".scale")])


@pytest.fixture(scope="module")
def scales_per_step() -> Tensor:
    """[Q, T], each by its own step alone."""
    return scales(config(grouping="per_step"))


@pytest.mark.parametrize(
    ("name", "step"), [("fixed_visits", 0), ("fixed_visits", 4), ("weights_of_calls", 0)]
)
def test_one_range_for_all_steps_is_that_of_the_only_step_that_counts(
    monkeypatch: pytest.MonkeyPatch, scales_per_step: Tensor, name: str, step: int
) -> None:
    counts = torch.zeros(STEPS, dtype=torch.float64)
    counts[step] = STEPS
    counted: Any = counts if name == "weights_of_calls" else counts.long().tolist()
    monkeypatch.setattr(calibrate, name, lambda *_: counted)
    got = scales(config(grouping="dp", num_groups=1))
    assert float((scales_per_step[:, 0] / scales_per_step[:, 4] - 1).abs().max()) > 0.5  # one of them differs
    # Ranges are refined in steps of 0.3 %, and the extrema of all steps still trim the outermost bins.
    torch.testing.assert_close(got[:, 0], scales_per_step[:, step], rtol=0.01, atol=0)


# ---- conditions --------------------------------------------------------------------------------------------


def labelled_transformer() -> Any:
    """A denoiser whose predictions show the class."""
    denoiser = tiny_transformer()
    generator = torch.Generator().manual_seed(1)
    for parameter in denoiser.parameters():  # those that start at zero hide it
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return denoiser


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_batches_carry_the_conditions_of_their_own_images(
    monkeypatch: pytest.MonkeyPatch, guidance_scale: float
) -> None:
    labels = {"class_labels": torch.tensor([0, 2, 1, 2, 1])}
    settings = config(guidance_scale=guidance_scale)
    fed = Fed(monkeypatch, labelled_transformer(), settings, conditioning=labels)
    original = labelled_transformer()

    @torch.no_grad()
    def error(batch: Batch) -> float:
        timesteps = batch.timestep.expand(BATCH)
        prediction = original(batch.sample, timesteps, **batch.conditioning).sample
        return float((prediction - batch.target).abs().max())

    batches = [*fed.trained, *fed.held_out]
    assert len(batches) == 28 + 2 + HOLDOUT_BATCHES
    assert max(error(batch) for batch in batches) < 1e-4  # float32 rounding in batches of another size
    swapped = [replace(b, conditioning=pick(b.conditioning, torch.tensor([1, 0]))) for b in batches]
    assert sum(error(batch) > 0.01 for batch in swapped) > len(swapped) / 2  # the rest are pairs of one class
    for batch, prediction in zip(fed.trained, fed.predicted, strict=True):
        assert float((prediction - batch.target).abs().max()) < 1e-4


def test_noise_that_is_added_is_another_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_of(batches: list[Batch]) -> set[float]:
        return {float(batch.target[0, 0, 0, 0]) for batch in batches}

    replayed, selected = (
        Fed(
            monkeypatch,
            tiny_unet(**ONE_BLOCK),
            config(search=SearchConfig(num_steps=8, batch_size=BATCH, objective="noise", replay=replay)),
        )
        for replay in (1.0, 0.0)
    )
    assert len(first_of(replayed.trained)) == len(replayed.trained)
    held_out = first_of(replayed.held_out)
    assert len(held_out) == STEPS  # 16 batches, at the same step the same
    assert not held_out & first_of(replayed.trained)
    noises = first_of(selected.trained)  # of few images, which are drawn again
    assert 1 < len(noises) <= SELECTED_IMAGES
    assert not noises & (first_of(replayed.trained) | held_out)


@pytest.mark.parametrize("channels", [1, 3])
def test_added_noise_is_compared_with_noise_where_variances_are_predicted_too(
    monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    shapes: list[tuple[Any, Any]] = []

    @torch.no_grad()
    def keep(search: GroupSearch, batch: Batch) -> float:
        shapes.append((search.predict(batch).shape, batch.target.shape))
        return 0.0

    monkeypatch.setattr(GroupSearch, "train_step", keep)
    scheduler = DDPMScheduler(variance_type="learned_range")
    unet = tiny_unet(**ONE_BLOCK, in_channels=channels, out_channels=2 * channels)
    search = SearchConfig(num_steps=4, refit_steps=0, batch_size=BATCH, objective="noise")
    adpdm.quantize(unet, config(search=search), scheduler=scheduler)
    assert shapes
    assert all(got == wanted == (BATCH, channels, 8, 8) for got, wanted in shapes)
    shapes.clear()
    unet = tiny_unet(**ONE_BLOCK, in_channels=channels, out_channels=2 * channels)
    adpdm.quantize(unet, config(search=replace(search, objective="teacher")), scheduler=scheduler)
    assert all(got == wanted == (BATCH, 2 * channels, 8, 8) for got, wanted in shapes)


# ---- judging -----------------------------------------------------------------------------------------------


@torch.no_grad()
def error_of_held_out(denoiser: Any, is_corrected: bool) -> float:
    """Squared error of the final held-out images of a quantized denoiser in fake mode, as their mean PSNR."""
    scheduler, first = ddim_scheduler(), HISTOGRAM_IMAGES + SELECTED_IMAGES
    exact, quantized = float_sampler(), Sampler(denoiser, scheduler, (1, 8, 8), STEPS)
    step = denoiser.get_submodule("adpdm_step")
    assert isinstance(step, StepState)
    if is_corrected:
        cached = exact.run(0, 0, HISTOGRAM_IMAGES)
        step.set_correction(fit_correction(quantized, cached, lambda done, total: None).weights)
        attach_correction(denoiser)
    made = quantized.run(0, first, BATCH).final
    detach_correction(denoiser)
    step.set_correction(None)
    errors = (made - exact.run(0, first, BATCH).final).square().mean((1, 2, 3))
    assert float(errors.max() / errors.min()) > 1.1  # else any mean would do
    return float(errors.log().mean().exp())


@pytest.mark.parametrize("is_corrected", [True, False])
def test_search_is_judged_under_the_correction_that_is_in_use(
    monkeypatch: pytest.MonkeyPatch, is_corrected: bool
) -> None:
    short = SearchConfig(num_steps=4, refit_steps=2, batch_size=BATCH)
    wanted: list[float] = []
    others: list[float] = []
    plain = SearchRun._sample_error

    def watched(search: SearchRun) -> float:
        wanted.append(error_of_held_out(search.sampler.denoiser, is_corrected))
        others.append(error_of_held_out(search.sampler.denoiser, not is_corrected))
        return plain(search)

    monkeypatch.setattr(SearchRun, "_sample_error", watched)
    # A random model errs without a pattern, so that a correction hardly ever pays: here it is always taken.
    monkeypatch.setattr(correction, "MIN_GAIN", -math.inf)
    settings = config(activation_bits=4, correct_prediction=is_corrected, search=short)
    outcome = adpdm.quantize(tiny_unet(**ONE_BLOCK), settings, scheduler=ddim_scheduler()).trace.outcome
    assert outcome is not None
    assert [outcome.start_error, outcome.hard_error] == pytest.approx(wanted, rel=1e-5)
    assert all(abs(a / b - 1) > 0.01 for a, b in zip(wanted, others, strict=True))
