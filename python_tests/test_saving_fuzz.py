"""Damaged checkpoints: a sentence or a whole model, never another exception and nothing half done."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import adpdm
from adpdm import AdpdmConfig, QuantConfig
from adpdm.diffusers_quantizer import build_frozen
from adpdm.nn import CodedLayer
from adpdm.testing import tiny_pipeline, tiny_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}
KINDS = ["calibrated", "w4a8"]

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
near = st.sampled_from([0, 1, 2, 3, 4, 8, 9, -1, 10**9, "8", "nearest", "dynamic", "static", "", [], {}])
json_values = st.recursive(
    scalars | near, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3)
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint with calibrated ranges, and one made while loading."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    pipe = tiny_pipeline(**SMALL)
    few = {"num_groups": 2, "num_inference_steps": 4, "histogram_images": 1, "weight_rounding": "nearest"}
    adpdm.quantize(pipe, QuantConfig(**few, grouping="uniform", correct_bias=False))
    pipe.unet.save_pretrained(folders["calibrated"])
    original = tmp_path_factory.mktemp("float")
    tiny_unet(**SMALL).save_pretrained(original)
    config = AdpdmConfig(weight_bits=4, activation_bits=8)
    UNet2DModel.from_pretrained(original, quantization_config=config).save_pretrained(folders["w4a8"])
    return folders


def stored_config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return values


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within nested dicts and lists."""
    found: list[tuple[Any, Any]] = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        found.append((value, key))
        if isinstance(inner, dict | list):
            found += places(inner)
    return found


def damage(values: dict[str, Any], data: st.DataObject) -> None:
    """Replace, remove or add something, anywhere; the method's name, by which diffusers finds us, stays."""
    container, key = data.draw(st.sampled_from([p for p in places(values) if p[1] != "quant_method"]))
    kind = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if kind == "replace":
        container[key] = data.draw(json_values)
    elif kind == "remove":
        del container[key]
    elif isinstance(container, list):
        container.append(data.draw(json_values | st.just(copy.deepcopy(container[key]))))
    else:
        container[data.draw(st.text(max_size=8))] = data.draw(json_values)


def attempt(action: Callable[[], Any], *refusals: type[Exception]) -> Any:
    """What the action returns, or None where it refuses in a sentence."""
    try:
        return action()
    except refusals as error:
        if len(str(error)) < 20:
            raise AssertionError(f"not a sentence: {error!r}") from error
        return None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_config_is_refused_or_builds_what_it_says(
    saved: dict[str, Path], kind: str, data: st.DataObject
) -> None:
    values = stored_config(saved[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        damage(values, data)
    config = attempt(lambda: AdpdmConfig.from_dict(values), ValueError)
    if config is None:
        return
    again = AdpdmConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    with torch.device("meta"):
        model = tiny_unet(**SMALL)
    fits = attempt(lambda: build_frozen(model, config) or True, ValueError)
    built = {name for name, m in model.named_modules() if isinstance(m, CodedLayer)}
    assert built == ({row["name"] for row in config.layers or []} if fits else set())


@given(values=st.dictionaries(st.text(max_size=8) | st.sampled_from(["self", "layers", "cls"]), json_values))
def test_any_dict_is_a_config_or_refused(values: dict[str, Any]) -> None:
    config = attempt(lambda: AdpdmConfig.from_dict(values), ValueError)
    assert config is None or config.to_dict()["quant_method"] == "adpdm"


@pytest.mark.parametrize("values", [None, 5, "w8a8", [], [["weight_bits", 8]]])
def test_what_is_no_dict_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="wanted a dict, got"):
        AdpdmConfig.from_dict(values)


@pytest.mark.parametrize("values", [5, [], "x"])
def test_settings_that_are_no_dict_are_refused(saved: dict[str, Path], values: Any) -> None:
    with pytest.raises(ValueError, match="quant_config must be the settings as a dict|wanted the settings"):
        AdpdmConfig.from_dict({**stored_config(saved["calibrated"]), "quant_config": values})


# ---- the header of the weights -----------------------------------------------------------------------------


def damaged_header(content: bytes, data: st.DataObject) -> bytes:
    """The file with a changed header: its length, its bytes, or an entry of the JSON that it is."""
    size = struct.unpack("<Q", content[:8])[0]
    header, tensors = content[8 : 8 + size], content[8 + size :]
    kind = data.draw(st.sampled_from(["length", "bytes", "entry", "entry", "entry", "cut"]))
    if kind == "length":
        return struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + content[8:]
    if kind == "cut":
        return content[: data.draw(st.integers(0, len(content) - 1))]
    if kind == "bytes":
        position = data.draw(st.integers(0, size - 1))
        patch = data.draw(st.binary(min_size=1, max_size=4))
        header = (header[:position] + patch + header[position + len(patch) :])[:size]
        return content[:8] + header + tensors
    entries = json.loads(header)
    name = data.draw(st.sampled_from([n for n in entries if n != "__metadata__"]))
    change = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "rename", "remove", "any"]))
    if change == "dtype":
        names = ["I8", "U8", "F32", "I32", "BF16", "F16", "F64", "BOOL", "F8_E4M3", "I64", "I4"]
        entries[name]["dtype"] = data.draw(st.sampled_from(names))
    elif change == "shape":
        entries[name]["shape"] = data.draw(
            st.permutations(entries[name]["shape"]) | st.lists(st.integers(0, 2**40), max_size=4)
        )
    elif change == "data_offsets":
        entries[name][change] = data.draw(st.lists(st.integers(0, len(tensors) + 9), min_size=2, max_size=2))
    elif change in ("rename", "remove"):
        entry = entries.pop(name)
        if change == "rename":
            entries[data.draw(st.text(max_size=8) | st.sampled_from(sorted(entries)))] = entry
    else:
        entries[name] = data.draw(json_values)
    changed = json.dumps(entries).encode()
    return struct.pack("<Q", len(changed)) + changed + tensors


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_header_is_refused_or_loads_whole(
    saved: dict[str, Path], kind: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_text((saved[kind] / "config.json").read_text())
    (folder / WEIGHTS).write_bytes(damaged_header((saved[kind] / WEIGHTS).read_bytes(), data))
    model = attempt(lambda: UNet2DModel.from_pretrained(folder), ValueError, OSError)
    if model is not None:
        assert_same_form(model, UNet2DModel.from_pretrained(saved[kind]))


def assert_same_form(model: nn.Module, wanted: nn.Module) -> None:
    """Whether every tensor is there, in the shape and dtype it should have."""
    got = model.state_dict()
    assert list(got) == list(wanted.state_dict())
    for name, tensor in wanted.state_dict().items():
        assert not got[name].is_meta
        assert (got[name].shape, got[name].dtype) == (tensor.shape, tensor.dtype)
