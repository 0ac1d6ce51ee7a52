"""The command line on a tiny saved pipeline: exit codes, JSON, errors that leave nothing behind, resuming."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import adpdm
from adpdm import cli
from adpdm.testing import ONE_BLOCK, tiny_pipeline

QUICK = ["--steps", "5", "--groups", "2", "--images", "40", "--search-steps", "6"]  # rounds of 16, 16 and 8
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float pipeline on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(**ONE_BLOCK).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(model: Path) -> Path:
    """What `adpdm quantize` made of it."""
    out = model.parent / "quantized"
    assert cli.main(["quantize", str(model), "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture(autouse=True)
def no_extractors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave LPIPS and Frechet to the tests of evaluate: their networks take seconds to load."""

    for name in ("load_lite0", "load_lpips"):
        monkeypatch.setattr(f"adpdm.evaluate.comparison.{name}", lambda *_: None)


def output_of(capsys: pytest.CaptureFixture[str]) -> Any:
    """Standard output as strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error on one line, so that wrapping does not matter."""
    captured = capsys.readouterr()
    assert captured.out == ""
    return " ".join(captured.err.split())


# ---- commands that work ------------------------------------------------------------------------------------


def test_quantize_writes_model_and_report(quantized: Path) -> None:
    pipe = adpdm.load_pipeline(quantized)
    stored = json.loads((quantized / cli.REPORT_NAME).read_text())
    assert pipe.unet.mid_block.resnets[0].conv1.weight.dtype == torch.int8
    assert stored["config"]["num_inference_steps"] == 5
    assert stored["config"]["calibration_images"] == 40
    assert stored["config"]["search"]["num_steps"] == 6
    assert len(stored["trace"]["rounds"]) == 3
    assert stored["command"].startswith(f"adpdm quantize {quantized.parent / 'tiny'} --out {quantized}")
    leftovers = {p.name for p in quantized.parent.iterdir()} - {"tiny", "quantized"}
    assert not {name for name in leftovers if name.startswith("quantized")}


def test_quantize_options_reach_the_config(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--bits W4A6 --groups 3 --grouping dp --selection normal --steps 4 --seed 7 --timestep-policy error"
    )
    arguments = ["quantize", str(model), "--out", str(tmp_path / "q"), *options.split(), "--json"]
    assert cli.main([*arguments, "--exclude", "mid_block.*", "--exclude", "*conv_shortcut"]) == 0
    stored = output_of(capsys)["config"]
    wanted = {
        "weight_bits": 4,
        "activation_bits": 6,
        "num_groups": 3,
        "grouping": "dp",
        "selection": "normal",
        "num_inference_steps": 4,
        "seed": 7,
        "timestep_policy": "error",
        "modules_to_not_convert": ["mid_block.*", "*conv_shortcut"],
    }
    assert {key: stored[key] for key in wanted} == wanted


