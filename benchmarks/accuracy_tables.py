"""Tables and plots from the files that `accuracy.py` wrote: Markdown to standard output.

python benchmarks/accuracy_tables.py runs/accuracy --json accuracy.json --plot docs/images
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accuracy_methods import FAMILIES
from accuracy_plot import draw

from adpdm.files import replacing

Cells = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One method at one number of bits on one model, over calibration seeds.

    Args:
        psnr_db, lpips: mean, smallest and largest over seeds of the mean over images; LPIPS where it was
            measured of every seed.
        sample_gain_db: of a search on held-out samples, per seed.
    """

    model: str
    checkpoint: str
    method: str
    bits: str
    seeds: list[int]
    num_images: int
    num_inference_steps: int
    psnr_db: tuple[float, float, float]
    lpips: tuple[float, float, float] | None
    integer_macs: float
    quantize_seconds: float
    kept: int | None  # searches that were kept
    sample_gain_db: list[float]
    noise_sqnr_db: list[float]  # [T], of each model's own trajectory, mean over seeds


def read(folder: Path) -> Cells:
    """All results of a folder, each with the name of its `file`.

    Raises:
        SystemExit: where there are none.
    """
    cells = [{**json.loads(file.read_text()), "file": file.name} for file in sorted(folder.glob("*.json"))]
    if not cells:
        raise SystemExit(f"wanted results of benchmarks/accuracy.py, {folder} has none")
    return cells


def rows(cells: Cells, wanted: Collection[str]) -> list[Row]:
    """Seeds of the wanted methods together, in the order of the methods.

    Raises:
        SystemExit: for results of one method that differ in more than the seed, or in less.
    """
    order = [method.name for family in FAMILIES.values() for method in family]
    if strange := sorted({cell["method"] for cell in cells} - set(order)):
        print(f"accuracy_tables: left out, as no family has it: {'; '.join(strange)}", file=sys.stderr)
    grouped: dict[tuple[Any, ...], Cells] = {}
    for cell in (cell for cell in cells if cell["method"] in wanted):
        names = ("model", "checkpoint", "method", "bits", "num_images", "num_inference_steps")
        grouped.setdefault(tuple(cell[name] for name in names), []).append(cell)
    found = [_row(group) for group in grouped.values()]
    return sorted(found, key=lambda r: (r.model, order.index(r.method), r.bits))


def _check_seeds(cells: Cells) -> None:
    """Refuse to take a mean over anything but seeds."""
    first, of_seeds = cells[0], {cells[0]["seed"]: cells[0]}
    for cell in cells[1:]:
        files = f"{first['file']} and {cell['file']}"
        if others := _differences(first, cell):
            raise SystemExit(
                f"accuracy_tables: wanted results of {cell['method']!r} that differ in the seed alone, "
                f"{files} differ in {', '.join(others)}: give each a folder of its own"
            )
        if (same := of_seeds.setdefault(cell["seed"], cell)) is not cell:
            raise SystemExit(
                f"accuracy_tables: wanted each seed of {cell['method']!r} once, got {cell['seed']} in "
                f"{same['file']} and {cell['file']}"
            )


