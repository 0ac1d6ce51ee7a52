"""Runs a function in the processes of a gloo group, as torchrun would start them, within a time limit."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

FIRST_PORT, PORTS_PER_WORKER, WORKERS = 20_000, 1_000, 12  # below those that the system picks
PORTS = itertools.count(os.getpid())
LIMIT = 60.0  # seconds for a group to end: a hang fails
# Forked from a server that has imported everything, a process starts within a tenth of a second.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["adpdm.cli", "adpdm.testing", "pytest"])


@dataclass(frozen=True)
class Ended:
    """How a process ended: with a result, an error, or neither where it died."""

    result: Any = None
    error: type[BaseException] | None = None
    message: str = ""
    trace: str = ""
    is_dead: bool = False


def run_group(size: int, work: Callable[..., Any], *args: Any, initialise: bool = True) -> list[Ended]:
    """Call work(rank, *args) in `size` processes; how each ended.

    Args:
        work: a function of a module, whose result can be pickled.
        initialise: torch.distributed; otherwise only the environment is that of torchrun.
    """
    port = _free_port()
    pipes = [SERVER.Pipe(duplex=False) for _ in range(size)]
    workers = [
        SERVER.Process(target=_run, args=(pipe[1], rank, size, port, initialise, work, args), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    for worker, (_, writer) in zip(workers, pipes, strict=True):
        worker.start()
        writer.close()
    try:
        return [_received(reader, rank) for rank, (reader, _) in enumerate(pipes)]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _free_port() -> int:
    """One that is free now, of a range of its own for each worker of pytest-xdist.

    One that the system picks might be picked for two groups at once, which would then wait for each other.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for number in PORTS:
        port = FIRST_PORT + PORTS_PER_WORKER * (worker % WORKERS) + number % PORTS_PER_WORKER
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("itertools.count ends")


def _received(reader: Connection, rank: int) -> Ended:
    assert reader.poll(LIMIT), f"process {rank} still runs after {LIMIT:g} s"
    try:
        ended: Ended = pickle.loads(reader.recv_bytes())
    except EOFError:
        return Ended(is_dead=True)
    return ended


def _run(
    writer: Connection,
    rank: int,
    size: int,
    port: int,
    initialise: bool,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), **where})
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell ignores it for what runs in its background
    try:
        if initialise:
            dist.init_process_group("gloo")
        ended = Ended(work(rank, *args))
    except BaseException as error:
        ended = Ended(None, type(error), str(error), traceback.format_exc())
    writer.send_bytes(pickle.dumps(ended))  # `send` would leave tensors behind, in memory that ends with this
    writer.close()
