"""The quantization strategies that `accuracy.py` compares, as settings of `adpdm.QuantConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

PLAIN: dict[str, Any] = {
    "range_method": "mse",
    "equalization": "off",
    "hadamard": "off",
    "weight_rounding": "nearest",
    "raised_layers": 0.0,
    "weigh_steps": False,
    "correct_bias": False,
    "correct_prediction": False,
}
PAPER_STEPS = 100
PAPER: dict[str, Any] = {
    **PLAIN,
    "grouping": "search",
    "selection": "srm",
    "num_groups": 8,
    "calibration_images": 1024,
    "round_size": 64,
    "num_inference_steps": PAPER_STEPS,
}


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Args:
        settings: of QuantConfig, without bits and seed.
        search: of SearchConfig.
        scale: of the classifier-free guidance that both models are sampled under; None for none.
    """

    name: str
    settings: dict[str, Any]
    search: dict[str, Any]
    scale: float | None = None


def _plain(name: str, **settings: Any) -> Method:
    return Method(name, {**PLAIN, **settings}, {})


def _ours(name: str, **settings: Any) -> Method:
    return Method(name, settings, {})


def _uncorrected(name: str, **settings: Any) -> Method:
    return Method(name, {"correct_prediction": False, **settings}, {})


# Others' strategies as they are described, on our kernels: not their code, and not their whole method.
STRATEGIES = (
    _plain("shared, min-max", grouping="shared", range_method="minmax"),
    _plain("shared, least squares", grouping="shared"),
    _plain("PTQ4DM-like: normal timesteps", grouping="shared", selection="normal"),
    Method(
        "Q-Diffusion-like: uniform timesteps, learned rounding",
        {**PLAIN, "grouping": "shared", "selection": "uniform", "weight_rounding": "gptq"},
        {},
    ),
    _plain("uniform groups", grouping="uniform"),
    _plain("one range per step", grouping="per_step"),
    _plain("dp groups", grouping="dp"),
    # kept whatever it does to held-out images, as the paper has no such judge
    Method("search, kept always", {**PLAIN, "grouping": "search"}, {"keep_if_worse": True}),
    _ours("ours, shared", grouping="shared"),
    _ours("ours, dp", grouping="dp"),
    _ours("ours, search", grouping="search"),
)
# 1024 images of 100 steps take minutes per row: not among the default rows. The others are for comparison.
_LONG: dict[str, Any] = {"num_inference_steps": PAPER_STEPS}
PAPER_SETTING = (
    _plain("shared, least squares, 100 steps", grouping="shared", **_LONG),
    _plain("dp groups, 100 steps", grouping="dp", **_LONG),
    # Our lambda: that of the paper has another unit (docs/method.md, section 6).
    Method("ADP-DM, paper's setting", PAPER, {"keep_if_worse": True}),
    _ours("ours, shared, 100 steps", grouping="shared", **_LONG),
    _ours("ours, dp, 100 steps", grouping="dp", **_LONG),
)
# Rows of the families that follow differ by what they name; corrected predictions would cover some of it.
GROUPS = tuple(_uncorrected(f"dp, {g} groups", grouping="dp", num_groups=g) for g in (1, 2, 4, 8, 16))
SELECTIONS = tuple(
    _uncorrected(f"dp, {s} timesteps", grouping="dp", selection=s)
    for s in ("srm", "uniform", "normal", "random")
)
IMAGES = tuple(
    _uncorrected(f"dp, {n} histogram images", grouping="dp", histogram_images=n) for n in (1, 2, 4, 8, 16, 32)
)
_LATER: dict[str, Any] = {"equalization": "off", "hadamard": "off", "correct_prediction": False}
# Each row keeps the measures of the row above it.
_MEASURES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("min-max ranges", {**PLAIN, "range_method": "minmax"}),
    ("+ least-squares ranges", PLAIN),
    ("+ clipped values weighted", {**PLAIN, "range_method": "clip_weighted"}),
    ("+ steps weighed by sensitivity", {**PLAIN, "range_method": "clip_weighted", "weigh_steps": True}),
    ("+ bias correction", {"weight_rounding": "nearest", "raised_layers": 0.0, **_LATER}),
    ("+ learned rounding", {"raised_layers": 0.0, **_LATER}),
    ("+ raised layers", _LATER),
    ("+ equalization", {"hadamard": "off", "correct_prediction": False}),
    ("+ rotated channels", {"correct_prediction": False}),
    ("+ corrected predictions", {}),
)
EQUALIZATIONS = tuple(
    _uncorrected(f"{grouping}, equalization {mode}", grouping=grouping, equalization=mode)
    for mode in ("off", "on")
    for grouping in ("shared", "dp")
)
CORRECTIONS = (
    *(_uncorrected(f"{g}, predictions as they are", grouping=g) for g in ("shared", "dp")),
    *(method for method in STRATEGIES if method.name in ("ours, shared", "ours, dp")),
)
ATTENTIONS = tuple(
    _uncorrected(f"dp, attention in {a}", grouping="dp", attention=a) for a in ("float", "int8")
)
MEASURES = tuple(
    Method(f"{name}, {grouping}", {**settings, "grouping": grouping}, {})
    for name, settings in _MEASURES
    for grouping in ("shared", "dp")
)
# Of conditional models: sampled under guidance, calibrated without it or with it.
GUIDANCES = tuple(
    Method(f"dp, guidance {scale:g}, calibrated {how}", {"grouping": "dp", "guidance_scale": at}, {}, scale)
    for scale in (2.0, 4.0)
    for how, at in (("without", 1.0), ("with it", scale))
)
GUIDED_SCALE = 3.0


