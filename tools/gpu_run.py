"""Everything that needs an NVIDIA GPU, in stages that a second call continues: build, test, check, measure.

    python tools/gpu_run.py                      # what `make gpu` runs
    python tools/gpu_run.py --stages sweep unets --seconds 300

Nothing is downloaded: the Python that runs this must have torch (a CUDA build), diffusers, pytest, hypothesis
and numpy, and the machine nvcc, cmake, ninja, compute-sanitizer, and googletest or its sources in
build/gpu/googletest (Debian has them in /usr/src/googletest). State and logs lie in build/gpu; a stage that
passed for these sources on this card is not run again. Results go to --results as <card>-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / "build" / "gpu"
GOOGLETEST = STATE / "googletest"  # its sources, where the machine has no package of it
SOURCE_SUFFIXES = {".cpp", ".h", ".inc", ".cu", ".cuh", ".py", ".txt", ".json"}
DEFAULT_SECONDS = 560  # leaves 40 of ten minutes for starting and copying back


@dataclass(frozen=True)
class Stage:
    """One part of the run.

    Args:
        commands: run in order from the root; the first that fails ends the stage.
        estimate: seconds on an H100 with 16 cores; a stage that no longer fits is left for the next call.
        needs: stages that must have passed.
        result: JSON file, relative to the state folder, that the commands write.
    """

    commands: tuple[tuple[str, ...], ...]
    estimate: float
    needs: tuple[str, ...] = ()
    result: str | None = None


@dataclass
class Outcome:
    """How a stage ended."""

    status: str  # passed | failed | skipped
    seconds: float
    reason: str = ""


@dataclass
class State:
    """What is known about these sources on this card; written after every stage."""

    sources: str  # hash
    device: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, sources: str, device: str) -> State:
        """The saved state, or an empty one for other sources or another card."""
        if path.exists():
            raw = json.loads(path.read_text())
            if raw["sources"] == sources and raw["device"] == device:
                return cls(sources, device, {k: Outcome(**v) for k, v in raw["outcomes"].items()})
        return cls(sources, device)

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    def passed(self, name: str) -> bool:
        return name in self.outcomes and self.outcomes[name].status == "passed"


# Tests that launch kernels of every kind, for compute-sanitizer, under which all would take too long.
SANITIZED = (
    "CudaConv2d.MatchesDefinitionForEveryModeAndTile",
    "CudaConv2d.GathersChannelsThatAreNoWholeChunks",
    "CudaConv2d.SplitReductionsGiveTheSameBits",
    "CudaConv2dWgmma.MatchesDefinitionOnEverySchedule",
    "CudaConv2dWgmma.ReductionMayBeShorterThanThePipeline",
    "CudaConv2dWgmma.SplitsTwoSegments",
    "CudaDepthwise.MatchesDefinitionForEveryNumberOfChannels",
    "CudaDepthwise.MatchesDefinitionForOddGeometry",
    "CudaLinear.TwoSegmentsAndSplitReductions",
    "CudaIgemmEpilogue.UnalignedOperandsGoOneByOne",
    "CudaGroupNormQuantize.ConstantsGiveTheBias",
    "CudaLayerNormQuantize.LargeMeansDoNotCancel",
    "CudaQuantize.ExtremeZeroPointsAndScales",
    "CudaQuantizeChannelsLast.CodesAreThoseOfTheCpuTransposed",
    "CudaPackInt4.BytesAndCodesEqualTheCpus",
    "CudaFakeQuantizeBackward.SumsAreAddedInTheOrderOfTheCpu",
    "CudaFakeQuantizeMixtureBackward.GradientsEqualTheCpusBitForBit",
    "CudaObserve.BlocksTakeSeveralShares",
    "CudaPackWeight.GroupsFollowOneAnother",
)


def write_json(path: Path, value: Any) -> None:
    """Write through a temporary name, so that an interrupt leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def make_stages(python: str, arch: str, jobs: int) -> dict[str, Stage]:
    """All stages in order, for a card of compute capability `arch`, e.g. "90a"."""
    build = "build/core"  # which setup.py builds in as well: CUDA is compiled once
    tests = f"{build}/adpdm_gpu_tests"
    bench = (python, "-u")
    chosen = f"--gtest_filter={':'.join(SANITIZED)}"

    def sanitizer(tool: str, *flags: str) -> tuple[str, ...]:
        return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *flags, tests, chosen)

    return {
        "build": Stage(
            (
                (
                    *("cmake", "-G", "Ninja", "-S", ".", "-B", build, "-DADPDM_TESTS=ON", "-DADPDM_CUDA=1"),
                    f"-DADPDM_CUDA_ARCHS={arch}-real",
                    *([f"-DADPDM_GOOGLETEST={GOOGLETEST}"] if GOOGLETEST.is_dir() else []),
                ),
                (
                    "cmake",
                    "--build",
                    build,
                    "-j",
                    str(jobs),
                    "--target",
                    "adpdm_gpu_tests",
                    "adpdm_gpu_peaks",
                ),
                (python, "setup.py", "-q", "build_ext", "--inplace"),
            ),
            estimate=150,
        ),
        "test-cpp": Stage(((tests, "--gtest_brief=1"),), 30, ("build",)),
        "test-python": Stage(
            ((python, "-m", "pytest", "-q", "-x", "--maxfail=20", "-k", "cuda", "python_tests"),),
            60,
            ("build",),
        ),
        "sanitize": Stage(
            (
                sanitizer("memcheck", "--leak-check", "full"),
                sanitizer("racecheck"),
                sanitizer("initcheck"),
                sanitizer("synccheck"),
            ),
            90,
            ("build",),
        ),
        "peaks": Stage(
            (
                (
                    *bench,
                    "benchmarks/gpu_peaks.py",
                    f"{build}/adpdm_gpu_peaks",
                    "--json",
                    "build/gpu/peaks.json",
                ),
            ),
            15,
            ("build",),
            "peaks.json",
        ),
        "kernels": Stage(
            ((*bench, "benchmarks/bench_gpu_kernels.py", "--json", "build/gpu/kernels.json"),),
            90,
            ("build", "test-cpp"),
            "kernels.json",
        ),
        "sweep": Stage(
            ((*bench, "benchmarks/sweep_tiles.py", "--json", "build/gpu/tiles.json"),),
            120,
            ("build", "test-cpp"),
            "tiles.json",
        ),
        "unets": Stage(
            (
                (*bench, "benchmarks/bench_unet.py", "--device", "cuda")
                + ("--models", "cifar10", "sd15", "sdxl", "--batch", "1", "2", "8")
                + ("--output", "build/gpu/unets.json"),
            ),
            200,
            ("build", "test-cpp"),
            "unets.json",
        ),
    }


