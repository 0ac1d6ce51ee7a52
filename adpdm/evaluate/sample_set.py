"""Large sets of samples on disk: resumable, shared by processes, the same bytes however many of them work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..files import replacing
from ..fingerprint import fingerprint_of, named_tensors
from ..nn.fusion import describe_fusion
from ..progress import Progress, silent
from ..schedulers import identity
from ..trajectory import Conditioning, DenoiserCall, pick
from .guidance import GuidedDenoiser
from .sampling import (
    demand_images,
    generate,
    sample_shape,
    shape_of_call,
    to_uint8,
)

MANIFEST_NAME = "samples.json"
# 1 did not know how the denoiser was called, nor the decoder; 2 not how it computes; 3 not what sets of two
# models have in common
FORMAT = 4


@dataclass(frozen=True)
class SampleSettings:
    """What the images of a set depend on besides the model.

    Args:
        num_images: of the whole set; a set may grow, its full files stay.
        chunk_size: images per file and per call of the denoiser. Rounding of a denoiser may depend on the
            batch, so it is fixed for a set, whatever the number of processes.

    Raises:
        ValueError: for a count below 1.
    """

    num_images: int
    num_inference_steps: int = 50
    seed: int = 0
    chunk_size: int = 64

    def __post_init__(self) -> None:
        for name in ("num_images", "num_inference_steps", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"SampleSettings: {name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class SampleSet:
    """A folder that `sample_set` fills."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str) -> SampleSet:
        """The set in a folder, complete or not.

        Raises:
            ValueError: for a folder without a manifest of this format, or with one that lacks something.
        """
        folder = Path(folder)
        file = folder / MANIFEST_NAME
        try:
            manifest = json.loads(file.read_text())
        except (OSError, ValueError) as error:  # ValueError: no JSON, or no text
            raise ValueError(f"{folder} must be a folder that `adpdm dataset` wrote: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError(f"{file} must have format {FORMAT}, got {manifest!r:.80}")
        if not _is_whole(manifest):
            raise ValueError(
                f"{file} must hold the settings, fingerprint and conditions of a set, got {manifest!r:.80}"
            )
        return cls(folder, manifest)

    @property
    def num_images(self) -> int:
        return int(self.manifest["settings"]["num_images"])

    def chunk(self, number: int) -> Path:
        return self.folder / f"images-{number:06d}.npy"

    @property
    def chunk_size(self) -> int:
        return int(self.manifest["settings"]["chunk_size"])

    def sizes(self) -> list[int]:
        """Images of every chunk."""
        size = self.chunk_size
        return [min(size, self.num_images - first) for first in range(0, self.num_images, size)]

    def missing(self) -> list[int]:
        """Chunks that are absent, damaged, or hold too few images, as the last one of a set that grew."""
        return [n for n, size in enumerate(self.sizes()) if not self._holds(n, size)]

    def _holds(self, number: int, size: int) -> bool:
        file = self.chunk(number)
        if not file.is_file():
            return False
        try:
            images = _mapped(file)
        except (ValueError, EOFError):  # empty, cut off, or something else
            return False
        return images.ndim == 4 and images.dtype == np.uint8 and len(images) >= size

    def images(self) -> np.ndarray:
        """All images, [N, H, W, C] u8.

        Raises:
            ValueError: if some are missing, or of another shape than others.
        """
        return self.stored()[:]

    def stored(self) -> StoredImages:
        """All images as they lie in the files, for those who read some at a time; raises as `images` does."""
        missing = self.missing()
        if missing:
            raise ValueError(
                f"{self.folder} must hold {self.num_images} images, {len(missing)} of its "
                f"{len(self.sizes())} files are missing or damaged; the command that began it makes them"
            )
        shapes = {_mapped(self.chunk(n)).shape[1:] for n in range(len(self.sizes()))}
        if len(shapes) > 1:
            raise ValueError(f"{self.folder} must hold images of one shape [H, W, C], got {sorted(shapes)}")
        return StoredImages(self, (self.num_images, *shapes.pop()))


@dataclass(frozen=True)
class StoredImages:
    """The images of a set, [N, H, W, C] u8 in `shape`; a slice of them is read from its files."""

    of: SampleSet
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, end, _ = rows.indices(len(self))
        result, size, at = np.empty((end - first, *self.shape[1:]), np.uint8), self.of.chunk_size, first
        while at < end:
            # a file at a time: mapped ones stay open, and a process may not open all of a large set
            number, start = divmod(at, size)
            stop = min(size, start + end - at)
            result[at - first : at - first + stop - start] = _mapped(self.of.chunk(number))[start:stop]
            at += stop - start
        return result


def sample_set(
    denoiser: nn.Module,
    scheduler: Any,
    folder: Path | str,
    settings: SampleSettings,
    *,
    conditioning: Conditioning | None = None,
    call: DenoiserCall | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    progress: Progress = silent,
) -> SampleSet:
    """Sample images 0 .. num_images - 1 of a seed into a folder, those that are not there yet.

    Under torchrun every process makes its share of the files, in a folder that all of them see; image i is
    the same for any number of processes and after any interruption, on the same kind of machine.

    Args:
        denoiser: on the device of this process.
        conditioning: tensors with the same number of rows each; image i uses row i modulo that number.
        call: what else the denoiser is given, as for `adpdm.quantize`.
        decode: from samples [B, *] to images [B, C, H, W] in [-1, 1]; None where samples are images, of 1
            or 3 channels. What the images owe to it is known of a module, as the command line's, by its
            state alone.
        progress: called with (phase, done, total) over the files of this process.

    Returns: the set, which other processes may still be filling.

    Raises:
        ValueError: for a folder with samples of another model, decoder, scheduler, conditioning, call,
            guidance or setting, and for samples that are no images without `decode`.
    """
    if decode is None:
        demand_images("sample_set", shape_of_call(call) or sample_shape(denoiser))
    conditions = _conditions(denoiser, scheduler, conditioning or {}, call or DenoiserCall())
    result = _begin(Path(folder), settings, _fingerprint(denoiser, decode, conditions), conditions)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    mine = [n for n in result.missing() if n % world == rank]
    sizes = result.sizes()
    for done, number in enumerate(mine):
        first = number * settings.chunk_size
        samples = generate(
            denoiser,
            scheduler,
            sizes[number],
            settings.num_inference_steps,
            settings.seed,
            settings.chunk_size,
            conditioning=rows_in_turn(conditioning or {}, first, sizes[number]),
            call=call,
            first=first,
        ).samples
        with torch.no_grad():
            images = to_uint8(samples if decode is None else decode(samples))
        with replacing(result.chunk(number)) as temporary, temporary.open("wb") as out:
            np.save(out, images)
        progress("files of samples", done + 1, len(mine))
    return result


def _mapped(file: Path) -> np.ndarray:
    """The array in a file .npy, which is read where it is looked at."""
    array: np.ndarray = np.load(file, mmap_mode="r")
    return array


def _is_whole(manifest: dict[str, Any]) -> bool:
    """Whether a manifest holds what `_begin` writes."""
    try:
        SampleSettings(**manifest["settings"])
    except (KeyError, TypeError, ValueError):
        return False
    return all(isinstance(manifest.get(name), str) for name in ("fingerprint", "conditions"))


def _begin(folder: Path, settings: SampleSettings, fingerprint: str, conditions: str) -> SampleSet:
    """Write the manifest, or check it against what is there already."""
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "conditions": conditions,
        "settings": asdict(settings),
    }
    if not (folder / MANIFEST_NAME).exists():
        if folder.exists() and any(folder.glob("images-*.npy")):
            raise ValueError(f"{folder} must be a new folder or one with {MANIFEST_NAME}, got images without")
        folder.mkdir(parents=True, exist_ok=True)
    else:
        found = SampleSet.open(folder).manifest
        fixed = {**found, "settings": {**found["settings"], "num_images": settings.num_images}}
        if fixed != manifest:
            raise ValueError(
                f"{folder} holds samples of another model, decoder, scheduler, condition, call, guidance or "
                f"setting ({found['settings']}); wanted {asdict(settings)}: give another folder"
            )
        if found["settings"]["num_images"] >= settings.num_images:
            return SampleSet(folder, manifest)
    # All processes write the same bytes.
    with replacing(folder / MANIFEST_NAME) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))
    return SampleSet(folder, manifest)


