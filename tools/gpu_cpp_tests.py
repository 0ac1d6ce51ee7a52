"""Run a googletest program suite by suite, each in a process of its own, and those that fail test by test.

    python tools/gpu_cpp_tests.py build/core/adpdm_gpu_tests --json cpp.json

A kernel that hangs or reads out of bounds spoils its process, where all later tests then fail: so it takes
only its own suite with it, and of that suite the tests that pass alone are known.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def run_suites(program: str, suites: dict[str, list[str]], limit: float, jobs: int) -> dict[str, Any]:
    """Run everything; what failed, by the names of tests, or of suites whose tests all pass alone."""
    with ThreadPoolExecutor(jobs) as pool:

        def run_each(filters: Iterable[str]) -> dict[str, Run]:
            filters = list(filters)
            return dict(zip(filters, pool.map(lambda x: run(program, x, limit), filters), strict=True))

        together = run_each(f"{suite}.*" for suite in suites)
        broken = [suite for suite in suites if not together[f"{suite}.*"].has_passed]
        alone = run_each(f"{suite}.{test}" for suite in broken for test in suites[suite])
    texts = {name: result.text[-SHOWN:] for name, result in alone.items() if not result.has_passed}
    for suite in broken:
        if not any(name.startswith(f"{suite}.") for name in texts):
            texts[f"{suite}.*"] = together[f"{suite}.*"].text[-SHOWN:]
    return {"tests": sum(map(len, suites.values())), "failed": texts}


def main() -> int:
    """Run a program's suites; 0 when all tests have passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time")
    parser.add_argument("--limit", type=float, default=60, help="seconds of one process")
    args = parser.parse_args()
    result = run_suites(args.program, tests_of(args.program), args.limit, args.jobs)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    for name, text in result["failed"].items():
        print(f"---- {name}\n{text[-800:]}")
    print(f"{result['tests']} tests, failed: {', '.join(result['failed']) or 'none'}")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
