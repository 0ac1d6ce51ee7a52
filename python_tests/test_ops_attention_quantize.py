"""attention_quantize: the codes of the reference, views without copies, its contract."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from codes import assert_codes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adpdm import ops, reference
from adpdm.operands import OutputQuantizer
from adpdm.reference_attention import attend

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# A code of a query, key, value or weight that is next to a tie may round the other way in float32.
assert_codes_inside = partial(assert_codes, one_in=500, apart=2)


def quantizer(num_bits: int = 8, group: int = 1, scale: float = 0.02) -> OutputQuantizer:
    return OutputQuantizer(
        torch.tensor([1.0, scale]),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([group], dtype=torch.int32),
        num_bits,
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("int8", [False, True])
@given(
    batch=st.integers(1, 2),
    tokens=st.tuples(st.integers(1, 40), st.integers(1, 200)),
    heads=st.integers(1, 3),
    head_size=st.integers(1, 70),
    num_bits=st.integers(2, 8),
    dtype=st.sampled_from(FLOATS),
    sharpness=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_attention_quantize_matches_reference(
    int8: bool,
    batch: int,
    tokens: tuple[int, int],
    heads: int,
    head_size: int,
    num_bits: int,
    dtype: torch.dtype,
    sharpness: float,
    seed: int,
) -> None:
    channels = heads * head_size
    query = (sharpness * normal(batch, tokens[0], channels, seed=seed)).to(dtype)
    key, value = (normal(batch, tokens[1], channels, seed=seed + i).to(dtype) for i in (1, 2))
    args = (query, key, value, quantizer(num_bits), heads, int8)
    check = assert_codes_inside if int8 else assert_codes
    check(ops.attention_quantize(*args), reference.attention_quantize(*args))


def noise_of_int8(query: Tensor, key: Tensor, value: Tensor, heads: int) -> float:
    """Signal over noise of the products of codes, in decibels."""
    exact = attend(query, key, value, heads, int8=False)
    error = attend(query, key, value, heads, int8=True) - exact
    return float(10 * torch.log10(exact.square().sum() / error.square().sum()))


@pytest.mark.parametrize(("tokens", "sharpness"), [(64, 1.0), (77, 3.0), (1000, 0.3), (4096, 1.0)])
def test_int8_attention_is_finer_than_the_codes_it_ends_in(tokens: int, sharpness: float) -> None:
    """Random values are worse than those of trained models; 8 bits of a normal distribution give 40 dB."""
    query, key, value = (
        sharpness * normal(1, 64, 80),
        normal(1, tokens, 80, seed=1),
        normal(1, tokens, 80, seed=2),
    )
    assert noise_of_int8(query, key, value, 2) > 35


def test_int8_attention_with_a_token_that_all_look_at() -> None:
    """A first token with large weights and small values, as text encoders make: weights carry step sizes."""
    query, key, value = (normal(1, tokens, 40, seed=tokens) for tokens in (60, 77, 78))
    value = value[:, :77]
    key[:, 0], value[:, 0] = 0.0, 0.1 * value[:, 0]
    key[:, 0, 3] = 40.0
    query[..., 3] = query[..., 3].abs() + 1
    assert noise_of_int8(query, key, value, 1) > 34


def test_int8_attention_ignores_what_is_common_to_all_keys() -> None:
    query, key, value = normal(1, 9, 16), normal(1, 30, 16, seed=1), normal(1, 30, 16, seed=2)
    far = key + 100 * normal(1, 1, 16, seed=3)
    wanted = ops.attention_quantize(query, key, value, quantizer(), 2, int8=True)
    assert (
        ops.attention_quantize(query, far, value, quantizer(), 2, int8=True).int() - wanted.int()
    ).abs().max() <= 1


@pytest.mark.parametrize("zeros", ["query", "key", "value", "channel", "token"])
def test_int8_attention_of_zeros(zeros: str) -> None:
    args = {name: normal(1, 20, 16, seed=i) for i, name in enumerate(("query", "key", "value"))}
    if zeros == "channel":
        args["value"][..., 3] = 0.0
    elif zeros == "token":
        args["value"][:, 3] = 0.0
    else:
        args[zeros].zero_()
    codes = ops.attention_quantize(**args, quantizer=quantizer(), heads=1, int8=True)
    assert_codes_inside(
        codes, reference.attention_quantize(**args, quantizer=quantizer(), heads=1, int8=True)
    )
    if zeros == "value":
        assert (codes == 3).all()


@pytest.mark.parametrize(("int8", "value"), [(False, math.nan), (True, math.nan), (True, math.inf)])
@pytest.mark.parametrize("bits", [None, -1])
def test_what_is_not_finite_is_seen_in_the_codes_it_reaches(
    int8: bool, value: float, bits: int | None
) -> None:
    """NaN gives quant_min; where codes are multiplied, infinity does as well."""
    args = {"query": normal(1, 9, 32), "key": normal(1, 30, 32, seed=1), "value": normal(1, 30, 32, seed=2)}
    wanted = ops.attention_quantize(**args, quantizer=quantizer(), heads=2, int8=int8)
    reached = {"query": (4, slice(16, 32)), "key": (slice(None), slice(16, 32)), "value": (slice(None), 20)}
    for name, (rows, channels) in reached.items():
        broken = args[name].clone()
        broken[0, 4, 20] = value
        if bits is not None:  # a NaN that processors do not make themselves
            broken.view(torch.int32)[0, 4, 20] = bits
        codes = ops.attention_quantize(**{**args, name: broken}, quantizer=quantizer(), heads=2, int8=int8)
        is_lost = torch.zeros(9, 32, dtype=torch.bool)
        is_lost[rows, channels] = True
        assert (codes[0][is_lost] == -128).all(), name
        assert (codes[0][~is_lost].int() - wanted[0][~is_lost].int()).abs().max() <= 2, name
        assert torch.equal(codes[..., :16], wanted[..., :16]), name


def test_int8_attention_takes_a_channel_of_denormal_numbers_for_zeros() -> None:
    query, key, value = (normal(1, 20, 16, seed=seed) for seed in range(3))
    value[..., 5] = 1e-40
    codes = ops.attention_quantize(query, key, value, quantizer(), 1, int8=True)
    assert (codes[..., 5] == 3).all()
    assert_codes_inside(codes, reference.attention_quantize(query, key, value, quantizer(), 1, True))
    value[..., 5] = 0
    assert torch.equal(codes, ops.attention_quantize(query, key, value, quantizer(), 1, int8=True))


@pytest.mark.parametrize("score", [1.0, 1.5e5, 1e6, 1e8])
def test_int8_attention_with_huge_scores_picks_one_value(score: float) -> None:
    """In float32 the largest exponent less log2 of 255 rounds, and the weight must not become 256."""
    channels = 16
    rows = torch.eye(channels) * (score * math.sqrt(channels)) ** 0.5
    value = torch.linspace(-1, 1, channels * channels).view(1, channels, channels)
    codes = ops.attention_quantize(8 * rows[None], 8 * rows[None], value, quantizer(), 1, int8=True)
    wanted = reference.quantize(
        value, *(getattr(quantizer(), n) for n in ("scale", "zero_point", "group_index")), 8
    )
    assert (codes.int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("int8", [False, True])
def test_attention_quantize_reads_parts_of_one_tensor(int8: bool) -> None:
    query, key, value = normal(2, 9, 48).split(16, -1)
    wanted = ops.attention_quantize(
        query.contiguous(), key.contiguous(), value.contiguous(), quantizer(), 2, int8
    )
    assert torch.equal(ops.attention_quantize(query, key, value, quantizer(), 2, int8), wanted)
    turned = key.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.attention_quantize(query, turned, value, quantizer(), 2, int8), wanted)


def test_attention_quantize_of_one_token_is_its_value() -> None:
    value = torch.tensor([[[0.02, -0.04]]])
    codes = ops.attention_quantize(normal(1, 3, 2), normal(1, 1, 2, seed=1), value, quantizer(), heads=1)
    assert codes.tolist() == [[[4, 1], [4, 1], [4, 1]]]


def test_attention_quantize_with_scores_far_apart_picks_one_value() -> None:
    query = torch.tensor([[[100.0], [-100.0]]])
    key, value = torch.tensor([[[30.0], [-30.0]]]), torch.tensor([[[0.2], [0.4]]])
    codes = ops.attention_quantize(query, key, value, quantizer(), heads=1)
    assert codes.flatten().tolist() == [13, 23]


def test_attention_quantize_uses_the_current_group() -> None:
    args = (normal(1, 4, 8), normal(1, 5, 8, seed=1), 10 * normal(1, 5, 8, seed=2))
    first, second = (ops.attention_quantize(*args, quantizer(group=g), 2) for g in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, reference.attention_quantize(*args, quantizer(group=0), 2))


@pytest.mark.parametrize("int8", [False, True])
def test_attention_quantize_of_nothing(int8: bool) -> None:
    x = normal(0, 4, 8)
    assert ops.attention_quantize(x, x, x, quantizer(), 2, int8).shape == (0, 4, 8)
    some = normal(2, 4, 8)
    assert ops.attention_quantize(some[:, :0], some, some, quantizer(), 2, int8).shape == (2, 0, 8)


def test_attention_quantize_passes_opcheck() -> None:
    q = quantizer()
    query, key, value = normal(2, 5, 24).split(8, -1)
    args = (query, key, value, q.scale, q.zero_point, q.group_index, 2, 8)
    torch.library.opcheck(torch.ops.adpdm.attention_quantize.default, args)
    torch.library.opcheck(torch.ops.adpdm.attention_quantize.default, (*args, True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(1, 2, 8, dtype=torch.int32)}, TypeError, "query must be"),
        ({"key": torch.zeros(1, 2, 8, dtype=torch.bfloat16)}, TypeError, "key must be"),
        ({"value": torch.zeros(2, 8)}, ValueError, "value must have 3 dimensions"),
        ({"key": torch.zeros(2, 2, 8)}, ValueError, "key must have the batch and channels of query, 1 and 8"),
        ({"key": torch.zeros(1, 2, 4)}, ValueError, "key must have the batch and channels of query, 1 and 8"),
        ({"value": torch.zeros(1, 3, 8)}, ValueError, "value must have the 2 tokens of key, got 3"),
        (
            {"key": torch.zeros(1, 0, 8), "value": torch.zeros(1, 0, 8)},
            ValueError,
            "key must have at least 1 token, got 0",
        ),
        ({"heads": 3}, ValueError, "heads must divide the 8 channels, got 3"),
        ({"heads": 0}, ValueError, "heads must divide the 8 channels, got 0"),
        (
            {"heads": 1, "int8": True, **dict.fromkeys(("query", "key", "value"), torch.zeros(1, 1, 65794))},
            ValueError,
            "channels of a head must be at most 65793 for exact int32 sums, got 65794",
        ),
        ({"quantizer": quantizer(num_bits=9)}, ValueError, "num_bits must be"),
        ({"quantizer": quantizer(group=2)}, IndexError, "group_index must be in"),
    ],
)
def test_attention_quantize_rejects(change: dict[str, object], error: type[Exception], message: str) -> None:
    args = {name: torch.zeros(1, 2, 8) for name in ("query", "key", "value")}
    with pytest.raises(error, match=f"attention_quantize: .*{message}"):
        ops.attention_quantize(**{**args, "quantizer": quantizer(), "heads": 2, **change})  # type: ignore[arg-type]
