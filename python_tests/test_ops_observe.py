"""observe against the plain-torch reference: exact counts, extrema with NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_counts import threads
from torch import Tensor

from adpdm import ops, reference

NUM_STEPS = 3


def tables(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Empty counts [T, HISTOGRAM_BINS] i64 and extrema [T, 2] f32."""
    counts = torch.zeros(NUM_STEPS, reference.HISTOGRAM_BINS, dtype=torch.int64, device=device)
    return counts, torch.tensor([[torch.inf, -torch.inf]] * NUM_STEPS, device=device)


def step(index: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([index], dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(
    shape=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    layout=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_observe_equals_reference(dtype: torch.dtype, shape: list[int], layout: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    actual, expected = tables(), tables()
    for call in range(2):  # the second widens and adds
        spread = torch.exp(4 * torch.randn(shape, generator=generator))  # twelve octaves to either side
        x = (torch.randn(shape, generator=generator) * spread).to(dtype)
        x = x.to(memory_format=torch.channels_last) if layout else x
        x = x[:, : shape[1] // 2] if layout == 2 else x
        ops.observe(x, *actual, step(call % NUM_STEPS))
        reference.observe(x, *expected, step(call % NUM_STEPS))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_observe_counts_special_values(device: torch.device) -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, torch.inf, -torch.inf, 1e9, 1.0], device=device)
    counts, extrema = tables(device)
    ops.observe(x, counts, extrema, step(1, device))
    filled = {int(b): int(counts[1, b]) for b in counts[1].nonzero()}
    assert filled == {0: 1, 1024: 3, 1024 + 16 * 32 + 1: 1, 2048: 2}
    assert extrema[1].tolist() == [-torch.inf, torch.inf]


@pytest.mark.parametrize("position", [0, 5, 20, 4999])
def test_observe_nan_sticks_in_extrema(position: int, device: torch.device) -> None:
    x = torch.ones(5000, device=device)
    x[position] = torch.nan
    counts, extrema = tables(device)
    ops.observe(x, counts, extrema, step(0, device))
    ops.observe(torch.ones(3, device=device), counts, extrema, step(0, device))
    assert extrema[0].isnan().all()
    assert not extrema[1:].isnan().any()


def test_observe_same_for_any_thread_count(generator: torch.Generator) -> None:
    x = torch.randn(400_001, generator=generator)
    results = []
    for count in (1, 2):
        results.append(tables())
        with threads(count):
            ops.observe(x, *results[-1], step(0))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert int(results[0][0].sum()) == 400_001


def test_observe_passes_opcheck(device: torch.device, generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 4, 5, generator=generator).to(device)
    torch.library.opcheck(torch.ops.adpdm.observe.default, (x, *tables(device), step(1, device)))


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(2, dtype=torch.int32), TypeError, "x must be torch.float32"),
        (
            1,
            torch.zeros(3, 7, dtype=torch.int64),
            ValueError,
            r"counts must have shape \[any, 2049\], got \[3, 7\]",
        ),
        (2, torch.zeros(2, 2), ValueError, r"extrema must have shape \[3, 2\], got \[2, 2\]"),
        (3, step(3), IndexError, r"step_index must be in \[0, num_steps=3\), got 3"),
    ],
)
def test_observe_rejects(position: int, value: Tensor, error: type[Exception], message: str) -> None:
    arguments = [torch.zeros(2), *tables(), step(0)]
    arguments[position] = value
    with pytest.raises(error, match=f"observe: {message}"):
        ops.observe(*arguments)
