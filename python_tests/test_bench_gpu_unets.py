"""bench_gpu_unets.py with the CPU standing in for a GPU: who is timed, what is checked, what is written."""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
CONTESTANTS = [
    "torch-bf16-graph",
    "torch-bf16",
    "ours-w8a8-bf16",
    "ours-w8a8-bf16-graph",
    "ours-w4a8-bf16",
    "ours-w4a8-bf16-graph",
]


class Event:
    """A torch.cuda.Event of the wall clock."""

    def __init__(self, enable_timing: bool) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.seconds - self.seconds)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script on the CPU: torch's graph is its eager call, ours a recording of the CPU; short samples."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("bench_gpu_unets")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "cuda_graph", lambda call, example: call)
    monkeypatch.setattr(importlib.import_module("gpu_timing"), "SAMPLE_MICROSECONDS", 1.0)
    for name, value in {
        "is_available": lambda: True,
        "get_device_name": lambda: "a card",
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 140,
        "empty_cache": lambda: None,
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with torch.no_grad():  # the script disables gradients for good
        yield module


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def test_all_contestants_are_timed_and_checked(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "unets.json"
    bench.main(["--models", "tiny", "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["settings"] == {"models": ["tiny"], "batch": [2], "rounds": 20, "device": "a card"}
    rows = {row["contestant"]: row for row in result["rows"]}
    assert list(rows) == CONTESTANTS
    assert {(row["model"], row["batch"], row["failed"]) for row in rows.values()} == {("tiny", 2, None)}
    assert all(row["milliseconds"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert rows["torch-bf16-graph"]["ratio_quartiles"] == [1, 1]
    eager, graph = {"finite": True, "the same twice": True}, {"the same as eager": True}
    assert [row["checks"] for row in rows.values()] == [graph, {"finite": True}, eager, graph, eager, graph]
    weights = [rows[name]["weight_bytes"] for name in CONTESTANTS if "graph" not in name]
    assert weights[0] > weights[1] > weights[2], "W4A8 weighs least"
    assert rows["torch-bf16"]["forward_bytes"] == 40
    assert len(capsys.readouterr().out.splitlines()) == len(CONTESTANTS)


def test_a_contestant_that_fails_is_named_and_the_others_are_timed(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_graph(call: Callable[..., Any], example: list[torch.Tensor]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(bench, "cuda_graph", no_graph)
    path = tmp_path / "unets.json"
    with pytest.raises(SystemExit, match="torch-bf16-graph of tiny at batch 1 failed$"):
        bench.main(["--models", "tiny", "--batch", "1", "--json", str(path)])
    first, *others = rows_of(path)
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert (first["contestant"], first["failed"], first["milliseconds"]) == ("torch-bf16-graph", reason, None)
    assert [row["contestant"] for row in others] == CONTESTANTS[1:]
    assert all(row["milliseconds"] > 0 and row["ratio"] is None for row in others), "the first has no time"
    assert f"torch-bf16-graph     failed: {reason}" in capsys.readouterr().out


def test_a_graph_with_other_results_is_named(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(model: Any) -> Callable[..., Any]:
        return lambda sample, *args, **kwargs: (torch.zeros_like(sample),)

    monkeypatch.setattr(bench, "capture", capture)
    faults = [fault for row in bench.measure("tiny", 1, 20) for fault in row.faults]
    assert faults == [
        f"ours-w{bits}a8-bf16-graph of tiny at batch 1 not the same as eager" for bits in (8, 4)
    ]


def test_groups_follow_the_timestep(bench: ModuleType) -> None:
    model = bench.Ours("tiny", 1, 8)
    groups = []
    for timestep in (999, 666, 0):
        model.inputs[1].fill_(timestep)
        model.run()
        groups.append(set(model.model.get_submodule("adpdm_step").group_index.tolist()))
    assert groups == [{0}, {1}, {3}]


def test_json_is_there_after_the_first_case(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(name: str, batch: int, rounds: int) -> list[Any]:
        if batch == 2:
            raise KeyboardInterrupt
        return [bench.Row(name, batch, "torch-bf16", 1.0)]

    monkeypatch.setattr(bench, "measure", measure)
    path = tmp_path / "new" / "unets.json"
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--models", "tiny", "--batch", "1", "2", "--json", str(path)])
    assert [(row["batch"], row["milliseconds"]) for row in rows_of(path)] == [(1, 1.0)]


def test_contestants_have_the_names_of_bench_unet(bench: ModuleType) -> None:
    assert list(bench.contestants("tiny", 1)) == CONTESTANTS
    assert set(CONTESTANTS) <= set(importlib.import_module("contestants").REGISTRY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "sd3"], "model must be one of demo, .* got 'sd3'"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--rounds", "5"], "--rounds must be at least 20, got 5"),
    ],
)
def test_options_that_cannot_work_are_refused(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        bench.main(options)
    assert re.search(message, capsys.readouterr().err)
