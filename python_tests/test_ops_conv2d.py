"""Tests of the integer convolution against its plain-torch twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from thread_counts import threads
from torch import Tensor

from adpdm import ops, reference
from adpdm.ops import ConvGeometry, Epilogue, Segment

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


def random_codes(generator: torch.Generator, bits: int, *shape: int) -> Tensor:
    low, high = reference.signed_range(bits)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)


def make_segment(
    codes: Tensor, weight_codes: Tensor, bits: int, groups: int, generator: torch.Generator, unit: bool
) -> Segment:
    """A segment with two quantizers, the second current; `unit` scales make outputs the exact integers."""
    outputs = weight_codes.shape[0]
    return Segment(
        codes=codes.contiguous(memory_format=torch.channels_last),
        scale=torch.ones(2) if unit else torch.rand(2, generator=generator) + 0.01,
        zero_point=torch.randint(-128, 128, (2,), generator=generator, dtype=torch.int32),
        group_index=torch.tensor([1], dtype=torch.int32),
        weight=ops.pack_weight(weight_codes, bits, groups),
        weight_scale=torch.ones(outputs) if unit else torch.rand(outputs, generator=generator) + 0.01,
        weight_sum=weight_codes.sum((1, 2, 3), dtype=torch.int32),
    )


def make_layer(
    generator: torch.Generator, image: list[int], channels: list[int], g: ConvGeometry, bits: int, unit: bool
) -> tuple[list[Segment], list[Tensor]]:
    """image: [N, H, W]; channels of each segment."""
    batch, height, width = image
    weights = [random_codes(generator, bits, g.out_channels, c // g.groups, *g.kernel_size) for c in channels]
    segments = [
        make_segment(random_codes(generator, 8, batch, c, height, width), w, bits, g.groups, generator, unit)
        for c, w in zip(channels, weights, strict=True)
    ]
    return segments, weights


def expected(segments: list[Segment], weights: list[Tensor], bias: Tensor | None, g: ConvGeometry) -> Tensor:
    return reference.conv2d(
        [s.codes for s in segments],
        [s.scale for s in segments],
        [s.zero_point for s in segments],
        [s.group_index for s in segments],
        weights,
        [s.weight_scale for s in segments],
        [s.weight_sum for s in segments],
        Epilogue(bias),
        g,
    )


@given(
    image=st.lists(st.integers(1, 8), min_size=3, max_size=3),
    channels=st.lists(st.integers(1, 20), min_size=1, max_size=2),
    outputs=st.integers(1, 40),
    kernel=PAIRS,
    stride=PAIRS,
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=PAIRS,
    bits=st.integers(2, 8),
    seed=st.integers(0, 2**31),
)
def test_conv2d_accumulators_are_exact(
    image: list[int],
    channels: list[int],
    outputs: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    bits: int,
    seed: int,
) -> None:
    # |sum| <= 2 * 20 * 9 * 255 * 128 < 2^24: float32 holds it exactly.
    assume(all(image[i + 1] + 2 * padding[i] > dilation[i] * (kernel[i] - 1) for i in (0, 1)))
    generator = torch.Generator().manual_seed(seed)
    geometry = ConvGeometry(outputs, kernel, stride, padding, dilation)
    segments, weights = make_layer(generator, image, channels, geometry, bits, unit=True)
    actual = ops.conv2d(segments, Epilogue(), geometry, bits, torch.float32)
    assert torch.equal(actual, expected(segments, weights, None, geometry))
    assert actual.is_contiguous(memory_format=torch.channels_last)


@given(
    groups=st.integers(1, 6),
    group_channels=st.integers(1, 9),
    group_outputs=st.integers(1, 20),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**31),
)
def test_conv2d_groups_are_exact(
    groups: int, group_channels: int, group_outputs: int, bits: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    geometry = ConvGeometry(groups * group_outputs, (3, 2), (1, 2), (1, 0), (1, 1), groups)
    segments, weights = make_layer(generator, [2, 5, 4], [groups * group_channels], geometry, bits, unit=True)
    actual = ops.conv2d(segments, Epilogue(), geometry, bits, torch.float32)
    assert torch.equal(actual, expected(segments, weights, None, geometry))


@given(
    tiles=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    channels=st.lists(st.sampled_from([16, 32, 64]), min_size=1, max_size=2),
    outputs=st.sampled_from([16, 24, 32, 80]),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**31),
)
def test_conv2d_by_winograd_is_exact(
    tiles: list[int], channels: list[int], outputs: int, bits: int, seed: int
) -> None:
    """Whole tiles of 4x4 pixels and multiples of 16 and 32 channels, as kernels want them for it."""
    generator = torch.Generator().manual_seed(seed)
    g = ConvGeometry(outputs, (3, 3), padding=(1, 1))
    image = [tiles[0], 4 * tiles[1], 4 * tiles[2]]
    segments, weights = make_layer(generator, image, channels, g, bits, unit=True)
    assert torch.equal(
        ops.conv2d(segments, Epilogue(), g, bits, torch.float32), expected(segments, weights, None, g)
    )


@given(channels=st.lists(st.integers(1, 40), min_size=1, max_size=2), seed=st.integers(0, 2**31))
def test_conv2d_values_are_within_one_ulp(channels: list[int], seed: int) -> None:
    # The twin forms each fused multiply-add in float64 and rounds twice: at most one unit in the last place
    # of each partial sum.
    generator = torch.Generator().manual_seed(seed)
    geometry = ConvGeometry(24, (3, 3), padding=(1, 1))
    segments, weights = make_layer(generator, [2, 5, 6], channels, geometry, 8, unit=False)
    bias = torch.randn(24, generator=generator)
    actual = ops.conv2d(segments, Epilogue(bias), geometry, 8, torch.float32)
    wanted = expected(segments, weights, bias, geometry)
    first = expected(segments[:1], weights[:1], bias, geometry)
    largest = torch.stack([actual, wanted, first]).abs().amax(0)
    ulp = torch.nextafter(largest, torch.tensor(torch.inf)) - largest
    assert torch.all((actual - wanted).abs() <= len(channels) * ulp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conv2d_rounds_the_float32_result(dtype: torch.dtype, generator: torch.Generator) -> None:
    geometry = ConvGeometry(35, (3, 3), padding=(1, 1))
    segments, _ = make_layer(generator, [2, 6, 5], [12, 20], geometry, 8, unit=False)
    exact = ops.conv2d(segments, Epilogue(), geometry, 8, torch.float32)
    rounded = ops.conv2d(segments, Epilogue(), geometry, 8, dtype)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, exact.to(dtype))


def test_conv2d_takes_contiguous_codes(generator: torch.Generator) -> None:
    geometry = ConvGeometry(8, (3, 3), padding=(1, 1))
    (segment,), weights = make_layer(generator, [2, 4, 5], [6], geometry, 8, unit=True)
    contiguous = replace(segment, codes=segment.codes.contiguous())
    actual = ops.conv2d([contiguous], Epilogue(), geometry, 8, torch.float32)
    assert torch.equal(actual, expected([segment], weights, None, geometry))


def test_conv2d_empty_batch_keeps_shape(generator: torch.Generator) -> None:
    geometry = ConvGeometry(8, (3, 3), stride=(2, 2), padding=(1, 1))
    segments, _ = make_layer(generator, [0, 5, 7], [4], geometry, 8, unit=True)
    assert ops.conv2d(segments, Epilogue(), geometry, 8, torch.float32).shape == (0, 8, 3, 4)


def test_conv2d_does_not_depend_on_threads(generator: torch.Generator) -> None:
    # Large enough that two threads do share the work (0.6 million multiply steps against a minimum of 20000).
    geometry = ConvGeometry(64, (3, 3), padding=(1, 1))
    segments, _ = make_layer(generator, [4, 16, 16], [64], geometry, 8, unit=False)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(ops.conv2d(segments, Epilogue(), geometry, 8, torch.float32))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_geometry_is_read_back_from_its_numbers() -> None:
    g = ConvGeometry(9, (3, 2), (2, 1), (1, 0), (4, 5), 3, padding_end=(7, 8), upsample=2)
    assert ConvGeometry.from_numbers(g.numbers()) == g


def test_conv2d_opcheck(generator: torch.Generator) -> None:
    g = ConvGeometry(6, (3, 2), stride=(2, 1), padding=(1, 0))
    segments, _ = make_layer(generator, [2, 5, 4], [4, 3], g, 8, unit=False)
    epilogue = Epilogue(torch.randn(6, generator=generator))
    args = ops.igemm_arguments(segments, epilogue, g.numbers(), 8, torch.float32)
    torch.library.opcheck(torch.ops.adpdm.conv2d.default, args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_size": (6, 3)}, "conv2d: kernel_size with dilation must fit the padded 4x4 input, got 6x3"),
        ({"stride": (0, 1)}, r"conv2d: stride must be 2 numbers of at least 1, got 0 and 1"),
        ({"padding": (-1, 0)}, r"conv2d: padding must be 2 numbers of at least 0, got -1 and 0"),
        ({"stride": (1, 2**33)}, r"conv2d: stride must be 2 numbers below 65536, got 1 and 8589934592"),
        ({"dilation": (2**62, 1)}, r"conv2d: dilation must be 2 numbers below 65536, got \d+ and 1"),
        ({"groups": 3}, "conv2d: groups must divide out_channels=8, got 3"),
        ({"groups": 4}, r"conv2d: groups must divide the 6 channels of input, got 4"),
        ({"out_channels": 16}, r"conv2d: weight_scale must have shape \[16\], got \[8\]"),
        (
            {"kernel_size": (1, 1)},
            r"conv2d: weight must have 192 bytes for this shape and weight_bits, got 1216",
        ),
    ],
)
def test_conv2d_rejects_wrong_geometry(
    changes: dict[str, object], message: str, generator: torch.Generator
) -> None:
    geometry = ConvGeometry(8, (3, 3))
    segments, _ = make_layer(generator, [1, 4, 4], [6], geometry, 8, unit=True)
    with pytest.raises(ValueError, match=message):
        ops.conv2d(segments, Epilogue(), replace(geometry, **changes), 8, torch.float32)


def test_conv2d_rejects_inputs_without_channels(generator: torch.Generator) -> None:
    geometry = ConvGeometry(8, (3, 3))
    (segment, _), _ = make_layer(generator, [1, 4, 4], [4, 4], geometry, 8, unit=True)
    empty = replace(segment, codes=segment.codes[:, :0], weight=segment.weight[:0])
    with pytest.raises(ValueError, match="conv2d: channels .* must be 1 to [0-9]+ for exact .*, got 0"):
        ops.conv2d([segment, empty], Epilogue(), geometry, 8, torch.float32)


def test_conv2d_rejects_two_segments_with_groups(generator: torch.Generator) -> None:
    geometry = ConvGeometry(8, (1, 1), groups=2)
    segments, _ = make_layer(generator, [1, 2, 2], [4, 4], geometry, 8, unit=True)
    with pytest.raises(ValueError, match="conv2d: groups must be 1 with two inputs, got 2"):
        ops.conv2d(segments, Epilogue(), geometry, 8, torch.float32)


def test_conv2d_rejects_segments_of_different_size(generator: torch.Generator) -> None:
    geometry = ConvGeometry(8, (1, 1))
    (first, second), _ = make_layer(generator, [1, 4, 4], [4, 4], geometry, 8, unit=True)
    smaller = replace(second, codes=second.codes[:, :, :3])
    with pytest.raises(
        ValueError,
        match=r"conv2d: second input must have the batch and size of input, 1 of 4x4, got shape \[1, 4, 3",
    ):
        ops.conv2d([first, smaller], Epilogue(), geometry, 8, torch.float32)


def test_conv2d_rejects_a_group_index_out_of_range(generator: torch.Generator) -> None:
    geometry = ConvGeometry(8, (1, 1))
    (segment,), _ = make_layer(generator, [1, 4, 4], [4], geometry, 8, unit=True)
    wrong = replace(segment, group_index=torch.tensor([-1], dtype=torch.int32))
    with pytest.raises(IndexError, match=r"conv2d: group_index must be in \[0, num_groups=2\), got -1"):
        ops.conv2d([wrong], Epilogue(), geometry, 8, torch.float32)
