"""The GPU benchmarks as far as they run without one: their calls on the CPU, their sums on planted times."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench_gpu_kernels.py with its tensors on the CPU."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("bench_gpu_kernels")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    return module


@pytest.fixture
def sweep(kernels: ModuleType) -> ModuleType:
    return importlib.import_module("sweep_tiles")


def test_layer_contestants_compute_the_same_shape(kernels: ModuleType) -> None:
    layers = importlib.import_module("gpu_layers")
    for layer, shape in (
        (layers.Conv(1, 32, 8, 32, 3, 2), (1, 32, 4, 4)),
        (layers.depthwise(2, 32, 8), (2, 32, 8, 8)),
        (layers.Linear(20, 32, 32), (20, 32)),
    ):
        calls = kernels.conv_calls(layer) if isinstance(layer, layers.Conv) else kernels.linear_calls(layer)
        assert next(iter(calls)) == "W8A8", "ratios are to the first"
        assert {name: tuple(call().shape) for name, call in calls.items()} == dict.fromkeys(calls, shape)


def test_map_contestants_run(kernels: ModuleType) -> None:
    for work, (calls, num_bytes) in kernels.map_calls(1, 32, 4).items():
        assert next(iter(calls)) == "ours", work
        assert num_bytes >= 3 * 32 * 16
        for call in calls.values():
            assert call() is not None


def test_every_layer_suits_packed_activations(kernels: ModuleType) -> None:
    for layers in kernels.LAYERS.values():
        assert all(layer.channels % 32 == 0 for layer in layers)


def test_rates_and_ratios(kernels: ModuleType) -> None:
    timing = importlib.import_module("gpu_timing")
    samples = [{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 8.0}, {"a": 4.0, "b": 12.0}]
    summary = timing.summarize(samples)
    assert summary["b"] == timing.Timing(8.0, 3.0)
    rows = kernels.rows_of("w", {"a": timing.Timing(2.0, 1.0)}, 1e-6 * 4e9, "TOP/s")
    assert rows[0].rate == pytest.approx(4e9 / 2e-6 / 1e12)


def test_kernels_are_written_with_machine_and_settings(
    kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(kernels, "MAPS", [])
    monkeypatch.setattr(kernels, "LAYERS", {"tiny": ["layer"]})
    row = kernels.Row("w", "W8A8", 2.0, 1.0, 3.0, "TOP/s")
    monkeypatch.setattr(kernels, "layer_rows", lambda layer, rounds: [row])
    path = tmp_path / "new" / "kernels.json"
    monkeypatch.setattr("sys.argv", ["bench_gpu_kernels", "--json", str(path)])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        kernels.main()
    result = json.loads(path.read_text())
    assert {"gpu", "commit", "torch"} <= set(result["machine"])
    assert result["settings"] == {"models": ["tiny"], "rounds": 25, "device": "a card"}
    assert [r["rate"] for r in result["rows"]] == [3.0]


def test_costs_are_found_again(sweep: ModuleType) -> None:
    tile = sweep.Tile("mma", "a8w8", 64, 64, 3)
    tile_cycles, lone_cycles, block_cycles, sms, megahertz = 200, 320, 2200, 100, 1500.0

    def planted(tile: Any, rows: int, outputs: int, k_tiles: int) -> float:
        """The planner's model of an unsplit layer (csrc/cuda/planner.cu)."""
        blocks = -(-rows // tile.rows) * -(-outputs // tile.outputs)
        per_sm = -(-blocks // sms)
        waves = -(-per_sm // tile.blocks_per_sm)
        cycles = k_tiles * max(per_sm * tile_cycles, waves * lone_cycles) + waves * block_cycles
        return float(cycles) / megahertz

    assert sweep.measure_costs(tile, sms, megahertz, planted) == [3, tile_cycles, lone_cycles, block_cycles]


def test_every_tile_of_the_table_is_swept(sweep: ModuleType) -> None:
    table = json.loads(sweep.TABLE.read_text())
    tiles = sweep.tiles_of(sweep.architecture_of(table, 90))
    assert {"mma:128x128", "wgmma:128x128", "wgmma:128x160", "wgmma:128x256"} <= {t.choice for t in tiles}
    assert {t.codes_per_k_tile for t in tiles if t.core == "wgmma"} == {128}
    assert {t.core for t in sweep.tiles_of(sweep.architecture_of(table, 86))} == {"mma"}


def test_planner_is_judged_against_the_best_tile(sweep: ModuleType) -> None:
    layers = importlib.import_module("gpu_layers")
    tiles = [
        sweep.Tile("mma", "a8w8", 64, 64, 3),
        sweep.Tile("wgmma", "a8w8", 128, 128, 1),
        sweep.Tile("mma", "a8w4", 64, 64, 3),
    ]

    def time(call: Any) -> float:
        return {"wgmma:128x128/4": 5.0, None: 6.0}.get(os.environ.get("ADPDM_CUDA_TILE"), 9.0)

    choice = sweep.judge_planner(layers.Linear(20, 32, 32), "a8w8", tiles, time)
    assert (choice.best_choice, choice.best, choice.microseconds) == ("wgmma:128x128/4", 5.0, 6.0)
    assert choice.loss == pytest.approx(0.2)
    assert "ADPDM_CUDA_TILE" not in os.environ


def test_measured_rows_replace_only_their_architecture(sweep: ModuleType) -> None:
    table = {
        "comment": "c",
        "architectures": [
            {"arch": 80, "origin": "model", "mma": 1},
            {"arch": 90, "origin": "model", "mma": 2},
        ],
    }
    new = sweep.replace_rows(table, 86, {"mma": {"a8w8": {}}}, "measured")
    assert [(e["arch"], e["origin"], e["mma"]) for e in new["architectures"]] == [
        (80, "model", 1),
        (86, "measured", {"a8w8": {}}),
        (90, "model", 2),
    ]
    again = sweep.replace_rows(new, 86, {"mma": {"a8w4": {}}, "wgmma": {}}, "measured again")
    assert [e["arch"] for e in again["architectures"]] == [80, 86, 90]
    assert again["architectures"][1]["wgmma"] == {}
    with pytest.raises(SystemExit, match="architecture 80 or later, got 75"):
        sweep.architecture_of(table, 75)


def test_benchmarks_refuse_to_run_without_a_gpu(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name in ("sweep_tiles", "bench_gpu_kernels"):
        monkeypatch.setattr("sys.argv", [name])
        with pytest.raises(SystemExit, match="wanted a CUDA device, found none"):
            importlib.import_module(name).main()
