"""Comparison of codes that float32 sums decide."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_codes(actual: Tensor, wanted: Tensor, one_in: int = 10_000, apart: int = 1) -> None:
    """The order of a float32 sum may move a value over a tie: as often as docs/numerics.md allows, or said.

    Args:
        actual: i8, on any device.
        wanted: i8 of the same shape.
        one_in: one code of so many may differ, and one more.
        apart: how far.
    """
    assert actual.dtype == torch.int8
    assert actual.shape == wanted.shape
    difference = (actual.cpu().int() - wanted.cpu().int()).abs()
    assert difference.numel() == 0 or difference.max() <= apart
    assert difference.count_nonzero() <= 1 + difference.numel() // one_in