def _differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names of what two results depend on, but for the seed, that are not equal."""
    a, b = (
        {"image_seed": c["image_seed"], "guidance": c.get("guidance"), **c["config"]} for c in (first, second)
    )
    return sorted(name for name in {**a, **b} if name != "seed" and a.get(name) != b.get(name))


def _row(cells: Cells) -> Row:
    _check_seeds(cells)
    first = cells[0]
    outcomes = [c["outcome"] for c in cells if c["outcome"] is not None]
    quality = [c["quality"] for c in cells]
    # of all seeds or none: a mean over fewer would stand beside means over all
    lpips = [float(q["lpips"]) for q in quality if q["lpips"] is not None]
    errors = [[float(v) for v in q["noise_sqnr_own_trajectory_db"]] for q in quality]
    return Row(
        first["model"],
        first["checkpoint"],
        first["method"],
        first["bits"],
        sorted(c["seed"] for c in cells),
        first["num_images"],
        first["num_inference_steps"],
        _spread(statistics.fmean(float(v) for v in q["psnr_per_image_db"]) for q in quality),
        _spread(lpips) if len(lpips) == len(cells) else None,
        statistics.fmean(c["integer_macs"] for c in cells),
        statistics.median(c["quantize_seconds"] for c in cells),
        sum(o["is_kept"] for o in outcomes) if outcomes else None,
        [o["sample_gain_db"] for o in outcomes],
        [statistics.fmean(step) for step in zip(*errors, strict=True)],
    )


def _spread(values: Iterable[float]) -> tuple[float, float, float]:
    found = list(values)
    return statistics.fmean(found), min(found), max(found)


def table(found: Sequence[Row], show: Callable[[Row], str]) -> str:
    """Methods down, bits across; an empty field was not measured."""
    order = ["w8a8", "w6a6", "w4a8", "w4a4"]
    bits = sorted({r.bits for r in found}, key=lambda b: (order.index(b) if b in order else 99, b))
    names = list(dict.fromkeys(r.method for r in found))
    at = {(r.method, r.bits): show(r) for r in found}
    lines = ["| | " + " | ".join(b.upper() for b in bits) + " |", "|---" * (len(bits) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(at.get((name, b), "") for b in bits) + " |" for name in names]
    return "\n".join(lines)


def psnr_words(row: Row) -> str:
    """Mean, and the range where there are several seeds."""
    mean, low, high = row.psnr_db
    return f"{mean:.1f}" if len(row.seeds) == 1 else f"{mean:.1f} ({low:.1f} to {high:.1f})"


def lpips_words(row: Row) -> str:
    """Mean over seeds and images."""
    return "" if row.lpips is None else f"{row.lpips[0]:.4f}"


def by_model(found: Sequence[Row]) -> list[list[Row]]:
    """Rows that may stand in one table: of one checkpoint, number of images and of steps."""
    parts: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        key = (row.model, row.checkpoint, row.num_images, row.num_inference_steps)
        parts.setdefault(key, []).append(row)
    return list(parts.values())


def plot_name(found: Sequence[Row], sections: Sequence[Sequence[Row]]) -> str:
    """The file of a section's plot, which says of what it is where the model has several sections."""
    first = found[0]
    if sum(other[0].model == first.model for other in sections) == 1:
        return f"accuracy-{first.model}.svg"
    sampling = f"{first.num_images}-images-{first.num_inference_steps}-steps"
    return f"accuracy-{first.model}-{first.checkpoint}-{sampling}.svg"


def section(found: Sequence[Row]) -> str:
    """The tables of one model, and what became of its searches."""
    first = found[0]
    sampling = f"{first.num_images} images, {first.num_inference_steps} steps"
    parts = [
        f"### {first.model} ({first.checkpoint}), {sampling}",
        "PSNR in dB",
        table(found, psnr_words),
    ]
    if any(row.lpips is not None for row in found):
        parts += ["LPIPS", table(found, lpips_words)]
    for row in found:
        if row.kept is not None:
            gains = ", ".join(f"{gain:+.2f}" for gain in row.sample_gain_db)
            kept = f"{row.kept} of {len(row.seeds)} kept"
            parts.append(f"{row.method}, {row.bits}: {kept}, held-out samples {gains} dB")
    return "\n\n".join(parts)


def main() -> None:
    """Print the tables of every model; write JSON and plots where asked."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="what accuracy.py was given as --out")
    parser.add_argument("--families", nargs="+", default=["strategies"], choices=list(FAMILIES))
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--plot", type=Path, help="folder for accuracy-MODEL.svg, needs matplotlib")
    args = parser.parse_args()
    wanted = {method.name for family in args.families for method in FAMILIES[family]}
    cells = read(args.folder)
    found = rows(cells, wanted)
    if not found:
        got = "; ".join(sorted({cell["method"] for cell in cells}))
        families = " ".join(args.families)
        raise SystemExit(f"accuracy_tables: wanted results of {families} in {args.folder}, got {got}")
    sections = by_model(found)
    for mine in sections:
        print(section(mine), end="\n\n")
        if args.plot:
            draw(args.plot / plot_name(mine, sections), mine)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps([asdict(r) for r in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
