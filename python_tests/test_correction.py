"""Correction of predictions: what it finds, where it acts, and that it is saved, undone and refused whole."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.prior_transformer import PriorTransformerOutput
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adpdm
from adpdm import QuantConfig
from adpdm.correction import Correction, _Correct, correct, corrected, fit_correction
from adpdm.graph import capture
from adpdm.step import StepState, attach_step_hook
from adpdm.testing import ddim_scheduler, tiny_conditional_unet, tiny_transformer, tiny_unet
from adpdm.trajectory import Guidance, Sampler, prediction_of

STEPS = 4
WEIGHTS = "diffusion_pytorch_model.safetensors"
LABELS = {"class_labels": torch.tensor([0, 1, 2])}


def corrections(model: Any) -> list[Any]:
    """The hooks that correct predictions."""
    return [hook for hook in model._forward_hooks.values() if isinstance(hook, _Correct)]


def config(**changes: Any) -> QuantConfig:
    coarse = {"weight_bits": 4, "activation_bits": 3, "num_groups": 2, "raised_layers": 0.0}
    settings: dict[str, Any] = {"grouping": "uniform", "num_inference_steps": STEPS, "histogram_images": 4}
    return QuantConfig(**{**settings, **coarse, **changes})


def quantized(**changes: Any) -> tuple[Any, adpdm.QuantizationReport]:
    model = tiny_transformer()
    report = adpdm.quantize(model, config(**changes), scheduler=ddim_scheduler(), conditioning=LABELS)
    return model, report


@pytest.fixture(scope="module")
def steady() -> Any:
    """A denoiser whose correction is made up, as random layers err without a pattern; not to be changed."""
    made_up = Correction(torch.linspace(-0.3, 0.4, 2 * STEPS).view(STEPS, 2), [0.5] * STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adpdm.pipeline, "fit_correction", lambda *_: made_up)
        return quantized()[0]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def predict(model: Any, timestep: int, **kwargs: Any) -> Any:
    return model(
        noise(2, 1, 8, 8), timestep=torch.tensor([timestep] * 2), class_labels=torch.tensor([0, 2]), **kwargs
    )


# ---- what is found -----------------------------------------------------------------------------------------


class Distorted(nn.Module):
    """Predictions of which known shares, of themselves and of the sample, are error."""

    def __init__(self, exact: Any, shares: dict[int, tuple[float, float]]) -> None:
        super().__init__()
        self.exact, self.shares = exact, shares

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        along_prediction, along_sample = self.shares[int(timestep[0])]
        exact = self.exact(sample, timestep).sample
        return UNet2DOutput(sample=(exact + along_sample * sample) / (1 - along_prediction))


@torch.no_grad()
def test_known_shares_are_found_at_every_step() -> None:
    exact = tiny_unet()
    sampler = Sampler(exact, ddim_scheduler(), (1, 8, 8), STEPS)
    wanted = torch.tensor([[0.1, -0.1], [0.05, 0.0], [0.0, 0.03], [-0.2, 0.0]])
    shares = dict(zip([int(t) for t in sampler.calls], wanted.tolist(), strict=True))
    trajectory = sampler.run(0, 0, 3)
    sampler.denoiser = Distorted(exact, shares)  # type: ignore[assignment]
    seen: list[tuple[int, int]] = []
    found = fit_correction(sampler, trajectory, lambda done, total: seen.append((done, total)))
    assert torch.allclose(found.weights, torch.tensor([1.0, 0.0]) - wanted, atol=1e-4)
    assert max(found.energy_left) < 1e-6
    assert seen == [(i + 1, STEPS) for i in range(STEPS)]


@torch.no_grad()
def test_exact_predictions_and_proportional_ones_are_left_alone() -> None:
    sampler = Sampler(tiny_unet(), ddim_scheduler(), (1, 8, 8), STEPS)
    trajectory = sampler.run(0, 0, 2)
    assert fit_correction(sampler, trajectory, lambda *_: None).weights.tolist() == [[1.0, 0.0]] * STEPS
    # Predictions that are the sample, but for their size: their moments have no inverse.
    same = replace(trajectory, noise_preds=trajectory.samples)
    half = {int(t): (0.5, 0.0) for t in sampler.calls}
    sampler.denoiser = Distorted(lambda sample, _: UNet2DOutput(sample=sample), half)  # type: ignore[assignment]
    found = fit_correction(sampler, same, lambda *_: None)
    assert found.weights.isfinite().all()
    assert max(found.energy_left) < 1e-6


@torch.no_grad()
def test_what_does_not_help_other_images_is_left_out() -> None:
    """Errors without a pattern: least squares always finds some, which new images do not have."""
    exact = tiny_unet()
    sampler = Sampler(exact, ddim_scheduler(), (1, 8, 8), STEPS)
    trajectory = sampler.run(0, 0, 4)
    errors = 0.1 * noise(*trajectory.samples.shape)
    noisy = replace(trajectory, noise_preds=trajectory.noise_preds + errors)
    found = fit_correction(sampler, noisy, lambda *_: None)
    rows = list(zip(found.weights.tolist(), found.energy_left, strict=True))
    assert any(left == 1.0 for _, left in rows)
    assert all((weights == [1.0, 0.0]) == (left == 1.0) for weights, left in rows)
    alone = replace(trajectory, **{k: getattr(noisy, k)[:, :1] for k in ("samples", "noise_preds")})
    found = fit_correction(sampler, alone, lambda *_: None)  # no other image says anything
    assert found.weights.tolist() == [[1.0, 0.0]] * STEPS


@torch.no_grad()
def test_the_two_rows_of_a_guided_image_say_nothing_of_each_other() -> None:
    exact = tiny_conditional_unet()
    texts = {"encoder_hidden_states": noise(2, 3, 8)}
    none = Guidance(3.0, {"encoder_hidden_states": torch.zeros(1, 3, 8)})
    sampler = Sampler(exact, ddim_scheduler(), (4, 8, 8), STEPS, texts, None, none)
    for images, is_known in ((1, False), (2, True)):
        trajectory = sampler.run(0, 0, images)
        halved = replace(trajectory, noise_preds=trajectory.noise_preds / 2)
        found = fit_correction(sampler, halved, lambda *_: None)
        assert all((left < 1) == is_known for left in found.energy_left)


def test_what_pays_at_no_step_is_left_away() -> None:
    model, report = quantized(weight_bits=8, activation_bits=8)
    assert report.trace.correction == {"weights": [[1.0, 0.0]] * STEPS, "energy_left": [1.0] * STEPS}
    assert report.trace.seconds["correction"] > 0
    assert model.adpdm_step.correction is None
    assert not corrections(model)


# ---- where it acts -----------------------------------------------------------------------------------------


def test_correct_weighs_prediction_and_sample() -> None:
    prediction, sample = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    weights = torch.tensor([0.75, 0.5])
    assert torch.allclose(correct(prediction, sample, weights), 0.75 * prediction + 0.5 * sample)
    packed = correct(
        prediction.flatten(2), sample.flatten(2), weights
    )  # as transformers over latents give it
    assert torch.equal(packed, correct(prediction, sample, weights).flatten(2))


def test_learned_variances_stay_as_they_are() -> None:
    both, sample, weights = noise(2, 6, 4, 4), noise(2, 3, 4, 4, seed=1), torch.tensor([0.75, 0.5])
    got = correct(both, sample, weights)
    assert torch.equal(got[:, 3:], both[:, 3:])
    assert torch.equal(got[:, :3], correct(both[:, :3], sample, weights))


def test_half_precision_is_corrected_in_float32() -> None:
    """Rounded once, at the end."""
    sample = noise(2, 3, 4, 4)
    prediction = (sample * (1 + 2**-7)).bfloat16()
    weights = torch.tensor([0.3, 0.7])
    got = correct(prediction, sample.bfloat16(), weights)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, correct(prediction.float(), sample.bfloat16().float(), weights).bfloat16())


def test_every_form_of_output_is_corrected(steady: Any) -> None:
    wanted = predict(steady, 500).sample
    as_tuple = predict(steady, 500, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], wanted)
    by_name = steady(
        hidden_states=noise(2, 1, 8, 8), timestep=torch.tensor([500] * 2), class_labels=torch.tensor([0, 2])
    )
    assert isinstance(by_name, Transformer2DModelOutput)
    assert torch.equal(by_name.sample, wanted)
    assert by_name["sample"] is by_name.sample


def test_outputs_of_another_name_are_corrected() -> None:
    class Prior(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Any) -> PriorTransformerOutput:
            return PriorTransformerOutput(predicted_image_embedding=2 * hidden_states)

    model, state = Prior(), StepState(1, 1)
    state.set_correction(torch.tensor([[0.5, 1.0]]))
    model.add_module("adpdm_step", state)
    adpdm.correction.attach_correction(model)
    state.set_step(0)
    x = noise(2, 3)
    output = model(x, 9)
    assert torch.equal(output.predicted_image_embedding, 2 * x)
    assert torch.equal(prediction_of(output), 2 * x)


def test_bare_tensors_are_corrected() -> None:
    class Bare(nn.Module):
        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            return 2 * sample

    model, state = Bare(), StepState(1, 2)
    state.set_timesteps(torch.tensor([9.0, 1.0]))
    state.set_correction(torch.tensor([[0.5, 0.0], [0.0, 1.0]]))
    model.add_module("adpdm_step", state)
    attach_step_hook(model)
    adpdm.correction.attach_correction(model)
    x = noise(2, 3)
    assert torch.equal(model(x, 9), x)
    assert torch.equal(model(x, 2), x)  # nearest is 1, where the sample is all
    state.set_correction(torch.tensor([[0.5, 0.0], [0.0, 2.0]]))
    assert torch.equal(model(x, 0), 2 * x)
    state.set_correction(torch.tensor([[1.0, 0.0], [1.0, 1e-6]]))
    x[0, 0] = torch.inf  # times 0 it would be NaN
    assert torch.equal(model(x, 9), 2 * x)
    assert torch.equal(model(x, 0)[1], 2 * x[1] + 1e-6 * x[1])


def test_captured_and_compiled_predictions_are_corrected(steady: Any) -> None:
    wanted = [predict(steady, t).sample for t in (900, 10)]
    graphed = copy.deepcopy(steady)
    capture(graphed)
    assert all(torch.equal(predict(graphed, t).sample, w) for t, w in zip((900, 10), wanted, strict=True))
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(steady), fullgraph=True, backend="eager")
    assert all(torch.equal(predict(compiled, t).sample, w) for t, w in zip((900, 10), wanted, strict=True))


def test_a_correction_for_a_while_leaves_nothing_behind() -> None:
    model, _ = quantized(correct_prediction=False)
    raw = predict(model, 900).sample
    sampler = Sampler(model, ddim_scheduler(), (1, 8, 8), STEPS, LABELS)
    trajectory = sampler.run(0, 0, 4)
    shifted = replace(trajectory, noise_preds=0.5 * trajectory.noise_preds)  # of which half is error

    def use() -> None:
        with corrected(sampler, shifted) as found:
            assert min(found.energy_left) < 0.1
            assert torch.allclose(predict(model, 900).sample, 0.5 * raw, atol=1e-5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert not corrections(model)
    assert model.adpdm_step.correction is None
    assert torch.equal(predict(model, 900).sample, raw)


# ---- saved, loaded, undone ---------------------------------------------------------------------------------


def test_a_saved_model_keeps_its_correction(steady: Any, tmp_path: Path) -> None:
    steady.save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.adpdm_step.correction, steady.adpdm_step.correction)
    assert torch.equal(predict(loaded, 500).sample, predict(steady, 500).sample)
    half = DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert torch.equal(half.adpdm_step.correction, steady.adpdm_step.correction)


def test_the_clock_keeps_its_correction_in_float32(steady: Any) -> None:
    step = copy.deepcopy(steady.adpdm_step)
    step.to(torch.bfloat16)
    assert torch.equal(step.correction, steady.adpdm_step.correction)
    step.set_step(1)
    assert torch.equal(step.current_correction, steady.adpdm_step.correction[1])


def test_without_the_setting_nothing_is_corrected(steady: Any, tmp_path: Path) -> None:
    plain, report = quantized(correct_prediction=False)
    assert report.trace.correction == {}
    assert not corrections(plain)
    assert plain.adpdm_step.correction is None
    for timestep in (900, 10):
        raw = predict(plain, timestep).sample
        got = predict(steady, timestep).sample
        weights = steady.adpdm_step.current_correction
        assert torch.equal(got, correct(raw, noise(2, 1, 8, 8), weights))
        assert not torch.equal(got, raw)
    plain.save_pretrained(tmp_path)
    assert (
        "corrects_prediction" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    )


def rewrite(folder: Path, drop: str, **changes: Any) -> None:
    """Change keys of the saved quantization_config, None removes; drop one tensor."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"].update(changes)
    path.write_text(json.dumps(values))
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if k != drop}, folder / WEIGHTS, metadata={"format": "pt"})


