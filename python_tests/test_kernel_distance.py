"""Kernel distance: against its double sum, its expectation and error, subsets, pairs, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from adpdm.evaluate import kernel, kernel_distance


def double_sum(a: np.ndarray, b: np.ndarray, is_paired: bool) -> float:
    """The unbiased estimate, kernel by kernel."""

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    def within(x: np.ndarray) -> float:
        return float(np.mean([k(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j]))

    pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (is_paired and i == j)]
    return within(a) + within(b) - 2 * float(np.mean([k(a[i], b[j]) for i, j in pairs]))


def sets(n: int, m: int, features: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, features)), rng.normal(size=(m, features)) + 0.3


@pytest.mark.parametrize(("is_paired", "m"), [(True, 9), (False, 9), (False, 6)])
@pytest.mark.parametrize("rows", [4, 1024])
def test_kernel_distance_is_the_double_sum(
    is_paired: bool, m: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "ROWS", rows)  # also where the matrix comes in parts
    a, b = sets(9, m)
    found = kernel_distance(a, b, is_paired=is_paired)
    assert found.distance == pytest.approx(double_sum(a, b, is_paired), rel=1e-12)
    assert (found.num_images, found.subsets, found.subset_size) == ((9, m), 1, (9, m))


def test_kernel_distance_of_known_points() -> None:
    # (x y + 1)^3 of one feature: 1 among zeros, 8 among ones, 1 between
    zeros, ones = np.zeros((3, 1)), np.ones((4, 1))
    assert kernel_distance(zeros, ones).distance == 1 + 8 - 2
    assert kernel_distance(zeros, ones).deviation == 0


def test_jackknife_leaves_out_a_pair_or_an_image_of_either_set() -> None:
    def variance(left_out: list[float]) -> float:
        n = len(left_out)
        return float(np.var(left_out) * (n - 1))

    a, b = sets(8, 8)
    pairs = [double_sum(np.delete(a, i, 0), np.delete(b, i, 0), True) for i in range(8)]
    paired = kernel_distance(a, b, is_paired=True)
    assert paired.deviation == pytest.approx(variance(pairs) ** 0.5)
    b = b[:6]
    of_a = [double_sum(np.delete(a, i, 0), b, False) for i in range(8)]
    of_b = [double_sum(a, np.delete(b, i, 0), False) for i in range(6)]
    apart = kernel_distance(a, b)
    assert apart.deviation == pytest.approx((variance(of_a) + variance(of_b)) ** 0.5)


@pytest.mark.parametrize("is_paired", [True, False])
def test_kernel_distance_of_few_images_of_one_distribution_is_zero_on_average(is_paired: bool) -> None:
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        common = rng.normal(size=(30, 8)) if is_paired else 0.0
        first, second = (common + 0.5 * rng.normal(size=(30, 8)) for _ in range(2))
        found.append(kernel_distance(first, second, is_paired=is_paired))
    distances = np.array([f.distance for f in found])
    assert abs(distances.mean()) < 3 * distances.std() / 200**0.5
    assert (distances < 0).any()
    # conservative, by Efron and Stein, and not by more than the twofold variance of a degenerate statistic
    ratio = np.mean([f.deviation**2 for f in found]) / distances.var()
    assert 1 < ratio < 3


def test_many_images_are_measured_in_disjoint_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SUBSET_SIZE", 20)
    a, b = sets(215, 230)
    found, again, other = (kernel_distance(a, b, seed=s) for s in (0, 0, 1))
    assert found == again
    assert found.distance != other.distance
    assert (found.subsets, found.subset_size, found.num_images) == (10, (20, 20), (215, 230))
    rng = np.random.default_rng(0)
    left, right = rng.permutation(215)[:200].reshape(10, 20), rng.permutation(230)[:200].reshape(10, 20)
    wanted = [double_sum(a[i], b[j], False) for i, j in zip(left, right, strict=True)]
    assert found.distance == pytest.approx(np.mean(wanted))
    assert found.deviation == pytest.approx(np.std(wanted, ddof=1))


def test_subsets_draw_pairs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SUBSET_SIZE", 20)
    a, _ = sets(200, 200)
    found = kernel_distance(a, a, is_paired=True)
    assert (found.distance, found.deviation) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))


def test_one_estimate_draws_from_a_set_that_is_much_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "MOST_IMAGES", 12)
    a, b = sets(8, 50)
    found = kernel_distance(a, b)
    assert (found.subset_size, found.num_images) == ((8, 12), (8, 50))


def test_sets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kernel_distance: wanted \[N, F\] and \[M, F\], got \(3, 2\) and"):
        kernel_distance(np.zeros((3, 2)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="at least 3 images in each set, got 2 and 4"):
        kernel_distance(np.zeros((2, 2)), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="paired sets must be equally long, got 3 and 4"):
        kernel_distance(np.zeros((3, 2)), np.zeros((4, 2)), is_paired=True)
