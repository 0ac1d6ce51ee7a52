"""Scales, axes and lines of the SVG charts; all colours come from the style sheet's classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .formats import plain_number
from .markup import Html, join, tag

NAME_WIDTH = 6.4  # of one character of a layer name at the 10.5 px of the style sheet's monospaced font


@dataclass(frozen=True)
class Scale:
    """Linear map from [low, high] to pixels [start, end]; a flat domain maps to the middle."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        if self.high == self.low:
            return (self.start + self.end) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) + 0.0 for i in range(first, last + 1)]


def padded(values: np.ndarray, share: float = 0.06) -> tuple[float, float]:
    """Domain of the finite values with a margin; (0, 1) when there are none."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    margin = (high - low) * share or max(abs(high) * share, 0.5)
    return low - margin, high + margin


def svg(width: float, height: float, label: str, *children: Html | None) -> Html:
    """A chart with the text a screen reader says."""
    return tag("svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label)


def text(x: float, y: float, words: str, anchor: str = "start", class_: str | None = None) -> Html:
    """One line of text."""
    return tag(
        "text",
        words,
        x=float(x),
        y=float(y),
        text_anchor=anchor if anchor != "start" else None,
        class_=class_,
    )


def y_axis(scale: Scale, left: float, right: float, values: Sequence[float] | None = None) -> Html:
    """Horizontal grid lines with numbers at their left."""
    parts = []
    for value in ticks(scale.low, scale.high) if values is None else values:
        y = scale(value)
        parts.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(text(left - 8, y + 4, plain_number(value), "end"))
    return join(parts)


def x_axis(scale: Scale, top: float, bottom: float) -> Html:
    """Vertical grid lines with numbers below."""
    parts = []
    for value in ticks(scale.low, scale.high, 8):
        x = scale(value)
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"))
        parts.append(text(x, bottom + 17, plain_number(value), "middle"))
    return join(parts)


def step_axis(timesteps: np.ndarray, left: float, cell: float, y: float, title: bool = True) -> Html:
    """Timesteps below columns of width `cell`, some of them labelled, noisy and clean named at the ends."""
    count = len(timesteps)
    every = max(1, math.ceil(44 / cell))  # 44 px: a label of four digits, their point, and air
    marks = [k for k in range(count) if k % every == 0]
    right = left + count * cell
    parts = [
        text(left + (k + 0.5) * cell, y + 16, plain_number(float(timesteps[k]), 4), "middle") for k in marks
    ]
    if title:
        parts.append(text(left, y + 36, "← noisy"))
        parts.append(text((left + right) / 2, y + 36, "timestep", "middle"))
        parts.append(text(right, y + 36, "clean →", "end"))
    return join(parts)


def path(xs: Sequence[float], ys: Sequence[float], class_: str) -> Html:
    """A polyline that breaks at values that are not finite."""
    words, pen = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if not math.isfinite(y):
            pen = "M"
            continue
        words.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return tag("path", d="".join(words), class_=class_)


def runs(values: np.ndarray) -> list[tuple[int, int, int]]:
    """(first, end, value) of the stretches of equal neighbours."""
    edges = np.flatnonzero(np.diff(values)) + 1
    bounds = [0, *edges.tolist(), len(values)]
    return [(a, b, int(values[a])) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


def legend(entries: Sequence[tuple[str, str, str]]) -> Html:
    """A list of (name, colour, kind), kind being "", "line" or "line dashed"."""
    items = [
        tag("li", tag("i", class_=kind or None, style=f"--c:{colour}", aria_hidden="true"), name)
        for name, colour, kind in entries
    ]
    return tag("ul", *items, class_="legend")


def name_margin(names: Sequence[str]) -> float:
    """Width that the longest layer name takes."""
    return min(330.0, 14 + NAME_WIDTH * max((len(n) for n in names), default=0))


def short_name(name: str) -> str:
    """A layer name that fits `name_margin`: the end says more than the beginning."""
    limit = int((330 - 14) / NAME_WIDTH)
    return name if len(name) <= limit else "…" + name[-(limit - 1) :]
