"""The images that the examples train on: where they come from, their licence, how they are read."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ImageData:
    """A set of labelled training images.

    Args:
        load: path -> images [N, C, 32, 32] u8 and labels [N] i64; SystemExit says what is wrong with a path.
        wanted: what the path is, for the help of --data.
        about: source and licence, for model cards.
        fetch: commands that get the files.
    """

    name: str
    load: Callable[[Path], tuple[Tensor, Tensor]]
    wanted: str
    about: str
    fetch: tuple[str, ...]


def load_fashion_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """60 000 training images, zero-padded to 32x32, [60000, 1, 32, 32] u8, and their labels [60000] i64."""
    pixels = _read(folder / "train-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    labels = _read(folder / "train-labels-idx1-ubyte.gz", 8)
    return F.pad(torch.from_numpy(pixels), (2, 2, 2, 2)), torch.from_numpy(labels).long()


def _read(path: Path, header: int) -> np.ndarray:
    if not path.exists():
        raise SystemExit(f"wanted {path}, which does not exist; the head of this script says where to get it")
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header).copy()


def load_cifar10(path: Path) -> tuple[Tensor, Tensor]:
    """50 000 training images [50000, 3, 32, 32] u8 and labels [50000] i64, as fetch_cifar10.py wrote them."""
    if not path.is_file():
        raise SystemExit(f"wanted {path}, which is no file; make it with examples/fetch_cifar10.py")
    if not zipfile.is_zipfile(path):
        raise SystemExit(f"{path} is not what examples/fetch_cifar10.py writes, or damaged: no .npz file")
    try:
        with np.load(path) as stored:
            pixels, labels = stored["x_train"], stored["y_train"]
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise SystemExit(
            f"{path} is not what examples/fetch_cifar10.py writes, or damaged: {error}"
        ) from error
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (32, 32, 3) or len(labels) != len(pixels):
        raise SystemExit(
            f"{path}: wanted x_train [N, 32, 32, 3] of uint8 and N labels, "
            f"got {pixels.dtype} {pixels.shape} and {len(labels)} labels"
        )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()


FASHION_MNIST = ImageData(
    "Fashion-MNIST",
    load_fashion_mnist,
    "folder with train-images-idx3-ubyte.gz",
    "the 60 000 training images of Fashion-MNIST (Zalando, MIT licence; Xiao, Rasul and Vollgraf, 2017), "
    "grey, zero-padded from 28x28 to 32x32",
    ("apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist*.deb fm",),
)
CIFAR10 = ImageData(
    "CIFAR-10",
    load_cifar10,
    "file that fetch_cifar10.py wrote",
    'the 50 000 training images of CIFAR-10 (Krizhevsky, "Learning Multiple Layers of Features from Tiny '
    'Images", 2009), colour, 32x32. CIFAR-10 carries no explicit licence; none of its images are shipped',
    ("python examples/fetch_cifar10.py --out cifar10.npz",),
)
IMAGE_DATA = {data.name: data for data in (FASHION_MNIST, CIFAR10)}
