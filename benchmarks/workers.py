"""The parent's end of a worker process: start, ask with a time limit, tell what killed it, stop."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from job import Job

SCRIPT = Path(__file__).with_name("peer_worker.py")
BUILD_LIMIT = 2 * 3600.0  # seconds; compiling SDXL for inductor takes a good part of an hour
RUN_LIMIT = 900.0
LOG_LINES = 3  # of a dead worker's log, told in the reason


class WorkerError(Exception):
    """A worker failed or died; the message says how."""


class WorkerMissing(WorkerError):
    """A worker lacks a package or device."""


class Worker:
    """One process of `peer_worker.py`, in a session of its own: Ctrl-C reaches the parent alone.

    Args:
        python: interpreter to run.
        threads: set through the environment before any library starts its pool; None, for work that is not
            timed, takes all CPUs and lets waiting threads sleep: spinning costs minutes on a busy machine.
        log: file for all it prints.
        extra: what else its environment holds.
    """

    def __init__(self, python: str, threads: int | None, log: Path, extra: Mapping[str, str]) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = {
            **os.environ,
            **{name: str(threads or os.cpu_count() or 1) for name in names},
            **({} if threads else {"OMP_WAIT_POLICY": "PASSIVE"}),
            **extra,
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(log.parent / "inductor"),  # an older one would shorten load times
        }
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [python, str(SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                start_new_session=True,
            )
        self._buffer = b""

    def ask(self, what: str, limit: float = RUN_LIMIT, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            WorkerMissing, WorkerError: if it could not, died, or took longer than `limit` seconds.
        """
        assert self._process.stdin is not None
        line = json.dumps({"do": what, **arguments}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        answer = json.loads(self._read_line(what, limit))
        if "missing" in answer:
            raise WorkerMissing(answer["missing"])
        if "failed" in answer:
            raise WorkerError(answer["failed"])
        done: dict[str, Any] = answer["done"]
        return done

    def build(self, what: str, job: Job) -> dict[str, Any]:
        """Ask for the reference, a preparation or a load."""
        return self.ask(what, BUILD_LIMIT, job=asdict(job))

    def _read_line(self, what: str, limit: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerError(f"no answer to {what!r} within {limit:.0f} s")
                chunk = os.read(self._process.stdout.fileno(), 65536)
                if not chunk:
                    raise WorkerError(self._obituary(what))
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _obituary(self, what: str) -> str:
        code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        last = " | ".join(self._log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:])
        return f"the process died with {how} during {what!r}; it last printed: {last or 'nothing'}"

    def close(self) -> None:
        """End the process and all it started, as inductor's pool of compilers; a second call does nothing."""
        assert self._process.stdout is not None
        if self._process.stdout.closed:  # then its number may be another's
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
