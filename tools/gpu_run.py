"""Everything that needs an NVIDIA GPU, in stages that a second call continues: build, test, check, measure.

    python tools/gpu_run.py                      # what `make gpu` runs
    python tools/gpu_run.py --stages sweep unets --seconds 300

Nothing is downloaded: the Python that runs this must have torch (a CUDA build), diffusers, accelerate,
pytest, pytest-xdist, hypothesis and numpy, and the machine nvcc, cmake, ninja, compute-sanitizer, and
googletest or its sources in build/gpu/googletest (Debian has them in /usr/src/googletest). Where something is
missing nothing is run, unless --incomplete asks for the stages that do without; programs of the tests that
were built elsewhere may lie in build/gpu/prebuilt (gpu_sources.py). State and logs lie in build/gpu; a stage
that passed for these sources, on this card, with this Python, torch and compiler, is not run again, and
results of anything else are deleted there. Results go to --results as <card>-<date>.json, with all logs
beside it, after every stage, also of stages that were stopped or ran in an earlier call.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from gpu_sources import check_prebuilt, made_of
from gpu_stages import ROOT, STATE, Stage, has_googletest, is_prebuilt, make_stages

DEFAULT_SECONDS = 560  # leaves 40 of ten minutes for starting and copying back
PATIENCE = 5  # seconds between asking a process to end and ending it
UNKNOWN = "unknown"
RUNNING: list[subprocess.Popen[bytes]] = []  # to be stopped where this script is
OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
)
SETUPTOOLS = 77  # reads the licence in pyproject.toml
PACKAGES = ("accelerate", "diffusers", "hypothesis", "numpy", "pytest", "safetensors", "setuptools", "xdist")
PROGRAMS = ("cmake", "compute-sanitizer", "g++", "ninja", "nvcc", "nvidia-smi")


@dataclass
class Outcome:
    """How a stage ended."""

    status: str  # passed | failed | skipped | given
    seconds: float
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # of the call in which it ran: date, commit, driver


@dataclass
class State:
    """What is known for these sources, toolchain and card; written after every stage."""

    made_of: dict[str, str]  # gpu_sources.made_of
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, made_of: dict[str, str]) -> State:
        """The saved state, or an empty one where that is of anything else."""
        raw = json.loads(path.read_text()) if path.exists() else {}
        if raw.get("made_of") == made_of:
            return cls(made_of, {k: Outcome(**v) for k, v in raw["outcomes"].items()})
        return cls(made_of)

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    def passed(self, name: str) -> bool:
        return name in self.outcomes and self.outcomes[name].status in ("passed", "given")


def write_json(path: Path, value: Any) -> None:
    """Write through a temporary name, so that an interrupt leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def run_stage(name: str, stage: Stage, environment: dict[str, str], limit: float) -> Outcome:
    """Run the commands of a stage into its log, for at most `limit` seconds."""
    start = time.monotonic()
    deadline = start + min(limit, stage.limit)
    if stage.result is not None:
        (STATE / stage.result).unlink(missing_ok=True)  # a stale result would pass for a new one
    with (STATE / f"{name}.log").open("w") as log:
        run = run_together if stage.together else run_in_order
        reason = run(stage.commands, environment, log, deadline)
    if not reason and stage.result is not None and not (STATE / stage.result).exists():
        reason = f"wanted the result {stage.result}, found none"
    return Outcome("failed" if reason else "passed", time.monotonic() - start, reason)


def run_in_order(
    commands: Sequence[tuple[str, ...]], environment: dict[str, str], log: IO[str], deadline: float
) -> str:
    """Run commands until one fails; return why, or nothing."""
    for command in commands:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        if reason := end(command, start_command(command, environment, log), deadline):
            return reason
    return ""


def run_together(
    commands: Sequence[tuple[str, ...]], environment: dict[str, str], log: IO[str], deadline: float
) -> str:
    """Run commands at once and gather what they print; return why some failed, or nothing."""
    reasons = []
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in commands]
        started = [start_command(c, environment, part) for c, part in zip(commands, parts, strict=True)]
        for command, process, part in zip(commands, started, parts, strict=True):
            reasons.append(end(command, process, deadline))
            part.seek(0)
            log.write(f"$ {' '.join(command)}\n{part.read()}\n")
    return "; ".join(reason for reason in reasons if reason)


def start_command(
    command: tuple[str, ...], environment: dict[str, str], log: IO[str]
) -> subprocess.Popen[bytes] | None:
    """A process in a group of its own, with which compilers and workers end; None without the program.

    In this session all the same: who started this script and kills it by its session reaches all of it.
    """
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, **OWN_GROUP)
    except OSError:
        return None
    RUNNING.append(process)
    return process


