"""The process of one contestant: builds it, then answers commands, one line of JSON each, over its pipes.

    {"do": "reference" | "prepare" | "load", "job": {...}}     {"do": "run", "forwards": 3, "warm": true}
    {"do": "probe"}     {"do": "memory"}

Each is answered by {"done": {...}}, {"missing": "what to install"} or {"failed": "what went wrong"}. Standard
output belongs to the answers; what libraries print goes to standard error, which the parent keeps in a file.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import unets
from contestants import REGISTRY, Contestant
from engines import Engine, probes
from job import Job

REQUIREMENTS = "pip install -r benchmarks/requirements-peers.txt"
PROBES = 3  # steps at which outputs are compared: an early, a middle and a late one
WARMUP_CALLS = 3


class Missing(Exception):
    """A package or device that this contestant needs is not there."""


def take_stdout() -> TextIO:
    """The pipe to the parent; from here on descriptor 1 is standard error."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return channel


def memory(field: str) -> int | None:
    """VmRSS (now) or VmHWM (peak) of this process in bytes, where the system tells it."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024


def reset_peak() -> None:
    """Let VmHWM start from what is resident now, after giving back what the build left behind."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def check(contestant: Contestant, device: str) -> None:
    """Raise Missing for a package or device that is not there."""
    absent = [name for name in contestant.needs if importlib.util.find_spec(name) is None]
    if "adpdm" in absent:
        raise Missing("needs adpdm in this Python: pip install -e .")
    if absent:
        raise Missing(f"needs {', '.join(absent)} in this Python: {REQUIREMENTS}")
    if device == "cuda" and not torch.cuda.is_available():
        raise Missing("needs a CUDA device that this torch can use")


def import_libraries(contestant: Contestant, model: str) -> None:
    """So that they do not count as the model's memory."""
    for name in contestant.needs:
        importlib.import_module(name)
    if "diffusers" in contestant.needs:
        unets.class_of(model)  # diffusers imports its parts when they are first named


def versions(contestant: Contestant) -> dict[str, str]:
    """Of Python and of every package the contestant runs on."""
    packages = {name: importlib.metadata.version(name) for name in contestant.needs if name != "adpdm"}
    if contestant.is_ours:
        packages["adpdm"] = importlib.import_module("adpdm").__version__
    return {"python": platform.python_version(), "torch": torch.__version__, **packages}


def write_reference(job: Job) -> dict[str, Any]:
    """Write calibration inputs, probes, and what torch float32 says to the probes.

    adpdm's own sampler makes them, so they are what `adpdm.quantize` calibrates on, value for value.
    """
    from adpdm.trajectory import Sampler

    unet = unets.find(job.model)
    job.batch_folder.mkdir(parents=True, exist_ok=True)
    model = unets.build(job.model).to(memory_format=torch.channels_last)

    def run(seed: int, images: int) -> Any:
        conditions = unets.conditioning(job.model, images, seed)
        steps = unet.calibration_steps
        sampler = Sampler(model, unets.scheduler(job.model), unet.sample_shape, steps, conditions)
        return sampler.timesteps, sampler.run(seed, 0, images)

    if not job.calibration_file.exists():
        timesteps, made = run(unets.CALIBRATION_SEED, unet.calibration_images)
        unets.save_trajectory(job.calibration_file, made.samples, timesteps, made.conditioning)
    timesteps, made = run(unets.PROBE_SEED, job.batch)
    chosen = [len(timesteps) * (2 * k + 1) // (2 * PROBES) for k in range(PROBES)]
    unets.save_trajectory(job.probe_file, made.samples[chosen], timesteps[chosen], made.conditioning)
    np.save(job.outputs_file("reference"), made.noise_preds[chosen].contiguous().numpy())
    return {"timesteps": timesteps[chosen].tolist()}


class Loaded:
    """A built contestant with the inputs of its probes bound."""

    def __init__(self, job: Job) -> None:
        contestant = REGISTRY[job.contestant]
        check(contestant, job.device)
        import_libraries(contestant, job.model)
        self.job, self.base_memory, start = job, memory("VmRSS"), time.perf_counter()
        self.engine: Engine = contestant.load(job)
        self.calls: list[Callable[[], Any]] = [self.engine.bind(inputs) for inputs in probes(job)]
        self.timed = self.calls[len(self.calls) // 2]
        self.timed()
        self.engine.synchronize()
        self.load_seconds, self.load_peak = time.perf_counter() - start, memory("VmHWM")
        reset_peak()
        for _ in range(WARMUP_CALLS - 1):
            self.run(1, False)
        self.facts = {"versions": versions(contestant), "notes": self.engine.notes}

    def describe(self) -> dict[str, Any]:
        forward = self.run(1, False)["wall"]
        return {**self.facts, "load_seconds": self.load_seconds, "forward_seconds": forward}

    def run(self, forwards: int, warm: bool) -> dict[str, float]:
        """Seconds per forward, on the wall and of all threads of this process."""
        if warm:  # the process before this one has taken the caches
            self.timed()
        self.engine.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(forwards):
            self.timed()
        self.engine.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"wall": wall / forwards, "cpu": cpu / forwards}

    def probe(self) -> dict[str, Any]:
        """Write the outputs on all probes."""
        outputs = np.stack([self.engine.fetch(call()) for call in self.calls])
        np.save(self.job.outputs_file(self.job.contestant), outputs)
        return {}

    def memory(self) -> dict[str, Any]:
        """Bytes: with libraries alone, at most while loading, at most while running, and on the device."""
        device = torch.cuda.max_memory_allocated() if self.job.device == "cuda" else None
        names = ("base", "load_peak", "run_peak", "device_peak")
        return dict(zip(names, (self.base_memory, self.load_peak, memory("VmHWM"), device), strict=True))


def prepare(job: Job) -> dict[str, Any]:
    """Write a contestant's artifact."""
    contestant, start = REGISTRY[job.contestant], time.perf_counter()
    check(contestant, "cpu")
    assert contestant.prepare is not None, "the parent asks only contestants that have something to prepare"
    contestant.prepare(job)
    return {"seconds": time.perf_counter() - start}


class Server:
    """Answers commands; holds the contestant between them."""

    def __init__(self) -> None:
        self.loaded: Loaded | None = None

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """What a command comes to; nothing it raises ends the process."""
        try:
            return {"done": self._do(command)}
        except Missing as error:
            return {"missing": str(error)}
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or ["no message"]
            return {"failed": f"{type(error).__name__}: {lines[0]}"}

    def _do(self, command: dict[str, Any]) -> dict[str, Any]:
        what = command["do"]
        if what == "load":
            self.loaded = Loaded(Job(**command["job"]))
            return self.loaded.describe()
        if what in ("reference", "prepare"):
            return {"reference": write_reference, "prepare": prepare}[what](Job(**command["job"]))
        assert self.loaded is not None, f"load comes before {what}"
        if what == "run":
            return self.loaded.run(command["forwards"], command["warm"])
        return {"probe": self.loaded.probe, "memory": self.loaded.memory}[what]()


def main() -> None:
    """Serve until the parent closes the pipe."""
    channel, server = take_stdout(), Server()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    for line in sys.stdin:
        print(json.dumps(server.answer(json.loads(line))), file=channel, flush=True)


if __name__ == "__main__":
    main()
