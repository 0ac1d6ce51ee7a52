"""The report: numbers, structure, escaping, colours and determinism, on synthetic data."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from adpdm import report
from adpdm.report import charts, formats, images, style
from adpdm.report.markup import Html, tag

T, LAYERS = 6, ("conv_in", "mid.conv", "out<b>")
TIMESTEPS = np.arange(T)[::-1] * 100
SECTIONS = (
    "samples",
    "groups",
    "ranges",
    "accuracy",
    "selection",
    "comparison",
    "cost",
    "notes",
    "reproduce",
)


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed in order."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in ("meta", "img", "br", "hr"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, words):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(words)

    def values(self, attribute: str) -> list[str]:
        return [a[attribute] for _, a in self.tags if attribute in a]

    def has_class(self, name: str) -> int:
        return sum(name in (a.get("class") or "").split() for _, a in self.tags)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def full_data() -> report.ReportData:
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    groups = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2], [0, 1, 2, 2, 2, 2]])
    observed = np.stack([-np.ones(T), np.linspace(1, 3, T)], 1)
    curve = np.linspace(40, 20, T)
    return report.ReportData(
        title="A & B <model>",
        command="adpdm demo --name '<x>'",
        seed=7,
        summary='He said "fine".',
        versions={"torch": "2.13"},
        config={"weight_bits": 8, "search": {"num_steps": 240}},
        images=(report.ImageSet("W8A8", reference, np.clip(reference, 3, 250), 38.04),),
        group_maps=(report.GroupMap("W8A8", LAYERS, TIMESTEPS, groups, 3, 0.125, (0.22, 1.89, 0.23)),),
        ranges=(report.LayerRange("mid.conv", TIMESTEPS, observed, observed * 0.9, groups[1]),),
        layer_sqnr=(report.LayerSqnr("W8A8", LAYERS, np.array([30.0, 12.5, np.inf])),),
        step_curves=(
            report.StepCurve("W8A8, same input", TIMESTEPS, curve, family="W8A8"),
            report.StepCurve("W8A8, own trajectory", TIMESTEPS, curve - 5, True, "W8A8"),
        ),
        selection=report.SelectionTrace(
            "srm", TIMESTEPS, np.array([2, 4]), rng.random((2, T)), rng.random((2, T)), np.array([0.3, 0.1])
        ),
        comparison=(
            report.ComparisonRow("shared", "W6A6", 12.4, 0.5, 3, 9.0, None, seconds=8.0),
            report.ComparisonRow("search", "W6A6", 28.1, 0.4, 3, 22.0, 0.21, seconds=214.0),
            report.ComparisonRow("dp", "W4A8", None),
        ),
        scores=(report.SampleScore("W8A8", 64, 38.04, 31.0, 0.0123, 4.56, 3.21, 6.54, 16),),
        sizes=(report.ModelSize("full precision", 10_000_000), report.ModelSize("W8A8", 2_500_000)),
        times=(report.StepTime("W8A8", 1, 0.020, 0.010, 2.0, 1.9, 2.1),),
        coverage=report.Coverage(
            0.981,
            0.964,
            (
                report.LayerRun("conv_in", "float", "input or output layer", macs_share=0.019),
                report.LayerRun("mid.conv", "per layer", "conv2 is <odd>", "mid (ResnetBlock2D)", 0.281),
                report.LayerRun("out<b>", "fused", "", "out (UpBlock2D)", 0.7),
            ),
            2,
        ),
        max_importance=0.85,
        notes=("run `pip install x` <now>",),
    )


def test_page_parses_and_has_every_section_in_order():
    page = Page(report.render(full_data()))
    assert [a["id"] for name, a in page.tags if name == "section"] == list(SECTIONS)
    assert [a["href"] for name, a in page.tags if name == "a"] == [f"#{s}" for s in SECTIONS]
    assert page.has_class("absent") == 0


def test_page_without_data_says_so_in_every_section():
    page = Page(report.render(report.ReportData(title="x", command="adpdm demo", seed=0)))
    assert [i for i in page.values("id") if i != "tip"] == list(SECTIONS)
    assert page.has_class("absent") == 10
    assert "Times were not measured in this run." in page.text


def test_page_loads_nothing_from_outside():
    document = report.render(full_data())
    page = Page(document)
    rest = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", document)
    assert re.search(r"https?:|//|url\(|@import", rest) is None
    assert all(value.startswith("data:image/png;base64,") for value in page.values("src"))
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in page.values("href"))
    assert not any(name in ("link", "iframe", "object") for name, _ in page.tags)


def test_page_escapes_every_string():
    document = report.render(full_data())
    page = Page(document)
    assert not any(name in ("model", "x", "now", "b>") for name, _ in page.tags)
    assert "A & B <model>" in page.words
    assert "adpdm demo --name '<x>'" in page.words
    assert any("out<b>" in tip for tip in page.values("data-tip"))


def test_page_shows_the_numbers_as_given():
    text = Page(report.render(full_data())).text
    for wanted in (
        "38.0 dB",
        "12.4 ± 0.5",
        "28.1 ± 0.4",
        "0.21",
        "3.6\u00a0min",
        "4.00×",
        "2.00×",
        "98.1\u00a0%",
        "96.4\u00a0%",
    ):
        assert wanted in text, wanted
    assert "12.5\u00a0% of the entries left" in text
    assert "averaged 0.850 before hardening, under 0.9: entries were still undecided." in text
    assert "12.50" in text  # SQNR of mid.conv in the table below its figure
    assert "240" in text


def test_frechet_stands_with_its_interval_and_number_of_images():
    page = Page(report.render(full_data()))
    start = page.words.index("Fréchet (Lite0)") + 3  # the last two heads and the row's own cells follow
    row = [w for w in page.words[start:] if w.strip()][:8]
    assert row == ["W8A8", "64", "38.0", "31.0", "0.0123", "4.56", "3.21 to 6.54", "16"]


def test_frechet_spread_is_called_what_it_is():
    text = Page(report.render(full_data())).text
    assert "95 % of resamples" in text
    assert "the spread of resampling, which does not contain the bias of few images" in text
    assert "95 % interval" not in text


def test_curves_of_calls_say_where_the_sampler_came_back_and_group_maps_have_the_same_labels():
    steps = np.array([2, 1, 0], np.float32) / 3
    calls = steps[[0, 1, 1, 2, 2]]  # as Heun's method
    curve = report.StepCurve("W8A8", calls, np.linspace(40, 20, 5))
    groups = report.GroupMap("W8A8", ("a",), steps, np.zeros((1, 3), int), 1)
    data = report.ReportData("x", "x", 0, group_maps=(groups,), step_curves=(curve,))
    page = Page(report.render(data))
    assert page.words.count("0.6667") == 2
    assert "call 2, timestep 0.333333\nW8A8: 30.0 dB" in page.values("data-tip")
    assert "calls the model more than once at a timestep, and every call is a column" in page.text
    assert "more than once" not in Page(report.render(full_data())).text


def test_best_row_is_marked_only_where_there_is_a_choice():
    assert Page(report.render(full_data())).has_class("best") == 1


def test_every_figure_has_words_for_those_who_do_not_see_it():
    page = Page(report.render(full_data()))
    drawn = [a for name, a in page.tags if name == "svg"]
    hidden = [a for a in drawn if a.get("aria-hidden") == "true"]  # says what stands beside it already
    assert len(hidden) == 1
    assert all(a.get("aria-label") and a.get("role") == "img" for a in drawn if a not in hidden)
    assert "5 samples of the full-precision model" in page.values("aria-label")
    assert all(a.get("alt") for name, a in page.tags if name == "img")
    assert sum(name == "table" for name, _ in page.tags) >= 8


def test_samples_of_full_precision_are_in_the_page_once():
    data = full_data()
    (first,) = data.images
    other = replace(first, name="W4A8", reference=first.reference.copy(), quantized=first.quantized // 2)
    document = report.render(replace(data, images=(first, other)))
    page = Page(document)
    sheets = [images.data_uri(images.sheet(x)) for x in (first.reference, first.quantized, other.quantized)]
    assert [document.count(sheet) for sheet in sheets] == [1, 1, 1]
    held = [a for name, a in page.tags if name == "image"]
    assert [a["href"] for a in held] == sheets[:1]
    # Once in each set beside the quantized samples, and once over them.
    assert [a["href"] for name, a in page.tags if name == "use"] == 3 * [f"#{held[0]['id']}"]


def test_group_map_draws_one_rectangle_per_stretch():
    page = Page(report.render(full_data()))
    cells = [a for name, a in page.tags if name == "rect" and a.get("class") == "cell"]
    assert len(cells) == 2 + 3 + 3
    assert cells[0]["data-tip"] == "conv_in\nsteps 0 to 2, timesteps 500 to 300\ngroup 0"
    assert [c["fill"] for c in cells[:2]] == list(style.GROUP_COLOURS[:2])
    widths = [float(c["width"]) for c in cells[2:5]]
    assert widths[0] == pytest.approx(widths[1], abs=0.02)


def test_same_data_give_the_same_bytes_and_nothing_else_is_left(tmp_path):
    first, second = (report.write_report(tmp_path / "a" / n, full_data()) for n in ("one.html", "two.html"))
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in first.parent.iterdir()) == ["one.html", "two.html"]


def test_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    path = report.write_report(tmp_path / "r.html", full_data())
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(KeyboardInterrupt):
        report.write_report(path, replace(full_data(), title="other"))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize("steps", [1, 2])
def test_short_and_degenerate_data_are_drawn(steps):
    timesteps, flat = np.arange(steps), np.full(steps, np.inf)
    zeros = np.zeros((steps, 2))
    data = report.ReportData(
        title="x",
        command="x",
        seed=0,
        group_maps=(report.GroupMap("g", (), timesteps, np.zeros((0, steps), int), 1),),
        ranges=(report.LayerRange("l", timesteps, zeros, zeros, np.zeros(steps, int)),),
        step_curves=(report.StepCurve("c", timesteps, flat),),
        layer_sqnr=(report.LayerSqnr("l", ("a",), np.array([np.nan])),),
        selection=report.SelectionTrace("random", timesteps, np.array([0]), mmd=np.zeros(1)),
        comparison=(report.ComparisonRow("dp", "W8A8", np.inf),),
        sizes=(report.ModelSize("m", 1),),
    )
    document = report.render(data)
    Page(document)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', document)


def test_what_groups_gain_and_could_gain_is_said():
    words = " ".join(Page(report.render(full_data())).words)
    assert "error of a layer's input by 0.22 dB (median; at most 1.89 dB)" in words
    assert "a range for every step would lower it by 0.23 dB" in words


def test_shapes_are_checked_when_data_are_made():
    with pytest.raises(
        ValueError, match=r"GroupMap g: group_index must have the shape \(1, 6\), got \(2, 6\)"
    ):
        report.GroupMap("g", ("a",), TIMESTEPS, np.zeros((2, T), int), 2)
    with pytest.raises(ValueError, match=r"group_index must be in \[0, 1\], got 0 to 2"):
        report.GroupMap("g", ("a",), TIMESTEPS, np.array([[0, 0, 1, 1, 2, 2]]), 2)
    with pytest.raises(
        ValueError, match=r"reference must be \[N, H, W, 1 or 3\] uint8, got \(1, 2, 2, 1\) float64"
    ):
        report.ImageSet("s", np.zeros((1, 2, 2, 1)), np.zeros((1, 2, 2, 1)))
    with pytest.raises(ValueError, match=r"SelectionTrace: score must have the shape \(1, 6\), got \(6,\)"):
        report.SelectionTrace("srm", TIMESTEPS, np.array([0]), score=np.zeros(T))


def test_difference_is_signed_and_amplified():
    reference = np.array([100, 100, 100, 0], np.uint8).reshape(1, 2, 2, 1)
    quantized = np.array([100, 103, 98, 255], np.uint8).reshape(1, 2, 2, 1)
    assert images.difference(reference, quantized, 8).ravel().tolist() == [128, 152, 112, 255]


def test_amplification_is_the_largest_that_fits():
    reference = np.full((1, 10, 10, 1), 100, np.uint8)
    assert images.amplification(reference, reference) == 64
    assert images.amplification(reference, reference + 15) == 8  # 8 * 15 = 120 <= 127 < 240
    assert images.amplification(reference, reference + 150) == 2
    one_outlier = reference.copy()
    one_outlier[0, 0, 0, 0] = 255  # 1 % of the pixels may saturate
    assert images.amplification(reference, one_outlier) == 64


def test_sheet_places_tiles_with_transparent_gaps():
    tiles = np.stack([np.full((2, 2, 1), v, np.uint8) for v in (10, 20, 30)])
    canvas = images.sheet(tiles)
    assert canvas.shape == (5, 5, 4)
    assert canvas[0, :, 0].tolist() == [10, 10, 0, 20, 20]
    assert canvas[0, :, 3].tolist() == [255, 255, 0, 255, 255]
    assert canvas[3, :, 3].tolist() == [255, 255, 0, 0, 0]
    encoded = images.data_uri(canvas).removeprefix("data:image/png;base64,")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))), canvas)


def test_numbers_as_text():
    assert [formats.decimal(v) for v in (-1.25, None, float("inf"), float("nan"))] == ["−1.2", "–", "∞", "–"]
    spaced = [formats.duration(s).replace("\u00a0", " ") for s in (0.0000123, 0.0182, 8.0, 214.0)]
    assert spaced == ["12.3 µs", "18.2 ms", "8.00 s", "3.6 min"]
    assert [formats.data_size(b).replace("\u00a0", " ") for b in (999, 1402, 10_364_180)] == [
        "999 B",
        "1.40 kB",
        "10.4 MB",
    ]


def test_ticks_are_round_and_inside():
    assert charts.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert charts.ticks(-0.3, 0.31) == [-0.2, 0.0, 0.2]
    assert charts.ticks(3, 3) == [3]


def test_tag_escapes_text_and_attributes_but_not_markup():
    assert (
        tag("p", "a<b", Html("<i>x</i>"), class_='"q"', hidden=True, id=None)
        == '<p class="&quot;q&quot;" hidden>a&lt;b<i>x</i></p>'
    )


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2."""
    linear = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in linear]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("scheme", "series"), [(style.LIGHT, style.SERIES_LIGHT), (style.DARK, style.SERIES_DARK)]
)
def test_colours_have_contrast(scheme, series):
    for surface in (scheme["page"], scheme["card"]):
        assert min(contrast(scheme[name], surface) for name in ("ink", "muted", "accent")) >= 4.5
        assert min(contrast(colour, surface) for colour in (*series, scheme["mark"])) >= 3.0


