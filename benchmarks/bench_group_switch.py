"""Measures what switching the group costs: a new step in the tables, against a whole forward of a denoiser.

Not in it: torch's calling of the two hooks around a forward, and their turns of threads, some 4 us or more.

python benchmarks/bench_group_switch.py --model models/ddpm-fashion-mnist-32 --json switch.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import results_file
import torch

import adpdm
from adpdm.denoisers import find_denoiser

ROUNDS = 40  # interleaved pairs of forward and switch
SWITCHES = 100  # per round: one is too short for the clock


@torch.no_grad()
def measure(model: Path, batch_size: int) -> dict[str, float | int]:
    """Median seconds of one forward and of one switch, and the median of their paired ratio."""
    pipe = adpdm.load_pipeline(model, local_files_only=True)
    config = adpdm.QuantConfig(grouping="uniform", histogram_images=2, num_inference_steps=20)
    adpdm.quantize(pipe, config)
    denoiser = find_denoiser(pipe)
    step = denoiser.get_submodule("adpdm_step")
    pipe.scheduler.set_timesteps(20)
    timesteps = pipe.scheduler.timesteps
    size = denoiser.config.sample_size
    sample = torch.randn(batch_size, denoiser.config.in_channels, size, size)
    forwards, switches = [], []
    for index in range(ROUNDS):
        timestep = timesteps[index % len(timesteps)]
        start = time.perf_counter()
        denoiser(sample, timestep)
        middle = time.perf_counter()
        for i in range(SWITCHES):
            step.set_timestep(timesteps[i % len(timesteps)])
        forwards.append(middle - start)
        switches.append((time.perf_counter() - middle) / SWITCHES)
    shares = [s / f for s, f in zip(switches, forwards, strict=True)]
    return {
        "batch_size": batch_size,
        "forward_seconds": statistics.median(forwards),
        "switch_seconds": statistics.median(switches),
        "share": statistics.median(shares),
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Print a sentence; write it as JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/ddpm-fashion-mnist-32"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    result = measure(args.model, args.batch)
    print(
        f"batch {args.batch}, {result['threads']} threads: "
        f"forward {result['forward_seconds'] * 1e3:.2f} ms, "
        f"switch {result['switch_seconds'] * 1e6:.1f} us, {result['share']:.2%} of a step"
    )
    if args.json:
        results_file.write(args.json, vars(args), [result])


if __name__ == "__main__":
    main()
