"""Layers that a denoiser calls by name, as diffusers' motion modules do, shared ones, and repeated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

import adpdm
from adpdm import AdpdmConfig, QuantConfig
from adpdm.evaluate.layers import layer_sqnr
from adpdm.nn import CodedLayer
from adpdm.testing import ddim_scheduler, tiny_conditional_unet

TEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
SAMPLE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))


class ByName:
    """A layer that is called by name; what is asked of it is the layer's."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Any:
        return self.layer(input=x)


class Processor(AttnProcessor2_0):
    """Calls the projection of queries by name."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        to_q = attn._modules.pop("to_q")
        object.__setattr__(attn, "to_q", ByName(to_q))
        try:
            return super().__call__(attn, hidden_states, *args, **kwargs)
        finally:
            object.__delattr__(attn, "to_q")
            attn._modules["to_q"] = to_q


def unet() -> Any:
    made = tiny_conditional_unet()
    made.set_attn_processor(Processor())
    return made


def config(**changes: Any) -> QuantConfig:
    settings = {"num_groups": 2, "num_inference_steps": 4, "histogram_images": 2, "grouping": "dp"}
    return QuantConfig(**{**settings, **changes})


def test_layers_called_by_name_are_calibrated() -> None:
    # Below 8 bits layers are probed, fitted and equalized as well.
    given = {"scheduler": ddim_scheduler(), "conditioning": {"encoder_hidden_states": TEXT}}
    by_name, by_position = unet(), tiny_conditional_unet()
    for model in (by_name, by_position):
        adpdm.quantize(model, config(weight_bits=4, activation_bits=6, equalization="on"), **given)
    assert isinstance(
        by_name.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q"), CodedLayer
    )
    by_position.set_attn_processor(Processor())  # layer by layer, too
    with torch.no_grad():
        assert torch.equal(by_name(SAMPLE, 500, TEXT).sample, by_position(SAMPLE, 500, TEXT).sample)


def test_layers_called_by_name_are_quantized_while_loading(tmp_path: Path) -> None:
    tiny_conditional_unet().save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(
        tmp_path, quantization_config=AdpdmConfig(weight_bits=8, activation_bits=8)
    )
    with torch.no_grad():
        wanted = loaded(SAMPLE, 500, TEXT).sample
        loaded.set_attn_processor(Processor())
        assert torch.equal(loaded(SAMPLE, 500, TEXT).sample, wanted)


def test_layers_of_two_names_are_refused() -> None:
    made = tiny_conditional_unet()
    attn = made.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    attn.to_k = attn.to_q
    with pytest.raises(ValueError, match=r"one that is mid_block\S+.to_q and mid_block\S+.to_k; param"):
        adpdm.quantize(
            made, config(), scheduler=ddim_scheduler(), conditioning={"encoder_hidden_states": TEXT}
        )


def test_layers_that_run_more_than_once_are_judged_call_by_call() -> None:
    exact, quantized = tiny_conditional_unet(), tiny_conditional_unet()
    adpdm.quantize(
        quantized, config(), scheduler=ddim_scheduler(), conditioning={"encoder_hidden_states": TEXT}
    )
    inputs = [(SAMPLE, torch.tensor(500), {"encoder_hidden_states": TEXT})]
    wanted = layer_sqnr(exact, quantized, inputs)
    for model in (exact, quantized):
        for module in model.modules():
            if hasattr(module, "set_chunk_feed_forward"):
                module.set_chunk_feed_forward(4, 1)
    chunked = layer_sqnr(exact, quantized, inputs)
    names = [name for name in wanted if ".ff." in name]
    assert names
    for name in names:
        assert chunked[name] == pytest.approx(wanted[name], abs=0.5)