VISION = {  # Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ),
}


def oklab(linear: np.ndarray) -> np.ndarray:
    """[N, 3] linear RGB to OKLab (Ottosson 2020)."""
    lms = np.array(
        [
            [0.41222147, 0.53633254, 0.05144599],
            [0.2119035, 0.68069955, 0.10739696],
            [0.08830246, 0.28171884, 0.6299787],
        ]
    )
    lab = np.array(
        [
            [0.21045426, 0.79361779, -0.00407205],
            [1.9779985, -2.4285922, 0.45059371],
            [0.02590404, 0.78277177, -0.80867577],
        ]
    )
    return np.cbrt(linear.clip(0, 1) @ lms.T) @ lab.T


@pytest.mark.parametrize("vision", VISION)
def test_any_two_groups_are_told_apart(vision):
    srgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in style.GROUP_COLOURS])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = oklab((linear @ VISION[vision].T).clip(0, 1))
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[~np.eye(len(seen), dtype=bool)]
    assert distance.min() > 0.13


def test_more_groups_than_colours_are_blended():
    colours = style.group_colours(50)
    assert len(set(colours)) == 50
    assert (colours[0], colours[-1]) == (style.GROUP_COLOURS[0], style.GROUP_COLOURS[-1])
    assert style.group_colours(3) == list(style.GROUP_COLOURS[:3])
