"""Samples of a trained model folder, one seed per image, kept batch by batch, and how good they are."""

from __future__ import annotations

import functools
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adpdm.evaluate import SampleSettings, frechet_distance, sample_set
from adpdm.evaluate.frechet import FrechetResult
from adpdm.model_folder import ModelFolder

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_model(folder: Path) -> ModelFolder:
    """What a training script wrote.

    Raises:
        ValueError: the folder is not what a training script writes.
    """
    try:
        model = ModelFolder.open(folder)
    except ValueError:
        model = None
    if model is None or not model.record:
        raise ValueError(
            f"{folder} must hold unet/ or transformer/, scheduler/ and training.json, "
            "as the training scripts write them"
        )
    return model


@dataclass(frozen=True)
class Sampling:
    """How images are sampled.

    Args:
        guidance: scale of classifier-free guidance; 1 for none.
        batch_size: of the files as well.
    """

    steps: int = 50
    seed: int = 0
    guidance: float = 1.0
    batch_size: int = 50


class Samples:
    """Images 0, 1, ... of a model and a seed in files of a batch; image i is of class i modulo the classes.

    Args:
        cache: folder for the files; those of other weights or settings are left alone.
    """

    def __init__(self, model: ModelFolder, sampling: Sampling, cache: Path, device: str) -> None:
        self.model, self.sampling, self.device = model, sampling, device
        weights = (model.folder / model.part / WEIGHTS).read_bytes()
        key = hashlib.sha256(weights + repr((sampling, device)).encode())
        self.folder = cache / key.hexdigest()[:16]

    @functools.cached_property
    def denoiser(self) -> Any:
        """On the device, under guidance where that is wanted."""
        denoiser = self.model.denoiser().requires_grad_(False)
        denoiser = denoiser.to(self.device, memory_format=torch.channels_last)
        scale = self.sampling.guidance
        return self.model.guided(denoiser, None if scale == 1.0 else scale)

    def images(self, count: int) -> np.ndarray:
        """The first `count` images, [N, H, W, C] u8; samples those that are not there yet, tells progress."""
        given = {name: rows.to(self.device) for name, rows in self.model.conditioning().items()}
        start = time.monotonic()

        def tell(what: str, done: int, total: int) -> None:
            left = (total - done) * (time.monotonic() - start) / done / 60
            print(f"{what}: {done}/{total}, {left:.0f} min left", flush=True)

        decode = self.model.decoder(self.denoiser)
        found = sample_set(
            self.denoiser,
            self.model.scheduler(),
            self.folder,
            SampleSettings(count, self.sampling.steps, self.sampling.seed, self.sampling.batch_size),
            conditioning=given,
            decode=decode,
            progress=tell,
        )
        return found.images()


@dataclass(frozen=True)
class Quality:
    """Frechet distances on EfficientNet-Lite0 features, not FID.

    Args:
        samples: of sampled images to training images.
        floor: of as many other training images to the same ones: what a perfect model would have.
    """

    samples: FrechetResult
    floor: FrechetResult


def measure(
    lite0: Any,
    sampled: np.ndarray,  # [N, H, W, C] u8
    real: Tensor,  # [M, C, H, W] u8
    seed: int,
) -> Quality:
    """Frechet distances of N samples, and of N training images, to N others; M is at least 2 N."""
    count = len(sampled)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    first, second = real[order[:count]], real[order[count : 2 * count]]
    sets = (first, second, torch.from_numpy(sampled).permute(0, 3, 1, 2))
    features = [
        _features(lite0, images, name) for images, name in zip(sets, ("1/3", "2/3", "3/3"), strict=True)
    ]
    return Quality(
        frechet_distance(features[0], features[2], seed=seed),
        frechet_distance(features[0], features[1], seed=seed),
    )


def _features(
    lite0: Any,
    images: Tensor,  # [N, C, H, W] u8
    name: str,
    batch_size: int = 100,
) -> np.ndarray:
    """[N, 1280] f32; tells progress."""
    parts = []
    for batch in images.split(batch_size):
        parts.append(lite0.features(batch.float() / 127.5 - 1))
        if len(parts) % 10 == 0:
            print(f"features of set {name}: {len(parts) * batch_size}/{len(images)}", flush=True)
    return np.concatenate(parts)
