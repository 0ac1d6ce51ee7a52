"""Options of `adpdm quantize`, and the settings they mean."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from typing import Any, get_args

from .config import (
    AttentionProducts,
    Equalization,
    Grouping,
    Hadamard,
    QuantConfig,
    SearchConfig,
    Selection,
    TimestepPolicy,
)


def add_quantize_options(sub: argparse.ArgumentParser) -> None:
    """Everything but the model and where to write; defaults are those of QuantConfig."""
    default = QuantConfig()

    def setting(option: str, name: str, text: str | None = None, **how: Any) -> None:
        sub.add_argument(option, dest=name, default=getattr(default, name), help=text, **how)

    sub.add_argument("--bits", default="w8a8", help="weight and activation bits, e.g. w8a8, w4a8")
    setting("--groups", "num_groups", type=int)
    setting("--grouping", "grouping", choices=get_args(Grouping))
    setting("--selection", "selection", choices=get_args(Selection))
    text = "of channels; layers that it changes take no LoRA"
    setting("--equalization", "equalization", text, choices=get_args(Equalization))
    text = "rotations of the input channels of linear layers"
    setting("--hadamard", "hadamard", text, choices=get_args(Hadamard))
    text = "what attention multiplies on a CPU"
    setting("--attention", "attention", text, choices=get_args(AttentionProducts))
    text = "weigh predictions against their samples where quantization drowns them"
    setting("--correct-prediction", "correct_prediction", text, action=argparse.BooleanOptionalAction)
    setting("--steps", "num_inference_steps", "sampler steps to calibrate for", type=int)
    setting("--images", "calibration_images", "calibration images", type=int)
    sub.add_argument("--search-steps", type=int, default=default.search.num_steps)
    sub.add_argument(
        "--search-parts",
        type=int,
        default=default.search.parts,
        help="of an optimizer step, which as many processes of torchrun share",
    )
    setting("--histogram-images", "histogram_images", "images that fill histograms", type=int)
    sub.add_argument(
        "--budget",
        type=_duration,
        metavar="15m",
        help="take work out of the search, then of calibration, until it should fit (90s, 15m, 2h)",
    )
    sub.add_argument(
        "--exclude",
        dest="modules_to_not_convert",
        action="append",
        default=[],
        metavar="NAME",
        help="layer or module to leave in float: its name, any part of that, or a shell pattern",
    )
    setting("--timestep-policy", "timestep_policy", choices=get_args(TimestepPolicy))
    sub.add_argument("--prompt", action="append", help="calibration prompt of a text-to-image pipeline")
    text = "of the classifier-free guidance that it will be sampled under; calibrates with it"
    setting("--guidance-scale", "guidance_scale", text, type=float)
    setting("--seed", "seed", type=int)
    sub.add_argument("--resume", action="store_true", help="continue an interrupted search")
    sub.add_argument("--offline", action="store_true", help="never ask the model hub")


def quant_config(args: argparse.Namespace) -> QuantConfig:
    """The settings; ValueError for what they cannot be."""
    match = re.fullmatch(r"w(\d+)a(\d+)", args.bits.lower())
    if match is None:
        raise ValueError(f"--bits must look like w8a8 or w4a8, got {args.bits!r}")
    return QuantConfig(
        weight_bits=int(match[1]),
        activation_bits=int(match[2]),
        search=SearchConfig(num_steps=args.search_steps, parts=args.search_parts),
        **{f.name: getattr(args, f.name) for f in fields(QuantConfig) if hasattr(args, f.name)},
    )


def _duration(text: str) -> float:
    """Seconds of 90s, 15m or 1.5h."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"wanted a time like 90s, 15m or 2h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
