"""The file that a search saves itself to: foreign, damaged and half-written ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import adpdm
from adpdm import QuantConfig, SearchConfig, search_state
from adpdm.calibrate import Calibration
from adpdm.facts import settings_of
from adpdm.processes import Processes
from adpdm.search import GroupSearch
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_unet
from adpdm.trajectory import Sampler


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
    assert len(told) == 1, "of two rounds"
    assert "disk full" in told[0]
    assert list(tmp_path.iterdir()) == []
    adpdm.quantize(tiny_unet(**ONE_BLOCK), config(), scheduler=ddim_scheduler(), state_file=state)
    before = state.read_bytes()
    found = search_state.SearchState({}, 0, 0, [], [], [], {})
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


def test_state_belongs_to_the_settings_of_the_denoiser_as_well(tmp_path: Path) -> None:
    """Two networks of the same weights, with one attention head and with two."""
    state, heads = tmp_path / "state.safetensors", {**ONE_BLOCK, "add_attention": True}
    one, two = (tiny_unet(**{**heads, "attention_head_dim": size}) for size in (8, 4))
    pairs = zip(one.state_dict().items(), two.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    adpdm.quantize(one, config(), scheduler=ddim_scheduler(), state_file=state)
    with pytest.raises(ValueError, match="or version .other settings of the denoiser.;"):
        adpdm.quantize(two, config(), scheduler=ddim_scheduler(), state_file=state)


def test_settings_of_a_denoiser_are_not_how_it_was_made(tmp_path: Path) -> None:
    made = tiny_unet(**ONE_BLOCK)
    wanted = settings_of(made)
    made.save_pretrained(tmp_path)
    loaded: Any = type(made).from_pretrained(tmp_path)
    assert settings_of(loaded) == wanted
    loaded.register_to_config(quantization_config={"quant_method": "adpdm"})
    assert settings_of(loaded) == wanted
    assert settings_of(tiny_unet(**ONE_BLOCK, norm_eps=1e-3)) != wanted
    assert settings_of(nn.Linear(1, 1)) == settings_of(nn.Linear(2, 2))  # without any


@pytest.mark.parametrize("what", ["groups", "scales", "zero-points"])
def test_state_of_another_start_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    state = tmp_path / "state.safetensors"
    adpdm.quantize(tiny_unet(**ONE_BLOCK), config(), scheduler=ddim_scheduler(), state_file=state)
    plain = GroupSearch.__init__

    def changed(search: GroupSearch, quantizers: Any, *arguments: Any) -> None:
        last = quantizers[-1]
        if what == "groups":
            last.table.copy_(1 - last.table)
        elif what == "scales":
            last.scale *= 1.01
        else:
            last.zero_point += 1
        plain(search, quantizers, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(GroupSearch, "__init__", changed)
        with pytest.raises(
            ValueError, match=rf"another partition .*\({what}: wanted \w{{8}}, got \w{{8}}\);"
        ):
            adpdm.quantize(tiny_unet(**ONE_BLOCK), config(), scheduler=ddim_scheduler(), state_file=state)
    adpdm.quantize(tiny_unet(**ONE_BLOCK), config(), scheduler=ddim_scheduler(), state_file=state)


class SecondOfTwo(Processes):
    """A process that is told what the first one met when it saved the state."""

    def first(self, work: Any) -> Any:
        return "disk full"


def test_all_processes_warn_of_a_search_that_was_not_saved() -> None:
    sampler = Sampler(tiny_unet(**ONE_BLOCK), ddim_scheduler(), (1, 8, 8), 4)
    calibration = Calibration(sampler, {}, {}, config(), processes=SecondOfTwo())
    for _ in range(2):
        calibration._save(search_state.SearchState({}, 0, 0, [], [], [], {}))
    (warning,) = calibration.trace.warnings
    assert warning.startswith("the search could not be saved")
    assert warning.endswith("disk full")
