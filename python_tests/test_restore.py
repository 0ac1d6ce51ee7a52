"""What an interrupt of `adpdm.quantize` at its very end leaves: a float model like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import config, predictions

import adpdm
from adpdm import pipeline
from adpdm.diffusers_quantizer import mark_quantized
from adpdm.nn.adapters import EQUALIZED
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_unet


@pytest.mark.parametrize("equalization", ["off", "on"])
def test_interrupt_at_the_very_end_leaves_a_float_model(
    equalization: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing says any more that it is quantized, so that it can be cast, saved and quantized."""
    unet, original = tiny_unet(), tiny_unet()
    marked: list[bool] = []

    def interrupt(model: Any, *arguments: Any) -> None:
        mark_quantized(model, *arguments)
        marked.append(model.is_quantized)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "mark_quantized", interrupt)
    settings = config(grouping="shared", activation_bits=6, equalization=equalization)
    with pytest.raises(KeyboardInterrupt):
        adpdm.quantize(unet, settings, scheduler=ddim_scheduler())
    assert marked == [True]
    assert vars(unet).keys() == vars(original).keys()
    assert unet.config == original.config
    assert not [m for m in unet.modules() if hasattr(m, EQUALIZED)]
    unet.save_pretrained(tmp_path)
    loaded = type(unet).from_pretrained(tmp_path)
    assert torch.equal(predictions(loaded), predictions(original))
    assert unet.to(torch.float16).dtype == torch.float16


def test_blocks_are_described_before_the_model_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_unet(**ONE_BLOCK)

    def interrupt(model: Any) -> None:
        assert not hasattr(model, "hf_quantizer")
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "describe_fusion", interrupt)
    with pytest.raises(KeyboardInterrupt):
        adpdm.quantize(unet, config(grouping="shared"), scheduler=ddim_scheduler())
    assert not hasattr(unet, "hf_quantizer")
