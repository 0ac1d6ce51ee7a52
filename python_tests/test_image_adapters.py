"""IP-Adapters on models that are quantized before or after they are loaded, and U-Nets of images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from torch import Tensor

import adpdm
from adpdm import AdpdmConfig, QuantConfig, graph
from adpdm.nn import CodedLayer
from adpdm.testing import ddim_scheduler, tiny_conditional_unet

SETTINGS: dict[str, Any] = {
    "grouping": "dp",
    "num_groups": 2,
    "num_inference_steps": 4,
    "histogram_images": 4,
}
TOKENS, WIDTH = 4, 8  # of an image, and of a token


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SAMPLE, TEXT = randn(2, 4, 8, 8, seed=0), randn(2, 5, WIDTH, seed=1)
IMAGE, OTHER = randn(2, 1, WIDTH, seed=2), randn(2, 1, WIDTH, seed=3)
CONDITION = {"encoder_hidden_states": TEXT, "added_cond_kwargs": {"image_embeds": [IMAGE]}}


def adapter(unet: Any) -> dict[str, dict[str, Tensor]]:
    """What the file of an IP-Adapter for this U-Net holds."""
    attention: dict[str, Tensor] = {}
    crossing = [name for name in unet.attn_processors if "attn2" in name]
    for i, name in enumerate(crossing):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for word in ("k", "v"):
            attention[f"{2 * i + 1}.to_{word}_ip.weight"] = randn(channels, WIDTH, seed=10 + 2 * i)
    torch.manual_seed(0)
    state = ImageProjection(WIDTH, WIDTH, TOKENS).state_dict()
    names = {"image_embeds.": "proj.", "norm.": "norm."}
    image = {
        new + key.removeprefix(old): x for key, x in state.items() for old, new in names.items() if old in key
    }
    return {"image_proj": image, "ip_adapter": attention}


def load(unet: Any) -> Any:
    """As `pipe.load_ip_adapter` does."""
    unet._load_ip_adapter_weights([adapter(unet)])
    return unet


def set_scale(unet: Any, scale: float) -> None:
    """As `pipe.set_ip_adapter_scale` does."""
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale] * len(processor.scale)


@torch.no_grad()
def run(unet: Any, image: Tensor = IMAGE) -> Tensor:
    output: Tensor = unet(SAMPLE, 500, TEXT, added_cond_kwargs={"image_embeds": [image]}).sample
    return output


def sqnr(exact: Tensor, approximate: Tensor) -> float:
    error = (approximate - exact).double().square().mean()
    return float(10 * torch.log10(exact.double().square().mean() / error))


def quantized(unet: Any, conditioning: dict[str, Any]) -> Any:
    config = QuantConfig(**SETTINGS)
    adpdm.quantize(unet, config, scheduler=ddim_scheduler(), conditioning=conditioning)
    return unet


@pytest.fixture(scope="module")
def float_unet() -> Any:
    return load(tiny_conditional_unet()).eval()


@pytest.fixture(scope="module")
def with_adapter(float_unet: Any) -> Any:
    """Quantized while the adapter was there."""
    return quantized(copy.deepcopy(float_unet), CONDITION)


def of_calibration() -> Any:
    return quantized(tiny_conditional_unet(), {"encoder_hidden_states": TEXT})


def of_loading(folder: Path) -> Any:
    tiny_conditional_unet().save_pretrained(folder)
    return UNet2DConditionModel.from_pretrained(folder, quantization_config=AdpdmConfig(weight_bits=8))


def test_images_act_on_a_model_that_was_quantized_with_them(float_unet: Any, with_adapter: Any) -> None:
    assert with_adapter.config.encoder_hid_dim_type == "ip_image_proj"
    assert sqnr(run(float_unet), run(with_adapter)) > 20
    assert sqnr(run(float_unet), run(with_adapter, OTHER)) < 10
    coded = [name for name, m in with_adapter.named_modules() if isinstance(m, CodedLayer)]
    assert coded
    assert not any("processor" in name or "encoder_hid_proj" in name for name in coded)


def test_dequantized_models_and_failed_runs_keep_the_adapter(float_unet: Any, with_adapter: Any) -> None:
    back = copy.deepcopy(with_adapter)
    back.dequantize()
    assert sqnr(run(float_unet), run(back)) > 20
    model, calls = copy.deepcopy(float_unet), []

    def interrupt(phase: str, done: int, total: int) -> None:
        calls.append(phase)
        if len(set(calls)) == 3:  # trajectories and histograms are there, and layers are others
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adpdm.quantize(
            model,
            QuantConfig(**SETTINGS),
            scheduler=ddim_scheduler(),
            conditioning=CONDITION,
            progress=interrupt,
        )
    assert torch.equal(run(model), run(float_unet))


@pytest.mark.parametrize("kind", ["calibrated", "while loading"])
def test_adapter_is_loaded_onto_a_quantized_model(kind: str, float_unet: Any, tmp_path: Path) -> None:
    model = of_calibration() if kind == "calibrated" else of_loading(tmp_path)
    load(model)
    assert model.is_quantized
    assert sqnr(run(float_unet), run(model)) > (5 if kind == "calibrated" else 20)  # on texts alone
    assert sqnr(run(model), run(model, OTHER)) < 15
    copied = copy.deepcopy(model)
    set_scale(copied, 0.0)
    assert torch.equal(run(copied), run(copied, OTHER))


@pytest.mark.parametrize("order", ["adapter first", "adapter last"])
def test_what_is_saved_has_no_adapter(order: str, with_adapter: Any, tmp_path: Path) -> None:
    model = with_adapter if order == "adapter first" else load(of_calibration())
    with pytest.warns(UserWarning, match="the IP-Adapter is left out"):
        model.save_pretrained(tmp_path / "saved")
    again: Any = UNet2DConditionModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        again(SAMPLE, 500, TEXT)
    assert torch.equal(run(load(again)), run(model))


def test_captured_models_follow_the_scale(with_adapter: Any) -> None:
    captured = copy.deepcopy(with_adapter)
    plain = copy.deepcopy(with_adapter)
    graphed = graph.capture(captured)
    for scale in (1.0, 0.0, 0.5):
        set_scale(captured, scale)
        set_scale(plain, scale)
        assert torch.equal(run(captured), run(plain))
        assert len(graphed) == 1


def test_blocks_are_fused_again_when_the_adapter_is_gone() -> None:
    model = of_calibration()
    with torch.no_grad():
        wanted = model(SAMPLE, 500, TEXT).sample
        load(model)
        # As `pipe.unload_ip_adapter` does.
        model.encoder_hid_proj, model.config.encoder_hid_dim_type = None, None
        model.set_attn_processor({name: AttnProcessor2_0() for name in model.attn_processors})
        assert torch.equal(model(SAMPLE, 500, TEXT).sample, wanted)
    assert all(info.fused for info in adpdm.nn.describe_fusion(model) if info.kind == "Attention")


def of_images(folder: Path, quantize: Callable[[Any], Any] | None) -> Any:
    """A U-Net whose context is made of images, as Kandinsky 2.2's is."""
    unet = tiny_conditional_unet(encoder_hid_dim_type="image_proj", encoder_hid_dim=WIDTH)
    if quantize is not None:
        return quantize(unet)
    unet.save_pretrained(folder)
    return UNet2DConditionModel.from_pretrained(
        folder, quantization_config=AdpdmConfig(weight_bits=8, activation_bits=8)
    )


def test_projections_of_images_stay_float(tmp_path: Path) -> None:
    condition = {"encoder_hidden_states": TEXT, "added_cond_kwargs": {"image_embeds": IMAGE[:, 0]}}
    exact = of_images(tmp_path, lambda unet: unet.eval())
    with torch.no_grad():
        wanted = exact(SAMPLE, 500, **condition).sample
        for quantize in (None, lambda unet: quantized(unet, condition)):
            model = of_images(tmp_path, quantize)
            assert not isinstance(model.encoder_hid_proj.image_embeds, CodedLayer)
            assert sqnr(wanted, model(SAMPLE, 500, **condition).sample) > 15
