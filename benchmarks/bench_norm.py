"""Times group_norm_quantize with SiLU against torch's group norm and SiLU in float32, interleaved.

python benchmarks/bench_norm.py --threads 1

torch writes float32; its quantization, a third call, is not counted. Inputs are channels_last. With one
thread times are CPU times, with more wall times; numbers are medians, the ratio is the median of those of a
round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from adpdm import ops
from adpdm._native import build_info
from adpdm.ops import Activation, OutputQuantizer

SHAPES = [(1, 128, 32), (8, 128, 32), (1, 256, 16), (8, 256, 16)]  # batch, channels, side
NORM_GROUPS = 32
MIN_SAMPLE_SECONDS = 0.002


def sample(call: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    """Seconds per call, over `count` calls."""
    start = clock()
    for _ in range(count):
        call()
    return (clock() - start) / count


def measure(shape: tuple[int, int, int], repeats: int, clock: Callable[[], float]) -> None:
    """Time both on one shape and print a line."""
    batch, channels, side = shape
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(channels), torch.randn(channels)
    index = torch.zeros(1, dtype=torch.int32)
    quantizer = OutputQuantizer(torch.tensor([0.02]), torch.zeros(1, dtype=torch.int32), index, 8)
    contestants: list[Callable[[], object]] = [
        lambda: ops.group_norm_quantize(
            [x], weight, bias, None, quantizer, NORM_GROUPS, 1e-5, Activation.SILU
        ),
        lambda: F.silu(F.group_norm(x, NORM_GROUPS, weight, bias, 1e-5)),
    ]
    counts = []
    for call in contestants:
        sample(call, 5, clock)
        counts.append(max(1, int(MIN_SAMPLE_SECONDS / max(sample(call, 5, clock), 1e-7))))
    rounds = [[sample(c, n, clock) for c, n in zip(contestants, counts, strict=True)] for _ in range(repeats)]
    ours, torchs = (statistics.median(r[i] for r in rounds) * 1e6 for i in (0, 1))
    ratio = statistics.median(r[1] / r[0] for r in rounds)
    print(f"{batch} x {channels} @ {side}x{side}: {ours:8.1f} {torchs:8.1f} {ratio:6.2f}", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25, help="timed rounds, at least 20")
    args = parser.parse_args()
    if args.repeats < 20:
        parser.error(f"--repeats must be at least 20, got {args.repeats}")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    print(f"{build_info()['isa']}, {args.threads} thread(s), torch {torch.__version__}; us, torch / ours:")
    for shape in SHAPES:
        measure(shape, args.repeats, clock)


if __name__ == "__main__":
    main()
