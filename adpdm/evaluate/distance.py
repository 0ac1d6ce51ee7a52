"""How far two sets of images are apart: Frechet and kernel distance, and errors image by image in pairs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adpdm.evaluate.extractors import INSTALL_SENTENCE, Lite0, load_lite0, load_lpips
from adpdm.evaluate.frechet import MIN_IMAGES, FrechetResult, frechet_distance
from adpdm.evaluate.inception import Inception, fid
from adpdm.evaluate.kernel import KernelResult, kernel_distance
from adpdm.evaluate.metrics import psnr_per_image
from adpdm.evaluate.sample_set import SampleSet
from adpdm.evaluate.sampling import Progress, batches

MOST_DB = 60.0  # of one image: more than 8-bit pixels can tell apart


@dataclass(frozen=True)
class SetDistance:
    """Two sets of images.

    Args:
        frechet: on EfficientNet-Lite0 features, not FID. Few images bias it upwards.
        psnr_db, lpips: mean over images of the same noise under the same condition; None for sets that are
            not paired, and where the network of LPIPS is missing.
        fid: on Inception features, where that network was given.
        kernel: on all EfficientNet-Lite0 features, not KID. Unbiased: the one to read for few images.
        kid: on Inception features, where that network was given.
    """

    frechet: FrechetResult
    num_images: tuple[int, int]
    psnr_db: float | None
    lpips: float | None
    fid: float | None = None
    kernel: KernelResult | None = None
    kid: KernelResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def set_distance(
    first: Path | str,
    second: Path | str,
    *,
    dimensions: int = 32,
    resamples: int = 200,
    batch_size: int = 64,
    cache_dir: Path | None = None,
    inception: Path | None = None,
    progress: Progress | None = None,
) -> SetDistance:
    """Measure two folders of `sample_set`, or files .npy of images [N, H, W, C] u8.

    Args:
        dimensions, resamples: as of `frechet_distance`.
        cache_dir: where the LPIPS weights lie; None is the platform's cache.
        inception: file of the network of FID and KID, see `Inception`; None measures neither.

    Raises:
        ValueError: for other files, for images of different shapes and for too few.
        ImportError: without EfficientNet-Lite0.
    """
    first, second = Path(first), Path(second)
    a, b = _images(first), _images(second)
    if a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < MIN_IMAGES:
        raise ValueError(
            f"wanted at least {MIN_IMAGES} images of one shape [H, W, C] in both sets, got {a.shape} and "
            f"{b.shape}"
        )
    lite0 = load_lite0()
    if lite0 is None:
        raise ImportError(f"the Frechet distance needs EfficientNet-Lite0: {INSTALL_SENTENCE}")
    network = None if inception is None else Inception(inception)
    report = progress or _no_progress
    is_paired = _origin(first) == _origin(second) is not None and len(a) == len(b)
    sets = [
        _lite0_features(lite0, images, batch_size, f"features of the {name} set", report)
        for images, name in ((a, "first"), (b, "second"))
    ]
    frechet = frechet_distance(*sets, dimensions=dimensions, resamples=resamples, is_paired=is_paired)
    kernel = kernel_distance(*sets, is_paired=is_paired)
    psnr_db = lpips = fid_found = kid = None
    if is_paired:
        psnr_db, lpips = _paired(a, b, batch_size, cache_dir, report)
    if network is not None:
        sets = [
            network.features(images, batch_size, f"Inception, {name} set", report)
            for images, name in ((a, "first"), (b, "second"))
        ]
        fid_found, kid = fid(*sets), kernel_distance(*sets, is_paired=is_paired)
    return SetDistance(frechet, (len(a), len(b)), psnr_db, lpips, fid_found, kernel, kid)


def _lite0_features(
    lite0: Lite0, images: np.ndarray, batch_size: int, what: str, progress: Progress
) -> np.ndarray:
    """[N, 1280] f32 of images [N, H, W, C] u8."""
    parts = []
    for rows in batches(len(images), batch_size):
        parts.append(lite0.features(_as_float(images[rows])))
        progress(rows.stop, len(images), what)
    return np.concatenate(parts)


def _paired(
    a: np.ndarray, b: np.ndarray, batch_size: int, cache_dir: Path | None, progress: Progress
) -> tuple[float, float | None]:
    """PSNR and LPIPS, means over images; equal images, whose PSNR is infinite, count as MOST_DB."""
    network = load_lpips(cache_dir)
    decibels, distances = [], []
    for rows in batches(len(a), batch_size):
        x, y = _as_float(a[rows]), _as_float(b[rows])
        decibels.append(np.minimum(psnr_per_image(x, y), MOST_DB))
        if network is not None:
            distances.append(network.distance(x, y).double().numpy())
        progress(rows.stop, len(a), "images in pairs")
    lpips = float(np.concatenate(distances).mean()) if distances else None
    return float(np.concatenate(decibels).mean()), lpips


def _images(path: Path) -> np.ndarray:
    """[N, H, W, C] u8."""
    if path.is_dir():
        return SampleSet.open(path).images()
    if path.suffix != ".npy" or not path.is_file():
        raise ValueError(f"wanted a folder of `adpdm dataset` or a file .npy of images, got {path}")
    try:
        images: np.ndarray = np.load(path, allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError(f"{path} must hold images [N, H, W, C] u8, got no array of numbers") from None
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"{path} must hold images [N, H, W, C] u8, got {images.shape} {images.dtype}")
    return images


def _origin(path: Path) -> tuple[int, int, str] | None:
    """What gives image i of two sets the same noise, condition and schedule; None for a file."""
    if not path.is_dir():
        return None
    manifest = SampleSet.open(path).manifest
    settings = manifest["settings"]
    return int(settings["seed"]), int(settings["num_inference_steps"]), str(manifest["conditions"])


def _as_float(images: np.ndarray) -> Tensor:
    """[N, C, H, W] f32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _no_progress(done: int, total: int, what: str) -> None:
    """Tells nobody."""
