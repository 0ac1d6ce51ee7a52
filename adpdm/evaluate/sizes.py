"""What the weights of a model take on disk: of every folder the one set of files that is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")  # the first is preferred
PIPELINE_INDEX = "model_index.json"
# Without an index the first of these with scheduler/ beside it is loaded; DENOISER_NAMES of denoisers.py
DENOISER_FOLDERS, SCHEDULER_FOLDER = ("unet", "transformer"), "scheduler"
# What diffusers and transformers load by themselves; a folder without any of them is counted name by name.
LOADED_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
# name, shard and variant before or after each other, as `model.fp16-00001-of-00002.safetensors`
SHARD = r"(?:-\d{5}-of-\d{5})?"
WEIGHT_NAME = re.compile(rf"(?P<name>[^.]+?){SHARD}(?:\.(?P<variant>[^.]+?))?{SHARD}")


def file_bytes(path: Path | str) -> int:
    """Bytes of a weight file, or of the weights that are loaded from a folder.

    Of a pipeline's folder its components count, not files beside them; of a denoiser with its scheduler, as
    trainings leave them, the denoiser. Of each folder one set of files counts: with LOADED_NAMES before
    others, without a variant (`fp16`, `non_ema`) before one, safetensors before .bin, and of shards those of
    their index.

    Raises:
        ValueError: where there are no weight files, or not all shards of an index.
    """
    path = Path(path)
    files = [path] if path.is_file() else [f for folder in _folders(path) for f in _loaded_files(folder)]
    if not files:
        raise ValueError(
            f"file_bytes: wanted weight files ({', '.join(WEIGHT_SUFFIXES)}) at {path}, found none"
        )
    return sum(f.stat().st_size for f in files)


def _folders(root: Path) -> list[Path]:
    """The components of a pipeline, or a denoiser beside its scheduler; else the folder and all below it."""
    index = root / PIPELINE_INDEX
    if index.is_file():
        parts = json.loads(index.read_text())
        return [root / name for name, made_by in sorted(parts.items()) if _is_component(made_by)]
    denoisers = [root / name for name in DENOISER_FOLDERS if (root / name).is_dir()]
    if denoisers and (root / SCHEDULER_FOLDER).is_dir():
        return denoisers[:1]
    return [root, *sorted(folder for folder in root.rglob("*") if folder.is_dir())]


def _is_component(made_by: object) -> bool:
    """Whether an entry of the index is [library, class] of a part that is there."""
    return isinstance(made_by, list) and len(made_by) == 2 and None not in made_by


def _loaded_files(folder: Path) -> list[Path]:
    """The one set of weight files of a folder that is loaded; none where there are no weights."""
    sets: dict[tuple[bool, int, str], dict[str, list[Path]]] = {}
    for file in sorted(folder.glob("*")):
        if file.suffix in WEIGHT_SUFFIXES and file.is_file():
            found = WEIGHT_NAME.fullmatch(
                file.stem
            )  # not of names with more dots, which are names as a whole
            name, variant = (file.stem, "") if found is None else (found["name"], found["variant"] or "")
            key = (bool(variant), WEIGHT_SUFFIXES.index(file.suffix), variant)
            sets.setdefault(key, {}).setdefault(name, []).append(file)
    known = {key: names for key, names in sets.items() if not names.keys().isdisjoint(LOADED_NAMES)}
    if not sets:
        return []
    best = min(known or sets)
    names = sets[best]
    wanted = [name for name in LOADED_NAMES if name in names][:1] or sorted(names)
    return [file for name in wanted for file in _of_index(folder, name, best[2], names[name])]


def _of_index(folder: Path, name: str, variant: str, files: list[Path]) -> list[Path]:
    """Of files of one name and variant the shards that an index names, else those that are no shards."""
    suffix = files[0].suffix
    middle = f".{variant}" if variant else ""
    for index in (f"{name}{suffix}.index{middle}.json", f"{name}{middle}{suffix}.index.json"):
        if (folder / index).is_file():
            shards = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            if lost := [shard for shard in shards if not (folder / shard).is_file()]:
                raise ValueError(
                    f"file_bytes: wanted the files that {folder / index} names, {lost[0]} is missing"
                )
            return [folder / shard for shard in shards]
    whole = [file for file in files if file.stem == f"{name}{middle}"]
    return whole or files
