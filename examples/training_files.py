"""What a training leaves in its folder about itself, and what it takes from the folder of another."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RECORD_FILE = "training.json"
MEASURED = "scaling_factor"  # in the config of an autoencoder: found when it is saved


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a training left in its folder about itself."""
    path = folder / RECORD_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def record_of_part(folder: Path, part: str) -> dict[str, Any] | None:
    """How a model came to be, from the record beside its folder.

    Beside a pipeline's "vae" that record is the denoiser's, and holds the autoencoder's.
    """
    record = read_record(folder.parent)
    if record is not None and part == "vae" and "captions" in record:
        return record.get("autoencoder")
    return record


def load_weights(model: Any, folder: Path) -> None:
    """Take the weights of a saved model of the same shape; what a script set for training stays.

    Raises:
        SystemExit: the folder holds no such model.
    """
    kind = type(model)
    if not (folder / "config.json").is_file():
        raise SystemExit(f"--init: wanted the folder of a {kind.__name__}, {folder} has no config.json")
    name = kind.load_config(folder).get("_class_name")
    if name != kind.__name__:
        raise SystemExit(f"--init: wanted a {kind.__name__}, {folder} holds a {name}")
    saved = kind.from_pretrained(folder)
    wanted, got = shape_of(model), shape_of(saved)
    if differing := [key for key in wanted if wanted[key] != got.get(key)]:
        both = [", ".join(f"{key}={shape.get(key)}" for key in differing) for shape in (wanted, got)]
        raise SystemExit(f"--init: wanted a {kind.__name__} with {both[0]}, {folder} has {both[1]}")
    model.load_state_dict(saved.state_dict())


def shape_of(model: Any) -> dict[str, Any]:
    """The settings of a model, as files have them."""
    settings = {key: model.config[key] for key in model.config if key[0] != "_" and key != MEASURED}
    return dict(json.loads(json.dumps(settings)))


def replace_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
