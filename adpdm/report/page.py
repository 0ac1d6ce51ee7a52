"""Assembles the page: head, tiles, sections in a fixed order; a part without data says so in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import charts, images
from . import figures_accuracy as accuracy
from . import figures_groups as groups
from . import figures_layers as layers
from .data import Coverage, GroupMap, ImageSet, ReportData, SelectionTrace
from .formats import decimal, percent
from .markup import Child, Html, join, tag
from .style import SCRIPT, style_sheet

SOFT_LIMIT = 0.9  # method.md section 6: below this importance weight hardening changes the model noticeably


def render(data: ReportData) -> str:
    """The whole document; the same data give the same text."""
    sections = (
        ("Samples", "Samples", _samples(data)),
        ("Groups", "Groups of timesteps", _groups(data)),
        ("Ranges", "Activation ranges", _ranges(data)),
        ("Accuracy", "Accuracy by step and layer", _accuracy(data)),
        ("Selection", "Selected timesteps", _selection(data)),
        ("Comparison", "Groupings compared", _comparison(data)),
        ("Cost", "Size, time and coverage", _cost(data)),
        ("Notes", "Notes", _notes(data)),
        ("Reproduce", "Reproduce", _reproduce(data)),
    )
    nav = tag(
        "nav",
        tag("ul", *(tag("li", tag("a", short, href=f"#{short.lower()}")) for short, _, _ in sections)),
        aria_label="Contents",
    )
    body = tag(
        "body",
        tag("header", *_head(data), nav),
        tag(
            "main",
            *(
                tag("section", tag("h2", title), content, id=short.lower())
                for short, title, content in sections
            ),
        ),
        tag("footer", "Written by adpdm. This file is self-contained: it loads nothing."),
        tag("div", id="tip", role="presentation"),
        tag("script", Html(SCRIPT)),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width,initial-scale=1"),
        tag("title", data.title),
        tag("style", Html(style_sheet())),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _head(data: ReportData) -> list[Html]:
    parts = [tag("p", "adpdm · quantization report", class_="eyebrow"), tag("h1", data.title)]
    if data.summary:
        parts.append(tag("p", data.summary, class_="lead"))
    tiles = _tiles(data)
    if tiles:
        parts.append(tag("dl", *tiles, class_="tiles"))
    return parts


def _tiles(data: ReportData) -> list[Html]:
    """The headline figures, taken from the parts below."""
    tiles = []
    for image_set in data.images:
        if image_set.psnr_db is not None:
            small = "PSNR of final samples to full precision"
            tiles.append((image_set.name, f"{decimal(image_set.psnr_db)} dB", small))
    if len(data.sizes) > 1:
        smallest = min(data.sizes[1:], key=lambda s: s.num_bytes)
        ratio = data.sizes[0].num_bytes / smallest.num_bytes
        tiles.append(
            ("Smaller weights", f"{decimal(ratio, 2)}×", f"{smallest.name} against {data.sizes[0].name}")
        )
    if data.times:
        low, high = (decimal(pick(t.speedup for t in data.times), 2) for pick in (min, max))
        words = "median of interleaved pairs, over configurations and batch sizes"
        tiles.append(("Speed of a step", f"{low}×" if low == high else f"{low}–{high}×", words))
    if data.coverage is not None:
        words = f"of multiply-accumulates; {percent(data.coverage.parameters_share)} of parameters"
        tiles.append(("In integers", percent(data.coverage.macs_share), words))
    return [
        tag("div", tag("dt", label), tag("dd", value, tag("small", small))) for label, value, small in tiles
    ]


def _samples(data: ReportData) -> Html:
    if not data.images:
        return _absent("No samples were drawn in this run.")
    intro = tag("p", "The same random numbers drive both models, so every difference is the quantization's.")
    shared = images.SharedPictures()
    return join([intro, *(_image_set(s, shared) for s in data.images)])


def _image_set(data: ImageSet, shared: images.SharedPictures) -> Html:
    factor = images.amplification(data.reference, data.quantized)
    changed = images.difference(data.reference, data.quantized, factor)
    sheets = [images.sheet(x) for x in (data.reference, data.quantized, changed)]
    count = len(data.reference)
    first = shared.picture(sheets[0], f"{count} samples of the full-precision model")
    second = images.picture(sheets[1], f"{count} samples of the {data.name} model from the same seeds")
    third = images.picture(sheets[2], f"difference of the two, multiplied by {factor}, grey where equal")
    flip = tag("div", second, shared.picture(sheets[0], ""), class_="flip", tabindex="0")
    panels = (("Full precision", first), (f"Quantized, {data.name}", flip), (f"Difference × {factor}", third))
    words = (
        f" Grey means equal; lighter pixels got brighter, darker ones darker, {factor} times amplified. "
        "Point at the quantized panel, or focus it, to flip to full precision. "
    )
    title = [tag("span", f" · {decimal(data.psnr_db)} dB PSNR")] if data.psnr_db is not None else []
    return join(
        [
            tag("h3", data.name, *title),
            tag(
                "figure",
                tag("div", *(tag("div", tag("h4", name), panel) for name, panel in panels), class_="panels"),
                tag("figcaption", tag("b", f"{count} samples."), words, data.note),
            ),
        ]
    )


def _groups(data: ReportData) -> Html:
    if not data.group_maps:
        return _absent("This run has no groups of timesteps.")
    intro = tag(
        "p",
        "Activations change along the trajectory, so every layer owns several quantization functions "
        "and a table that says which one serves which timestep.",
    )
    figures = (_group_figure(m, None if i else data.max_importance) for i, m in enumerate(data.group_maps))
    return join([intro, *figures])


def _group_figure(data: GroupMap, max_importance: float | None) -> Html:
    words = (
        " Each row is a layer, each column a timestep, each colour a quantization function of the layer. "
        "Look for where the colours change, and for layers that change elsewhere than their neighbours. "
    )
    if data.moved_share is not None:
        words += (
            f"{percent(data.moved_share)} of the entries left the group of the dynamic-programming start. "
        )
    if data.gains_db is not None:
        median, largest, limit = (decimal(gain, 2) for gain in data.gains_db)
        words += (
            f"Against one range for all steps, the groups that the search started from lower the "
            f"quantization error of a layer's input by {median} dB (median; at most {largest} dB); a range "
            f"for every step would lower it by {limit} dB, which no grouping can exceed. "
        )
    if max_importance is not None:
        words += f"The winning importance weights averaged {decimal(max_importance, 3)} before hardening"
        words += (
            f", under {SOFT_LIMIT}: entries were still undecided." if max_importance < SOFT_LIMIT else "."
        )
    tall = " tall" if len(data.layer_names) > 120 else ""
    chart = tag(
        "div",
        groups.group_map(data),
        class_="scroll" + tall,
        tabindex="0",
        role="group",
        aria_label="Group map",
    )
    return join(
        [
            tag("h3", data.name, tag("span", f" · {data.num_groups} groups, {len(data.layer_names)} layers")),
            tag(
                "figure",
                tag("div", groups.group_legend(data.num_groups), chart, class_="card"),
                tag("figcaption", tag("b", "Group map."), words),
                _table(groups.group_table(data), "The map as a table"),
            ),
        ]
    )


def _ranges(data: ReportData) -> Html:
    if not data.ranges:
        return _absent("Activation ranges were not recorded in this run.")
    num_groups = max(
        [int(r.group_index.max(initial=0)) + 1 for r in data.ranges] + [m.num_groups for m in data.group_maps]
    )
    figures = [
        tag(
            "figure",
            tag("div", _scroll(groups.layer_range(r, num_groups), r.layer_name), class_="card"),
            _table(groups.range_table(r), "The numbers"),
        )
        for r in data.ranges
    ]
    caption = tag(
        "figcaption",
        tag("b", "Range of the activations at every timestep."),
        " Solid lines are the smallest and largest activation, coloured blocks the range that the group's "
        "quantizer covers, dotted lines the range a single shared quantizer would have to cover. Where the "
        "blocks stay well inside the dotted lines, groups buy resolution; activations outside a block are "
        "clipped.",
    )
    intro = tag(
        "p", "What the groups are for: how far the activations of some layers reach at every timestep."
    )
    return join([intro, tag("div", *figures, class_="pair", style="margin-top:24px"), caption])


def _accuracy(data: ReportData) -> Html:
    parts = [tag("p", "How much of a signal survives, in decibels of signal to quantization noise.")]
    if data.scores:
        words = (
            " LPIPS compares pairs of images, 0 is equal. The Fréchet distance compares the two sets on "
            "EfficientNet-Lite0 features, projected on as many principal components as the last column says; "
            "it is not FID, and few images bias it upwards. Beside it stand 95 % of the distances of "
            "resampled sets: the spread of resampling, which does not contain the bias of few images."
        )
        table = tag("div", accuracy.score_table(data.scores), class_="scroll")
        parts.append(tag("figure", table, tag("figcaption", tag("b", "Final samples."), words)))
    if data.step_curves:
        same = any(c.is_dashed for c in data.step_curves)
        timesteps = data.step_curves[0].timesteps
        words = " Higher is better; 6 dB are one bit."
        if len(set(timesteps.tolist())) < len(timesteps):
            words += " The sampler calls the model more than once at a timestep, and every call is a column."
        if same:
            words += (
                " Solid: both models see the full-precision samples, so this is the error one step makes. "
                "Dashed: each follows its own samples, so the error has accumulated."
            )
        parts.append(
            tag(
                "figure",
                tag(
                    "div",
                    accuracy.step_legend(data.step_curves),
                    _scroll(accuracy.step_chart(data.step_curves), "SQNR per step"),
                    class_="card",
                ),
                tag("figcaption", tag("b", "Noise prediction against full precision, call by call."), words),
                _table(accuracy.step_table(data.step_curves), "The numbers"),
            )
        )
    else:
        parts.append(_absent("The error per timestep was not measured in this run."))
    if data.corrections:
        parts.append(_corrections(data))
    if not data.layer_sqnr:
        return join([*parts, _absent("The error per layer was not measured in this run.")])
    entries = [(d.name, accuracy.series_colour(i), "") for i, d in enumerate(data.layer_sqnr)]
    words = (
        " It includes the error that arrives from earlier layers. Layers far to the left of those before "
        "them are candidates for more bits or for staying in full precision."
    )
    parts.append(
        tag(
            "figure",
            tag(
                "div",
                charts.legend(entries),
                _scroll(accuracy.layer_chart(data.layer_sqnr), "SQNR per layer"),
                class_="card",
            ),
            tag("figcaption", tag("b", "Output of every layer against full precision."), words),
            _table(accuracy.layer_table(data.layer_sqnr), "The numbers"),
        )
    )
    return join(parts)


def _corrections(data: ReportData) -> Html:
    words = (
        " Near the noisy end a prediction is nearly its sample, and quantization drowns the little that it "
        "knows of the image: there both are weighed by what they are worth on calibration images. "
        "Drawn is the squared error that this leaves, 100 % where predictions are taken as they are."
    )
    entries = [(c.name, accuracy.series_colour(i), "line") for i, c in enumerate(data.corrections)]
    return tag(
        "figure",
        tag(
            "div",
            charts.legend(entries),
            _scroll(accuracy.correction_chart(data.corrections), "Corrected predictions"),
            class_="card",
        ),
        tag("figcaption", tag("b", "Corrected predictions."), words),
        _table(accuracy.correction_table(data.corrections), "The numbers"),
    )


def _selection(data: ReportData) -> Html:
    trace = data.selection
    if trace is None or not len(trace.chosen):
        return _absent("No timesteps were selected in this run: its grouping does not need them.")
    parts = [tag("p", f"Method {trace.method}: {_selection_words(trace)}")]
    values, name = (trace.score, "score") if trace.score is not None else (trace.entropy, "entropy")
    if values is not None:
        words = (
            f" One row per round; the stronger the colour, the higher the {name} of a timestep; the ring "
            "marks the one that was taken. A timestep fades once it has been visited, unless its groups are "
            "still undecided."
        )
        figure = tag("div", _scroll(groups.score_map(trace, values, name), "Selection rounds"), class_="card")
        parts.append(tag("figure", figure, tag("figcaption", tag("b", "Why these timesteps."), words)))
    drawn = [groups.visits_chart(trace)]
    if trace.mmd is not None:
        drawn.append(groups.mmd_chart(trace, trace.mmd))
    cards = [tag("figure", tag("div", _scroll(chart, "Selection"), class_="card")) for chart in drawn]
    parts.append(tag("div", *cards, class_="pair", style="margin-top:24px"))
    if trace.mmd is not None:
        words = (
            " Left: how often each timestep served. Right: distance between the inputs at all timesteps "
            "and at the chosen ones; the score only stands in for it, so watch that it falls."
        )
        parts.append(tag("figcaption", tag("b", "Visits and the distance they leave."), words))
    return join([*parts, _table(groups.selection_table(trace), "Round by round")])


def _selection_words(trace: SelectionTrace) -> str:
    rounds = len(trace.chosen)
    if trace.method == "srm":
        rule = "the highest mean entropy of its importance weights plus a bonus for few visits"
        return f"in each of {rounds} rounds the timestep with {rule} won, and images were generated there."
    return f"{rounds} rounds of calibration images."


def _comparison(data: ReportData) -> Html:
    if not data.comparison:
        return _absent("Other groupings were not measured in this run.")
    seeds = max(r.num_seeds for r in data.comparison)
    spread = (
        f"Whiskers: ± one standard deviation over {seeds} seeds." if seeds > 1 else "One seed, no spread."
    )
    words = (
        f" At one bit width everything but the grouping is equal. {spread} "
        "The soft/hard gap is what turning the mixture into a table costs. Bold is best at its bit width."
    )
    return tag(
        "figure",
        tag("div", _scroll(accuracy.comparison_chart(data.comparison), "Comparison"), class_="card"),
        tag("figcaption", tag("b", "Final samples against full precision, by grouping."), words),
        tag("div", accuracy.comparison_table(data.comparison), class_="scroll", style="margin-top:20px"),
    )


def _cost(data: ReportData) -> Html:
    parts = []
    if data.sizes:
        parts.append(
            tag(
                "figure",
                tag("div", _scroll(accuracy.size_chart(data.sizes), "Sizes"), class_="card"),
                tag(
                    "figcaption",
                    tag("b", "Weights"),
                    " of quantized models as their files lie on disk, against the original.",
                ),
                _table(accuracy.size_table(data.sizes), "The numbers"),
            )
        )
    else:
        parts.append(_absent("File sizes were not measured in this run."))
    if data.times:
        words = " in interleaved pairs on the same inputs; the speedup is the median ratio within pairs."
        parts.append(
            tag(
                "figure",
                tag("div", _scroll(accuracy.time_chart(data.times), "Times"), class_="card"),
                tag("figcaption", tag("b", "One denoiser call,"), words),
                tag("div", accuracy.time_table(data.times), class_="scroll", style="margin-top:16px"),
            )
        )
    else:
        parts.append(_absent("Times were not measured in this run."))
    if data.coverage is None:
        return join([*parts, _absent("Coverage was not recorded in this run.")])
    shares = f"{percent(data.coverage.macs_share)} of the multiply-accumulates and "
    shares += f"{percent(data.coverage.parameters_share)} of the parameters run in integers."
    return join([*parts, tag("h3", "Coverage"), tag("p", shares), *_layers(data.coverage)])


def _layers(coverage: Coverage) -> list[Html]:
    parts = [tag("p", layers.run_sentence(coverage))] if coverage.layers else []
    if coverage.fused_blocks is None:
        parts.append(_absent("Which layers run fused was not recorded when this model was quantized."))
    for runs, words in (("per layer", "Layer by layer"), ("float", "In full precision")):
        chosen = [layer for layer in coverage.layers if layer.runs == runs]
        if chosen:
            parts.append(_table(layers.reason_table(chosen), f"{words} ({len(chosen)}), with reasons"))
    return parts


def _notes(data: ReportData) -> Html:
    if not data.notes:
        return tag("p", "Nothing unusual happened in this run.")
    return tag("ul", *(tag("li", _with_code(note)) for note in data.notes), class_="notes")


def _with_code(sentence: str) -> Html:
    """Words between backticks become code."""
    return join(tag("code", part) if i % 2 else part for i, part in enumerate(sentence.split("`")))


def _reproduce(data: ReportData) -> Html:
    versions = {"seed": data.seed, **data.versions}
    parts: list[Child] = [tag("pre", tag("code", data.command)), _pairs(versions)]
    if data.config:
        parts.append(_table(_pairs(_flat(data.config)), "All settings"))
    return join(parts)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _pairs(values: Mapping[str, Any]) -> Html:
    rows = [
        tag("tr", tag("th", str(k), class_="row", scope="row"), tag("td", str(v), class_="text"))
        for k, v in values.items()
    ]
    return tag("table", tag("tbody", *rows), class_="wide")


def _absent(sentence: str) -> Html:
    return tag("p", sentence, class_="absent")


def _scroll(content: Html, label: str) -> Html:
    """Lets a wide chart scroll on a narrow screen, by keyboard as well."""
    return tag("div", content, class_="scroll", tabindex="0", role="group", aria_label=label)


def _table(content: Html, label: str) -> Html:
    """Hides a table behind a line."""
    return tag("details", tag("summary", label), tag("div", content, class_="scroll"))
