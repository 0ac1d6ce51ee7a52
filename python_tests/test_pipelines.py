"""Pipelines of diffusers around a quantized U-Net: whatever the schedule, groups follow timesteps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

import adpdm
from adpdm import QuantConfig
from adpdm.testing import CROSS_ATTENTION_DIM, tiny_conditional_unet

pytest.importorskip("transformers", reason="diffusers has text-to-image pipelines only beside transformers")

STEPS = 6
SIZE = 16  # of images; latents are half of it


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vae() -> AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=SIZE,
        ).eval()


def quantized_unet(scheduler: Any, **changes: Any) -> Any:
    unet = tiny_conditional_unet(**changes)
    settings = QuantConfig(
        num_groups=STEPS,
        num_inference_steps=STEPS,
        histogram_images=2,
        grouping="uniform",
        correct_bias=False,
    )
    conditioning = {"encoder_hidden_states": noise(2, 5, CROSS_ATTENTION_DIM)}
    adpdm.quantize(unet, settings, scheduler=scheduler, conditioning=conditioning)
    return unet


@pytest.fixture(scope="module")
def unet() -> Any:
    """Quantized for DDIM, one group per calibrated timestep; tests must not change it."""
    return quantized_unet(DDIMScheduler())


def make_pipeline(name: str, unet: Any, scheduler: Any, **parts: Any) -> Any:
    import diffusers

    pipe = getattr(diffusers, name)(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def visits(pipe: Any, **arguments: Any) -> list[tuple[float, int, int]]:
    """Run a pipeline; timestep, batch size and step index of every call of its denoiser."""
    calls: list[tuple[float, int, int]] = []

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        step = module.adpdm_step
        assert torch.equal(step.group_index, step.table[int(step.step_index)])
        value = float(torch.as_tensor(timestep).reshape(-1)[0])
        calls.append((value, args[0].shape[0], int(step.step_index)))

    handle = pipe.unet.register_forward_hook(watch, with_kwargs=True)
    try:
        output = pipe(
            prompt_embeds=noise(1, 5, CROSS_ATTENTION_DIM),
            negative_prompt_embeds=noise(1, 5, CROSS_ATTENTION_DIM, seed=1),
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            **arguments,
        )
    finally:
        handle.remove()
    assert bool(torch.isfinite(output.images).all())
    return calls


def follow_timesteps(calls: list[tuple[float, int, int]], unet: Any) -> None:
    """Every call had the step whose calibrated timestep is nearest to its own."""
    calibrated = unet.adpdm_step.timesteps.tolist()
    for timestep, _, index in calls:
        assert abs(calibrated[index] - timestep) == min(abs(c - timestep) for c in calibrated)


@pytest.mark.parametrize(("guidance", "batch"), [(1.0, 1), (5.0, 2)])
def test_text_to_image_with_and_without_guidance(unet: Any, guidance: float, batch: int) -> None:
    pipe = make_pipeline("StableDiffusionPipeline", unet, DDIMScheduler())
    calls = visits(pipe, num_inference_steps=STEPS, guidance_scale=guidance, height=SIZE, width=SIZE)
    follow_timesteps(calls, unet)
    assert [index for _, _, index in calls] == list(range(STEPS))
    assert {size for _, size, _ in calls} == {batch}


@pytest.mark.parametrize("strength", [0.35, 0.7])
def test_image_to_image_starts_in_the_middle(unet: Any, strength: float) -> None:
    pipe = make_pipeline("StableDiffusionImg2ImgPipeline", unet, DDIMScheduler())
    image = noise(1, 3, SIZE, SIZE).clamp(-1, 1)
    calls = visits(pipe, image=image, strength=strength, num_inference_steps=STEPS, guidance_scale=5.0)
    follow_timesteps(calls, unet)
    count = int(STEPS * strength)
    assert [index for _, _, index in calls] == list(range(STEPS - count, STEPS))


def test_inpainting(unet: Any) -> None:
    pipe = make_pipeline("StableDiffusionInpaintPipeline", unet, DDIMScheduler())
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1.0
    calls = visits(
        pipe,
        image=noise(1, 3, SIZE, SIZE).clamp(-1, 1),
        mask_image=mask,
        strength=0.7,
        num_inference_steps=STEPS,
        height=SIZE,
        width=SIZE,
    )
    follow_timesteps(calls, unet)
    assert [index for _, _, index in calls] == [2, 3, 4, 5]


def test_controlnet_adds_residuals_to_the_quantized_unet(unet: Any) -> None:
    controlnet = ControlNetModel.from_unet(
        tiny_conditional_unet(), conditioning_embedding_out_channels=(8, 8)
    ).eval()
    with torch.no_grad():  # starts with zeros, which would change nothing
        for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            block.weight.copy_(noise(*block.weight.shape) * 0.3)
    pipe = make_pipeline("StableDiffusionControlNetPipeline", unet, DDIMScheduler(), controlnet=controlnet)
    calls = visits(pipe, image=torch.ones(1, 3, SIZE, SIZE), num_inference_steps=STEPS)
    follow_timesteps(calls, unet)
    assert [index for _, _, index in calls] == list(range(STEPS))


def test_another_scheduler_and_step_count_than_calibrated(unet: Any) -> None:
    pipe = make_pipeline("StableDiffusionPipeline", unet, EulerDiscreteScheduler())
    calls = visits(pipe, num_inference_steps=9, height=SIZE, width=SIZE)
    follow_timesteps(calls, unet)
    assert len(calls) == 9
    assert {index for _, _, index in calls} == set(range(STEPS))


def test_controlnet_residuals_reach_fused_blocks_and_float_blocks_alike(unet: Any) -> None:
    from adpdm.nn import unfused

    x, context = noise(1, 4, 8, 8), noise(1, 5, CROSS_ATTENTION_DIM)
    shapes = [(8, 8, 8)] * 2 + [(8, 4, 4), (16, 4, 4)]
    residuals = {
        "down_block_additional_residuals": tuple(noise(1, *s, seed=i) for i, s in enumerate(shapes)),
        "mid_block_additional_residual": noise(1, 16, 4, 4, seed=9),
    }
    other = copy.deepcopy(unet)
    with torch.no_grad(), unfused(other):
        wanted = other(x, 500, encoder_hidden_states=context, **residuals).sample
    with torch.no_grad():
        got = unet(x, 500, encoder_hidden_states=context, **residuals).sample
        without = unet(x, 500, encoder_hidden_states=context).sample
    assert float((got - wanted).norm() / wanted.norm()) < 0.02
    assert float((got - without).norm() / wanted.norm()) > 0.05