def run_stage(name: str, stage: Stage, environment: dict[str, str], limit: float) -> Outcome:
    """Run the commands of a stage into its log; the last lines are shown when one fails."""
    start = time.monotonic()
    log_path = STATE / f"{name}.log"
    if stage.result is not None:
        (STATE / stage.result).unlink(missing_ok=True)  # a stale result would pass for a new one
    with log_path.open("w") as log:
        for command in stage.commands:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            left = limit - (time.monotonic() - start)
            reason = run_command(command, environment, log, left)
            if reason:
                return Outcome("failed", time.monotonic() - start, reason)
    if stage.result is not None and not (STATE / stage.result).exists():
        return Outcome("failed", time.monotonic() - start, f"wanted the result {stage.result}, found none")
    return Outcome("passed", time.monotonic() - start)


def run_command(command: Sequence[str], environment: dict[str, str], log: Any, left: float) -> str:
    """Run one command; return why it failed, or nothing."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=max(left, 1)
        )
    except FileNotFoundError:
        return f"wanted the program {command[0]}, found none"
    except subprocess.TimeoutExpired:
        return f"stopped after its time at: {' '.join(command)}"
    return "" if done.returncode == 0 else f"exit code {done.returncode} of: {' '.join(command)}"


def run_all(
    stages: dict[str, Stage],
    state: State,
    seconds: float,
    environment: dict[str, str],
    runner: Callable[[str, Stage, dict[str, str], float], Outcome] = run_stage,
) -> bool:
    """Run what has not passed yet and fits; return whether everything has passed by now."""
    deadline = time.monotonic() + seconds
    for name, stage in stages.items():
        if state.passed(name):
            print(f"{name:12} passed before", flush=True)
            continue
        missing = [need for need in stage.needs if not state.passed(need)]
        left = deadline - time.monotonic()
        if missing:
            outcome = Outcome("skipped", 0, f"needs {', '.join(missing)}")
        elif left < stage.estimate:
            outcome = Outcome(
                "skipped", 0, f"{left:.0f} s left, about {stage.estimate:.0f} s wanted: call again"
            )
        else:
            print(f"{name:12} running, about {stage.estimate:.0f} s of {left:.0f} s left", flush=True)
            outcome = runner(name, stage, environment, left)
        state.outcomes[name] = outcome
        state.save(STATE / "state.json")
        print(f"{name:12} {outcome.status} in {outcome.seconds:.0f} s {outcome.reason}".rstrip(), flush=True)
        if outcome.status == "failed":
            print(tail(STATE / f"{name}.log"), flush=True)
    return all(state.passed(name) for name in stages)


def tail(path: Path, lines: int = 40) -> str:
    """The end of a log, indented."""
    if not path.exists():
        return ""
    return "\n".join(f"    {line}" for line in path.read_text(errors="replace").splitlines()[-lines:])


def write_results(stages: dict[str, Stage], state: State, folder: Path, facts: dict[str, Any]) -> Path:
    """Gather what the stages measured into <card>-<date>.json."""
    measured = {
        name: json.loads((STATE / stage.result).read_text())
        for name, stage in stages.items()
        if stage.result is not None and state.passed(name)
    }
    card = re.sub(r"[^a-z0-9]+", "-", state.device.lower()).strip("-")
    path = folder / f"{card}-{facts['date']}.json"
    outcomes = {name: asdict(outcome) for name, outcome in state.outcomes.items()}
    write_json(path, {"facts": facts, "outcomes": outcomes, "measured": measured})
    return path


def gather_facts() -> dict[str, Any]:
    """Card, driver, versions, commit and date; exits with a sentence where there is no CUDA device."""
    try:
        import torch
    except ImportError:
        raise SystemExit("make gpu: wanted a Python with a CUDA build of torch, found no torch") from None
    if not torch.cuda.is_available():
        raise SystemExit(f"make gpu: wanted a CUDA device, torch {torch.__version__} sees none")
    major, minor = torch.cuda.get_device_capability()
    query = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    smi = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True
    )
    return {
        "device": torch.cuda.get_device_name(),
        "arch": f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        query: smi.stdout.strip(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.date.today().isoformat(),
    }


def hash_sources(root: Path) -> str:
    """One hash of every file that a stage may depend on: not the commit, which a bare copy does not have."""
    total = hashlib.sha256()
    folders = ("csrc", "adpdm", "cpp_tests", "python_tests", "benchmarks", "tools")
    files = [p for folder in folders for p in (root / folder).rglob("*")]
    for path in sorted([*files, root / "CMakeLists.txt", root / "setup.py"]):
        if path.is_file() and path.suffix in SOURCE_SUFFIXES:
            total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()


def git(*arguments: str) -> str:
    """What git prints, or "unknown" where this is no repository."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def main() -> int:
    """Run the stages; 0 when all have passed."""
    names = list(make_stages(sys.executable, "90a", 1))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=names, default=names)
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="time for all stages together")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--again", action="store_true", help="also run stages that have passed before")
    args = parser.parse_args()
    facts = gather_facts()
    jobs = os.cpu_count() or 1
    stages = {n: s for n, s in make_stages(sys.executable, facts["arch"], jobs).items() if n in args.stages}
    state = State.load(STATE / "state.json", hash_sources(ROOT), facts["device"])
    if args.again:
        for name in stages:
            state.outcomes.pop(name, None)
    STATE.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "ADPDM_CUDA": "1",
        "ADPDM_CUDA_ARCHS": f"{facts['arch']}-real",
        "MAX_JOBS": str(jobs),
        "PYTHONUNBUFFERED": "1",
    }
    complete = run_all(stages, state, args.seconds, environment)
    print(f"results: {write_results(stages, state, args.results, facts)}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