def test_checkpoints_from_before_load(steady: Any, tmp_path: Path) -> None:
    plain, _ = quantized(correct_prediction=False)
    plain.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    del saved["quant_config"]["correct_prediction"]  # the setting came with the correction
    rewrite(tmp_path, drop="", quant_config=saved["quant_config"])
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.adpdm_step.correction is None
    assert torch.equal(predict(loaded, 500).sample, predict(plain, 500).sample)


def test_broken_checkpoints_are_refused(steady: Any, tmp_path: Path) -> None:
    steady.save_pretrained(tmp_path)
    rewrite(tmp_path, drop="adpdm_step.correction")
    with pytest.raises(ValueError, match=r"missing tensors \['adpdm_step.correction'\]"):
        DiTTransformer2DModel.from_pretrained(tmp_path)
    rewrite(tmp_path, drop="", corrects_prediction="yes")
    with pytest.raises(ValueError, match="corrects_prediction must be true or false, got 'yes'"):
        DiTTransformer2DModel.from_pretrained(tmp_path)


def test_dequantize_takes_it_away(steady: Any) -> None:
    model = copy.deepcopy(steady)
    model.dequantize()
    assert not corrections(model)
    assert not model._forward_pre_hooks


def test_an_interrupt_leaves_no_hooks() -> None:
    model = tiny_transformer()
    wanted = predict(model, 500).sample

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "correction" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adpdm.quantize(model, config(), scheduler=ddim_scheduler(), conditioning=LABELS, progress=interrupt)
    assert not corrections(model)
    assert not model._forward_pre_hooks
    assert torch.equal(predict(model, 500).sample, wanted)
