"""How layers run: a sentence about all of them, and a table of some by the reason that they are not fused."""

from __future__ import annotations

from collections.abc import Sequence

from .data import Coverage, LayerRun
from .formats import MISSING, percent
from .markup import Html, tag


def run_sentence(coverage: Coverage) -> str:
    """How many layers run in which way, with their shares of the work where those of all are known."""
    ways = {"integer": "run in integers"}
    if coverage.fused_blocks is not None:
        ways = {
            "fused": f"run fused in {_count(coverage.fused_blocks, 'block')}",
            "per layer": "layer by layer",
        }
    ways["float"] = "in full precision"
    is_known = all(layer.macs_share is not None for layer in coverage.layers)
    parts: list[str] = []
    for runs, words in ways.items():
        chosen = [layer for layer in coverage.layers if layer.runs == runs]
        unit = "" if parts else " of the multiply-accumulates"
        share = f" ({percent(_work(chosen))}{unit})" if is_known else ""
        parts.append(f"{len(chosen)} {words}{share}")
    return f"Of {_count(len(coverage.layers), 'layer')}, {', '.join(parts)}."


def reason_table(layers: Sequence[LayerRun]) -> Html:
    """Layers of one reason stand together, most work first; columns nobody knows are left out."""
    by_reason: dict[str, list[LayerRun]] = {}
    for layer in layers:
        by_reason.setdefault(layer.reason, []).append(layer)
    has_blocks = any(layer.block for layer in layers)
    has_work = any(layer.macs_share is not None for layer in layers)
    heads = [tag("th", "layer", class_="text", scope="col")]
    heads += [tag("th", "block", class_="text", scope="col")] if has_blocks else []
    heads += [tag("th", "multiply-accumulates", scope="col")] if has_work else []
    body = []
    for reason, members in sorted(by_reason.items(), key=lambda item: -_work(item[1])):
        total = f", {percent(_work(members))}" if has_work else ""
        words = f"{reason}: {_count(len(members), 'layer')}{total}"
        title = tag("th", words, class_="row text", scope="rowgroup", colspan=len(heads))
        body.append(tag("tr", title, class_="split"))
        body += [_row(layer, has_blocks, has_work) for layer in members]
    return tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body))


def _row(layer: LayerRun, has_blocks: bool, has_work: bool) -> Html:
    cells = [tag("td", tag("code", layer.name), class_="text")]
    if has_blocks:
        cells.append(tag("td", layer.block or MISSING, class_="text"))
    if has_work:
        cells.append(tag("td", percent(layer.macs_share)))
    return tag("tr", *cells)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _work(layers: Sequence[LayerRun]) -> float:
    return sum(layer.macs_share or 0.0 for layer in layers)