def end(command: tuple[str, ...], process: subprocess.Popen[bytes] | None, deadline: float) -> str:
    """Wait for a command, and stop it and what it has started at the deadline; return why it failed."""
    if process is None:
        return f"wanted the program {command[0]}, found none"
    reason = f"stopped after its time at: {' '.join(command)}"
    try:
        code = process.wait(max(deadline - time.monotonic(), 1))
        reason = "" if code == 0 else f"exit code {code} of: {' '.join(command)}"
    except subprocess.TimeoutExpired:
        signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    finally:
        signal_group(process, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that the driver holds does not end
            process.wait(PATIENCE)
        RUNNING.remove(process)
    return reason


def signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a process and all that it has started, where any of them is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


class StageRunner:
    """Runs stages one after the other, some of them beside others, and notes how they end.

    Args:
        state: to continue; saved after every stage.
        seconds: for all of them.
        runner: of one stage, as `run_stage`.
        after: called when a stage has ended, for results that are to survive a kill.
        facts: of this call, noted with the outcome of each stage.
    """

    def __init__(
        self,
        state: State,
        seconds: float,
        environment: dict[str, str],
        runner: Callable[[str, Stage, dict[str, str], float], Outcome] = run_stage,
        after: Callable[[], None] = lambda: None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.state, self.environment, self.runner, self.after = state, environment, runner, after
        self.facts = facts or {}
        self.deadline = time.monotonic() + seconds
        self.beside: dict[str, Future[Outcome]] = {}

    def run(self, stages: dict[str, Stage]) -> bool:
        """Run what has not passed yet and fits; return whether everything has passed by now."""
        with ThreadPoolExecutor() as pool, self._stopping_everything():
            for name, stage in stages.items():
                for need in stage.needs:
                    self._meet(need)
                if self.state.passed(name):
                    print(f"{name:12} passed before", flush=True)
                elif reason := self._reason_to_skip(stage):
                    self._note(name, Outcome("skipped", 0, reason))
                else:
                    left = self.deadline - time.monotonic()
                    print(f"{name:12} running, about {stage.estimate:.0f} s of {left:.0f} s left", flush=True)
                    self.beside[name] = pool.submit(self.runner, name, stage, self.environment, left)
                    if not stage.beside:
                        self._meet(name)
            for name in list(self.beside):
                self._meet(name)
        return all(self.state.passed(name) for name in stages)

    @contextlib.contextmanager
    def _stopping_everything(self) -> Iterator[None]:
        """Leave no process behind when the block is interrupted, and tell what it had measured by then."""
        try:
            yield
        except BaseException:
            for process in list(RUNNING):
                signal_group(process, signal.SIGKILL)
            for name in list(self.beside):
                self._note(name, Outcome("failed", 0, "interrupted"))
            raise

    def _reason_to_skip(self, stage: Stage) -> str:
        if missing := [need for need in stage.needs if not self.state.passed(need)]:
            return f"needs {', '.join(missing)}"
        left = self.deadline - time.monotonic()
        if left < stage.estimate:
            return f"{left:.0f} s left, about {stage.estimate:.0f} s wanted: call again"
        return ""

    def _meet(self, name: str) -> None:
        """Wait for a stage that runs."""
        if name in self.beside:
            outcome = self.beside[name].result()
            del self.beside[name]
            self._note(name, outcome)

    def _note(self, name: str, outcome: Outcome) -> None:
        before = self.state.outcomes.get(name)
        # A stage for which this call has no time keeps what it measured in an earlier one before it failed.
        if before is None or before.status != "failed" or outcome.status != "skipped":
            self.state.outcomes[name] = replace(outcome, facts=self.facts)
        self.state.save(STATE / "state.json")
        print(f"{name:12} {outcome.status} in {outcome.seconds:.0f} s {outcome.reason}".rstrip(), flush=True)
        if outcome.status == "failed":
            print(tail(STATE / f"{name}.log"), flush=True)
        try:
            self.after()
        except OSError as error:  # a full disk, say: what is to be measured can be printed still
            print(f"results cannot be written: {error}", flush=True)


def tail(path: Path, lines: int = 40) -> str:
    """The end of a log, indented."""
    if not path.exists():
        return ""
    return "\n".join(f"    {line}" for line in path.read_text(errors="replace").splitlines()[-lines:])


def write_results(stages: dict[str, Stage], state: State, folder: Path, facts: dict[str, Any]) -> Path:
    """Gather what the stages measured into <card>-<date>.json, and their logs into a file beside it.

    Under `measured` are stages that passed, under `partial` what others had written before they failed: all
    that the state knows of, also from earlier calls, whose facts stand in `outcomes`.
    """
    kinds = {"passed": "measured", "failed": "partial"}
    found: dict[str, dict[str, Any]] = {kind: {} for kind in kinds.values()}
    for name, stage in stages.items():
        kind = kinds.get(state.outcomes[name].status) if name in state.outcomes else None
        if stage.result is not None and kind is not None and (STATE / stage.result).exists():
            try:
                found[kind][name] = json.loads((STATE / stage.result).read_text())
            except ValueError as error:
                found[kind][name] = f"unreadable: {error}"
    card = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    path = folder / f"{card}-{facts['date']}.json"
    outcomes = {name: asdict(outcome) for name, outcome in state.outcomes.items()}
    write_json(path, {"facts": facts, "outcomes": outcomes, **found})
    with tarfile.open(path.with_name(f"{path.stem}-logs.tar.gz"), "w:gz") as archive:
        for log in sorted(STATE.glob("*.log")):
            archive.add(log, log.name)
    return path


def forget(stages: dict[str, Stage]) -> None:
    """Delete results and logs of stages: those of other sources or another card would pass for new ones."""
    for name, stage in stages.items():
        for file in (f"{name}.log", stage.result):
            if file is not None:
                (STATE / file).unlink(missing_ok=True)


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
    return {
        "device": torch.cuda.get_device_name(),
        "arch": f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}",
        "python": sys.version,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        query: output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "nvcc": output_of("nvcc", "--version").splitlines()[-1],
        "g++": output_of("g++", "--version").splitlines()[0],
        "commit": os.environ.get("ADPDM_COMMIT") or output_of("git", "rev-parse", "HEAD"),
        "dirty": output_of("git", "status", "--porcelain", "--untracked-files=no") not in ("", UNKNOWN),
        "missing": missing(),
        "date": datetime.date.today().isoformat(),
    }


def output_of(*command: str) -> str:
    """What a command prints, or UNKNOWN where there is no such program or it fails."""
    environment = {**os.environ, "PATH": search_path()}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    except OSError:
        return UNKNOWN
    return done.stdout.strip() if done.returncode == 0 else UNKNOWN


def missing() -> list[str]:
    """Packages, programs and sources that some stage will want: nothing can be fetched later."""
    packages = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = importlib.metadata.version("setuptools")
        packages += [f"setuptools >= {SETUPTOOLS}, not {found}"] * (int(found.split(".")[0]) < SETUPTOOLS)
    programs = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    return packages + programs + ["googletest"] * (not is_prebuilt() and not has_googletest())


def search_path() -> str:
    """PATH with where pip puts cmake and ninja, and where the CUDA toolkit lies."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"], "/usr/local/cuda/bin"])


def make_environment(facts: dict[str, Any], jobs: int) -> dict[str, str]:
    """Of all commands: nothing is installed, so scripts find the package by PYTHONPATH."""
    path = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "ADPDM_CUDA": "1",
        "ADPDM_CUDA_ARCHS": f"{facts['arch']}-real",
        "ADPDM_WERROR": "0",  # of compilers that nobody has seen this code with
        "HF_HUB_OFFLINE": "1",
        "MAX_JOBS": str(jobs),
        "PATH": search_path(),
        "PYTHONPATH": os.pathsep.join(folder for folder in path if folder),
        "PYTHONUNBUFFERED": "1",
    }


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
    parser.add_argument("--incomplete", action="store_true", help="run although something is missing")
    parser.add_argument("--given", nargs="+", choices=names, default=[], help="stages that count as passed")
    args = parser.parse_args()
    check_prebuilt(ROOT)
    facts, jobs = gather_facts(), os.cpu_count() or 1
    print(json.dumps(facts), flush=True)
    if facts["missing"] and not args.incomplete:
        raise SystemExit(
            f"make gpu: found no {', no '.join(facts['missing'])}; nothing was run, to waste no time "
            "on a card. Install or carry it, or give --incomplete for the stages that do without"
        )
    all_stages = make_stages(sys.executable, facts["arch"], jobs)
    stages = {name: stage for name, stage in all_stages.items() if name in args.stages}
    state = State.load(STATE / "state.json", made_of(ROOT, facts))
    if not state.outcomes:
        state.save(STATE / "state.json")  # first: an old state without its results would be told as a new one
        forget(all_stages)
    if args.again:
        for name in stages:
            state.outcomes.pop(name, None)
    given = [name for name in args.given if not state.passed(name)]
    state.outcomes.update({name: Outcome("given", 0, facts=facts) for name in given})
    STATE.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runner = StageRunner(
        state,
        args.seconds,
        make_environment(facts, jobs),
        after=lambda: print(f"results: {write_results(all_stages, state, args.results, facts)}", flush=True),
        facts=facts,
    )
    return 0 if runner.run(stages) else 1


if __name__ == "__main__":
    sys.exit(main())
