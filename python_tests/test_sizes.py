"""Bytes of weights: of every folder what diffusers loads, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adpdm.denoisers import DENOISER_NAMES
from adpdm.evaluate import file_bytes
from adpdm.evaluate.sizes import DENOISER_FOLDERS


def fill(folder: Path, **sizes: int) -> None:
    """Files of so many bytes; two underscores stand for a dot, as in model__safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        (folder / name.replace("__", ".")).write_bytes(bytes(size))


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({"model__safetensors": 1, "pytorch_model__bin": 2, "model__fp16__safetensors": 4}, 1),
        (
            {
                "diffusion_pytorch_model__safetensors": 1,
                "diffusion_pytorch_model__non_ema__safetensors": 2,
                "diffusion_pytorch_model__bin": 4,
            },
            1,
        ),
        ({"diffusion_pytorch_model__fp16__safetensors": 1, "diffusion_pytorch_model__bin": 2}, 2),
        ({"model__fp16__safetensors": 1, "model__non_ema__safetensors": 2, "openvino_model__bin": 4}, 1),
        ({"pytorch_model__bin": 1, "tokenizer__json": 2}, 1),
        ({"diffusion_pytorch_model__safetensors": 1, "adpdm_search__safetensors": 2}, 1),
        ({"first__safetensors": 1, "second__safetensors": 2, "third__pt": 4}, 3),
    ],
)
def test_one_set_of_files_counts(tmp_path: Path, sizes: dict[str, int], wanted: int) -> None:
    fill(tmp_path, **sizes)
    assert file_bytes(tmp_path) == wanted


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("model-{}-of-00002.safetensors", "model.safetensors.index.json"),
        ("model.fp16-{}-of-00002.safetensors", "model.safetensors.index.fp16.json"),
        ("model-{}-of-00002.fp16.safetensors", "model.fp16.safetensors.index.json"),
    ],
)
def test_shards_of_the_index_count(tmp_path: Path, shard: str, index: str) -> None:
    names = [shard.format(f"0000{n}") for n in (1, 2)]
    for size, name in enumerate([*names, shard.format("00003")], 1):  # the last is of an older save
        (tmp_path / name).write_bytes(bytes(size))
    assert file_bytes(tmp_path) == 6  # nothing says which belong together
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1], "c": names[0]}}))
    assert file_bytes(tmp_path) == 3


def test_components_of_a_pipeline_count_and_nothing_beside_them(tmp_path: Path) -> None:
    made_by = {"unet": ["diffusers", "UNet2DModel"], "safety_checker": [None, None], "_class_name": "Pipe"}
    (tmp_path / "model_index.json").write_text(json.dumps({**made_by, "vae": ["diffusers", "AutoencoderKL"]}))
    fill(tmp_path, sd_v1__safetensors=100, adpdm_search__safetensors=200)
    fill(tmp_path / "unet", diffusion_pytorch_model__safetensors=1)
    fill(tmp_path / "vae", diffusion_pytorch_model__safetensors=2, diffusion_pytorch_model__bin=400)
    fill(tmp_path / "onnx", model__bin=800)
    fill(tmp_path / "safety_checker", model__safetensors=1600)
    assert file_bytes(tmp_path) == 3


def test_of_what_a_training_leaves_the_denoiser_counts(tmp_path: Path) -> None:
    assert DENOISER_FOLDERS == DENOISER_NAMES  # in the order in which they are loaded
    fill(tmp_path, state__pt=80)
    fill(tmp_path / "scheduler", scheduler_config__json=1)
    for size, name in enumerate(reversed(DENOISER_FOLDERS), 10):
        fill(tmp_path / name, diffusion_pytorch_model__safetensors=size)
        assert file_bytes(tmp_path) == size


def test_a_file_counts_as_it_is_and_no_weights_are_an_error(tmp_path: Path) -> None:
    fill(tmp_path, weights__ckpt=5)
    assert file_bytes(tmp_path / "weights.ckpt") == 5
    with pytest.raises(ValueError, match="wanted weight files"):
        file_bytes(tmp_path)


def test_a_name_with_many_dots_counts(tmp_path: Path) -> None:
    (tmp_path / "sd.v1.5.safetensors").write_bytes(bytes(7))
    assert file_bytes(tmp_path) == 7


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    name = "diffusion_pytorch_model"
    (tmp_path / f"{name}-00001-of-00002.safetensors").write_bytes(bytes(3))
    shards = {"a": f"{name}-00001-of-00002.safetensors", "b": f"{name}-00002-of-00002.safetensors"}
    (tmp_path / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match="-00002-of-00002.safetensors is missing"):
        file_bytes(tmp_path)
