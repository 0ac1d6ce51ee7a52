"""tools/gpu_run.py without a GPU: the order of stages, what is continued, what a failure looks like."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import gpu_stages
import pytest

ROOT = Path(__file__).parents[1]
CARD = {"sources": "some", "device": "card"}  # what a state is of


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
    seen = set() if gpu_stages.has_googletest() else {"googletest"}
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
    assert set(gpu_stages.SANITIZED) <= found
    assert not any(name.startswith("Planner") for name in gpu_stages.SANITIZED)
    kinds = ("Conv2d", "Wgmma", "Linear", "Norm", "Quantize.", "FakeQuantize", "Observe", "PackWeight")
    assert all(any(kind in name for name in gpu_stages.SANITIZED) for kind in kinds)
    commands = gpu_run.make_stages("python", "90a", 2)["sanitize"].commands
    assert [command[2] for command in commands] == ["memcheck", "racecheck", "synccheck"]
    assert all(command[-1] == f"--gtest_filter={':'.join(gpu_stages.SANITIZED)}" for command in commands)


def test_without_googletest_the_extension_is_built_and_programs_are_skipped(
    gpu_run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_stages, "has_googletest", lambda: False)
    monkeypatch.setattr(gpu_stages, "is_prebuilt", lambda: False)
    stages = gpu_run.make_stages("python", "90a", 2)
    assert "-DADPDM_TESTS=OFF" in stages["build"].commands[0]
    assert [name for name, stage in stages.items() if "googletest" in stage.needs] == [
        "test-cpp",
        "sanitize",
        "peaks",
    ]
    assert stages["kernels"].needs == ("import",)


def test_googletest_may_lie_beside_the_state(
    gpu_run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "googletest").mkdir()
    monkeypatch.setattr(gpu_stages, "GOOGLETEST", tmp_path / "googletest")
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
    state = gpu_run.State(CARD)
    assert not gpu_run.StageRunner(state, 60, {}).run(stages)
    assert statuses(state) == {"quick": "passed", "long": "skipped", "broken": "failed", "after": "skipped"}
    assert "call again" in state.outcomes["long"].reason
    assert "exit code 1" in state.outcomes["broken"].reason
    assert "no such kernel" in gpu_run.tail(tmp_path / "broken.log")

    calls = []

    def runner(name: str, *rest: Any) -> Any:
        calls.append(name)
        return gpu_run.Outcome("passed", 0.0)

    again = gpu_run.State.load(tmp_path / "state.json", CARD)
    assert gpu_run.StageRunner(again, 2000, {}, runner).run(stages)
    assert calls == ["long", "broken", "after"]


@pytest.mark.parametrize("name", CARD)
def test_state_of_other_sources_or_another_card_does_not_count(
    gpu_run: ModuleType, tmp_path: Path, name: str
) -> None:
    state = gpu_run.State(CARD, {"build": gpu_run.Outcome("passed", 1.0)})
    state.save(tmp_path / "state.json")
    assert gpu_run.State.load(tmp_path / "state.json", CARD).passed("build")
    assert not gpu_run.State.load(tmp_path / "state.json", {**CARD, name: "other"}).passed("build")


def write_file(path: Path, text: str) -> tuple[str, ...]:
    """A command that leaves such a file."""
    return python(f"open({str(path)!r}, 'w').write({text!r})")


def test_results_are_of_all_calls_for_these_sources_and_of_no_others(
    gpu_run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, facts = dict(CARD), {"device": "A Card", "arch": "90a", "date": "2026-01-02", "missing": ["cmake"]}
    stages = {
        name: gpu_run.Stage((write_file(tmp_path / f"{name}.json", name[-1]),), 1, result=f"{name}.json")
        for name in ("stage1", "stage2")
    }
    for name, value in {
        "check_prebuilt": lambda root: None,
        "gather_facts": lambda: dict(facts),
        "made_of": lambda root, facts: dict(of),
        "make_stages": lambda *rest: stages,
    }.items():
        monkeypatch.setattr(gpu_run, name, value)

    monkeypatch.setattr(sys, "argv", ["gpu_run.py"])
    with pytest.raises(SystemExit, match="found no cmake; nothing was run"):
        gpu_run.main()

    def call(*options: str) -> dict[str, Any]:
        options = ("--incomplete", *options)
        monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--results", str(tmp_path / "results"), *options])
        gpu_run.main()
        written = json.loads((tmp_path / "results" / f"a-card-{facts['date']}.json").read_text())
        dates = {name: outcome["facts"]["date"] for name, outcome in written["outcomes"].items()}
        return {"measured": written["measured"], "partial": written["partial"], "dates": dates}

    expected = {"stage1": 1, "stage2": 2}
    assert call()["measured"] == expected
    facts["date"] = "2026-01-03"
    dates = {"stage1": "2026-01-02", "stage2": "2026-01-03"}
    assert call("--stages", "stage2", "--again") == {"measured": expected, "partial": {}, "dates": dates}
    of["sources"] = "other"
    found = call("--stages", "stage2", "--seconds", "0")
    assert found == {"measured": {}, "partial": {}, "dates": {"stage2": "2026-01-03"}}
    assert not (tmp_path / "stage1.json").exists()
    assert not (tmp_path / "stage1.log").exists()
    (tmp_path / "stage1.json").write_text("3")  # of whatever: it is not run here
    assert call("--given", "stage1")["measured"] == {"stage2": 2}


def test_stage_without_time_keeps_what_it_measured_before_it_failed(
    gpu_run: ModuleType, tmp_path: Path
) -> None:
    commands = (write_file(tmp_path / "s.json", "1"), python("raise SystemExit(1)"))
    stages = {"s": gpu_run.Stage(commands, 1, result="s.json"), "t": gpu_run.Stage((), 1, result="t.json")}
    (tmp_path / "t.json").write_text("2")  # of whatever: this stage never runs
    state = gpu_run.State(CARD)
    for seconds, date in ((60, "2026-01-02"), (0, "2026-01-03")):
        facts = {"date": date, "device": "card"}
        chosen = stages if seconds == 0 else {"s": stages["s"]}
        assert not gpu_run.StageRunner(state, seconds, {}, facts=facts).run(chosen)
    written = json.loads(gpu_run.write_results(stages, state, tmp_path / "results", facts).read_text())
    assert (written["partial"], written["measured"]) == ({"s": 1}, {})
    assert written["outcomes"]["s"]["facts"]["date"] == "2026-01-02"


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


def test_what_a_stopped_command_has_started_is_stopped_too(gpu_run: ModuleType, tmp_path: Path) -> None:
    sleeper = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; "
    sleeper += "time.sleep(60)']); print(p.pid, flush=True); time.sleep(60)"
    outcome = gpu_run.run_stage("s", gpu_run.Stage((python(sleeper),), 1, limit=2), {}, 60)
    assert "stopped after its time" in outcome.reason
    grandchild = int((tmp_path / "s.log").read_text().splitlines()[1])
    deadline = time.monotonic() + 10
    while is_running(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(grandchild)


def is_running(process: int) -> bool:
    """Whether a process lives; one that nobody waited for has ended all the same."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_interrupt_stops_what_runs_and_tells_what_it_had_measured(
    gpu_run: ModuleType, tmp_path: Path
) -> None:
    write = f"open({str(tmp_path / 'long.json')!r}, 'w').write('[1]'); import time; time.sleep(60)"
    stages = {
        "long": gpu_run.Stage((python(write),), 1, result="long.json", beside=True),
        "short": gpu_run.Stage((python("pass"),), 1),
    }
    state = gpu_run.State(CARD)
    written: list[Any] = []

    def after() -> None:
        path = gpu_run.write_results(stages, state, tmp_path, {"date": "2026-01-02", "device": "card"})
        written.append(json.loads(path.read_text())["partial"])
        if len(written) == 1:
            while not (tmp_path / "long.json").exists():
                time.sleep(0.05)
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        gpu_run.StageRunner(state, 100, {}, after=after).run(stages)
    assert time.monotonic() - started < 30
    assert not gpu_run.RUNNING
    assert written == [{}, {"long": [1]}]


