"""Methods and dtypes of diffusers' models that a quantized model cannot have: a sentence, nothing changed."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from loaded_models import CONFIGS, inputs, load

import adpdm
from adpdm import QuantConfig
from adpdm.diffusers_quantizer import AdpdmQuantizer
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_conditional_unet, tiny_unet

SEPARATE = "fuse_qkv_projections: wanted a float model, got a quantized one"
NO_FLOAT64 = "take activations in float32, float16 or bfloat16, got torch.float64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model in a file."""
    path = tmp_path_factory.mktemp("float")
    tiny_conditional_unet().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def calibrated() -> Any:
    """A calibrated model; tests must not change it."""
    unet = tiny_unet(**ONE_BLOCK)
    settings = QuantConfig(num_inference_steps=2, num_groups=2, histogram_images=2, grouping="uniform")
    adpdm.quantize(unet, settings, scheduler=ddim_scheduler())
    return unet


def test_projections_cannot_be_fused(folder: Path) -> None:
    model = load(folder, CONFIGS["w4a8"])
    state, processors = set(model.state_dict()), model.attn_processors
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=SEPARATE):
            copied.fuse_qkv_projections()
    assert set(model.state_dict()) == state
    assert model.attn_processors == processors


def test_dequantized_model_fuses_projections(folder: Path) -> None:
    model = load(folder, CONFIGS["w4a8"])
    model.dequantize()
    model.fuse_qkv_projections()
    assert any("to_kv" in name for name in model.state_dict())


def test_model_without_projections_to_fuse_gets_no_such_method(calibrated: Any) -> None:
    assert not hasattr(UNet2DModel, "fuse_qkv_projections")
    assert not hasattr(calibrated, "fuse_qkv_projections")


# ---- float64 -----------------------------------------------------------------------------------------------


def test_calibrated_model_stays_in_its_dtype(calibrated: Any) -> None:
    with pytest.raises(ValueError, match=NO_FLOAT64):
        calibrated.double()
    assert {p.dtype for p in calibrated.parameters()} == {torch.float32, torch.int8}


def test_dequantized_model_computes_in_float64(calibrated: Any) -> None:
    model = copy.deepcopy(calibrated)
    model.dequantize()
    model.double()
    assert model(torch.ones(1, 1, 8, 8, dtype=torch.float64), 500).sample.dtype == torch.float64


def test_loading_in_float64_is_refused(folder: Path) -> None:
    wanted = "torch_dtype must be one of .*torch.float32, torch.float16, torch.bfloat16.*, got torch.float64"
    with pytest.raises(ValueError, match=wanted):
        load(folder, CONFIGS["w4a8"], torch_dtype=torch.float64)


def test_loading_a_calibrated_model_in_float64_is_refused(calibrated: Any, tmp_path: Path) -> None:
    calibrated.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got torch.float64"):
        UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.float64)


@torch.no_grad()
def test_weights_alone_are_multiplied_in_float64(folder: Path) -> None:
    loaded = load(folder, CONFIGS["w4"], torch_dtype=torch.float64)
    cast = load(folder, CONFIGS["w4"]).double()
    results = [model(**inputs(torch.float64)).sample for model in (loaded, cast)]
    assert results[0].dtype == torch.float64
    # Float parameters were read as float32 first, or cast to it: both hold the same numbers.
    assert torch.equal(results[0], results[1])


# ---- float models of a quantized model's config ------------------------------------------------------------


def test_float_model_of_a_quantized_config_is_named_when_loaded(calibrated: Any, tmp_path: Path) -> None:
    UNet2DModel.from_config(calibrated.config).save_pretrained(tmp_path)
    message = "it holds a float model: one that from_config makes .* leave that key out"
    with pytest.raises(ValueError, match=message):
        UNet2DModel.from_pretrained(tmp_path)


def test_config_without_that_key_makes_a_model_like_any_other(calibrated: Any, tmp_path: Path) -> None:
    config = {key: value for key, value in calibrated.config.items() if key != "quantization_config"}
    UNet2DModel.from_config(config).save_pretrained(tmp_path)
    assert UNet2DModel.from_pretrained(tmp_path).dtype == torch.float32


def test_quantized_checkpoint_that_lacks_a_tensor_is_taken_for_no_float_model(calibrated: Any) -> None:
    quantizer = AdpdmQuantizer(calibrated.config.quantization_config, pre_quantized=True)
    missing = "down_blocks.0.resnets.0.conv1.weight_scale"
    with pytest.raises(ValueError, match=rf"missing tensors \['{missing}'\], unexpected tensors \[\]$"):
        quantizer.update_missing_keys(calibrated, [missing], "")


def test_class_of_the_float_model_is_left_as_it_is(folder: Path) -> None:
    load(folder, CONFIGS["w4a8"])
    model = UNet2DConditionModel.from_pretrained(folder)
    model.fuse_qkv_projections()
    assert model.double().dtype == torch.float64
