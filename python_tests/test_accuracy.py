"""benchmarks/accuracy.py: cells, resuming, failures, sharing by processes, what tables find in a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy  # noqa: E402
import accuracy_methods  # noqa: E402
import accuracy_tables  # noqa: E402
import subjects  # noqa: E402
from accuracy_methods import FAMILIES, Method  # noqa: E402

from adpdm.model_folder import ModelFolder  # noqa: E402
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_transformer, tiny_unet  # noqa: E402

SHORT: dict[str, Any] = {"num_groups": 2, "histogram_images": 2, "calibration_images": 2, "round_size": 2}
METHODS = (
    Method("shared", {**SHORT, "grouping": "shared"}, {}),
    Method("dp", {**SHORT, "grouping": "dp"}, {}),
)


@pytest.fixture(autouse=True)
def short_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accuracy_methods.FAMILIES, "strategies", METHODS)


@pytest.fixture
def unet_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    tiny_unet(**ONE_BLOCK).save_pretrained(folder / "unet")
    ddim_scheduler().save_pretrained(folder / "scheduler")
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *map(str, words)])
    accuracy.main()


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, model: Path, *words: Any) -> list[Path]:
    fixed = ("--bits", "w8a8", "w4a4", "--images", 2, "--steps", 4)
    command(monkeypatch, "--out", folder, "--models", model, *fixed, *words)
    return sorted(folder.glob("*.json"))


def test_every_method_and_bit_width_gives_a_file_with_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unet_folder: Path
) -> None:
    files = run(monkeypatch, tmp_path / "out", unet_folder)
    cells = [json.loads(file.read_text()) for file in files]
    assert {(c["method"], c["bits"]) for c in cells} == {
        (m, b) for m in ("shared", "dp") for b in ("w8a8", "w4a4")
    }
    by_bits = {(c["method"], c["bits"]): float(c["quality"]["psnr_db"]) for c in cells}
    assert by_bits["dp", "w8a8"] > by_bits["dp", "w4a4"] + 6
    assert all(0 < c["integer_macs"] <= 1 for c in cells)
    assert all(len(c["quality"]["noise_sqnr_own_trajectory_db"]) == 4 for c in cells)
    assert not list((tmp_path / "out").glob("*.tmp"))
    grid = np.array(Image.open(files[0].with_suffix(".png")))
    assert grid.shape == (16, 16)  # two images of 8x8, full precision above quantized
    rows = accuracy_tables.rows(accuracy_tables.read(tmp_path / "out"), {"dp"})
    images = {c["bits"]: c["quality"]["psnr_per_image_db"] for c in cells if c["method"] == "dp"}
    assert {r.bits: r.psnr_db[0] for r in rows} == {b: pytest.approx(np.mean(v)) for b, v in images.items()}


def test_a_second_run_measures_nothing_again_and_more_seeds_add_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unet_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {f: f.stat().st_mtime_ns for f in run(monkeypatch, tmp_path / "out", unet_folder)}
    capsys.readouterr()
    after = run(monkeypatch, tmp_path / "out", unet_folder, "--seeds", 0, 1)
    assert "8 quantizations, 4 measured before" in capsys.readouterr().out
    assert len(after) == 8
    assert {f: f.stat().st_mtime_ns for f in before} == before


def test_a_quantization_that_raises_is_named_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = ModelFolder(tmp_path / "tiny", "unet", "")
    cells = [accuracy.Cell(subject, METHODS[0], bits, 0, 2, 4) for bits in ("w8a8", "w4a4", "w6a6")]

    def measure(cell: accuracy.Cell) -> tuple[dict[str, Any], Any]:
        if cell.bits == "w4a4":
            raise RuntimeError("no such kernel\nand more")
        return {"quality": {"psnr_db": "inf"}}, np.zeros((2, 1, 4, 4, 1), np.uint8)

    monkeypatch.setattr(accuracy, "measure", measure)
    assert accuracy.run(cells, tmp_path / "out") == ["tiny w4a4 seed 0 shared"]
    bits = [file.name.split("-")[1] for file in sorted((tmp_path / "out").glob("*.json"))]
    assert bits == ["w6a6", "w8a8"]
    printed = capsys.readouterr().out
    assert "2/3 tiny w4a4 seed 0 shared: failed: RuntimeError: no such kernel, " in printed
    assert "3/3 tiny w6a6 seed 0 shared: inf dB, 0 min left" in printed


def test_a_run_with_a_failure_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unet_folder: Path
) -> None:
    def measure(cell: accuracy.Cell) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(accuracy, "measure", measure)
    wanted = "^accuracy: failed: tiny w8a8 seed 0 shared; tiny w8a8 seed 0 dp; tiny w4a4 seed 0 shared; "
    with pytest.raises(SystemExit, match=wanted):
        run(monkeypatch, tmp_path / "out", unet_folder)


@pytest.mark.parametrize("suffix", [".png", ".json"])
def test_a_file_that_cannot_be_written_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str
) -> None:
    cell = accuracy.Cell(ModelFolder(Path("tiny"), "unet", ""), METHODS[0], "w8a8", 0, 2, 4)

    def fail(self: Path, *args: Any, **kwargs: Any) -> None:
        self.write_bytes(b"half")
        raise OSError("no space left")

    if suffix == ".png":
        monkeypatch.setattr(Image.Image, "save", lambda self, path, **kwargs: fail(path))
    else:
        monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="no space left"):
        accuracy.write(cell, tmp_path, {}, np.zeros((2, 1, 4, 4, 1), np.uint8))
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".png" or suffix == ".png"]


def test_methods_that_two_families_share_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    names = [method.name for method in accuracy_methods.methods(["strategies", "correction"], None)]
    assert len(names) == len(set(names)) == len(FAMILIES["strategies"]) + 2
    known: dict[str, Method] = {}
    for method in (method for family in FAMILIES.values() for method in family):
        assert known.setdefault(method.name, method) == method, "one name is one method"


def test_processes_share_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unet_folder: Path) -> None:
    alone = [f.name for f in run(monkeypatch, tmp_path / "alone", unet_folder)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        parts.append([f.name for f in run(monkeypatch, tmp_path / f"rank{rank}", unet_folder)])
    assert sorted(parts[0] + parts[1]) == alone
    assert len(parts[0]) == len(parts[1]) == 2


def test_seed_and_checkpoint_are_part_of_a_file_name(tmp_path: Path, unet_folder: Path) -> None:
    def name(seed: int) -> str:
        cell = accuracy.Cell(subjects.find_subject(str(unet_folder)), METHODS[0], "w8a8", seed, 2, 4)
        return cell.file(tmp_path).name

    first = name(0)
    assert name(0) == first
    assert name(1) != first
    tiny_unet(seed=1, **ONE_BLOCK).save_pretrained(unet_folder / "unet")
    assert name(0) != first


def test_transformers_are_sampled_under_every_class_in_turn(tmp_path: Path) -> None:
    model = tiny_transformer()
    model.save_pretrained(tmp_path / "transformer")
    ddim_scheduler().save_pretrained(tmp_path / "scheduler")
    subject = subjects.find_subject(str(tmp_path))
    assert subject.conditioning()["class_labels"].tolist() == [0, 1, 2]
    assert subject.conditioning(5)["class_labels"].tolist() == [0, 1, 2, 0, 1]
    result, images = accuracy.measure(accuracy.Cell(subject, METHODS[1], "w8a8", 0, 2, 4))
    assert 15 < float(result["quality"]["psnr_db"]) < 100
    assert images[0].shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--models", "nowhere"), "wanted a folder with unet/ or transformer/ and scheduler/, got nowhere"),
        (("--bits", "8"), "wanted bits like w4a8, got '8'"),
        (("--methods", "magic"), "no method is called 'magic'"),
    ],
)
def test_bad_input_gets_a_sentence_before_work_starts(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    unet_folder: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    sentence: str,
) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, "--out", tmp_path / "out", "--models", unet_folder, *words)
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_methods_of_all_families_are_valid_settings_with_names_of_their_own() -> None:
    for family, found in FAMILIES.items():
        assert len({m.name for m in found}) == len(found), family
    subject = ModelFolder(Path(), "unet", "")
    for method in (m for found in FAMILIES.values() for m in found):
        accuracy.Cell(subject, method, "w4a4", 0, 16, 50).config()
