"""Figures of what quantization costs and saves: SQNR per step and layer, groupings compared, sizes, times."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from . import charts
from .data import (
    ComparisonRow,
    LayerSqnr,
    ModelSize,
    SampleScore,
    StepCorrection,
    StepCurve,
    StepTime,
)
from .figures_groups import WIDTH, simple_table
from .formats import data_size, decimal, duration, percent, plain_number, with_spread
from .markup import Html, join, tag
from .style import SERIES_LIGHT

HIGHLIGHT = "search"  # the method of the paper; the other groupings are what it is measured against


def series_class(index: int) -> str:
    """CSS class that carries the colour of a series."""
    return f"s{index % len(SERIES_LIGHT)}"


def series_colour(index: int) -> str:
    """The same as a CSS value."""
    return f"var(--series-{index % len(SERIES_LIGHT)})"


def curve_families(curves: Sequence[StepCurve]) -> dict[str, int]:
    """Colour index of every family, in order of appearance."""
    names = dict.fromkeys(c.family or c.name for c in curves)
    return {name: i for i, name in enumerate(names)}


def step_legend(curves: Sequence[StepCurve]) -> Html:
    """One entry per curve."""
    families = curve_families(curves)
    return charts.legend(
        [
            (c.name, series_colour(families[c.family or c.name]), "line dashed" if c.is_dashed else "line")
            for c in curves
        ]
    )


def step_chart(curves: Sequence[StepCurve]) -> Html:
    """SQNR of the noise prediction over the trajectory, a column per call, one line per curve."""
    timesteps, families = curves[0].timesteps, curve_families(curves)
    calls = len(timesteps)
    left, right, top, bottom = 52.0, WIDTH - 8, 12.0, 312.0
    y = charts.Scale(*charts.padded(np.concatenate([c.sqnr_db for c in curves])), bottom, top)
    cell = (right - left) / max(1, calls)
    centres = [left + (k + 0.5) * cell for k in range(calls)]
    parts = [charts.y_axis(y, left, right), charts.text(left + 6, top + 10, "dB")]
    for c in curves:
        line = charts.path(
            centres, [y(float(v)) for v in c.sqnr_db], "curve dash" if c.is_dashed else "curve"
        )
        parts.append(tag("g", line, class_=series_class(families[c.family or c.name])))
    for k in range(calls):
        values = "".join(f"\n{c.name}: {decimal(float(c.sqnr_db[k]))} dB" for c in curves)
        tip = f"call {k}, timestep {plain_number(float(timesteps[k]))}{values}"
        box = {"x": left + k * cell, "y": top, "width": cell, "height": bottom - top}
        parts.append(tag("rect", class_="hot", data_tip=tip, **box))
    parts.append(charts.step_axis(timesteps, left, cell, bottom))
    return charts.svg(WIDTH, bottom + 44, "SQNR of the noise prediction at every call", *parts)


def step_table(curves: Sequence[StepCurve]) -> Html:
    """The numbers of `step_chart`."""
    rows = [
        (plain_number(float(t)), *(decimal(float(c.sqnr_db[k]), 2) for c in curves))
        for k, t in enumerate(curves[0].timesteps)
    ]
    return simple_table(("timestep", *(f"{c.name}, dB" for c in curves)), rows)


def correction_chart(corrections: Sequence[StepCorrection]) -> Html:
    """Squared error of predictions that their correction leaves, one line per configuration."""
    timesteps, steps = corrections[0].timesteps, len(corrections[0].timesteps)
    left, right, top, bottom = 52.0, WIDTH - 8, 12.0, 212.0
    y = charts.Scale(0.0, 1.0, bottom, top)
    cell = (right - left) / max(1, steps)
    centres = [left + (k + 0.5) * cell for k in range(steps)]
    parts = [charts.y_axis(y, left, right)]
    for index, c in enumerate(corrections):
        line = charts.path(centres, [y(float(v)) for v in c.energy_left], "curve")
        parts.append(tag("g", line, class_=series_class(index)))
    for k in range(steps):
        values = "".join(
            f"\n{c.name}: {percent(float(c.energy_left[k]))}, {_weights(c, k)}" for c in corrections
        )
        tip = f"step {k}, timestep {plain_number(float(timesteps[k]))}{values}"
        box = {"x": left + k * cell, "y": top, "width": cell, "height": bottom - top}
        parts.append(tag("rect", class_="hot", data_tip=tip, **box))
    parts.append(charts.step_axis(timesteps, left, cell, bottom))
    return charts.svg(WIDTH, bottom + 44, "Squared error that corrected predictions keep", *parts)


def _weights(correction: StepCorrection, step: int) -> str:
    of_prediction, of_sample = (float(x) for x in correction.weights[step])
    return f"{of_prediction:.2f} prediction {of_sample:+.2f} sample"


def correction_table(corrections: Sequence[StepCorrection]) -> Html:
    """The numbers of `correction_chart`, of the steps that any configuration corrects."""
    rows = [
        (
            plain_number(float(t)),
            *(f"{percent(float(c.energy_left[k]))}: {_weights(c, k)}" for c in corrections),
        )
        for k, t in enumerate(corrections[0].timesteps)
        if any(c.energy_left[k] < 1 for c in corrections)
    ]
    return simple_table(("timestep", *(c.name for c in corrections)), rows)


def layer_rows(layers: Sequence[LayerSqnr]) -> list[tuple[str, list[float]]]:
    """(layer name, value of every configuration), nan where one does not have the layer."""
    names = dict.fromkeys(name for data in layers for name in data.layer_names)
    tables = [dict(zip(d.layer_names, d.sqnr_db.tolist(), strict=True)) for d in layers]
    return [(name, [table.get(name, float("nan")) for table in tables]) for name in names]


def layer_chart(layers: Sequence[LayerSqnr]) -> Html:
    """One row per layer, one dot per configuration."""
    rows = layer_rows(layers)
    left, right, row, top = charts.name_margin([name for name, _ in rows]), WIDTH - 16, 16.0, 8.0
    values = np.concatenate([d.sqnr_db for d in layers])
    low, high = charts.padded(values, 0.03)
    x = charts.Scale(low, high, left, right)
    bottom = top + len(rows) * row
    parts = [charts.x_axis(x, top, bottom)]
    for i, (name, numbers) in enumerate(rows):
        y = top + (i + 0.5) * row
        parts.append(charts.text(left - 10, y + 4, charts.short_name(name), "end", "name"))
        finite = [x(v) for v in numbers if np.isfinite(v)]
        if len(finite) > 1:
            parts.append(
                tag("line", x1=min(finite), x2=max(finite), y1=y, y2=y, class_="base", stroke_opacity=0.5)
            )
        for j, value in enumerate(numbers):
            if np.isfinite(value):
                dot = tag("circle", cx=x(value), cy=y, r=4.5, class_=f"dot {series_class(j)}")
                parts.append(dot)
        said = "".join(f"\n{d.name}: {decimal(v)} dB" for d, v in zip(layers, numbers, strict=True))
        box = {"x": 0, "y": y - row / 2, "width": WIDTH, "height": row}
        parts.append(tag("rect", class_="hot", data_tip=name + said, **box))
    parts.append(charts.text((left + right) / 2, bottom + 36, "SQNR of the layer's output, dB", "middle"))
    return charts.svg(WIDTH, bottom + 44, f"SQNR of {len(rows)} layers", *parts)


def layer_table(layers: Sequence[LayerSqnr]) -> Html:
    """The numbers of `layer_chart`."""
    rows = [(name, *(decimal(v, 2) for v in values)) for name, values in layer_rows(layers)]
    return simple_table(("layer", *(f"{d.name}, dB" for d in layers)), rows)


def score_table(scores: Sequence[SampleScore]) -> Html:
    """Final samples against full precision, a row per configuration."""
    rows = []
    for s in scores:
        interval = (
            "–" if s.frechet is None else f"{decimal(s.frechet_low, 2)} to {decimal(s.frechet_high, 2)}"
        )
        kept = "–" if s.frechet_dimensions is None else str(s.frechet_dimensions)
        numbers = (decimal(s.psnr_db), decimal(s.sqnr_db), decimal(s.lpips, 4), decimal(s.frechet, 2))
        rows.append((s.name, str(s.num_images), *numbers, interval, kept))
    head = (
        "configuration",
        "images",
        "PSNR, dB",
        "SQNR, dB",
        "LPIPS",
        "Fréchet (Lite0)",
        "95 % of resamples",
        "dimensions",
    )
    return simple_table(head, rows)


def comparison_chart(rows: Sequence[ComparisonRow]) -> Html:
    """PSNR of the final samples with its spread, one row per grouping, bit widths apart."""
    left, right, row, y = 200.0, WIDTH - 120, 26.0, 8.0
    ends = [r.psnr_db + s * (r.psnr_spread_db or 0.0) for r in rows if r.psnr_db is not None for s in (-1, 1)]
    x = charts.Scale(*charts.padded(np.array(ends), 0.05), left, right)
    parts: list[Html] = []
    for bits, block in groupby(rows, key=lambda r: r.bits):
        members = list(block)
        parts.append(charts.text(0, y + 16, bits, class_="title"))
        for r in members:
            parts.append(_comparison_row(r, x, y, row))
            y += row
        y += 14
    grid = charts.x_axis(x, 4, y - 6)
    parts.append(charts.text((left + right) / 2, y + 30, "PSNR of the final samples, dB", "middle"))
    return charts.svg(WIDTH, y + 38, "PSNR of the final samples by grouping", grid, *parts)


def _comparison_row(r: ComparisonRow, x: charts.Scale, y: float, height: float) -> Html:
    """Name, dot, whisker and number of one grouping."""
    middle, is_ours = y + height / 2 - 1, r.grouping == HIGHLIGHT
    words = "strong" if is_ours else "label"
    parts = [charts.text(x.start - 16, middle + 4, r.grouping, "end", words)]
    if r.psnr_db is None or not np.isfinite(r.psnr_db):
        return join([*parts, charts.text(x.start + 8, middle + 4, decimal(r.psnr_db))])
    spread = r.psnr_spread_db or 0.0
    if spread > 0:
        ends = {"x1": x(r.psnr_db - spread), "x2": x(r.psnr_db + spread), "y1": middle, "y2": middle}
        parts.append(tag("line", class_="whisker", **ends))
    tip = f"{r.bits} {r.grouping}\nPSNR {with_spread(r.psnr_db, r.psnr_spread_db)} dB, {r.num_seeds} seeds"
    parts.append(tag("circle", cx=x(r.psnr_db), cy=middle, r=5.5, class_="dot", data_tip=tip))
    parts.append(charts.text(x(r.psnr_db + spread) + 12, middle + 4, decimal(r.psnr_db), class_=words))
    return tag("g", *parts, class_=series_class(0 if is_ours else len(SERIES_LIGHT) - 1))


def comparison_table(rows: Sequence[ComparisonRow]) -> Html:
    """All numbers of the comparison; columns nobody measured are left out."""
    columns = [
        ("PSNR, dB", [with_spread(r.psnr_db, r.psnr_spread_db) for r in rows], True),
        ("seeds", [str(r.num_seeds) for r in rows], True),
        ("noise SQNR, dB", [decimal(r.sqnr_db) for r in rows], any(r.sqnr_db is not None for r in rows)),
        ("LPIPS", [decimal(r.lpips, 4) for r in rows], any(r.lpips is not None for r in rows)),
        ("Fréchet (Lite0)", [decimal(r.frechet) for r in rows], any(r.frechet is not None for r in rows)),
        ("soft/hard gap, dB", [decimal(r.soft_hard_gap_db, 2) for r in rows], True),
        ("calibration", [duration(r.seconds) for r in rows], True),
    ]
    shown = [(head, cells) for head, cells, is_there in columns if is_there]
    best = _best(rows)
    body = []
    for i, r in enumerate(rows):
        marks = ["split"] * (i > 0 and rows[i - 1].bits != r.bits) + ["best"] * (i in best)
        heads = (tag("th", r.bits, class_="row", scope="row"), tag("td", r.grouping, class_="text"))
        cells = [tag("td", column[i]) for _, column in shown]
        body.append(tag("tr", *heads, *cells, class_=" ".join(marks) or None))
    head = [tag("th", "bits", class_="text", scope="col"), tag("th", "grouping", class_="text", scope="col")]
    head += [tag("th", name, scope="col") for name, _ in shown]
    return tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body))


def _best(rows: Sequence[ComparisonRow]) -> set[int]:
    """Index of the highest PSNR of every bit width with at least two rows."""
    best = set()
    for bits in {r.bits for r in rows}:
        members = [i for i, r in enumerate(rows) if r.bits == bits and r.psnr_db is not None]
        if len(members) > 1:
            best.add(max(members, key=lambda i: rows[i].psnr_db or 0.0))
    return best


def size_chart(sizes: Sequence[ModelSize]) -> Html:
    """A bar per model; the first is the original."""
    bars = [
        (s.name, float(s.num_bytes), f"{data_size(s.num_bytes)}{_ratio(sizes, i)}")
        for i, s in enumerate(sizes)
    ]
    return _bars(bars, "Size of the weight files")


def time_chart(times: Sequence[StepTime]) -> Html:
    """Two bars per configuration and batch size."""
    bars = []
    for t in times:
        bars.append(
            (f"full precision, batch {t.batch_size}", t.reference_seconds, duration(t.reference_seconds))
        )
        bars.append((f"{t.name}, batch {t.batch_size}", t.quantized_seconds, duration(t.quantized_seconds)))
    return _bars(bars, "Time of one denoiser call", every=2)


def time_table(times: Sequence[StepTime]) -> Html:
    """Medians and paired ratios."""
    rows = [
        (
            t.name,
            str(t.batch_size),
            duration(t.reference_seconds),
            duration(t.quantized_seconds),
            f"{decimal(t.speedup, 2)}×",
            f"{decimal(t.speedup_low, 2)} to {decimal(t.speedup_high, 2)}",
            t.note or "–",
        )
        for t in times
    ]
    return simple_table(
        ("configuration", "batch", "full precision", "quantized", "speedup", "quartiles", "how"), rows
    )


def size_table(sizes: Sequence[ModelSize]) -> Html:
    """Bytes and shares."""
    first = sizes[0].num_bytes
    rows = [(s.name, f"{s.num_bytes:,}".replace(",", " "), percent(s.num_bytes / first)) for s in sizes]
    return simple_table(("model", "bytes", "of the original"), rows)


def _ratio(sizes: Sequence[ModelSize], index: int) -> str:
    return f", {decimal(sizes[0].num_bytes / sizes[index].num_bytes, 2)}× smaller" if index else ""


def _bars(bars: Sequence[tuple[str, float, str]], label: str, every: int = 0) -> Html:
    """Horizontal bars from zero with their numbers at the end; the original is grey, the others accented."""
    left, right, row, y = 200.0, WIDTH - 170, 26.0, 4.0
    x = charts.Scale(0.0, max((b[1] for b in bars), default=1.0) or 1.0, left, right)
    parts = []
    for i, (name, value, words) in enumerate(bars):
        is_original = i % every == 0 if every else i == 0
        if every and is_original and i:
            y += 10
        box = {"x": left, "y": y + 3, "width": max(1.0, x(value) - left), "height": row - 9, "rx": 2}
        colour = series_class(len(SERIES_LIGHT) - 1 if is_original else 0)
        parts.append(charts.text(left - 16, y + row / 2 + 3, name, "end", "label"))
        parts.append(tag("rect", class_=f"fill {colour}", **box))
        parts.append(charts.text(x(value) + 10, y + row / 2 + 3, words, class_="label"))
        y += row
    return charts.svg(WIDTH, y + 6, label, *parts)