def test_quantize_takes_an_empty_folder(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "empty"
    out.mkdir()
    assert cli.main(["quantize", str(model), "--out", str(out), "--grouping", "shared", "--steps", "8"]) == 0
    assert (out / WEIGHTS).is_file()


def test_sample_writes_a_grid(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", str(quantized), "--images", "5", "--steps", "3", "--batch", "2", "--json"]
    assert cli.main([*arguments, "--out", str(tmp_path / "a.png"), "--seed", "1"]) == 0
    assert output_of(capsys)["images"] == 5
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (
            3 * 8 * 3,
            2 * 8 * 3,
        )  # three columns and two rows of 8 pixels, enlarged threefold
        assert image.getcolors(2) is None  # more than two colours
    assert cli.main([*arguments, "--out", str(tmp_path / "b.png"), "--seed", "1"]) == 0
    assert cli.main([*arguments, "--out", str(tmp_path / "c.png"), "--seed", "2"]) == 0
    first, same, other = ((tmp_path / f"{n}.png").read_bytes() for n in "abc")
    assert first == same
    assert first != other


def test_evaluate_prints_figures(model: Path, quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(model), str(quantized), "--images", "2", "--steps", "5", "--batch", "2"]
    assert cli.main([*arguments, "--json"]) == 0
    values = output_of(capsys)
    assert values["psnr_db"] > 10
    assert len(values["noise_sqnr_same_input_db"]) == 5
    assert min(values["noise_sqnr_same_input_db"]) > 15
    assert values["quantized_bytes"] == (quantized / WEIGHTS).stat().st_size
    assert values["reference_bytes"] == (model / WEIGHTS).stat().st_size
    assert values["lpips"] is None
    assert any("LPIPS" in sentence for sentence in values["missing"])


def test_evaluate_of_a_model_with_itself_is_valid_json(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(model), str(model), "--images", "1", "--steps", "2", "--json"]) == 0
    assert output_of(capsys)["psnr_db"] == "inf"


def test_report_writes_one_page(
    model: Path, quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    arguments = ["report", str(model), str(quantized), "--out", str(out), "--images", "2", "--steps", "5"]
    assert cli.main([*arguments, "--json"]) == 0
    assert output_of(capsys)["out"] == str(out)
    text = out.read_text()
    assert "</html>" in text
    assert "mid_block.resnets.0.conv1" in text
    assert "W8A8 against original" in text


def test_report_asks_a_model_for_no_other_timesteps_than_its_own(model: Path, tmp_path: Path) -> None:
    steps, folder = ["--steps", "8"], str(tmp_path / "q")
    settings = ["--grouping", "shared", "--timestep-policy", "error"]
    assert cli.main(["quantize", str(model), "--out", folder, *settings, *steps]) == 0
    out = ["--out", str(tmp_path / "report.html")]
    assert cli.main(["report", str(model), folder, "--images", "1", *steps, *out]) == 0


def test_info_prints_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert adpdm.__version__ in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    assert output_of(capsys)["adpdm"] == adpdm.__version__


def test_demo_writes_models_and_report(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / "demo.json").write_text("of an earlier demo")
    (out / "w8a8").mkdir()
    (out / "w8a8" / "earlier").touch()
    os.link(out / "demo.json", tmp_path / "earlier.json")
    assert cli.main(["demo", "--model", str(model), "--out", str(out), "--quick", "--json"]) == 0
    values = output_of(capsys)
    assert [(row["bits"], row["grouping"]) for row in values["comparison"]] == [
        ("W8A8", "search"),
        ("W4A8", "search"),
        *(("W6A6", grouping) for grouping in ("shared", "uniform", "dp", "search")),
    ]
    assert Path(values["report"]) == out / "report.html"
    report = (out / "report.html").read_text()
    assert "</html>" in report
    assert "W6A6: to compare groupings alone, every layer has these bits" in report
    assert "W4A8 against float32" in report
    assert "The whole run took" in report
    for name in ("w8a8", "w4a8"):
        rights = {stat.S_IMODE((out / file).stat().st_mode) for file in (f"{name}/{WEIGHTS}", "report.html")}
        assert len(rights) == 1
    assert (tmp_path / "earlier.json").read_text() == "of an earlier demo"  # replaced, not written over
    assert not (out / "w8a8" / "earlier").exists()
    assert {p.name for p in out.iterdir()} == {"demo.json", "report.html", "samples.png", "w4a8", "w8a8"}
    assert json.loads((out / "demo.json").read_text()) == values
    for name in ("W8A8", "W4A8"):
        assert f"{name} captured" in report
        assert "captured: " in values["summary"][name]
        quick = {"num_images": 4, "num_inference_steps": 10, "timing_pairs": 3, "seed": 1}
        assert quick.items() <= values["runs"][name]["config"].items()


def test_module_entry_point_returns_the_exit_code(model: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "adpdm", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(Path(adpdm.__file__).parents[1])}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    failed = run("quantize", str(model), "--out", str(model))
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr


# ---- errors ------------------------------------------------------------------------------------------------


def broken_model(model: Path, tmp_path: Path) -> Path:
    """A copy with a weight that is not a number."""
    copy = Path(shutil.copytree(model, tmp_path / "broken"))
    pipe = tiny_pipeline(**ONE_BLOCK)
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv1.weight.view(-1)[3] = float("nan")
    pipe.unet.save_pretrained(copy / "unet")
    return copy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "8"], "--bits must look like w8a8 or w4a8, got '8'"),
        (["--bits", "w16a8"], "weight_bits must be in [2, 8], got 16"),
        (["--bits", "w8a1"], "activation_bits must be in [2, 8], got 1"),
        (["--groups", "9", "--steps", "5"], "num_groups must be at most num_inference_steps=5, got 9"),
        (["--images", "0"], "calibration_images must be at least 1, got 0"),
        (["--search-steps", "0"], "search.num_steps must be at least 1, got 0"),
        (["--exclude", "encoder.*"], "pattern 'encoder.*' matches no layer"),
        (["--prompt", "a cat"], "prompts need a pipeline with encode_prompt, got DDIMPipeline"),
    ],
)
def test_quantize_refuses_with_a_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main(["quantize", str(model), "--out", str(tmp_path / "q"), *options]) == 1
    assert message in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_quantize_names_layer_timestep_and_range_of_broken_weights(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = broken_model(model, tmp_path)
    assert cli.main(["quantize", str(broken), "--out", str(tmp_path / "q"), *QUICK]) == 1
    # The brackets are no markup of rich's: "[nan, nan]" must arrive.
    wanted = (
        "the input of layer 'mid_block.resnets.0.conv2' at timestep 800 must be finite, got range [nan, nan]"
    )
    assert wanted in error_of(capsys)
    assert {p.name for p in tmp_path.iterdir()} == {"broken"}


@pytest.mark.parametrize("command", ["quantize", "sample", "evaluate", "report", "demo"])
def test_missing_model_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    absent, out = str(tmp_path / "absent"), ["--out", str(tmp_path / "out")]
    arguments = {
        "quantize": [absent, "--offline", *out],
        "sample": [absent, *out],
        "evaluate": [absent, absent],
        "report": [absent, absent, *out],
        "demo": ["--model", absent, *out],
    }
    assert cli.main([command, *arguments[command]]) == 1
    assert "absent" in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_quantize_never_overwrites(model: Path, quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (quantized / WEIGHTS).read_bytes()
    assert cli.main(["quantize", str(model), "--out", str(quantized), *QUICK]) == 1
    assert "must be a new or empty folder, got one with files in it" in error_of(capsys)
    assert (quantized / WEIGHTS).read_bytes() == before


def test_quantized_model_is_not_quantized_again(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quantize", str(quantized), "--out", str(tmp_path / "q"), *QUICK]) == 1
    assert "is quantized already; load the original again" in error_of(capsys)


def test_failed_save_leaves_nothing_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "REPORT_NAME", "absent/report.json")  # written after the weights
    options = ["--grouping", "shared", "--steps", "8"]
    assert cli.main(["quantize", str(model), "--out", str(tmp_path / "q"), *options]) == 1
    assert "No such file or directory" in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_truncated_checkpoint_is_an_error(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(quantized, tmp_path / "copy"))
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert cli.main(["sample", str(copy), "--images", "1", "--out", str(tmp_path / "x.png")]) == 1
    assert "diffusion_pytorch_model.safetensors" in error_of(capsys)
    assert not (tmp_path / "x.png").exists()


def test_report_without_stored_report_is_an_error(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(model), str(model)]) == 1
    assert "adpdm_report.json is missing; `adpdm quantize` writes it beside the model" in error_of(capsys)


@pytest.mark.parametrize("arguments", [[], ["fly"], ["quantize"], ["sample", "m", "--images", "many"]])
def test_bad_usage_exits_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


# ---- Ctrl-C and --resume -----------------------------------------------------------------------------------


def interrupting(done_at: int) -> Callable[[], Any]:
    """Stands in for the progress bar and presses Ctrl-C in the search."""

    @contextmanager
    def progress() -> Iterator[Callable[[str, int, int], None]]:
        def update(phase: str, done: int, total: int) -> None:
            if phase == "search" and done == done_at:
                raise KeyboardInterrupt

        yield update

    return progress


def test_interrupted_quantize_resumes_to_the_same_bytes(
    model: Path,
    quantized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["quantize", str(model), "--out", str(tmp_path / "q"), *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(cli, "_progress", interrupting(5))  # two rounds of two steps are saved
        assert cli.main(arguments) == 130
    message = error_of(capsys)
    assert "interrupted" in message
    assert "continue it with --resume" in message
    assert {p.name for p in tmp_path.iterdir()} == {"q.partial"}

    assert cli.main(arguments) == 1
    assert "is an unfinished search; continue it with --resume, or remove its folder" in error_of(capsys)

    assert cli.main([*arguments, "--resume", "--seed", "1"]) == 1
    assert "belongs to another model, configuration or version" in error_of(capsys)

    assert cli.main([*arguments, "--resume"]) == 0
    assert (tmp_path / "q" / WEIGHTS).read_bytes() == (quantized / WEIGHTS).read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"q"}


def test_interrupt_before_anything_is_saved_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_progress", interrupting(1))
    assert cli.main(["quantize", str(model), "--out", str(tmp_path / "q"), *QUICK]) == 130
    assert "--resume" not in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_interrupted_demo_leaves_a_whole_model_or_none(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    saved, renamed = DiffusionPipeline.save_pretrained, Path.rename

    def save(pipe: Any, folder: Path) -> None:
        saved(pipe, folder)
        if moment == "write":
            raise KeyboardInterrupt

    def rename(path: Path, target: Path) -> Path:
        if moment == "rename" and path.name == "fresh":
            raise KeyboardInterrupt
        return renamed(path, target)

    monkeypatch.setattr("adpdm.demo.quantize", lambda *_, **__: None)
    monkeypatch.setattr(DiffusionPipeline, "save_pretrained", save)
    monkeypatch.setattr(Path, "rename", rename)
    out = tmp_path / "demo"
    command = ["demo", "--model", str(model), "--out", str(out), "--quick"]
    assert cli.main(command) == 130
    assert list(out.iterdir()) == []
    (out / "w8a8").mkdir()
    (out / "w8a8" / "earlier").touch()
    assert cli.main(command) == 130
    assert [p.relative_to(out).as_posix() for p in sorted(out.rglob("*"))] == ["w8a8", "w8a8/earlier"]


def test_demo_is_interruptible(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_demo", interrupt)
    assert cli.main(["demo", "--model", str(model), "--out", str(tmp_path / "demo")]) == 130
