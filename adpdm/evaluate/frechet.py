"""Frechet distance between two sets of feature vectors, on principal components, and its resampled spread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_IMAGES = 16  # below, fewer than four dimensions are left and the distance says nothing
IMAGES_PER_DIMENSION = 4  # a covariance from fewer images measures mostly its own noise


@dataclass(frozen=True)
class FrechetResult:
    """Frechet distance on EfficientNet-Lite0 features; not FID, which uses an Inception network.

    Args:
        distance: of the two full sets. Few images bias it upwards: two sets of N images of one distribution
            are D (D + 5) / (2 N) variances apart in D dimensions of equal variance, 0.6 for 1000 images and
            32 dimensions, and somewhat less apart where variances differ. See `kernel_distance`.
        low, high: 95 % of the distances of resampled sets. Resampling with replacement inflates the distance
            by itself, so their spread is centred on `distance`; never below 0. It is no confidence interval
            of the distance of the two distributions: it moves with the bias, and does not contain it.
        num_images: of the first and the second set.
        dimensions: principal components kept, fitted on the first set.
        explained_variance: share of the first set's feature variance that they carry.
        resamples: of the bootstrap.
    """

    distance: float
    low: float
    high: float
    num_images: tuple[int, int]
    dimensions: int
    explained_variance: float
    resamples: int


def frechet_distance(
    first: np.ndarray,  # [N, F] float, the set that defines the projection
    second: np.ndarray,  # [M, F] float
    *,
    dimensions: int = 32,
    resamples: int = 200,
    seed: int = 0,
    is_paired: bool = False,
) -> FrechetResult:
    """Measures |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) on the leading principal components of `first`.

    Args:
        dimensions: wanted; fewer are kept when there are fewer than 4 images for each.
        is_paired: row i of both sets comes from the same seed, so the bootstrap draws them together.

    Raises:
        ValueError: the sets do not fit each other or hold fewer than 2 images.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"frechet_distance: wanted [N, F] and [M, F], got {first.shape} and {second.shape}")
    count, got = min(len(first), len(second)), f"got {len(first)} and {len(second)}"
    if count < 2:
        raise ValueError(f"frechet_distance: wanted at least 2 images in each set, {got}")
    if is_paired and len(first) != len(second):
        raise ValueError(f"frechet_distance: paired sets must be equally long, {got}")
    kept = max(1, min(dimensions, count // IMAGES_PER_DIMENSION, first.shape[1]))
    a, b, explained = _project(first.astype(np.float64), second.astype(np.float64), kept)
    distance = gaussian_distance(a, b)
    rng, draws = np.random.default_rng(seed), np.zeros(resamples)
    for r in range(resamples):
        rows = rng.integers(len(a), size=len(a))
        draws[r] = gaussian_distance(a[rows], b[rows if is_paired else rng.integers(len(b), size=len(b))])
    low, high = np.quantile(draws, (0.025, 0.975)) - draws.mean() if resamples else (0.0, 0.0)
    return FrechetResult(
        distance,
        max(0.0, distance + float(low)),
        distance + float(high),
        (len(a), len(b)),
        kept,
        explained,
        resamples,
    )


def _project(first: np.ndarray, second: np.ndarray, kept: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Both sets on the `kept` leading principal axes of the first, and the variance share of these."""
    centre = first.mean(0)
    _, singular, axes = np.linalg.svd(first - centre, full_matrices=False)
    energy = float(np.square(singular).sum())
    explained = float(np.square(singular[:kept]).sum()) / energy if energy > 0 else 1.0
    basis = axes[:kept].T
    return (first - centre) @ basis, (second - centre) @ basis, explained


def gaussian_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of two Gaussians fitted to [N, D] and [M, D] float64."""
    shift = a.mean(0) - b.mean(0)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    # root = S1^(1/2), and tr (S1 S2)^(1/2) = tr (root S2 root)^(1/2), which stays symmetric
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return max(0.0, float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross))
