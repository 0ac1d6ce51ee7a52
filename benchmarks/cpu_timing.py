"""Timing on a CPU: contestants in turns, and the options that the scripts of single operators share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Call = Callable[[], object]
Clock = Callable[[], float]

MIN_ROUNDS = 20
MIN_SAMPLE_SECONDS = 0.002  # a sample repeats a call until it lasts this long
WARMUP = 3


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows what all of these scripts take."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25, help=f"timed rounds, at least {MIN_ROUNDS}")
    parser.add_argument("--json", type=Path, help="file to write")
    return parser


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the options; torch gets its threads and a seed, and makes no gradients from then on."""
    args = parser.parse_args()
    if args.repeats < MIN_ROUNDS:
        parser.error(f"--repeats must be at least {MIN_ROUNDS}, got {args.repeats}")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    return args


def clock_of(threads: int) -> Clock:
    """CPU time for one thread, which other processes hardly lengthen; wall time for more."""
    return time.process_time if threads == 1 else time.perf_counter


def sample(call: Call, count: int, clock: Clock) -> float:
    """Seconds per call, over `count` calls, after one that is not counted: others have used the caches."""
    call()
    start = clock()
    for _ in range(count):
        call()
    return (clock() - start) / count


def time_in_turns(calls: Mapping[str, Call], rounds: int, clock: Clock) -> list[dict[str, float]]:
    """Seconds per call of every contestant, of each round."""
    counts = {}
    for name, call in calls.items():
        sample(call, WARMUP, clock)
        counts[name] = max(1, int(MIN_SAMPLE_SECONDS / max(sample(call, WARMUP, clock), 1e-7)))
    return [{name: sample(call, counts[name], clock) for name, call in calls.items()} for _ in range(rounds)]
