"""What is refused before any work, where users would get a wrong model or another library's error."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import nn
from transformer_cases import make_case

import adpdm
from adpdm import QuantConfig
from adpdm.cli import main
from adpdm.pipeline_checks import _described
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_pipeline, tiny_unet


def config(**changes: Any) -> QuantConfig:
    settings: dict[str, Any] = {"num_groups": 2, "num_inference_steps": 4, "histogram_images": 2}
    return QuantConfig(**{**settings, "grouping": "dp", **changes})


# ---- denoisers ---------------------------------------------------------------------------------------------


def replace_forward(model: nn.Module) -> None:
    """As offloading by layers does."""
    layer: Any = model.get_submodule("conv_in")
    layer.forward = copy.copy(layer.forward)


def test_layers_whose_forward_was_replaced_are_refused(tmp_path: Path) -> None:
    unet = tiny_unet(**ONE_BLOCK)
    unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    with pytest.raises(ValueError, match=r"^quantize: wanted layers with the forward of their class"):
        adpdm.quantize(unet, config(), scheduler=ddim_scheduler())
    original = tiny_unet(**ONE_BLOCK)
    quantized = copy.deepcopy(original)
    adpdm.quantize(quantized, config(), scheduler=ddim_scheduler())
    adpdm.save_tables(quantized, tmp_path / "tables.safetensors")
    replace_forward(original)
    with pytest.raises(ValueError, match="^load_tables: wanted layers .* class, got conv_in with another"):
        adpdm.load_tables(original, tmp_path / "tables.safetensors")


class TwoDenoisers(DiffusionPipeline):
    def __init__(self, scheduler: Any, unet: Any, unet_2: Any) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, unet=unet, unet_2=unet_2)


def test_pipelines_with_two_denoisers_are_refused() -> None:
    pipe = TwoDenoisers(ddim_scheduler(), tiny_unet(**ONE_BLOCK), tiny_unet(**ONE_BLOCK))
    with pytest.raises(ValueError, match="one denoiser, got unet and unet_2; quantize each by itself at the"):
        adpdm.quantize(pipe, config())
    alone = TwoDenoisers(ddim_scheduler(), tiny_unet(**ONE_BLOCK), None)
    assert adpdm.quantize(alone, config()).coverage.layers > 0


def test_timesteps_of_another_unit_than_the_denoisers_are_refused() -> None:
    case = make_case("flux")
    assert case.call is not None
    given = {"scheduler": case.scheduler, "conditioning": case.conditioning}
    with pytest.raises(ValueError, match=r"timestep_factor=1e-3\), got a factor of 1 for .* to 1000"):
        adpdm.quantize(case.denoiser, config(), **given, call=replace(case.call, timestep_factor=1.0))


def test_denoisers_whose_pipeline_counts_time_the_other_way_are_refused() -> None:
    unet = tiny_unet(**ONE_BLOCK)
    unet.__class__ = type("Lumina2Transformer2DModel", (type(unet),), {})
    with pytest.raises(ValueError, match="of Lumina2Transformer2DModel gives it 1 - t / 1000 and negates"):
        adpdm.quantize(unet, config(), scheduler=ddim_scheduler())


def test_nested_constants_are_named() -> None:
    given = {"rotation": (torch.zeros(2, 3), 7), "mask": torch.zeros(2)}
    assert _described(given) == (
        "'rotation'[0] (2, 3) torch.float32, 'rotation'[1] 7, 'mask' (2,) torch.float32"
    )


def test_parameters_without_data_are_told_apart_from_other_dtypes() -> None:
    with pytest.raises(ValueError, match=r"on meta; remove what moves it between devices, such as"):
        adpdm.quantize(tiny_unet(**ONE_BLOCK).to("meta"), config(), scheduler=ddim_scheduler())
    with pytest.raises(ValueError, match=r"float64 on cpu; load with torch_dtype=torch.float32"):
        adpdm.quantize(tiny_unet(**ONE_BLOCK).double(), config(), scheduler=ddim_scheduler())


def test_autocast_of_the_caller_does_not_reach_calibration() -> None:
    models = [tiny_unet(**ONE_BLOCK), tiny_unet(**ONE_BLOCK)]
    adpdm.quantize(models[0], config(), scheduler=ddim_scheduler())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adpdm.quantize(models[1], config(), scheduler=ddim_scheduler())
    wanted, found = (model.state_dict() for model in models)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


# ---- schedulers --------------------------------------------------------------------------------------------


class Uncopied(DDIMScheduler):
    """Keeps what cannot be copied from its first step on, as those that draw from a Brownian tree do."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        self.noise_sampler = (x for x in ())
        return super().step(*args, **kwargs)


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (diffusers.DDPMWuerstchenScheduler, "IndexError: "),
        (diffusers.KarrasVeScheduler, "TypeError: .*step"),
        (diffusers.RePaintScheduler, "TypeError: .*step"),
        (Uncopied, "TypeError: cannot pickle 'generator' object"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_schedulers_that_step_otherwise_are_refused(scheduler: Any, reason: str) -> None:
    model = tiny_unet(**ONE_BLOCK)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"got {scheduler.__name__}, which fails with {reason}"):
        adpdm.quantize(model, config(), scheduler=scheduler())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


class NoiseOfItsOwn(DDIMScheduler):
    """Adds noise from torch's global generator, unless it has a seed, as DPMSolverSDEScheduler does."""

    seed: int | None = None

    def step(self, *args: Any, **kwargs: Any) -> Any:
        after = super().step(*args, **kwargs)
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        after.prev_sample = after.prev_sample + torch.randn(after.prev_sample.shape, generator=generator)
        return after


def test_schedulers_that_draw_from_the_global_generator_are_refused() -> None:
    scheduler, state = NoiseOfItsOwn(), torch.get_rng_state()
    message = (
        "wanted a scheduler that draws noise from the generators .*, got NoiseOfItsOwn, which draws from"
    )
    with pytest.raises(ValueError, match=message):
        adpdm.quantize(tiny_unet(**ONE_BLOCK), config(), scheduler=scheduler)
    assert torch.equal(torch.get_rng_state(), state)
    scheduler.seed = 3
    assert adpdm.quantize(tiny_unet(**ONE_BLOCK), config(), scheduler=scheduler).coverage.layers > 0


# ---- command line ------------------------------------------------------------------------------------------


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 1
    return re.sub(r"\s+", " ", capsys.readouterr().err)


def test_folders_that_are_not_there_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    for words in (
        ["sample", "nowhere", "--out", str(tmp_path / "a.png")],
        ["evaluate", str(tmp_path / "model"), "nowhere"],
    ):
        assert "nowhere must be a folder, or a model in the cache" in error_of(words, capsys)


def test_negative_seeds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    words = ["sample", str(tmp_path / "model"), "--out", str(tmp_path / "a.png"), "--seed", "-1"]
    assert "--seed must be at least 0, got -1" in error_of(words, capsys)
