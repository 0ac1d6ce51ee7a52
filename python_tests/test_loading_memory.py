"""Memory while a model is quantized as it loads: the quantized model and one shard, never the float model."""

from __future__ import annotations

import gc
import re
import runpy
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import adpdm
from adpdm.diffusers_quantizer import AdpdmQuantizer
from adpdm.nn import LoadedLayer
from adpdm.testing import tiny_unet

LIMIT = 1.3  # times the size of the quantized model, plus the largest shard
MAPS = Path("/proc/self/maps")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model of 100 MB in shards of at most 16 MB, beside which a chunk of rows takes little."""
    path = tmp_path_factory.mktemp("models")
    tiny_unet(block_out_channels=(192, 384)).save_pretrained(path, max_shard_size="16MB")
    assert len(list(path.glob("*.safetensors"))) > 7
    return path


def largest_shard(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def mapped_files(folder: Path) -> set[str]:
    """Files below the folder that are mapped into this process: what is read of them is memory."""
    return {line.split()[-1] for line in MAPS.read_text().splitlines() if str(folder) in line}


def load_and_measure(folder: Path, settings: dict[str, Any]) -> tuple[int, Any]:
    """Most bytes that tensors held, those of a mapped shard included, by torch's own count; and the model."""
    config = adpdm.AdpdmConfig(**settings)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = UNet2DModel.from_pretrained(folder, quantization_config=config)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)), model


SETTINGS: dict[str, dict[str, Any]] = {"w8": {}, "w4a8": {"weight_bits": 4, "activation_bits": 8}}


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux, which lists the files a process has mapped")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_peak_is_the_quantized_model_and_one_shard(
    folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[int] = []
    create = AdpdmQuantizer.create_quantized_param

    def watch(self: AdpdmQuantizer, model: Any, value: Any, name: str, *args: Any, **kwargs: Any) -> None:
        create(self, model, value, name, *args, **kwargs)
        if name.endswith(".weight"):
            mapped.append(len(mapped_files(folder)))

    monkeypatch.setattr(AdpdmQuantizer, "create_quantized_param", watch)
    peak, model = load_and_measure(folder, settings)
    size, shard = model.get_memory_footprint(), largest_shard(folder)
    assert max(mapped) == 1
    assert not mapped_files(folder)
    assert size < peak <= LIMIT * size + shard


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux, which tells the resident size of a process")
def test_benchmark_measures_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["loading_memory.py", "--model", "tiny", "--weight-bits", "4"])
    runpy.run_path(str(BENCHMARKS / "loading_memory.py"), run_name="__main__")
    line = capfd.readouterr().out
    assert re.fullmatch(r"tiny W4: peak \d+ MB, model 0 MB, .*, bar 0 MB: \S+ of it\n", line)


def test_holding_on_to_float_weights_would_be_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the bar is for: one that has all float weights in memory at the end of loading.
    held: list[Tensor] = []
    fill = LoadedLayer.fill

    def hold(self: LoadedLayer, weight: Tensor, device: torch.device) -> None:
        held.append(weight.clone())
        fill(self, weight, device)

    monkeypatch.setattr(LoadedLayer, "fill", hold)
    peak, model = load_and_measure(folder, {})
    assert peak > 2 * (LIMIT * model.get_memory_footprint() + largest_shard(folder))
