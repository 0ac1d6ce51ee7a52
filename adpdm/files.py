"""Files and folders that are there as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name of its own beside `path`, for the block to write to; it becomes `path` at the end.

    After an error or interrupt it is removed, and `path` is what it was. Processes may do this at once. Who
    may read the file is what the umask says, whatever wrote it.

    Raises:
        OSError: it cannot be written, by safetensors either.
    """
    temporary = path.with_name(_own_name(path))
    try:
        mode = _mode_of_new(temporary)
        with _writing(path):
            yield temporary
        _allow(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def filling(folder: Path, last: Collection[str] = ()) -> Iterator[Path]:
    """An empty folder for the block to write to; what it wrote is in `folder`, new or empty, at the end.

    A folder that exists stays the same one, as a mount point or the target of a link must: what was written
    moves into it entry by entry. Who may read the files is what the umask says. After an error or interrupt
    nothing is left, but if only that last move fails, what was written is kept, and the error says where.

    Args:
        last: names of entries that move after all others, so that no part passes for the whole.

    Raises:
        OSError: nothing can be written, or it cannot become `folder`.
    """
    folder = Path(os.path.realpath(folder))
    is_there = folder.is_dir()
    temporary = (folder if is_there else folder.parent) / _own_name(folder)
    try:
        temporary.mkdir(parents=True)  # not by mkdtemp, which keeps everyone else out of what it makes
        with _writing(folder):
            yield temporary
        share(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        if is_there:
            _move_up(temporary, last)
        else:
            temporary.rename(folder)
    except OSError as error:
        raise OSError(
            f"{folder} must be a new or empty folder that can be moved into, got: {error}; "
            f"what belongs there is kept in {temporary}"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def share(folder: Path) -> None:
    """Let the files below a folder be read by those whom the umask says, whatever wrote them.

    Raises:
        OSError: the folder cannot be written.
    """
    mode = _mode_of_new(folder / _own_name(folder))
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            _allow(file, mode)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says of a full disk under safetensors what it says under everything else: OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _mode_of_new(file: Path) -> int:
    """The rights that the umask gives a new file, of which one is made for that and removed."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    file.unlink()
    return mode


def _allow(file: Path, mode: int) -> None:
    """Add rights to those of a file: safetensors keeps what it writes for its owner alone."""
    present = stat.S_IMODE(file.stat().st_mode)
    if present | mode != present:
        with suppress(OSError):  # of a file system without rights; the file is worth more
            file.chmod(present | mode)


def _move_up(folder: Path, last: Collection[str]) -> None:
    """Move the entries of `folder` into its parent, which holds nothing else, or none of them."""
    if others := sorted(entry.name for entry in folder.parent.iterdir() if entry.name != folder.name):
        raise FileExistsError(f"others wrote {others[0]} there meanwhile")
    entries = sorted(folder.iterdir(), key=lambda entry: (entry.name in last, entry.name))
    try:
        for entry in entries:
            entry.rename(folder.parent / entry.name)
        folder.rmdir()
    except BaseException:
        for entry in reversed(entries):
            if not os.path.lexists(entry):
                (folder.parent / entry.name).rename(entry)
        raise


def check_writable(folder: Path) -> None:
    """Try to make an entry in `folder`, or where it would be made, so that long work is not done in vain.

    Raises:
        OSError: it cannot be written.
    """
    nearest = Path(os.path.realpath(folder))
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    trial = nearest / _own_name(nearest)
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        wanted = f"{error.strerror}, where a folder that can be written is wanted"
        raise OSError(error.errno, wanted, str(folder)) from error


def _own_name(path: Path) -> str:
    return f"{path.name}.{secrets.token_hex(4)}.tmp"
