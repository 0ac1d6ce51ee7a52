"""benchmarks/distributions.py: which sets of images it takes up again, and which it refuses."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy_methods  # noqa: E402
import distributions  # noqa: E402
from accuracy_methods import Method  # noqa: E402

from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_unet  # noqa: E402

SHORT: dict[str, Any] = {
    "num_groups": 2,
    "histogram_images": 1,
    "correct_bias": False,
    "correct_prediction": False,
    "raised_layers": 0.0,
    "weigh_steps": False,
}
METHODS = (
    Method("dp", {**SHORT, "grouping": "dp"}, {}),
    Method("shared", {**SHORT, "grouping": "shared"}, {}),
)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the script on two images of the model in tmp_path / "tiny", without the distances."""
    save_model(tmp_path / "tiny", seed=0)
    monkeypatch.setitem(accuracy_methods.FAMILIES, "strategies", METHODS)
    monkeypatch.setattr(distributions, "_distances", lambda *arguments: {})

    def run(*words: Any, out: str = "out", method: str = "dp", images: int = 2) -> None:
        options = ("--out", tmp_path / out, "--model", tmp_path / "tiny", "--bits", "w8a8", "--steps", 2)
        options += ("--method", method, "--images", images, *words)
        distributions.main([str(word) for word in options])

    return run


def save_model(folder: Path, seed: int) -> None:
    tiny_unet(seed=seed, **ONE_BLOCK).save_pretrained(folder / "unet")
    ddim_scheduler().save_pretrained(folder / "scheduler")


def forbid_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(self: Any) -> None:
        raise AssertionError(f"{self.folder} was sampled again")

    monkeypatch.setattr(distributions.Wanted, "sample", sample)


def test_complete_sets_are_taken_as_they_are(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command()
    assert {path.parent.name for path in tmp_path.glob("out/*/images-*.npy")} == {"float", "w8a8"}
    record = json.loads((tmp_path / "out" / "distances.json").read_text())
    assert (record["method"], record["images"]) == ("dp", 2)
    forbid_sampling(monkeypatch)
    command()
    assert not list(tmp_path.rglob("*.tmp"))


def test_sets_of_another_method_model_or_size_are_refused_before_work_starts(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command()
    forbid_sampling(monkeypatch)

    def refusal(*words: Any, **changes: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            command(*words, **changes)
        return capsys.readouterr().err

    assert "w8a8 holds images of another config: give another --out" in refusal(method="shared")
    assert "float holds images of another chunk_size: give" in refusal("--batch", 1)
    assert "float holds 2 images, wanted at most --images 1: ask for as many" in refusal(images=1)
    save_model(tmp_path / "tiny", seed=1)
    assert "float holds images of another checkpoint: give another --out" in refusal()


def test_a_set_that_does_not_say_what_it_is_of_is_compared_with_the_model(
    command: Any, tmp_path: Path
) -> None:
    command()
    for file in tmp_path.rglob(distributions.ORIGIN_NAME):
        file.unlink()
    command()
    assert len(list(tmp_path.rglob(distributions.ORIGIN_NAME))) == 2
    for file in tmp_path.rglob(distributions.ORIGIN_NAME):
        file.unlink()
    with pytest.raises(ValueError, match="w8a8 holds samples of another model"):
        command(method="shared")
    assert not (tmp_path / "out" / "w8a8" / distributions.ORIGIN_NAME).exists()


def test_distances_that_cannot_be_written_leave_nothing(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, text: str) -> None:
        self.write_bytes(b"half")
        raise OSError("no space left")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(distributions.Wanted, "sample", lambda self: None)
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="no space left"):
        command()
    assert list((tmp_path / "out").iterdir()) == []


def test_group_gain_writes_what_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module: ModuleType = importlib.import_module("group_gain")
    save_model(tmp_path / "tiny", seed=0)
    row = module.Row(8, "alike", 1.0, 2.0, 3.0, 4.0)
    monkeypatch.setattr(module, "measure", lambda *arguments: row)
    path = tmp_path / "new" / "gain.json"
    words = ["--model", str(tmp_path / "tiny"), "--bits", "8", "--groups", "4", "--seed", "7"]
    monkeypatch.setattr(sys, "argv", ["group_gain", *words, "--json", str(path)])
    module.main()
    result = json.loads(path.read_text())
    checkpoint = result["settings"].pop("checkpoint")
    assert result["settings"] == {"model": "tiny", "bits": [8], "groups": 4, "seed": 7}
    assert len(checkpoint) == 16
    assert [r["limit_db"] for r in result["rows"]] == [3.0, 3.0]
    assert {"isa", "torch", "commit"} <= set(result["machine"])
    assert [p.name for p in path.parent.iterdir()] == ["gain.json"]
