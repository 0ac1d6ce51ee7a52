"""Fixtures and settings shared by all Python tests."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import register_random, settings

from adpdm.nn.fusion import FusedBlock

# Timings on shared machines vary too much for a deadline; equal examples everywhere make failures repeatable.
settings.register_profile("adpdm", deadline=None, derandomize=True, max_examples=50, print_blob=True)
settings.load_profile("adpdm")

# Tiny tensors gain nothing from more threads, and workers of pytest-xdist share the cores; tests of threading
# set their own number. The variable is for the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Of the global generator. Not 0, the seed of `generator`, or weights would be made of the same random bits as
# the inputs that they meet.
GLOBAL_SEED = 1


class GlobalGenerator:
    """The generator that layers draw their weights from, as Hypothesis sees generators."""

    @staticmethod
    def seed(value: int) -> None:
        torch.manual_seed(GLOBAL_SEED + value)

    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


# Hypothesis seeds it before every example; it holds only a weak reference.
GLOBAL_GENERATOR = GlobalGenerator()
register_random(GLOBAL_GENERATOR)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Equal weights and numbers of every test, whatever ran before it."""
    torch.manual_seed(GLOBAL_SEED)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device this machine has."""
    return torch.device(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed; tests draw on the CPU and move, so devices see equal numbers."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn the path of one layer after the other, taken within a fused block, into an error."""

    per_layer = FusedBlock.per_layer

    def refuse(self: FusedBlock, *args: Any, **kwargs: Any) -> Any:
        if self.is_float and any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in args):
            return per_layer(self, *args, **kwargs)  # whose kernels are of float32
        raise AssertionError(f"{type(self).__name__} did not run fused: {self.reason()}")

    monkeypatch.setattr(FusedBlock, "per_layer", refuse)
