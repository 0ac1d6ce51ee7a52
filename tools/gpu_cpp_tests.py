"""Run a googletest program suite by suite, each in a process of its own, and those that fail test by test.

    python tools/gpu_cpp_tests.py build/core/adpdm_gpu_tests --json cpp.json

A kernel that hangs or reads out of bounds spoils its process, where all later tests then fail: so it takes
only its own suite with it, and of that suite the tests that pass alone are known.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_run import write_json

SHOWN = 3000  # characters of what a failing process has printed
NO_DEVICE = "wanted a CUDA device"  # of tests that skip themselves, see ADPDM_REQUIRE_GPU


@dataclass(frozen=True)
class Run:
    """One process: its exit code, None if it was stopped at its limit, and what it printed."""

    code: int | None
    text: str

    @property
    def has_passed(self) -> bool:
        """Whether all tests have passed on a device."""
        return self.code == 0 and NO_DEVICE not in self.text


def tests_of(program: str) -> dict[str, list[str]]:
    """Names of the tests of each suite; exits with a sentence where the program does not say them."""
    try:
        done = subprocess.run([program, "--gtest_list_tests"], capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise SystemExit(f"gpu_cpp_tests: wanted a googletest program, got {program}: {error}") from None
    if done.returncode != 0:
        raise SystemExit(f"gpu_cpp_tests: {program} does not list its tests: {done.stderr.strip()[-500:]}")
    suites: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name = line.split("#")[0].strip()
        if line.startswith(" "):
            suites[next(reversed(suites))].append(name)
        elif name.endswith("."):
            suites[name[:-1]] = []
    return suites


def run(program: str, chosen: str, limit: float) -> Run:
    """Run the tests that a filter chooses in one process, for at most `limit` seconds."""
    command = [program, "--gtest_brief=1", f"--gtest_filter={chosen}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit)
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode(errors="replace")
        return Run(None, f"{printed}\n{chosen}: stopped after {limit:.0f} s")
    return Run(done.returncode, done.stdout + done.stderr)


class Tests:
    """Runs suites some at a time, and notes, prints and writes what has failed as soon as it is known.

    Args:
        path: JSON file of the result, written after every suite; None for none.
    """

    def __init__(self, program: str, path: Path | None, limit: float) -> None:
        self.program, self.path, self.limit = program, path, limit
        self.result: dict[str, Any] = {"tests": 0, "failed": {}}
        self._lock = threading.Lock()

    def run(self, suites: dict[str, list[str]], jobs: int) -> None:
        """Run all suites; `result` counts the tests that have run and has the texts of those that failed.

        A suite fails under its own name where all of its tests pass alone.
        """
        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(lambda suite: self._run_suite(suite, suites[suite]), suites):
                pass

    def _run_suite(self, suite: str, tests: list[str]) -> None:
        together = run(self.program, f"{suite}.*", self.limit)
        failed: dict[str, str] = {}
        if not together.has_passed:
            self._note(0, {f"{suite}.*": together.text})  # by what follows it may be known better
            alone = {f"{suite}.{test}": run(self.program, f"{suite}.{test}", self.limit) for test in tests}
            failed = {name: result.text for name, result in alone.items() if not result.has_passed}
            failed = failed or {f"{suite}.*": together.text}
        self._note(len(tests), failed, suite)

    def _note(self, num_tests: int, failed: dict[str, str], suite: str | None = None) -> None:
        with self._lock:
            if suite is not None:
                self.result["failed"].pop(f"{suite}.*", None)
            self.result["failed"].update({name: text[-SHOWN:] for name, text in failed.items()})
            self.result["tests"] += num_tests
            if self.path is not None:
                write_json(self.path, self.result)
            for name, text in failed.items():
                print(f"---- {name}\n{text[-800:]}", flush=True)


def main() -> int:
    """Run a program's suites; 0 when all tests have passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time")
    parser.add_argument("--limit", type=float, default=25, help="seconds of one process")
    args = parser.parse_args()
    tests = Tests(args.program, args.json, args.limit)
    tests.run(tests_of(args.program), args.jobs)
    failed = sorted(tests.result["failed"])
    print(f"{tests.result['tests']} tests, failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
