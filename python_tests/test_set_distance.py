"""Distances of sets of images, and how the images are read from the files."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adpdm.evaluate.distance
from adpdm.cli import main
from adpdm.evaluate import SampleSet, set_distance
from adpdm.evaluate.extractors import LPIPS_FILE
from adpdm.evaluate.words import distance_rows
from adpdm.testing import ONE_BLOCK, tiny_pipeline


class Features:
    """Stands for EfficientNet-Lite0: mean and spread of every image."""

    def features(self, images: torch.Tensor) -> np.ndarray:
        flat = images.flatten(1)
        return torch.stack([flat.mean(1), flat.std(1)], 1).numpy()


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adpdm.evaluate.distance, "load_lite0", Features)
    monkeypatch.setattr(adpdm.evaluate.distance, "load_lpips", lambda cache_dir: None)


def write_set(
    folder: Path, images: np.ndarray, seed: int = 0, conditions: str = "", chunk_size: int = 100
) -> Path:
    folder.mkdir()
    settings = {"num_images": len(images), "num_inference_steps": 2, "seed": seed, "chunk_size": chunk_size}
    manifest = {"format": 4, "fingerprint": "", "conditions": conditions, "settings": settings}
    (folder / "samples.json").write_text(json.dumps(manifest))
    for number, first in enumerate(range(0, len(images), chunk_size)):
        np.save(folder / f"images-{number:06d}.npy", images[first : first + chunk_size])
    return folder


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes that Python and NumPy hold at most meanwhile, of the second time: the first loads modules."""
    work()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("networks")
def test_large_sets_are_in_memory_once_or_in_parts(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (128, 64, 64, 3), dtype=np.uint8)
    sets = [write_set(tmp_path / name, images, chunk_size=16) for name in ("a", "b")]
    np.save(tmp_path / "c.npy", images)
    assert peak_of(SampleSet.open(sets[0]).images) < 1.1 * images.nbytes
    assert peak_of(lambda: set_distance(*sets, batch_size=2)) < images.nbytes / 2
    assert peak_of(lambda: set_distance(sets[0], tmp_path / "c.npy", batch_size=2)) < images.nbytes / 2


def test_a_slice_of_stored_images_is_that_of_all(tmp_path: Path) -> None:
    images = np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1)
    stored = SampleSet.open(write_set(tmp_path / "set", images, chunk_size=3)).stored()
    assert (len(stored), stored.shape) == (8, (8, 1, 1, 1))
    for rows in (slice(None), slice(1, 2), slice(2, 7), slice(3, 6), slice(7, 99), slice(4, 4)):
        assert np.array_equal(stored[rows], images[rows])


