"""Timing on a GPU: between two events, in CUDA graphs or called from Python, contestants in turns."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

Call = Callable[[], Any]

WARMUP = 3
CALLS_PER_GRAPH = 10  # a replay must last long against the 2 us that an event resolves
SAMPLE_MICROSECONDS = 10_000.0  # that calls from Python last together, for the same reason


@dataclass(frozen=True)
class Timing:
    """One contestant over all rounds: median time, and its time divided by that of the first contestant."""

    microseconds: float
    ratio: float | None  # median of the ratios within a round; None where the first contestant failed
    quartiles: tuple[float, float] | None  # of these ratios


@dataclass(frozen=True)
class Failed:
    """A contestant that raised before it could be timed."""

    reason: str


class Clock(Protocol):
    """A contestant that is ready to be timed."""

    def microseconds(self) -> float:
        """Of one call, from one sample."""


def elapsed_microseconds(call: Call, calls: int = 1) -> float:
    """Of several calls in a row, altogether."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


class Timed:
    """One contestant, captured; `microseconds` times one replay."""

    def __init__(self, call: Call, calls: int = CALLS_PER_GRAPH) -> None:
        self._calls = calls
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(calls):
                call()

    def microseconds(self) -> float:
        """Per call, of one replay."""
        return elapsed_microseconds(self._graph.replay) / self._calls


class Called:
    """One contestant, called from Python as often as fills a sample; what waits for Python counts."""

    def __init__(self, call: Call) -> None:
        self._call = call
        for _ in range(WARMUP):
            call()
        self._calls = max(1, round(SAMPLE_MICROSECONDS / elapsed_microseconds(call)))

    def microseconds(self) -> float:
        """Per call, of one sample."""
        return elapsed_microseconds(self._call, self._calls) / self._calls


def compare(contestants: Mapping[str, Call], rounds: int) -> dict[str, Timing | Failed]:
    """Time calls in CUDA graphs, as `race` does."""
    return race({name: partial(Timed, call) for name, call in contestants.items()}, rounds)


def race(makers: Mapping[str, Callable[[], Clock]], rounds: int) -> dict[str, Timing | Failed]:
    """Time all contestants in turns, so that a clock that drifts drifts for all.

    One that raises, such as for what this torch or card lacks, is left out with its reason, and its traceback
    goes to standard error; the others are timed. After an error that spoils the process, such as a read out
    of bounds, all that follow raise the same: the first is the one that did it.
    """
    clocks: dict[str, Clock] = {}
    failed: dict[str, Failed] = {}
    for name, make in makers.items():
        try:
            clock = make()
            clock.microseconds()
            clocks[name] = clock
        except Exception as error:  # of whatever library; scripts name it and exit with 1
            failed[name] = Failed(reason_of(error))
    samples: list[dict[str, float]] = []
    while clocks and len(samples) < rounds:
        sample: dict[str, float] = {}
        for name, clock in list(clocks.items()):
            try:
                sample[name] = clock.microseconds()
            except Exception as error:
                failed[name] = Failed(reason_of(error))
                del clocks[name]
        samples.append(sample)
    timings = summarize([{name: s[name] for name in clocks} for s in samples], next(iter(makers)))
    return {name: failed[name] if name in failed else timings[name] for name in makers}


def reason_of(error: Exception) -> str:
    """An error in a line; its traceback goes to standard error."""
    traceback.print_exception(error)
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def summarize(samples: list[dict[str, float]], first: str) -> dict[str, Timing]:
    """Medians of times, and of the ratios to the contestant `first` within a round."""
    timings = {}
    for name in samples[0] if samples else ():
        ratio = quartiles = None
        if first in samples[0]:
            ratios = [s[name] / s[first] for s in samples]
            low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
            quartiles = (low, high)
        timings[name] = Timing(statistics.median(s[name] for s in samples), ratio, quartiles)
    return timings