def test_commands_that_run_together_are_all_waited_for(gpu_run: ModuleType, tmp_path: Path) -> None:
    commands = (python("raise SystemExit('first')"), python("print('second')"), ("no-such-program",))
    outcome = gpu_run.run_stage("s", gpu_run.Stage(commands, 1, together=True), {}, 60)
    assert "exit code 1" in outcome.reason
    assert "wanted the program no-such-program, found none" in outcome.reason
    log = (tmp_path / "s.log").read_text()
    assert "first\n" in log
    assert "second\n" in log


def test_stage_beside_others_is_met_by_who_needs_it(gpu_run: ModuleType) -> None:
    order: list[str] = []
    is_built = threading.Event()

    def runner(name: str, *rest: Any) -> Any:
        if name == "build":
            is_built.wait(30)
        order.append(name)
        if name == "tests":
            is_built.set()
        return gpu_run.Outcome("passed", 0.0)

    stages = {
        "build": gpu_run.Stage((), 1, beside=True),
        "tests": gpu_run.Stage((), 1),
        "kernels": gpu_run.Stage((), 1, ("build",)),
    }
    assert gpu_run.StageRunner(gpu_run.State(CARD), 100, {}, runner).run(stages)
    assert order == ["tests", "build", "kernels"]


def test_processes_stay_in_this_session(gpu_run: ModuleType, tmp_path: Path) -> None:
    """Who started it and kills it by its session reaches all of it."""
    gpu_run.run_stage(
        "s", gpu_run.Stage((python("import os; print(os.getsid(0), os.getpgid(0))"),), 1), {}, 60
    )
    session, group = map(int, (tmp_path / "s.log").read_text().splitlines()[1].split())
    assert session == os.getsid(0)
    assert group != os.getpgid(0)


