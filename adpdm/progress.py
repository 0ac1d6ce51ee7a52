"""How work that takes long tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # phase, done, total


def silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
