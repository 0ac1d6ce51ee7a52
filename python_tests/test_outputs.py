"""Where `adpdm` writes: no finished model is thrown away, nothing of the user's is removed; hub names."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from adpdm import QuantConfig, cli, load_pipeline
from adpdm.demo import save_image_grid
from adpdm.files import filling, replacing, share
from adpdm.layer_runs import read_record
from adpdm.outputs import STATE_NAME, checked_state, folder_of, state_file
from adpdm.testing import ONE_BLOCK, tiny_pipeline

FAST = ["--grouping", "shared", "--steps", "8", "--images", "8"]
SEARCH = ["--steps", "5", "--groups", "2", "--images", "16", "--search-steps", "2"]
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
HUB_NAME = "me/adpdm-tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float pipeline on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(**ONE_BLOCK).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_extractors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their networks take seconds to load."""
    for name in ("load_lite0", "load_lpips"):
        monkeypatch.setattr(f"adpdm.evaluate.comparison.{name}", lambda *_: None)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused must be refused before a model is even loaded."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("loaded a model")

    monkeypatch.setattr(cli, "load_pipeline", refuse)


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error on one line."""
    return " ".join(capsys.readouterr().err.split())


def failing_rename(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Let moving the entry `name` out of a temporary folder fail; the names that were moved."""
    rename, moved = Path.rename, []

    def watched(self: Path, target: Path) -> Path:
        if self.name == name and self.parent.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        moved.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    return moved


# ---- adpdm quantize --out ----------------------------------------------------------------------------------


def test_quantize_fills_the_target_of_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert cli.main(["quantize", str(model), "--out", str(tmp_path / "link"), *FAST]) == 0
    assert (tmp_path / "real" / WEIGHTS).is_file()
    assert (tmp_path / "link").is_symlink()
    assert names_in(tmp_path) == {"real", "link"}


def test_quantize_makes_the_target_of_a_dangling_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("new")
    assert cli.main(["quantize", str(model), "--out", str(tmp_path / "link"), *FAST]) == 0
    assert (tmp_path / "new" / WEIGHTS).is_file()


