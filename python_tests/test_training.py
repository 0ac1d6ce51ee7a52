"""The trainer of the examples: the same bytes after an interruption, loss curve, record, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from test_devices import Elsewhere, pretended
from torch.utils._pytree import tree_map

from adpdm.testing import tiny_transformer

ROOT = Path(__file__).parents[1]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
BATCH = 2


def tiny_unet(layers: int = 1, classes: int | None = None) -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=layers,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=classes,
    )


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """examples/training.py with a row of the curve every 2 steps."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import training

    monkeypatch.setattr(training, "CURVE_STEPS", 2)
    return training


@pytest.fixture
def script(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """examples/train_ddpm.py, whose small model is a tiny one."""
    import train_ddpm

    tiny = replace(train_ddpm.RECIPES["small"], make=tiny_unet, batch_size=BATCH)
    monkeypatch.setitem(train_ddpm.RECIPES, "small", tiny)
    return train_ddpm


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of noise in the file that fetch_cifar10.py writes."""
    path = tmp_path_factory.mktemp("data") / "cifar10.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    np.savez(path, x_train=pixels, y_train=np.arange(12, dtype=np.uint8) % 10)
    return path


def run(script: ModuleType, data: Path, out: Path, steps: int, *options: str) -> None:
    options = (*options, "--images", str(steps * BATCH), "--decay-images", "0")
    script.main(["--data", str(data), "--out", str(out), *options])


def files(out: Path) -> dict[str, bytes]:
    """Everything but the state, whose zip holds its own name."""
    found = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name != "state.pt"]
    return {str(p.relative_to(out)): p.read_bytes() for p in found}


def test_ddpm_training_resumes_to_the_same_files(script: ModuleType, data: Path, tmp_path: Path) -> None:
    """Weights, loss.csv and training.json, stopped within a row of the curve and at its end."""
    whole, parts = tmp_path / "whole" / "m", tmp_path / "parts" / "m"
    run(script, data, whole, 7)
    for steps in (1, 4, 5, 7):
        run(script, data, parts, steps)
    wanted, got = files(whole), files(parts)
    records = [json.loads(x.pop("training.json")) for x in (wanted, got)]
    assert got == wanted
    assert wanted["loss.csv"].count(b"\n") == 1 + 3
    assert [run["from_images"] for run in records[1].pop("commands")] == [0, 2, 8, 10]  # other --images
    assert len(records[0].pop("commands")) == 1
    assert records[0] == records[1]


def test_repeated_command_stands_once_and_tells_no_folders(
    script: ModuleType, data: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        run(script, data, tmp_path, 3, "--minutes", "1e9", f"--out={tmp_path}")
    record = json.loads((tmp_path / "training.json").read_text())
    command = record["commands"][0]["command"]
    assert len(record["commands"]) == 1
    assert command.startswith(f"python examples/train_ddpm.py --data cifar10.npz --out {tmp_path.name} ")
    assert "/" not in command.removeprefix("python examples/")
    assert (record["data"], record["images"], record["steps"], record["flips"]) == ("CIFAR-10", 6, 3, True)


def test_curve_holds_the_mean_loss_of_its_steps(
    script: ModuleType, training: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, add = [], training.LossCurve.add
    monkeypatch.setattr(
        training.LossCurve, "add", lambda self, loss: (losses.append(loss.item()), add(self, loss))[1]
    )
    run(script, data, tmp_path, 5)
    rows = (tmp_path / "loss.csv").read_text().splitlines()
    assert rows[0] == "images,loss"
    for row, seen, first in zip(rows[1:], (4, 8), (0, 2), strict=True):
        assert row.split(",")[0] == str(seen)
        # nine digits of a mean of two float32
        assert float(row.split(",")[1]) == pytest.approx(sum(losses[first : first + 2]) / 2, rel=1e-8)


def test_state_without_a_curve_goes_on(script: ModuleType, data: Path, tmp_path: Path) -> None:
    """Of the trainer before it had one: the same weights, a curve from there on."""
    whole, old = tmp_path / "whole", tmp_path / "old"
    run(script, data, whole, 6)
    run(script, data, old, 3)
    state = torch.load(old / "state.pt", weights_only=True)
    del state["curve"]
    shutil.rmtree(old)
    old.mkdir()
    torch.save(state, old / "state.pt")
    run(script, data, old, 6)
    assert (old / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    rows = [(x / "loss.csv").read_text().splitlines() for x in (whole, old)]
    assert [row.split(",")[0] for row in rows[1][1:]] == ["8", "12"]
    assert rows[1][2] == rows[0][3]  # the row at 8 holds one step only
    assert json.loads((old / "training.json").read_text())["commands"][0]["from_images"] == 6


def test_flips_mirror_half_of_the_images_and_draw_only_where_wanted(
    script: ModuleType, training: ModuleType, tmp_path: Path
) -> None:
    def flipped(flips: bool, images: torch.Tensor) -> tuple[torch.Tensor, Any]:
        parser = training.argument_parser("", script.CIFAR10)
        words = ["--data", "x", "--out", str(tmp_path)]
        recipe = replace(script.RECIPES["small"], flips=flips)
        trainer = training.Trainer(recipe, training.parse(parser, "x.py", words))
        before = trainer.generator.get_state()
        return trainer._flipped(images), torch.equal(before, trainer.generator.get_state())

    images = torch.arange(64 * 6.0).view(64, 1, 2, 3)
    result, untouched = flipped(True, images)
    mirrored = (result == images.flip(3)).all((1, 2, 3))
    assert torch.equal(result[~mirrored], images[~mirrored])
    assert 16 < mirrored.sum() < 48  # 4 standard deviations
    assert not untouched
    result, untouched = flipped(False, images)
    assert result is images
    assert untouched  # the random streams of recipes without flips are what they were


def test_precision_is_what_it_is_told_or_the_faster_one(
    script: ModuleType, training: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = {}
    for precision in ("float32", "bfloat16"):
        run(script, data, tmp_path / precision, 2, "--precision", precision)
        records[precision] = json.loads((tmp_path / precision / "training.json").read_text())["precision"]
    assert records == {"float32": "float32", "bfloat16": "bfloat16"}
    curves = [(tmp_path / name / "loss.csv").read_text() for name in records]
    assert curves[0] != curves[1]
    run(script, data, tmp_path / "bfloat16", 4)  # goes on as it began, whatever is faster here
    assert json.loads((tmp_path / "bfloat16" / "training.json").read_text())["precision"] == "bfloat16"
    for can, wanted in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda can=can: {"avx512_bf16": can})
        assert training.default_precision(torch.device("cpu")) == wanted
        assert training.default_precision(torch.device("cuda")) == "bfloat16"


def test_min_snr_weights_follow_their_definition(
    script: ModuleType, training: ModuleType, data: Path, tmp_path: Path
) -> None:
    """min(SNR, gamma) / SNR; the curve shows what it shows without them, the gradient does not follow it."""
    alphas_cumprod = torch.tensor([0.9, 0.5, 0.1])  # SNR 9, 1, 1/9
    assert training.min_snr_weights(alphas_cumprod, 3.0).tolist() == pytest.approx([1 / 3, 1, 1])
    losses = {}
    for gamma in (None, 5.0, 1e-6):
        recipe = replace(script.RECIPES["small"], min_snr=gamma)
        args = training.parse(
            training.argument_parser("", script.CIFAR10),
            "x.py",
            ["--data", str(data), "--out", str(tmp_path), "--precision", "float32"],
        )
        trainer = training.Trainer(recipe, args)
        images, labels = script.CIFAR10.load(data)
        clean = images[:BATCH].float() / 127.5 - 1
        losses[gamma] = [x.item() for x in trainer.loss(trainer.denoiser, clean, labels[:BATCH])]
    assert losses[None][0] == losses[None][1]
    assert [losses[gamma][1] for gamma in losses] == pytest.approx([losses[None][1]] * 3)
    assert losses[5.0][0] <= losses[5.0][1]
    assert losses[1e-6][0] < 1e-3 * losses[1e-6][1]


def test_state_of_another_model_is_refused(
    script: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(script, data, tmp_path, 1)
    before = files(tmp_path)
    other = replace(script.RECIPES["small"], make=partial(tiny_unet, layers=2))
    monkeypatch.setitem(script.RECIPES, "small", other)
    with pytest.raises(SystemExit, match="is the state of another model"):
        run(script, data, tmp_path, 2)
    assert files(tmp_path) == before


def test_training_stops_when_the_loss_is_no_number(
    script: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(script.RECIPES["small"], learning_rate=float("inf"))
    monkeypatch.setitem(script.RECIPES, "small", broken)
    with pytest.raises(SystemExit, match="the loss is nan at 4 images; nothing was saved before"):
        run(script, data, tmp_path, 4)
    assert not (tmp_path / "state.pt").exists()


def test_weights_that_are_no_numbers_are_not_saved(
    script: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a training too short for a row of the curve, or between its rows."""
    run(script, data, tmp_path / "good", 1)
    state, before = (tmp_path / "good" / "state.pt").read_bytes(), files(tmp_path / "good")
    broken = replace(script.RECIPES["small"], learning_rate=float("inf"))
    monkeypatch.setitem(script.RECIPES, "small", broken)
    with pytest.raises(SystemExit, match="the weights are not finite at 2 images; nothing was saved before"):
        run(script, data, tmp_path / "new", 1)
    assert not (tmp_path / "new").exists()
    with pytest.raises(
        SystemExit, match="the weights are not finite at 4 images; .*state.pt is of the last save before"
    ):
        run(script, data, tmp_path / "good", 2)
    assert (tmp_path / "good" / "state.pt").read_bytes() == state
    assert files(tmp_path / "good") == before


def test_losses_that_are_no_numbers_are_not_saved(
    script: ModuleType, training: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = training.LossCurve.add
    monkeypatch.setattr(training.LossCurve, "add", lambda self, loss: add(self, loss * float("inf")))
    with pytest.raises(SystemExit, match="the loss is inf at 2 images; nothing was saved before"):
        run(script, data, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def umask() -> Iterator[None]:
    """New files may be read by all."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_weights_may_be_read_by_whom_the_umask_says(script: ModuleType, data: Path, tmp_path: Path) -> None:
    """safetensors keeps what it writes for its owner."""
    for steps in (1, 2):
        run(script, data, tmp_path, steps)
        assert (tmp_path / WEIGHTS).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            partial(tiny_unet, layers=2),
            "wanted a UNet2DModel with layers_per_block=1, .*init has layers_per_block=2",
        ),
        (partial(tiny_transformer), "wanted a UNet2DModel, .*init holds a DiTTransformer2DModel"),
        (None, "wanted the folder of a UNet2DModel, .*init has no config.json"),
    ],
    ids=["shape", "class", "none"],
)
def test_init_of_another_shape_is_refused_before_data_is_read(
    script: ModuleType, tmp_path: Path, saved: Any, message: str
) -> None:
    if saved is not None:
        saved().save_pretrained(tmp_path / "init")
    with pytest.raises(SystemExit, match=message):
        run(script, tmp_path / "none.npz", tmp_path / "out", 1, "--init", str(tmp_path / "init"))
    assert not (tmp_path / "out").exists()


def test_init_may_be_gone_when_its_training_continues(script: ModuleType, data: Path, tmp_path: Path) -> None:
    """The weights are those of the state, not of the folder once more."""
    outs = tmp_path / "whole", tmp_path / "parts"
    for out, all_steps in zip(outs, ((2,), (1, 2)), strict=True):
        torch.manual_seed(7)
        tiny_unet().save_pretrained(tmp_path / "init")
        for steps in all_steps:
            run(script, data, out, steps, "--init", str(tmp_path / "init"))
            shutil.rmtree(tmp_path / "init", ignore_errors=True)
    assert (outs[0] / WEIGHTS).read_bytes() == (outs[1] / WEIGHTS).read_bytes()


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_optimizer_of_a_gpu_is_as_torch_chooses(
    script: ModuleType, training: ModuleType, data: Path, tmp_path: Path
) -> None:
    """New or resumed; with fused=False torch updates one tensor at a time."""
    run(script, data, tmp_path / "resumed", 1)
    chosen = {}
    for out in ("new", "resumed"):
        for device in ("cpu", "meta"):
            words = ["--data", str(data), "--out", str(tmp_path / out)]
            args = training.parse(training.argument_parser("", script.CIFAR10), "x.py", words)
            args.device = device
            optimizer = training.Trainer(script.RECIPES["small"], args).optimizer
            chosen[out, device] = [(group["fused"], group["foreach"]) for group in optimizer.param_groups]
    for out in ("new", "resumed"):
        assert chosen[out, "cpu"] == [(True, None)]
        assert chosen[out, "meta"] == [(None, None)]


def test_options_are_checked_before_anything_is_read(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"--save-every": "0", "--size": "large"}
    if not torch.cuda.is_available():
        wrong["--device"] = "cuda"
    for option, value in wrong.items():
        with pytest.raises(SystemExit, match="2"):
            run(script, tmp_path / "none.npz", tmp_path / "out", 1, option, value)
        assert option in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "wanted .*, which is no file; make it with examples/fetch_cifar10.py"),
        (b"text", "is not what examples/fetch_cifar10.py writes, or damaged: no .npz file"),
        ({"x": np.zeros(3)}, "is not what examples/fetch_cifar10.py writes, or damaged: .*x_train"),
        (
            {"x_train": np.zeros((2, 3, 32, 32), np.uint8), "y_train": np.zeros(2, np.uint8)},
            r"wanted x_train \[N, 32, 32, 3\] of uint8 and N labels, got uint8 \(2, 3, 32, 32\) and 2 labels",
        ),
    ],
    ids=["missing", "text", "other names", "other shapes"],
)
def test_training_on_other_files_says_what_it_wants(
    script: ModuleType, tmp_path: Path, content: Any, message: str
) -> None:
    path = tmp_path / "cifar10.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises(SystemExit, match=message):
        run(script, path, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_sizes_are_those_they_are_called(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import train_ddpm

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import unets

    counts = {}
    with torch.device("meta"):
        for size, recipe in train_ddpm.RECIPES.items():
            model = recipe.make()
            counts[size] = round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
        # the shape that the benchmarks time
        timed = UNet2DModel(**unets.settings_of(unets.find("cifar10"))).config
    assert counts == {"small": 4.4, "ddpm": 35.7}
    used = "_use_default_values"  # which of equal values were left to the default
    assert {**model.config, used: None} == {**timed, used: None}


def values_of(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")  # they have values here
def test_training_does_not_mix_devices(
    script: ModuleType, training: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a pretended device, resumed there, with classes and flips: the losses of the CPU."""
    recipe = replace(script.RECIPES["small"], make=partial(tiny_unet, classes=11), num_classes=10)
    monkeypatch.setitem(script.RECIPES, "small", recipe)
    # The CPU's rounds to bfloat16, there is none for the other device.
    monkeypatch.setattr(torch, "autocast", lambda *args: nullcontext())
    run(script, data, tmp_path / "here", 4)
    save = torch.save  # which knows no pretended tensors
    monkeypatch.setattr(torch, "save", lambda state, path: save(tree_map(values_of, state), path))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        for steps in (2, 4):
            words = ["--data", str(data), "--out", str(tmp_path / "there"), "--images", str(steps * BATCH)]
            args = training.argument_parser("", script.CIFAR10).parse_args([*words, "--decay-images", "0"])
            args.device, args.command, args.precision = "meta", "", "bfloat16"
            with pretended():
                training.train(recipe, args)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    here, there = (
        (tmp_path / x / "loss.csv").read_text().replace(",", "\n").split() for x in ("here", "there")
    )
    assert [float(x) for x in there[2:]] == pytest.approx([float(x) for x in here[2:]], rel=1e-4)
