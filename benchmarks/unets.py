"""The denoisers that are timed: shapes, seeded random weights or a shipped model, inputs, calibration data.

diffusers is imported when a model is built: processes that need none do not hold it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

Arrays = dict[str, np.ndarray]  # inputs of one call by argument name: sample, timestep, then the conditioning

ROOT = Path(__file__).resolve().parents[1]
WEIGHT_SEED = 0
CALIBRATION_SEED = 0  # of QuantConfig as well: the peers see the very inputs that adpdm calibrates on
PROBE_SEED = 1
CONDITIONING_SEEDS = {CALIBRATION_SEED: 20, PROBE_SEED: 21}
NUM_TRAIN_TIMESTEPS = 1000
BIAS_STD = 0.02  # of random biases; a trained network has some, so the kernels must add some
CLASSES = 10  # of Fashion-MNIST
SDXL_TIME_IDS = (1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0)  # size, crop and target size of an uncropped image


@dataclass(frozen=True)
class UNet:
    """One denoiser.

    Args:
        kind: "UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel" or "FlatUNet".
        settings: of that class; empty where `folder` holds trained weights.
        sample_shape: (C, H, W).
        conditioning: shape of one image's entry by argument name.
        calibration_images, calibration_steps: full-precision trajectories that all quantizers calibrate on.
        folder: with a denoiser in unet/ or transformer/ and scheduler/, or None for random weights.
    """

    kind: str
    settings: dict[str, Any]
    sample_shape: tuple[int, int, int]
    conditioning: dict[str, tuple[int, ...]]
    calibration_images: int
    calibration_steps: int
    folder: Path | None = None


_CONDITIONAL = {"layers_per_block": 2, "norm_eps": 1e-5}
UNETS: dict[str, UNet] = {
    "demo": UNet("UNet2DModel", {}, (1, 32, 32), {}, 16, 10, ROOT / "models" / "ddpm-fashion-mnist-32"),
    "dit": UNet(
        "DiTTransformer2DModel",
        {},
        (1, 32, 32),
        {"class_labels": ()},
        16,
        10,
        ROOT / "models" / "dit-fashion-mnist-32",
    ),
    # The config of google/ddpm-cifar10-32: 35.7 million parameters.
    "cifar10": UNet(
        "UNet2DModel",
        {
            "block_out_channels": (128, 256, 256, 256),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "attention_head_dim": None,
            "norm_eps": 1e-6,
        },
        (3, 32, 32),
        {},
        8,
        10,
    ),
    # The shape of Stable Diffusion 1.5: 859.5 million parameters.
    "sd15": UNet(
        "UNet2DConditionModel",
        {
            **_CONDITIONAL,
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        (4, 64, 64),
        {"encoder_hidden_states": (77, 768)},
        1,
        4,
    ),
    # The shape of SDXL: 2567 million parameters.
    "sdxl": UNet(
        "FlatUNet",
        {
            **_CONDITIONAL,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
            "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (4, 128, 128),
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        1,
        4,
    ),
    # For tests: seconds, not minutes.
    "tiny": UNet(
        "UNet2DModel",
        {
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        (1, 8, 8),
        {},
        2,
        4,
    ),
}


def find(name: str) -> UNet:
    """The denoiser of a name; NAME@SIZE has another width and height of its samples, as sd15@32.

    Raises:
        ValueError: for an unknown name, or a size that it cannot be resampled at.
    """
    base, _, size = name.partition("@")
    if base not in UNETS:
        raise ValueError(f"model must be one of {', '.join(UNETS)}, or one of them with @SIZE; got {name!r}")
    unet = UNETS[base]
    if not size:
        return unet
    multiple = 8  # three halvings, the most any of them does
    if not size.isdigit() or int(size) < multiple or int(size) % multiple:
        raise ValueError(f"the size of {base}@SIZE must be a positive multiple of {multiple}, got {name!r}")
    return replace(unet, sample_shape=(unet.sample_shape[0], int(size), int(size)))


@functools.cache
def _class_of(kind: str) -> Any:
    """The diffusers class of a `UNet.kind`."""
    import diffusers

    if kind != "FlatUNet":
        return getattr(diffusers, kind)

    class FlatUNet(diffusers.UNet2DConditionModel):
        """SDXL's extra conditioning as tensor arguments: neither exporters nor adpdm take dictionaries."""

        def forward(
            self,
            sample: torch.Tensor,  # [B, 4, H, W]
            timestep: torch.Tensor,  # [B] or []
            encoder_hidden_states: torch.Tensor,  # [B, 77, 2048]
            text_embeds: torch.Tensor,  # [B, 1280]
            time_ids: torch.Tensor,  # [B, 6]
            return_dict: bool = True,
        ) -> Any:
            added = {"text_embeds": text_embeds, "time_ids": time_ids}
            return super().forward(
                sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=return_dict
            )

    return FlatUNet


