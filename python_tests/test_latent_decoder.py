"""Latents of pipelines with their VAE: how they are scaled and shifted before it decodes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from adpdm.conditioning import LatentDecoder, decoder_of

MEAN, DEVIATION = (0.5, -1.0, 0.0, 2.0), (2.0, 1.0, 0.5, 3.0)


def decoder(**settings: Any) -> LatentDecoder:
    """Of a tiny VAE with random weights, the same in every call."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, sample_size=8, scaling_factor=0.5, **settings
    )
    found = decoder_of(SimpleNamespace(vae=vae.eval()), (4, 8, 8))
    assert found is not None
    return found


def latents() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def decoded(made: LatentDecoder, given: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([made.vae.decode(row).sample for row in given.split(1)])


def test_latents_are_divided_by_the_scaling_factor_and_shifted() -> None:
    made = decoder(shift_factor=0.25)
    assert torch.equal(made(latents()), decoded(made, latents() / 0.5 + 0.25))


def test_latents_with_mean_and_deviation_are_decoded_as_stable_diffusion_xl_does() -> None:
    made = decoder(latents_mean=MEAN, latents_std=DEVIATION)
    mean, deviation = (torch.tensor(x).view(1, 4, 1, 1) for x in (MEAN, DEVIATION))
    assert torch.equal(made(latents()), decoded(made, latents() * deviation / 0.5 + mean))
    assert made.state_dict()["normal"].tolist() == [list(MEAN), list(DEVIATION)]


@pytest.mark.parametrize("settings", [{"latents_mean": MEAN}, {"latents_std": DEVIATION}])
def test_mean_or_deviation_alone_changes_nothing(settings: dict[str, Any]) -> None:
    made = decoder(**settings)
    assert torch.equal(made(latents()), decoded(made, latents() / 0.5))


def test_other_than_one_mean_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="must have 4 numbers, one per channel of a sample, got 3 and 4"):
        decoder(latents_mean=MEAN[:3], latents_std=DEVIATION)
