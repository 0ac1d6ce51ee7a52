"""Kernel distance between two sets of feature vectors, which few images do not bias, with its error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_SUBSETS = 10  # fewer estimates give no spread to speak of; then one of all images has the smaller error
SUBSET_SIZE = 1000  # images of a subset, as Binkowski et al. publish
MOST_IMAGES = MIN_SUBSETS * SUBSET_SIZE  # of a set in one estimate: its time grows with the square
ROWS = 1024  # of a kernel matrix at a time: 80 MB for MOST_IMAGES columns
MIN_VECTORS = 3  # the jackknife leaves one out, and two are left to make a pair


@dataclass(frozen=True)
class KernelResult:
    """Squared maximum mean discrepancy under the kernel (x.y / F + 1)^3, unbiased: below 0 by chance.

    It is KID where the features are those of Inception. Other features have other magnitudes, to which the
    kernel is not indifferent, so that figures on one network do not compare with figures on another.

    Args:
        distance: mean over the subsets; its standard error is deviation / sqrt(subsets).
        deviation: standard deviation of the estimate of one subset: between subsets, or by jackknife where
            all images are one subset. The jackknife is too large rather than too small (Efron and Stein
            1981), about twofold in variance for two sets of one distribution.
        num_images: of the first and the second set.
        subsets: estimates in the mean; no image is in two of them.
        subset_size: images of the first and the second set in one of them.
    """

    distance: float
    deviation: float
    num_images: tuple[int, int]
    subsets: int
    subset_size: tuple[int, int]


def kernel_distance(
    first: np.ndarray,  # [N, F] float
    second: np.ndarray,  # [M, F] float
    *,
    seed: int = 0,
    is_paired: bool = False,
) -> KernelResult:
    """Mean and spread over random subsets of 1000 images; below 10 of them one estimate and a jackknife.

    Features are taken as they are, not on principal components as for `frechet_distance`: no covariance is
    estimated that would need fewer dimensions, and axes fitted to one of the sets would bias the estimate.

    Args:
        seed: of the subsets, and of the 10 000 images that one estimate has at most.
        is_paired: row i of both sets comes from the same noise. Subsets draw such rows together, and the
            kernel of such rows is left out, which their dependence would bias.

    Raises:
        ValueError: the sets do not fit each other or hold fewer than 3 images.

    Source: Binkowski, Sutherland, Arbel and Gretton, "Demystifying MMD GANs", 2018, section 4 (kernel,
    subsets); Gretton et al., "A Kernel Two-Sample Test", 2012, Eq. 3 and, for paired sets, Eq. 4.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"kernel_distance: wanted [N, F] and [M, F], got {first.shape} and {second.shape}")
    counts = (len(first), len(second))
    if min(counts) < MIN_VECTORS:
        raise ValueError(
            f"kernel_distance: wanted at least {MIN_VECTORS} images in each set, got {counts[0]} and "
            f"{counts[1]}"
        )
    if is_paired and counts[0] != counts[1]:
        raise ValueError(
            f"kernel_distance: paired sets must be equally long, got {counts[0]} and {counts[1]}"
        )
    rng = np.random.default_rng(seed)
    left = rng.permutation(counts[0])
    right = left if is_paired else rng.permutation(counts[1])
    subsets = min(counts) // SUBSET_SIZE
    if subsets < MIN_SUBSETS:
        a, b = first[left[:MOST_IMAGES]], second[right[:MOST_IMAGES]]
        distance, error = _estimate(a, b, is_paired)
        return KernelResult(distance, error, counts, 1, (len(a), len(b)))
    parts = [slice(i * SUBSET_SIZE, (i + 1) * SUBSET_SIZE) for i in range(subsets)]
    found = [_estimate(first[left[part]], second[right[part]], is_paired)[0] for part in parts]
    spread = float(np.std(found, ddof=1))
    return KernelResult(float(np.mean(found)), spread, counts, subsets, (SUBSET_SIZE, SUBSET_SIZE))


def _estimate(a: np.ndarray, b: np.ndarray, is_paired: bool) -> tuple[float, float]:
    """Unbiased estimate of the squared discrepancy of [n, F] and [m, F], and its jackknife error."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    n, m = len(a), len(b)
    of_a, of_b = (_kernel_sums(x, x, is_diagonal_left_out=True)[0] for x in (a, b))
    rows, columns = _kernel_sums(a, b, is_diagonal_left_out=is_paired)
    within_a, without_a = _mean_and_without_one(of_a)
    within_b, without_b = _mean_and_without_one(of_b)
    if is_paired:
        across, without = _mean_and_without_one((rows + columns) / 2)
        left_out = without_a + without_b - 2 * without
        return within_a + within_b - 2 * across, float(np.sqrt(_jackknife_variance(left_out)))
    across = rows.sum() / (n * m)
    without_row = without_a - 2 * (rows.sum() - rows) / ((n - 1) * m)
    without_column = without_b - 2 * (columns.sum() - columns) / (n * (m - 1))
    variance = _jackknife_variance(without_row) + _jackknife_variance(without_column)
    return float(within_a + within_b - 2 * across), float(np.sqrt(variance))


def _kernel_sums(
    a: np.ndarray,  # [n, F] f64
    b: np.ndarray,  # [m, F] f64
    is_diagonal_left_out: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the kernel matrix over its columns [n] and over its rows [m]."""
    rows, columns = np.zeros(len(a)), np.zeros(len(b))
    for start in range(0, len(a), ROWS):
        part = slice(start, start + ROWS)
        kernel = (a[part] @ b.T / a.shape[1] + 1) ** 3
        if is_diagonal_left_out:
            np.fill_diagonal(kernel[:, part], 0.0)
        rows[part] = kernel.sum(1)
        columns += kernel.sum(0)
    return rows, columns


def _mean_and_without_one(sums: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over ordered pairs of n from sums [n] over partners, and [n] the means without one of them."""
    n, total = len(sums), sums.sum()
    return float(total / (n * (n - 1))), (total - 2 * sums) / ((n - 1) * (n - 2))


def _jackknife_variance(
    left_out: np.ndarray,  # [n], estimates that leave out one
) -> float:
    return float(np.square(left_out - left_out.mean()).sum() * (len(left_out) - 1) / len(left_out))
