"""PSNR and SQNR in decibels: the formulas, per image and pooled; infinite where the two sides are equal."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PEAK_TO_PEAK = 2.0  # samples live in [-1, 1]


def psnr(
    reference: Tensor,  # [...] float, in [-1, 1]
    test: Tensor,  # same shape
) -> float:
    """Peak signal-to-noise ratio 10 log10(peak_to_peak^2 / mse) in dB, mse over all elements together.

    Raises:
        ValueError: for different shapes, and without elements.
    """
    _, error = _energies(reference, test, "psnr")
    return sqnr_db(PEAK_TO_PEAK**2 * reference.numel(), float(error.sum()))


def psnr_per_image(
    reference: Tensor,  # [N, ...] float, in [-1, 1]
    test: Tensor,  # same shape
) -> np.ndarray:
    """PSNR of every image in dB, [N] float64.

    Raises:
        ValueError: for different shapes, and without elements.
    """
    _, error = _energies(reference, test, "psnr_per_image")
    elements = reference[0].numel() if len(reference) else 0
    return np.array([sqnr_db(PEAK_TO_PEAK**2 * elements, float(e)) for e in error])


def sqnr(
    reference: Tensor,  # [...] float
    test: Tensor,  # same shape
) -> float:
    """Signal to quantization noise ratio 10 log10(sum reference^2 / sum (reference - test)^2) in dB.

    Raises:
        ValueError: for different shapes, and without elements.
    """
    signal, error = _energies(reference, test, "sqnr")
    return sqnr_db(float(signal.sum()), float(error.sum()))


def sqnr_per_image(
    reference: Tensor,  # [N, ...] float
    test: Tensor,  # same shape
) -> np.ndarray:
    """SQNR of every image in dB, [N] float64.

    Raises:
        ValueError: for different shapes, and without elements.
    """
    signal, error = _energies(reference, test, "sqnr_per_image")
    return np.array([sqnr_db(float(s), float(e)) for s, e in zip(signal, error, strict=True)])


def pooled_sqnr(
    signal: np.ndarray,  # [T] float64, sums of reference^2
    error: np.ndarray,  # [T] float64, sums of (reference - test)^2
) -> np.ndarray:
    """SQNR in dB from energies that were added up elsewhere, [T] float64."""
    return np.array([sqnr_db(float(s), float(e)) for s, e in zip(signal, error, strict=True)])


def energies(reference: Tensor, test: Tensor) -> tuple[float, float]:
    """Sums of reference^2 and of (reference - test)^2, added in float64.

    Raises:
        ValueError: for different shapes, and without elements.
    """
    signal, error = _energies(reference, test, "energies")
    return float(signal.sum()), float(error.sum())


def _energies(reference: Tensor, test: Tensor, op: str) -> tuple[Tensor, Tensor]:
    """Energies of the signal and of the error per leading index, float64 [N] (or [1] for a scalar)."""
    if reference.shape != test.shape:
        raise ValueError(f"{op}: test must have the shape {tuple(reference.shape)}, got {tuple(test.shape)}")
    wide = [torch.atleast_1d(x.detach()).to(torch.float64) for x in (reference, test)]
    if wide[0].numel() == 0:
        raise ValueError(f"{op}: wanted at least one element, got shape {tuple(reference.shape)}")
    a, b = (x.flatten(1) if x.ndim > 1 else x[:, None] for x in wide)
    return a.square().sum(1), (a - b).square().sum(1)


def sqnr_db(signal: float, error: float) -> float:
    """10 log10(signal / error); +inf without error, -inf without signal."""
    if error == 0.0:
        return float("inf")
    return 10.0 * float(np.log10(signal / error)) if signal > 0.0 else float("-inf")
