"""Copies of captured denoisers: they run without a capture, and leave that of the original alone."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adpdm
from adpdm import QuantConfig, graph
from adpdm.testing import ONE_BLOCK, tiny_pipeline

WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}
every_way = pytest.mark.parametrize("duplicate", WAYS.values(), ids=WAYS)


class Scale(nn.Module):
    """A denoiser of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.weight * sample + timestep


def plus_one(model: Scale, sample: Tensor, timestep: Tensor) -> Tensor:
    """A forward as another library leaves it in a model."""
    return Scale.forward(model, sample, timestep) + 1


@every_way
@torch.no_grad()
def test_copy_is_not_captured_and_computes_with_its_own_weights(duplicate: Callable[[Any], Any]) -> None:
    denoiser = Scale()
    graphed = graph.capture(denoiser)
    x = torch.tensor([[2.0]])
    assert denoiser(x, 1).item() == 7
    copied = duplicate(denoiser)
    assert not graph.is_captured(copied)
    copied.weight.fill_(10)
    assert copied(x, 1).item() == 21
    assert denoiser(x, 2).item() == 8
    assert denoiser.forward is graphed
    assert len(graphed) == 1


@every_way
@torch.no_grad()
def test_copy_can_be_captured_and_released(duplicate: Callable[[Any], Any]) -> None:
    denoiser = Scale()
    graph.capture(denoiser)
    copied = duplicate(denoiser)
    copied.weight.fill_(10)
    graphed = graph.capture(copied)
    assert copied(torch.tensor([[2.0]]), 1).item() == 21
    assert len(graphed) == 1
    graph.release(copied)
    assert copied(torch.tensor([[2.0]]), 1).item() == 21


@every_way
@torch.no_grad()
def test_copy_has_the_forward_that_another_library_had_put_there(duplicate: Callable[[Any], Any]) -> None:
    denoiser: Any = Scale()
    denoiser.forward = functools.partial(plus_one, denoiser)
    graph.capture(denoiser)
    copied = duplicate(denoiser)
    copied.weight.fill_(10)
    assert copied(torch.tensor([[2.0]]), 1).item() == 22
    assert denoiser(torch.tensor([[2.0]]), 1).item() == 8


@torch.no_grad()
def test_captured_quantized_pipeline_is_copied() -> None:
    pipe = tiny_pipeline(**ONE_BLOCK)
    adpdm.quantize(
        pipe, QuantConfig(num_inference_steps=2, num_groups=2, histogram_images=2, grouping="uniform")
    )
    x = torch.ones(1, 1, 8, 8)
    wanted = [pipe.unet(x, t).sample for t in (500, 0)]
    graph.capture(pipe)
    for duplicate in WAYS.values():
        copied = duplicate(pipe)
        assert not graph.is_captured(copied.unet)
        assert all(torch.equal(copied.unet(x, t).sample, y) for t, y in zip((500, 0), wanted, strict=True))
    assert torch.equal(pipe.unet(x, 500).sample, wanted[0])
