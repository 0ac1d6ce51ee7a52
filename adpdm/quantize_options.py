"""Options of `adpdm quantize`, and the settings they mean."""

from __future__ import annotations

import argparse
import re
from typing import get_args

from .config import AttentionProducts, Equalization, Grouping, QuantConfig, SearchConfig, Selection


def add_quantize_options(sub: argparse.ArgumentParser) -> None:
    """Everything but the model and where to write; defaults are those of QuantConfig."""
    default = QuantConfig()
    sub.add_argument("--bits", default="w8a8", help="weight and activation bits, e.g. w8a8, w4a8")
    sub.add_argument("--groups", type=int, default=default.num_groups)
    sub.add_argument("--grouping", default=default.grouping, choices=get_args(Grouping))
    sub.add_argument("--selection", default=default.selection, choices=get_args(Selection))
    sub.add_argument(
        "--equalization",
        default=default.equalization,
        choices=get_args(Equalization),
        help="of channels; layers that it changes take no LoRA",
    )
    sub.add_argument(
        "--attention",
        default=default.attention,
        choices=get_args(AttentionProducts),
        help="what attention multiplies on a CPU",
    )
    sub.add_argument(
        "--correct-prediction",
        default=default.correct_prediction,
        action=argparse.BooleanOptionalAction,
        help="weigh predictions against their samples where quantization drowns them",
    )
    sub.add_argument(
        "--steps", type=int, default=default.num_inference_steps, help="sampler steps to calibrate for"
    )
    sub.add_argument("--images", type=int, default=default.calibration_images, help="calibration images")
    sub.add_argument("--search-steps", type=int, default=default.search.num_steps)
    sub.add_argument(
        "--search-parts",
        type=int,
        default=default.search.parts,
        help="of an optimizer step, which as many processes of torchrun share",
    )
    sub.add_argument(
        "--histogram-images", type=int, default=default.histogram_images, help="images that fill histograms"
    )
    sub.add_argument(
        "--budget",
        type=_duration,
        metavar="15m",
        help="take work out of the search, then of calibration, until it should fit (90s, 15m, 2h)",
    )
    sub.add_argument("--exclude", action="append", default=[], help="layer name pattern to leave in float")
    sub.add_argument("--timestep-policy", default=default.timestep_policy, choices=("nearest", "error"))
    sub.add_argument("--prompt", action="append", help="calibration prompt of a text-to-image pipeline")
    sub.add_argument(
        "--guidance-scale",
        type=float,
        default=default.guidance_scale,
        help="of the classifier-free guidance that it will be sampled under; calibrates with it",
    )
    sub.add_argument("--seed", type=int, default=default.seed)
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
        num_groups=args.groups,
        grouping=args.grouping,
        selection=args.selection,
        equalization=args.equalization,
        attention=args.attention,
        correct_prediction=args.correct_prediction,
        num_inference_steps=args.steps,
        calibration_images=args.images,
        histogram_images=args.histogram_images,
        guidance_scale=args.guidance_scale,
        modules_to_not_convert=tuple(args.exclude),
        timestep_policy=args.timestep_policy,
        seed=args.seed,
        search=SearchConfig(num_steps=args.search_steps, parts=args.search_parts),
    )


def _duration(text: str) -> float:
    """Seconds of 90s, 15m or 1.5h."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"wanted a time like 90s, 15m or 2h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
