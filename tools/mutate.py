"""Plants faults in the kernels, one at a time, and tells which of them the C++ tests do not find.

    python tools/mutate.py [--only PATTERN]

Works on a copy of the tree in build/mutants; tools/mutants.txt lists the faults. Exit status: 0 every fault
is found, 1 one is not, 2 the list no longer fits sources or tests. MAX_JOBS limits the parallel compilations.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tools" / "mutants.txt"
SOURCE = ROOT / "build/mutants/source"
BUILD = ROOT / "build/mutants/build"
FOLDERS = ("csrc", "cpp_tests", "benchmarks/cpu", "benchmarks/cuda")  # what CMake builds
# A fault may make a kernel loop for ever; the whole suite takes a fraction of this.
TIMEOUT_SECONDS = 600


@dataclass
class Mutant:
    """One fault."""

    name: str
    path: str
    tests: str  # a gtest filter
    old: str = ""  # stands in the file exactly once
    new: str = ""

    @property
    def target(self) -> str:
        """The tests as a program: those of the CPU, or those that run CUDA kernels emulated."""
        return "adpdm_tests" if self.path.startswith("csrc/cpu/") else "adpdm_simt_tests"


class StaleListError(Exception):
    """A mutant cannot be planted or built: the list has to follow the sources."""


def parse_list(text: str) -> list[Mutant]:
    """The faults of a list in the form that its own head describes."""
    mutants: list[Mutant] = []
    path = tests = ""
    for line in text[text.index("[") :].splitlines():
        if line.startswith("["):
            path, tests = line.strip("[]").split()
        elif line.startswith("-"):
            mutants[-1].old += ("\n" if mutants[-1].old else "") + line[1:]
        elif line.startswith("+"):
            mutants[-1].new += ("\n" if mutants[-1].new else "") + line[1:]
        elif line:
            mutants.append(Mutant(line, path, tests))
    return mutants


def run(command: list[str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with its output in one text."""
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )


def copy_tree() -> None:
    """Bring the copy up to date; files that are equal keep their time, so that little is built again."""
    listed = run(["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", *FOLDERS])
    names = [*listed.stdout.split(), "CMakeLists.txt"]
    for old in SOURCE.rglob("*"):
        if old.is_file() and str(old.relative_to(SOURCE)) not in names:
            old.unlink()
    for name in names:
        original, copy = ROOT / name, SOURCE / name
        if copy.exists() and copy.read_bytes() == original.read_bytes():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(original, copy)


def build(*targets: str) -> subprocess.CompletedProcess[str]:
    """Compile tests of the copy."""
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    return run(["cmake", "--build", str(BUILD), "--target", *targets, "-j", jobs])


def passes(target: str, tests: str) -> bool:
    """Whether the tests that match a gtest filter run without a failure and in time."""
    binary = next(BUILD.rglob(target), None)
    if binary is None:
        raise StaleListError(f"{target} was not built")
    try:
        done = run([str(binary), f"--gtest_filter={tests}", "--gtest_fail_fast"], TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    if "Running 0 tests" in done.stdout:
        raise StaleListError(f"no test matches {tests}")
    return done.returncode == 0


def survives(mutant: Mutant) -> bool:
    """Plant one fault, build, test, and take it out again."""
    path = SOURCE / mutant.path
    original = path.read_text()
    if original.count(mutant.old) != 1:
        times = original.count(mutant.old)
        raise StaleListError(f"wanted once in {mutant.path}, found {times} times: {mutant.old}")
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        built = build(mutant.target)
        if built.returncode != 0:
            raise StaleListError(f"does not compile:\n{built.stdout[-2000:]}")
        return passes(mutant.target, mutant.tests)
    finally:
        path.write_text(original)


def prepare(mutants: list[Mutant]) -> None:
    """Configure and build the copy without faults; its tests must pass."""
    copy_tree()
    # Without the time of -O3. At -O1 GCC 12.2 crashes on cpu/norm_quantize.inc for AVX-512.
    options = ["-DCMAKE_BUILD_TYPE=Mutants", "-DCMAKE_CXX_FLAGS_MUTANTS=-O2"]
    options += ["-DADPDM_TESTS=ON", "-DADPDM_CUDA=0"]
    configured = run(["cmake", "-G", "Ninja", "-S", str(SOURCE), "-B", str(BUILD), *options])
    targets = sorted({mutant.target for mutant in mutants})
    built = build(*targets) if configured.returncode == 0 else configured
    if built.returncode != 0:
        raise SystemExit(f"mutate: the sources do not build without a fault:\n{built.stdout[-4000:]}")
    for target, tests in sorted({(mutant.target, mutant.tests) for mutant in mutants}):
        if not passes(target, tests):
            raise SystemExit(f"mutate: tests fail without a fault: {tests}")


def main() -> int:
    """Try every mutant."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", default="", metavar="PATTERN", help="try mutants whose name matches")
    only = parser.parse_args().only
    mutants = [mutant for mutant in parse_list(LIST.read_text()) if re.search(only, mutant.name)]
    try:
        prepare(mutants)
    except StaleListError as error:
        print(f"mutate: {error}")
        return 2
    outcomes = {"killed": 0, "SURVIVED": 0, "STALE": 0}
    for mutant in mutants:
        begin = time.monotonic()
        note = ""
        try:
            outcome = "SURVIVED" if survives(mutant) else "killed"
        except StaleListError as error:
            outcome, note = "STALE", f"\n    {error}"
        outcomes[outcome] += 1
        print(f"{outcome:8}  {mutant.name}  ({time.monotonic() - begin:.0f} s){note}", flush=True)
    print("mutate: " + ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items()))
    return 2 if outcomes["STALE"] or not mutants else 1 if outcomes["SURVIVED"] else 0


if __name__ == "__main__":
    sys.exit(main())
