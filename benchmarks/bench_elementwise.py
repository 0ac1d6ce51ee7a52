"""Times the element-wise operators against their plain-torch twins; ADPDM_CPU picks the instruction set.

ADPDM_CPU=avx512 python benchmarks/bench_elementwise.py --size 1000000 --threads 1

The last column is the time of a copy that moves as many bytes as quantize and dequantize read and write,
divided by theirs: their share of the copy bandwidth at that size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from adpdm import reference
from adpdm._native import build_info

NUM_GROUPS = 8
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def cases(size: int, dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], Callable[[], object], int]]:
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

    def call(module: object, name: str, values: tuple[object, ...]) -> Callable[[], object]:
        function = getattr(module, name)
        return lambda: function(*values)

    return {
        name: (call(torch.ops.adpdm, name, values), call(reference, name, values), groups)
        for name, (values, groups) in arguments.items()
    }


def copy_call(name: str, size: int, dtype: torch.dtype) -> Callable[[], object] | None:
    """A copy that reads and writes as many bytes together as an operator that has little else to do."""
    code_bytes = {"quantize": 1.0, "quantize_int4": 0.5, "dequantize": 1.0}.get(name)
    if code_bytes is None:
        return None
    source = torch.ones(int(size * (code_bytes + dtype.itemsize) / 2), dtype=torch.uint8)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Print one row per operator: medians of interleaved calls."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1_000_000, help="elements")
    parser.add_argument("--dtype", choices=list(DTYPES), default="f32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25, help="timed calls of each side, at least 20")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    print(f"{build_info()['isa']}, {args.threads} thread(s), {args.size} x {args.dtype}, G={NUM_GROUPS}")
    print(f"{'op':32} {'us':>9} {'ns/element/group':>17} {'reference us':>13} {'ratio':>6} {'copy':>6}")
    for name, (native, twin, groups) in cases(args.size, DTYPES[args.dtype]).items():
        copy = copy_call(name, args.size, DTYPES[args.dtype])
        calls = [native, twin] + [copy] * (copy is not None)
        for call in calls:
            seconds(call)
        rounds = [[seconds(call) for call in calls] for _ in range(max(20, args.repeats))]
        ours, theirs = (statistics.median(r[i] for r in rounds) for i in (0, 1))
        per_element = ours * 1e9 / args.size / groups
        ratios = [statistics.median(r[i] / r[0] for r in rounds) for i in range(1, len(calls))]
        shares = "".join(f" {share:6.2f}" for share in ratios[1:])
        print(
            f"{name:32} {ours * 1e6:9.1f} {per_element:17.3f} {theirs * 1e6:13.1f} {ratios[0]:6.1f}{shares}"
        )


if __name__ == "__main__":
    main()
