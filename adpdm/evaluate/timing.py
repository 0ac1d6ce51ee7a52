"""Times two denoisers against each other in interleaved pairs, because a shared machine drifts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .sampling import wait_for

WARM_UP_PAIRS = 2  # first calls allocate and choose kernels


@dataclass(frozen=True)
class PairTiming:
    """Seconds per denoiser call at one batch size.

    Args:
        batch_size, num_pairs: images per call, pairs measured.
        reference_seconds, quantized_seconds: medians.
        speedup: median over pairs of reference / quantized.
        speedup_low, speedup_high: lower and upper quartile of that ratio.
    """

    batch_size: int
    num_pairs: int
    reference_seconds: float
    quantized_seconds: float
    speedup: float
    speedup_low: float
    speedup_high: float


@torch.no_grad()
def time_pair(
    reference: Callable[[], Any],
    quantized: Callable[[], Any],
    batch_size: int,
    device: torch.device,
    num_pairs: int,
) -> PairTiming:
    """Runs two denoiser calls on `batch_size` images in turn, the order swapped from pair to pair.

    Returns: medians and paired ratios of wall time; the clock waits for a CUDA device.

    Raises:
        ValueError: for less than one pair.
    """
    if num_pairs < 1:
        raise ValueError(f"time_pair: num_pairs must be at least 1, got {num_pairs}")
    seconds = np.zeros((num_pairs, 2))
    for pair in range(-WARM_UP_PAIRS, num_pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            start = time.perf_counter()
            (reference, quantized)[which]()
            wait_for(device)
            if pair >= 0:
                seconds[pair, which] = time.perf_counter() - start
    ratios = seconds[:, 0] / seconds[:, 1]
    low, middle, high = (float(v) for v in np.quantile(ratios, (0.25, 0.5, 0.75)))
    medians = np.median(seconds, axis=0)
    return PairTiming(batch_size, num_pairs, float(medians[0]), float(medians[1]), middle, low, high)
