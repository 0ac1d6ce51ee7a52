"""A tiny text-conditional U-Net quantized while loading, and its inputs, for tests of several files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from adpdm import AdpdmConfig
from adpdm.testing import CROSS_ATTENTION_DIM

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIGS: dict[str, dict[str, Any]] = {
    "w8": {},
    "w4": {"weight_bits": 4},
    "w8a8": {"activation_bits": 8},
    "w4a8": {"weight_bits": 4, "activation_bits": 8},
}
MEMORY_REDUCTIONS = {"w8": 1.5, "w4": 3.0, "w8a8": 1.5, "w4a8": 3.0}  # as diffusers asks of int8 and int4
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
every_config = pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
# For what hardly depends on the bits: packed codes, without and with a copy of them for the kernels.
both_kinds = pytest.mark.parametrize("settings", [CONFIGS["w4"], CONFIGS["w4a8"]], ids=["w4", "w4a8"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    context = random(2, 5, CROSS_ATTENTION_DIM, seed=1).to(dtype)
    return {
        "sample": random(2, 4, 8, 8).to(dtype),
        "timestep": torch.tensor(498),
        "encoder_hidden_states": context,
    }


def run(model: Any, **changes: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**{**inputs(), **changes}).sample
    return output


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


def load(folder: Path, settings: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    config = AdpdmConfig(**(settings or {}))
    return UNet2DConditionModel.from_pretrained(folder, quantization_config=config, **kwargs)
