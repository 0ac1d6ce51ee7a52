"""What tests share: random numbers that do not depend on other tests, threads that are given back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_counts import threads

FIRST = 0.757631599903  # that torch.rand gives after torch.manual_seed(1)


@pytest.mark.parametrize("run", [1, 2])
def test_every_test_draws_the_same_numbers(run: int) -> None:
    assert float(torch.rand(())) == pytest.approx(FIRST)


@settings(max_examples=2)
@given(example=st.integers())
def test_every_example_draws_the_same_numbers(example: int) -> None:
    assert float(torch.rand(())) == pytest.approx(FIRST)


def test_threads_are_given_back_after_an_error() -> None:
    before, seen = torch.get_num_threads(), 0

    def fail() -> None:
        nonlocal seen
        seen = torch.get_num_threads()
        raise KeyError

    with pytest.raises(KeyError), threads(before + 1):
        fail()
    assert (seen, torch.get_num_threads()) == (before + 1, before)
