"""Operators on CUDA tensors against the CPU's, whose bits they promise, at sizes that fill a GPU.

ADPDM_TEST_DEVICE=cpu compares the CPU with itself: it shows that the tests run, and nothing else.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any, TypeVar

import pytest
import torch
from codes import assert_codes
from torch import Tensor

from adpdm import ops
from adpdm.ops import Activation, ConvGeometry, Epilogue, OutputQuantizer, Segment

DEVICE = torch.device(os.environ.get("ADPDM_TEST_DEVICE", "cuda"))
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device", allow_module_level=True)
CPU = torch.device("cpu")

BITS = [(8, 8), (8, 4), (4, 4)]  # of activations and weights
CONVOLUTIONS = {  # batch, channels of the segments, size of the map, geometry
    "large": (2, [320], 32, ConvGeometry(320, (3, 3), padding=(1, 1))),
    "split reduction": (1, [1280], 8, ConvGeometry(1280, (3, 3), padding=(1, 1))),
    "two segments": (2, [64, 96], 17, ConvGeometry(136, (3, 3), padding=(1, 1))),
    "odd": (3, [13], 9, ConvGeometry(10, (3, 2), (2, 1), (1, 0))),
    "upsampled": (1, [64], 9, ConvGeometry(48, (3, 3), padding=(0, 1), padding_end=(1, 1), upsample=2)),
    "groups": (2, [64], 12, ConvGeometry(64, (3, 3), padding=(1, 1), groups=4)),
    "depthwise": (2, [96], 33, ConvGeometry(96, (3, 3), padding=(1, 1), groups=96)),
}
T = TypeVar("T", OutputQuantizer, Epilogue)


def random_codes(g: torch.Generator, bits: int, *shape: int) -> Tensor:
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, shape, generator=g, dtype=torch.int8)


def quantizer(scale: float = 0.11) -> OutputQuantizer:
    """Of two groups, whose second is the current one."""
    zero_point = torch.tensor([0, -1], dtype=torch.int32)
    return OutputQuantizer(torch.tensor([1.0, scale]), zero_point, torch.tensor([1], dtype=torch.int32), 8)


def on(device: torch.device, value: T) -> T:
    """The same with its tensors on a device."""
    moved: dict[str, Any] = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, Tensor):
            moved[field.name] = part.to(device)
        elif isinstance(part, OutputQuantizer):
            moved[field.name] = on(device, part)
    return replace(value, **moved)


def segment(x: Tensor, weight: Tensor, bits: tuple[int, int], groups: int, device: torch.device) -> Segment:
    """Codes and weights as the kernels read them; 4-bit codes packed where blocks of 32 allow it."""
    x, weight = x.to(device), weight.to(device)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if bits[0] == 4 and weight.shape[1] % 32 == 0:
        x = ops.pack_int4(x.permute(0, 2, 3, 1).contiguous() if x.dim() == 4 else x)
    return Segment(
        x,
        torch.tensor([0.3, 0.02], device=device),
        torch.tensor([0, 3], dtype=torch.int32, device=device),
        torch.tensor([1], dtype=torch.int32, device=device),
        ops.pack_weight(weight, bits[1], groups),
        torch.linspace(0.001, 0.01, weight.shape[0]).to(device),
        weight.flatten(1).sum(1, dtype=torch.int32),
    )


@pytest.mark.parametrize("is_full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_conv2d_gives_the_bits_of_the_cpu(name: str, bits: tuple[int, int], is_full: bool) -> None:
    batch, channels, size, geometry = CONVOLUTIONS[name]
    g = torch.Generator().manual_seed(1)
    kernel = (geometry.out_channels, *geometry.kernel_size)
    weights = [random_codes(g, bits[1], kernel[0], c // geometry.groups, *kernel[1:]) for c in channels]
    inputs = [random_codes(g, bits[0], batch, c, size, size) for c in channels]
    epilogue, dtype = Epilogue(), torch.float32
    if is_full:
        bias, scales, biases = (torch.randn(rows, kernel[0], generator=g) for rows in (1, batch, batch))
        shape = (batch, kernel[0], *geometry.output_size(size, size))
        residual = torch.randn(shape, generator=g).bfloat16()
        epilogue = Epilogue(bias[0], scales, biases, residual, 0.5, Activation.SILU, quantizer())
        dtype = torch.bfloat16
    results = []
    for device in (CPU, DEVICE):
        pairs = zip(inputs, weights, strict=True)
        segments = [segment(x, weight, bits, geometry.groups, device) for x, weight in pairs]
        results.append(ops.conv2d(segments, on(device, epilogue), geometry, bits[1], dtype).cpu())
    assert torch.equal(*results)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(2048, [640], 1280), (300, [64, 128], 200), (7, [77], 6)]
)
def test_linear_gives_the_bits_of_the_cpu(
    rows: int, inputs: list[int], outputs: int, bits: tuple[int, int], activation: Activation
) -> None:
    g = torch.Generator().manual_seed(2)
    pairs = [(random_codes(g, bits[0], rows, k), random_codes(g, bits[1], outputs, k)) for k in inputs]
    epilogue = Epilogue(torch.randn(outputs, generator=g), activation=activation, quantizer=quantizer())
    results = []
    for device in (CPU, DEVICE):
        segments = [segment(x, weight, bits, 1, device) for x, weight in pairs]
        results.append(ops.linear(segments, on(device, epilogue), outputs, bits[1], torch.float32).cpu())
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 320, 64, 64), (1, 30, 9, 7), (3, 1280, 8, 8)])
def test_group_norm_gives_the_codes_of_the_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    first = (torch.randn(shape, generator=g) * 3 + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    second = torch.randn(shape, generator=g).to(dtype)
    weight, bias = torch.randn(2, 2 * shape[1], generator=g)
    results = []
    for device in (CPU, DEVICE):
        parts, q = [first.to(device), second.to(device)], on(device, quantizer(0.02))
        affine = (weight.to(device), bias.to(device))
        codes = ops.group_norm_quantize(parts, *affine, None, q, 10, 1e-5, Activation.SILU)
        each = ops.group_norm_quantize_each(parts, *affine, [q, q], 10, 1e-5, Activation.SILU)
        assert torch.equal(torch.cat(each, 1), codes)
        results.append(codes)
    assert_codes(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 4096, 640), (3, 77, 1280), (5, 77)])
def test_layer_norm_gives_the_codes_of_the_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    x = (torch.randn(shape, generator=g) + 0.5).to(dtype)
    modulation = torch.randn(shape[0], 2 * shape[-1], generator=g)
    cpu, there = (
        ops.layer_norm_quantize(
            x.to(device), None, None, modulation.to(device), on(device, quantizer(0.02)), 1e-5
        )
        for device in (CPU, DEVICE)
    )
    assert_codes(there, cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "block"), [(64, 64), (320, 64), (48, 16)])
def test_rotated_rows_give_the_codes_of_the_cpu(channels: int, block: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(8)
    x = (torch.randn(3, channels, 9, 7, generator=g) + 0.5).to(dtype)
    weight, bias = torch.randn(2, channels, generator=g)
    modulation = torch.randn(3, 2 * channels, generator=g)
    results: list[list[Tensor]] = []
    for device in (CPU, DEVICE):
        image, rows = x.to(device), x.to(device).permute(0, 2, 3, 1).reshape(3, 63, channels)
        affine = (weight.to(device), bias.to(device))
        q = replace(on(device, quantizer(0.05)), hadamard=block)
        results.append(
            [
                ops.quantize(rows, q.scale, q.zero_point, q.group_index, 8, hadamard=block).cpu(),
                ops.layer_norm_quantize(rows, *affine, modulation.to(device), q, 1e-5).cpu(),
                ops.group_norm_quantize([image], *affine, None, q, 8, 1e-5, Activation.NONE).cpu(),
            ]
        )
    assert torch.equal(results[0][0], results[1][0])
    for there, cpu in zip(results[1][1:], results[0][1:], strict=True):
        assert_codes(there, cpu)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layout", ["channels", "planes", "columns", "images", "expanded"])
def test_slices_are_read_where_they_lie(layout: str, channels_last: bool) -> None:
    """Made on the device: `.to` would give a copy without gaps."""
    x = torch.randn(3, 71, 33, 40, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    view = {
        "channels": x.contiguous(memory_format=torch.channels_last)[:, 3:67],
        "planes": x[:, 3:67],
        "columns": x[..., 1:38],
        "images": x[1:],
        "expanded": x[:, :1].expand(-1, 8, -1, -1),
    }[layout]
    cpu, there = quantizer(), on(DEVICE, quantizer())
    expected = ops.quantize(view.cpu(), cpu.scale, cpu.zero_point, cpu.group_index, 8, channels_last)
    found = ops.quantize(view, there.scale, there.zero_point, there.group_index, 8, channels_last)
    assert torch.equal(found.cpu(), expected)


def test_sums_over_many_blocks_are_those_of_the_cpu() -> None:
    """More values than one round of resident blocks observes, and than one round of chunks of gradients."""
    x, grad = torch.randn(2, 5_000_011, generator=torch.Generator().manual_seed(6))
    scale, zero_point = torch.tensor([0.1, 0.2]), torch.tensor([0.3, -2.6])
    results = []
    for device in (CPU, DEVICE):
        group = torch.ones(1, dtype=torch.int32, device=device)
        counts = torch.zeros(2, 2049, dtype=torch.int64, device=device)
        extrema = torch.tensor([[torch.inf, -torch.inf]] * 2, device=device)
        ops.observe(x.to(device), counts, extrema, group)
        given = [t.to(device) for t in (grad, x, scale, zero_point)]
        sums = torch.ops.adpdm.fake_quantize_backward(*given, group, -8, 7, -1)
        mixed = torch.ops.adpdm.fake_quantize_mixture_backward(*given, given[2], -8, 7)
        results.append([t.cpu() for t in (counts, extrema, *sums, *mixed)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="streams and graphs are CUDA's")
def test_operators_run_on_the_current_stream_and_in_a_graph() -> None:
    q = on(DEVICE, quantizer(0.05))
    x, stream = torch.zeros(1 << 20, device=DEVICE), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second: who does not wait for it reads zeros
        x.fill_(1.0)
        codes = ops.quantize(x, q.scale, q.zero_point, q.group_index, 8)
    stream.synchronize()
    assert (codes == 19).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = ops.quantize(x, q.scale, q.zero_point, q.group_index, 8)
    x.fill_(2.0)
    q.scale.fill_(0.1)
    graph.replay()
    assert (codes == 19).all()


def test_integer_layers_pass_opcheck() -> None:
    g, q = torch.Generator().manual_seed(7), on(DEVICE, quantizer())
    geometry = ConvGeometry(6, (3, 2), stride=(2, 1), padding=(1, 0))
    end = Epilogue(torch.randn(6, generator=g).to(DEVICE), quantizer=q)
    segments = [
        segment(random_codes(g, 8, 2, c, 5, 4), random_codes(g, 8, 6, c, 3, 2), (8, 8), 1, DEVICE)
        for c in (4, 3)
    ]
    arguments = ops.igemm_arguments(segments, end, geometry.numbers(), 8, torch.float32)
    torch.library.opcheck(torch.ops.adpdm.conv2d.default, arguments)
    segments = [segment(random_codes(g, 8, 2, 3, 9), random_codes(g, 8, 6, 9), (8, 8), 1, DEVICE)]
    arguments = ops.igemm_arguments(segments, end, 6, 8, torch.bfloat16)
    torch.library.opcheck(torch.ops.adpdm.linear.default, arguments)


def test_norms_pass_opcheck() -> None:
    q = on(DEVICE, quantizer())
    qparams = (q.scale, q.zero_point, q.group_index)
    parts = [torch.randn(2, c, 3, 4, device=DEVICE) for c in (8, 4)]
    arguments: tuple[Any, ...] = (parts, None, None, None, *qparams, 4, 1e-5, 1, 8)
    torch.library.opcheck(torch.ops.adpdm.group_norm_quantize.default, arguments)
    arguments = (*parts, None, None, [*qparams] * 2, 4, 1e-5, 1, [8, 4])
    torch.library.opcheck(torch.ops.adpdm.group_norm_quantize_each.default, arguments)
    arguments = (torch.randn(2, 3, 12, device=DEVICE), None, None, None, *qparams, 1e-5, 8)
    torch.library.opcheck(torch.ops.adpdm.layer_norm_quantize.default, arguments)
