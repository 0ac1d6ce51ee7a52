"""Tests of the integer linear layer against its plain-torch twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adpdm import ops, reference
from adpdm.ops import Epilogue, Segment


def make_segment(
    codes: Tensor, weight_codes: Tensor, weight_bits: int, generator: torch.Generator, unit: bool
) -> Segment:
    """A segment with three quantizers, the last one current; `unit` scales make outputs exact integers."""
    outputs = weight_codes.shape[0]
    scales = torch.rand(3, generator=generator) + 0.01
    return Segment(
        codes=codes,
        scale=torch.ones(3) if unit else scales,
        zero_point=torch.randint(-128, 128, (3,), generator=generator, dtype=torch.int32),
        group_index=torch.tensor([2], dtype=torch.int32),
        weight=ops.pack_weight(weight_codes, weight_bits),
        weight_scale=torch.ones(outputs) if unit else torch.rand(outputs, generator=generator) + 0.01,
        weight_sum=weight_codes.sum(1, dtype=torch.int32),
    )


def random_codes(generator: torch.Generator, bits: int, *shape: int) -> Tensor:
    low, high = reference.signed_range(bits)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)


def expected(
    segments: list[Segment], weights: list[Tensor], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return reference.linear(
        [s.codes for s in segments],
        [s.scale for s in segments],
        [s.zero_point for s in segments],
        [s.group_index for s in segments],
        weights,
        [s.weight_scale for s in segments],
        [s.weight_sum for s in segments],
        Epilogue(bias),
        dtype,
    )


def make_layer(
    generator: torch.Generator, leading: list[int], features: list[int], outputs: int, bits: int, unit: bool
) -> tuple[list[Segment], list[Tensor]]:
    weights = [random_codes(generator, bits, outputs, k) for k in features]
    segments = [
        make_segment(random_codes(generator, 8, *leading, k), w, bits, generator, unit)
        for k, w in zip(features, weights, strict=True)
    ]
    return segments, weights


@given(
    leading=st.lists(st.integers(0, 7), max_size=2),
    features=st.lists(st.integers(1, 70), min_size=1, max_size=2),
    outputs=st.integers(1, 70),
    bits=st.integers(2, 8),
    seed=st.integers(0, 2**31),
)
def test_linear_accumulators_are_exact(
    leading: list[int], features: list[int], outputs: int, bits: int, seed: int
) -> None:
    # |sum| <= 2 * 70 * 255 * 128 < 2^24: float32 holds it exactly.
    generator = torch.Generator().manual_seed(seed)
    segments, weights = make_layer(generator, leading, features, outputs, bits, unit=True)
    actual = ops.linear(segments, Epilogue(), outputs, bits, torch.float32)
    assert torch.equal(actual, expected(segments, weights, None, torch.float32))
    assert actual.is_contiguous()


@given(
    rows=st.integers(1, 9),
    features=st.lists(st.integers(1, 300), min_size=1, max_size=2),
    outputs=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_linear_values_are_within_one_ulp(rows: int, features: list[int], outputs: int, seed: int) -> None:
    # The twin forms each fused multiply-add in float64 and rounds twice: at most one unit in the last place
    # of each partial sum.
    generator = torch.Generator().manual_seed(seed)
    segments, weights = make_layer(generator, [rows], features, outputs, 8, unit=False)
    bias = torch.randn(outputs, generator=generator)
    actual = ops.linear(segments, Epilogue(bias), outputs, 8, torch.float32)
    wanted = expected(segments, weights, bias, torch.float32)
    first = expected(segments[:1], weights[:1], bias, torch.float32)
    largest = torch.stack([actual, wanted, first]).abs().amax(0)
    ulp = torch.nextafter(largest, torch.tensor(torch.inf)) - largest
    assert torch.all((actual - wanted).abs() <= len(features) * ulp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_rounds_the_float32_result(dtype: torch.dtype, generator: torch.Generator) -> None:
    segments, _ = make_layer(generator, [13], [48, 20], 50, 8, unit=False)
    exact = ops.linear(segments, Epilogue(), 50, 8, torch.float32)
    rounded = ops.linear(segments, Epilogue(), 50, 8, dtype)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, exact.to(dtype))


def test_linear_takes_strided_codes(generator: torch.Generator) -> None:
    wide = random_codes(generator, 8, 6, 40)
    weight = random_codes(generator, 8, 5, 20)
    segment = make_segment(wide[:, ::2], weight, 8, generator, unit=True)
    actual = ops.linear([segment], Epilogue(), 5, 8, torch.float32)
    assert torch.equal(actual, expected([segment], [weight], None, torch.float32))


def test_linear_rejects_rows_without_features(generator: torch.Generator) -> None:
    (segment,), _ = make_layer(generator, [3], [4], 5, 8, unit=True)
    empty = replace(segment, codes=segment.codes[:, :0], weight=segment.weight[:0])
    with pytest.raises(ValueError, match="linear: channels .* must be 1 to [0-9]+ for exact .*, got 0"):
        ops.linear([empty], Epilogue(), 5, 8, torch.float32)


def test_linear_opcheck(generator: torch.Generator) -> None:
    segments, _ = make_layer(generator, [2, 3], [9, 4], 6, 4, unit=False)
    epilogue = Epilogue(torch.randn(6, generator=generator))
    args = ops.igemm_arguments(segments, epilogue, 6, 4, torch.bfloat16)
    torch.library.opcheck(torch.ops.adpdm.linear.default, args)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"codes": torch.zeros(2, 8, dtype=torch.int16)},
            TypeError,
            r"linear: input must be torch.int8, or packed codes of torch.uint8, got",
        ),
        ({"scale": torch.ones(2)}, ValueError, r"linear: zero_point must have shape \[2\], got \[3\]"),
        (
            {"weight_scale": torch.ones(3)},
            ValueError,
            r"linear: weight_scale must have shape \[4\], got \[3\]",
        ),
        ({"weight_sum": torch.ones(4)}, TypeError, r"linear: weight_sum must be torch.int32, got"),
        (
            {"weight": torch.zeros(7, dtype=torch.uint8)},
            ValueError,
            r"linear: weight must have 192 bytes for this shape and weight_bits, got 7",
        ),
        (
            {"group_index": torch.tensor([3], dtype=torch.int32)},
            IndexError,
            r"linear: group_index must be in \[0, num_groups=3\), got 3",
        ),
        (
            {"zero_point": torch.full((3,), 128, dtype=torch.int32)},
            ValueError,
            r"linear: zero_point\[2\] must be a code in \[-128, 127\], got 128",
        ),
        (
            {"codes": torch.zeros(1, 65794, dtype=torch.int8)},
            ValueError,
            "linear: channels per group times kernel size must be 1 to 65793 .*, got 65794",
        ),
    ],
)
def test_linear_rejects_a_wrong_segment(
    changes: dict[str, Tensor], error: type[Exception], message: str, generator: torch.Generator
) -> None:
    (segment,), _ = make_layer(generator, [2], [8], 4, 8, unit=False)
    wrong = Segment(**{**vars(segment), **changes})
    with pytest.raises(error, match=message):
        ops.linear([wrong], Epilogue(), 4, 8, torch.float32)


def test_linear_rejects_wrong_arguments(generator: torch.Generator) -> None:
    (segment,), _ = make_layer(generator, [2], [8], 4, 8, unit=False)
    with pytest.raises(ValueError, match="linear and conv2d: wanted 1 or 2 segments, got 3"):
        ops.linear([segment] * 3, Epilogue(), 4, 8, torch.float32)
    with pytest.raises(ValueError, match="linear: weight_bits must be 2..8, got 9"):
        ops.linear([segment], Epilogue(), 4, 9, torch.float32)
    with pytest.raises(ValueError, match=r"linear: bias must have shape \[4\], got \[5\]"):
        ops.linear([segment], Epilogue(torch.zeros(5)), 4, 8, torch.float32)
    with pytest.raises(
        TypeError, match="linear: dtype must be torch.float32, torch.bfloat16 or torch.float16"
    ):
        ops.linear([segment], Epilogue(), 4, 8, torch.float64)


def test_linear_rejects_segments_of_different_rows(generator: torch.Generator) -> None:
    (first, second), _ = make_layer(generator, [2], [8, 8], 4, 8, unit=False)
    longer = Segment(**{**vars(second), "codes": torch.zeros(3, 8, dtype=torch.int8)})
    with pytest.raises(
        ValueError, match=r"linear: second input must equal input in all but the last dimension"
    ):
        ops.linear([first, longer], Epilogue(), 4, 8, torch.float32)


def test_pack_weight_rejects_codes_out_of_range() -> None:
    codes = torch.tensor([[0, 8]], dtype=torch.int8)
    with pytest.raises(
        ValueError, match=r"pack_weight: codes must be in \[-8, 7\] for num_bits=4, got \[0, 8\]"
    ):
        ops.pack_weight(codes, 4)
    with pytest.raises(ValueError, match="pack_weight: groups must divide out_channels=1, got 2"):
        ops.pack_weight(codes, 8, 2)
