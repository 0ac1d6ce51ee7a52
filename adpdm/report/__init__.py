"""Writes the self-contained HTML report of a run from plain data."""

from __future__ import annotations

from pathlib import Path

from ..files import replacing
from .data import (
    ComparisonRow,
    Coverage,
    GroupMap,
    ImageSet,
    LayerRange,
    LayerRun,
    LayerSqnr,
    ModelSize,
    ReportData,
    SampleScore,
    SelectionTrace,
    StepCorrection,
    StepCurve,
    StepTime,
)
from .page import render

__all__ = [
    "ComparisonRow",
    "Coverage",
    "GroupMap",
    "ImageSet",
    "LayerRange",
    "LayerRun",
    "LayerSqnr",
    "ModelSize",
    "ReportData",
    "SampleScore",
    "SelectionTrace",
    "StepCorrection",
    "StepCurve",
    "StepTime",
    "render",
    "write_report",
]


def write_report(path: Path | str, data: ReportData) -> Path:
    """Writes `data` as one HTML file: under a temporary name first, so that no half report is ever seen.

    Returns:
        The path. The same data give the same bytes.
    """
    target, document = Path(path), render(data).encode("utf-8")
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        temporary.write_bytes(document)
    return target
