"""Writes csrc/cuda/tile_table.inc, the planner's table of costs, from tools/tile_table.json.

`python tools/make_tile_table.py` writes it; --check exits with 1 if the file is not what would be written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tools" / "tile_table.json"
TARGET = ROOT / "csrc" / "cuda" / "tile_table.inc"
CORES = {"mma": "kMma", "wgmma": "kWgmma"}
MODES = {"a8w8": "kA8W8", "a8w4": "kA8W4", "a4w4": "kA4W4", "a4w4-unpacked": "kA4W4Unpacked"}


def rows(architecture: dict[str, Any]) -> list[str]:
    """The lines of one architecture: where its figures come from, then a TileCost per core, mode and tile."""
    lines = [f"// sm_{architecture['arch']}: {architecture['origin']}"]
    for core, modes in ((name, architecture[name]) for name in CORES if name in architecture):
        for mode, tiles in modes.items():
            for tile, costs in tiles.items():
                numbers = ", ".join(str(cost) for cost in costs)
                shape = ", ".join(tile.split("x"))
                kernel = f"IgemmCore::{CORES[core]}, IgemmMode::{MODES[mode]}"
                lines.append(f"{{{architecture['arch']}, {kernel}, {{{shape}}}, {numbers}}},")
    return lines


def table(source: str) -> str:
    """The text of tile_table.inc for the text of tile_table.json."""
    lines = [
        "// The planner's costs, made from tools/tile_table.json by tools/make_tile_table.py.",
        "// clang-format off",
    ]
    for architecture in json.loads(source)["architectures"]:
        lines += rows(architecture)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes the table, or compares it."""
    text = table(SOURCE.read_text())
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text)
        return 0
    if TARGET.exists() and TARGET.read_text() == text:
        return 0
    print(f"{TARGET} is not made of {SOURCE}: run python tools/make_tile_table.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
