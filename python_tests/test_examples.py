"""The examples run: the README's ten lines on a tiny saved pipeline, and training on images of noise."""

from __future__ import annotations

import gzip
import importlib
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from PIL import Image

from adpdm.nn import quant_layers
from adpdm.testing import ONE_BLOCK, tiny_pipeline, tiny_transformer

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "quantize_and_sample.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float pipeline on disk."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(**ONE_BLOCK).save_pretrained(folder)
    return folder


def run_here(arguments: list[str | Path], patch: pytest.MonkeyPatch) -> None:
    """Run quantize_and_sample.py in this process, which has imported diffusers already."""
    patch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_quantize_and_sample_writes_a_pipeline_that_loads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "w8a8"
    run_here(["--quick", "--model", model, "--out", out, "--images", "4"], monkeypatch)
    assert "loaded again, it samples the same 4 images" in capsys.readouterr().out
    assert Image.open(out / "samples.png").size == (4 * 8, 8)
    layers = quant_layers(DDIMPipeline.from_pretrained(out, local_files_only=True).unet)
    assert layers
    assert all(layer.is_frozen for layer in layers.values())


def test_quantize_and_sample_loads_the_pipeline_that_it_saved(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that samples by DDPM, which draws noise in every step."""
    unet = DDIMPipeline.from_pretrained(model).unet
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    options = ["--quick", "--model", tmp_path / "ddpm", "--out", tmp_path / "w8a8", "--images", "4"]
    run_here(options, monkeypatch)
    assert "loaded again, it samples the same 4 images" in capsys.readouterr().out


def test_quantize_and_sample_refuses_what_it_cannot_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it quantizes: a transformer with classes."""
    tiny_transformer().save_pretrained(tmp_path / "dit" / "transformer")
    DDPMScheduler().save_pretrained(tmp_path / "dit" / "scheduler")
    with pytest.raises(SystemExit, match="2"):
        run_here(["--quick", "--model", tmp_path / "dit", "--out", tmp_path / "out"], monkeypatch)
    wanted = "--model must be an unconditional pipeline, such as DDIMPipeline, got BarePipeline"
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quantize_and_sample_keeps_an_existing_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_here(["--quick", "--model", model, "--out", tmp_path], monkeypatch)
    assert stopped.value.code == 2
    assert "--out must name a new folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def noise_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty labelled images in the files of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    for name, header, values in (
        ("images-idx3", 16, pixels),
        ("labels-idx1", 8, np.arange(20, dtype=np.uint8) % 10),
    ):
        with gzip.open(folder / f"train-{name}-ubyte.gz", "wb") as file:
            file.write(bytes(header) + values.tobytes())
    return folder


SMALL_UNET = {"block_out_channels": (16, 16, 16), "attention_head_dim": 16}


@pytest.mark.parametrize(
    ("script", "folder", "kind", "smaller"),
    [
        ("train_fashion_mnist", "unet", UNet2DModel, SMALL_UNET),
        ("train_dit", "transformer", DiTTransformer2DModel, {"num_attention_heads": 1}),
    ],
)
def test_training_resumes_to_the_same_bytes(
    noise_images: Path,
    tmp_path: Path,
    script: str,
    folder: str,
    kind: type,
    smaller: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The models as the scripts make them but for their width, in batches of 2."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = importlib.import_module(script)
    monkeypatch.setattr(module, kind.__name__, lambda **settings: kind(**{**settings, **smaller}))
    monkeypatch.setattr(module, "Recipe", partial(module.Recipe, batch_size=2))

    def train(out: str, images: int) -> None:
        options = ["--data", noise_images, "--out", tmp_path / out, "--images", images, "--decay-images", 0]
        module.main([str(option) for option in options])

    train("whole", 4)
    train("parts", 2)
    train("parts", 4)
    file = f"{folder}/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    assert kind.from_pretrained(tmp_path / "parts" / folder).config.sample_size == 32


def test_init_keeps_what_the_script_set_for_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transformer drops no labels by itself; the trainer does, by its own generator."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module, training = (importlib.import_module(name) for name in ("train_dit", "training"))
    smaller = {"num_attention_heads": 1, "num_layers": 1}
    monkeypatch.setattr(
        module, "DiTTransformer2DModel", lambda **given: DiTTransformer2DModel(**{**given, **smaller})
    )
    saved = module.make_transformer()
    saved.save_pretrained(tmp_path / "init")
    words = ["--data", "x", "--out", str(tmp_path / "out"), "--init", str(tmp_path / "init"), "--seed", "1"]
    args = training.parse(training.argument_parser("", module.FASHION_MNIST), "x.py", words)
    recipe = module.Recipe(module.make_transformer, "transformer", learning_rate=1e-3)
    model = training.Trainer(recipe, args).denoiser
    blocks = model.transformer_blocks
    assert [block.norm1.emb.class_embedder.dropout_prob for block in blocks] == [0.0]
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("script", "make", "parameters"),
    [("train_fashion_mnist", "make_unet", 2_586_337), ("train_dit", "make_transformer", 2_818_448)],
)
def test_training_makes_models_of_the_shipped_size(
    script: str, make: str, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = importlib.import_module(script)
    with torch.device("meta"):
        model = getattr(module, make)()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.config.sample_size == 32


def test_training_without_data_says_what_it_wants(tmp_path: Path) -> None:
    """As a user runs it: a file that finds its neighbours, in a process of its own."""
    script, out = ROOT / "examples" / "train_dit.py", tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, script, "--data", tmp_path, "--out", out]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"wanted {tmp_path / 'train-images-idx3-ubyte.gz'}, which does not exist" in result.stderr
    assert not out.exists()
