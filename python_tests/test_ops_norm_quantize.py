"""Tests of the normalisations that end in codes against their plain-torch twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codes import assert_codes
from hypothesis import given
from hypothesis import strategies as st
from thread_counts import threads

from adpdm import ops, reference
from adpdm.ops import Activation, OutputQuantizer

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def quantizer(num_bits: int = 8, scale: float = 0.02, group: int = 1) -> OutputQuantizer:
    return OutputQuantizer(
        torch.tensor([1.0, scale]),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([group], dtype=torch.int32),
        num_bits,
    )


@given(
    image=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    channels=st.lists(st.integers(1, 12).map(lambda c: 4 * c), min_size=1, max_size=2),
    norm_groups=st.sampled_from([1, 2, 4]),
    affine=st.booleans(),
    modulated=st.booleans(),
    activation=st.sampled_from([Activation.NONE, Activation.SILU]),
    num_bits=st.integers(2, 8),
    dtype=st.sampled_from(FLOATS),
    mean=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_group_norm_quantize_matches_reference(
    image: tuple[int, int, int],
    channels: list[int],
    norm_groups: int,
    affine: bool,
    modulated: bool,
    activation: Activation,
    num_bits: int,
    dtype: torch.dtype,
    mean: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, total = image[0], sum(channels)
    inputs = [
        (torch.randn(batch, c, *image[1:], generator=generator) + mean)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for c in channels
    ]
    weight, bias = (torch.randn(total, generator=generator) if affine else None for _ in range(2))
    modulation = torch.randn(batch, 2 * total, generator=generator) if modulated else None
    args = (inputs, weight, bias, modulation, quantizer(num_bits), norm_groups, 1e-5, activation)
    actual = ops.group_norm_quantize(*args)
    assert_codes(actual, reference.group_norm_quantize(*args))
    assert actual.is_contiguous(memory_format=torch.channels_last)


@given(
    image=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    channels=st.tuples(st.integers(1, 12), st.integers(1, 12)).map(lambda c: (4 * c[0], 4 * c[1])),
    norm_groups=st.sampled_from([1, 2, 4]),
    affine=st.booleans(),
    activation=st.sampled_from([Activation.NONE, Activation.SILU]),
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_group_norm_quantize_each_is_a_norm_under_each_quantizer(
    image: tuple[int, int, int],
    channels: tuple[int, int],
    norm_groups: int,
    affine: bool,
    activation: Activation,
    bits: tuple[int, int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(image[0], c, *image[1:], generator=generator).to(dtype) for c in channels]
    weight, bias = (torch.randn(sum(channels), generator=generator) if affine else None for _ in range(2))
    quantizers = [quantizer(bits[0], scale=0.03), quantizer(bits[1], scale=0.05)]
    settings = (norm_groups, 1e-5, activation)
    actual = ops.group_norm_quantize_each(inputs, weight, bias, quantizers, *settings)
    first, second = (ops.group_norm_quantize(inputs, weight, bias, None, q, *settings) for q in quantizers)
    # the same statistics, so the same bits
    assert torch.equal(actual[0], first[:, : channels[0]])
    assert torch.equal(actual[1], second[:, channels[0] :])
    wanted = reference.group_norm_quantize_each(inputs, weight, bias, quantizers, *settings)
    for codes, expected in zip(actual, wanted, strict=True):
        assert_codes(codes, expected)
        assert codes.is_contiguous(memory_format=torch.channels_last)


def test_group_norm_quantize_each_rejects() -> None:
    x = torch.zeros(1, 4, 2, 2)
    q = quantizer()
    with pytest.raises(
        ValueError, match="group_norm_quantize_each: qparams must be 6 tensors .* got 3 and 1"
    ):
        ops.group_norm_quantize_each([x, x], None, None, [q], 2, 1e-5, Activation.NONE)
    with pytest.raises(ValueError, match="group_norm_quantize_each: num_bits must be"):
        ops.group_norm_quantize_each([x, x], None, None, [q, quantizer(9)], 2, 1e-5, Activation.NONE)
    with pytest.raises(IndexError, match="group_norm_quantize_each: group_index must be in"):
        ops.group_norm_quantize_each([x, x], None, None, [q, quantizer(group=2)], 2, 1e-5, Activation.NONE)


def test_group_norm_quantize_each_passes_opcheck() -> None:
    q = quantizer()
    x, y = torch.randn(2, 4, 3, 3), torch.randn(2, 8, 3, 3)
    qparams = [q.scale, q.zero_point, q.group_index] * 2
    args = (x, y, None, None, qparams, 4, 1e-5, 1, [8, 4])
    torch.library.opcheck(torch.ops.adpdm.group_norm_quantize_each.default, args)


@given(
    leading=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    channels=st.integers(2, 400),
    affine=st.booleans(),
    modulated=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_layer_norm_quantize_matches_reference(
    leading: list[int], channels: int, affine: bool, modulated: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(*leading, channels, generator=generator) + 0.5).to(dtype)
    weight, bias = (torch.randn(channels, generator=generator) if affine else None for _ in range(2))
    modulation = torch.randn(leading[0], 2 * channels, generator=generator) if modulated else None
    args = (x, weight, bias, modulation, quantizer(), 1e-5)
    assert_codes(ops.layer_norm_quantize(*args), reference.layer_norm_quantize(*args))


@pytest.mark.parametrize(("value", "eps"), [(2e4, 1e-6), (7e4, 1e-5)])
@pytest.mark.parametrize("channels", [100, 320])
def test_layer_norm_quantize_of_constant_rows(
    value: float, eps: float, channels: int, generator: torch.Generator
) -> None:
    x = (value + torch.rand(64, 1, generator=generator)).expand(-1, channels)
    codes = ops.layer_norm_quantize(x, None, None, None, quantizer(), eps)
    assert (codes > -128).all()  # the code of NaN, as of the root of a variance below 0


def test_group_norm_quantize_equals_quantized_group_norm(generator: torch.Generator) -> None:
    # torch's own GroupNorm and SiLU round elsewhere: codes agree but for ties.
    x = torch.randn(2, 64, 16, 16, generator=generator)
    weight, bias = torch.randn(64, generator=generator), torch.randn(64, generator=generator)
    y = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 32, weight, bias, 1e-5))
    q = quantizer()
    wanted = reference.quantize(y, q.scale, q.zero_point, q.group_index, 8)
    actual = ops.group_norm_quantize([x], weight, bias, None, q, 32, 1e-5, Activation.SILU)
    assert (actual.int() - wanted.int()).abs().max() <= 1
    assert (actual != wanted).float().mean() < 1e-3


def test_norms_do_not_depend_on_threads(generator: torch.Generator) -> None:
    x = torch.randn(2, 128, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    rows = torch.randn(300, 320, generator=generator)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            group = ops.group_norm_quantize([x], None, None, None, quantizer(), 32, 1e-5, Activation.SILU)
            results.append((group, ops.layer_norm_quantize(rows, None, None, None, quantizer(), 1e-5)))
    for group, layer in results[1:]:
        assert torch.equal(group, results[0][0])
        assert torch.equal(layer, results[0][1])


def test_norms_opcheck(generator: torch.Generator) -> None:
    q = quantizer()
    qparams = (q.scale, q.zero_point, q.group_index)
    inputs = [torch.randn(2, c, 3, 4, generator=generator) for c in (8, 4)]
    modulation = torch.randn(2, 24, generator=generator)
    args = (inputs, torch.ones(12), None, modulation, *qparams, 4, 1e-5, 1, 8)
    torch.library.opcheck(torch.ops.adpdm.group_norm_quantize.default, args)
    x = torch.randn(2, 3, 12, generator=generator)
    row_args = (x, None, torch.ones(12), modulation, *qparams, 1e-5, 8)
    torch.library.opcheck(torch.ops.adpdm.layer_norm_quantize.default, row_args)


def test_empty_batches_keep_their_shape() -> None:
    group = ops.group_norm_quantize(
        [torch.zeros(0, 8, 3, 3)], None, None, None, quantizer(), 4, 1e-5, Activation.NONE
    )
    assert group.shape == (0, 8, 3, 3)
    assert ops.layer_norm_quantize(torch.zeros(0, 8), None, None, None, quantizer(), 1e-5).shape == (0, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inputs": []}, ValueError, "inputs must be 1 or 2 tensors, got 0"),
        ({"inputs": [torch.zeros(2, 8)]}, ValueError, r"inputs\[0\] must have 4 dimensions .*, got 2"),
        ({"inputs": [torch.zeros(2, 8, 1, 1).int()]}, TypeError, r"inputs\[0\] must be torch.float32, torch"),
        (
            {"inputs": [torch.zeros(2, 8, 1, 1), torch.zeros(2, 8, 1, 2)]},
            ValueError,
            r"inputs\[1\] must equal inputs\[0\] in all but the channels, got \[2, 8, 1, 2\]",
        ),
        ({"norm_groups": 3}, ValueError, "norm_groups must divide the 8 channels, got 3"),
        ({"activation": 2}, ValueError, r"activation must be 0 \(none\) or 1 \(silu\), got 2"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight must have shape \[8\], got \[7\]"),
        ({"bias": torch.zeros(8).half()}, TypeError, "bias must be torch.float32, got torch.float16"),
        ({"modulation": torch.zeros(2, 8)}, ValueError, r"modulation must have shape \[any, 16\], got"),
        ({"modulation": torch.zeros(3, 16)}, ValueError, "modulation must have a row for each of 2 images"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1"),
        ({"num_bits": 9}, ValueError, r"num_bits must be in \[2, 8\], got 9"),
        (
            {"group_index": torch.tensor([2], dtype=torch.int32)},
            IndexError,
            r"group_index must be in \[0, num_groups=2\), got 2",
        ),
    ],
)
def test_group_norm_quantize_rejects(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    q = quantizer()
    arguments: dict[str, Any] = {
        "inputs": [torch.zeros(2, 8, 1, 1)],
        "weight": None,
        "bias": None,
        "modulation": None,
        "scale": q.scale,
        "zero_point": q.zero_point,
        "group_index": q.group_index,
        "norm_groups": 4,
        "eps": 1e-5,
        "activation": 1,
        "num_bits": 8,
    }
    with pytest.raises(error, match="group_norm_quantize: " + message):
        torch.ops.adpdm.group_norm_quantize(**{**arguments, **changes})


def test_layer_norm_quantize_rejects() -> None:
    with pytest.raises(ValueError, match="layer_norm_quantize: x must have at least one dimension, got a sc"):
        ops.layer_norm_quantize(torch.zeros(()), None, None, None, quantizer(), 1e-5)
    with pytest.raises(
        ValueError, match="layer_norm_quantize: modulation must divide the 3 rows of x evenly, got 2 rows"
    ):
        ops.layer_norm_quantize(torch.zeros(3, 8), None, None, torch.zeros(2, 16), quantizer(), 1e-5)
