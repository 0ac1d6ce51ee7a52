"""Times the integer conv2d and linear against torch float32 and oneDNN int8, interleaved.

python benchmarks/bench_kernels.py --model fashion --batch 1 --threads 1 --json result.json --peaks peaks.json

W8A8 and W4A8 are given codes; +quantize includes quantizing float32 activations. --output is of ours and of
oneDNN.
Where the CPU has no VNNI, oneDNN adds products in 16 bits, which weights of 8 bits saturate: it is made for
weights of 7 bits there, and W7A8 of ours is timed as well.
With one thread times are CPU times (other processes of the machine do not count), with more wall times.
Numbers are medians of --repeats samples, ratios medians of the ratios within a round.

--peaks reads what adpdm_cpu_peaks --json wrote on the same machine; a last column is then the share of W8A8
in the best rate of the instruction that its level multiplies with. Operations are those of the direct
convolution: 3x3 convolutions by Winograd's method, which multiply less (by vpdpwssd where there is VNNI), can
exceed 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import peers
import results_file
import torch
import torch.nn.functional as F
from cpu_timing import Clock, clock_of, options, start, time_in_turns
from torch import Tensor

from adpdm import ops
from adpdm._native import build_info
from adpdm.ops import ConvGeometry, Epilogue, Segment

NUM_GROUPS = 8

# What each level multiplies with where codes and weights have 8 bits, as adpdm_cpu_peaks calls it.
INSTRUCTIONS = {
    "avx2": "vpmaddwd + vpaddd",
    "avx_vnni": "vpdpbusd",
    "avx512": "vpdpbusd",
    "amx": "tdpbssd",
}


@dataclass(frozen=True)
class Layer:
    """A convolution of a square map, or a linear layer on `size` rows where kernel is 0."""

    channels: int
    size: int
    outputs: int
    kernel: int
    stride: int = 1
    depthwise: bool = False

    @property
    def groups(self) -> int:
        return self.channels if self.depthwise else 1

    @property
    def name(self) -> str:
        if self.kernel == 0:
            return f"linear {self.size}x{self.channels}->{self.outputs}"
        if self.depthwise:
            return f"depthwise{self.kernel}x{self.kernel}/{self.stride} {self.channels}@{self.size}"
        return f"conv{self.kernel}x{self.kernel}/{self.stride} {self.channels}->{self.outputs}@{self.size}"

    def operations(self, batch: int) -> int:
        """Multiplications and additions."""
        pixels = self.size if self.kernel == 0 else (self.size // self.stride) ** 2
        return 2 * batch * pixels * self.channels // self.groups * self.outputs * max(1, self.kernel) ** 2


MODELS = {
    # The demo U-Net (channels 32/64/128 at 32/16/8).
    "fashion": [
        Layer(1, 32, 32, 3),
        Layer(32, 32, 32, 3),
        Layer(32, 32, 32, 3, 2),
        Layer(96, 32, 32, 3),
        Layer(96, 32, 32, 1),
        Layer(64, 32, 64, 3),
        Layer(32, 16, 64, 3),
        Layer(64, 16, 64, 3),
        Layer(192, 16, 64, 3),
        Layer(192, 16, 64, 1),
        Layer(128, 16, 128, 3),
        Layer(64, 8, 128, 3),
        Layer(128, 8, 128, 3),
        Layer(256, 8, 128, 3),
        Layer(256, 8, 128, 1),
        Layer(32, 32, 1, 3),
        Layer(64, 256, 64, 0),
        Layer(128, 64, 128, 0),
        Layer(128, 1, 128, 0),
    ],
    # google/ddpm-cifar10-32 (channels 128/256/256/256 at 32/16/8/4).
    "cifar": [
        Layer(3, 32, 128, 3),
        Layer(128, 32, 128, 3),
        Layer(256, 32, 128, 3),
        Layer(384, 32, 128, 3),
        Layer(384, 32, 128, 1),
        Layer(256, 32, 256, 3),  # of a map that was doubled
        Layer(128, 32, 128, 3, 2),
        Layer(128, 16, 256, 3),
        Layer(256, 16, 256, 3),
        Layer(384, 16, 256, 3),
        Layer(384, 16, 256, 1),
        Layer(512, 16, 256, 3),
        Layer(512, 16, 256, 1),
        Layer(256, 16, 256, 3, 2),
        Layer(256, 8, 256, 3),
        Layer(512, 8, 256, 3),
        Layer(512, 8, 256, 1),
        Layer(256, 8, 256, 3, 2),
        Layer(256, 4, 256, 3),
        Layer(512, 4, 256, 3),
        Layer(128, 32, 3, 3),
        Layer(256, 256, 256, 0),
    ],
    # The largest layers of Stable Diffusion 1.5, and its linear layers at 64x64, 32x32 and 16x16.
    "sd": [
        Layer(320, 64, 320, 3),
        Layer(640, 32, 640, 3),
        Layer(1280, 16, 1280, 3),
        Layer(1280, 8, 1280, 3),
        Layer(320, 4096, 2560, 0),
        Layer(320, 4096, 320, 0),
        Layer(1280, 1024, 1280, 0),
        Layer(1280, 256, 1280, 0),
    ],
    # Depthwise convolutions of several widths, up to that of a linear transformer's feed-forward net.
    "depthwise": [
        Layer(channels, size, channels, 3, depthwise=True)
        for channels, size in ((256, 64), (320, 32), (1280, 32), (2240, 16), (5600, 32))
    ],
}

OUTPUTS = {"f32": torch.float32, "bf16": torch.bfloat16}

Call = Callable[[], Tensor]


def make_segment(codes: Tensor, weight_codes: Tensor, weight_bits: int, groups: int) -> Segment:
    """A segment with NUM_GROUPS quantizers."""
    sums = weight_codes.flatten(1).sum(1, dtype=torch.int32)
    return Segment(
        codes=codes,
        scale=torch.linspace(0.02, 0.04, NUM_GROUPS),
        zero_point=torch.arange(NUM_GROUPS, dtype=torch.int32),
        group_index=torch.tensor([3], dtype=torch.int32),
        weight=ops.pack_weight(weight_codes, weight_bits, groups),
        weight_scale=torch.full((weight_codes.shape[0],), 0.01),
        weight_sum=sums,
    )


def onednn_conv(x: Tensor, weight_codes: Tensor, bias: Tensor, layer: Layer, output: torch.dtype) -> Call:
    """OneDNN's int8 convolution, as torch's inductor calls it."""
    stride, padding, dilation = [layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1]
    scales = torch.full((layer.outputs,), 0.01)
    zeros = torch.zeros(layer.outputs, dtype=torch.int32)
    packed = torch.ops.onednn.qconv_prepack(
        weight_codes, scales, 0.03, 128, stride, padding, dilation, layer.groups, list(x.shape)
    )
    rest = (stride, padding, dilation, layer.groups, 1.0, 0, output, "none", [], "")
    return lambda: torch.ops.onednn.qconv2d_pointwise(x, 0.03, 128, packed, scales, zeros, bias, *rest)


def onednn_linear(x: Tensor, weight_codes: Tensor, bias: Tensor, output: torch.dtype) -> Call:
    """OneDNN's int8 linear layer."""
    scales = torch.full((weight_codes.shape[0],), 0.01)
    zeros = torch.zeros(weight_codes.shape[0], dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(weight_codes, list(x.shape))
    rest = (1.0, 0, output, "none", [], "")
    return lambda: torch.ops.onednn.qlinear_pointwise(x, 0.03, 128, packed, scales, zeros, bias, *rest)


def random_operands(layer: Layer, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float activations (channels_last), float weights and a bias."""
    bias = torch.randn(layer.outputs)
    if layer.kernel == 0:
        return (
            torch.randn(batch * layer.size, layer.channels),
            torch.randn(layer.outputs, layer.channels),
            bias,
        )
    x = torch.randn(batch, layer.channels, layer.size, layer.size)
    weight = torch.randn(layer.outputs, layer.channels // layer.groups, layer.kernel, layer.kernel)
    last = torch.channels_last
    return x.contiguous(memory_format=last), weight.contiguous(memory_format=last), bias


def calls(layer: Layer, batch: int, output: torch.dtype) -> dict[str, Call]:
    """The contestants on one layer; "W8A8" comes first and is what the others are divided by."""
    x, weight, bias = random_operands(layer, batch)
    codes = (x * 30).round().clamp(-128, 127).to(torch.int8)
    unsigned = (codes.to(torch.int16) + 128).to(torch.uint8)
    if x.dim() == 4:
        unsigned = unsigned.contiguous(memory_format=torch.channels_last)
    reduced = peers.needs_reduced_range()
    w8 = (weight * 40).round().clamp(-128, 127).to(torch.int8)
    w7 = (weight * 20).round().clamp(-64, 63).to(torch.int8)
    w4 = (weight * 3).round().clamp(-8, 7).to(torch.int8)
    pad = layer.kernel // 2
    kernel, stride = (layer.kernel,) * 2, (layer.stride,) * 2
    g = ConvGeometry(layer.outputs, kernel, stride, (pad, pad), groups=layer.groups)
    epilogue = Epilogue(bias)

    def integer(segment: Segment, bits: int) -> Tensor:
        if layer.kernel == 0:
            return ops.linear([segment], epilogue, layer.outputs, bits, output)
        return ops.conv2d([segment], epilogue, g, bits, output)

    s8, s7, s4 = (make_segment(codes, w, bits, layer.groups) for w, bits in ((w8, 8), (w7, 7), (w4, 4)))
    theirs = w7 if reduced else w8

    def with_quantize() -> Tensor:
        fresh = ops.quantize(x, s8.scale, s8.zero_point, s8.group_index, 8)
        fields = (s8.scale, s8.zero_point, s8.group_index, s8.weight, s8.weight_scale, s8.weight_sum)
        return integer(Segment(fresh, *fields), 8)

    if layer.kernel == 0:
        floats, onednn = lambda: F.linear(x, weight, bias), onednn_linear(unsigned, theirs, bias, output)
    else:
        floats = lambda: F.conv2d(x, weight, bias, layer.stride, pad, 1, layer.groups)  # noqa: E731
        onednn = onednn_conv(unsigned, theirs, bias, layer, output)
    return {
        "W8A8": lambda: integer(s8, 8),
        **({"W7A8": lambda: integer(s7, 7)} if reduced else {}),
        "W4A8": lambda: integer(s4, 4),
        "W8A8+quantize": with_quantize,
        "torch f32": floats,
        "oneDNN int8": onednn,
    }


@dataclass(frozen=True)
class Peak:
    """The most that an instruction does on registers alone."""

    instructions: str
    gops: float  # of one thread


def read_peak(path: Path, level: str) -> Peak:
    """The best rate of what `level` multiplies with, from a file of adpdm_cpu_peaks.

    Raises:
        ValueError: where the level has no such instruction, or the file no rate of it.
    """
    if level not in INSTRUCTIONS:
        raise ValueError(f"--peaks: wanted one of the levels {', '.join(INSTRUCTIONS)}, got {level}")
    wanted = INSTRUCTIONS[level]
    for row in json.loads(path.read_text())["rows"]:
        if (row["level"], row["instructions"]) == (level, wanted) and row["best_gops"] is not None:
            return Peak(wanted, row["best_gops"])
    raise ValueError(f"--peaks: wanted the rate of {wanted} at {level}, found none in {path}")


@dataclass(frozen=True)
class Row:
    """Medians of one contestant on one layer."""

    layer: str
    contestant: str
    microseconds: float
    gops: float
    times_w8a8: float  # its time divided by that of W8A8
    share_of_peak: float | None  # of W8A8


def measure(
    layer: Layer,
    batch: int,
    output: torch.dtype,
    repeats: int,
    clock: Clock,
    peak_gops: float | None,  # of all threads
) -> list[Row]:
    """Time all contestants in turns."""
    contestants = calls(layer, batch, output)
    rounds = time_in_turns(contestants, repeats, clock)
    rows = []
    for name in contestants:
        seconds = statistics.median(r[name] for r in rounds)
        ratio = statistics.median(r[name] / r["W8A8"] for r in rounds)
        gops = layer.operations(batch) / seconds / 1e9
        share = gops / peak_gops if peak_gops is not None and name == "W8A8" else None
        rows.append(Row(layer.name, name, seconds * 1e6, gops, ratio, share))
    return rows


def show(rows: list[Row]) -> None:
    """Print one line per layer: microseconds of each contestant, GOP/s of ours, ratios to ours, its share."""
    ours = rows[0]
    times = " ".join(f"{row.microseconds:13.1f}" for row in rows)
    ratios = " ".join(f"{row.times_w8a8:8.2f}" for row in rows[-2:])
    share = "" if ours.share_of_peak is None else f" {ours.share_of_peak:8.2f}"
    print(f"{ours.layer:26} {times} {ours.gops:8.0f} {ratios}{share}", flush=True)


def show_head(rows: list[Row]) -> None:
    """What stands above the lines."""
    names = " ".join(f"{row.contestant:>13}" for row in rows)
    share = "" if rows[0].share_of_peak is None else f" {'W8/peak':>8}"
    print(f"{'layer':26} {names} {'GOP/s':>8} {'f32/W8':>8} {'1DNN/W8':>8}{share}")


def parse() -> tuple[argparse.Namespace, Peak | None]:
    """Options, and the peak to compare with where asked."""
    parser = options(__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="fashion")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--output", choices=list(OUTPUTS), default="f32", help="type of what kernels write")
    parser.add_argument("--peaks", type=Path, help="what adpdm_cpu_peaks --json wrote")
    args = start(parser)
    if args.peaks is None:
        return args, None
    if any(layer.depthwise for layer in MODELS[args.model]):
        parser.error(f"--peaks: wanted layers that are not depthwise, got --model {args.model}")
    try:
        return args, read_peak(args.peaks, build_info()["isa"])
    except (OSError, ValueError) as error:
        parser.error(str(error))


def main() -> None:
    """Print a table; write it as JSON where asked."""
    args, peak = parse()
    print(
        f"{build_info()['isa']}, {args.threads} thread(s), batch {args.batch}, {args.output}, "
        f"torch {torch.__version__}; us:"
    )
    if peak is not None:
        print(f"W8/peak: W8A8 in {args.threads} x {peak.gops:.0f} GOP/s of {peak.instructions}")
    rows: list[Row] = []
    for layer in MODELS[args.model]:
        measured = measure(
            layer,
            args.batch,
            OUTPUTS[args.output],
            args.repeats,
            clock_of(args.threads),
            peak.gops * args.threads if peak is not None else None,
        )
        if not rows:
            show_head(measured)
        show(measured)
        rows += measured
    if args.json:
        settings = {**vars(args), "peaks": asdict(peak) if peak is not None else None}
        results_file.write(args.json, settings, map(asdict, rows))


if __name__ == "__main__":
    main()
