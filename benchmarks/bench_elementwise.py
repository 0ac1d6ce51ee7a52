"""Times the element-wise operators against their plain-torch twins; ADPDM_CPU picks the instruction set.

ADPDM_CPU=avx512 python benchmarks/bench_elementwise.py --size 1000000 --threads 1
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
    print(f"{'op':32} {'us':>9} {'ns/element/group':>17} {'reference us':>13} {'ratio':>6}")
    for name, (native, twin, groups) in cases(args.size, DTYPES[args.dtype]).items():
        seconds(native), seconds(twin)
        pairs = [(seconds(native), seconds(twin)) for _ in range(max(20, args.repeats))]
        ours = statistics.median(pair[0] for pair in pairs)
        theirs = statistics.median(pair[1] for pair in pairs)
        per_element = ours * 1e9 / args.size / groups
        ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
        print(f"{name:32} {ours * 1e6:9.1f} {per_element:17.3f} {theirs * 1e6:13.1f} {ratio:6.1f}")


if __name__ == "__main__":
    main()
