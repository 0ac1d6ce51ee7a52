"""Accuracy of quantization strategies on trained models: every method, number of bits and seed in one run.

    python benchmarks/accuracy.py --out runs/accuracy --models ddpm-fashion-mnist-32 --seeds 0 1 2
    torchrun --nproc-per-node 2 benchmarks/accuracy.py --out runs/accuracy ...
    python benchmarks/accuracy_tables.py runs/accuracy

One file per quantization in --out, so that an interrupted run goes on where it was, processes share the work,
and more seeds only add files. Images of all methods start from the same noise. A quantization that raises is
named and the others are measured; the exit code then is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_methods import FAMILIES, Method, methods
from diffusers.utils import logging
from gpu_timing import reason_of
from PIL import Image
from subjects import find_subject

import adpdm
from adpdm.evaluate import EvaluationConfig, compare
from adpdm.files import replacing
from adpdm.model_folder import ModelFolder

IMAGE_SEED = 1234  # of the samples that are compared; calibration has seeds of its own
GRID_IMAGES = 8


@dataclass(frozen=True)
class Cell:
    """One quantization of one model.

    Args:
        bits: as in w4a8.
        seed: of the calibration.
    """

    subject: ModelFolder
    method: Method
    bits: str
    seed: int
    num_images: int
    num_inference_steps: int

    @property
    def title(self) -> str:
        return f"{self.subject.name} {self.bits} seed {self.seed} {self.method.name}"

    def config(self) -> adpdm.QuantConfig:
        weight_bits, activation_bits = (int(b) for b in self.bits.removeprefix("w").split("a"))
        return adpdm.QuantConfig(
            # floats in attention, as on CPUs where int8 does not pay: tables do not depend on the machine
            **{"num_inference_steps": self.num_inference_steps, "attention": "float", **self.method.settings},
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            seed=self.seed,
            search=adpdm.SearchConfig(**self.method.search),
        )

    def key(self) -> dict[str, Any]:
        """All that the result depends on, but for the code."""
        return {
            "model": self.subject.name,
            "checkpoint": self.subject.checksum,
            "method": self.method.name,
            "bits": self.bits,
            "seed": self.seed,
            "num_images": self.num_images,
            "num_inference_steps": self.config().num_inference_steps,
            "image_seed": IMAGE_SEED,
            **({} if self.method.scale is None else {"guidance": self.method.scale}),
            "config": self.config().to_dict(),
        }

    def file(self, folder: Path) -> Path:
        digest = hashlib.sha256(json.dumps(self.key(), sort_keys=True).encode()).hexdigest()
        return folder / f"{self.subject.name}-{self.bits}-s{self.seed}-{digest[:12]}.json"


def measure(cell: Cell) -> tuple[dict[str, Any], Any]:
    """Quantize and sample; returns plain JSON types and the first images [K, H, W, C] u8 of both models."""
    subject, config = cell.subject, cell.config()
    original, quantized, scheduler = subject.denoiser(), subject.denoiser(), subject.scheduler()
    is_guided_later = cell.method.scale is not None and config.guidance_scale == 1
    given = subject.conditioning(with_none=is_guided_later)
    null = None if config.guidance_scale == 1 else subject.null_conditioning
    start = time.perf_counter()
    report = adpdm.quantize(
        quantized, config, scheduler=scheduler, conditioning=given, null_conditioning=null
    )
    seconds = time.perf_counter() - start
    settings = EvaluationConfig(
        num_images=cell.num_images,
        num_inference_steps=config.num_inference_steps,
        seed=IMAGE_SEED,
        batch_size=16,
        timing_batch_sizes=(),
        kept_images=GRID_IMAGES,
    )
    conditioning, decode = subject.conditioning(cell.num_images), subject.decoder(original)
    pair = [subject.guided(denoiser, cell.method.scale) for denoiser in (original, quantized)]
    found = compare(pair[0], pair[1], scheduler, settings, conditioning=conditioning, decode=decode)
    trace = report.trace
    result = {
        **cell.key(),
        "quality": found.to_dict(),
        "integer_macs": report.coverage.macs,
        "group_gain_db": trace.summarize_gain(),
        "outcome": None if trace.outcome is None else trace.outcome.to_dict(),
        "warnings": trace.warnings,
        "quantize_seconds": seconds,
        "phase_seconds": trace.seconds,
        "threads": torch.get_num_threads(),
        "versions": {"adpdm": adpdm.__version__, "torch": torch.__version__},
    }
    return result, (found.reference_images, found.quantized_images)


def write(cell: Cell, folder: Path, result: dict[str, Any], images: Any) -> None:
    """The grid first, full precision above quantized, then the figures, each as a whole or not at all."""
    file = cell.file(folder)
    rows = [torch.from_numpy(part).permute(1, 0, 2, 3).flatten(1, 2) for part in images]
    grid = torch.cat(rows).squeeze(-1).numpy()
    with replacing(file.with_suffix(".png")) as temporary:
        Image.fromarray(grid).save(temporary, format="png")
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


def run(cells: Sequence[Cell], folder: Path) -> list[str]:
    """Measure what has no file yet, telling how long the rest will take; returns the titles that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    open_cells = [cell for cell in cells if not cell.file(folder).exists()]
    print(f"{len(cells)} quantizations, {len(cells) - len(open_cells)} measured before", flush=True)
    start, failed = time.perf_counter(), []
    for number, cell in enumerate(open_cells, 1):
        try:
            result, images = measure(cell)
        except Exception as error:
            failed.append(cell.title)
            words = f"failed: {reason_of(error)}"
        else:
            write(cell, folder, result, images)
            words = f"{float(result['quality']['psnr_db']):.2f} dB"
        left = (time.perf_counter() - start) / number * (len(open_cells) - number) / 60
        print(f"{number}/{len(open_cells)} {cell.title}: {words}, {left:.0f} min left", flush=True)
    return failed


def bits_name(text: str) -> str:
    """`w4a8` for any spelling of it."""
    name = text.lower()
    weight, found, activation = name.removeprefix("w").partition("a")
    if not (name.startswith("w") and found and weight.isdigit() and activation.isdigit()):
        raise argparse.ArgumentTypeError(f"wanted bits like w4a8, got {text!r}")
    return name


def main() -> None:
    """Print one line per quantization."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--models", nargs="+", required=True, help="names in models/, or folders")
    parser.add_argument("--bits", nargs="+", type=bits_name, default=["w8a8", "w6a6", "w4a8", "w4a4"])
    parser.add_argument("--families", nargs="+", default=["strategies"], choices=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", help="names within the families; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration")
    parser.add_argument("--images", type=int, default=16, help="sampled for each quantization")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    args = parser.parse_args()
    try:
        subjects = [find_subject(name) for name in args.models]
        chosen = list(methods(args.families, args.methods))
    except ValueError as error:
        parser.error(str(error))
    logging.disable_progress_bar()
    cells = [
        Cell(subject, method, bits, seed, args.images, args.steps)
        for seed in args.seeds
        for subject in subjects
        for bits in args.bits
        for method in chosen
    ]
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
    if failed := run(cells[rank::size], args.out):
        sys.exit(f"accuracy: failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
