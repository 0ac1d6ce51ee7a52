"""The JSON file of a script that times single operators: machine, settings, rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from unet_results import machine_state

from adpdm._native import build_info


def write(
    path: Path, settings: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], device: str = "cpu"
) -> None:
    """Write all at once or not at all; a reader never sees half a file. Not among the settings: `json`."""
    machine = {"isa": build_info()["isa"], "torch": torch.__version__, **machine_state(device)}
    kept = {key: str(v) if isinstance(v, Path) else v for key, v in settings.items() if key != "json"}
    content = {"machine": machine, "settings": kept, "rows": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)
