"""Frechet distances of a quantized model: large sets of samples at full precision and with fewer bits.

    python benchmarks/distributions.py --out runs/distributions --model dit-fashion-mnist-32 \
        --bits w8a8 w6a6 w4a8 w4a4 --images 10000 --steps 20 --real fashion-mnist.npy

A set per number of bits in --out, which goes on where it was interrupted. All sets start from the same noise,
so that their bootstrap is paired; with real images it is not. JSON and a Markdown table at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy import bits_name
from accuracy_methods import methods
from diffusers.utils import logging
from subjects import find_subject

import adpdm
from adpdm.evaluate import SampleSet, SampleSettings, sample_set, set_distance
from adpdm.evaluate.distance import SetDistance
from adpdm.evaluate.sample_set import MANIFEST_NAME
from adpdm.files import replacing
from adpdm.graph import capture
from adpdm.model_folder import ModelFolder
from adpdm.schedulers import identity

FULL = "full precision"
SEED = 1234  # of the samples; calibration has 0
ORIGIN_NAME = "origin.json"  # beside the images of a set


def main(words: Sequence[str] | None = None) -> None:
    """Sample what is missing, measure, print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True, help="folder of the sets and of distances.json")
    parser.add_argument("--model", required=True, help="name in models/, or folder")
    parser.add_argument("--bits", nargs="+", type=bits_name, default=["w8a8", "w6a6", "w4a8", "w4a4"])
    parser.add_argument("--method", default="ours, dp", help="of the family strategies of accuracy.py")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument(
        "--guidance", type=float, help="scale that is calibrated and sampled under; none by default"
    )
    parser.add_argument("--batch", type=int, default=64, help="images per call and file")
    parser.add_argument("--real", type=Path, help="file .npy of real images [N, H, W, C] u8")
    args = parser.parse_args(words)
    try:
        subject = find_subject(args.model)
        method = next(methods(["strategies"], [args.method]))
        guidance = {} if args.guidance is None else {"guidance_scale": args.guidance}
        configs = {bits: _config(bits, {**method.settings, **guidance}, args.steps) for bits in args.bits}
        subject.guided(None, args.guidance)  # refuses a model without conditions
        settings = SampleSettings(args.images, args.steps, SEED, args.batch)
        sets = [
            Wanted(subject, config, args.guidance, settings, _folder(args.out, bits, args.guidance))
            for bits, config in {None: None, **configs}.items()
        ]
        missing = [each for each in sets if not each.is_complete()]
    except ValueError as error:
        parser.error(str(error))
    logging.disable_progress_bar()
    for each in missing:
        each.sample()
    found = _distances(args.out, args.bits, args.guidance, args.real)
    _write(args.out / "distances.json", subject, args, found)
    print("\n".join(table(found)))


def _folder(out: Path, bits: str | None, guidance: float | None) -> Path:
    return out / f"{bits or 'float'}{'' if guidance is None else f'-guidance-{guidance:g}'}"


