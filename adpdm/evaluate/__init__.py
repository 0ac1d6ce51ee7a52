"""Measures a quantized denoiser against its original: same seeds, samples, noise, features, time."""

from __future__ import annotations

from .comparison import EvaluationConfig, EvaluationResult, compare
from .distance import SetDistance, set_distance
from .extractors import INSTALL_SENTENCE, fetch_extractors, load_lite0, load_lpips
from .frechet import FrechetResult, frechet_distance
from .guidance import GuidedDenoiser
from .kernel import KernelResult, kernel_distance
from .layers import layer_sqnr
from .metrics import PEAK_TO_PEAK, pooled_sqnr, psnr, psnr_per_image, sqnr, sqnr_per_image
from .sample_set import SampleSet, SampleSettings, rows_in_turn, sample_set
from .sampling import GenerationResult, generate, image_seeds
from .sizes import file_bytes
from .timing import PairTiming, time_pair

__all__ = [
    "INSTALL_SENTENCE",
    "PEAK_TO_PEAK",
    "EvaluationConfig",
    "EvaluationResult",
    "FrechetResult",
    "GenerationResult",
    "GuidedDenoiser",
    "KernelResult",
    "PairTiming",
    "SampleSet",
    "SampleSettings",
    "SetDistance",
    "compare",
    "fetch_extractors",
    "file_bytes",
    "frechet_distance",
    "generate",
    "image_seeds",
    "kernel_distance",
    "layer_sqnr",
    "load_lite0",
    "load_lpips",
    "pooled_sqnr",
    "psnr",
    "psnr_per_image",
    "rows_in_turn",
    "sample_set",
    "set_distance",
    "sqnr",
    "sqnr_per_image",
    "time_pair",
]
