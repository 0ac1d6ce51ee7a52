"""Tiny transformers and SDXL with random weights, and what their pipelines pass to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

from adpdm import DenoiserCall
from adpdm.testing import tiny_conditional_unet
from adpdm.trajectory import Sampler

STEPS = 4


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """A denoiser, the scheduler it is used with, and what its pipeline passes to it."""

    def __init__(
        self, denoiser: Any, scheduler: Any, conditioning: dict[str, Any], call: DenoiserCall | None = None
    ) -> None:
        self.denoiser, self.scheduler = denoiser.eval(), scheduler
        self.conditioning, self.call = conditioning, call

    def sampler(self, denoiser: Any) -> Sampler:
        shape = self.call.sample_shape if self.call else None
        config: Any = self.denoiser.config
        shape = shape or (config.in_channels, config.sample_size, config.sample_size)
        return Sampler(denoiser, self.scheduler, shape, STEPS, self.conditioning, self.call)


def dit() -> Case:
    denoiser = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return Case(denoiser, diffusers.DDIMScheduler(), {"class_labels": torch.tensor([1, 7, 9])})


def pixart() -> Case:
    denoiser = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    conditioning = {"encoder_hidden_states": noise(3, 5, 12)}
    constants = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    call = DenoiserCall(constants=constants)
    return Case(denoiser, diffusers.DPMSolverMultistepScheduler(), conditioning, call)


def sd3() -> Case:
    denoiser = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
    )
    conditioning = {"encoder_hidden_states": noise(3, 5, 12), "pooled_projections": noise(3, 10, seed=1)}
    return Case(denoiser, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), conditioning)


def flux() -> Case:
    denoiser = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    conditioning = {
        "encoder_hidden_states": noise(3, 5, 12),
        "pooled_projections": noise(3, 10, seed=1),
        "guidance": torch.full((3,), 3.5),
    }
    call = DenoiserCall(
        sample_shape=(16, 8),
        constants={
            "img_ids": torch.cartesian_prod(*[torch.arange(n) for n in (1, 4, 4)]).float(),
            "txt_ids": torch.zeros(5, 3),
        },
        timestep_factor=1e-3,
        schedule={"mu": 0.8},
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return Case(denoiser, scheduler, conditioning, call)


def sdxl() -> Case:
    denoiser = tiny_conditional_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 10,
        use_linear_projection=True,
    )
    ids = torch.tensor([64.0, 64, 0, 0, 64, 64]).repeat(3, 1)
    conditioning = {
        "encoder_hidden_states": noise(3, 5, 8),
        "added_cond_kwargs": {"text_embeds": noise(3, 10, seed=1), "time_ids": ids},
    }
    return Case(denoiser, diffusers.EulerDiscreteScheduler(), conditioning)


CASES: dict[str, Callable[[], Case]] = {"dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux, "sdxl": sdxl}


def make_case(name: str) -> Case:
    """One of CASES, with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CASES[name]()
