"""Folders of a denoiser and its scheduler without an index: which classes they open as, and what they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from safetensors.torch import save_file

import adpdm
from adpdm import cli
from adpdm.denoisers import BarePipeline
from adpdm.model_folder import ModelFolder
from adpdm.testing import ONE_BLOCK, tiny_conditional_unet, tiny_transformer, tiny_unet

MODELS = Path(__file__).parents[1] / "models"
SHIPPED = sorted(folder.parent for folder in MODELS.glob("*/scheduler"))
V_PREDICTION = {"prediction_type": "v_prediction"}


def make_folder(folder: Path, part: str, denoiser: Any, scheduler: Any) -> Path:
    denoiser.save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def images(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    made = pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="np").images
    return torch.from_numpy(made)


# ---- schedulers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "opened"),
    [
        (EulerDiscreteScheduler(**V_PREDICTION), EulerDiscreteScheduler),
        (DDIMScheduler(**V_PREDICTION), DDIMScheduler),
        (DDPMScheduler(**V_PREDICTION), DDIMScheduler),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else type(x).__name__,
)
def test_scheduler_is_the_one_that_the_config_names(tmp_path: Path, scheduler: Any, opened: type) -> None:
    folder = make_folder(tmp_path, "unet", tiny_unet(**ONE_BLOCK), scheduler)
    for found in (adpdm.load_pipeline(folder).scheduler, ModelFolder.open(folder).scheduler()):
        assert type(found) is opened
        assert found.config.prediction_type == "v_prediction"


def test_folder_of_a_ddpm_training_samples_by_ddim_to_the_bit(tmp_path: Path) -> None:
    trained = DDPMScheduler(beta_schedule="linear")  # as examples/training.py leaves it
    pipe = adpdm.load_pipeline(make_folder(tmp_path, "unet", tiny_unet(**ONE_BLOCK), trained))
    wanted = DDIMPipeline(tiny_unet(**ONE_BLOCK), DDIMScheduler.from_config(trained.config))
    assert type(pipe) is DDIMPipeline
    assert torch.equal(images(pipe), images(wanted))


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_models_sample_by_ddim(folder: Path) -> None:
    scheduler = ModelFolder.open(folder).scheduler()
    assert type(scheduler) is DDIMScheduler
    assert scheduler.config == DDIMScheduler.from_pretrained(folder / "scheduler").config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"_class_name": "MyScheduler"}', "a class of diffusers .* as _class_name, got 'MyScheduler'"),
        ('{"_class_name": "utils"}', "a class of diffusers .* as _class_name, got 'utils'"),
        ("{}", "a class of diffusers .* as _class_name, got None"),
        ("[1]", "a class of diffusers .* as _class_name, got None"),
        ("{", "a config of diffusers, got no JSON"),
    ],
)
def test_scheduler_that_diffusers_does_not_have_is_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = make_folder(tmp_path, "unet", tiny_unet(**ONE_BLOCK), DDIMScheduler())
    (folder / "scheduler" / "scheduler_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"scheduler_config.json must .*{message}"):
        adpdm.load_pipeline(folder)
    with pytest.raises(ValueError, match=message):
        ModelFolder.open(folder).scheduler()


# ---- denoisers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "make", "scheduler"),
    [
        ("unet", tiny_unet, EulerDiscreteScheduler),  # whose input no DDIMPipeline would scale
        ("unet", tiny_conditional_unet, DDIMScheduler),
        ("transformer", tiny_transformer, DDIMScheduler),
    ],
)
def test_pairs_without_a_pipeline_are_kept_as_they_are(
    tmp_path: Path, part: str, make: Any, scheduler: type
) -> None:
    pipe = adpdm.load_pipeline(make_folder(tmp_path / "a", part, make(), scheduler()))
    pipe.save_pretrained(tmp_path / "b")
    assert sorted(x.name for x in (tmp_path / "b").iterdir()) == sorted(["scheduler", part])
    again = adpdm.load_pipeline(tmp_path / "b")
    assert [type(pipe), type(again)] == [BarePipeline] * 2
    assert type(again.scheduler) is scheduler
    wanted, got = make().state_dict(), getattr(again, part).state_dict()
    assert type(getattr(again, part)) is type(make())
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    with pytest.raises(TypeError, match=f"samples from {type(make()).__name__} and .* alone"):
        pipe()


def test_quantize_takes_the_folder_of_a_transformer(tmp_path: Path) -> None:
    """As `models/dit-fashion-mnist-32` is: transformer/ and scheduler/."""
    folder = make_folder(tmp_path / "dit", "transformer", tiny_transformer(), DDIMScheduler())
    labels = {"class_labels": torch.tensor([0, 2])}
    save_file(labels, tmp_path / "labels.safetensors")
    options = ["--grouping", "shared", "--steps", "2", "--images", "2", "--histogram-images", "1"]
    command = ["quantize", str(folder), "--out", str(tmp_path / "q"), *options]
    assert cli.main([*command, "--conditioning", str(tmp_path / "labels.safetensors")]) == 0
    settings = adpdm.QuantConfig(
        grouping="shared", num_inference_steps=2, calibration_images=2, histogram_images=1
    )
    model = tiny_transformer()
    adpdm.quantize(model, settings, scheduler=DDIMScheduler(), conditioning=labels)
    wanted, got = model.state_dict(), adpdm.load_pipeline(tmp_path / "q").transformer.state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.parametrize(
    ("parts", "got"),
    [((), "none of them"), (("unet",), "unet/"), (("scheduler",), "scheduler/")],
)
def test_folder_without_its_parts_is_refused(tmp_path: Path, parts: tuple[str, ...], got: str) -> None:
    for part in parts:
        (tmp_path / part).mkdir()
    message = rf"must hold model_index.json, or unet/ or transformer/ with scheduler/ beside it; got {got}$"
    with pytest.raises(ValueError, match=message):
        adpdm.load_pipeline(tmp_path)


def test_denoiser_of_a_class_that_diffusers_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "unet", tiny_unet(**ONE_BLOCK), DDIMScheduler())
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "MyUNet"}))
    message = rf"config.json must name a class of diffusers {diffusers.__version__} .*, got 'MyUNet'"
    for load in (adpdm.load_pipeline, lambda x: ModelFolder.open(x).denoiser()):
        with pytest.raises(ValueError, match=message):
            load(folder)
