"""tools/gpu_cpp_tests.py with a stand-in for a googletest program: what hangs, crashes, finds no device."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import gpu_cpp_tests
import pytest

GENEROUS, SHORT = 120.0, 1.0  # seconds of a process
PROGRAM = """#!{python}
import os, sys, time
if "--gtest_list_tests" in sys.argv:
    print("Good.\\n  One\\n  Two\\nBad.\\n  Fine\\n  Crashes  # a comment\\n  Hangs")
    print("Order.\\n  First\\n  Second\\nNone.\\n  Skips")
    sys.exit()
chosen = sys.argv[-1].removeprefix("--gtest_filter=")
suite, _, test = chosen.partition(".")
print(f"ran {{chosen}}")
if suite == "None":
    print("device_test.cpp:1: Skipped\\nwanted a CUDA device, found none")
if suite == "Order":
    sys.exit(test == "*")
if chosen in ("Bad.*", "Bad.Crashes"):
    os.abort()
if chosen == "Bad.Hangs":
    time.sleep(60)
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "tests"
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_failures_take_only_their_own_suite_with_them(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = gpu_cpp_tests.tests_of(program)
    assert suites["Bad"] == ["Fine", "Crashes", "Hangs"]
    run = gpu_cpp_tests.run

    def limited(program: str, chosen: str, limit: float) -> gpu_cpp_tests.Run:
        """Only what hangs meets its limit, however slowly the others start."""
        assert limit == GENEROUS
        return run(program, chosen, SHORT if chosen == "Bad.Hangs" else limit)

    monkeypatch.setattr(gpu_cpp_tests, "run", limited)
    tests = gpu_cpp_tests.Tests(program, tmp_path / "result.json", GENEROUS)
    tests.run(suites, jobs=4)
    assert tests.result["tests"] == 8
    assert sorted(tests.result["failed"]) == ["Bad.Crashes", "Bad.Hangs", "None.Skips", "Order.*"]
    assert "Bad.Hangs: stopped after 1 s" in tests.result["failed"]["Bad.Hangs"]
    assert json.loads((tmp_path / "result.json").read_text()) == tests.result


def test_result_is_there_when_it_is_stopped(program: str, tmp_path: Path) -> None:
    script = [sys.executable, gpu_cpp_tests.__file__, program, "--json", str(tmp_path / "result.json")]
    with subprocess.Popen([*script, "--jobs", "1"], stdout=subprocess.PIPE) as process:
        while b"Bad.*" not in (process.stdout.readline() if process.stdout else b""):
            assert process.poll() is None
        process.kill()
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["tests"], list(found["failed"])) == (2, ["Bad.*"])


def test_program_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"gpu_cpp_tests: wanted a googletest program, got .*nothing"):
        gpu_cpp_tests.tests_of(str(tmp_path / "nothing"))
