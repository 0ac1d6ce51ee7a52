"""Saved models: the same samples after loading, and a sentence for every broken checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DConditionModel, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import adpdm
from adpdm import QuantConfig
from adpdm.nn import quant_layers
from adpdm.testing import ddim_scheduler, tiny_conditional_unet, tiny_pipeline

STEPS, GROUPS = 6, 3
WEIGHTS = "diffusion_pytorch_model.safetensors"


def config(**changes: Any) -> QuantConfig:
    values: dict[str, Any] = {
        "num_groups": GROUPS,
        "num_inference_steps": STEPS,
        "histogram_images": 2,
        "grouping": "dp",
    }
    return QuantConfig(**{**values, **changes})


def samples(pipe: Any, steps: int = STEPS) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output = pipe(batch_size=2, num_inference_steps=steps, generator=generator, output_type="np")
    return torch.from_numpy(output.images)


@pytest.fixture(scope="module", params=[(8, 8), (4, 8)], ids=["w8a8", "w4a8"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A quantized pipeline and the folder it was saved to; tests must change neither."""
    pipe = tiny_pipeline()
    adpdm.quantize(pipe, config(weight_bits=request.param[0], activation_bits=request.param[1]))
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return pipe, folder


@pytest.fixture
def broken(saved: tuple[Any, Path], tmp_path: Path) -> Path:
    """A copy of the unet's folder to break."""
    return Path(shutil.copytree(saved[1] / "unet", tmp_path / "unet"))


def test_loaded_pipeline_gives_bit_identical_samples(saved: tuple[Any, Path]) -> None:
    pipe, folder = saved
    loaded = DDIMPipeline.from_pretrained(folder)
    assert torch.equal(samples(loaded), samples(pipe))
    assert torch.equal(samples(loaded, 11), samples(pipe, 11))
    assert all(layer.is_frozen for layer in quant_layers(loaded.unet).values())


def test_loaded_state_equals_the_saved_one(saved: tuple[Any, Path]) -> None:
    pipe, folder = saved
    wanted, got = pipe.unet.state_dict(), UNet2DModel.from_pretrained(folder / "unet").state_dict()
    assert list(wanted) == list(got)
    for key, value in wanted.items():
        assert got[key].dtype == value.dtype
        assert torch.equal(got[key], value)


def test_saving_again_gives_the_same_file(saved: tuple[Any, Path], tmp_path: Path) -> None:
    UNet2DModel.from_pretrained(saved[1] / "unet").save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (saved[1] / "unet" / WEIGHTS).read_bytes()
    first, second = (json.loads((p / "config.json").read_text()) for p in (saved[1] / "unet", tmp_path))
    assert first["quantization_config"] == second["quantization_config"]


