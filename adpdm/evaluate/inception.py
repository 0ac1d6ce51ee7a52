"""FID and KID, for those who have the Inception network: a TorchScript file of StyleGAN and EDM."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..progress import Progress
from .frechet import gaussian_distance
from .sample_set import StoredImages
from .sampling import in_batches

FEATURES = 2048
FILE_NAME = "inception-2015-12-05.pt"  # as NVIDIA publishes it with StyleGAN 2 and 3


class Inception:
    """Inception-v3 of 2015 as TorchScript, with the resizing of the original in it.

    Args: path: of the file; code in it is TorchScript, which reaches nothing outside of torch.

    Raises:
        ValueError: for a file that is no such network.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"FID needs the TorchScript network {FILE_NAME}, got {path}, which is no file")
        try:
            with warnings.catch_warnings():  # torch wants TorchScript replaced, which a published file is not
                warnings.simplefilter("ignore", DeprecationWarning)
                self.network: Any = torch.jit.load(path, map_location="cpu").eval()
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"{path} must hold TorchScript, such as {FILE_NAME}: {first}") from error
        self.path = path

    @torch.no_grad()
    def features(
        self,
        images: np.ndarray | StoredImages,  # [N, H, W, 1 or 3] u8
        batch_size: int,
        what: str,
        progress: Progress,
    ) -> np.ndarray:
        """[N, 2048] f64 of all images; tells `progress` how far it is, and `what` that is.

        Raises:
            ValueError: the network takes no such images, or gives no such features.
        """
        return in_batches(self._features, batch_size, what, progress, images)

    def _features(self, images: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        try:
            found = self.network(pixels.expand(-1, 3, -1, -1), return_features=True)
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            raise ValueError(f"{self.path} must take images with return_features=True: {last}") from error
        if not isinstance(found, torch.Tensor) or found.shape != (len(pixels), FEATURES):
            raise ValueError(
                f"{self.path} must give [{len(pixels)}, {FEATURES}] features, got "
                f"{list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__}"
            )
        return found.double()


def fid(
    first: np.ndarray,  # [N, 2048] float
    second: np.ndarray,  # [M, 2048] float
) -> float:
    """FID of two sets of features: all 2048 dimensions, no interval. Source: Heusel et al. 2017.

    It is biased upwards for few images; published figures are for 50 000.
    """
    return gaussian_distance(first.astype(np.float64), second.astype(np.float64))
