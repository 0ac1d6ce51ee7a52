"""Times whole denoisers against their peers, one process each, in turns: ours, torch, OpenVINO, ONNX Runtime.

python benchmarks/bench_unet.py --models demo cifar10 --threads 1 2 --contestants all --output FILE.json

By default the demo model at batch 1 with one thread, torch and ours. docs/benchmarks.md says how to read it.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import unet_results as results
import unets
from contestants import DEFAULT, REGISTRY
from job import Job
from unet_results import Case, Row
from workers import Worker, WorkerError, WorkerMissing

MIN_ROUNDS = 20
QUICK_ROUNDS = 3
MIN_SAMPLE_SECONDS = 0.02  # a sample repeats the forward until it lasts this long
WARM_BELOW_SECONDS = 1.0  # longer forwards do not notice that the caches were another's
SETTLE_SECONDS = 0.02  # threads of the one before spin on for a while, and would take cores from the next
INTERRUPTED = 130


@dataclass
class Session:
    """What all cases of one command share.

    Args:
        folder: scratch files.
        rounds: samples of every contestant.
        peers_python: interpreter of contestants that need more than torch and adpdm.
        prepared: outcome by artifact: seconds, or the reason why it could not be prepared.
    """

    folder: Path
    rounds: int
    peers_python: str
    prepared: dict[tuple[Any, ...], float | WorkerError] = field(default_factory=dict)
    referenced: dict[tuple[str, int], list[int]] = field(default_factory=dict)

    def worker(self, name: str, threads: int | None = None) -> Worker:
        """Start a process for a contestant or the reference; `threads` where it is timed.

        Only then it runs at the contestant's level: what is prepared serves all levels, also where the CPU
        lacks this one.
        """
        contestant = REGISTRY.get(name)
        is_peer = contestant is not None and contestant.is_peer
        log = self.folder / f"{name}.log"
        level = contestant.level if contestant is not None and threads is not None else ""
        python = self.peers_python if is_peer else sys.executable
        return Worker(python, threads, log, {"ADPDM_CPU": level} if level else {})


def say(text: str) -> None:
    """Progress, apart from the results on standard output."""
    print(f"bench_unet: {text}", file=sys.stderr, flush=True)


def make_reference(session: Session, job: Job) -> list[int]:
    """Timesteps of the probes, whose inputs and reference outputs are written once per model and batch."""
    key = (job.model, job.batch)
    if key not in session.referenced:
        say(f"{job.model}, batch {job.batch}: full-precision trajectories")
        with session.worker("reference") as worker:
            done = worker.build("reference", replace(job, contestant="reference", device="cpu"))
        session.referenced[key] = [int(t) for t in done["timesteps"]]
    return session.referenced[key]


def prepare(session: Session, job: Job) -> float:
    """Seconds it took to write a contestant's artifact, now or for an earlier case.

    Raises:
        WorkerError: the same one for all that share the artifact.
    """
    contestant = REGISTRY[job.contestant]
    if contestant.prepare is None:
        return 0.0
    # ours serves all batch sizes; exported graphs have theirs built in
    key = (contestant.artifact, job.model, None if contestant.is_ours else job.batch)
    if key not in session.prepared:
        say(f"{job.model}, batch {job.batch}: preparing {contestant.artifact}")
        try:
            with session.worker(job.contestant) as worker:
                session.prepared[key] = float(worker.build("prepare", job)["seconds"])
        except WorkerError as error:
            session.prepared[key] = error
    outcome = session.prepared[key]
    if isinstance(outcome, WorkerError):
        raise outcome
    return outcome


def set_aside(row: Row, error: WorkerError) -> None:
    """Take a contestant out of the race and say why."""
    row.state = "missing" if isinstance(error, WorkerMissing) else "failed"
    row.reason = str(error)
    say(f"{row.contestant}: {row.state}: {row.reason}")


@dataclass
class Runner:
    """A loaded contestant."""

    row: Row
    worker: Worker
    forwards: int  # per sample
    is_warmed: bool  # by one forward before each sample
    turn_seconds: float

    def sample(self) -> None:
        """Take one sample into the row."""
        done = self.worker.ask("run", forwards=self.forwards, warm=self.is_warmed)
        self.row.wall.append(done["wall"])
        self.row.cpu.append(done["cpu"])

    def set_aside(self, error: WorkerError) -> None:
        """Take the contestant out of the race, and end its process, which may still be computing."""
        self.worker.close()
        set_aside(self.row, error)


def load(session: Session, job: Job, row: Row, stack: ExitStack) -> Runner:
    """Build a contestant in a process that lives until the case is done."""
    row.seconds["prepare"] = prepare(session, job)
    say(f"{job.model}, batch {job.batch}, {job.threads} threads: loading {job.contestant}")
    worker = stack.enter_context(session.worker(job.contestant, job.threads))
    try:
        done = worker.build("load", job)
    except WorkerError:
        worker.close()  # or it might go on loading beside the others' samples
        raise
    row.versions, row.notes = done["versions"], done["notes"]
    row.seconds["load"] = done["load_seconds"]
    forward = done["forward_seconds"]
    forwards, is_warmed = max(1, math.ceil(MIN_SAMPLE_SECONDS / forward)), forward < WARM_BELOW_SECONDS
    return Runner(row, worker, forwards, is_warmed, forward * (forwards + is_warmed))


def run_rounds(runners: list[Runner], rounds: int) -> None:
    """Sample in turns; whoever fails leaves the race."""
    start, left = time.monotonic(), list(runners)
    for number in range(rounds):
        for runner in random.Random(number).sample(left, len(left)):  # nobody always follows the same one
            time.sleep(SETTLE_SECONDS)
            try:
                runner.sample()
            except WorkerError as error:
                runner.set_aside(WorkerError(f"in round {number + 1}: {error}"))
        left = [runner for runner in left if runner.row.state == "ok"]
        if number in (0, rounds // 4, rounds // 2, 3 * rounds // 4) and number + 1 < rounds:
            remaining = (time.monotonic() - start) / (number + 1) * (rounds - number - 1)
            say(f"round {number + 1} of {rounds}, about {remaining:.0f} s left")


def judge(job: Job, runner: Runner) -> None:
    """Ask for outputs and memory."""
    row = runner.row
    try:
        runner.worker.ask("probe")
        row.memory = runner.worker.ask("memory")
        reference = np.load(job.outputs_file("reference"))
        output = np.load(job.outputs_file(row.contestant))
        row.sqnr_db = results.sqnr_db(reference, output)
        row.sqnr_db_per_probe = [results.sqnr_db(r, o) for r, o in zip(reference, output, strict=True)]
    except WorkerError as error:
        runner.set_aside(error)
    except ValueError as error:
        runner.set_aside(WorkerError(str(error)))


def run_case(session: Session, case: Case, names: Sequence[str]) -> None:
    """Fill a case, with the reference alone if that fails; on Ctrl-C keep the rounds that are complete."""
    template = Job("", case.model, case.batch, case.device, case.threads, str(session.folder))
    try:
        case.probe_timesteps = make_reference(session, template)
    except WorkerError as error:
        case.rows.append(Row("reference"))
        set_aside(case.rows[0], WorkerError(str(error)))  # failed, not missing: nobody is timed
        return
    case.load_average.append(os.getloadavg()[0])
    try:
        with ExitStack() as stack:
            runners = []
            for name in names:
                row = Row(name)
                case.rows.append(row)
                try:
                    if case.device not in REGISTRY[name].devices:
                        raise WorkerMissing(f"runs on {', '.join(REGISTRY[name].devices)} only")
                    runners.append(load(session, replace(template, contestant=name), row, stack))
                except WorkerError as error:
                    set_aside(row, error)
            expected = session.rounds * sum(r.turn_seconds for r in runners)
            say(f"{session.rounds} rounds, about {expected:.0f} s")
            for runner in runners:  # before the rounds: an interrupt during them loses no figure but times
                judge(template, runner)
            run_rounds([r for r in runners if r.row.state == "ok"], session.rounds)
    finally:
        case.load_average.append(os.getloadavg()[0])
        case.finish()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options, checked before anything runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["demo"], help=f"{', '.join(unets.UNETS)}; NAME@SIZE for another size")
    add("--batch", nargs="+", type=int, default=[1])
    add("--threads", nargs="+", type=int, default=[1])
    add("--contestants", nargs="+", default=list(DEFAULT), help=f"all, or of {', '.join(REGISTRY)}")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--rounds", type=int, help=f"at least {MIN_ROUNDS} (default) unless --quick")
    add("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds, to see that everything runs")
    add("--peers-python", default=sys.executable, help="interpreter with benchmarks/requirements-peers.txt")
    add("--output", type=Path, help="JSON file, written after every case")
    add("--plot", type=Path, help="SVG or PNG file")
    add("--show", type=Path, help="table and plot of an earlier JSON file; nothing is timed")
    args = parser.parse_args(arguments)
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that cannot work; fill in those that depend on others."""
    for model in args.models:
        unets.find(model)
    if "all" in args.contestants:
        args.contestants = [n for n, c in REGISTRY.items() if args.device in c.devices and not c.level]
    unknown = [name for name in args.contestants if name not in REGISTRY]
    if unknown:
        raise ValueError(f"--contestants must be all, or of {', '.join(REGISTRY)}; got {', '.join(unknown)}")
    for name in ("models", "batch", "threads", "contestants"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} must name each value once, got {values}")
        if name in ("batch", "threads") and min(values) < 1:
            raise ValueError(f"--{name} must be at least 1, got {min(values)}")
    least = 1 if args.quick else MIN_ROUNDS
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else MIN_ROUNDS)
    if args.rounds < least:
        raise ValueError(f"--rounds must be at least {least}, got {args.rounds}")
    if args.plot and args.plot.suffix not in (".svg", ".png"):
        raise ValueError(f"--plot must end in .svg or .png, got {args.plot}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install -r benchmarks/requirements-peers.txt")


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Case], bool]:
    """Run all cases: what is known about the run, the cases, and whether it was interrupted."""
    of_this_machine = ("show", "plot", "output", "peers_python")  # paths, which say nothing about the figures
    settings = {key: value for key, value in vars(args).items() if key not in of_this_machine}
    result = {"machine": results.machine_state(args.device), "settings": settings}
    cases: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="bench_unet-", ignore_cleanup_errors=True) as folder:
        session = Session(Path(folder), args.rounds, args.peers_python)
        try:
            for model, batch, threads in itertools.product(args.models, args.batch, args.threads):
                clock = "cpu" if threads == 1 and args.device == "cpu" else "wall"
                is_random = unets.find(model).folder is None
                cases.append(Case(model, batch, threads, args.device, clock, is_random))
                run_case(session, cases[-1], args.contestants)
                print(results.render(cases[-1]), flush=True)
                if args.output:
                    results.write_json(args.output, result, cases, is_partial=True)
        except KeyboardInterrupt:
            say("interrupted; keeping what was measured")
            return result, cases, True
    return result, cases, False


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 if a contestant or the reference failed (not: lacks a package), 130 after Ctrl-C."""
    args = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: nothing is left running
    if args.show:
        result, cases = results.read_json(args.show)
        print("\n\n".join(results.render(case) for case in cases))
        if result["partial"]:
            say(f"{args.show} is of an interrupted run")
        is_partial = False
    else:
        result, cases, is_partial = measure(args)
        if is_partial and cases:
            print(results.render(cases[-1]))
        if args.output:
            results.write_json(args.output, result, cases, is_partial)
    if args.plot:
        results.plot(args.plot, result, cases)
    has_failed = any(row.state == "failed" for case in cases for row in case.rows)
    return INTERRUPTED if is_partial else int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
