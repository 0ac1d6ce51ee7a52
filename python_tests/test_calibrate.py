"""Calibration: what the search is fed and what is recorded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adpdm
from adpdm import QuantConfig, SearchConfig, calibrate, pipeline, reference
from adpdm.bias import BIAS_STEPS
from adpdm.calibrate import Calibration
from adpdm.nn import QuantLayer
from adpdm.pipeline import QuantizationReport
from adpdm.processes import ALONE
from adpdm.quantizers.activation import Mode
from adpdm.replay import Replay
from adpdm.search import Batch, GroupSearch, SearchOutcome
from adpdm.search_run import SearchRun
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_unet
from adpdm.timesteps import mmd_trace
from adpdm.trajectory import Sampler, run_in_units

STEPS, HISTOGRAM_IMAGES, SELECTED_IMAGES = 5, 3, 10


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
            tiny_unet(**ONE_BLOCK), settings, scheduler=ddim_scheduler()
        )


def step_of(batch: Batch) -> int:
    """The step of a batch by its timestep, noisiest first."""
    return ddim_timesteps().index(float(batch.timestep))


def ddim_timesteps() -> list[float]:
    scheduler = ddim_scheduler()
    scheduler.set_timesteps(STEPS)
    return [float(t) for t in scheduler.timesteps]


def float_trajectory(images: int) -> tuple[Tensor, Tensor, Sampler]:
    """Inputs and noise predictions [T, images, 1, 8, 8] of the plain float model, one image at a time."""
    unet = tiny_unet(**ONE_BLOCK).to(memory_format=torch.channels_last)
    sampler = Sampler(unet, ddim_scheduler(), (1, 8, 8), STEPS)
    runs = [sampler.run(0, i, 1) for i in range(images)]
    return torch.cat([r.samples for r in runs], 1), torch.cat([r.noise_preds for r in runs], 1), sampler


def test_search_sees_inputs_of_the_sampler_at_their_own_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    # Known defect elsewhere: calibration images clamped to [0, 1] and re-noised out of distribution.
    recorded = Recorded(monkeypatch, config())
    samples, preds, _ = float_trajectory(HISTOGRAM_IMAGES + SELECTED_IMAGES)
    assert len(recorded.batches) == 9 + 2
    for batch in recorded.batches:
        assert batch.sample.shape == (2, 1, 8, 8)
        known, wanted = samples[step_of(batch)], preds[step_of(batch)]
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
            distance = (samples[step_of(batch)] - batch.sample[0]).abs().amax((1, 2, 3))
            is_cached = int(distance.argmin()) < HISTOGRAM_IMAGES
            assert is_cached == (replay == 1.0)
            assert is_cached or step_of(batch) in chosen


def test_noise_objective_trains_on_the_noise_that_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    search = SearchConfig(num_steps=6, refit_steps=0, batch_size=2, objective="noise")
    recorded = Recorded(monkeypatch, config(search=search))
    scheduler = ddim_scheduler()
    unet = tiny_unet(**ONE_BLOCK)
    # Those of the histograms, those that the rounds select, and those that judge the search.
    images = range(HISTOGRAM_IMAGES + SELECTED_IMAGES + search.batch_size)
    finals = [Sampler(unet, scheduler, (1, 8, 8), STEPS).run(0, i, 1).final for i in images]
    cached = torch.cat(finals)
    for batch in recorded.batches:
        alpha = scheduler.alphas_cumprod[int(batch.timestep)]
        image = (batch.sample - (1 - alpha).sqrt() * batch.target) / alpha.sqrt()
        distance = (cached - image[0]).abs().amax((1, 2, 3)).min()
        assert distance < 1e-4 / float(alpha.sqrt())
    assert len({float(b.target.sum()) for b in recorded.batches}) == len(recorded.batches)


def test_trace_tells_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config()
    report = Recorded(monkeypatch, settings).report
    trace = report.trace
    quantizers = sum(2 if x.split else 1 for x in report.layers if x.bits)
    assert trace.histogram_bytes == quantizers * STEPS * reference.HISTOGRAM_BINS * 8
    assert trace.trajectory_bytes == 2 * STEPS * HISTOGRAM_IMAGES * 64 * 4
    phases = ["trajectories", "partition", "weights", "raised layers", "bias correction", "search"]
    assert list(trace.seconds) == [*phases, "correction"]
    assert [row["round"] for row in trace.rounds] == [0, 1, 2]
    assert sum(trace.visits) == 3
    assert all(trace.visits[row["step_index"]] for row in trace.rounds)
    assert len(trace.losses) == 9 + 2
    assert all(math.isfinite(loss) for loss in trace.losses)
    samples, _, _ = float_trajectory(HISTOGRAM_IMAGES)
    wanted = mmd_trace(samples, [row["step_index"] for row in trace.rounds])
    assert trace.mmd == pytest.approx(wanted, abs=1e-4)
    assert list(trace.group_gain) == [row["name"] for row in trace.quantizers]
    gains = [(row["gain_db"], row["limit_db"]) for row in trace.group_gain.values()]
    assert all(-1e-9 <= gain < limit + 1e-9 for gain, limit in gains), gains  # 0: steps in the middle differ
    assert sum(gain > 0.05 for gain, _ in gains) > len(gains) / 2
    assert len(trace.quantizers) == quantizers
    for row in trace.quantizers:
        assert len(row["observed"]) == len(row["group_index"]) == STEPS
        assert set(row["group_index"]) <= {0, 1}
        assert all(low <= high for low, high in row["observed"])
        assert all(low <= 0 <= high for low, high in row["covered"])


def test_observed_ranges_are_those_of_the_float_model(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Recorded(monkeypatch, config(grouping="dp", histogram_images=2)).report
    row = next(r for r in report.trace.quantizers if r["name"] == "mid_block.resnets.0.conv1")
    unet = tiny_unet(**ONE_BLOCK)
    seen: list[Tensor] = []
    unet.mid_block.resnets[0].conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sampler = Sampler(unet, ddim_scheduler(), (1, 8, 8), STEPS)
    for image in range(2):
        sampler.run(0, image, 1)
    for k in range(STEPS):
        both = torch.cat([seen[k], seen[STEPS + k]])
        assert row["observed"][k] == pytest.approx([float(both.min()), float(both.max())], abs=1e-4)


def test_shared_ranges_gain_nothing_and_those_per_step_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Recorded(monkeypatch, config(grouping="shared")).report.trace
    assert all(row["gain_db"] == 0 < row["limit_db"] for row in shared.group_gain.values())
    per_step = Recorded(monkeypatch, config(grouping="per_step")).report.trace
    median, _, limit = per_step.summarize_gain()
    assert median == pytest.approx(limit, rel=1e-9)
    assert limit > 0


def test_histograms_are_gone_while_the_search_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, held = calibrate.correct_bias, []

    def watched(replay: Replay, settings: QuantConfig) -> None:
        quantizers = [q for layer in replay.layers.values() for q in layer.quantizers]
        held.extend(q.counts for q in quantizers)
        assert all(q.extrema is not None for q in quantizers)
        plain(replay, settings)

    monkeypatch.setattr(calibrate, "correct_bias", watched)
    settings = config(grouping="dp", weight_bits=4, activation_bits=4)  # layers are raised before
    adpdm.quantize(tiny_unet(**ONE_BLOCK), settings, scheduler=ddim_scheduler())
    assert held
    assert all(counts is None for counts in held)


def test_undecided_search_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Recorded(monkeypatch, config()).report.trace  # nine steps decide nothing
    assert trace.outcome is not None
    assert trace.outcome.max_importance < 0.9
    assert trace.warnings[-1] == (
        f"the search ended undecided: mean largest importance weight {trace.outcome.max_importance:.2f}, "
        "wanted at least 0.9; more search steps or a larger entropy_weight harden it"
    )


def test_outcome_gap_is_the_ratio_of_losses_in_db() -> None:
    def gap(soft: float, hard: float) -> float:
        return SearchOutcome(2e-3, soft, hard, 1e-2, 1e-3, 0.95, is_kept=True, moved=0.0).gap_db

    assert gap(1e-3, 2e-3) == pytest.approx(10 * math.log10(2))
    assert gap(1e-3, 1e-4) == pytest.approx(-10)


def test_one_group_needs_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, config(num_groups=1))
    assert recorded.batches == []
    assert recorded.report.trace.outcome is None
    (warning,) = recorded.report.trace.warnings
    assert warning == "grouping 'search' wanted at least 2 groups, got num_groups=1: nothing was searched"


def test_one_group_is_the_same_model_with_and_without_the_word_search() -> None:
    # By the visits of a selection as well, which decide without a search which steps a range suits.
    models = []
    for grouping in ("search", "dp"):
        models.append(tiny_unet(**ONE_BLOCK))
        settings = config(num_groups=1, grouping=grouping, selection="random", activation_bits=4)
        trace = adpdm.quantize(models[-1], settings, scheduler=ddim_scheduler()).trace
        assert sum(trace.visits) == 3
        assert max(trace.visits) < 3  # of three rounds; else every selection would do
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in second)


@pytest.mark.parametrize("changes", [{"grouping": "dp"}, {"num_groups": 1}])
def test_without_a_search_nobody_asks_what_a_state_belongs_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any]
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("hashed the model")

    monkeypatch.setattr(pipeline, "asked_for", refuse)
    state = tmp_path / "state.safetensors"
    adpdm.quantize(tiny_unet(**ONE_BLOCK), config(**changes), scheduler=ddim_scheduler(), state_file=state)
    assert not state.exists()


@pytest.mark.parametrize(
    "changes",
    [{"num_inference_steps": 1, "num_groups": 1}, {"num_inference_steps": 2}, {"calibration_images": 1}],
)
def test_few_steps_and_images_are_enough(monkeypatch: pytest.MonkeyPatch, changes: dict[str, int]) -> None:
    # Known defect elsewhere: crash for T <= 30.
    recorded = Recorded(monkeypatch, config(**changes))
    assert sum(recorded.report.trace.visits) >= 1


def test_images_come_in_units_and_their_order() -> None:
    sampler = Sampler(tiny_unet(**ONE_BLOCK), ddim_scheduler(), (1, 8, 8), STEPS)
    seen: list[tuple[int, int, int]] = []
    made = run_in_units(
        sampler, ALONE, 3, range(5, 12), 4, stop=2, on_step=lambda *progress: seen.append(progress)
    )
    units = [sampler.run(3, 5, 4, stop=2), sampler.run(3, 9, 3, stop=2)]
    assert torch.equal(made.samples, torch.cat([u.samples for u in units], 1))
    assert torch.equal(made.noise_preds, torch.cat([u.noise_preds for u in units], 1))
    assert torch.equal(made.final, torch.cat([u.final for u in units]))
    assert torch.equal(made.sensitivity, (4 * units[0].sensitivity + 3 * units[1].sensitivity) / 7)
    calls = [(i, 4 * i) for i in range(4)] + [(i, 12 + 3 * i) for i in range(4)]
    assert seen == [(i, done, 21) for i, done in calls]


# ---- the search against its start --------------------------------------------------------------------------


def state_without_search(monkeypatch: pytest.MonkeyPatch, settings: QuantConfig) -> dict[str, Tensor]:
    """The quantized model that the dynamic-programming partition alone gives."""
    unet = tiny_unet(**ONE_BLOCK)
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "_search", lambda calibration, saved: None)
        adpdm.quantize(unet, settings, scheduler=ddim_scheduler())
    return dict(unet.state_dict())


@pytest.mark.parametrize("shared", [False, True])
def test_search_that_made_it_worse_is_put_back(monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    reckless = SearchConfig(num_steps=9, refit_steps=2, batch_size=2, learning_rate=1.0)
    settings = config(search=reckless, shared_groups=shared)
    unet = tiny_unet(**ONE_BLOCK)
    trace = adpdm.quantize(unet, settings, scheduler=ddim_scheduler()).trace
    assert trace.outcome is not None
    assert trace.outcome.hard_loss > trace.outcome.start_loss
    assert not trace.outcome.is_kept
    assert trace.warnings[0] == (
        f"the search ended with a held-out loss of {trace.outcome.hard_loss:.3g}, from "
        f"{trace.outcome.start_loss:.3g}, and {trace.outcome.sample_gain_db:+.2f} dB on held-out samples, "
        "against the dynamic-programming partition it started from, which is used; try more search steps"
    )
    got, wanted = unet.state_dict(), state_without_search(monkeypatch, settings)
    assert sorted(got) == sorted(wanted)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)  # tables, scales, biases


def test_search_that_made_it_worse_is_kept_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    reckless = SearchConfig(num_steps=9, refit_steps=2, batch_size=2, learning_rate=1.0, keep_if_worse=True)
    settings = config(search=reckless)
    unet = tiny_unet(**ONE_BLOCK)
    trace = adpdm.quantize(unet, settings, scheduler=ddim_scheduler()).trace
    assert trace.outcome is not None
    assert trace.outcome.hard_loss > trace.outcome.start_loss
    assert trace.outcome.is_kept
    assert "is kept all the same" in trace.warnings[0]
    got, start = unet.state_dict(), state_without_search(monkeypatch, settings)
    assert not any(torch.equal(got[key], start[key]) for key in start if key.endswith(".scale"))


def test_search_with_a_smaller_loss_but_worse_samples_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([1e-3, 2e-3])  # of the start, after the search
    monkeypatch.setattr(SearchRun, "_sample_error", lambda search: next(errors))
    search = SearchConfig(num_steps=60, refit_steps=20, batch_size=4)
    settings = config(search=search, activation_bits=4, range_method="mse")  # leaves the search something
    unet = tiny_unet(**ONE_BLOCK)
    trace = adpdm.quantize(unet, settings, scheduler=ddim_scheduler()).trace
    assert trace.outcome is not None
    assert trace.outcome.hard_loss <= trace.outcome.start_loss
    assert not trace.outcome.is_kept
    assert trace.outcome.sample_gain_db == pytest.approx(-3.01, abs=0.01)
    got, wanted = unet.state_dict(), state_without_search(monkeypatch, settings)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_sample_error_is_that_of_the_images_that_nothing_was_fitted_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors: list[float] = []
    plain = SearchRun._sample_error

    def watched(search: SearchRun) -> float:
        errors.append(plain(search))
        return errors[-1]

    monkeypatch.setattr(SearchRun, "_sample_error", watched)
    settings = config()
    outcome = Recorded(monkeypatch, settings).report.trace.outcome
    assert outcome is not None
    assert [outcome.start_error, outcome.hard_error] == errors
    assert all(0 < error < 0.5 for error in errors)


def test_search_that_helps_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([2e-3, 1e-3])  # no search of seconds makes better samples of a random model for certain
    monkeypatch.setattr(SearchRun, "_sample_error", lambda search: next(errors))
    search = SearchConfig(num_steps=60, refit_steps=20, batch_size=4)
    settings = config(search=search, activation_bits=4, range_method="mse")  # leaves the search something
    unet = tiny_unet(**ONE_BLOCK)
    trace = adpdm.quantize(unet, settings, scheduler=ddim_scheduler()).trace
    assert trace.outcome is not None
    assert trace.outcome.is_kept
    assert trace.outcome.hard_loss <= trace.outcome.start_loss
    assert not any("dynamic-programming partition" in warning for warning in trace.warnings)
    got, start = unet.state_dict(), state_without_search(monkeypatch, settings)
    scales = [key for key in start if key.endswith(".scale")]
    assert scales
    assert not any(torch.equal(got[key], start[key]) for key in scales)


def test_held_out_images_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out: list[Batch] = []
    plain = SearchRun._held_out

    def watched(search: SearchRun) -> list[Batch]:
        held_out.extend(plain(search))
        return held_out

    monkeypatch.setattr(SearchRun, "_held_out", watched)
    trained = Recorded(monkeypatch, config()).batches
    images = HISTOGRAM_IMAGES + SELECTED_IMAGES
    samples, preds, _ = float_trajectory(images + 2)
    assert {step_of(batch) for batch in held_out} == set(range(STEPS))
    for batch in held_out:
        # The two images after all others, up to rounding in batches of another size.
        assert float((batch.sample - samples[step_of(batch), images:]).abs().max()) < 1e-4
        assert float((batch.target - preds[step_of(batch), images:]).abs().max()) < 1e-4
    for batch in trained:
        for sample in batch.sample:
            assert float((samples[step_of(batch), images:] - sample).abs().amax((1, 2, 3)).min()) > 0.1


# ---- bias correction ---------------------------------------------------------------------------------------


def float_inputs(replay: Replay, calls: list[int]) -> dict[str, list[tuple[int, Tensor]]]:
    """Step index and full-precision input of every layer at every call."""
    inputs: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in replay.layers}

    def keep(name: str, call: int) -> Any:
        return lambda x: inputs[name].append((replay.sampler.step_of_call[call], x))

    for call in calls:
        replay.show({name: keep(name, call) for name in replay.layers}, call)
    return inputs


def mean_errors(layer: QuantLayer, inputs: list[tuple[int, Tensor]]) -> Tensor:
    """Mean per channel of fake-quantized minus float output over inputs, [O] f64."""
    errors = []
    for step_index, x in inputs:
        layer.quantizers[0].step.set_step(step_index)
        layer.set_mode(Mode.FLOAT)
        exact = layer(x)
        layer.set_mode(Mode.FAKE)
        error = (layer(x) - exact).double().movedim(layer.channel_dim, 0)
        errors.append(error.flatten(1).mean(1))
    layer.set_mode(Mode.FLOAT)
    return torch.stack(errors).mean(0)


def test_bias_correction_leaves_no_mean_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = calibrate.correct_bias, 0

    @torch.no_grad()
    def checked(replay: Replay, settings: QuantConfig) -> None:
        nonlocal seen
        calls = replay.calls(BIAS_STEPS)
        replay.set_mode(Mode.FLOAT)
        teacher = [replay.predict(*replay.input(call)) for call in calls]
        inputs = float_inputs(replay, calls)
        before = {n: mean_errors(layer, inputs[n]) for n, layer in replay.layers.items()}
        plain(replay, settings)
        assert all(q.mode is Mode.FAKE for layer in replay.layers.values() for q in layer.quantizers)
        # The shift leaves the full-precision path alone, bit for bit.
        replay.set_mode(Mode.FLOAT)
        for call, wanted in zip(calls, teacher, strict=True):
            assert torch.equal(replay.predict(*replay.input(call)), wanted)
        for name, layer in replay.layers.items():
            size = float(torch.cat([layer(x).flatten() for _, x in inputs[name]]).abs().max())
            # The shift, its sum with the bias and the output are rounded to float32: a few times 2^-24 of
            # their size each. Means over hundreds of outputs do not add to it.
            assert float(mean_errors(layer, inputs[name]).abs().max()) < 8 * 2.0**-24 * size
            assert float(before[name].abs().max()) > 1e-4 * size
            seen += 1
        replay.set_mode(Mode.FAKE)

    monkeypatch.setattr(calibrate, "correct_bias", checked)
    settings = config(grouping="dp", weight_bits=4, activation_bits=4)
    report = adpdm.quantize(tiny_unet(**ONE_BLOCK), settings, scheduler=ddim_scheduler())
    assert seen == sum(1 for x in report.layers if x.bits) > 0


def test_selected_targets_are_those_of_the_original_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # Made in the midst of the search, when every layer has a shift and a fake-quantized weight.
    original = tiny_unet(**ONE_BLOCK).to(memory_format=torch.channels_last)
    plain, shifted = SearchRun._generate, []

    def checked(search: SearchRun, step_index: int, round_index: int) -> Batch:
        batch = plain(search, step_index, round_index)
        shifted.extend(layer.bias_shift for layer in search.replay.layers.values())
        with torch.no_grad():
            assert torch.equal(original(batch.sample, batch.timestep).sample, batch.target)
        return batch

    monkeypatch.setattr(SearchRun, "_generate", checked)
    adpdm.quantize(tiny_unet(**ONE_BLOCK), config(), scheduler=ddim_scheduler())
    assert shifted
    assert all(shift is not None and bool(shift.any()) for shift in shifted)


@pytest.mark.parametrize("correct_bias", [False, True])
def test_bias_is_corrected_only_when_asked(correct_bias: bool) -> None:
    original, unet = tiny_unet(**ONE_BLOCK), tiny_unet(**ONE_BLOCK)
    settings = config(grouping="dp", correct_bias=correct_bias)
    report = adpdm.quantize(unet, settings, scheduler=ddim_scheduler())
    names = [x.name for x in report.layers if x.bits]
    pairs = [(original.get_submodule(n).bias, unet.get_submodule(n).bias) for n in names]
    assert pairs
    assert all(torch.equal(a, b) != correct_bias for a, b in pairs)


def test_layer_that_runs_twice_gets_the_mean_shift_not_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_unet(**ONE_BLOCK)
    unet.mid_block.resnets[1] = unet.mid_block.resnets[0]
    bias = unet.mid_block.resnets[0].conv1.bias.detach().clone()
    shifts: list[Tensor] = []
    plain = QuantLayer.output_shift

    def watched(layer: QuantLayer, x: Tensor) -> Tensor:
        shift = plain(layer, x)
        if layer.bias is not None and torch.equal(layer.bias, bias):
            shifts.append(shift)
        return shift

    monkeypatch.setattr(QuantLayer, "output_shift", watched)
    adpdm.quantize(unet, config(grouping="dp"), scheduler=ddim_scheduler())
    assert len(shifts) == 2 * BIAS_STEPS
    wanted = bias + torch.stack(shifts).mean(0).float()
    assert torch.equal(unet.mid_block.resnets[0].conv1.bias, wanted)
