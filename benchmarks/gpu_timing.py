"""Timing on a GPU: a CUDA graph of several calls between two events, contestants in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

WARMUP = 3
CALLS_PER_GRAPH = 10  # a replay must last long against the 2 us that an event resolves


@dataclass(frozen=True)
class Timing:
    """Medians of one contestant over all rounds."""

    microseconds: float
    ratio: float  # its time divided by that of the first contestant, median over rounds


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
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / self._calls


def compare(contestants: Mapping[str, Call], rounds: int) -> dict[str, Timing]:
    """Time all contestants in turns, so that a clock that drifts drifts for all."""
    timed = {name: Timed(call) for name, call in contestants.items()}
    for one in timed.values():
        one.microseconds()
    samples = [{name: one.microseconds() for name, one in timed.items()} for _ in range(rounds)]
    return summarize(samples)


def summarize(samples: list[dict[str, float]]) -> dict[str, Timing]:
    """Medians of times, and of the ratios to the first contestant within a round."""
    first = next(iter(samples[0]))
    return {
        name: Timing(
            statistics.median(s[name] for s in samples),
            statistics.median(s[name] / s[first] for s in samples),
        )
        for name in samples[0]
    }