def _conditions(denoiser: nn.Module, scheduler: Any, conditioning: Conditioning, call: DenoiserCall) -> str:
    """Fingerprint of what sets of two models can share: scheduler, conditioning, call and guidance.

    Image i of two sets is one image, sampled by two models, where these, seed and steps agree.
    """
    given, words = named_tensors(conditioning), f"{identity(scheduler)} {call.fingerprint}"
    if isinstance(denoiser, GuidedDenoiser):
        words += f" guidance {denoiser.scale} {denoiser.null_class}"
        given += [] if denoiser.null_text is None else [("null_text", denoiser.null_text)]
    return fingerprint_of(given, words)


def _fingerprint(denoiser: nn.Module, decode: Callable[[Tensor], Tensor] | None, conditions: str) -> str:
    """Of weights and how they are computed with, of the decoder, and of `_conditions`."""
    tensors = list(denoiser.state_dict().items())
    if isinstance(decode, nn.Module):
        tensors += [(f"decoder {name}", value) for name, value in decode.state_dict().items()]
    return fingerprint_of(tensors, f"{conditions} {_arithmetic(denoiser)}")


def _arithmetic(denoiser: nn.Module) -> str:
    """What two models of the same tensors may differ in: classes, quantization, what attention multiplies."""
    inner = denoiser.denoiser if isinstance(denoiser, GuidedDenoiser) else denoiser
    asked = getattr(getattr(inner, "config", None), "quantization_config", None)
    settings = asked if asked is None or isinstance(asked, dict) else asked.to_dict()
    fused = [(block.name, block.attention) for block in describe_fusion(inner) if block.attention]
    return f"{type(inner).__name__} {json.dumps(settings, sort_keys=True, default=str)} {fused}"


def rows_in_turn(conditioning: Conditioning, first: int, count: int) -> Conditioning:
    """Rows of images first .. first + count - 1: image i has row i modulo the number of rows."""
    leaves = tree_leaves(conditioning)
    if not leaves:
        return {}
    rows = leaves[0]
    return pick(conditioning, torch.arange(first, first + count, device=rows.device) % len(rows))