@dataclass(frozen=True)
class Wanted:
    """A set of images, and what it is sampled from.

    Args:
        config: of the quantization; None is full precision.
        guidance: scale that is sampled under; None for none.
    """

    subject: ModelFolder
    config: adpdm.QuantConfig | None
    guidance: float | None
    settings: SampleSettings
    folder: Path

    @property
    def origin(self) -> dict[str, Any]:
        """What the images depend on besides the settings, as JSON."""
        return {
            "checkpoint": self.subject.checksum,
            "scheduler": identity(self.subject.scheduler()),
            "guidance": self.guidance,
            "config": None if self.config is None else self.config.to_dict(),
        }

    def is_complete(self) -> bool:
        """Whether the images are there; one that does not say what it is of is left to `sample` to judge.

        Raises:
            ValueError: where the folder has images of something else, or more of them.
        """
        if not (self.folder / MANIFEST_NAME).is_file():
            return False
        made, file = SampleSet.open(self.folder), self.folder / ORIGIN_NAME
        origin = json.loads(file.read_text()) if file.is_file() else None
        found = {**(origin or self.origin), **made.manifest["settings"], "num_images": 0}
        wanted = {**self.origin, **asdict(self.settings), "num_images": 0}
        if others := [name for name, value in wanted.items() if found.get(name) != value]:
            raise ValueError(
                f"{self.folder} holds images of another {' and '.join(others)}: give another --out"
            )
        if made.num_images > self.settings.num_images:
            raise ValueError(
                f"{self.folder} holds {made.num_images} images, wanted at most --images "
                f"{self.settings.num_images}: ask for as many, or give another --out"
            )
        return origin is not None and made.num_images == self.settings.num_images and not made.missing()

    def sample(self) -> None:
        """Make the images that are missing, and note what they are of."""
        denoiser = self.subject.denoiser()
        scheduler = self.subject.scheduler()
        given = self.subject.conditioning()  # a row per class, so that a set can grow
        if self.config is not None:
            null = None if self.guidance is None else self.subject.null_conditioning
            adpdm.quantize(
                denoiser, self.config, scheduler=scheduler, conditioning=given, null_conditioning=null
            )
        capture(denoiser)

        def tell(what: str, done: int, total: int) -> None:
            print(f"{self.folder.name}: {done} of {total} {what}", file=sys.stderr, flush=True)

        decode = self.subject.decoder(denoiser)
        guided = self.subject.guided(denoiser, self.guidance)
        sample_set(
            guided, scheduler, self.folder, self.settings, conditioning=given, decode=decode, progress=tell
        )
        with replacing(self.folder / ORIGIN_NAME) as temporary:  # not before: it has compared what was there
            temporary.write_text(json.dumps(self.origin, indent=1) + "\n")


def _config(bits: str, method: dict[str, Any], steps: int) -> adpdm.QuantConfig:
    weight_bits, activation_bits = (int(b) for b in bits.removeprefix("w").split("a"))
    # floats in attention, so that sets of different machines are one
    values = {**method, "num_inference_steps": steps, "weight_bits": weight_bits, "attention": "float"}
    return adpdm.QuantConfig(**values, activation_bits=activation_bits)


def _distances(
    out: Path, bits: Sequence[str], guidance: float | None, real: Path | None
) -> dict[str, dict[str, SetDistance]]:
    """By bits: distance to full precision, and to the real images if there are any."""
    found: dict[str, dict[str, SetDistance]] = {}
    for name in [None, *bits]:
        folder = _folder(out, name, guidance)
        row = {} if name is None else {FULL: set_distance(_folder(out, None, guidance), folder)}
        if real is not None:
            row["real"] = set_distance(real, folder)
        found[name or FULL] = row
    return found


def _write(file: Path, subject: ModelFolder, args: argparse.Namespace, found: Any) -> None:
    record = {
        "model": subject.name,
        "checkpoint": subject.checksum,
        "method": args.method,
        "images": args.images,
        "steps": args.steps,
        "guidance": args.guidance,
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "versions": {"adpdm": adpdm.__version__, "torch": torch.__version__},
        "distances": {name: {to: d.to_dict() for to, d in row.items()} for name, row in found.items()},
    }
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def table(found: dict[str, dict[str, SetDistance]]) -> list[str]:
    """Lines of Markdown: Frechet distances with 95 % of resampled ones, and what pairs of images say."""
    lines = [
        "| | Frechet distance to full precision | to real images | PSNR in dB | LPIPS |",
        "|---|---|---|---|---|",
    ]
    for name, row in found.items():
        pair = row.get(FULL)
        cells = [_interval(pair), _interval(row.get("real")), "", ""]
        if pair is not None and pair.psnr_db is not None:
            cells[2] = f"{pair.psnr_db:.1f}"
        if pair is not None and pair.lpips is not None:
            cells[3] = f"{pair.lpips:.4f}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _interval(distance: SetDistance | None) -> str:
    if distance is None:
        return ""
    f = distance.frechet
    return f"{f.distance:.3f} ({f.low:.3f} to {f.high:.3f})"


if __name__ == "__main__":
    main()
