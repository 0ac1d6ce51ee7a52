"""Post-training quantization of diffusion models with activation ranges per group of timesteps."""

from __future__ import annotations

__version__ = "0.1.0"

from adpdm.info import build_info

__all__ = ["__version__", "build_info"]
