"""Figures of the method itself: the group map, activation ranges, and the timesteps that were selected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import charts
from .data import GroupMap, LayerRange, SelectionTrace
from .formats import decimal, plain_number
from .markup import Html, tag
from .style import group_colours

WIDTH = 1200.0  # units of a figure as wide as the page: one unit is one CSS pixel there
HALF = 576.0


def group_legend(num_groups: int) -> Html:
    """Swatches of all groups."""
    return charts.legend([(f"group {g}", colour, "") for g, colour in enumerate(group_colours(num_groups))])


def group_map(data: GroupMap) -> Html:
    """Layers x timesteps, coloured by group; one rectangle per stretch of equal groups."""
    layers, steps = data.group_index.shape
    left = charts.name_margin(data.layer_names)
    row, top = (15.0 if layers <= 80 else 12.0), 6.0
    cell = (WIDTH - left - 4) / max(1, steps)
    colours = group_colours(data.num_groups)
    parts = []
    for i, name in enumerate(data.layer_names):
        y = top + i * row
        parts.append(charts.text(left - 10, y + row - 4, charts.short_name(name), "end", "name"))
        for first, end, group in charts.runs(data.group_index[i]):
            tip = f"{name}\n{_steps(first, end, data.timesteps)}\ngroup {group}"
            box = {"x": left + first * cell, "y": y, "width": (end - first) * cell, "height": row - 1.5}
            parts.append(tag("rect", class_="cell", fill=colours[group], data_tip=tip, **box))
    bottom = top + layers * row
    parts.append(charts.step_axis(data.timesteps, left, cell, bottom))
    label = f"Group map of {data.name}: {layers} layers, {steps} timesteps, {data.num_groups} groups"
    return charts.svg(WIDTH, bottom + 44, label, *parts)


def group_table(data: GroupMap) -> Html:
    """The map in words: every layer's stretches."""
    rows = []
    for i, name in enumerate(data.layer_names):
        words = ", ".join(
            f"{first}–{end - 1}: {group}" if end - first > 1 else f"{first}: {group}"
            for first, end, group in charts.runs(data.group_index[i])
        )
        rows.append(
            tag(
                "tr", tag("th", tag("code", name), class_="row", scope="row"), tag("td", words, class_="text")
            )
        )
    head = tag(
        "tr", tag("th", "layer", class_="text"), tag("th", "steps (0 is the noisiest): group", class_="text")
    )
    return tag("table", tag("thead", head), tag("tbody", *rows))


def layer_range(data: LayerRange, num_groups: int) -> Html:
    """Smallest and largest activation of one layer per step, over the ranges of its groups."""
    steps = len(data.timesteps)
    left, right, top, bottom = 52.0, HALF - 4, 30.0, 236.0
    low, high = charts.padded(np.concatenate([data.observed, data.covered]).ravel())
    y = charts.Scale(low, high, bottom, top)
    cell = (right - left) / max(1, steps)
    colours = group_colours(num_groups)
    parts = [charts.text(left, 14, data.layer_name, class_="title"), charts.y_axis(y, left, right)]
    runs = charts.runs(data.group_index)
    for first, end, group in runs:
        lowest, highest = data.covered[first]
        box = {
            "x": left + first * cell,
            "y": y(highest),
            "width": (end - first) * cell,
            "height": y(lowest) - y(highest),
        }
        parts.append(tag("rect", fill=colours[group], fill_opacity=0.62, **box))
    for edge in (data.observed[:, 0].min(), data.observed[:, 1].max()) if steps else ():
        place = y(float(edge))
        parts.append(tag("line", x1=left, x2=right, y1=place, y2=place, class_="shared"))
    centres = [left + (k + 0.5) * cell for k in range(steps)]
    for side in (0, 1):
        parts.append(charts.path(centres, [y(float(v)) for v in data.observed[:, side]], "inkline"))
    for k in range(steps):
        (least, most), (lowest, highest) = data.observed[k], data.covered[k]
        tip = (
            f"step {k}, timestep {plain_number(float(data.timesteps[k]))}\n"
            f"activations {decimal(least, 2)} to {decimal(most, 2)}\n"
            f"group {data.group_index[k]} covers {decimal(lowest, 2)} to {decimal(highest, 2)}"
        )
        parts.append(_hot(left + k * cell, top, cell, bottom - top, tip))
    parts.append(charts.step_axis(data.timesteps, left, cell, bottom))
    return charts.svg(
        HALF, bottom + 44, f"Activation range of {data.layer_name} over {steps} timesteps", *parts
    )


def range_table(data: LayerRange) -> Html:
    """The numbers of `layer_range`."""
    rows = [
        (
            plain_number(float(t)),
            decimal(a[0], 3),
            decimal(a[1], 3),
            str(int(g)),
            decimal(c[0], 3),
            decimal(c[1], 3),
        )
        for t, a, g, c in zip(data.timesteps, data.observed, data.group_index, data.covered, strict=True)
    ]
    return simple_table(("timestep", "min", "max", "group", "covered from", "to"), rows)


