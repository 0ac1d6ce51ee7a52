"""Where float models come from, what they are refused for, and what a model quantized while loading is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.quantizers import PipelineQuantizationConfig
from loaded_models import CONFIGS, WEIGHTS, both_kinds, inputs, load, random, relative, run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adpdm
from adpdm import AdpdmConfig
from adpdm.diffusers_config import choose_layers
from adpdm.evaluate.layers import layer_sqnr
from adpdm.nn import LoadedLayer, loaded_layers
from adpdm.testing import ddim_scheduler, tiny_conditional_unet, tiny_pipeline, tiny_unet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model in one file; tests must not change it."""
    path = tmp_path_factory.mktemp("float")
    tiny_conditional_unet().save_pretrained(path)
    return path


@both_kinds
def test_loading_in_bfloat16_quantizes_the_stored_weights(folder: Path, settings: dict[str, Any]) -> None:
    # Codes from float32, scales in float32; rounding to bfloat16 first would cost accuracy.
    wanted, got = load(folder, settings).state_dict(), load(folder, settings, torch_dtype=torch.bfloat16)
    for name in loaded_layers(got):
        for key in ("weight", "weight_scale"):
            assert torch.equal(got.state_dict()[f"{name}.{key}"], wanted[f"{name}.{key}"])
    assert (got.dtype, got.conv_norm_out.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    with torch.no_grad():
        output = got(**inputs(torch.bfloat16)).sample
    assert output.dtype == torch.bfloat16
    assert relative(output, run(load(folder, settings))) < 0.1


def test_saved_in_float32_loads_in_bfloat16_without_casting_scales(folder: Path, tmp_path: Path) -> None:
    model = load(folder, CONFIGS["w4a8"])
    model.save_pretrained(tmp_path)
    got = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for name, layer in loaded_layers(got).items():
        assert layer.weight_scale.dtype == torch.float32
        assert torch.equal(layer.weight_scale, model.get_submodule(name).weight_scale)


@pytest.mark.parametrize(
    "config",
    [
        PipelineQuantizationConfig(quant_mapping={"unet": AdpdmConfig(weight_bits=4)}),
        PipelineQuantizationConfig(
            quant_backend="adpdm", quant_kwargs={"weight_bits": 4}, components_to_quantize="unet"
        ),
    ],
    ids=["mapping", "backend"],
)
def test_pipeline_config(tmp_path: Path, config: Any) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    pipe = DDIMPipeline.from_pretrained(tmp_path, quantization_config=config)
    assert pipe.unet.hf_quantizer.quantization_config.weight_bits == 4
    pipe.save_pretrained(tmp_path / "quantized")
    again = DDIMPipeline.from_pretrained(tmp_path / "quantized")
    x = random(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.unet(x, 500).sample, pipe.unet(x, 500).sample)


def test_other_components_cannot_be_quantized_by_our_backend() -> None:
    transformers = pytest.importorskip("transformers")
    config = PipelineQuantizationConfig(quant_backend="adpdm", quant_kwargs={"weight_bits": 4})
    asked = config._resolve_quant_config(is_diffusers=False, module_name="text_encoder")
    with pytest.raises(
        ValueError, match=r"models of diffusers, got one of transformers.*components_to_quantize"
    ):
        transformers.quantizers.auto.AutoHfQuantizer.from_config(asked)


def test_from_single_file(folder: Path) -> None:
    model = UNet2DConditionModel.from_single_file(
        str(folder / WEIGHTS), config=str(folder), quantization_config=AdpdmConfig(weight_bits=4)
    )
    assert torch.equal(run(model), run(load(folder, CONFIGS["w4"])))


def test_model_from_a_single_file_can_be_saved(folder: Path, tmp_path: Path) -> None:
    model = UNet2DConditionModel.from_single_file(
        str(folder / WEIGHTS), config=str(folder), quantization_config=AdpdmConfig(weight_bits=4)
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(run(UNet2DConditionModel.from_pretrained(tmp_path)), run(model))


def test_model_with_tensors_that_never_arrived_is_refused() -> None:
    # from_single_file does not compare keys: what a conversion of an original checkpoint lacks stays on meta.
    with torch.device("meta"):
        model = tiny_unet()
    quantizer = adpdm.diffusers_quantizer.AdpdmQuantizer(AdpdmConfig())
    quantizer.preprocess_model(model)
    with pytest.raises(ValueError, match=r"the checkpoint lacks tensors of the model: \['conv_in.bias'"):
        quantizer.postprocess_model(model)


def changed_weights(folder: Path, target: Path, changes: dict[str, Tensor | None]) -> Path:
    """A copy of the float model with some tensors replaced or, where None, left out."""
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, target / WEIGHTS, {"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


CONV = "mid_block.resnets.0.conv1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{CONV}.weight": None}, rf"missing tensors \['{CONV}.weight'\]"),
        ({f"{CONV}.bias": None}, rf"missing tensors \['{CONV}.bias'\]"),
        ({f"{CONV}.weight": torch.ones(16, 16, 3, 3).byte()}, f"{CONV}.weight must be floating point"),
        ({f"{CONV}.bias": torch.ones(16).int()}, f"{CONV}.bias must be floating point, got torch.int32"),
        ({f"{CONV}.weight": torch.full((16, 16, 3, 3), torch.nan)}, f"{CONV}.weight must be finite"),
        ({f"{CONV}.weight": torch.ones(16, 16, 3, 2)}, f"{CONV}.weight expected shape"),
    ],
)
def test_float_checkpoint_that_cannot_be_quantized_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    changed_weights(folder, tmp_path, changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_config_of_the_user_is_not_changed_and_serves_again(folder: Path, tmp_path: Path) -> None:
    config = AdpdmConfig(weight_bits=4)
    model = UNet2DConditionModel.from_pretrained(folder, quantization_config=config)
    assert config.layers is None
    tiny_unet().save_pretrained(tmp_path)
    for reused in (config, model.config.quantization_config):
        other = UNet2DModel.from_pretrained(tmp_path, quantization_config=reused)
        rows = other.config.quantization_config.layers
        assert {row["name"] for row in rows} == set(loaded_layers(other))


def test_settings_may_come_as_a_plain_dict(folder: Path) -> None:
    settings = {"quant_method": "adpdm", "weight_bits": 4}
    model = UNet2DConditionModel.from_pretrained(folder, quantization_config=settings)
    assert torch.equal(run(model), run(load(folder, CONFIGS["w4"])))


@pytest.mark.parametrize("bits", [8, None])
def test_static_scales_are_refused_without_calibration(bits: int | None) -> None:
    with pytest.raises(ValueError, match="static activation scales need calibration.*adpdm.quantize"):
        AdpdmConfig(activation_bits=bits, activation_scales="static")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 1}, r"weight_bits must be an integer in \[2, 8\], got 1"),
        ({"weight_bits": "8"}, r"weight_bits must be an integer in \[2, 8\], got '8'"),
        ({"weight_bits": True}, r"weight_bits must be an integer in \[2, 8\], got True"),
        ({"activation_bits": 16}, r"activation_bits must be an integer in \[2, 8\] or None, got 16"),
        ({"activation_scales": "fixed"}, "activation_scales must be 'dynamic' or 'static', got 'fixed'"),
        ({"modules_to_not_convert": "conv_in"}, "must be a list of names or patterns, got 'conv_in'"),
        ({"modules_to_not_convert": [1]}, r"must be a list of names or patterns, got \[1\]"),
        ({"group_size": 64}, r"unknown keys \['group_size'\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdpdmConfig(**settings)


def test_loaded_model_is_refused_by_quantize(folder: Path) -> None:
    with pytest.raises(ValueError, match="quantized already; load the original again"):
        adpdm.quantize(load(folder), scheduler=ddim_scheduler())


def test_loaded_model_does_not_hold_on_to_the_file(folder: Path, tmp_path: Path) -> None:
    # A mapped file would keep the float model in memory, and change under whoever saves over it.
    model = load(changed_weights(folder, tmp_path, {}), CONFIGS["w4"])
    wanted = run(model)
    for tensor in model.state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    model.save_pretrained(tmp_path)
    assert torch.equal(run(model), wanted)
    assert torch.equal(run(UNet2DConditionModel.from_pretrained(tmp_path)), wanted)


def test_layers_can_be_judged_one_by_one(folder: Path) -> None:
    model, given = load(folder, CONFIGS["w8a8"]), inputs()
    context = {"encoder_hidden_states": given["encoder_hidden_states"]}
    context |= {"added_cond_kwargs": {"resolution": None}, "encoder_attention_mask": None}  # no tensors
    found = layer_sqnr(tiny_conditional_unet(), model, [(given["sample"], given["timestep"], context)])
    assert list(found) == list(loaded_layers(model))
    assert min(found.values()) > 20
    assert max(found.values()) < 60  # 8 bits leave an error in every layer


class TwoLayers(nn.Module):
    """Two layers of one weight that see the same values."""

    def __init__(self, gain: float, offset: float) -> None:
        super().__init__()
        self.scaled, self.shifted = nn.Linear(1, 1, bias=False), nn.Linear(1, 1)
        for parameter, value in zip(self.parameters(), (gain, 1.0, offset), strict=True):
            nn.init.constant_(parameter, value)

    def forward(self, sample: Tensor, timestep: float) -> None:
        self.scaled(sample)
        self.shifted(sample)


def test_errors_of_layers_are_pooled_over_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adpdm.evaluate.layers.quant_layers", lambda model: dict(model.named_children()))
    inputs = [(torch.tensor([[value]]), 0.0, {}) for value in (3.0, 4.0)]
    found = layer_sqnr(TwoLayers(1.0, 0.0), TwoLayers(0.9, 0.125**0.5), inputs)
    # 25 / 0.25 in both: a tenth of every value, or one eighth twice.
    assert found == pytest.approx({"scaled": 20.0, "shifted": 20.0}, abs=1e-5)


def test_layers_of_other_classes_stay_as_they_are() -> None:
    class Odd(nn.Linear):
        """Whoever derives from a layer may read its weight elsewhere."""

    model = nn.Sequential(nn.Linear(4, 4), Odd(4, 4))
    assert [row["name"] for row in choose_layers(model, AdpdmConfig(), ())] == ["0"]


def test_kind_of_every_loaded_layer_is_told(folder: Path) -> None:
    text = str(load(folder, CONFIGS["w4a8"]).mid_block.resnets[0].conv1)
    assert "weight=4 bits, input=8 bits, measured" in text
    assert isinstance(load(folder).conv_in, LoadedLayer)
