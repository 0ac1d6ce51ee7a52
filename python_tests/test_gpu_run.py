"""tools/gpu_run.py without a GPU: the order of stages, what is continued, what a failure looks like."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module that keeps its state in a temporary folder."""
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "tools" / "gpu_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_run", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STATE", tmp_path)
    return module


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def statuses(state: Any) -> dict[str, str]:
    return {name: outcome.status for name, outcome in state.outcomes.items()}


def test_stages_need_only_earlier_stages(gpu_run: ModuleType) -> None:
    seen: set[str] = set()
    for name, stage in gpu_run.make_stages("python", "90a", 2).items():
        assert set(stage.needs) <= seen, name
        seen.add(name)


def test_stages_run_scripts_that_exist(gpu_run: ModuleType) -> None:
    for name, stage in gpu_run.make_stages("python", "90a", 2).items():
        for command in stage.commands:
            for word in command:
                if word.endswith(".py"):
                    assert (ROOT / word).is_file(), f"stage {name}: {word}"


def test_sanitizer_runs_tests_that_are_there_and_launch_kernels(gpu_run: ModuleType) -> None:
    sources = {file: file.read_text() for file in (ROOT / "cpp_tests" / "cuda").glob("*.c*")}
    found = {
        f"{suite}.{name}"
        for text in sources.values()
        for suite, name in re.findall(r"^TEST(?:_[FP])?\((\w+), (\w+)\)", text, re.MULTILINE)
    }
    assert set(gpu_run.SANITIZED) <= found
    assert not any(name.startswith("Planner") for name in gpu_run.SANITIZED)
    kinds = ("Conv2d", "Wgmma", "Linear", "Norm", "Quantize.", "FakeQuantize", "Observe", "PackWeight")
    assert all(any(kind in name for name in gpu_run.SANITIZED) for kind in kinds)
    commands = gpu_run.make_stages("python", "90a", 2)["sanitize"].commands
    assert all(command[-1] == f"--gtest_filter={':'.join(gpu_run.SANITIZED)}" for command in commands)


def test_googletest_may_lie_beside_the_state(gpu_run: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "googletest").mkdir()
    gpu_run.GOOGLETEST = tmp_path / "googletest"
    configure = gpu_run.make_stages("python", "90a", 2)["build"].commands[0]
    assert configure[-1] == f"-DADPDM_GOOGLETEST={tmp_path / 'googletest'}"


def test_run_continues_where_the_last_call_ended(gpu_run: ModuleType, tmp_path: Path) -> None:
    stage = gpu_run.Stage
    stages = {
        "quick": stage((python("print('x')"),), 1),
        "long": stage((python("pass"),), 1000, ("quick",)),
        "broken": stage((python("raise SystemExit('no such kernel')"),), 1),
        "after": stage((python("pass"),), 1, ("broken",)),
    }
    state = gpu_run.State("sources", "card")
    assert not gpu_run.run_all(stages, state, 60, {})
    assert statuses(state) == {"quick": "passed", "long": "skipped", "broken": "failed", "after": "skipped"}
    assert "call again" in state.outcomes["long"].reason
    assert "exit code 1" in state.outcomes["broken"].reason
    assert "no such kernel" in gpu_run.tail(tmp_path / "broken.log")

    calls = []

    def runner(name: str, *rest: Any) -> Any:
        calls.append(name)
        return gpu_run.Outcome("passed", 0.0)

    again = gpu_run.State.load(tmp_path / "state.json", "sources", "card")
    assert gpu_run.run_all(stages, again, 2000, {}, runner)
    assert calls == ["long", "broken", "after"]


@pytest.mark.parametrize(("sources", "device"), [("other", "card"), ("sources", "other")])
def test_state_of_other_sources_or_another_card_does_not_count(
    gpu_run: ModuleType, tmp_path: Path, sources: str, device: str
) -> None:
    state = gpu_run.State("sources", "card", {"build": gpu_run.Outcome("passed", 1.0)})
    state.save(tmp_path / "state.json")
    assert gpu_run.State.load(tmp_path / "state.json", "sources", "card").passed("build")
    assert not gpu_run.State.load(tmp_path / "state.json", sources, device).passed("build")


def test_stage_without_its_result_fails_even_if_an_old_one_lies_there(
    gpu_run: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "result.json").write_text("{}")
    outcome = gpu_run.run_stage("s", gpu_run.Stage((python("pass"),), 1, (), "result.json"), {}, 60)
    assert outcome.status == "failed"
    assert "wanted the result result.json, found none" in outcome.reason


def test_stage_is_stopped_at_its_limit(gpu_run: ModuleType) -> None:
    outcome = gpu_run.run_stage("s", gpu_run.Stage((python("import time; time.sleep(60)"),), 1), {}, 1)
    assert outcome.status == "failed"
    assert "stopped after its time" in outcome.reason
    assert outcome.seconds < 30


def test_missing_program_is_named(gpu_run: ModuleType) -> None:
    outcome = gpu_run.run_stage("s", gpu_run.Stage((("no-such-program",),), 1), {}, 60)
    assert outcome.reason == "wanted the program no-such-program, found none"


def test_results_hold_only_stages_that_passed(gpu_run: ModuleType, tmp_path: Path) -> None:
    stages = {name: gpu_run.Stage((), 1, (), f"{name}.json") for name in ("good", "bad")}
    for name in stages:
        (tmp_path / f"{name}.json").write_text(json.dumps({"TOPS": 1}))
    state = gpu_run.State("sources", "NVIDIA H200 80GB")
    state.outcomes = {"good": gpu_run.Outcome("passed", 1.0), "bad": gpu_run.Outcome("failed", 1.0, "why")}
    path = gpu_run.write_results(stages, state, tmp_path / "results", {"date": "2026-01-02"})
    assert path.name == "nvidia-h200-80gb-2026-01-02.json"
    written = json.loads(path.read_text())
    assert written["measured"] == {"good": {"TOPS": 1}}
    assert written["outcomes"]["bad"]["reason"] == "why"


def test_sources_hash_changes_with_a_kernel(gpu_run: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    kernel = tmp_path / "csrc" / "a.cu"
    for name in ("CMakeLists.txt", "setup.py"):
        (tmp_path / name).write_text("")
    kernel.write_text("1")
    first = gpu_run.hash_sources(tmp_path)
    assert gpu_run.hash_sources(tmp_path) == first
    kernel.write_text("2")
    assert gpu_run.hash_sources(tmp_path) != first