def class_of(name: str) -> Any:
    """The diffusers class of a denoiser, whose `from_pretrained` reads it back."""
    return _class_of(find(name).kind)


def build(name: str, dtype: torch.dtype | None = None, device: str = "cpu") -> Any:
    """A denoiser in eval mode without gradients; random weights are the same in every process.

    Args:
        dtype: of its parameters, float32 when None; lower ones are rounded from the same float32 values.
        device: where it is made; each kind of device has random weights of its own.
    """
    unet, dtype = find(name), dtype or torch.float32
    model_class = _class_of(unet.kind)
    if unet.folder is not None:
        part = next(part for part in ("unet", "transformer") if (unet.folder / part).is_dir())
        model = model_class.from_pretrained(unet.folder / part, torch_dtype=dtype).to(device)
    else:
        with torch.device("meta"):  # diffusers' own initialisation of SDXL takes minutes
            model = model_class(**settings_of(unet))
        model = torch.nn.Module.to(model, dtype).to_empty(device=device)  # diffusers' own warns of nothing
        with torch.no_grad():
            _fill(model, device)
    return model.eval().requires_grad_(False)


def settings_of(unet: UNet) -> dict[str, Any]:
    """Arguments of its class."""
    channels, size, _ = unet.sample_shape
    return {"in_channels": channels, "out_channels": channels, "sample_size": size, **unet.settings}


def _fill(model: Any, device: str) -> None:
    """Weights of variance 1 / fan-in, norms of gain 1: no layer changes the variance by much."""
    if list(model.buffers()):
        raise ValueError(f"{type(model).__name__} must hold no buffers to be filled, got some")
    generator = torch.Generator(device).manual_seed(WEIGHT_SEED)
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, torch.nn.GroupNorm | torch.nn.LayerNorm):
            parameter.fill_(1.0 if kind == "weight" else 0.0)
        elif kind in ("weight", "bias"):
            std = BIAS_STD if kind == "bias" else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device=device) * std)
        else:
            raise ValueError(f"no rule how to fill parameter {name} of {type(owner).__name__}")


def scheduler(name: str) -> Any:
    """DDIM: the shipped one's own, otherwise the default, whose clipping to [-1, 1] keeps samples sane."""
    from diffusers import DDIMScheduler

    folder = find(name).folder
    if folder is not None:
        return DDIMScheduler.from_pretrained(folder / "scheduler")
    return DDIMScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS)


def conditioning(name: str, images: int, seed: int) -> dict[str, torch.Tensor]:
    """Random conditioning by argument name, [images, ...] f32 each; classes in turn, [images] i64."""
    generator = torch.Generator().manual_seed(CONDITIONING_SEEDS[seed])
    shapes = find(name).conditioning
    values = {key: torch.randn(images, *shape, generator=generator) for key, shape in shapes.items()}
    if "class_labels" in values:
        values["class_labels"] = torch.arange(images) % CLASSES
    if "time_ids" in values:
        values["time_ids"] = torch.tensor(SDXL_TIME_IDS).repeat(images, 1)
    return values


def save_trajectory(path: Path, samples: Any, timesteps: Any, conditions: dict[str, Any]) -> None:
    """Write samples [T, N, C, H, W], timesteps [T] and conditioning [N, ...] for `load_batches`."""
    arrays = {key: value.numpy() for key, value in conditions.items()}
    np.savez(path, samples=samples.contiguous().numpy(), timesteps=timesteps.numpy(), **arrays)


def load_batches(path: Path, batch: int) -> list[Arrays]:
    """Inputs of B images each that together hold every sample of a trajectory, steps in order.

    Images are repeated to fill a last batch, so that engines with a fixed batch see the same values.
    """
    with np.load(path) as stored:
        arrays = dict(stored)
    samples, timesteps = arrays.pop("samples"), arrays.pop("timesteps")
    images = samples.shape[1]
    batches = []
    for step, timestep in enumerate(timesteps):
        for first in range(0, images, batch):
            index = np.arange(first, first + batch) % images
            inputs = {"sample": samples[step][index], "timestep": np.full(batch, timestep, np.int64)}
            batches.append({**inputs, **{key: value[index] for key, value in arrays.items()}})
    return batches