def score_map(data: SelectionTrace, values: np.ndarray, name: str) -> Html:
    """Rounds x timesteps, darker where the value is higher; a dot marks the chosen step."""
    rounds, steps = values.shape
    left, row, top = 76.0, 24.0, 6.0
    cell = (WIDTH - left - 4) / max(1, steps)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    parts = []
    for r in range(rounds):
        y = top + r * row
        parts.append(charts.text(left - 10, y + row / 2 + 3, f"round {r + 1}", "end"))
        for k in range(steps):
            share = (float(values[r, k]) - low) / (high - low) if high > low else 0.5
            timestep = plain_number(float(data.timesteps[k]))
            tip = f"round {r + 1}, step {k}, timestep {timestep}\n{name} {decimal(float(values[r, k]), 3)}"
            box = {"x": left + k * cell, "y": y, "width": cell - 1, "height": row - 2}
            shade = 0.05 + 0.85 * share if np.isfinite(share) else 0.0
            parts.append(tag("rect", class_="heat", fill_opacity=shade, data_tip=tip, **box))
        k = int(data.chosen[r])
        centre = (left + (k + 0.5) * cell - 0.5, y + row / 2 - 1)
        parts.append(
            tag(
                "circle",
                cx=centre[0],
                cy=centre[1],
                r=4.5,
                fill="var(--card)",
                stroke="var(--ink)",
                stroke_width=2,
            )
        )
    bottom = top + rounds * row
    parts.append(charts.step_axis(data.timesteps, left, cell, bottom))
    label = f"{name} of every timestep in {rounds} selection rounds, chosen timesteps marked"
    return charts.svg(WIDTH, bottom + 44, label, *parts)


def visits_chart(data: SelectionTrace) -> Html:
    """How often each timestep was chosen."""
    steps = len(data.timesteps)
    visits = np.bincount(data.chosen.astype(int), minlength=steps)
    left, right, top, bottom = 40.0, HALF - 4, 30.0, 196.0
    most = max(1, int(visits.max(initial=0)))
    y = charts.Scale(0, most, bottom, top)
    cell = (right - left) / max(1, steps)
    marks = [v for v in charts.ticks(0, most, 4) if v == int(v)]
    parts = [
        charts.text(left, 14, "Visits per timestep", class_="title"),
        charts.y_axis(y, left, right, marks),
    ]
    for k in np.flatnonzero(visits):
        height = bottom - y(int(visits[k]))
        tip = f"step {k}, timestep {plain_number(float(data.timesteps[k]))}\nchosen {visits[k]} times"
        box = {
            "x": left + int(k) * cell + 1,
            "y": bottom - height,
            "width": max(1.0, cell - 2),
            "height": height,
        }
        parts.append(tag("rect", class_="heat", data_tip=tip, **box))
    parts.append(charts.step_axis(data.timesteps, left, cell, bottom))
    return charts.svg(HALF, bottom + 44, f"Visits per timestep in {len(data.chosen)} rounds", *parts)


def mmd_chart(data: SelectionTrace, mmd: np.ndarray) -> Html:
    """Distance between the chosen and all steps after each round."""
    rounds = len(mmd)
    left, right, top, bottom = 52.0, HALF - 12, 30.0, 196.0
    y = charts.Scale(0.0, max(1e-9, float(np.nanmax(mmd, initial=0.0))) * 1.08, bottom, top)
    x = charts.Scale(1, max(2, rounds), left + 8, right)
    parts = [
        charts.text(left, 14, "MMD, all against chosen steps", class_="title"),
        charts.y_axis(y, left, right),
    ]
    places = [(x(r + 1), y(float(v))) for r, v in enumerate(mmd)]
    parts.append(charts.path([p[0] for p in places], [p[1] for p in places], "curve"))
    every = max(1, rounds // 8)
    for r, (px, py) in enumerate(places):
        tip = f"after round {r + 1}\nMMD {decimal(float(mmd[r]), 4)}"
        parts.append(tag("circle", cx=px, cy=py, r=4.0, class_="dot", data_tip=tip))
        if r % every == 0:
            parts.append(charts.text(px, bottom + 16, str(r + 1), "middle"))
    parts.append(charts.text((left + right) / 2, bottom + 36, "round", "middle"))
    chart = charts.svg(HALF, bottom + 44, f"Maximum mean discrepancy over {rounds} rounds", *parts)
    return tag("div", chart, class_="s0")


def selection_table(data: SelectionTrace) -> Html:
    """Chosen step, its entropy and score, and the MMD, round by round."""
    rows = []
    for r, k in enumerate(data.chosen.astype(int)):
        entropy, score = (
            decimal(float(v[r, k]), 3) if v is not None else "–" for v in (data.entropy, data.score)
        )
        mmd = decimal(float(data.mmd[r]), 4) if data.mmd is not None else "–"
        rows.append((str(r + 1), str(k), plain_number(float(data.timesteps[k])), entropy, score, mmd))
    return simple_table(("round", "step", "timestep", "entropy", "score", "MMD after it"), rows)


def simple_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Html:
    """A table: the first column names the row at the left, the others are aligned right."""
    names = [tag("th", h, scope="col", class_=None if i else "text") for i, h in enumerate(head)]
    body = [
        tag("tr", tag("th", row[0], class_="row", scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    return tag("table", tag("thead", tag("tr", *names)), tag("tbody", *body))


def _hot(x: float, y: float, width: float, height: float, tip: str) -> Html:
    """An invisible column that carries a tooltip."""
    return tag("rect", class_="hot", x=x, y=y, width=width, height=height, data_tip=tip)


def _steps(first: int, end: int, timesteps: np.ndarray) -> str:
    """Words for a stretch of steps."""
    start, stop = (plain_number(float(timesteps[k])) for k in (first, end - 1))
    if end - first == 1:
        return f"step {first}, timestep {start}"
    return f"steps {first} to {end - 1}, timesteps {start} to {stop}"