def test_results_that_cannot_be_written_stop_no_stage(
    gpu_run: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def after() -> None:
        raise OSError("no space left")

    stages = {name: gpu_run.Stage((python("pass"),), 1) for name in ("one", "two")}
    state = gpu_run.State(CARD)
    assert gpu_run.StageRunner(state, 100, {}, after=after).run(stages)
    assert "results cannot be written: no space left" in capsys.readouterr().out


def test_missing_program_is_named(gpu_run: ModuleType) -> None:
    outcome = gpu_run.run_stage("s", gpu_run.Stage((("no-such-program",),), 1), {}, 60)
    assert outcome.reason == "wanted the program no-such-program, found none"


def test_results_tell_stages_that_passed_from_others(gpu_run: ModuleType, tmp_path: Path) -> None:
    stages = {name: gpu_run.Stage((), 1, (), f"{name}.json") for name in ("good", "bad")}
    for name in stages:
        (tmp_path / f"{name}.json").write_text(json.dumps({"TOPS": 1}))
    state = gpu_run.State(CARD)
    state.outcomes = {"good": gpu_run.Outcome("passed", 1.0), "bad": gpu_run.Outcome("failed", 1.0, "why")}
    facts = {"date": "2026-01-02", "device": "NVIDIA H200 80GB"}
    path = gpu_run.write_results(stages, state, tmp_path / "results", facts)
    assert path.name == "nvidia-h200-80gb-2026-01-02.json"
    written = json.loads(path.read_text())
    assert (written["measured"], written["partial"]) == ({"good": {"TOPS": 1}}, {"bad": {"TOPS": 1}})
    assert path.with_name(f"{path.stem}-logs.tar.gz").is_file()
    assert written["outcomes"]["bad"]["reason"] == "why"
