"""How much groups of timesteps can gain on a model: error of quantized layer inputs against one range.

python benchmarks/group_gain.py --model dit-fashion-mnist-32 --json gain.json

Needs no search and no samples of the quantized model, so it tells in seconds whether groups suit a model.
The gain of a range for every step is the most that any grouping reaches with ranges that fit the histograms.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import results_file
from diffusers.utils import logging
from subjects import find_subject

import adpdm
from adpdm.model_folder import ModelFolder


@dataclass(frozen=True)
class Row:
    """Over all quantizers of the model, in dB."""

    activation_bits: int
    steps: str  # weighted by sensitivity, or all alike
    median_db: float
    largest_db: float
    limit_db: float  # median, with a range for every step
    range_change: float  # widest over narrowest range of a step, median


def measure(subject: ModelFolder, bits: int, weigh_steps: bool, groups: int, seed: int) -> Row:
    """Calibrate with the `dp` partition and nothing that does not depend on groups."""
    config = adpdm.QuantConfig(
        activation_bits=bits,
        num_groups=groups,
        grouping="dp",
        seed=seed,
        weigh_steps=weigh_steps,
        equalization="off",
        hadamard="off",
        weight_rounding="nearest",
        raised_layers=0.0,
        correct_bias=False,
        correct_prediction=False,
    )
    denoiser = subject.denoiser()
    given = subject.conditioning()
    trace = adpdm.quantize(denoiser, config, scheduler=subject.scheduler(), conditioning=given).trace
    widths = [[high - low for low, high in row["observed"]] for row in trace.quantizers]
    change = statistics.median(max(w) / max(min(w), 1e-30) for w in widths)
    return Row(bits, "by sensitivity" if weigh_steps else "alike", *trace.summarize_gain(), change)


def main() -> None:
    """Print one line per setting; write them as JSON where asked."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="ddpm-fashion-mnist-32", help="name in models/, or a folder")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4], help="of the activations")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    try:
        subject = find_subject(args.model)
    except ValueError as error:
        parser.error(str(error))
    logging.disable_progress_bar()
    rows = []
    for weigh_steps in (True, False):
        for bits in args.bits:
            row = measure(subject, bits, weigh_steps, args.groups, args.seed)
            rows.append(row)
            print(
                f"A{bits}, steps {row.steps}: median {row.median_db:5.2f} dB, largest {row.largest_db:.2f}; "
                f"a range for every step: median {row.limit_db:5.2f} dB; "
                f"ranges change {row.range_change:.2f} times",
                flush=True,
            )
    if args.json:
        settings = {**vars(args), "model": subject.name, "checkpoint": subject.checksum}
        results_file.write(args.json, settings, map(asdict, rows))


if __name__ == "__main__":
    main()