def test_files_of_other_images_are_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", np.zeros((6, 2, 2, 1), np.uint8), chunk_size=3)
    np.save(folder / "images-000001.npy", np.zeros((3, 2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"images of one shape .*, got \[\(2, 2, 1\), \(2, 2, 3\)\]"):
        SampleSet.open(folder).images()
    np.save(folder / "images-000001.npy", np.zeros((3, 2, 2, 1), np.float32))
    assert SampleSet.open(folder).missing() == [1]


@pytest.mark.usefixtures("networks")
def test_sets_of_one_seed_are_compared_image_by_image(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 200, (20, 4, 4, 1), dtype=np.uint8)
    first = write_set(tmp_path / "a", images)
    same = set_distance(first, write_set(tmp_path / "b", images))
    assert same.frechet.distance == pytest.approx(0, abs=1e-9)
    assert same.psnr_db == 60.0
    assert same.kernel is not None
    assert (same.kernel.distance, same.kernel.deviation) == (0, 0)  # pairs are known: no image meets its twin
    assert same.kid is None
    shifted = set_distance(first, write_set(tmp_path / "c", images + 5))
    # Means move by 5 / 127.5 and spreads by nothing; every pixel is off by 5 of 255.
    assert shifted.frechet.distance == pytest.approx((5 / 127.5) ** 2, rel=1e-3)
    assert shifted.psnr_db == pytest.approx(20 * np.log10(255 / 5), abs=1e-3)
    assert shifted.lpips is None
    other = set_distance(first, write_set(tmp_path / "d", images, seed=1))
    assert other.psnr_db is None
    assert set_distance(first, write_set(tmp_path / "e", images, conditions="text")).psnr_db is None
    np.save(tmp_path / "real.npy", images)
    assert set_distance(first, tmp_path / "real.npy").psnr_db is None


@pytest.mark.usefixtures("networks")
def test_first_images_of_the_larger_set_stand_against_all_of_the_other(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 200, (24, 4, 4, 1), dtype=np.uint8)
    sets = (write_set(tmp_path / "a", images), write_set(tmp_path / "b", images[:20] + 5))
    for first, second in (sets, sets[::-1]):
        found = set_distance(first, second, batch_size=7)
        assert found.psnr_db == pytest.approx(20 * np.log10(255 / 5), abs=1e-3)
        assert found.kernel is not None
        assert (found.num_pairs, found.kernel.num_images) == (20, (20, 20))
        assert sorted(found.frechet.num_images) == [20, 24]
        assert distance_rows(found)["mean PSNR of images of one seed"] == "34.15 dB, the first 20 images"


@pytest.mark.usefixtures("networks")
def test_sets_that_are_not_paired_say_why(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 200, (20, 4, 4, 1), dtype=np.uint8)
    first = write_set(tmp_path / "a", images)
    second = write_set(tmp_path / "b", images, seed=1, conditions="text")
    np.save(tmp_path / "real.npy", images)
    wanted = {
        second: "the sets differ in seed and scheduler, conditioning, call or guidance",
        tmp_path / "real.npy": "a file .npy does not say what its images were sampled from",
    }
    for other, why in wanted.items():
        assert distance_rows(set_distance(first, other))["image by image"] == f"not compared: {why}"


@pytest.mark.usefixtures("networks")
def test_sets_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    first = write_set(tmp_path / "a", np.zeros((20, 4, 4, 1), np.uint8))
    np.save(tmp_path / "shape.npy", np.zeros((20, 8, 8, 1), np.uint8))
    np.save(tmp_path / "float.npy", np.zeros((20, 4, 4, 1), np.float32))
    np.save(tmp_path / "few.npy", np.zeros((3, 4, 4, 1), np.uint8))
    for name, sentence in (
        ("shape.npy", "images of one shape"),
        ("few.npy", "wanted at least 16 images"),
        ("float.npy", r"must hold images \[N, H, W, C\] u8"),
        ("nothing.npy", "wanted a folder of `adpdm dataset` or a file .npy"),
    ):
        with pytest.raises(ValueError, match=sentence):
            set_distance(first, tmp_path / name)


def test_damaged_networks_are_found_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adpdm.evaluate.distance, "load_lite0", Features)
    monkeypatch.setattr(Features, "features", lambda *_: pytest.fail("measured"))
    (tmp_path / LPIPS_FILE).write_bytes(b"not safetensors")
    images = np.zeros((20, 4, 4, 1), np.uint8)
    sets = [write_set(tmp_path / name, images) for name in ("a", "b")]
    with pytest.raises(ValueError, match="is damaged"):
        set_distance(*sets, cache_dir=tmp_path)


@pytest.mark.usefixtures("networks")
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline(**ONE_BLOCK).save_pretrained(tmp_path / "model")
    for name, seed in (("a", "0"), ("b", "1")):
        words = ["--images", "18", "--steps", "2", "--batch", "9", "--seed", seed]
        assert main(["dataset", str(tmp_path / "model"), "--out", str(tmp_path / name), *words]) == 0
    capsys.readouterr()
    assert main(["distance", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_images"] == [18, 18]
    assert found["frechet"]["distance"] > 0
    assert found["kernel"]["num_images"] == [18, 18]
    assert found["kernel"]["subsets"] == 1
    assert main(["distance", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    text = " ".join(capsys.readouterr().err.split())
    assert "Kernel distance (EfficientNet-Lite0)" in text
    assert "with standard error" in text
    assert "KID" not in text  # which is Inception's
    words = ["--images", "18", "--steps", "3", "--batch", "9"]
    assert main(["dataset", str(tmp_path / "model"), "--out", str(tmp_path / "a"), *words]) == 1


def test_file_that_is_no_array_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"junk")
    with pytest.raises(ValueError, match="x.npy must hold images .* got no array of numbers"):
        set_distance(str(tmp_path / "x.npy"), str(tmp_path / "x.npy"))
