"""The Makefile's commands and .ci/run, without running what they run: what is passed on, how CI ends."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="wanted make on PATH, found none")

# In place of make: the target that $FAILING names fails, and the sanitizers are the last to end.
MAKE = """#!/bin/sh
echo "made $1"
case $1 in
  "$FAILING") echo '1 failed, 2 passed in 1.00s'; exit 1;;
  sanitize) sleep ${SLOW:-0}; echo 'sanitized [  PASSED  ] 2 tests.';;
  test) echo '[  PASSED  ] 1 test.'; echo '==== 3 passed in 1.00s ====';;
esac
"""


def commands_of(target: str, **variables: str) -> list[str]:
    """What make would run, with nothing to install."""
    done = [f"-o{file}" for file in ("build/.installed", "build/.extractors", ".venv/.adpdm-dependencies")]
    words = [f"{name}={value}" for name, value in variables.items()]
    without = {name: text for name, text in os.environ.items() if not name.startswith(("ADPDM_", "MAKE"))}
    command = ["make", "-n", "VENV=.venv", *done, target, *words]
    found = subprocess.run(command, cwd=ROOT, env=without, capture_output=True, text=True, check=True)
    return found.stdout.replace("\\\n", "").splitlines()


@pytest.mark.parametrize("target", ["test-cpp", "lint"])
def test_core_is_configured_without_what_an_earlier_build_was_told_of_cuda(target: str) -> None:
    (configure,) = [line for line in commands_of(target) if line.startswith("cmake -G")]
    assert {"-UADPDM_CUDA", "-UADPDM_CUDA_ARCHS"} <= set(configure.split())
    given = {"ADPDM_CUDA": "1", "ADPDM_CUDA_ARCHS": "80-real;90a-real"}
    (configure,) = [line for line in commands_of(target, **given) if line.startswith("cmake -G")]
    assert {f"'-D{name}={value}'" for name, value in given.items()} <= set(configure.split())


def test_families_of_accuracy_are_measured_and_shown() -> None:
    measure, show = commands_of("accuracy", ACCURACY_FAMILIES="groups attention")[-2:]
    for command, script in ((measure, "accuracy.py"), (show, "accuracy_tables.py")):
        assert f"benchmarks/{script} " in command
        assert "--families groups attention" in command
    assert not any("--families" in command for command in commands_of("accuracy")), "scripts have a default"


def run_ci(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run .ci/run with a stand-in for make."""
    make = folder / "make"
    make.write_text(MAKE)
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **variables}
    return subprocess.run(
        [str(ROOT / ".ci" / "run")], env=environment, capture_output=True, text=True, timeout=60
    )


def targets_of(done: subprocess.CompletedProcess[str]) -> set[str]:
    return {line.removeprefix("made ") for line in done.stdout.splitlines() if line.startswith("made ")}


def test_ci_waits_for_all_and_sums_up(tmp_path: Path) -> None:
    done = run_ci(tmp_path, FAILING="none", SLOW="1")
    assert done.returncode == 0
    assert targets_of(done) == {"setup", "test", "lint", "docs", "package", "sanitize"}
    summary = done.stdout[done.stdout.index("---- summary") :].splitlines()
    assert summary[1:] == [
        "[  PASSED  ] 1 test.",
        "sanitized [  PASSED  ] 2 tests.",
        "==== 3 passed in 1.00s ====",
    ]


def test_ci_ends_with_a_summary_at_once_where_tests_fail(tmp_path: Path) -> None:
    done = run_ci(tmp_path, FAILING="test", SLOW="100")
    assert done.returncode == 1
    assert "package" not in targets_of(done)
    summary = done.stdout[done.stdout.index("---- summary") :].splitlines()
    assert summary[1:] == ["1 failed, 2 passed in 1.00s", "---- failed: test "]


@pytest.mark.parametrize("failing", ["docs", "sanitize"])
def test_ci_names_a_target_that_fails(tmp_path: Path, failing: str) -> None:
    done = run_ci(tmp_path, FAILING=failing)
    assert done.returncode == 1
    assert "sanitize" in targets_of(done)
    assert done.stdout.splitlines()[-1] == f"---- failed: {failing} "
