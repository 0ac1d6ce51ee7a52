"""FID with a TorchScript network of the right interface, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adpdm.evaluate.distance
from adpdm.evaluate import kernel_distance, set_distance
from adpdm.evaluate.inception import FEATURES, Inception, fid


class Means(nn.Module):
    """Stands for the network: its first features are the mean and twice the mean of an image."""

    def __init__(self, features: int = FEATURES) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        mean = images.float().mean((1, 2, 3))
        result = torch.zeros(images.shape[0], self.features)
        result[:, 0] = mean
        result[:, 1] = 2 * mean
        return result


class Deaf(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


def saved(folder: Path, network: nn.Module) -> Path:
    path = folder / f"{type(network).__name__}.pt"
    torch.jit.script(network).save(path)
    return path


def images_of(means: list[int], channels: int = 1) -> np.ndarray:
    return np.stack([np.full((4, 4, channels), mean, np.uint8) for mean in means])


def quiet(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def test_features_of_grey_and_coloured_images(tmp_path: Path) -> None:
    network = Inception(saved(tmp_path, Means()))
    for channels in (1, 3):
        found = network.features(images_of([10, 20, 30], channels), 2, "test", quiet)
        assert found.shape == (3, FEATURES)
        assert found[:, 1].tolist() == [20, 40, 60]


def test_fid_is_that_of_two_gaussians() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(0, 1, (200, 3))
    assert fid(first, first) == pytest.approx(0, abs=1e-9)
    assert fid(first, first + [1, 0, 2]) == pytest.approx(5)  # means alone differ
    variance = np.cov(first, rowvar=False).trace()
    assert fid(first, 3 * first - 2 * first.mean(0)) == pytest.approx(2**2 * variance)  # spreads alone


def test_distance_of_sets_measures_fid_where_the_network_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Features:
        def features(self, images: Tensor) -> np.ndarray:
            return images.flatten(1)[:, :4].numpy()

    monkeypatch.setattr(adpdm.evaluate.distance, "load_lite0", Features)
    np.save(tmp_path / "a.npy", images_of(list(range(20))))
    np.save(tmp_path / "b.npy", images_of(list(range(5, 25))))
    sets = (tmp_path / "a.npy", tmp_path / "b.npy")
    without = set_distance(*sets)
    assert without.fid is without.kid is None
    seen: list[str] = []
    found = set_distance(
        *sets, inception=saved(tmp_path, Means()), progress=lambda phase, done, total: seen.append(phase)
    )
    assert found.fid == pytest.approx(5**2 + 10**2)
    assert found.to_dict()["fid"] == found.fid
    network = [Inception(saved(tmp_path, Means())).features(np.load(x), 8, "", quiet) for x in sets]
    assert found.kid == kernel_distance(*network)
    assert found.kernel != found.kid
    assert {"Inception, first set", "Inception, second set"} <= set(seen)


def test_files_that_are_no_such_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"FID needs the TorchScript network .*, got .*nothing, which is no"):
        Inception(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="text must hold TorchScript, such as inception-2015-12-05.pt"):
        Inception(tmp_path / "text")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="weights must hold TorchScript"):
        Inception(tmp_path / "weights")
    with pytest.raises(ValueError, match=r"Deaf.pt must take images with return_features=True"):
        Inception(saved(tmp_path, Deaf())).features(images_of([1]), 1, "test", quiet)
    with pytest.raises(ValueError, match=r"Means.pt must give \[1, 2048\] features, got \[1, 7\]"):
        Inception(saved(tmp_path, Means(7))).features(images_of([1]), 1, "test", quiet)