def test_folder_holds_safetensors_and_json_only(saved: tuple[Any, Path]) -> None:
    files = [p for p in saved[1].rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json"}
    stored = json.loads((saved[1] / "unet" / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["format_version"]) == ("adpdm", 2)


def test_float_weights_of_quantized_layers_are_not_saved(saved: tuple[Any, Path]) -> None:
    pipe, folder = saved
    with safe_open(folder / "unet" / WEIGHTS, "pt") as stored:
        dtypes = {key: stored.get_tensor(key).dtype for key in stored.keys()}  # noqa: SIM118
    for name in quant_layers(pipe.unet):
        assert dtypes[f"{name}.weight"] in (torch.int8, torch.uint8)


def test_file_size_is_what_the_bits_say(saved: tuple[Any, Path]) -> None:
    pipe, folder = saved
    bits = pipe.unet.config.quantization_config.quant_config["weight_bits"]
    layers, original = quant_layers(pipe.unet), tiny_pipeline().unet
    size = 0
    for name, parameter in original.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in layers and name.endswith(".weight"):
            rows, columns = parameter.shape[0], parameter[0].numel()
            size += parameter.numel() if bits == 8 else rows * (-(-columns // 32) * 16)
            segments = len(layers[owner].quantizers)
            size += 4 * rows * segments + 8 * GROUPS * segments  # weight scales; scales and zero-points
        else:
            size += 4 * parameter.numel()
    slots = sum(len(layer.quantizers) for layer in layers.values())
    size += 4 * STEPS * slots + 4 * STEPS  # groups of the steps, their timesteps
    header = 8 + 160 * len(pipe.unet.state_dict())  # name, dtype, shape and offsets of a tensor as JSON
    assert size <= (folder / "unet" / WEIGHTS).stat().st_size <= size + header


def test_sharded_checkpoint_loads(saved: tuple[Any, Path], tmp_path: Path) -> None:
    pipe, _ = saved
    pipe.unet.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = DDIMPipeline(UNet2DModel.from_pretrained(tmp_path), ddim_scheduler())
    assert torch.equal(samples(loaded), samples(pipe))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_keeps_codes_and_scales(
    saved: tuple[Any, Path], dtype: torch.dtype
) -> None:
    pipe, folder = saved
    loaded = UNet2DModel.from_pretrained(folder / "unet", torch_dtype=dtype)
    state = pipe.unet.state_dict()
    for name, layer in quant_layers(loaded).items():
        assert torch.equal(layer.weight, state[f"{name}.weight"])
        assert torch.equal(layer.weight_scale, state[f"{name}.weight_scale"])
        for i, quantizer in enumerate(layer.quantizers):
            assert torch.equal(quantizer.scale, state[f"{name}.input_quantizers.{i}.scale"])
            assert torch.equal(quantizer.zero_point, state[f"{name}.input_quantizers.{i}.zero_point"])
    assert loaded.conv_in.weight.dtype == dtype
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual, wanted = loaded(x.to(dtype), 830).sample, pipe.unet(x, 830).sample
    assert actual.dtype == dtype
    # Some forty roundings to 8 bits of mantissa, 2^-9 each, in random directions: sqrt(40) / 512.
    assert float((actual.float() - wanted).norm() / wanted.norm()) < 0.05


def test_conditional_unet_round_trip(tmp_path: Path) -> None:
    denoiser = tiny_conditional_unet()
    context = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    adpdm.quantize(
        denoiser, config(), scheduler=ddim_scheduler(), conditioning={"encoder_hidden_states": context}
    )
    denoiser.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for timestep in (830, 332, 0):
            got, wanted = (m(x, timestep, encoder_hidden_states=context).sample for m in (loaded, denoiser))
            assert torch.equal(got, wanted)


def test_timestep_policy_survives(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    adpdm.quantize(pipe, config(grouping="shared", timestep_policy="error"))
    pipe.unet.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    loaded(torch.zeros(1, 1, 8, 8), 830)
    with pytest.raises(
        ValueError, match="not calibrated and timestep_policy is 'error': got 829, calibrated"
    ):
        loaded(torch.zeros(1, 1, 8, 8), 829)


def test_loaded_model_is_refused_by_quantize(saved: tuple[Any, Path]) -> None:
    loaded = DDIMPipeline.from_pretrained(saved[1])
    with pytest.raises(ValueError, match="quantized already"):
        adpdm.quantize(loaded, config())


# ---- checkpoints that do not fit ---------------------------------------------------------------------------


def refuse(folder: Path, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        UNet2DModel.from_pretrained(folder)


def change_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Rewrite the weights with some tensors replaced or, where None, left out."""
    tensors = load_file(folder / WEIGHTS)
    tensors.update({k: v for k, v in changes.items() if v is not None})
    kept = {k: v for k, v in tensors.items() if changes.get(k, v) is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    """Rewrite keys of the quantization_config."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"].update(changes)
    path.write_text(json.dumps(values))


LAYER = "mid_block.resnets.0.conv1"


@pytest.mark.parametrize(
    "key",
    [f"{LAYER}.weight", f"{LAYER}.weight_scale", f"{LAYER}.input_quantizers.0.scale", "adpdm_step.table"],
)
def test_missing_tensor_is_refused(broken: Path, key: str) -> None:
    change_tensors(broken, **{key: None})
    refuse(broken, rf"missing tensors \['{key}'\]")


def test_missing_float_tensor_is_refused(broken: Path) -> None:
    change_tensors(broken, **{"conv_in.weight": None})
    refuse(broken, r"missing tensors \['conv_in.weight'\]")


def test_extra_tensor_is_refused(broken: Path) -> None:
    change_tensors(broken, **{f"{LAYER}.smoothing": torch.ones(3)})
    refuse(broken, rf"unexpected tensors \['{LAYER}.smoothing'\]")


def test_tensor_of_another_shape_is_refused(broken: Path) -> None:
    change_tensors(broken, **{f"{LAYER}.input_quantizers.0.scale": torch.ones(GROUPS + 1)})
    refuse(broken, rf"{LAYER}.input_quantizers.0.scale must have shape \(3,\), got \(4,\)")


def test_tensor_of_another_dtype_is_refused(broken: Path) -> None:
    change_tensors(broken, **{f"{LAYER}.input_quantizers.0.zero_point": torch.zeros(GROUPS)})
    refuse(broken, r"zero_point must be torch.int32, got torch.float32")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_file_is_refused(broken: Path, share: float) -> None:
    content = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(Exception, match=WEIGHTS) as caught:
        UNet2DModel.from_pretrained(broken)
    assert isinstance(caught.value, OSError | ValueError)


def test_missing_file_is_refused(broken: Path) -> None:
    (broken / WEIGHTS).unlink()
    refuse(broken, "no file named diffusion_pytorch_model")


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_other_format_version_is_refused(broken: Path, version: Any) -> None:
    change_config(broken, format_version=version)
    refuse(broken, rf"reads format_version 2, got {version!r}; install the version that wrote")


@pytest.mark.parametrize("steps", [0, -1, 2.0, None, True, 10_001])
def test_impossible_number_of_steps_is_refused(broken: Path, steps: Any) -> None:
    change_config(broken, num_steps=steps)
    refuse(broken, rf"num_steps must be an integer in \[1, 10000\], got {steps!r}")


def test_config_of_the_first_format_is_refused_by_its_version(broken: Path) -> None:
    values = json.loads((broken / "config.json").read_text())
    stored = values["quantization_config"]
    del stored["num_steps"]
    values["quantization_config"] = {**stored, "format_version": 1, "num_train_timesteps": 1000}
    (broken / "config.json").write_text(json.dumps(values))
    refuse(broken, "reads format_version 2, got 1; install the version that wrote")


def test_unknown_config_key_is_refused(broken: Path) -> None:
    change_config(broken, rotation="hadamard")
    refuse(broken, r"quantization_config: unknown keys \['rotation'\]")


def test_unknown_setting_is_refused(broken: Path) -> None:
    values = json.loads((broken / "config.json").read_text())["quantization_config"]["quant_config"]
    change_config(broken, quant_config={**values, "rotation": True})
    refuse(broken, r"QuantConfig: unknown settings \['rotation'\]")


def stored_layers(folder: Path) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = json.loads((folder / "config.json").read_text())["quantization_config"][
        "layers"
    ]
    return layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "up_blocks.7.conv"},
            r"quantizes layer 'up_blocks.7.conv', which UNet2DModel does not have",
        ),
        ({"name": "mid_block"}, r"'mid_block' must be a Conv2d or Linear, got UNetMidBlock2D"),
        ({"weight_bits": 9}, r"weight_bits of layer '.*' must be an integer in \[2, 8\], got 9"),
        ({"activation_bits": "8"}, r"activation_bits of layer '.*' must be an integer in \[2, 8\], got '8'"),
        ({"split": 4000}, r"split of layer '.*' must be an integer in \[1, 7\], got 4000"),
        ({"rotation": 1}, r"a layer must have the keys .*, got .*rotation"),
    ],
)
def test_layer_entry_that_does_not_fit_is_refused(
    broken: Path, changes: dict[str, Any], message: str
) -> None:
    layers = stored_layers(broken)
    layers[0].update(changes)
    change_config(broken, layers=layers)
    refuse(broken, message)


def test_layer_entry_without_bits_is_refused(broken: Path) -> None:
    layers = stored_layers(broken)
    del layers[0]["weight_bits"]
    change_config(broken, layers=layers)
    refuse(broken, "a layer must have the keys")


def test_unlisted_layer_is_refused(broken: Path) -> None:
    # Its codes must not be taken for float weights.
    layers = stored_layers(broken)
    change_config(broken, layers=layers[1:])
    refuse(broken, rf"does not fit its config: missing tensors \[\], unexpected .*'{layers[0]['name']}\.")


def test_foreign_checkpoint_is_refused(broken: Path) -> None:
    # Float weights under a quantized config: the right names of the float layers, none of ours.
    tiny_pipeline().unet.save_pretrained(broken / "float")
    shutil.copy(broken / "float" / WEIGHTS, broken / WEIGHTS)
    refuse(broken, r"does not fit its config: missing tensors \[.*weight_scale'\], unexpected tensors \[\]")


def test_float_checkpoint_cannot_be_quantized_while_loading(tmp_path: Path, saved: tuple[Any, Path]) -> None:
    tiny_pipeline().unet.save_pretrained(tmp_path)
    stored = saved[0].unet.config.quantization_config
    with pytest.raises(ValueError, match="adpdm needs calibration.*call adpdm.quantize"):
        UNet2DModel.from_pretrained(tmp_path, quantization_config=stored)
