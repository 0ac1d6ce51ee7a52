"""quantize, dequantize and 4-bit packing against the plain-torch reference, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_counts import threads
from torch import Tensor

from adpdm import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0, -0.0, torch.inf, -torch.inf, torch.nan, 6e4, -6e4, 1e-7]
LAYOUTS = [
    "contiguous",
    "channels_last",
    "channel_slice",
    "planes_slice",
    "column_slice",
    "transposed",
    "expanded",
]


def tensor_in_layout(shape: list[int], layout: str, seed: int) -> Tensor:
    """Values around the range of 8-bit codes with special ones strewn in, f32 of that shape."""
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    full = {
        "channel_slice": [n, c + 3, h, w],
        "planes_slice": [n, c + 3, h, w],
        "column_slice": [n, c, h, w + 2],
        "transposed": [n, c, w, h],
        "expanded": [n, 1, h, w],
    }.get(layout, shape)
    x = torch.randn(full, generator=generator) * 60
    flat = x.view(-1)
    places = torch.randperm(flat.numel(), generator=generator)[: len(SPECIAL)]
    flat[places] = torch.tensor(SPECIAL)[: len(places)]
    if layout in ("channels_last", "channel_slice"):
        x = x.to(memory_format=torch.channels_last)
    views = {
        "channel_slice": lambda: x[:, 2 : c + 2],
        "planes_slice": lambda: x[:, 2 : c + 2],
        "column_slice": lambda: x[..., 1 : w + 1],
        "transposed": lambda: x.transpose(2, 3),
        "expanded": lambda: x.expand(shape),
    }
    return views[layout]() if layout in views else x


def qparams(num_groups: int, group: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """scale [G] f32, zero_point [G] i32, group_index [1] i32."""
    scale = torch.linspace(0.3, 1.3, num_groups)
    zero_point = torch.arange(num_groups, dtype=torch.int32) * 3 - 4
    index = torch.tensor([group], dtype=torch.int32)
    return scale.to(device), zero_point.to(device), index.to(device)


shapes = st.lists(st.integers(0, 9), min_size=4, max_size=4)


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=shapes, layout=st.sampled_from(LAYOUTS), bits=st.integers(2, 8), seed=st.integers(0, 99))
def test_quantize_equals_reference(
    dtype: torch.dtype, shape: list[int], layout: str, bits: int, seed: int
) -> None:
    x = tensor_in_layout(shape, layout, seed).to(dtype)
    arguments = qparams(num_groups=3, group=seed % 3)
    assert torch.equal(ops.quantize(x, *arguments, bits), reference.quantize(x, *arguments, bits))


@pytest.mark.parametrize("layout", ["channels_last", "channel_slice"])
def test_quantize_keeps_channels_last(layout: str, device: torch.device) -> None:
    x = tensor_in_layout([2, 5, 3, 4], layout, 0).to(device)
    codes = ops.quantize(x, *qparams(2, 1, device), 8)
    assert codes.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(0, 12), st.integers(0, 12)),
    layout=st.sampled_from(LAYOUTS),
    bits=st.integers(2, 8),
    seed=st.integers(0, 99),
)
def test_quantize_to_channels_last_equals_reference(
    dtype: torch.dtype, shape: tuple[int, ...], layout: str, bits: int, seed: int
) -> None:
    x = tensor_in_layout(list(shape), layout, seed).to(dtype)
    arguments = qparams(num_groups=3, group=seed % 3)
    codes = ops.quantize(x, *arguments, bits, channels_last=True)
    expected = reference.quantize(x, *arguments, bits, channels_last=True)
    assert codes.stride() == torch.empty(shape).to(memory_format=torch.channels_last).stride()
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantize_to_channels_last_on_every_device(layout: str, device: torch.device) -> None:
    for shape in ([2, 67, 9, 31], [3, 5, 16, 16], [1, 130, 8, 8]):
        x = tensor_in_layout(shape, layout, 3).to(device)
        codes = ops.quantize(x, *qparams(2, 1, device), 8, channels_last=True)
        assert codes.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(codes, reference.quantize(x, *qparams(2, 1, device), 8))


@pytest.mark.parametrize("shape", [(), (1,), (16385,), (3, 0), (2, 40000)])
def test_quantize_any_shape(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> None:
    x = torch.randn(shape, generator=generator).to(device)
    arguments = qparams(8, 5, device)
    codes = ops.quantize(x, *arguments, 8)
    assert torch.equal(codes.cpu(), reference.quantize(x, *arguments, 8).cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(0, 4), columns=st.integers(0, 70), step=st.integers(1, 2), seed=st.integers(0, 99))
def test_quantize_int4_equals_reference(
    dtype: torch.dtype, rows: int, columns: int, step: int, seed: int
) -> None:
    x = (torch.randn(rows, 2, columns * step, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)
    x = x[..., :columns] if seed % 2 else x[..., ::step]
    arguments = qparams(num_groups=3, group=seed % 3)
    packed = ops.quantize_int4(x, *arguments)
    assert torch.equal(packed, reference.quantize_int4(x, *arguments))
    values = ops.dequantize_int4(packed, *arguments, x.shape[-1], dtype)
    assert torch.equal(values, reference.dequantize_int4(packed, *arguments, x.shape[-1], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=shapes, seed=st.integers(0, 99))
def test_dequantize_equals_reference(dtype: torch.dtype, shape: list[int], seed: int) -> None:
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    if seed % 2:
        codes = codes.to(memory_format=torch.channels_last)
    arguments = (*qparams(num_groups=3, group=seed % 3), dtype)
    assert torch.equal(ops.dequantize(codes, *arguments), reference.dequantize(codes, *arguments))


@given(rows=st.integers(0, 3), columns=st.integers(0, 100), seed=st.integers(0, 99))
def test_unpack_int4_inverts_pack_int4(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(
        -8, 8, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed)
    )
    packed = ops.pack_int4(codes)
    assert torch.equal(packed, reference.pack_int4(codes))
    assert torch.equal(ops.unpack_int4(packed, columns), codes)


def test_pack_int4_literal_bytes(device: torch.device) -> None:
    codes = torch.tensor([[1, -1, 7, *[0] * 13, -8, 2]], dtype=torch.int8, device=device)
    assert ops.pack_int4(codes).tolist() == [[0x81, 0x2F, 0x07, *[0] * 13]]


def test_int4_packing_runs_on_devices_without_kernels(generator: torch.Generator) -> None:
    codes = torch.randint(-8, 8, (3, 40), dtype=torch.int8, generator=generator)
    elsewhere = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)  # on what is registered there, CPU tensors
    packed = torch.ops.adpdm.pack_int4.default.redispatch(elsewhere, codes)
    assert torch.equal(packed, ops.pack_int4(codes))
    assert torch.equal(torch.ops.adpdm.unpack_int4.default.redispatch(elsewhere, packed, 40), codes)


@pytest.mark.parametrize("layout", ["channel_slice", "planes_slice"])
def test_quantize_same_codes_for_any_thread_count(layout: str) -> None:
    x = tensor_in_layout([4, 64, 40, 40], layout, 1)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(ops.quantize(x, *qparams(3, 2), 8, channels_last=True))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "name", ["quantize", "quantize_int4", "dequantize", "dequantize_int4", "pack_int4", "unpack_int4"]
)
def test_quantize_family_passes_opcheck(name: str, device: torch.device) -> None:
    codes = torch.zeros(2, 6, 3, 5, dtype=torch.int8, device=device)
    x = torch.randn(2, 9, 3, 5, device=device).to(memory_format=torch.channels_last)[:, 1:7]
    packed = torch.zeros(3, 16, dtype=torch.uint8, device=device)
    parameters = qparams(2, 1, device)
    arguments = {
        "quantize": (x, *parameters, 8),
        "quantize_int4": (x, *parameters),
        "dequantize": (codes, *parameters, torch.bfloat16),
        "dequantize_int4": (packed, *parameters, 20, torch.float32),
        "pack_int4": (codes,),
        "unpack_int4": (packed, 20),
    }
    torch.library.opcheck(getattr(torch.ops.adpdm, name).default, arguments[name])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [[2, 6, 3, 5], [2, 1, 3, 5], [2, 6, 1, 1]])
def test_quantize_to_channels_last_passes_opcheck(
    layout: str, shape: list[int], device: torch.device
) -> None:
    x = tensor_in_layout(shape, layout, 0).to(device)
    torch.library.opcheck(torch.ops.adpdm.quantize.default, (x, *qparams(2, 1, device), 8, True))


ERRORS = [
    (
        {"x": torch.zeros(2, dtype=torch.float64)},
        TypeError,
        "x must be torch.float32, torch.bfloat16 or .* got torch.float64",
    ),
    (
        {"scale": torch.ones(3, dtype=torch.float64)},
        TypeError,
        "scale must be torch.float32, got torch.float64",
    ),
    ({"scale": torch.ones(0)}, ValueError, "scale must have num_groups > 0 rows"),
    ({"scale": torch.ones(6)[::2]}, ValueError, "scale must be contiguous, got stride 2"),
    ({"zero_point": torch.zeros(3)}, TypeError, "zero_point must be torch.int32, got torch.float32"),
    (
        {"zero_point": torch.zeros(4, dtype=torch.int32)},
        ValueError,
        r"zero_point must have shape \[3\], got \[4\]",
    ),
    (
        {"group_index": torch.zeros(2, dtype=torch.int32)},
        ValueError,
        r"group_index must have shape \[1\], got \[2\]",
    ),
    ({"num_bits": 9}, ValueError, r"num_bits must be in \[2, 8\], got 9"),
    ({"num_bits": 1}, ValueError, r"num_bits must be in \[2, 8\], got 1"),
    ({"channels_last": True}, ValueError, r"x must have 4 dimensions for channels_last, got \[2\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_quantize_rejects(change: dict[str, object], error: type[Exception], message: str) -> None:
    scale, zero_point, index = qparams(3, 0)
    arguments = {
        "x": torch.zeros(2),
        "scale": scale,
        "zero_point": zero_point,
        "group_index": index,
        "num_bits": 8,
    }
    with pytest.raises(error, match=f"quantize: {message}"):
        ops.quantize(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("group", [-1, 3])
def test_quantize_rejects_group_index_out_of_range_on_cpu(group: int) -> None:
    for channels_last in (False, True):
        with pytest.raises(IndexError, match=rf"group_index must be in \[0, num_groups=3\), got {group}"):
            ops.quantize(torch.zeros(1, 2, 3, 3), *qparams(3, group), 8, channels_last)


def test_zero_points_are_codes_on_cpu() -> None:
    scale, index = torch.ones(2), torch.tensor([1], dtype=torch.int32)
    zero_point = torch.tensor([0, 32768], dtype=torch.int32)
    codes = torch.zeros(2, 16, dtype=torch.int8)
    calls: dict[str, Callable[[], Tensor]] = {
        "quantize": lambda: ops.quantize(torch.zeros(2, 32), scale, zero_point, index, 8),
        "quantize_int4": lambda: ops.quantize_int4(torch.zeros(2, 32), scale, zero_point, index),
        "dequantize": lambda: ops.dequantize(codes, scale, zero_point, index, torch.float32),
        "dequantize_int4": lambda: ops.dequantize_int4(
            codes.view(torch.uint8), scale, zero_point, index, 32, torch.float32
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"{name}: zero_point\[1\] must be a code in \[-128, 127\]"):
            call()


def test_int4_rejects_scalars_and_wrong_row_size() -> None:
    with pytest.raises(ValueError, match="quantize_int4: x must have at least one dimension, got a scalar"):
        ops.quantize_int4(torch.tensor(1.0), *qparams(3, 0))
    with pytest.raises(
        ValueError, match="unpack_int4: packed must have 32 bytes per row for num_columns=33, got 16"
    ):
        ops.unpack_int4(torch.zeros(2, 16, dtype=torch.uint8), 33)
