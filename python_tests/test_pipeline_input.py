"""What `adpdm.quantize` is given: texts, captured models, and the grad mode of the caller."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from test_pipeline import config, noise, refused
from torch import Tensor
from transformer_cases import flux

import adpdm
from adpdm import AdpdmConfig, DenoiserCall, SearchConfig, graph
from adpdm.evaluate import generate
from adpdm.pipeline_checks import check_denoiser
from adpdm.testing import (
    CROSS_ATTENTION_DIM,
    ddim_scheduler,
    tiny_conditional_unet,
    tiny_pipeline,
    tiny_transformer,
    tiny_unet,
)
from adpdm.trajectory import Sampler


def test_captured_model_is_refused() -> None:
    pipe = tiny_pipeline()
    graph.capture(pipe)
    refused(pipe, ValueError, r"UNet2DModel is captured; call adpdm.graph.release\(\) on it first")


def test_parameters_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        pipe = tiny_pipeline()
    refused(pipe, ValueError, "wanted parameters that were made outside of torch.inference_mode, got conv_in")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_search_does_not_depend_on_the_grad_mode_of_the_caller(mode: Any) -> None:
    settings = config(grouping="search", search=SearchConfig(num_steps=2, refit_steps=1))
    words = noise(2, 3, CROSS_ATTENTION_DIM)
    weights = []
    for context in (torch.enable_grad, mode):
        unet = tiny_conditional_unet()
        with context():
            given = {"encoder_hidden_states": words.clone()}  # made in that mode
            adpdm.quantize(unet, settings, scheduler=ddim_scheduler(), conditioning=given)
        weights.append(unet.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_prompts_without_text_encoder_are_refused() -> None:
    message = "prompts need a pipeline with encode_prompt, got DDIMPipeline"
    refused(tiny_pipeline(), TypeError, message, prompts=["a cat"])


def text_pipeline(encode_prompt: Any) -> SimpleNamespace:
    return SimpleNamespace(
        unet=tiny_conditional_unet(), scheduler=ddim_scheduler(), encode_prompt=encode_prompt
    )


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (["a cat", 3], TypeError, r"prompts must be a list of texts, got \['', 'a cat', 3\]"),
        ([], ValueError, "prompts must hold at least one text, got none"),
    ],
)
def test_prompts_that_are_no_texts_are_refused(prompts: Any, error: type[Exception], message: str) -> None:
    def encode_prompt(
        prompt: Any, device: Any, num_images_per_prompt: int, do_classifier_free_guidance: bool
    ) -> None:
        raise AssertionError("nothing to encode")

    refused(text_pipeline(encode_prompt), error, message, prompts=prompts)


def test_prompts_of_other_pipelines_are_refused() -> None:
    def encode_prompt(prompt: Any, prompt_2: Any, prompt_3: Any) -> None:
        raise AssertionError("not understood")

    message = r"takes \['prompt', 'prompt_2', 'prompt_3'\]: encode them and pass conditioning"
    refused(text_pipeline(encode_prompt), TypeError, message, prompts=["a cat"])


def test_fused_projections_are_refused() -> None:
    unet, given = tiny_conditional_unet(), {"encoder_hidden_states": noise(1, 5, CROSS_ATTENTION_DIM)}
    unet.fuse_qkv_projections()
    message = "got fused ones in .*attn1, .*; load the original again"
    refused(unet, ValueError, message, scheduler=ddim_scheduler(), conditioning=given)
    unet.unfuse_qkv_projections()  # leaves the fused layers where they are
    refused(unet, ValueError, message, scheduler=ddim_scheduler(), conditioning=given)


def test_projections_that_can_be_taken_apart_are_accepted_afterwards() -> None:
    denoiser = flux().denoiser
    denoiser.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"call unfuse_qkv_projections\(\) first"):
        check_denoiser(denoiser)
    denoiser.unfuse_qkv_projections()
    check_denoiser(denoiser)


@pytest.mark.parametrize("seed", [-1, 2**39, 2**70])
def test_seeds_that_others_cannot_be_made_of_are_refused(seed: int) -> None:
    message = rf"seed must be in \[0, 549755813887\], got {seed}"
    with pytest.raises(ValueError, match=message):
        adpdm.quantize(tiny_unet(), adpdm.QuantConfig(seed=seed), scheduler=ddim_scheduler())


# ---- kinds of arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": AdpdmConfig()}, r"config must be a QuantConfig, got AdpdmConfig; .*from_pretrained"),
        ({"config": {"weight_bits": 8}}, "config must be a QuantConfig, got dict"),
        ({"config": {}}, "config must be a QuantConfig, got dict"),
        ({"config": adpdm.QuantConfig}, "config must be a QuantConfig, got the class QuantConfig itself"),
        ({"call": {"timestep_factor": 1.0}}, "call must be a DenoiserCall, got dict"),
        ({"scheduler": DDIMScheduler}, "wanted a diffusers scheduler, got the class DDIMScheduler itself"),
        ({"conditioning": noise(2, 3)}, "conditioning must be a dict of tensors .*; got Tensor"),
        ({"null_conditioning": noise(1, 3)}, "null_conditioning must be a dict of tensors .*; got Tensor"),
    ],
)
def test_arguments_of_another_class_are_refused(arguments: dict[str, Any], message: str) -> None:
    refused(tiny_unet(), TypeError, message, **{"scheduler": ddim_scheduler(), **arguments})


def test_scheduler_without_a_config_is_refused() -> None:
    class Scheduler:
        def set_timesteps(self, count: int) -> None: ...
        def step(self, *given: Any) -> None: ...

    message = "wanted a diffusers scheduler with config, got Scheduler"
    refused(tiny_unet(), TypeError, message, scheduler=Scheduler())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_shape": 16}, r"sample_shape must be positive integers, as \(C, H, W\), got 16"),
        ({"sample_shape": ()}, r"sample_shape must be positive integers, as \(C, H, W\), got \(\)"),
        ({"sample_shape": (4, 0, 8)}, r"sample_shape must be positive integers, .*, got \(4, 0, 8\)"),
        ({"timestep_factor": 0}, "timestep_factor must be a positive number, got 0"),
        ({"timestep_factor": "1"}, "timestep_factor must be a positive number, got '1'"),
        ({"constants": [1]}, r"constants must be a dict, got \[1\]"),
        ({"schedule": 0.8}, "schedule must be a dict, got 0.8"),
    ],
)
def test_call_with_other_values_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoiserCall(**fields)


# ---- conditions --------------------------------------------------------------------------------------------

TEXT = noise(2, 5, CROSS_ATTENTION_DIM)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (TEXT.numpy(), TypeError, r"\['encoder_hidden_states'\] must be a tensor \[N, ...\], got ndarray"),
        ([[1.0, 2.0]], TypeError, r"\['encoder_hidden_states'\]\[0\]\[0\] must be a tensor .*, got float"),
        (TEXT[:0], ValueError, r"must have a row per image, at least one; got shape \(0, 5, 8\)"),
        (torch.tensor(1.0), ValueError, r"must have a row per image, at least one; got shape \(\)"),
        (
            TEXT.half(),
            ValueError,
            r"UNet2DConditionModel must work on samples \(4, 8, 8\) with 'encoder_hidden_states' "
            r"\(1, 5, 8\) torch.float16, got RuntimeError: .*; its arguments are \['encoder_hidden_states',",
        ),
    ],
)
def test_conditions_that_do_not_fit_are_refused(given: Any, error: type[Exception], message: str) -> None:
    conditioning = {"encoder_hidden_states": given}
    refused(tiny_conditional_unet(), error, message, scheduler=ddim_scheduler(), conditioning=conditioning)


def test_conditions_with_unequal_rows_are_refused() -> None:
    message = r"same number of rows, one per image, got .*encoder_hidden_states'\]\": 2, .*'ids'\]\": 1"
    given = {"encoder_hidden_states": TEXT, "added_cond_kwargs": {"ids": noise(1, 6)}}
    refused(tiny_conditional_unet(), ValueError, message, scheduler=ddim_scheduler(), conditioning=given)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            None,
            "DiTTransformer2DModel must work on samples .* with nothing else, got TypeError: .*class_label",
        ),
        ([0, 99], r"conditioning\['class_labels'\] must be in \[0, 3\], got 0 to 99"),
        ([-1, 2], r"conditioning\['class_labels'\] must be in \[0, 3\], got -1 to 2"),
    ],
)
def test_classes_that_do_not_fit_are_refused(labels: list[int] | None, message: str) -> None:
    given = None if labels is None else {"class_labels": torch.tensor(labels)}
    refused(tiny_transformer(), ValueError, message, scheduler=ddim_scheduler(), conditioning=given)


def test_null_conditions_are_checked_too() -> None:
    given = {"class_labels": torch.tensor([1])}
    message = r"null_conditioning\['class_labels'\] must be in \[0, 3\], got 4 to 4"
    settings, null = config(guidance_scale=2.0), {"class_labels": torch.tensor([4])}
    arguments = {"conditioning": given, "null_conditioning": null, "config": settings}
    refused(tiny_transformer(), ValueError, message, scheduler=ddim_scheduler(), **arguments)


def test_samples_of_another_shape_are_refused() -> None:
    message = r"UNet2DModel must work on samples \(3, 7, 7\) with nothing else, got RuntimeError"
    call = DenoiserCall(sample_shape=(3, 7, 7))
    refused(tiny_unet(), ValueError, message, scheduler=ddim_scheduler(), call=call)


def residuals() -> list[Tensor]:
    """Of an adapter for both levels of `tiny_conditional_unet`."""
    return [noise(2, 8, 4, 4, seed=1), noise(2, 16, 4, 4, seed=2)]


@pytest.mark.parametrize("place", ["conditioning", "constants"])
def test_residuals_of_an_adapter_reach_every_step(place: str) -> None:
    """The U-Net of diffusers takes them out of the list that it is given."""
    unet, name = tiny_conditional_unet(), "down_intrablock_additional_residuals"
    conditioning: dict[str, Any] = {"encoder_hidden_states": TEXT}
    call = None
    if place == "conditioning":
        conditioning[name] = residuals()
    else:
        call = DenoiserCall(constants={name: residuals()})
    sampler = Sampler(unet, ddim_scheduler(), (4, 8, 8), 3, conditioning, call)
    run = sampler.run(0, 0, 2)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    generate(
        unet,
        ddim_scheduler(),
        2,
        3,
        conditioning=conditioning,
        call=call,
        on_step=lambda k, t, sample, pred: seen.append((t, sample, pred)),
    )
    seen += list(zip(sampler.calls, run.samples, run.noise_preds, strict=True))
    assert len(seen) == 6
    for timestep, sample, prediction in seen:
        with torch.no_grad():
            wanted = unet(sample, timestep, TEXT, **{name: residuals()}).sample
        assert torch.allclose(prediction, wanted, atol=1e-5)