def test_quantize_never_replaces_an_empty_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mount point could not be, nor a folder whose parent cannot be written."""
    out = tmp_path / "closed" / "out"
    out.mkdir(parents=True)
    before, mkdir = out.stat(), Path.mkdir

    def closed(self: Path, *arguments: Any, **options: Any) -> None:
        if self.parent == out.parent:
            raise PermissionError(13, "Permission denied", str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", closed)
    assert cli.main(["quantize", str(model), "--out", str(out), *FAST]) == 0
    assert out.stat().st_ino == before.st_ino
    assert names_in(out) == {"adpdm_report.json", "model_index.json", "scheduler", "unet"}
    assert names_in(out.parent) == {"out"}


def test_quantize_fills_the_current_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert cli.main(["quantize", str(model), "--out", ".", *FAST]) == 0
    assert load_pipeline(here).unet is not None
    assert names_in(tmp_path) == {"here"}


def test_quantized_folder_is_as_open_as_others(model: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert cli.main(["quantize", str(model), "--out", str(tmp_path / "deep" / "q"), *FAST]) == 0
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("deep/q", "other")]
    assert modes[0] == modes[1]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "--out {}/file must be a new or empty folder, got something else"),
        ("file/q", "Not a directory, where a folder that can be written is wanted: '{}/file/q'"),
        ("loop", "--out {}/loop must be a new or empty folder, got something else"),
    ],
)
def test_quantize_refuses_what_cannot_be_a_folder_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert cli.main(["quantize", "anything", "--out", str(tmp_path / out), *FAST]) == 1
    assert message.format(tmp_path) in error_of(capsys)
    assert names_in(tmp_path) == {"file", "loop"}


def test_quantize_keeps_a_model_that_cannot_be_moved_and_says_where(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    failing_rename(monkeypatch, "unet")
    assert cli.main(["quantize", str(model), "--out", str(out), *FAST]) == 1
    (kept,) = out.iterdir()
    assert f"Input/output error; what belongs there is kept in {kept}" in error_of(capsys)
    assert load_pipeline(kept).unet is not None
    assert (kept / cli.REPORT_NAME).is_file()


def test_quantize_moves_the_denoiser_last_without_which_nothing_loads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    moved = failing_rename(monkeypatch, "none")
    assert cli.main(["quantize", str(model), "--out", str(out), *FAST]) == 0
    assert moved[-1] == "unet"
    (out / "unet").rename(tmp_path / "unet")
    with pytest.raises(OSError, match="no file named config.json found in directory"):  # that of the unet
        load_pipeline(out)


# ---- what is beside --out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [FAST, SEARCH])
def test_quantize_leaves_the_users_folders_alone(model: Path, tmp_path: Path, options: list[str]) -> None:
    for name in ("q.tmp", "q.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diary.txt").write_text("dear")
    assert cli.main(["quantize", str(model), "--out", str(tmp_path / "q"), *options]) == 0
    assert names_in(tmp_path) == {"q", "q.tmp", "q.partial"}
    for name in ("q.tmp", "q.partial"):
        assert names_in(tmp_path / name) == {"diary.txt"}


def test_quantize_leaves_an_empty_folder_that_it_did_not_use(model: Path, tmp_path: Path) -> None:
    (tmp_path / "q.partial").mkdir()
    assert cli.main(["quantize", str(model), "--out", str(tmp_path / "q"), *FAST]) == 0
    assert names_in(tmp_path) == {"q", "q.partial"}


def test_search_that_cannot_be_saved_is_told_and_done(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.partial").touch()  # no folder can be made there
    assert cli.main(["quantize", str(model), "--out", str(tmp_path / "q"), *SEARCH]) == 0
    message = error_of(capsys)
    assert "warning: the search is not saved, so it cannot be continued after an interrupt: [Errno" in message
    assert (tmp_path / "q" / WEIGHTS).is_file()


@pytest.mark.usefixtures("no_model")
def test_unfinished_search_is_found_beside_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "link.partial").mkdir()
    (tmp_path / "link.partial" / STATE_NAME).touch()
    assert cli.main(["quantize", "anything", "--out", str(tmp_path / "link"), *SEARCH]) == 1
    assert "link.partial/adpdm_search.safetensors is an unfinished search" in error_of(capsys)


# ---- filling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_filling_leaves_nothing_of_what_failed(
    tmp_path: Path, is_there: bool, error: type[BaseException]
) -> None:
    if is_there:
        (tmp_path / "out").mkdir()

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise error

    with pytest.raises(error), filling(tmp_path / "out") as folder:
        fail(folder)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["out"] * is_there


def filled(out: Path, *files: Path) -> None:
    """Write files while `out` is filled: relative ones into the folder to be, others where they say."""
    with filling(out) as folder:
        for file in files:
            (folder / file).write_text("ours" if not file.is_absolute() else "theirs")


def test_filling_overwrites_nothing_that_came_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OSError, match="others wrote a there meanwhile; .* is kept in"):
        filled(out, Path("a"), out / "a")
    assert (out / "a").read_text() == "theirs"
    assert [file.read_text() for file in out.glob("*.tmp/a")] == ["ours"]


def test_filling_keeps_what_cannot_be_renamed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match="Not a directory.* is kept in"):
        filled(out, Path("a"), out)
    assert out.read_text() == "theirs"
    assert [file.read_text() for file in tmp_path.glob("*.tmp/a")] == ["ours"]


def test_interrupted_move_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()

    def interrupted(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if self.name == "b" and target.parent == out:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        filled(out, *(Path(name) for name in "abc"))
    assert names_in(out) == set()


# ---- files -------------------------------------------------------------------------------------------------


def test_sample_makes_the_folder_of_its_file(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "no" / "such" / "s.png"
    assert cli.main(["sample", str(model), "--images", "1", "--steps", "1", "--out", str(out)]) == 0
    assert names_in(out.parent) == {"s.png"}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", [["sample", "anything"], ["report", "anything", "anything"]])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("folder", "--out {}/folder must be a file to write, got a folder"),
        ("file/s.png", "Not a directory, where a folder that can be written is wanted: '{}/file'"),
    ],
)
def test_file_that_cannot_be_written_is_refused_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], out: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert cli.main([*command, "--out", str(tmp_path / out)]) == 1
    assert message.format(tmp_path) in error_of(capsys)
    assert names_in(tmp_path) == {"folder", "file"}


def test_grid_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        save_image_grid(torch.zeros(1, 3, 8, 8), tmp_path / "folder")
    assert names_in(tmp_path) == {"folder"}


# ---- hub names ---------------------------------------------------------------------------------------------


@pytest.fixture
def cached(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the model in a cache of the hub, under a name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / f"models--{HUB_NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return Path(shutil.copytree(model, repository / "snapshots" / "abc"))


def test_what_was_quantized_from_a_hub_name_is_evaluated_and_reported_under_it(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized, page = tmp_path / "q", tmp_path / "page.html"
    assert cli.main(["quantize", HUB_NAME, "--offline", "--out", str(quantized), *FAST]) == 0
    sampling = ["--images", "1", "--steps", "2", "--json"]
    assert cli.main(["report", HUB_NAME, str(quantized), "--out", str(page), *sampling]) == 0
    values = json.loads(capsys.readouterr().out)["evaluation"]
    assert values["reference_bytes"] == (cached / WEIGHTS).stat().st_size
    assert values["quantized_bytes"] == (quantized / WEIGHTS).stat().st_size
    assert page.is_file()
    assert cli.main(["evaluate", HUB_NAME, HUB_NAME, *sampling]) == 0
    assert json.loads(capsys.readouterr().out)["quantized_bytes"] == (cached / WEIGHTS).stat().st_size


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("name", ["me/absent", "/no/such/folder"])
def test_folder_of_names_what_is_neither_folder_nor_cached(name: str) -> None:
    with pytest.raises(ValueError, match=f"wanted the folder of a model or .* a cached one, got {name}"):
        folder_of(name)


# ---- rights, full disks, --resume --------------------------------------------------------------------------


def test_weights_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    with filling(tmp_path / "out") as folder:
        save_file({"a": torch.zeros(2)}, folder / "a.safetensors")
    with replacing(tmp_path / "b") as file:
        save_file({"a": torch.zeros(2)}, file)
    (tmp_path / "out" / "late").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "out" / "late" / "c")
    share(tmp_path / "out")
    (tmp_path / "other").touch()
    names = ("out/a.safetensors", "b", "out/late/c", "other")
    assert len({stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names}) == 1
    assert names_in(tmp_path / "out") == {"a.safetensors", "late"}


@pytest.mark.parametrize("writer", [filling, replacing])
def test_full_disk_under_safetensors_is_an_os_error(tmp_path: Path, writer: Any) -> None:
    with pytest.raises(OSError, match="out cannot be written: no space"), writer(tmp_path / "out"):
        raise SafetensorError("no space")
    assert names_in(tmp_path) == set()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grouping", "dp"], "--resume continues a search: wanted --grouping search"),
        (["--groups", "1"], "at least 2, got --grouping search --groups 1"),
    ],
)
def test_resume_without_a_search_is_refused_and_keeps_the_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    state = tmp_path / "q.partial" / STATE_NAME
    state.parent.mkdir()
    state.touch()
    assert cli.main(["quantize", "m", "--out", str(tmp_path / "q"), "--resume", *SEARCH, *options]) == 1
    assert message in error_of(capsys)
    assert state.exists()


def test_resume_of_nothing_starts_anew_and_says_so(tmp_path: Path) -> None:
    told: list[str] = []
    state = state_file(tmp_path / "q")
    assert checked_state(tmp_path / "q", QuantConfig(), True, told.append) == state
    (sentence,) = told
    assert sentence.startswith(f"--resume wanted an unfinished search in {state}, got nothing there")


@pytest.mark.parametrize("settings", [{"grouping": "dp"}, {"num_groups": 1}])
def test_what_does_not_search_has_no_state_and_is_told_nothing(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    told: list[str] = []
    (tmp_path / "q.partial").touch()  # no folder can be made there
    assert checked_state(tmp_path / "q", QuantConfig(**settings), False, told.append) is None
    assert told == []
    (tmp_path / "q.partial").unlink()
    assert checked_state(tmp_path / "q", QuantConfig(**settings), False, told.append) is None
    state = state_file(tmp_path / "q")
    state.parent.mkdir()
    state.touch()
    with pytest.raises(ValueError, match="is an unfinished search; continue it with --resume, or remove"):
        checked_state(tmp_path / "q", QuantConfig(**settings), False, told.append)


@pytest.mark.usefixtures("no_model")
def test_sample_refuses_what_is_no_png(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", "m", "--out", "s.jpg"]) == 1
    assert "--out s.jpg must end in .png, which is what is written, got .jpg" in error_of(capsys)


@pytest.mark.parametrize("text", ["{}", "junk", "[]"])
def test_record_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r.json must be the record that `adpdm quantize` writes, got"):
        read_record(tmp_path / "r.json")
