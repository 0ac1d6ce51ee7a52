"""Memory that is given back: pages of checkpoints after packing, the heap after a recording."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

import adpdm
from adpdm import QuantConfig, memory
from adpdm.nn import quant_layers
from adpdm.testing import ddim_scheduler, tiny_unet

SMAPS = Path("/proc/self/smaps")
pytestmark = pytest.mark.skipif(
    not SMAPS.exists(), reason="needs Linux, which tells what of a file is in memory"
)


def resident(file: Path) -> int:
    """Bytes of a mapped file that are in the memory of this process."""
    inside, total = False, 0
    for line in SMAPS.read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture(autouse=True)
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have loaded does not count here."""
    monkeypatch.setattr(memory, "_read", {})


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A file of 4 MiB and its tensor, which is mapped and was read."""
    file = tmp_path / "codes.safetensors"
    codes = torch.randint(-128, 128, (4 << 20,), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    save_file({"codes": codes}, file)
    tensor = load_file(file)["codes"]
    assert torch.equal(tensor, codes)
    assert resident(file) >= tensor.nbytes, "safetensors maps files no longer: adpdm/memory.py is in vain"
    if memory._libc.madvise(None, 0, memory.MADV_PAGEOUT) != 0:
        pytest.skip("needs Linux 5.4, which can be asked to take pages out")
    return file, tensor


def test_pages_are_released_once_enough_was_read(
    mapped: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tensor = mapped
    monkeypatch.setattr(memory, "RELEASE_BYTES", 3 << 20)
    before = tensor.sum()
    first, second = tensor.split(2 << 20)
    memory.release_file_pages(first)
    assert resident(file) >= tensor.nbytes
    memory.release_file_pages(second)
    assert resident(file) < tensor.nbytes / 4
    assert tensor.sum() == before  # read again from the file
    assert resident(file) >= tensor.nbytes


def test_what_was_written_is_not_lost(
    mapped: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tensor = mapped
    monkeypatch.setattr(memory, "RELEASE_BYTES", 1)
    tensor[::5000] = 7
    wanted = tensor.clone()
    memory.release_file_pages(tensor)
    assert torch.equal(tensor, wanted)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1 << 20), torch.zeros(4), torch.zeros(1 << 20, device="meta")],
    ids=["heap", "small", "meta"],
)
def test_other_memory_is_left_alone(tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "RELEASE_BYTES", 1)
    monkeypatch.setattr(memory, "_libc", None)  # a call would fail
    memory.release_file_pages(tensor)
    assert not memory._read


def test_loaded_model_lets_go_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_unet()
    config = QuantConfig(grouping="shared", num_inference_steps=8, histogram_images=2)
    adpdm.quantize(unet, config, scheduler=ddim_scheduler())
    unet.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert resident(file)
    released: list[tuple[int, int]] = []

    def madvise(first: Any, size: Any, advice: int) -> None:
        assert advice == memory.MADV_PAGEOUT
        released.append((first.value, first.value + size.value))

    monkeypatch.setattr(memory, "_libc", SimpleNamespace(madvise=madvise))
    monkeypatch.setattr(memory, "RELEASE_BYTES", 1)
    monkeypatch.setattr(memory, "LEAST_BYTES", 1)
    sample = torch.randn(1, unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(sample, 500).sample, unet(sample, 500).sample)
    for layer in quant_layers(loaded).values():
        address = layer.weight.data_ptr()
        assert any(first <= address < last for first, last in released)


def test_heap_shrinks_when_trimmed() -> None:
    def resident_heap() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    kept = []
    blocks = []
    for _ in range(2000):  # small enough for the heap, with something in use on top
        blocks.append(np.ones(8000))
        kept.append(np.ones(10))
    full = resident_heap()
    del blocks
    memory.trim_heap()
    assert resident_heap() < full - (64 << 20)
    assert len(kept) == 2000
