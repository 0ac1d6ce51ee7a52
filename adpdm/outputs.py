"""Paths that commands are given: where results go, checked before any work, and the folders of models."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from huggingface_hub import snapshot_download

from .config import QuantConfig
from .files import check_writable

OTHER_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".tif", ".tiff", ".webp")
STATE_NAME = "adpdm_search.safetensors"


def check_new_folder(folder: Path) -> None:
    """See that --out can become a folder with a result.

    Raises:
        ValueError: something is there already.
        OSError: it cannot be written.
    """
    if os.path.lexists(os.path.realpath(folder)):
        if not folder.is_dir():
            raise ValueError(f"--out {folder} must be a new or empty folder, got something else")
        if any(folder.iterdir()):
            raise ValueError(f"--out {folder} must be a new or empty folder, got one with files in it")
    check_writable(folder)


def check_file(file: Path) -> None:
    """See that --out can become a file with a result; one that is there will be replaced.

    Raises:
        ValueError: it is a folder.
        OSError: it cannot be written.
    """
    if file.is_dir():
        raise ValueError(f"--out {file} must be a file to write, got a folder")
    check_writable(file.parent)


def check_image(file: Path) -> None:
    """See that --out can become a PNG file.

    Raises:
        ValueError: it is a folder, or named as another kind of file.
        OSError: it cannot be written.
    """
    if file.suffix.lower() in OTHER_IMAGES:
        raise ValueError(f"--out {file} must end in .png, which is what is written, got {file.suffix}")
    check_file(file)


def state_file(out: Path) -> Path:
    """Where the search for a model in `out` saves itself: beside the folder, whatever that is called."""
    named = Path(os.path.abspath(out))  # "." and ".." have no name to put anything beside
    return named.with_name(named.name + ".partial") / STATE_NAME


def checked_state(
    out: Path, config: QuantConfig, is_resumed: bool, warn: Callable[[str], None]
) -> Path | None:
    """`state_file`; None where nothing is searched, or it cannot be written, as beside a mount.

    Args:
        warn: is told why a search has none, and that there is nothing to resume.

    Raises:
        ValueError: a search is there that nobody wants to resume, or the settings do not search.
        OSError: a search is there that cannot be written.
    """
    state = state_file(out)
    if is_resumed and not config.searches:
        raise ValueError(
            "--resume continues a search: wanted --grouping search and --groups of at least 2, got "
            f"--grouping {config.grouping} --groups {config.num_groups}"
        )
    if is_resumed and not state.exists():
        warn(f"--resume wanted an unfinished search in {state}, got nothing there: all work starts anew")
    if state.exists() and not is_resumed:
        raise ValueError(f"{state} is an unfinished search; continue it with --resume, or remove its folder")
    if not config.searches:
        return None
    try:
        check_writable(state.parent)
    except OSError as error:
        if state.exists():
            raise
        warn(f"the search is not saved, so it cannot be continued after an interrupt: {error}")
        return None
    return state


def remove_state(state: Path | None) -> None:
    """Remove a search that is done with, and its folder if that held nothing else."""
    if state is not None and state.exists():
        with suppress(OSError):  # the model is written; a search that stays is named by the next run
            state.unlink()
            state.parent.rmdir()


def folder_of(model: str) -> Path:
    """The folder of a model that is named by its folder, or by its name on the hub if it is cached.

    Raises:
        ValueError: it is neither.
    """
    folder = Path(model)
    if folder.exists():
        return folder
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"wanted the folder of a model or the hub name of a cached one, got {model}: {error}"
        ) from error
