"""Folders that the training examples write: a denoiser, its scheduler, and what sampling from them takes."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .conditioning import decoder_of
from .denoisers import DENOISER_NAMES, load_denoiser, load_pipeline, load_scheduler
from .evaluate import GuidedDenoiser
from .evaluate.sampling import sample_shape
from .pipeline import encode_texts

RECORD_FILE = "training.json"  # of the training examples


@dataclass(frozen=True)
class ModelFolder:
    """A denoiser in diffusers format with its scheduler beside it; a whole pipeline where it reads texts.

    Args:
        part: folder of the denoiser, "unet" or "transformer".
        checksum: sha256 of its weights, 16 hexadecimal digits.
    """

    folder: Path
    part: str
    checksum: str

    @classmethod
    def open(cls, folder: Path) -> ModelFolder:
        """The model in a folder.

        Raises:
            ValueError: for a folder without a denoiser and a scheduler.
        """
        for part in DENOISER_NAMES:
            weights = sorted((folder / part).glob("*.safetensors"))
            if weights and (folder / "scheduler").is_dir():
                digest = hashlib.sha256(b"".join(file.read_bytes() for file in weights)).hexdigest()
                return cls(folder, part, digest[:16])
        raise ValueError(f"wanted a folder with unet/ or transformer/ and scheduler/, got {folder}")

    @property
    def name(self) -> str:
        return self.folder.name

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """How it was trained; empty where that was not recorded."""
        file = self.folder / RECORD_FILE
        return json.loads(file.read_text()) if file.is_file() else {}

    def denoiser(self) -> Any:
        """A fresh one, in float32."""
        return load_denoiser(self.folder / self.part).eval()

    def scheduler(self) -> Any:
        """That of the folder; DDIM with the noise schedule of the training where it holds that alone."""
        return load_scheduler(self.folder / "scheduler")

    @functools.cached_property
    def captions(self) -> list[str]:
        """A text for each class; none for a model that reads no texts."""
        return list(self.record.get("captions", []))

    @functools.cached_property
    def num_classes(self) -> int | None:
        """Of its classes, or texts that stand for them; None for an unconditional model."""
        config = json.loads((self.folder / self.part / "config.json").read_text())
        return config.get("num_embeds_ada_norm") or self.record.get("num_classes")

    def conditioning(self, count: int | None = None, *, with_none: bool = False) -> dict[str, Tensor]:
        """Arguments of `count` images: classes or captions in turn, or each once.

        Args:
            with_none: count the class for none, or the empty text, among them, as guidance will ask for it.
        """
        if self.num_classes is None:
            return {}
        classes = self.num_classes + with_none
        rows = torch.arange(count or classes, device="cpu") % classes
        return {"encoder_hidden_states": self._texts[rows]} if self.captions else {"class_labels": rows}

    def guided(self, denoiser: Any, scale: float | None) -> Any:
        """A denoiser under classifier-free guidance away from none; itself without a scale.

        Raises:
            ValueError: for a scale of an unconditional model.
        """
        if scale is None:
            return denoiser
        if self.num_classes is None:
            raise ValueError(f"guidance needs a conditional model; {self.name} is given no classes or texts")
        if self.captions:
            return GuidedDenoiser(denoiser, scale, null_text=self._texts[-1:])
        return GuidedDenoiser(denoiser, scale, null_class=self.num_classes)

    @property
    def null_conditioning(self) -> dict[str, Tensor] | None:
        """What stands for none, for `adpdm.quantize`; None where that is known."""
        return {"encoder_hidden_states": self._texts[-1:]} if self.captions else None

    def decoder(self, denoiser: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """From samples to images; None where samples are images."""
        return decoder_of(self._pipeline, sample_shape(denoiser)) if self.captions else None

    @functools.cached_property
    def _pipeline(self) -> Any:
        """With the parts that encode texts and decode latents."""
        return load_pipeline(self.folder, local_files_only=True)

    @functools.cached_property
    def _texts(self) -> Tensor:
        """Embeddings of the captions and, last, of the empty text, [K + 1, L, D] f32."""
        return encode_texts("model folder", self._pipeline, [*self.captions, ""])
