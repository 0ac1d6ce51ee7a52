"""Tests of fused outputs, upsampling, one-sided padding and packed codes of linear and conv2d."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adpdm import ops, reference
from adpdm.ops import Activation, ConvGeometry, Epilogue, OutputQuantizer, Segment

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SMALL = 2.0**-10  # brings the integers of unit scales to where activations bend


def unit_segment(codes: Tensor, weight: Tensor, bits: int) -> Segment:
    """Scales of 1, so that sums are exact integers below 2^24 and the float steps decide every bit."""
    outputs = weight.shape[0]
    return Segment(
        codes=codes,
        scale=torch.ones(2),
        zero_point=torch.tensor([0, 3], dtype=torch.int32),
        group_index=torch.tensor([1], dtype=torch.int32),
        weight=ops.pack_weight(weight, bits),
        weight_scale=torch.ones(outputs),
        weight_sum=weight.flatten(1).sum(1, dtype=torch.int32),
    )


def random_codes(generator: torch.Generator, bits: int, *shape: int) -> Tensor:
    low, high = reference.signed_range(bits)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)


def quantizer(num_bits: int) -> OutputQuantizer:
    return OutputQuantizer(
        torch.tensor([1.0, 0.11]),
        torch.tensor([0, -1], dtype=torch.int32),
        torch.tensor([1], dtype=torch.int32),
        num_bits,
    )


def plain_lists(segments: list[Segment], weights: list[Tensor]) -> tuple[list[Tensor], ...]:
    """The lists that the twins take."""
    columns = zip(
        *((s.codes, s.scale, s.zero_point, s.group_index, s.weight_scale, s.weight_sum) for s in segments),
        strict=True,
    )
    codes, scales, zero_points, indices, weight_scales, sums = (list(c) for c in columns)
    return codes, scales, zero_points, indices, weights, weight_scales, sums


def random_epilogue(
    generator: torch.Generator,
    result: list[int],
    bias: int,
    images: int,
    activation: Activation,
    bits: int,
    choice: int,
) -> Epilogue:
    """Parts by the digits of `choice`: row bias, residual (none or of a type), scale, row scale."""
    residual = None
    if choice // 2 % 4 and activation is not Activation.GEGLU:
        residual = (torch.randn(result, generator=generator) * 100).to(FLOATS[choice // 2 % 4 - 1])
    return Epilogue(
        bias=torch.randn(bias, generator=generator),
        row_bias=torch.randn(images, bias, generator=generator) * 50 if choice % 2 else None,
        residual=residual,
        row_scale=torch.randn(images, bias, generator=generator) if choice // 16 else None,
        output_scale=SMALL if choice // 8 % 2 or activation is not Activation.NONE else 1.0,
        activation=activation,
        quantizer=None if bits == 0 else quantizer(bits),
    )


def assert_close(actual: Tensor, wanted: Tensor, epilogue: Epilogue, exact: Tensor) -> None:
    """Bits without an activation; with one its stated error; codes then next to a tie differ by one."""
    assert actual.dtype == wanted.dtype
    assert actual.shape == wanted.shape
    if epilogue.activation is Activation.NONE:
        assert torch.equal(actual, wanted)
    elif actual.dtype == torch.int8:
        assert (actual.int() - wanted.int()).abs().max() <= 1
        assert (actual != wanted).sum() <= 1 + wanted.numel() // 1000
    else:
        half_ulp = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[actual.dtype]
        bound = exact.abs() * (2e-7 + 4 * half_ulp) + 1e-7 * (actual.dtype == torch.float16)
        if epilogue.activation is Activation.SILU:  # of x < 0 also |x silu(x)| 2^-26, which is below 2^-26
            bound = bound + 2.0**-26
        else:  # errors of a gelu are absolute
            bound = bound + 2.5e-7 * exact.abs().max() * 8
        assert torch.all((actual.double() - exact.double()).abs() <= bound + 1e-30)


EPILOGUES = {
    "activation": st.sampled_from(list(Activation)),
    "bits": st.sampled_from([0, 4, 8]),
    "choice": st.integers(0, 31),
    "dtype": st.sampled_from(FLOATS),
    "seed": st.integers(0, 2**31),
}


@given(
    images=st.integers(1, 3),
    rows=st.integers(1, 6),
    features=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    half_outputs=st.integers(1, 40),
    **EPILOGUES,
)
def test_linear_epilogue_matches_reference(
    images: int,
    rows: int,
    features: list[int],
    half_outputs: int,
    activation: Activation,
    bits: int,
    choice: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = 2 * half_outputs
    weights = [random_codes(generator, 8, outputs, k) for k in features]
    segments = [unit_segment(random_codes(generator, 8, images, rows, w.shape[1]), w, 8) for w in weights]
    shape = [images, rows, outputs]
    epilogue = random_epilogue(generator, shape, outputs, images, activation, bits, choice)
    lists = plain_lists(segments, weights)
    wanted = reference.linear(*lists, epilogue, dtype)
    exact = reference.linear(*lists, replace(epilogue, quantizer=None), torch.float32)
    assert_close(ops.linear(segments, epilogue, outputs, 8, dtype), wanted, epilogue, exact)


@given(
    image=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    channels=st.lists(st.integers(1, 20), min_size=1, max_size=2),
    half_outputs=st.integers(1, 20),
    kernel=st.integers(1, 3),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    start=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    end=st.tuples(st.integers(2, 3), st.integers(2, 3)),
    upsample=st.integers(1, 2),
    **EPILOGUES,
)
def test_conv2d_epilogue_and_geometry_match_reference(
    image: tuple[int, int, int],
    channels: list[int],
    half_outputs: int,
    kernel: int,
    stride: tuple[int, int],
    start: tuple[int, int],
    end: tuple[int, int],
    upsample: int,
    activation: Activation,
    bits: int,
    choice: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs, batch = 2 * half_outputs, image[0]
    geometry = ConvGeometry(outputs, (kernel, kernel), stride, start, padding_end=end, upsample=upsample)
    weights = [random_codes(generator, 4, outputs, c, kernel, kernel) for c in channels]
    segments = [
        unit_segment(random_codes(generator, 8, batch, w.shape[1], *image[1:]), w, 4) for w in weights
    ]
    shape = [batch, outputs, *geometry.output_size(*image[1:])]
    epilogue = random_epilogue(generator, shape, outputs, batch, activation, bits, choice)
    lists = plain_lists(segments, weights)
    wanted = reference.conv2d(*lists, epilogue, geometry, dtype)
    exact = reference.conv2d(*lists, replace(epilogue, quantizer=None), geometry, torch.float32)
    actual = ops.conv2d(segments, epilogue, geometry, 4, dtype)
    assert_close(actual, wanted, epilogue, exact)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_linear_takes_packed_codes(rows: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = random_codes(generator, 4, 10, 32 * blocks)
    plain = unit_segment(random_codes(generator, 4, rows, 32 * blocks), weight, 4)
    packed = replace(plain, codes=ops.pack_int4(plain.codes))
    wanted = ops.linear([plain], Epilogue(), 10, 4, torch.float32)
    assert torch.equal(ops.linear([packed], Epilogue(), 10, 4, torch.float32), wanted)
    both = ops.linear([packed, plain], Epilogue(), 10, 4, torch.float32)
    assert torch.equal(both, ops.linear([plain, plain], Epilogue(), 10, 4, torch.float32))


def test_conv2d_takes_packed_codes(generator: torch.Generator) -> None:
    geometry = ConvGeometry(10, (3, 3), padding=(1, 1), upsample=2)
    weight = random_codes(generator, 4, 10, 64, 3, 3)
    nhwc = random_codes(generator, 4, 2, 5, 3, 64)
    plain = unit_segment(nhwc.permute(0, 3, 1, 2), weight, 4)
    packed = replace(plain, codes=ops.pack_int4(nhwc))
    wanted = ops.conv2d([plain], Epilogue(), geometry, 4, torch.float32)
    assert torch.equal(ops.conv2d([packed], Epilogue(), geometry, 4, torch.float32), wanted)


def layer(generator: torch.Generator) -> tuple[Segment, ConvGeometry]:
    weight = random_codes(generator, 4, 6, 32, 3, 3)
    segment = unit_segment(random_codes(generator, 4, 2, 32, 4, 5), weight, 4)
    return segment, ConvGeometry(6, (3, 3), padding=(0, 1), padding_end=(1, 1), upsample=2)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("bits", [0, 8])
def test_epilogue_opcheck(activation: Activation, bits: int, generator: torch.Generator) -> None:
    segment, geometry = layer(generator)
    epilogue = random_epilogue(generator, [2, 6, 7, 10], 6, 2, activation, bits, 13)
    args = ops.igemm_arguments([segment, segment], epilogue, geometry.numbers(), 4, torch.bfloat16)
    torch.library.opcheck(torch.ops.adpdm.conv2d.default, args)
    flat = replace(
        segment,
        codes=random_codes(generator, 4, 4, 3, 32),
        weight=ops.pack_weight(random_codes(generator, 4, 6, 32), 4),
    )
    epilogue = random_epilogue(generator, [4, 3, 6], 6, 2, activation, bits, 13)
    args = ops.igemm_arguments([flat], epilogue, 6, 4, torch.float32)
    torch.library.opcheck(torch.ops.adpdm.linear.default, args)


def test_packed_opcheck(generator: torch.Generator) -> None:
    segment, geometry = layer(generator)
    codes = ops.pack_int4(segment.codes.permute(0, 2, 3, 1).contiguous())
    args = ops.igemm_arguments(
        [replace(segment, codes=codes)], Epilogue(), geometry.numbers(), 4, torch.float32
    )
    torch.library.opcheck(torch.ops.adpdm.conv2d.default, args)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"row_bias": torch.zeros(3, 6)}, ValueError, r"row_bias must have shape \[2, 6\], got \[3, 6\]"),
        ({"row_bias": torch.zeros(2, 6).double()}, TypeError, "row_bias must be torch.float32, got torch.fl"),
        (
            {"row_bias": torch.zeros(6, 2).t()},
            ValueError,
            r"row_bias must be contiguous, got strides \[1, 2\]",
        ),
        ({"row_scale": torch.zeros(3, 6)}, ValueError, r"row_scale must have shape \[2, 6\], got \[3, 6\]"),
        (
            {"residual": torch.zeros(2, 6, 7, 9)},
            ValueError,
            r"residual must have the shape of the result \[2, 6, 7, 10\], got \[2, 6, 7, 9\]",
        ),
        ({"residual": torch.zeros(1).int()}, TypeError, "residual must be torch.float32, torch.bfloat16 or"),
        (
            {"residual": torch.zeros(2, 3, 7, 10), "activation": Activation.GEGLU},
            ValueError,
            "residual must be missing with geglu, got one",
        ),
        ({"output_scale": float("nan")}, ValueError, "output_scale must be finite, got nan"),
        ({"quantizer": quantizer(9)}, ValueError, "output_bits must be 2..8, got 9"),
        (
            {"quantizer": replace(quantizer(8), group_index=torch.tensor([2], dtype=torch.int32))},
            IndexError,
            r"output group_index must be in \[0, num_groups=2\), got 2",
        ),
        (
            {"quantizer": replace(quantizer(8), zero_point=torch.zeros(3, dtype=torch.int32))},
            ValueError,
            r"output zero_point must have shape \[2\], got \[3\]",
        ),
    ],
)
def test_conv2d_rejects_a_wrong_epilogue(
    changes: dict[str, Any], error: type[Exception], message: str, generator: torch.Generator
) -> None:
    segment, geometry = layer(generator)
    with pytest.raises(error, match="conv2d: " + message):
        ops.conv2d([segment], Epilogue(**changes), geometry, 4, torch.float32)


def test_geometry_is_checked(generator: torch.Generator) -> None:
    segment, geometry = layer(generator)
    with pytest.raises(ValueError, match="conv2d: upsample must be 1 or 2, got 3"):
        ops.conv2d([segment], Epilogue(), replace(geometry, upsample=3), 4, torch.float32)
    with pytest.raises(ValueError, match="conv2d: padding_end must be 2 numbers of at least 0, got 0 and -1"):
        ops.conv2d([segment], Epilogue(), replace(geometry, padding_end=(0, -1)), 4, torch.float32)
    args = ops.igemm_arguments([segment], Epilogue(), geometry.numbers()[:-1], 4, torch.float32)
    with pytest.raises(ValueError, match="conv2d: geometry must be 13 numbers .*, got 12"):
        torch.ops.adpdm.conv2d(*args)


def test_geglu_needs_pairs_and_one_group(generator: torch.Generator) -> None:
    geglu = Epilogue(activation=Activation.GEGLU)
    weight = random_codes(generator, 8, 5, 8)
    segment = unit_segment(random_codes(generator, 8, 2, 8), weight, 8)
    with pytest.raises(ValueError, match="linear: geglu takes pairs of outputs, got 5 outputs"):
        ops.linear([segment], geglu, 5, 8, torch.float32)
    weight = random_codes(generator, 8, 4, 4, 1, 1)
    segment = unit_segment(random_codes(generator, 8, 1, 8, 2, 2), weight, 8)
    segment = replace(segment, weight=ops.pack_weight(weight, 8, 2))
    with pytest.raises(ValueError, match="conv2d: groups must be 1 with geglu, got 2"):
        ops.conv2d([segment], geglu, ConvGeometry(4, (1, 1), groups=2), 8, torch.float32)


def test_schema_arguments_are_checked(generator: torch.Generator) -> None:
    weight = random_codes(generator, 8, 5, 8)
    segment = unit_segment(random_codes(generator, 8, 6, 8), weight, 8)
    args = list(ops.igemm_arguments([segment], Epilogue(), 5, 8, torch.float32))

    def call(**changes: Any) -> None:
        names = [a.name for a in torch.ops.adpdm.linear.default._schema.arguments]
        torch.ops.adpdm.linear(**{**dict(zip(names, args, strict=True)), **changes})

    with pytest.raises(ValueError, match=r"linear: second must be 0 or 7 tensors \(input, .*\), got 2"):
        call(second=[weight, weight])
    with pytest.raises(ValueError, match=r"linear: activation must be 0 \(none\), .*, got 5"):
        call(activation=5)
    with pytest.raises(
        ValueError, match="linear: output_qparams must be 0 tensors with output_bits=0, got 1"
    ):
        call(output_qparams=[weight])
    with pytest.raises(
        ValueError, match="linear: row_bias must divide the 6 rows of input evenly, got 4 rows"
    ):
        call(row_bias=torch.zeros(4, 5))
    with pytest.raises(
        ValueError, match="linear: row_scale must divide the 6 rows of input evenly, got 4 rows"
    ):
        call(row_scale=torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"linear: row_bias must have shape \[2, 5\], got \[3, 5\]"):
        call(row_scale=torch.zeros(2, 5), row_bias=torch.zeros(3, 5))
    with pytest.raises(
        ValueError, match="linear: input holds packed codes, whose last dimension must be a mul"
    ):
        call(input=torch.zeros(6, 8, dtype=torch.uint8))


def test_row_bias_of_no_rows(generator: torch.Generator) -> None:
    weight = random_codes(generator, 8, 5, 8)
    segment = unit_segment(random_codes(generator, 8, 0, 8), weight, 8)
    epilogue = Epilogue(row_bias=torch.zeros(2, 5), activation=Activation.SILU)
    assert ops.linear([segment], epilogue, 5, 8, torch.float32).shape == (0, 5)
