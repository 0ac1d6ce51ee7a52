"""What a quantization depends on: processes must agree on it, and a saved search belongs to it."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from ._native import build_info
from .config import QuantConfig
from .fingerprint import fingerprint_of, named_tensors
from .schedulers import identity
from .trajectory import Sampler


def asked_for(sampler: Sampler, config: QuantConfig) -> dict[str, str]:
    """What was asked for, in words and fingerprints."""
    settings = config.to_dict()
    settings.update({f"search.{name}": value for name, value in settings.pop("search").items()})
    return {
        **{f"setting {name}": str(value) for name, value in settings.items()},
        "scheduler": identity(sampler.scheduler),
        "timesteps": fingerprint_of([("", sampler.calls)]),
        "weights": fingerprint_of(state_tensors(sampler.denoiser), type(sampler.denoiser).__name__),
        "settings of the denoiser": settings_of(sampler.denoiser),
        "conditioning": fingerprint_of(named_tensors(sampler.given)),
        "shape of a sample": str(sampler.sample_shape),
        "call": sampler.call.fingerprint,
    }


def depends_on(sampler: Sampler, config: QuantConfig) -> dict[str, str]:
    """What the result depends on, in words."""
    device = sampler.device
    return {
        **asked_for(sampler, config),
        # Rounding of torch's layers depends on these.
        "version of torch": torch.__version__,
        "instruction set": f"{build_info()['isa']} and {torch.backends.cpu.get_cpu_capability()}",
        "number of threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def settings_of(denoiser: nn.Module) -> str:
    """The config of a denoiser in words: two of the same weights may compute otherwise, as with other heads.

    Names with an underscore say how it was made, and its quantization is not of the original. Tuples come
    back from a file as lists, which JSON does not tell apart.
    """
    config: Any = getattr(denoiser, "config", None)
    settings = {k: v for k, v in dict(config or {}).items() if not k.startswith("_")}
    settings.pop("quantization_config", None)
    return json.dumps(settings, sort_keys=True, default=str)


def state_tensors(denoiser: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    return [(name, x) for name, x in denoiser.state_dict().items() if isinstance(x, Tensor)]
