"""Times the element-wise operators against their plain-torch twins; ADPDM_CPU picks the instruction set.

ADPDM_CPU=avx512 python benchmarks/bench_elementwise.py --size 1000000 --threads 1 --json elementwise.json

The last column is the time of a copy that moves as many bytes as quantize and dequantize read and write,
divided by theirs: their share of the copy bandwidth at that size.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass

import results_file
import torch
from cpu_timing import Call, options, sample, start

from adpdm import reference
from adpdm._native import build_info

NUM_GROUPS = 8
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Row:
    """Medians of one operator."""

    operator: str
    microseconds: float
    nanoseconds_per_element_and_group: float
    reference_microseconds: float
    ratio: float  # the twin's time divided by the operator's
    share_of_copy: float | None  # the copy's time divided by the operator's


def cases(size: int, dtype: torch.dtype) -> dict[str, tuple[Call, Call, int]]:
    """Name -> (native call, reference call, groups the work is divided by)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator).to(dtype)
    grad = torch.randn(size, generator=generator).to(dtype)
    scale = torch.linspace(0.01, 0.04, NUM_GROUPS)
    zero_point = torch.linspace(-20, 20, NUM_GROUPS)
    codes_zero_point = zero_point.to(torch.int32)
    importance = torch.softmax(torch.linspace(0, 1, NUM_GROUPS), 0)
    index = torch.tensor([3], dtype=torch.int32)
    codes = reference.quantize(x, scale, codes_zero_point, index, 8)
    counts = torch.zeros(1, reference.HISTOGRAM_BINS, dtype=torch.int64)
    extrema = torch.tensor([[torch.inf, -torch.inf]])
    step = torch.zeros(1, dtype=torch.int32)
    arguments: dict[str, tuple[tuple[object, ...], int]] = {
        "quantize": ((x, scale, codes_zero_point, index, 8), 1),
        "quantize_int4": ((x, scale, codes_zero_point, index), 1),
        "dequantize": ((codes, scale, codes_zero_point, index, dtype), 1),
        "fake_quantize": ((x, scale, zero_point, index, -128, 127, -1), 1),
        "fake_quantize_backward": ((grad, x, scale, zero_point, index, -128, 127, -1), 1),
        "fake_quantize_mixture": ((x, scale, zero_point, importance, -128, 127), NUM_GROUPS),
        "fake_quantize_mixture_backward": ((grad, x, scale, zero_point, importance, -128, 127), NUM_GROUPS),
        "observe": ((x, counts, extrema, step), 1),
    }

    def call(module: object, name: str, values: tuple[object, ...]) -> Call:
        function = getattr(module, name)
        return lambda: function(*values)

    return {
        name: (call(torch.ops.adpdm, name, values), call(reference, name, values), groups)
        for name, (values, groups) in arguments.items()
    }


def copy_call(name: str, size: int, dtype: torch.dtype) -> Call | None:
    """A copy that reads and writes as many bytes together as an operator that has little else to do."""
    code_bytes = {"quantize": 1.0, "quantize_int4": 0.5, "dequantize": 1.0}.get(name)
    if code_bytes is None:
        return None
    source = torch.ones(int(size * (code_bytes + dtype.itemsize) / 2), dtype=torch.uint8)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def measure(name: str, size: int, dtype: torch.dtype, case: tuple[Call, Call, int], repeats: int) -> Row:
    """Time an operator, its twin and a copy in turns, in wall time."""
    native, twin, groups = case
    copy = copy_call(name, size, dtype)
    calls = [native, twin] if copy is None else [native, twin, copy]
    for call in calls:
        call()
    rounds = [[sample(call, 1, time.perf_counter) for call in calls] for _ in range(repeats)]
    ours, theirs = (statistics.median(r[i] for r in rounds) for i in (0, 1))
    ratios = [statistics.median(r[i] / r[0] for r in rounds) for i in range(1, len(calls))]
    share = ratios[1] if copy is not None else None
    return Row(name, ours * 1e6, ours * 1e9 / size / groups, theirs * 1e6, ratios[0], share)


def show(row: Row) -> None:
    """Print one line."""
    share = "" if row.share_of_copy is None else f" {row.share_of_copy:6.2f}"
    print(
        f"{row.operator:32} {row.microseconds:9.1f} {row.nanoseconds_per_element_and_group:17.3f} "
        f"{row.reference_microseconds:13.1f} {row.ratio:6.1f}{share}",
        flush=True,
    )


def main() -> None:
    """Print one row per operator: medians of interleaved calls; write them as JSON where asked."""
    parser = options(__doc__)
    parser.add_argument("--size", type=int, default=1_000_000, help="elements")
    parser.add_argument("--dtype", choices=list(DTYPES), default="f32")
    args = start(parser)
    print(f"{build_info()['isa']}, {args.threads} thread(s), {args.size} x {args.dtype}, G={NUM_GROUPS}")
    print(f"{'op':32} {'us':>9} {'ns/element/group':>17} {'reference us':>13} {'ratio':>6} {'copy':>6}")
    rows = []
    dtype = DTYPES[args.dtype]
    for name, case in cases(args.size, dtype).items():
        rows.append(measure(name, args.size, dtype, case, args.repeats))
        show(rows[-1])
    if args.json:
        results_file.write(args.json, vars(args), map(asdict, rows))


if __name__ == "__main__":
    main()
