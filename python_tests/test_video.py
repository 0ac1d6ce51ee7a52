"""Denoisers of video: samples of five dimensions, integer linear layers, convolutions in 3D in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from transformer_cases import noise

import adpdm
from adpdm import DenoiserCall, QuantConfig
from adpdm.evaluate import generate

SHAPE = (4, 2, 8, 8)  # channels, frames, height, width
TEXT = noise(2, 5, 12)


def tiny_wan() -> Any:
    """A transformer of Wan 2.1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=SHAPE[0],
            out_channels=SHAPE[0],
            text_dim=TEXT.shape[2],
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        )
    return denoiser.eval()


def test_a_denoiser_of_video_is_quantized_sampled_saved_and_loaded(tmp_path: Path) -> None:
    original, denoiser = tiny_wan(), tiny_wan()
    scheduler, call = diffusers.FlowMatchEulerDiscreteScheduler(), DenoiserCall(sample_shape=SHAPE)
    given: dict[str, Any] = {"conditioning": {"encoder_hidden_states": TEXT}, "call": call}
    config = QuantConfig(num_groups=2, num_inference_steps=4, histogram_images=2, grouping="dp")
    report = adpdm.quantize(denoiser, config, scheduler=scheduler, **given)
    assert "patch_embedding" not in {layer.name for layer in report.layers}, "a Conv3d"
    assert report.coverage.layers >= 10
    samples = [generate(x, scheduler, 2, 4, **given).samples for x in (original, denoiser)]
    assert samples[0].shape == (2, *SHAPE)
    error = float((samples[1] - samples[0]).norm() / samples[0].norm())
    assert 1e-5 < error < 0.01
    denoiser.save_pretrained(tmp_path)
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(generate(loaded, scheduler, 2, 4, **given).samples, samples[1])
