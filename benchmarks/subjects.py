"""The trained models that accuracy is measured on, each with what sampling from it takes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from adpdm.evaluate import GuidedDenoiser

MODELS = Path(__file__).resolve().parents[1] / "models"
KINDS: dict[str, Any] = {"unet": UNet2DModel, "transformer": DiTTransformer2DModel}


@dataclass(frozen=True)
class Subject:
    """A folder with a denoiser and its scheduler beside it.

    Args:
        part: folder of the denoiser, `unet` or `transformer`.
        checksum: sha256 of its weights, 16 hexadecimal digits.
    """

    folder: Path
    part: str
    checksum: str

    @property
    def name(self) -> str:
        return self.folder.name

    def denoiser(self) -> nn.Module:
        """A fresh one, in float32."""
        loaded: nn.Module = KINDS[self.part].from_pretrained(
            self.folder / self.part, torch_dtype=torch.float32
        )
        return loaded.eval()

    def scheduler(self) -> DDIMScheduler:
        return DDIMScheduler.from_pretrained(self.folder / "scheduler")

    def conditioning(
        self, denoiser: Any, count: int | None = None, *, with_none: bool = False
    ) -> dict[str, Tensor]:
        """Arguments of `count` images: the classes of a class-conditional denoiser in turn, or each once.

        Args:
            with_none: count the class for none among them, as guidance will ask for it.
        """
        classes = getattr(denoiser.config, "num_embeds_ada_norm", None)
        if classes is None:
            return {}
        classes += with_none
        return {"class_labels": torch.arange(count or classes) % classes}

    def guided(self, denoiser: Any, scale: float | None) -> nn.Module:
        """The denoiser under classifier-free guidance away from the class for none; itself without a scale.

        Raises:
            ValueError: for a scale of a denoiser that knows no classes.
        """
        if scale is None:
            return denoiser  # type: ignore[no-any-return]
        classes = getattr(denoiser.config, "num_embeds_ada_norm", None)
        if classes is None:
            raise ValueError(f"guidance needs a class-conditional model; {self.name} has no class for none")
        return GuidedDenoiser(denoiser, scale, null_class=classes)


def find_subject(name: str) -> Subject:
    """A model of `models/` by its name, or any folder.

    Raises:
        ValueError: for a folder without a denoiser and a scheduler.
    """
    folder = MODELS / name if (MODELS / name).is_dir() else Path(name)
    for part in KINDS:
        weights = sorted((folder / part).glob("*.safetensors"))
        if weights and (folder / "scheduler").is_dir():
            digest = hashlib.sha256(b"".join(file.read_bytes() for file in weights)).hexdigest()
            return Subject(folder, part, digest[:16])
    raise ValueError(f"wanted a folder with unet/ or transformer/ and scheduler/, got {folder}")
