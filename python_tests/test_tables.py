"""Tables without weights: the same bits from the float model, and a sentence for all that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import adpdm
from adpdm import AdpdmConfig, QuantConfig, tables
from adpdm.nn import CodedLayer, describe_fusion
from adpdm.testing import ddim_scheduler, tiny_conditional_unet, tiny_pipeline, tiny_unet

LAYER = "mid_block.resnets.0.conv1"


def config(**changes: Any) -> QuantConfig:
    values: dict[str, Any] = {
        "num_groups": 2,
        "num_inference_steps": 4,
        "histogram_images": 1,
        "grouping": "uniform",
        "weight_rounding": "nearest",
        "weight_bits": 4,
    }
    return QuantConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A quantized pipeline with corrected biases, raised and split layers, and the file of its tables."""
    pipe = tiny_pipeline()
    adpdm.quantize(pipe, config())
    path = tmp_path_factory.mktemp("tables") / "tables.safetensors"
    adpdm.save_tables(pipe, path)
    return pipe, path


def outputs(model: Any) -> list[Tensor]:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return [model(x, timestep).sample for timestep in (750, 250, 0)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_float_model_and_tables_give_the_same_bits(saved: tuple[Any, Path]) -> None:
    pipe, path = saved
    bits = {layer["weight_bits"] for layer in pipe.unet.config.quantization_config.layers}
    splits = {layer["split"] for layer in pipe.unet.config.quantization_config.layers}
    assert bits == {4, 8}
    assert len(splits) > 1
    model = tiny_unet()
    adpdm.load_tables(model, path)
    wanted = pipe.unet.state_dict()
    assert list(model.state_dict()) == list(wanted)
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    assert same(outputs(model), outputs(pipe.unet))
    assert [i.fused for i in describe_fusion(model)] == [i.fused for i in describe_fusion(pipe.unet)]


def test_interrupted_writing_leaves_the_old_file(
    saved: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tables.safetensors"
    path.write_bytes(b"old")

    def stop(tensors: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        adpdm.save_tables(saved[0], path)
    assert path.read_bytes() == b"old"


def test_model_made_from_tables_is_saved_like_the_first(saved: tuple[Any, Path], tmp_path: Path) -> None:
    pipe, path = saved
    again = tiny_pipeline()
    adpdm.load_tables(again, path)
    for name, model in (("first", pipe.unet), ("second", again.unet)):
        model.save_pretrained(tmp_path / name)
    files = [tmp_path / name / "diffusion_pytorch_model.safetensors" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    adpdm.save_tables(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_tensors_of_the_float_model_are_not_written_to(saved: tuple[Any, Path]) -> None:
    model = tiny_unet()
    bias = model.get_submodule(LAYER).bias
    adpdm.load_tables(model, saved[1])
    assert not torch.equal(model.get_submodule(LAYER).bias, bias)
    assert torch.equal(bias, tiny_unet().get_submodule(LAYER).bias)


def test_conditional_unet(tmp_path: Path) -> None:
    model, path = tiny_conditional_unet(), tmp_path / "tables.safetensors"
    context = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    conditioning = {"encoder_hidden_states": context}
    adpdm.quantize(model, config(), scheduler=ddim_scheduler(), conditioning=conditioning)
    adpdm.save_tables(model, path)
    again = tiny_conditional_unet()
    adpdm.load_tables(again, path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_file_holds_no_weights(saved: tuple[Any, Path]) -> None:
    pipe, path = saved
    tensors = load_file(path)
    layers = [m for m in pipe.unet.modules() if isinstance(m, CodedLayer)]
    rows = sum(m.weight_shape[0] for m in layers)
    assert not [key for key, value in tensors.items() if value.dtype in (torch.int8, torch.uint8)]
    assert not [key for key in tensors if key.endswith(".weight")]
    # One scale or two and a bias per output channel; per quantizer two groups and four steps; the timesteps.
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    quantizers = sum(len(m.quantizers) for m in layers)
    assert size <= rows * (2 * 4 + 4) + quantizers * (2 * 8 + 4 * 4) + 4 * 4


# ---- refusals ----------------------------------------------------------------------------------------------


def refused(model: Any, path: Path, message: str) -> None:
    """load_tables raises, and the model is what it was."""
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())
    training = model.training
    with pytest.raises(ValueError, match=message):
        adpdm.load_tables(model, path)
    assert list(model.modules()) == modules
    assert model.training == training
    assert not getattr(model, "is_quantized", False)
    assert not model._forward_pre_hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_weights_are_refused(saved: tuple[Any, Path]) -> None:
    refused(tiny_unet(seed=1).train(), saved[1], "weights of this UNet2DModel are not those that .* was made")


@pytest.mark.parametrize("name", ["conv_in.bias", "mid_block.resnets.0.norm1.weight", f"{LAYER}.weight"])
def test_one_changed_number_is_refused(saved: tuple[Any, Path], name: str) -> None:
    model = tiny_unet()
    with torch.no_grad():
        model.get_parameter(name).flatten()[0] += 0.5
    refused(model, saved[1], "are not those that")


def test_other_shape_is_refused(saved: tuple[Any, Path]) -> None:
    refused(tiny_unet(block_out_channels=(8, 32)), saved[1], r"must be torch\.\w+ \(.*\), got torch\.\w+ \(")


def test_other_class_is_refused(saved: tuple[Any, Path]) -> None:
    refused(tiny_conditional_unet(), saved[1], "is for a UNet2DModel, got a UNet2DConditionModel")


def test_other_dtype_is_refused(saved: tuple[Any, Path]) -> None:
    refused(tiny_unet().bfloat16(), saved[1], "wanted float32, as it was calibrated, got .* torch.bfloat16")


def test_quantized_model_is_refused(saved: tuple[Any, Path]) -> None:
    with pytest.raises(ValueError, match="quantized already; load the original again"):
        adpdm.load_tables(saved[0], saved[1])


def rewritten(path: Path, target: Path, about: dict[str, Any], tensors: dict[str, Tensor | None]) -> Path:
    """A copy of the file with entries of its header, and tensors, changed or, where None, left out."""
    with safe_open(path, "pt") as file:
        header = {**json.loads(file.metadata()["adpdm_tables"]), **about}
    kept = {k: v for k, v in {**load_file(path), **tensors}.items() if v is not None}
    header = {k: v for k, v in header.items() if v is not None}
    save_file(kept, target, {"adpdm_tables": json.dumps(header)})
    return target


SCALE = f"{LAYER}.input_quantizers.0.scale"


@pytest.mark.parametrize(
    ("about", "tensors", "message"),
    [
        ({"format_version": 2}, {}, "reads tables of format_version 1, got 2"),
        ({"format_version": None}, {}, "reads tables of format_version 1, got None"),
        ({"sha256": None}, {}, r"lacks \['sha256'\]"),
        ({"config": 5}, {}, "wanted a dict, got int"),
        ({"config": {"quant_method": "adpdm"}}, {}, "must hold the config of a calibrated model"),
        ({}, {SCALE: None}, rf"missing \['{SCALE}'\], unexpected \[\]"),
        ({}, {"conv_in.weight": torch.ones(8, 1, 3, 3)}, r"missing \[\], unexpected \['conv_in.weight'\]"),
        ({}, {SCALE: torch.ones(3)}, rf"{SCALE} must be torch.float32 \(2,\), got torch.float32 \(3,\)"),
        ({}, {SCALE: torch.ones(2).double()}, "got torch.float64"),
        ({}, {SCALE: torch.ones(2)}, "are not those that"),
    ],
)
def test_file_that_does_not_fit_is_refused(
    saved: tuple[Any, Path], tmp_path: Path, about: Any, tensors: Any, message: str
) -> None:
    refused(tiny_unet(), rewritten(saved[1], tmp_path / "changed", about, tensors), message)


@pytest.mark.parametrize("content", [b"", b"not a header", None])
def test_other_files_are_refused(saved: tuple[Any, Path], tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "file"
    path.write_bytes(saved[1].read_bytes()[:-7] if content is None else content)
    refused(tiny_unet(), path, "is no file of save_tables")
    refused(tiny_unet(), tmp_path / "absent", "is no file of save_tables")


def test_checkpoint_is_no_tables(saved: tuple[Any, Path], tmp_path: Path) -> None:
    saved[0].unet.save_pretrained(tmp_path)
    refused(tiny_unet(), tmp_path / "diffusion_pytorch_model.safetensors", "is no file of save_tables")


def test_learned_rounding_is_refused(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    adpdm.quantize(pipe, config(weight_rounding="gptq", correct_bias=False))
    with pytest.raises(ValueError, match="rounded by 'gptq', which depends on calibration images"):
        adpdm.save_tables(pipe, tmp_path / "tables")
    assert not list(tmp_path.iterdir())


def test_eight_bit_weights_need_no_setting(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    adpdm.quantize(pipe, config(weight_bits=8, weight_rounding="gptq"))
    adpdm.save_tables(pipe, tmp_path / "tables")
    again = tiny_pipeline()
    adpdm.load_tables(again, tmp_path / "tables")
    got, wanted = again.unet.state_dict(), pipe.unet.state_dict()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_models_without_tables_are_refused(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path, quantization_config=AdpdmConfig())
    for model in (tiny_unet(), loaded):
        with pytest.raises(ValueError, match="wanted a model that adpdm.quantize made, got UNet2DModel"):
            adpdm.save_tables(model, tmp_path / "tables")


def test_model_in_16_bits_is_refused(saved: tuple[Any, Path], tmp_path: Path) -> None:
    saved[0].unet.save_pretrained(tmp_path)
    model = UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="save_tables: wanted float32.* got .* as torch.bfloat16"):
        adpdm.save_tables(model, tmp_path / "tables")


def test_neighbours_of_the_file_stay_and_other_paths_are_refused(
    saved: tuple[Any, Path], tmp_path: Path
) -> None:
    (tmp_path / "t.tmp").write_text("mine")
    adpdm.save_tables(saved[0], tmp_path / "t")
    assert {file.name for file in tmp_path.iterdir()} == {"t", "t.tmp"}
    assert (tmp_path / "t.tmp").read_text() == "mine"
    with pytest.raises(IsADirectoryError, match="wanted a file to write, got the folder"):
        adpdm.save_tables(saved[0], tmp_path)
    with pytest.raises(FileNotFoundError, match="wanted a file in a folder that exists, got"):
        adpdm.save_tables(saved[0], tmp_path / "no" / "t")
