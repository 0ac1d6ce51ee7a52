"""Numbers as text: decibels, bytes, times, shares; a dash where nothing was measured."""

from __future__ import annotations

import math

MISSING = "–"
SPACE = "\u00a0"  # between number and unit, so that no line ends there


def decimal(value: float | None, digits: int = 1) -> str:
    """Fixed digits with a real minus sign; infinity as its symbol."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.{digits}f}".replace("-", "−")


def with_spread(value: float | None, spread: float | None) -> str:
    """Mean ± spread."""
    if value is None or spread is None:
        return decimal(value)
    return f"{decimal(value)} ± {decimal(spread)}"


def data_size(num_bytes: float) -> str:
    """Bytes in units of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.{2 if num_bytes < 10 * size else 1}f}{SPACE}{unit}"
    return f"{num_bytes:.0f}{SPACE}B"


def duration(seconds: float | None) -> str:
    """Three significant digits in µs, ms, s or minutes."""
    if seconds is None:
        return MISSING
    if seconds >= 120:
        return f"{seconds / 60:.1f}{SPACE}min"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            scaled = seconds / size
            return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f}{SPACE}{unit}"
    raise AssertionError("unreachable: microseconds take the rest")


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 in per cent."""
    return MISSING if share is None else f"{100 * share:.{digits}f}{SPACE}%"


def plain_number(value: float, digits: int = 6) -> str:
    """A tick label: no trailing zeros."""
    return f"{value:.{digits}g}".replace("-", "−")
