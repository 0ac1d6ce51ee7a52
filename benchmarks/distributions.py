"""Frechet distances of a quantized model: large sets of samples at full precision and with fewer bits.

    python benchmarks/distributions.py --out runs/distributions --model dit-fashion-mnist-32 \
        --bits w8a8 w6a6 w4a8 w4a4 --images 10000 --steps 20 --real fashion-mnist.npy

A set per number of bits in --out, which goes on where it was interrupted. All sets start from the same noise,
so that their bootstrap is paired; with real images it is not. JSON and a Markdown table at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
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
from adpdm.graph import capture
from adpdm.model_folder import ModelFolder

FULL = "full precision"
SEED = 1234  # of the samples; calibration has 0


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
    except ValueError as error:
        parser.error(str(error))
    logging.disable_progress_bar()
    for bits, config in {None: None, **configs}.items():
        _sample(subject, config, settings, args.guidance, _folder(args.out, bits, args.guidance))
    found = _distances(args.out, args.bits, args.guidance, args.real)
    _write(args.out / "distances.json", subject, args, found)
    print("\n".join(table(found)))


def _folder(out: Path, bits: str | None, guidance: float | None) -> Path:
    return out / f"{bits or 'float'}{'' if guidance is None else f'-guidance-{guidance:g}'}"


def _sample(
    subject: ModelFolder,
    config: adpdm.QuantConfig | None,
    settings: SampleSettings,
    guidance: float | None,
    folder: Path,
) -> None:
    """Fill the set of one quantization; None is full precision."""
    if folder.is_dir():
        made = SampleSet.open(folder)
        if made.manifest["settings"] == asdict(settings) and not made.missing():
            return
    denoiser = subject.denoiser()
    scheduler = subject.scheduler()
    if config is not None:
        null = None if guidance is None else subject.null_conditioning
        given = subject.conditioning()
        adpdm.quantize(denoiser, config, scheduler=scheduler, conditioning=given, null_conditioning=null)
    capture(denoiser)
    given = subject.conditioning()  # a row per class, so that a set can grow

    def tell(what: str, done: int, total: int) -> None:
        print(f"{folder.name}: {done} of {total} {what}", file=sys.stderr, flush=True)

    decode = subject.decoder(denoiser)
    guided = subject.guided(denoiser, guidance)
    sample_set(guided, scheduler, folder, settings, conditioning=given, decode=decode, progress=tell)


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
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, file)


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
