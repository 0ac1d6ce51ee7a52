"""Adapters on a tiny text-conditional U-Net, quantized in both ways, for tests of several files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_models import ATTENTION, CONFIGS, inputs, load
from torch import Tensor

import adpdm
from adpdm import QuantConfig
from adpdm.nn import adapters_of
from adpdm.testing import ddim_scheduler, tiny_conditional_unet

peft = pytest.importorskip("peft")

CALIBRATED = {"calibrated w8a8": 8, "calibrated w4a8": 4}
EVERY_KIND = [*CONFIGS, *CALIBRATED]
FOUR_BITS = ["w4a8", "calibrated w4a8"]  # for what hardly depends on the bits
SMALL: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}
EVERY_LAYER = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv2", "conv_shortcut", "conv"]


def quantized(kind: str, folder: Path, **shape: Any) -> Any:
    """A model of one of EVERY_KIND; `folder` is for the float model that one is loaded from."""
    model: Any = tiny_conditional_unet(**shape)
    if kind in CONFIGS:
        model.save_pretrained(folder)
        return load(folder, CONFIGS[kind])
    settings = {"num_groups": 2, "num_inference_steps": 4, "histogram_images": 1, "grouping": "uniform"}
    rounding = {"weight_rounding": "nearest", "raised_layers": 0.0}
    # Adapters and hooks let blocks step aside, whose layers then compute attention in floats.
    # With 4-bit weights layers rotate their channels, which adapters do not see.
    bits, rotations = CALIBRATED[kind], {"attention": "float", "hadamard": "auto"}
    config = QuantConfig(weight_bits=bits, **settings, **rounding, **rotations)
    context = {"encoder_hidden_states": inputs()["encoder_hidden_states"]}
    adpdm.quantize(model, config, scheduler=ddim_scheduler(), conditioning=context)
    return model


def lora(targets: list[str] | None = None, **changes: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    return peft.LoraConfig(target_modules=targets or EVERY_LAYER, **{**settings, **changes})


def adapt(model: Any, name: str = "default", seed: int = 0, **changes: Any) -> None:
    """Add a random adapter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(lora(**changes), name)


def saved(folder: Path, seed: int = 0, shape: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A random adapter in a file, made with the float model."""
    model = tiny_conditional_unet(**(shape or {}))
    adapt(model, seed=seed, **changes)
    path = folder / f"adapter{seed}"
    model.save_lora_adapter(path)
    return path


def load_adapter(model: Any, path: Path, name: str = "default", **kwargs: Any) -> None:
    model.load_lora_adapter(path, prefix=None, adapter_name=name, use_safetensors=True, **kwargs)


def state_of(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two models hold the same bits under the same names."""
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def deltas(model: Any, name: str = "default") -> dict[str, Tensor]:
    return {key: m.get_delta_weight(name).detach() for key, m in adapters_of(model).items()}
