"""benchmarks/accuracy_tables.py: what may stand in one row and one table, what is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy_tables  # noqa: E402
from accuracy_methods import FAMILIES  # noqa: E402

OURS, SHARED = "ours, dp", "ours, shared"


def write_cell(folder: Path, name: str, psnr_db: float = 30.0, **changes: Any) -> None:
    """What accuracy.py writes, with two images `psnr_db` -1 and +1."""
    lpips = changes.pop("lpips", 0.01)
    seed, steps = changes.get("seed", 0), changes.get("num_inference_steps", 2)
    cell = {
        "model": "tiny",
        "checkpoint": "00ff",
        "method": OURS,
        "bits": "w8a8",
        "seed": seed,
        "num_images": 2,
        "num_inference_steps": steps,
        "image_seed": 1234,
        "config": {"grouping": "dp", "seed": seed},
        "quality": {
            "psnr_per_image_db": [psnr_db - 1, psnr_db + 1],
            "lpips": lpips,
            "noise_sqnr_own_trajectory_db": [20.0] * steps,
        },
        "outcome": None,
        "integer_macs": 0.9,
        "quantize_seconds": 1.0,
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**cell, **changes}))


def command(monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy_tables", *map(str, words)])
    accuracy_tables.main()


def test_tables_hold_the_mean_and_the_range_over_seeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        for bits in ("w8a8", "w4a4"):
            write_cell(tmp_path / "out", f"dp-{bits}-{seed}", 40.0 + 2 * seed, bits=bits, seed=seed)
            shared = {"method": SHARED, "bits": bits, "seed": seed}
            write_cell(tmp_path / "out", f"shared-{bits}-{seed}", 30.0 + 2 * seed, **shared)
    command(monkeypatch, tmp_path / "out", "--json", tmp_path / "new" / "rows.json")
    printed = capsys.readouterr().out
    assert "| ours, shared | 31.0 (30.0 to 32.0) | 31.0 (30.0 to 32.0) |" in printed
    assert "| ours, dp | 41.0 (40.0 to 42.0) | 41.0 (40.0 to 42.0) |" in printed
    assert "| ours, dp | 0.0100 | 0.0100 |" in printed
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.json"]
    rows = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert [(r["method"], r["bits"], r["seeds"]) for r in rows] == [
        (SHARED, "w4a4", [0, 1]),
        (SHARED, "w8a8", [0, 1]),
        (OURS, "w4a4", [0, 1]),
        (OURS, "w8a8", [0, 1]),
    ]


def test_tables_of_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="wanted results of benchmarks/accuracy.py"):
        accuracy_tables.read(tmp_path)


def test_results_of_other_families_alone_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_cell(tmp_path / "out", "dp")
    with pytest.raises(SystemExit, match=r"wanted results of guided in .*, got ours, dp"):
        command(monkeypatch, tmp_path / "out", "--families", "guided")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_seed": 5}, "differ in the seed alone, a.json and b.json differ in image_seed"),
        ({"guidance": 3.0}, "a.json and b.json differ in guidance"),
        ({"config": {"grouping": "shared", "seed": 1, "new": 2}}, "b.json differ in grouping, new"),
        ({"seed": 0}, "each seed of 'ours, dp' once, got 0 in a.json and b.json"),
    ],
)
def test_results_that_are_no_seeds_of_one_method_have_no_mean(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_cell(tmp_path, "a")
    write_cell(tmp_path, "b", **{"seed": 1, **changes})
    with pytest.raises(SystemExit, match=message):
        accuracy_tables.rows(accuracy_tables.read(tmp_path), {OURS})


def test_results_of_a_method_that_has_another_name_now_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cell(tmp_path, "a")
    write_cell(tmp_path, "b", method="ours, as it was called")
    command(monkeypatch, tmp_path)
    out, err = capsys.readouterr()
    assert "| ours, dp | 30.0 |" in out
    assert err == "accuracy_tables: left out, as no family has it: ours, as it was called\n"


def test_lpips_of_some_seeds_is_no_mean_over_all(tmp_path: Path) -> None:
    write_cell(tmp_path, "a")
    write_cell(tmp_path, "b", seed=1, lpips=None)
    (row,) = accuracy_tables.rows(accuracy_tables.read(tmp_path), {OURS})
    assert (row.seeds, row.lpips) == ([0, 1], None)


def test_every_table_has_a_plot_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(accuracy_tables, "draw", lambda path, rows: drawn.append(path.name))
    write_cell(tmp_path / "out", "a")
    write_cell(tmp_path / "out", "b", model="other")
    command(monkeypatch, tmp_path / "out", "--plot", tmp_path)
    assert drawn == ["accuracy-other.svg", "accuracy-tiny.svg"]
    write_cell(tmp_path / "out", "c", num_inference_steps=4)
    write_cell(tmp_path / "out", "d", num_images=8)
    write_cell(tmp_path / "out", "e", checkpoint="11ff")
    drawn.clear()
    command(monkeypatch, tmp_path / "out", "--plot", tmp_path)
    assert sorted(drawn) == [
        "accuracy-other.svg",
        "accuracy-tiny-00ff-2-images-2-steps.svg",
        "accuracy-tiny-00ff-2-images-4-steps.svg",
        "accuracy-tiny-00ff-8-images-2-steps.svg",
        "accuracy-tiny-11ff-2-images-2-steps.svg",
    ]


@pytest.mark.parametrize("show", [accuracy_tables.psnr_words, accuracy_tables.lpips_words])
def test_rows_of_the_repository_give_the_documented_tables(
    show: Callable[[accuracy_tables.Row], str],
) -> None:
    page = (ROOT / "docs" / "accuracy.md").read_text().splitlines()
    wanted = {method.name for family in ("strategies", "guided") for method in FAMILIES[family]}
    names, latest = ("model", "method", "bits"), {}
    files = sorted(
        (ROOT / "benchmarks" / "results").glob("accuracy-*.json"), key=lambda file: file.stem[-10:]
    )
    for values in (row for file in files for row in json.loads(file.read_text()) if row["method"] in wanted):
        latest[tuple(values[name] for name in names)] = accuracy_tables.Row(**values)
    sections = accuracy_tables.by_model(list(latest.values()))
    models = ["ddpm-fashion-mnist-32", "dit-fashion-mnist-32", "sd-cifar10"]
    assert sorted(part[0].model for part in sections) == models
    for part in sections:
        text = accuracy_tables.table(part, show).replace(", guidance 3 |", " |")  # which the page says above
        assert set(text.splitlines()[2:]) <= set(page), part[0].model


def test_page_has_the_rows_of_the_shipped_text_to_image_model() -> None:
    page = (ROOT / "docs" / "accuracy.md").read_text().replace("**", "").splitlines()
    rows = json.loads((ROOT / "benchmarks" / "results" / "sd-cifar10-one-seed-2026-12-01.json").read_text())
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        words = f"{row['psnr_db'][0]:.1f} ({row['lpips'][0]:.4f})"
        found.setdefault(row["method"].removesuffix(", guidance 3"), {})[row["bits"]] = words
    assert len(found) == 4
    for method, by_bits in found.items():
        assert f"| {method} | {by_bits['w8a8']} | {by_bits['w6a6']} | {by_bits['w4a8']} |" in page


def test_page_has_the_rows_of_the_revised_search() -> None:
    page = (ROOT / "docs" / "accuracy.md").read_text()
    file = ROOT / "benchmarks" / "results" / "search-2026-11-30.json"
    means = {
        (row["method"], row["bits"]): f"{row['psnr_db'][0]:.1f} ({row['lpips'][0]:.4f})"
        for row in json.loads(file.read_text())
    }
    methods = ("dp groups", "search, kept always", "ours, dp", "ours, search")
    assert sorted(means) == sorted((method, bits) for method in methods for bits in ("w6a6", "w4a4"))
    for method in methods:
        assert f"| {method} | {means[method, 'w6a6']} | {means[method, 'w4a4']} |" in page.splitlines()


def test_page_has_the_rows_of_rotated_channels() -> None:
    page = (ROOT / "docs" / "accuracy.md").read_text().splitlines()
    models = {
        "dit-fashion-mnist-32": "transformer",
        "ddpm-fashion-mnist-32": "demo U-Net",
        "sd-cifar10": "`sd-cifar10`, guidance 3",
    }
    file = ROOT / "benchmarks" / "results" / "rotations-2026-11-30.json"
    cells: dict[tuple[str, str], list[str]] = {}
    for row in sorted(json.loads(file.read_text()), key=lambda row: "rotated" in row["method"]):
        mean, low, high = (f"{value:.1f}" for value in row["psnr_db"])
        words = mean if low == high else f"{mean} ({low} to {high})"
        cells.setdefault((models[row["model"]], row["bits"].upper()), []).append(words)
    assert len(cells) >= 8
    for (model, bits), words in cells.items():
        assert "| {} | {} | {} |".format(f"{model}, {bits}", *words) in page
