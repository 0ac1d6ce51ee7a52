"""Operators that rotate channels before they quantize: the codes of the reference, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from codes import assert_codes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adpdm import ops, reference
from adpdm.operands import Activation, OutputQuantizer
from adpdm.reference_hadamard import hadamard

SUMS = 2000  # a float32 sum of another order moves all values that it is rotated with
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Fewer blocks side by side than a vector has lanes, powers of two and others, and more.
ROWS = [
    (4, 4),
    (64, 16),
    (48, 16),
    (64, 64),
    (128, 64),
    (192, 64),
    (320, 64),
    (512, 64),
    (1152, 64),
    (320, 16),
]


def reader(block: int, num_bits: int = 8, scale: float = 0.02) -> OutputQuantizer:
    return OutputQuantizer(
        torch.tensor([1.0, scale]),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([1], dtype=torch.int32),
        num_bits,
        block,
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("channels", "block"), ROWS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_gives_the_codes_of_rotated_rows(
    channels: int, block: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = normal(3, 5, channels).to(device, dtype)
    q = [t.to(device) for t in reader(block).qparams]
    codes = ops.quantize(x, *q, 6, hadamard=block)
    assert codes.is_contiguous()
    assert torch.equal(codes, ops.quantize(ops.hadamard(x, block), *q, 6))
    assert torch.equal(codes, reference.quantize(hadamard(x, block), *q, 6))
    gaps = torch.cat([x, x], -1)[..., :channels]
    assert torch.equal(ops.quantize(gaps, *q, 6, hadamard=block), codes)


@pytest.mark.parametrize(("channels", "block"), ROWS)
@given(
    rows=st.integers(1, 9),
    dtype=st.sampled_from(FLOATS),
    modulated=st.booleans(),
    num_bits=st.integers(2, 8),
    seed=st.integers(0, 2**31),
)
def test_layer_norm(
    channels: int, block: int, rows: int, dtype: torch.dtype, modulated: bool, num_bits: int, seed: int
) -> None:
    x = (3 + normal(2, rows, channels, seed=seed)).to(dtype)
    weight, bias = normal(2, channels, seed=seed + 1)
    modulation = normal(2, 2 * channels, seed=seed + 2) if modulated else None
    args = (x, weight, bias, modulation, reader(block, num_bits), 1e-5)
    assert_codes(ops.layer_norm_quantize(*args), reference.layer_norm_quantize(*args), SUMS)


@pytest.mark.parametrize(("channels", "block"), ROWS)
@pytest.mark.parametrize("activation", [Activation.NONE, Activation.SILU])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("modulated", [True, False])
def test_group_norm(
    channels: int, block: int, activation: Activation, dtype: torch.dtype, modulated: bool
) -> None:
    x = normal(2, channels, 5, 3).to(dtype, memory_format=torch.channels_last)
    weight, bias = normal(2, channels, seed=1)
    modulation = normal(2, 2 * channels, seed=2) if modulated else None
    args = ([x], weight, bias, modulation, reader(block), 4, 1e-5, activation)
    codes = ops.group_norm_quantize(*args)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert_codes(codes, reference.group_norm_quantize(*args), SUMS)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("heads", "head_size"), [(1, 64), (2, 32), (8, 40), (4, 20)])
def test_attention(int8: bool, heads: int, head_size: int) -> None:
    channels = heads * head_size
    query, key, value = (normal(2, 37, channels, seed=seed) for seed in range(3))
    block = 64 if channels % 64 == 0 else 16
    args = (query, key, value, reader(block, scale=0.005), heads, int8)
    codes, wanted = ops.attention_quantize(*args), reference.attention_quantize(*args)
    # A code inside that is next to a tie may round the other way, which all channels of its row see.
    assert_codes(codes, wanted, 64 if int8 else SUMS)


def test_operators_pass_opcheck() -> None:
    x = normal(2, 3, 64)
    q = (*reader(16).qparams, 8)
    group, layer = (getattr(torch.ops.adpdm, f"{kind}_norm_quantize").default for kind in ("group", "layer"))
    torch.library.opcheck(torch.ops.adpdm.quantize.default, (x, *q, False, 16))
    torch.library.opcheck(torch.ops.adpdm.quantize.default, (normal(1, 2, 3, 64), *q, False, 16))
    torch.library.opcheck(layer, (x, None, None, None, *q[:3], 1e-5, 8, 16))
    image = [normal(1, 64, 3, 2).to(memory_format=torch.channels_last)]
    torch.library.opcheck(group, (image, None, None, None, *q[:3], 4, 1e-5, 0, 8, 16))
    torch.library.opcheck(torch.ops.adpdm.attention_quantize.default, (x, x, x, *q[:3], 2, 8, True, 16))


def test_nothing_has_no_codes() -> None:
    x, some = torch.zeros(1, 0, 64), torch.zeros(1, 2, 64)
    assert ops.quantize(x, *reader(16).qparams, 8, hadamard=16).shape == (1, 0, 64)
    assert ops.attention_quantize(x, some, some, reader(16), 2).shape == (1, 0, 64)


IMAGE = torch.zeros(1, 48, 2, 2)
REST = (None, None, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.quantize(IMAGE, *reader(16).qparams, 8, hadamard=8),
            "quantize: hadamard must be 4, 16 or 64, got 8",
        ),
        (
            lambda: ops.quantize(torch.zeros(2, 60), *reader(16).qparams, 8, hadamard=16),
            "quantize: x must have a multiple of hadamard=16 channels, got 60",
        ),
        (
            lambda: ops.quantize(IMAGE, *reader(16).qparams, 8, True, 16),
            "quantize: wanted hadamard of rows or channels_last, got both",
        ),
        (
            lambda: ops.layer_norm_quantize(torch.zeros(2, 60), *REST, reader(16), 1e-5),
            "layer_norm_quantize: x must have a multiple of hadamard=16 channels, got 60",
        ),
        (
            lambda: ops.group_norm_quantize([IMAGE], *REST, reader(64), 4, 1e-5, Activation.NONE),
            "group_norm_quantize: x must have a multiple of hadamard=64 channels, got 48",
        ),
        (
            lambda: ops.group_norm_quantize([IMAGE, IMAGE], *REST, reader(4), 4, 1e-5, Activation.NONE),
            "group_norm_quantize: wanted one input where its channels are rotated, got 2",
        ),
        (
            lambda: ops.attention_quantize(*[torch.zeros(1, 2, 60)] * 3, reader(64), 2),
            "attention_quantize: x must have a multiple of hadamard=64 channels, got 60",
        ),
    ],
)
def test_what_cannot_be_rotated_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_group_out_of_range_is_refused_before_anything_is_computed() -> None:
    scale, zero_point, _ = reader(16).qparams
    with pytest.raises(IndexError, match="quantize: group_index must be in"):
        ops.quantize(
            torch.zeros(2, 64), scale, zero_point, torch.tensor([2], dtype=torch.int32), 8, hadamard=16
        )
