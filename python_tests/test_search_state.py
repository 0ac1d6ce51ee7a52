"""The file that a search saves itself to: foreign, damaged and half-written ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from torch import Tensor

import adpdm
from adpdm import QuantConfig, SearchConfig, search_state
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_unet


def config(**changes: Any) -> QuantConfig:
    """Two rounds of a search."""
    search = SearchConfig(num_steps=4, refit_steps=1, batch_size=2)
    return QuantConfig(
        num_groups=2,
        num_inference_steps=4,
        calibration_images=4,
        round_size=2,
        histogram_images=2,
        search=search,
        **changes,
    )


def test_foreign_state_file_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    adpdm.quantize(tiny_unet(**ONE_BLOCK), config(), scheduler=ddim_scheduler(), state_file=state)
    phases: list[str] = []
    with pytest.raises(
        ValueError, match="belongs to another model, configuration or version .seed: wanted 1, got 0.;"
    ):
        adpdm.quantize(
            tiny_unet(**ONE_BLOCK),
            config(seed=1),
            scheduler=ddim_scheduler(),
            state_file=state,
            progress=lambda phase, done, total: phases.append(phase),
        )
    assert "trajectories" not in phases, "before any work"
    with pytest.raises(ValueError, match="belongs to another model, configuration or version"):
        adpdm.quantize(tiny_unet(1, **ONE_BLOCK), config(), scheduler=ddim_scheduler(), state_file=state)


def test_truncated_state_file_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    state.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ValueError, match=r"state.safetensors is no search state.*remove it"):
        adpdm.quantize(tiny_unet(**ONE_BLOCK), config(), scheduler=ddim_scheduler(), state_file=state)


def test_state_file_is_replaced_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "below" / "state.safetensors"

    def broken(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(search_state, "save_file", broken)
        report = adpdm.quantize(
            tiny_unet(**ONE_BLOCK), config(), scheduler=ddim_scheduler(), state_file=state
        )
    told = [warning for warning in report.trace.warnings if "the search could not be saved" in warning]
    assert told
    assert all("disk full" in warning for warning in told)
    assert list(tmp_path.iterdir()) == []
    adpdm.quantize(tiny_unet(**ONE_BLOCK), config(), scheduler=ddim_scheduler(), state_file=state)
    before = state.read_bytes()
    found = search_state.SearchState({}, 0, 0, [], [], [])
    monkeypatch.setattr(search_state, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        found.save(state, "")
    assert [file.read_bytes() for file in state.parent.iterdir()] == [before]


def test_state_belongs_to_what_is_not_quantized_as_well(tmp_path: Path) -> None:
    state, other = tmp_path / "state.safetensors", tiny_unet(**ONE_BLOCK)
    adpdm.quantize(tiny_unet(**ONE_BLOCK), config(), scheduler=ddim_scheduler(), state_file=state)
    other.conv_norm_out.weight.data *= 1.01
    with pytest.raises(
        ValueError, match="belongs to another model, configuration or version .other weights.;"
    ):
        adpdm.quantize(other, config(), scheduler=ddim_scheduler(), state_file=state)