def _guided(method: Method) -> Method:
    """For who samples under guidance, as with text-to-image models: calibrated under it too."""
    return replace(
        method,
        name=f"{method.name}, guidance {GUIDED_SCALE:g}",
        settings={**method.settings, "guidance_scale": GUIDED_SCALE},
        scale=GUIDED_SCALE,
    )


GUIDED = tuple(_guided(method) for method in STRATEGIES)
ROTATIONS = tuple(
    _ours(f"ours, dp, channels {what}", grouping="dp", hadamard=choice)
    for what, choice in (("as they are", "off"), ("rotated", "on"))
)
# Both spread what channels differ by: is the second worth anything beside the first?
ROTATED_EQUALIZATIONS = tuple(
    _ours(f"ours, dp, rotated, equalization {mode}", grouping="dp", hadamard="on", equalization=mode)
    for mode in ("off", "on")
)
FAMILIES: dict[str, tuple[Method, ...]] = {
    "strategies": STRATEGIES,
    "paper": PAPER_SETTING,
    "groups": GROUPS,
    "selections": SELECTIONS,
    "images": IMAGES,
    "measures": MEASURES,
    "equalization": EQUALIZATIONS,
    "attention": ATTENTIONS,
    "correction": CORRECTIONS,
    "guidance": GUIDANCES,
    "guided": GUIDED,
    "rotations": ROTATIONS,
    "guided rotations": tuple(_guided(method) for method in ROTATIONS),
    "rotated equalization": ROTATED_EQUALIZATIONS,
    "guided rotated equalization": tuple(_guided(method) for method in ROTATED_EQUALIZATIONS),
}


def methods(families: list[str], only: list[str] | None) -> Iterator[Method]:
    """Methods of some families, in order, each once, or those of them that are named.

    Raises:
        ValueError: for a name that no chosen family has.
    """
    chosen = {method.name: method for family in families for method in FAMILIES[family]}
    unknown = sorted(set(only or ()) - set(chosen))
    if unknown:
        raise ValueError(f"no method is called {unknown[0]!r}; {families} have {list(chosen)}")
    return (method for name, method in chosen.items() if only is None or name in only)
