"""How every layer of a quantized model runs, from the record that `adpdm quantize` leaves beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .nn import FusionInfo, block_around
from .report import Coverage, LayerRun


def read_record(file: Path) -> dict[str, Any]:
    """The record in a file, a `QuantizationReport.to_dict`.

    Raises:
        ValueError: it is none.
    """
    wanted = f"{file} must be the record that `adpdm quantize` writes"
    try:
        record = json.loads(file.read_text())
    except ValueError as error:  # of JSON, and of bytes that are no text
        raise ValueError(f"{wanted}, got no JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{wanted}, got {record!r:.40}")
    if missing := {"config", "layers", "coverage", "trace"} - set(record):
        raise ValueError(f"{wanted}, got one without {', '.join(sorted(missing))}")
    try:
        recorded_coverage(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__} {error}"
        raise ValueError(f"{wanted}, got one with damaged layers, coverage or fusion: {what}") from error
    return record


def work_shares(record: Mapping[str, Any]) -> dict[str, float]:
    """Every layer's share of the multiply-accumulates, by name."""
    total = sum(layer["macs"] for layer in record["layers"]) or 1
    return {layer["name"]: layer["macs"] / total for layer in record["layers"]}


def recorded_coverage(record: Mapping[str, Any]) -> Coverage:
    """What runs in integers, and how.

    Args:
        record: as `QuantizationReport.to_dict`; without "fusion" it does not tell which layers are fused.
    """
    stored = record.get("fusion")
    fusion = None if stored is None else [FusionInfo.from_dict(info) for info in stored]
    shares = work_shares(record)
    return Coverage(
        record["coverage"]["macs"],
        record["coverage"]["parameters"],
        tuple(_layer_run(layer, fusion, shares[layer["name"]]) for layer in record["layers"]),
        None if fusion is None else sum(info.fused for info in fusion),
    )


def _layer_run(layer: Mapping[str, Any], fusion: Sequence[FusionInfo] | None, share: float) -> LayerRun:
    name = layer["name"]
    if layer["bits"] is None:
        return LayerRun(name, "float", layer["reason"], macs_share=share)
    if fusion is None:
        return LayerRun(name, "integer", macs_share=share)
    info = block_around(name, fusion)
    block = "" if info.name == name else info.label
    return LayerRun(name, "fused" if info.fused else "per layer", info.reason, block, share)
