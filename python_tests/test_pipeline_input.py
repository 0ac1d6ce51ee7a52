"""What `adpdm.quantize` is given: texts, captured models, and the grad mode of the caller."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_pipeline import config, noise, refused

import adpdm
from adpdm import SearchConfig, graph
from adpdm.testing import CROSS_ATTENTION_DIM, ddim_scheduler, tiny_conditional_unet, tiny_pipeline


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
