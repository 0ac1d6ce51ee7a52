"""The GPU benchmarks as far as they run without one: their calls on the CPU, their sums on planted times."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
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


def write_peaks(folder: Path, wgmma: float | None, mma: float) -> Path:
    """A file of gpu_peaks.py with the int8 rates of "a card"."""
    path = folder / "peaks.json"
    path.write_text(json.dumps({"device": "a card", "mma_s8_TOPS": mma, "wgmma_s8_TOPS": wgmma}))
    return path


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
        if "torch copy" in calls:
            assert 2 * calls["torch copy"]().nbytes == num_bytes, "read and written, as the rate counts them"
        for call in calls.values():
            assert call() is not None


def test_every_layer_suits_packed_activations(kernels: ModuleType) -> None:
    for layers in kernels.LAYERS.values():
        assert all(layer.channels % 32 == 0 for layer in layers)


def test_rates_and_ratios(kernels: ModuleType) -> None:
    timing = importlib.import_module("gpu_timing")
    samples = [{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 8.0}, {"a": 4.0, "b": 12.0}]
    assert timing.summarize(samples, "a")["b"] == timing.Timing(8.0, 3.0, (2.5, 3.5))
    assert timing.summarize(samples, "c")["b"] == timing.Timing(8.0, None, None), "the first one failed"
    rows = kernels.rows_of("w", {"a": timing.Timing(2.0, 1.0, None)}, 1e-6 * 4e9, "TOP/s")
    assert rows[0].rate == pytest.approx(4e9 / 2e-6 / 1e12)


@pytest.mark.parametrize("in_first_sample", [False, True])
def test_a_contestant_that_raises_is_left_out_with_its_reason(
    kernels: ModuleType, capsys: pytest.CaptureFixture[str], in_first_sample: bool
) -> None:
    timing = importlib.import_module("gpu_timing")

    class Clock:
        def __init__(self, planted: float | None) -> None:
            self.planted = planted
            if not in_first_sample:
                self.microseconds()

        def microseconds(self) -> float:
            if self.planted is None:
                raise NotImplementedError("no kernel for this card\nand more")
            return self.planted

    times = {"a": 2.0, "b": None, "c": 3.0}
    timings = timing.race({name: partial(Clock, us) for name, us in times.items()}, 20)
    assert list(timings) == ["a", "b", "c"]
    assert timings["b"] == timing.Failed("NotImplementedError: no kernel for this card")
    assert timings["c"] == timing.Timing(3.0, 1.5, (1.5, 1.5))
    assert "Traceback" in capsys.readouterr().err
    assert all(isinstance(t, timing.Failed) for t in timing.race({"b": partial(Clock, None)}, 20).values())


def test_calls_from_python_fill_a_sample(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = importlib.import_module("gpu_timing")
    counts: list[int] = []

    def elapsed(call: Any, calls: int = 1) -> float:
        counts.append(calls)
        return 4000.0 * calls

    monkeypatch.setattr(timing, "elapsed_microseconds", elapsed)
    assert timing.Called(lambda: None).microseconds() == 4000.0
    assert counts == [1, round(timing.SAMPLE_MICROSECONDS / 4000)]


def test_kernels_are_written_with_machine_and_settings(
    kernels: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(kernels, "MAPS", [])
    monkeypatch.setattr(kernels, "LAYERS", {"tiny": [SimpleNamespace(name="layer")]})
    monkeypatch.setattr(kernels, "PEAKS", write_peaks(tmp_path, 8.0, 6.0))
    row = kernels.Row("w", "W8A8", 2.0, 1.0, 3.0, "TOP/s")
    monkeypatch.setattr(kernels, "layer_rows", lambda layer, rounds, peak: [kernels.with_share(row, peak)])
    path = tmp_path / "new" / "kernels.json"
    monkeypatch.setattr("sys.argv", ["bench_gpu_kernels", "--json", str(path)])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        kernels.main()
    result = json.loads(path.read_text())
    assert {"gpu", "commit", "torch"} <= set(result["machine"])
    peaks = {"instruction": "wgmma", "tops": 8.0}
    assert result["settings"] == {"models": ["tiny"], "rounds": 25, "peaks": peaks, "device": "a card"}
    assert [(r["rate"], r["share_of_peak"]) for r in result["rows"]] == [(3.0, 0.375)]
    assert "share of 8.0 TOP/s, the int8 rate of wgmma" in capsys.readouterr().out


@pytest.fixture
def pieces(kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """bench_gpu_kernels.py set to measure one linear layer and one map with a planted time; its JSON file."""
    layers, timing = (importlib.import_module(name) for name in ("gpu_layers", "gpu_timing"))

    def compare(calls: dict[str, Any], rounds: int) -> dict[str, Any]:
        planted = {name: timing.Timing(2.0, 1.0, None) for name in calls}
        return (
            planted | {"torch._int_mm": timing.Failed("RuntimeError: none")} if "W8A8" in calls else planted
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(kernels, "LAYERS", {"tiny": [layers.Linear(20, 32, 32)]})
    monkeypatch.setattr(kernels, "MAPS", [(1, 32, 4)])
    monkeypatch.setattr(kernels, "PEAKS", write_peaks(tmp_path, 8.0, 6.0))
    monkeypatch.setattr(kernels, "compare", compare)
    monkeypatch.setattr("sys.argv", ["bench_gpu_kernels", "--json", str(tmp_path / "kernels.json")])
    return tmp_path / "kernels.json"


def test_kernels_name_a_contestant_that_failed(
    kernels: ModuleType, pieces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "bench_gpu_kernels: failed: torch._int_mm on linear 20x32->32"
    with torch.no_grad(), torch.random.fork_rng(devices=[]), pytest.raises(SystemExit, match=message):
        kernels.main()
    rows = json.loads(pieces.read_text())["rows"]
    assert rows[4] == {
        "work": "linear 20x32->32",
        "contestant": "torch._int_mm",
        "failed": "RuntimeError: none",
    }
    assert [row["microseconds"] for row in rows[:4] + rows[5:]] == [2.0] * (len(rows) - 1)
    assert "torch._int_mm          failed: RuntimeError: none" in capsys.readouterr().out


def test_kernels_are_written_after_every_piece_layers_first(
    kernels: ModuleType, pieces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*shape: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "map_calls", stopped)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), pytest.raises(KeyboardInterrupt):
        kernels.main()
    assert {row["work"] for row in json.loads(pieces.read_text())["rows"]} == {"linear 20x32->32"}


def test_shares_are_of_the_largest_rate_that_the_card_has(kernels: ModuleType, tmp_path: Path) -> None:
    for wgmma, mma, peak in (
        (8.0, 6.0, kernels.Peak("wgmma", 8.0)),
        (5.0, 6.0, kernels.Peak("mma.sync", 6.0)),
        (None, 6.0, kernels.Peak("mma.sync", 6.0)),
    ):
        assert kernels.read_peak(write_peaks(tmp_path, wgmma, mma), "a card") == peak


def test_peaks_of_another_card_or_without_wgmma_are_refused(kernels: ModuleType, tmp_path: Path) -> None:
    path = write_peaks(tmp_path, None, 6.0)
    with pytest.raises(ValueError, match="wanted rates of a tower, got those of a card in .*peaks.json"):
        kernels.read_peak(path, "a tower")
    path.write_text(json.dumps({"device": "a card", "mma_s8_TOPS": 6.0}))
    with pytest.raises(ValueError, match=r"wanted wgmma_s8_TOPS, found none in .*: run gpu_peaks.py again"):
        kernels.read_peak(path, "a card")


def test_only_int8_products_of_tensor_cores_have_a_share(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = importlib.import_module("gpu_layers")
    timing = importlib.import_module("gpu_timing")
    monkeypatch.setattr(
        kernels, "compare", lambda calls, rounds: {name: timing.Timing(2.0, 1.0, None) for name in calls}
    )
    linear = layers.Linear(20, 32, 32)
    rows = kernels.layer_rows(linear, 25, kernels.Peak("mma.sync", 0.1))
    share = 1e-6 * linear.operations / 2.0 / 0.1
    assert {r.contestant: r.share_of_peak for r in rows} == {
        "W8A8": pytest.approx(share),
        "W4A8": pytest.approx(share),
        "W4A4": None,
        "torch bf16": None,
        "torch._int_mm": pytest.approx(share),
    }
    for layer, peak in ((linear, None), (layers.depthwise(2, 32, 8), kernels.Peak("mma.sync", 0.1))):
        assert {r.share_of_peak for r in kernels.layer_rows(layer, 25, peak)} == {None}


def test_peaks_say_what_the_card_lacks(
    kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = importlib.import_module("gpu_peaks")
    monkeypatch.setattr(peaks, "bf16_matmul_tflops", lambda size: 3.0)
    monkeypatch.setattr(peaks, "bf16_conv_tflops", lambda batch, channels, size: 2.0)
    rates = {"device": "a card", "mma_s8_TOPS": 6.0, "wgmma_s8_TOPS": None, "wgmma_s8_obstacle": "has none"}
    program = tmp_path / "adpdm_gpu_peaks"
    program.write_text(f"#!/bin/sh\necho '{json.dumps(rates)}'\n")
    program.chmod(0o755)
    path = tmp_path / "new" / "peaks.json"
    monkeypatch.setattr("sys.argv", ["gpu_peaks", str(program), "--json", str(path)])
    with torch.random.fork_rng(devices=[]):
        peaks.main()
    assert rates.items() <= json.loads(path.read_text()).items()
    assert kernels.read_peak(path, "a card") == kernels.Peak("mma.sync", 6.0)
    source = (ROOT / "benchmarks" / "cuda" / "peaks.cu").read_text()
    names = (ROOT / "benchmarks" / "cuda" / "peak_kernels.cu").read_text()
    assert "%s_TOPS" in source, "the program and bench_gpu_kernels agree on names"
    assert all(f'"{name.removesuffix("_TOPS")}"' in names for name in kernels.INT8_RATES)


def test_peaks_are_measured_while_the_extension_is_compiled(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name == "adpdm" or name.startswith("adpdm."):
            monkeypatch.setitem(sys.modules, name, None)
    for name in ("gpu_peaks", "gpu_timing", "unet_results"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert importlib.import_module("gpu_peaks").ROUNDS >= 20


@pytest.mark.parametrize(
    ("sms", "blocks_per_sm", "tile_cycles", "lone_cycles"),
    [(100, 3, 200, 320), (114, 1, 731, 731), (114, 3, 200, 320), (142, 1, 731, 731), (78, 1, 731, 731)],
)
def test_costs_are_found_again(
    sweep: ModuleType, sms: int, blocks_per_sm: int, tile_cycles: int, lone_cycles: int
) -> None:
    tile = sweep.Tile("mma", "a8w8", 64, 64, blocks_per_sm)
    block_cycles, megahertz = 2200, 1500.0

    def planted(tile: Any, rows: int, outputs: int, k_tiles: int) -> float:
        """The planner's model of an unsplit layer (csrc/cuda/planner.cpp)."""
        blocks = -(-rows // tile.rows) * -(-outputs // tile.outputs)
        per_sm = -(-blocks // sms)
        waves = -(-per_sm // tile.blocks_per_sm)
        cycles = k_tiles * max(per_sm * tile_cycles, waves * lone_cycles) + waves * block_cycles
        return float(cycles) / megahertz

    costs = [blocks_per_sm, tile_cycles, lone_cycles, block_cycles]
    assert sweep.measure_costs(tile, sms, megahertz, planted) == costs


def test_every_tile_of_the_table_is_swept(sweep: ModuleType) -> None:
    table = json.loads(sweep.TABLE.read_text())
    tiles = sweep.tiles_of(table, 90)
    assert {"mma:128x128", "wgmma:128x128", "wgmma:128x160", "wgmma:128x256"} <= {t.choice for t in tiles}
    assert {t.codes_per_k_tile for t in tiles if t.core == "wgmma"} == {128}
    assert {t.core for t in sweep.tiles_of(table, 86)} == {"mma"}


def test_later_devices_are_not_asked_for_wgmma(sweep: ModuleType) -> None:
    table = json.loads(sweep.TABLE.read_text())
    assert {t.core for t in sweep.tiles_of(table, 100)} == {"mma"}
    new = sweep.replace_rows(table, 100, {"mma": {"a8w8": {}}}, "measured")
    entries = {entry["arch"]: entry for entry in new["architectures"]}
    assert entries[100] == {"arch": 100, "origin": "measured", "mma": {"a8w8": {}}}
    planner = (ROOT / "csrc" / "cuda" / "planner.cpp").read_text()
    assert f"request.wgmma && device.arch == {sweep.WGMMA_ARCH}" in planner


def test_planner_is_judged_against_the_best_tile(sweep: ModuleType) -> None:
    layers = importlib.import_module("gpu_layers")
    tiles = [
        sweep.Tile("mma", "a8w8", 64, 64, 3),
        sweep.Tile("wgmma", "a8w8", 128, 128, 1),
        sweep.Tile("mma", "a8w4", 64, 64, 3),
    ]

    order: list[str | None] = []

    class Clock:
        """The card gets slower and slower: by turns all choices lose as much by it."""

        def __init__(self, call: Any) -> None:
            self.tile = os.environ.get("ADPDM_CUDA_TILE")

        def microseconds(self) -> float:
            order.append(self.tile)
            return {"wgmma:128x128/4": 5.0, None: 6.0}.get(self.tile, 9.0) + order.count(self.tile)

    choice = sweep.judge_planner(layers.Linear(20, 32, 32), "a8w8", tiles, Clock)
    middle = (sweep.ROUNDS + 1) / 2
    assert (choice.best_choice, choice.best) == ("wgmma:128x128/4", 5.0 + middle)
    assert choice.microseconds == 6.0 + middle
    assert order[0] is None
    assert order[: len(set(order))] == order[-len(set(order)) :]
    assert len(order) == sweep.ROUNDS * len(set(order))
    assert choice.loss == pytest.approx(1 / (5.0 + middle))
    assert choice.wrong == []
    assert "ADPDM_CUDA_TILE" not in os.environ


class Constant:
    """The clock of a call that takes two microseconds."""

    def __init__(self, call: Any) -> None:
        pass

    def microseconds(self) -> float:
        return 2.0


def test_sweep_names_a_choice_with_other_results_and_saves_it(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = importlib.import_module("gpu_layers")
    tile = sweep.Tile("mma", "a8w8", 64, 64, 3)
    seen: list[str | None] = []

    def call() -> torch.Tensor:
        """Another result at the last look at one number of splits, as a race would have."""
        seen.append(os.environ.get("ADPDM_CUDA_TILE"))
        is_wrong = seen.count("mma:64x64/4") == sweep.CHECKS and seen[-1] == "mma:64x64/4"
        return torch.tensor([1.0, 2.0 + is_wrong])

    monkeypatch.setattr(sweep, "linear_calls", lambda layer: {"W8A8": call})
    monkeypatch.setattr(sweep, "measure_costs", lambda tile, num_sms, megahertz: [3, 1, 1, 1])
    monkeypatch.setattr(sweep, "judge_planner", partial(sweep.judge_planner, clock=Constant))
    found = sweep.Sweep(90, "measured", tmp_path / "tiles.json")
    found.measure_tiles([tile], 132, 1980.0)
    before = json.loads(found.path.read_text())
    assert before == {
        "arch": 90,
        "origin": "measured",
        "mma": {"a8w8": {"64x64": [3, 1, 1, 1]}},
        "choices": [],
    }
    found.judge_layers([layers.Linear(20, 32, 32)], [tile])
    assert json.loads(found.path.read_text())["choices"][0]["wrong"] == ["mma:64x64/4"]
    assert str(found.choices[0]).endswith("loss   0.0%, other results than planned: mma:64x64/4")


@pytest.fixture
def swept(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """sweep_tiles.py on "a card" on which there is nothing to measure."""

    class Properties:
        name, multi_processor_count = "a card", 132

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(sweep, "clock_megahertz", lambda: 1980.0)
    monkeypatch.setattr(sweep.Sweep, "measure_tiles", lambda *args: None)
    monkeypatch.setattr(sweep.Sweep, "judge_layers", lambda *args: None)
    return sweep


def test_sweep_fails_where_a_choice_has_other_results(
    swept: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge_layers(self: Any, layers: list[Any], tiles: list[Any]) -> None:
        self.choices.append(swept.Choice("a layer", "a8w8", 2.0, 2.0, "mma:64x64/1", ["mma:64x64/4"]))

    monkeypatch.setattr(swept.Sweep, "judge_layers", judge_layers)
    monkeypatch.setattr("sys.argv", ["sweep_tiles"])
    message = "sweep_tiles: other results than planned: a layer a8w8 mma:64x64/4"
    with torch.no_grad(), torch.random.fork_rng(devices=[]), pytest.raises(SystemExit, match=message):
        swept.main()


def test_a_table_that_cannot_be_written_is_what_it_was(
    swept: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.json"
    table.write_text(swept.TABLE.read_text())

    def fail(self: Path, text: str) -> None:
        self.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", fail)
    monkeypatch.setattr("sys.argv", ["sweep_tiles", "--table", str(table)])
    with torch.no_grad(), torch.random.fork_rng(devices=[]), pytest.raises(OSError, match="no space left"):
        swept.main()
    assert [path.read_text() for path in tmp_path.iterdir()] == [swept.TABLE.read_text()]


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


def test_sources_that_benchmarks_name_exist() -> None:
    texts = [*(ROOT / "benchmarks").glob("*.py"), ROOT / "tools" / "tile_table.json", Path(__file__)]
    named = {name for text in texts for name in re.findall(r"csrc/[\w/]+\.\w+", text.read_text())}
    assert "csrc/cuda/planner.cpp" in named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_benchmarks_refuse_to_run_without_a_gpu(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name in ("sweep_tiles", "bench_gpu_kernels", "bench_gpu_unets"):
        monkeypatch.setattr("sys.argv", [name])
        with pytest.raises(SystemExit, match="wanted a CUDA device, found none"):
            importlib.import_module(name).main()
