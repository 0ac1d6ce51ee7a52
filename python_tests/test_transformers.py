"""Transformers and SDXL: what their pipelines pass, what is quantized, and the same samples after loading."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformer_cases import CASES, STEPS, flux, make_case, noise

import adpdm
from adpdm import AdpdmConfig, QuantConfig, SearchConfig
from adpdm.evaluate import EvaluationConfig, compare, generate, image_seeds
from adpdm.nn import LoadedLayer, quant_layers
from adpdm.testing import tiny_conditional_unet
from adpdm.trajectory import Sampler, pick

# Share of multiply-accumulates that became integer, at least; the tiny widths leave more to embeddings and
# to input and output layers than real ones do.
COVERED = {"dit": 0.75, "pixart": 0.85, "sd3": 0.85, "flux": 0.75, "sdxl": 0.9}
# Never integer, by what they do: input, output, and what sees one value per timestep.
KEPT = {
    "dit": ("pos_embed.proj", "proj_out_1", "proj_out_2", "transformer_blocks.0.norm1.linear"),
    "pixart": ("pos_embed.proj", "proj_out", "adaln_single.linear"),
    "sd3": ("pos_embed.proj", "proj_out", "time_text_embed.text_embedder.linear_1", "norm_out.linear"),
    "flux": ("x_embedder", "proj_out", "time_text_embed.guidance_embedder.linear_1", "norm_out.linear"),
    "sdxl": ("conv_in", "conv_out", "add_embedding.linear_1"),
}


@pytest.mark.parametrize("name", CASES)
def test_denoiser_quantizes_samples_and_loads(name: str, tmp_path: Path) -> None:
    case = make_case(name)
    denoiser = case.denoiser
    run = case.sampler(denoiser).run(5, 0, 3)
    settings = QuantConfig(num_groups=2, num_inference_steps=STEPS, histogram_images=3, grouping="dp")
    report = adpdm.quantize(
        denoiser, settings, scheduler=case.scheduler, conditioning=case.conditioning, call=case.call
    )
    assert report.coverage.macs > COVERED[name]
    assert not set(KEPT[name]) & set(quant_layers(denoiser))
    assert all(dict(denoiser.named_modules())[kept] for kept in KEPT[name])
    sampler = case.sampler(denoiser)
    for call, index in enumerate(sampler.step_of_call):
        with torch.no_grad():
            pred = sampler.predict(run.samples[call], sampler.calls[call], run.conditioning)
        assert int(denoiser.adpdm_step.step_index) == index
        wanted = run.noise_preds[call]
        assert pred.shape == wanted.shape
        assert float((pred - wanted).square().mean() / wanted.square().mean()) < 0.02
    denoiser.save_pretrained(tmp_path)
    loaded = type(denoiser).from_pretrained(tmp_path)
    assert torch.equal(case.sampler(loaded).run(5, 0, 2).final, sampler.run(5, 0, 2).final)


@pytest.mark.parametrize("settings", [{}, {"weight_bits": 4, "activation_bits": 8}], ids=["w8", "w4a8"])
@pytest.mark.parametrize("name", CASES)
def test_denoiser_quantizes_while_loading(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    case = make_case(name)
    kind = type(case.denoiser)
    case.denoiser.save_pretrained(tmp_path / "float")
    loaded = kind.from_pretrained(
        tmp_path / "float", quantization_config=AdpdmConfig(**settings), torch_dtype=torch.bfloat16
    )
    for layer, module in case.denoiser.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            assert isinstance(loaded.get_submodule(layer), LoadedLayer)
    loaded.save_pretrained(tmp_path / "quantized")
    again = kind.from_pretrained(tmp_path / "quantized")  # scales are as they were, floats lost some bits
    run, sampler = case.sampler(case.denoiser).run(5, 0, 3), case.sampler(again)
    for call in range(len(sampler.calls)):
        with torch.no_grad():
            pred = sampler.predict(run.samples[call], sampler.calls[call], run.conditioning)
        wanted = run.noise_preds[call]
        bound = 0.001 if not settings else 0.1  # of squared error; 4-bit weights alone are at 20 dB each
        assert float((pred - wanted).square().mean() / wanted.square().mean()) < bound


def test_transformer_without_image_size_needs_the_shape_of_its_samples() -> None:
    message = (
        r"FluxTransformer2DModel.config.sample_size must be set, .*; or say call=DenoiserCall\(sample_shape"
    )
    case = flux()
    with pytest.raises(ValueError, match=message):
        adpdm.quantize(case.denoiser, scheduler=case.scheduler, conditioning=case.conditioning)
    assert not quant_layers(case.denoiser)


def test_conditioning_may_hold_dicts() -> None:
    given = {"a": noise(3, 2), "b": {"c": noise(3, 4), "d": {"e": torch.arange(3)}}}
    sampler = Sampler(tiny_conditional_unet(), diffusers.DDIMScheduler(), (4, 8, 8), STEPS, given)
    picked = sampler.conditions(2, 2)  # images 2 and 3 have the entries 2 and 0
    assert picked["b"]["d"]["e"].tolist() == [2, 0]
    assert torch.equal(picked["b"]["c"], given["b"]["c"][[2, 0]])
    assert pick(given, torch.tensor([1]))["b"]["d"]["e"].tolist() == [1]
    assert pick(given, slice(1, 3))["a"].shape == (2, 2)


def test_state_file_belongs_to_its_call(tmp_path: Path) -> None:
    case, state = flux(), tmp_path / "state.safetensors"
    search = SearchConfig(num_steps=2, refit_steps=1, batch_size=2)
    settings = QuantConfig(
        num_groups=2,
        num_inference_steps=STEPS,
        histogram_images=2,
        calibration_images=4,
        round_size=2,
        search=search,
    )
    arguments = {"scheduler": case.scheduler, "conditioning": case.conditioning, "state_file": state}
    adpdm.quantize(copy.deepcopy(case.denoiser), settings, call=case.call, **arguments)
    assert state.exists()
    constants = {**case.call.constants, "txt_ids": torch.ones(5, 3)}
    changes: list[dict[str, Any]] = [
        {"constants": constants},
        {"schedule": {"mu": 0.9}},
        {"timestep_factor": 2e-3},
        {"constants": {**case.call.constants, "return_dict": True}},
    ]
    for change in changes:
        with pytest.raises(ValueError, match="belongs to another model, configuration or version"):
            adpdm.quantize(
                copy.deepcopy(case.denoiser), settings, call=replace(case.call, **change), **arguments
            )


@pytest.mark.parametrize("name", CASES)
def test_evaluation_calls_denoisers_as_calibration_does(name: str) -> None:
    """Equal models differ by nothing; batches see their own rows of the conditioning."""
    case = make_case(name)
    config = EvaluationConfig(
        num_images=3,
        num_inference_steps=2,
        batch_size=2,
        use_extractors=False,
        timing_batch_sizes=(2,),
        timing_pairs=1,
    )
    result = compare(
        case.denoiser,
        copy.deepcopy(case.denoiser),
        case.scheduler,
        config,
        conditioning=case.conditioning,
        call=case.call,
        decode=lambda samples: samples.flatten(1)[:, :16].reshape(-1, 1, 4, 4),
    )
    assert result.psnr_db == float("inf")
    assert all(result.noise_sqnr_own_trajectory_db == float("inf"))
    assert result.timings[0].batch_size == 2
    assert len({image.tobytes() for image in result.reference_images}) == 3


def test_generated_samples_are_those_of_the_calls_that_calibration_makes() -> None:
    case = flux()
    seeds = [torch.Generator().manual_seed(s) for s in image_seeds(7, 3)]
    sampler = case.sampler(case.denoiser)
    sample = torch.stack([torch.randn(case.call.sample_shape, generator=g) for g in seeds])
    scheduler = copy.deepcopy(sampler.scheduler)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            sample = scheduler.step(
                sampler.predict(sample, timestep, case.conditioning), timestep, sample
            ).prev_sample
    made = generate(
        case.denoiser, case.scheduler, 3, STEPS, 7, 3, conditioning=case.conditioning, call=case.call
    )
    assert torch.equal(made.samples, sample)


def test_samples_that_are_no_images_need_decoding() -> None:
    case = flux()
    with pytest.raises(ValueError, match=r"samples of shape \(16, 8\) are no images .* decode= must say"):
        compare(case.denoiser, case.denoiser, case.scheduler, call=case.call)
