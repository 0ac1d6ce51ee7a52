"""The JSON file of a script that times in one process: machine, settings, rows."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from unet_results import machine_state, write_whole

from adpdm._native import build_info


@functools.cache
def machine_of(device: str) -> dict[str, Any]:
    """Its state at the first call: git and nvidia-smi are too slow to be asked whenever a script writes."""
    return {"isa": build_info()["isa"], "torch": torch.__version__, **machine_state(device)}


def write(
    path: Path, settings: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], device: str = "cpu"
) -> None:
    """Write all at once or not at all. Not among the settings: `json`."""
    kept = {key: str(v) if isinstance(v, Path) else v for key, v in settings.items() if key != "json"}
    write_whole(path, {"machine": machine_of(device), "settings": kept, "rows": list(rows)})
