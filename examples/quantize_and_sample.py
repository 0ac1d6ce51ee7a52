"""Quantize a trained diffusion model, sample in integers, save it, load it again and sample the same images.

    python examples/quantize_and_sample.py --model models/ddpm-fashion-mnist-32 --out runs/w8a8

Writes the quantized pipeline and samples.png into --out. --quick takes seconds: 8 sampler steps, for tests.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid

import adpdm
from adpdm import QuantConfig, SearchConfig

QUICK: dict[str, Any] = {
    "num_groups": 4,
    "num_inference_steps": 8,
    "calibration_images": 8,
    "round_size": 4,
    "histogram_images": 4,
    "search": SearchConfig(num_steps=8, refit_steps=2, batch_size=4),
}


def sample(pipe: Any, count: int, steps: int, seed: int) -> list[Any]:
    """`count` PIL images of a seed."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return list(pipe(batch_size=count, num_inference_steps=steps, generator=generator).images)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/ddpm-fashion-mnist-32"))
    parser.add_argument("--out", type=Path, required=True, help="new folder for the quantized pipeline")
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--images", type=int, default=16, help="a multiple of 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="8 sampler steps and a search of 8 steps")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out must name a new folder, {args.out} exists")
    if args.images < 4 or args.images % 4:
        parser.error(f"--images must be a positive multiple of 4, got {args.images}")

    config = QuantConfig(
        weight_bits=args.weight_bits,
        activation_bits=args.activation_bits,
        seed=args.seed,
        **(QUICK if args.quick else {}),
    )
    pipe = adpdm.load_pipeline(args.model)
    kind = type(pipe)
    if "batch_size" not in inspect.signature(kind.__call__).parameters:
        parser.error(f"--model must be an unconditional pipeline, such as DDIMPipeline, got {kind.__name__}")
    report = adpdm.quantize(pipe, config)
    print(f"quantized: {report.coverage}")

    steps = config.num_inference_steps
    images = sample(pipe, args.images, steps, args.seed)
    pipe.save_pretrained(args.out)
    make_image_grid(images, rows=args.images // 4, cols=4).save(args.out / "samples.png")

    # `import adpdm` has taught diffusers the format, so that its own from_pretrained loads it.
    loaded = kind.from_pretrained(args.out, local_files_only=True)
    again = sample(loaded, args.images, steps, args.seed)
    if any(a.tobytes() != b.tobytes() for a, b in zip(images, again, strict=True)):
        raise SystemExit(f"{args.out}: the loaded pipeline samples other images than the saved one")
    print(f"saved {args.out}; loaded again, it samples the same {len(images)} images")


if __name__ == "__main__":
    main()
