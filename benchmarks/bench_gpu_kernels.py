"""Times the CUDA kernels against torch in bfloat16, layer by layer, inside CUDA graphs, in turns.

python benchmarks/bench_gpu_kernels.py --models sd15 sdxl --json kernels.json

Integer layers are given codes and write bfloat16; weights stay in L2 where they fit, as they do in a U-Net
that runs step after step. Figures are medians of --rounds replays, ratios medians of the ratios of a round.

--peaks reads what gpu_peaks.py --json wrote on the same card. W8A8, W4A8 and torch._int_mm then have their
share of the largest int8 rate that the card has: of wgmma on compute capability 9.0, else of mma.sync.

The JSON file is written after every piece of work, layers first. A contestant that raises is named, there as
well, and the others are timed; the exit code then is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import results_file
import torch
import torch.nn.functional as F
from gpu_layers import LAYERS, MAPS, Conv, Layer, Linear
from gpu_timing import Call, Failed, Timing, compare, reason_of
from torch import Tensor

from adpdm import ops
from adpdm.ops import Activation, ConvGeometry, Epilogue, OutputQuantizer, Segment

NUM_GROUPS = 8
DEVICE = "cuda"
BF16 = torch.bfloat16
PEAKS = Path(__file__).parents[1] / "build" / "gpu" / "peaks.json"  # `make gpu` writes it

# The int8 rates of gpu_peaks.py, null for what a card lacks.
INT8_RATES = {"wgmma_s8_TOPS": "wgmma", "mma_s8_TOPS": "mma.sync"}
# They multiply in int8 on every card, W4A4 only where int4 products are emulated.
INT8_CONTESTANTS = ("W8A8", "W4A8", "torch._int_mm")


@dataclass(frozen=True)
class Peak:
    """The most that tensor cores do with int8."""

    instruction: str
    tops: float


@dataclass(frozen=True)
class Row:
    """Medians of one contestant on one piece of work."""

    work: str
    contestant: str
    microseconds: float
    ratio: float | None  # its time divided by that of the first contestant; None where that one failed
    rate: float  # TOP/s of layers, GB/s of the rest
    unit: str
    share_of_peak: float | None = None  # of int8 products, where the peak is known


@dataclass(frozen=True)
class Failure:
    """A contestant that could not be timed on a piece of work."""

    work: str
    contestant: str
    failed: str  # the reason


Rows = list[Row | Failure]


def read_peak(path: Path, device: str) -> Peak:
    """The largest int8 rate in a file of gpu_peaks.py.

    Raises:
        ValueError: where it is of another card than `device`, or was written before there were all rates.
    """
    measured = json.loads(path.read_text())
    if measured.get("device") != device:
        raise ValueError(
            f"--peaks: wanted rates of {device}, got those of {measured.get('device')} in {path}"
        )
    if missing := [name for name in INT8_RATES if name not in measured]:
        raise ValueError(
            f"--peaks: wanted {', '.join(missing)}, found none in {path}: run gpu_peaks.py again"
        )
    rates = {name: measured[name] for name in INT8_RATES if measured[name] is not None}
    largest = max(rates, key=lambda name: rates[name])
    return Peak(INT8_RATES[largest], rates[largest])


def random_codes(shape: tuple[int, ...], bits: int) -> Tensor:
    """Codes of the whole range, int8; maps in channels_last."""
    bound = 1 << (bits - 1)
    codes = torch.randint(-bound, bound, shape, device=DEVICE, dtype=torch.int8)
    return codes.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else codes


def quantizer(bits: int) -> OutputQuantizer:
    """Eight groups, the fourth current."""
    return OutputQuantizer(
        scale=torch.linspace(0.02, 0.04, NUM_GROUPS, device=DEVICE),
        zero_point=torch.zeros(NUM_GROUPS, dtype=torch.int32, device=DEVICE),
        group_index=torch.tensor([3], dtype=torch.int32, device=DEVICE),
        num_bits=bits,
    )


def segment(codes: Tensor, weight_shape: tuple[int, ...], weight_bits: int, groups: int = 1) -> Segment:
    """Codes with a quantizer and random weights."""
    bound = (1 << (weight_bits - 1)) - 1
    weight = torch.randint(-bound, bound + 1, weight_shape, device=DEVICE, dtype=torch.int8)
    q = quantizer(8)
    return Segment(
        codes=codes,
        scale=q.scale,
        zero_point=q.zero_point,
        group_index=q.group_index,
        weight=ops.pack_weight(weight, weight_bits, groups),
        weight_scale=torch.full((weight_shape[0],), 0.01, device=DEVICE),
        weight_sum=weight.flatten(1).sum(1, dtype=torch.int32),
    )


def packed(codes: Tensor) -> Tensor:
    """4-bit codes as the kernels of W4A4 read them, NHWC for maps."""
    return ops.pack_int4(codes.permute(0, 2, 3, 1) if codes.dim() == 4 else codes)


def conv_calls(layer: Conv) -> dict[str, Call]:
    """The contestants on a convolution, ours first."""
    shape = (layer.batch, layer.channels, layer.size, layer.size)
    weight_shape = (layer.outputs, layer.channels // layer.groups, layer.kernel, layer.kernel)
    pad = layer.kernel // 2
    kernel, stride = (layer.kernel,) * 2, (layer.stride,) * 2
    geometry = ConvGeometry(layer.outputs, kernel, stride, (pad, pad), groups=layer.groups)
    bias = torch.randn(layer.outputs, device=DEVICE)
    epilogue = Epilogue(bias=bias)

    def integer(codes: Tensor, bits: int) -> Call:
        s = segment(codes, weight_shape, bits, layer.groups)
        return lambda: ops.conv2d([s], epilogue, geometry, bits, BF16)

    x, weight = (torch.randn(s, device=DEVICE, dtype=BF16) for s in (shape, weight_shape))
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    half_bias = bias.to(BF16)
    calls = {
        "W8A8": integer(random_codes(shape, 8), 8),
        "W4A8": integer(random_codes(shape, 8), 4),
        "W4A4": integer(packed(random_codes(shape, 4)), 4),
        "torch bf16": lambda: F.conv2d(x, weight, half_bias, layer.stride, pad, 1, layer.groups),
    }
    if layer.groups > 1:
        del calls["W4A4"]  # two codes to a byte need 32 channels of a group
    return calls


def linear_calls(layer: Linear) -> dict[str, Call]:
    """The contestants on a linear layer, ours first."""
    weight_shape = (layer.outputs, layer.channels)
    bias = torch.randn(layer.outputs, device=DEVICE)
    epilogue = Epilogue(bias=bias)

    def integer(codes: Tensor, bits: int) -> Call:
        s = segment(codes, weight_shape, bits)
        return lambda: ops.linear([s], epilogue, layer.outputs, bits, BF16)

    codes = random_codes((layer.rows, layer.channels), 8)
    transposed = random_codes(weight_shape, 8).t()
    x = torch.randn(layer.rows, layer.channels, device=DEVICE, dtype=BF16)
    weight, half_bias = torch.randn(weight_shape, device=DEVICE, dtype=BF16), bias.to(BF16)
    return {
        "W8A8": integer(codes, 8),
        "W4A8": integer(codes, 4),
        "W4A4": integer(packed(random_codes((layer.rows, layer.channels), 4)), 4),
        "torch bf16": lambda: F.linear(x, weight, half_bias),
        "torch._int_mm": lambda: torch._int_mm(codes, transposed),
    }


def map_calls(batch: int, channels: int, size: int) -> dict[str, tuple[dict[str, Call], float]]:
    """Contestants on a map with the bytes that each piece of work has to move at least."""
    x = torch.randn(batch, channels, size, size, device=DEVICE, dtype=BF16)
    planes, x = x, x.contiguous(memory_format=torch.channels_last)
    elements = x.numel()
    weight, bias = (torch.randn(channels, device=DEVICE) for _ in range(2))
    half = (weight.to(BF16), bias.to(BF16))
    q = quantizer(8)
    # reads and writes as many bytes together as quantize, 3 an element
    source = torch.ones(elements * 3 // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    learned = torch.full((NUM_GROUPS,), 0.03, device=DEVICE), torch.zeros(NUM_GROUPS, device=DEVICE)
    return {
        "quantize": (
            {
                "ours": lambda: ops.quantize(x, q.scale, q.zero_point, q.group_index, 8),
                "torch copy": lambda: target.copy_(source),
            },
            3.0 * elements,
        ),
        "quantize to channels last": (
            {
                "ours": lambda: ops.quantize(planes, q.scale, q.zero_point, q.group_index, 8, True),
                "torch copy": lambda: target.copy_(source),
            },
            3.0 * elements,
        ),
        "GroupNorm+SiLU+quantize": (
            {
                "ours": lambda: ops.group_norm_quantize(
                    [x], weight, bias, None, q, 32, 1e-6, Activation.SILU
                ),
                "torch GroupNorm+SiLU": lambda: F.silu(F.group_norm(x, 32, *half)),
            },
            3.0 * elements,
        ),
        "fake_quantize": (
            {
                "ours": lambda: ops.fake_quantize(x, *learned, q.group_index, -128, 127),
                "torch": lambda: torch.fake_quantize_per_tensor_affine(x, 0.03, 0, -128, 127),
            },
            4.0 * elements,
        ),
    }


def layer_rows(layer: Layer, rounds: int, peak: Peak | None) -> Rows:
    """Time one layer."""
    calls = conv_calls(layer) if isinstance(layer, Conv) else linear_calls(layer)
    rows = rows_of(layer.name, compare(calls, rounds), 1e-6 * layer.operations, "TOP/s")
    if peak is None or (isinstance(layer, Conv) and layer.groups > 1):  # which tensor cores have no part in
        return rows
    return [with_share(row, peak) for row in rows]


def with_share(row: Row | Failure, peak: Peak) -> Row | Failure:
    """The row of a layer, with its share of the peak where it multiplies in int8."""
    if isinstance(row, Failure) or row.contestant not in INT8_CONTESTANTS:
        return row
    return replace(row, share_of_peak=row.rate / peak.tops)


def map_rows(shape: tuple[int, int, int], rounds: int) -> Rows:
    """Time the element-wise work on one map."""
    rows: Rows = []
    for work, (calls, num_bytes) in map_calls(*shape).items():
        name = f"{work} {shape[0]}x{shape[1]}@{shape[2]}"
        rows += rows_of(name, compare(calls, rounds), 1e-3 * num_bytes, "GB/s")
    return rows


def measure(models: Sequence[str], rounds: int, peak: Peak | None) -> Iterator[Rows]:
    """Time one piece of work after the other: layers first, which a step spends most of its time in."""
    for layer in [layer for model in models for layer in LAYERS[model]]:
        yield guarded(layer.name, partial(layer_rows, layer, rounds, peak))
    for shape in MAPS:
        yield guarded(f"map {shape[0]}x{shape[1]}@{shape[2]}", partial(map_rows, shape, rounds))


def guarded(work: str, make: Callable[[], Rows]) -> Rows:
    """The rows of a piece of work, or what is to be said of it where it cannot even be set up."""
    try:
        return make()
    except Exception as error:
        return [Failure(work, "all", reason_of(error))]


def rows_of(work: str, timings: Mapping[str, Timing | Failed], amount: float, unit: str) -> Rows:
    """Rows with the rate `amount / microseconds`: TOP/s for 1e-6 operations, GB/s for 1e-3 bytes."""
    return [
        Failure(work, name, t.reason)
        if isinstance(t, Failed)
        else Row(work, name, t.microseconds, t.ratio, amount / t.microseconds, unit)
        for name, t in timings.items()
    ]


def show(rows: Rows) -> None:
    """One line per contestant."""
    for row in rows:
        if isinstance(row, Failure):
            print(f"{row.work:34} {row.contestant:22} failed: {row.failed}", flush=True)
            continue
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        share = "" if row.share_of_peak is None else f" {row.share_of_peak:6.1%}"
        print(
            f"{row.work:34} {row.contestant:22} {row.microseconds:9.2f} us {row.rate:9.1f} {row.unit} "
            f"{ratio:>7}{share}",
            flush=True,
        )


def parse() -> tuple[argparse.Namespace, Peak | None]:
    """Options, and the peak to compare with where there is one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=25, help="timed replays, at least 20")
    parser.add_argument("--peaks", type=Path, help="default: build/gpu/peaks.json, where that exists")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    if args.rounds < 20:
        parser.error(f"--rounds must be at least 20, got {args.rounds}")
    if not torch.cuda.is_available():
        sys.exit("bench_gpu_kernels: wanted a CUDA device, found none")
    path = args.peaks or (PEAKS if PEAKS.exists() else None)
    if path is None:
        return args, None
    try:
        return args, read_peak(path, torch.cuda.get_device_name())
    except (OSError, ValueError) as error:
        if args.peaks is not None:
            parser.error(str(error))
        print(f"no shares of the peak: {error}", file=sys.stderr)
        return args, None


def main() -> None:
    """Print a table; write it as JSON where asked."""
    args, peak = parse()
    if peak is None:
        print(f"no shares of the peak: wanted --peaks or {PEAKS}, found neither")
    else:
        print(f"last column: share of {peak.tops:.1f} TOP/s, the int8 rate of {peak.instruction}")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    settings = {
        **vars(args),
        "peaks": asdict(peak) if peak is not None else None,
        "device": torch.cuda.get_device_name(),
    }
    rows: Rows = []
    for group in measure(args.models, args.rounds, peak):
        rows += group
        show(group)
        if args.json:
            results_file.write(args.json, settings, map(asdict, rows), "cuda")
    if failed := [f"{row.contestant} on {row.work}" for row in rows if isinstance(row, Failure)]:
        sys.exit(f"bench_gpu_kernels: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
