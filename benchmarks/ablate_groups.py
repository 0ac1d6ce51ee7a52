"""What timestep groups are worth on a model, as the measures that compete with them are added one by one.

python benchmarks/ablate_groups.py --bits w6a6 --seeds 0 --json ablation.json
python benchmarks/ablate_groups.py --bits w8a4 --seeds 0 1 2 --measures "+ raised layers" \\
    --groupings shared dp search

PSNR of the final samples to full precision on the same seeds; a row keeps the measures of the row above it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers.utils import logging

import adpdm
from adpdm.config import Grouping
from adpdm.evaluate import generate, psnr
from adpdm.pipeline import find_denoiser

MODEL = Path(__file__).resolve().parents[1] / "models" / "ddpm-fashion-mnist-32"
GROUPINGS: tuple[Grouping, ...] = ("shared", "uniform", "dp")
PLAIN: dict[str, Any] = {"weight_rounding": "nearest", "raised_layers": 0.0}
MEASURES: dict[str, dict[str, Any]] = {
    "min-max ranges": {**PLAIN, "range_method": "minmax", "weigh_steps": False, "correct_bias": False},
    "+ least-squares ranges": {**PLAIN, "weigh_steps": False, "correct_bias": False},
    "+ steps weighed by sensitivity": {**PLAIN, "correct_bias": False},
    "+ bias correction": PLAIN,
    "+ learned rounding": {"raised_layers": 0.0},
    "+ raised layers": {},
}
IMAGES, STEPS, IMAGE_SEED = 8, 50, 1234


@dataclass(frozen=True)
class Result:
    """One quantization."""

    measures: str
    grouping: str
    seed: int
    psnr_db: float
    seconds: float


def samples(pipe: Any) -> torch.Tensor:
    """Final samples [IMAGES, C, H, W] in [-1, 1]."""
    return generate(find_denoiser(pipe), pipe.scheduler, IMAGES, STEPS, IMAGE_SEED, IMAGES).samples


def main() -> None:
    """Print one line per quantization; write them as JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--bits", default="w6a6", help="wBaB")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration")
    parser.add_argument("--groupings", nargs="+", default=GROUPINGS, choices=get_args(Grouping))
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    weight_bits, activation_bits = (int(b) for b in args.bits.lower().removeprefix("w").split("a"))
    logging.disable_progress_bar()
    reference = samples(adpdm.load_pipeline(args.model))
    results = []
    for seed in args.seeds:
        for name in args.measures:
            for grouping in args.groupings:
                start = time.perf_counter()
                config = adpdm.QuantConfig(
                    weight_bits=weight_bits,
                    activation_bits=activation_bits,
                    grouping=grouping,
                    seed=seed,
                    **MEASURES[name],
                )
                pipe = adpdm.load_pipeline(args.model)
                adpdm.quantize(pipe, config)
                quality = float(psnr(reference, samples(pipe)))
                results.append(Result(name, grouping, seed, quality, time.perf_counter() - start))
                print(f"{args.bits} seed {seed} {name:32} {grouping:8} {quality:6.2f} dB", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1))


if __name__ == "__main__":
    main()
