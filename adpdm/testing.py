"""Tiny diffusers models with random seeded weights, quantized within a second, for tests and examples."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

CROSS_ATTENTION_DIM = 8  # D of the text-like conditioning of `tiny_conditional_unet`
NUM_TRAIN_TIMESTEPS = 1000
# The least of a U-Net: one level without attention, for tests of what does not depend on the network.
ONE_BLOCK: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}


def tiny_unet(seed: int = 0, **changes: Any) -> UNet2DModel:
    """A denoiser of [N, 1, 8, 8] with skip concatenations, attention and resampling; 45 000 weights.

    Args:
        seed: of the weights; the global generator is left as it was.
        changes: settings of UNet2DModel that differ.
    """
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    unet: UNet2DModel = _seeded(UNet2DModel, {**settings, **changes}, seed)
    return unet


def tiny_conditional_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A denoiser of [N, 4, 8, 8] under encoder_hidden_states [N, L, CROSS_ATTENTION_DIM]; see `tiny_unet`."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "cross_attention_dim": CROSS_ATTENTION_DIM,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet: UNet2DConditionModel = _seeded(UNet2DConditionModel, {**settings, **changes}, seed)
    return unet


def tiny_transformer(seed: int = 0, **changes: Any) -> DiTTransformer2DModel:
    """A class-conditional denoiser of [N, 1, 8, 8] with adaptive norms, under class_labels [N].

    Its class "none" is the last, `num_embeds_ada_norm`, 3 by default; see `tiny_unet`.
    """
    settings: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "num_embeds_ada_norm": 3,
    }
    transformer: DiTTransformer2DModel = _seeded(DiTTransformer2DModel, {**settings, **changes}, seed)
    return transformer


def ddim_scheduler() -> DDIMScheduler:
    """DDIM over the usual 1000 training timesteps, which keeps samples of a random denoiser in [-1, 1]."""
    return DDIMScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS)


def tiny_pipeline(seed: int = 0, **changes: Any) -> Any:
    """A DDIMPipeline of `tiny_unet` and `ddim_scheduler`, silent."""
    pipe: Any = DDIMPipeline(tiny_unet(seed, **changes), ddim_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _seeded(kind: Any, settings: dict[str, Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**settings).eval()
