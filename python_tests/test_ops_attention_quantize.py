"""attention_quantize: the codes of the reference, views without copies, its contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adpdm import ops, reference
from adpdm.operands import OutputQuantizer

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def quantizer(num_bits: int = 8, group: int = 1, scale: float = 0.02) -> OutputQuantizer:
    return OutputQuantizer(
        torch.tensor([1.0, scale]),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([group], dtype=torch.int32),
        num_bits,
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_codes(actual: Tensor, wanted: Tensor) -> None:
    """Float32 sums may move a value over a tie, by one code: docs/numerics.md allows 1 in 10 000."""
    assert actual.dtype == torch.int8
    assert actual.shape == wanted.shape
    assert (actual.int() - wanted.int()).abs().max() <= 1
    assert (actual != wanted).sum() <= 1 + wanted.numel() // 10000


@given(
    batch=st.integers(1, 2),
    tokens=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    heads=st.integers(1, 3),
    head_size=st.integers(1, 70),
    num_bits=st.integers(2, 8),
    dtype=st.sampled_from(FLOATS),
    sharpness=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_attention_quantize_matches_reference(
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
    args = (query, key, value, quantizer(num_bits), heads)
    assert_codes(ops.attention_quantize(*args), reference.attention_quantize(*args))


def test_attention_quantize_reads_parts_of_one_tensor() -> None:
    query, key, value = normal(2, 9, 48).split(16, -1)
    wanted = ops.attention_quantize(
        query.contiguous(), key.contiguous(), value.contiguous(), quantizer(), heads=2
    )
    assert torch.equal(ops.attention_quantize(query, key, value, quantizer(), heads=2), wanted)
    turned = key.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.attention_quantize(query, turned, value, quantizer(), heads=2), wanted)


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


def test_attention_quantize_of_nothing() -> None:
    x = normal(0, 4, 8)
    assert ops.attention_quantize(x, x, x, quantizer(), 2).shape == (0, 4, 8)
    some = normal(2, 4, 8)
    assert ops.attention_quantize(some[:, :0], some, some, quantizer(), 2).shape == (2, 0, 8)


def test_attention_quantize_passes_opcheck() -> None:
    q = quantizer()
    query, key, value = normal(2, 5, 24).split(8, -1)
    args = (query, key, value, q.scale, q.zero_point, q.group_index, 2, 8)
    torch.library.opcheck(torch.ops.adpdm.attention_quantize.default, args)


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
        ({"quantizer": quantizer(num_bits=9)}, ValueError, "num_bits must be"),
        ({"quantizer": quantizer(group=2)}, IndexError, "group_index must be in"),
    ],
)
def test_attention_quantize_rejects(change: dict[str, object], error: type[Exception], message: str) -> None:
    args = {name: torch.zeros(1, 2, 8) for name in ("query", "key", "value")}
    with pytest.raises(error, match=f"attention_quantize: .*{message}"):
        ops.attention_quantize(**{**args, "quantizer": quantizer(), "heads": 2, **change})  # type: ignore[arg-type]
