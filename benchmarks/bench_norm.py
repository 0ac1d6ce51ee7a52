"""Times group_norm_quantize with SiLU against torch's group norm and SiLU in float32, interleaved.

python benchmarks/bench_norm.py --threads 1 --json norm.json

torch writes float32; its quantization, a third call, is not counted. Inputs are channels_last. With one
thread times are CPU times, with more wall times; numbers are medians, the ratio is the median of those of a
round.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass

import results_file
import torch
import torch.nn.functional as F
from cpu_timing import Call, Clock, clock_of, options, start, time_in_turns

from adpdm import ops
from adpdm._native import build_info
from adpdm.ops import Activation, OutputQuantizer

SHAPES = [(1, 128, 32), (8, 128, 32), (1, 256, 16), (8, 256, 16)]  # batch, channels, side
NORM_GROUPS = 32


@dataclass(frozen=True)
class Row:
    """Medians of both on one shape."""

    batch: int
    channels: int
    side: int
    ours_microseconds: float
    torch_microseconds: float
    ratio: float  # torch's time divided by ours


def contestants(shape: tuple[int, int, int]) -> dict[str, Call]:
    """Ours and torch's on random numbers."""
    batch, channels, side = shape
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(channels), torch.randn(channels)
    index = torch.zeros(1, dtype=torch.int32)
    quantizer = OutputQuantizer(torch.tensor([0.02]), torch.zeros(1, dtype=torch.int32), index, 8)
    return {
        "ours": lambda: ops.group_norm_quantize(
            [x], weight, bias, None, quantizer, NORM_GROUPS, 1e-5, Activation.SILU
        ),
        "torch": lambda: F.silu(F.group_norm(x, NORM_GROUPS, weight, bias, 1e-5)),
    }


def measure(shape: tuple[int, int, int], repeats: int, clock: Clock) -> Row:
    """Time both on one shape."""
    rounds = time_in_turns(contestants(shape), repeats, clock)
    ours, torchs = (1e6 * statistics.median(r[name] for r in rounds) for name in ("ours", "torch"))
    return Row(*shape, ours, torchs, statistics.median(r["torch"] / r["ours"] for r in rounds))


def show(row: Row) -> None:
    """Print one line."""
    shape = f"{row.batch} x {row.channels} @ {row.side}x{row.side}"
    times = f"{row.ours_microseconds:8.1f} {row.torch_microseconds:8.1f}"
    print(f"{shape}: {times} {row.ratio:6.2f}", flush=True)


def main() -> None:
    """Print a table; write it as JSON where asked."""
    args = start(options(__doc__))
    print(
        f"{build_info()['isa']}, {args.threads} thread(s), torch {torch.__version__}; "
        "us of ours and torch, torch / ours:"
    )
    rows = []
    for shape in SHAPES:
        rows.append(measure(shape, args.repeats, clock_of(args.threads)))
        show(rows[-1])
    if args.json:
        results_file.write(args.json, vars(args), map(asdict, rows))


if __name__ == "__main__":
    main()
