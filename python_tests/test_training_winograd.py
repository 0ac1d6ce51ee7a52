"""examples/winograd.py against torch's convolution: results, both gradients, which layers take it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import winograd  # noqa: E402


def of_both(
    convolve: object,
    image: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C, 3, 3]
    gradient: Tensor,  # [N, K, H, W]
) -> list[Tensor]:
    """Result and gradients of image and weight."""
    image, weight = image.clone().requires_grad_(), weight.clone().requires_grad_()
    result = convolve(image, weight)  # type: ignore[operator]
    return [result.detach(), *torch.autograd.grad(result, (image, weight), gradient)]


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", sorted(winograd.IMAGES))
def test_result_and_gradients(
    size: tuple[int, int], format: torch.memory_format, generator: torch.Generator
) -> None:
    image = torch.randn((3, 5, *size), generator=generator).contiguous(memory_format=format)
    weight = torch.randn((7, 5, 3, 3), generator=generator).contiguous(memory_format=format)
    gradient = torch.randn((3, 7, *size), generator=generator)

    got = of_both(winograd.Winograd.apply, image, weight, gradient)

    exact = of_both(
        lambda x, w: F.conv2d(x, w, padding=1), image.double(), weight.double(), gradient.double()
    )
    for one, wanted in zip(got, exact, strict=True):
        assert one.shape == wanted.shape
        error = (one.double() - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-5, error


def test_which_layers_take_it_and_what_stays_theirs() -> None:
    wide = winograd.MIN_CHANNELS
    model = nn.Sequential(
        nn.Conv2d(wide, wide, 3, padding=1),
        nn.Conv2d(wide, wide, 3, padding=1, stride=2),
        nn.Conv2d(wide, wide, 3),
        nn.Conv2d(wide, wide, 3, padding=2, dilation=2),
        nn.Conv2d(wide, wide, 3, padding=1, groups=2),
        nn.Conv2d(wide, wide, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(wide, wide, 1),
        nn.Conv2d(wide, wide - 1, 3, padding=1),
        nn.Conv2d(wide - 1, wide, 3, padding=1),
    )
    names, parameters = list(model.state_dict()), list(model.parameters())

    assert winograd.use_winograd(model) == 1

    assert [type(layer) for layer in model] == [winograd.WinogradConv2d, *[nn.Conv2d] * 8]
    assert list(model.state_dict()) == names
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(8, 4), (8, 6), (12, 12)])
def test_a_layer_on_maps_of_any_size(
    size: tuple[int, int], bias: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Conv2d(winograd.MIN_CHANNELS, winograd.MIN_CHANNELS, 3, padding=1, bias=bias)
    image = torch.randn((2, winograd.MIN_CHANNELS, *size), generator=generator)
    direct = layer(image)
    winograd.use_winograd(layer)
    direct_only = []
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda *args: direct_only.append(1) or forward(*args))

    torch.testing.assert_close(layer(image), direct, rtol=1e-4, atol=1e-5)

    assert bool(direct_only) == (size not in winograd.IMAGES)
