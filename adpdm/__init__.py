"""Post-training quantization of diffusion models with activation ranges per group of timesteps."""

from __future__ import annotations

__version__ = "0.1.0"

# First: without the extension nothing here works, and it says so in one sentence.
from . import _native as _native
from . import diffusers_quantizer as _diffusers_quantizer
from .config import QuantConfig, SearchConfig
from .denoisers import load_pipeline
from .diffusers_config import AdpdmConfig
from .pipeline import QuantizationReport, quantize
from .tables import load_tables, save_tables
from .trajectory import DenoiserCall

_diffusers_quantizer.register()

__all__ = [
    "AdpdmConfig",
    "DenoiserCall",
    "QuantConfig",
    "QuantizationReport",
    "SearchConfig",
    "load_pipeline",
    "load_tables",
    "quantize",
    "save_tables",
]
