"""Float layers of embeddings: around the reference within a derived bound, and their contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adpdm import ops
from adpdm import reference_embedding as reference

EPS = 2.0**-24  # half an ulp of float32: one rounding
SILU = 2.0**-21  # relative error of the kernels' SiLU, from that of exp (core/activation_math.h)
SILU_SLOPE = 1.1  # its derivative at most


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(columns: int, outputs: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    made = nn.Linear(columns, outputs, bias).requires_grad_(False)
    made.weight.copy_(normal(outputs, columns, seed=seed) / columns**0.5)
    if bias:
        made.bias.copy_(normal(outputs, seed=seed + 1))
    return made


def dense_bound(x: Tensor, error: Tensor | float, dense: nn.Linear) -> Tensor:
    """How far float32 may be off for inputs x f64 that are off by `error`.

    16 sums of a 16th of the products each, by fma, then four additions and the bias.
    """
    roundings = x.shape[1] // 16 + 1 + 4 + 1
    size = F.linear(x.abs(), dense.weight.abs().double())
    size = size if dense.bias is None else size + dense.bias.abs().double()
    spread = F.linear(torch.as_tensor(error, dtype=torch.float64).expand_as(x), dense.weight.abs().double())
    return 1.01 * (roundings * EPS * size + spread)


def assert_within(actual: Tensor, wanted: Tensor, bound: Tensor) -> None:
    assert actual.dtype == torch.float32
    assert actual.shape == wanted.shape
    assert ((actual.double() - wanted).abs() <= bound).all()


@given(
    rows=st.integers(0, 9),
    waves=st.sampled_from(("one", "equal", "different")),
    classes=st.booleans(),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70)),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_timestep_embedding_matches_reference(
    rows: int, waves: str, classes: bool, sizes: tuple[int, int, int], bias: bool, seed: int
) -> None:
    columns, hidden, channels = sizes
    first = layer(columns, hidden, bias, seed)
    second = layer(hidden, channels, bias, seed + 2)
    x = normal(rows if waves == "different" else 1, columns, seed=seed)
    if waves == "equal":
        x = x.repeat(rows, 1)
    table, labels = None, None
    if classes:
        table = normal(4, channels, seed=seed)
        labels = torch.randint(0, 4, (rows,), generator=torch.Generator().manual_seed(seed))
    args = (x, first, second, table, labels)
    wanted = reference.timestep_embedding(*args)
    before = F.linear(x.double(), first.weight.double(), first.bias.double() if bias else None)
    after = F.silu(before)
    error = SILU_SLOPE * dense_bound(x.double(), 0.0, first) + SILU * after.abs()
    bound = dense_bound(after, error, second) + EPS * wanted.abs()
    assert_within(ops.timestep_embedding(*args), wanted, 1.01 * bound)


@given(
    rows=st.integers(0, 9),
    equal=st.booleans(),
    columns=st.integers(1, 140),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_silu_linear_matches_reference(
    rows: int, equal: bool, columns: int, outputs: int, bias: bool, seed: int
) -> None:
    x, dense = 3 * normal(rows, columns, seed=seed), layer(columns, outputs, bias, seed)
    if equal:
        x = x[:1].repeat(rows, 1) if rows else x
    after = F.silu(x.double())
    actual, wanted = ops.silu_linear(x, dense), reference.silu_linear(x, dense)
    assert_within(actual, wanted, dense_bound(after, SILU * after.abs(), dense))


@given(
    rows=st.integers(0, 9),
    equal=st.booleans(),
    columns=st.integers(1, 140),
    channels=st.integers(1, 40),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_adaptive_rows_match_reference(
    rows: int, equal: bool, columns: int, channels: int, bias: bool, seed: int
) -> None:
    embedding, dense = 3 * normal(rows, columns, seed=seed), layer(columns, 6 * channels, bias, seed)
    if equal:
        embedding = embedding[:1].repeat(rows, 1) if rows else embedding
    after = F.silu(embedding.double())
    shift, scale, gate, shift2, scale2, gate2 = dense_bound(after, SILU * after.abs(), dense).chunk(6, 1)
    bounds = (torch.cat([scale, shift], 1), gate, torch.cat([scale2, shift2], 1), gate2)
    actual, wanted = ops.adaptive_rows(embedding, dense), reference.adaptive_rows(embedding, dense)
    for part, exact, bound in zip(actual, wanted, bounds, strict=True):
        assert_within(part, exact, bound)
        assert part.is_contiguous()


def embedding_arguments() -> dict[str, Any]:
    first, second = layer(5, 7), layer(7, 3)
    return {
        "waves": normal(2, 5),
        "first_weight": first.weight,
        "first_bias": first.bias,
        "second_weight": second.weight,
        "second_bias": second.bias,
        "table": normal(4, 3),
        "labels": torch.tensor([3, 0]),
    }


def linear_arguments() -> dict[str, Any]:
    dense = layer(5, 7)
    return {"x": normal(2, 5), "weight": dense.weight, "bias": dense.bias}


def rows_arguments() -> dict[str, Any]:
    dense = layer(5, 12)
    return {"embedding": normal(2, 5), "weight": dense.weight, "bias": dense.bias}


def test_adaptive_embedding_passes_opcheck() -> None:
    arguments = tuple(embedding_arguments().values())
    torch.library.opcheck(torch.ops.adpdm.timestep_embedding.default, arguments)
    torch.library.opcheck(torch.ops.adpdm.timestep_embedding.default, (*arguments[:5], None, None))
    torch.library.opcheck(torch.ops.adpdm.silu_linear.default, tuple(linear_arguments().values()))
    torch.library.opcheck(torch.ops.adpdm.adaptive_rows.default, tuple(rows_arguments().values()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"waves": normal(2, 5).bfloat16()}, TypeError, "waves must be"),
        ({"waves": normal(5)}, ValueError, r"waves must have shape \[any, any\], got \[5\]"),
        ({"waves": normal(3, 5)}, ValueError, "waves must have 1 row or the 2 of labels, got 3"),
        (
            {"first_weight": normal(7, 6)},
            ValueError,
            r"first_weight must have shape \[any, 5\], got \[7, 6\]",
        ),
        ({"first_weight": normal(5, 7).t()}, ValueError, "first_weight must be contiguous"),
        (
            {"second_weight": normal(3, 6)},
            ValueError,
            r"second_weight must have shape \[any, 7\], got \[3, 6\]",
        ),
        ({"second_bias": normal(4)}, ValueError, r"second_bias must have shape \[3\], got \[4\]"),
        ({"labels": None}, ValueError, "wanted table and labels or neither, got one"),
        ({"table": normal(4, 2)}, ValueError, r"table must have shape \[any, 3\], got \[4, 2\]"),
        ({"labels": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "labels must be"),
        ({"labels": torch.tensor([0, 4])}, IndexError, r"labels must be in \[0, classes=4\), got 4"),
    ],
)
def test_timestep_embedding_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"timestep_embedding: {message}"):
        torch.ops.adpdm.timestep_embedding(**{**embedding_arguments(), **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": normal(2, 5).half()}, TypeError, "x must be"),
        ({"x": normal(2, 3, 5)}, ValueError, r"x must have shape \[any, any\], got \[2, 3, 5\]"),
        ({"weight": normal(7, 4)}, ValueError, r"weight must have shape \[any, 5\], got \[7, 4\]"),
        ({"bias": normal(6)}, ValueError, r"bias must have shape \[7\], got \[6\]"),
    ],
)
def test_silu_linear_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"silu_linear: {message}"):
        torch.ops.adpdm.silu_linear(**{**linear_arguments(), **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embedding": normal(2, 5).half()}, TypeError, "embedding must be"),
        ({"weight": normal(12, 4)}, ValueError, r"weight must have shape \[any, 5\], got \[12, 4\]"),
        (
            {"weight": normal(10, 5), "bias": None},
            ValueError,
            "weight must have a multiple of 6 rows, got 10",
        ),
        ({"bias": normal(6)}, ValueError, r"bias must have shape \[12\], got \[6\]"),
    ],
)
def test_adaptive_rows_refuse(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"adaptive_rows: {message}"):
        torch.ops.adpdm.adaptive_rows(**{**rows_arguments(), **change})
