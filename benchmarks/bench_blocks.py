"""Times a transformer block of PixArt, Stable Diffusion 3 or Flux: ours, fused and layer by layer, and torch.

    python benchmarks/bench_blocks.py --threads 1 --json runs/blocks.json

Blocks have the widths of their models and random weights and ranges, all in one process; `--tokens` is what
the image is cut into (1024 at 512x512 in all of these). With one thread on a CPU times are CPU times, else
wall times. Numbers are medians; a ratio to ours fused is the median of the ratios of a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import results_file
import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from adpdm._native import build_info
from adpdm.nn import LayerInfo, fuse_blocks, quant_layers, swap_layers, unfused
from adpdm.reference_hadamard import hadamard_block
from adpdm.step import StepState

Call = Callable[[], object]
RANGE = 4.0  # of activations, which are of a norm's scale


def pixart(tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """PixArt-alpha: 16 heads of 72, 120 tokens of text with a mask."""
    block = BasicTransformerBlock(
        1152,
        16,
        72,
        cross_attention_dim=1152,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    text = {
        "encoder_hidden_states": torch.randn(1, 120, 1152),
        "encoder_attention_mask": torch.zeros(1, 1, 120),
    }
    time_rows = torch.randn(1, 6 * 1152)
    return block, {"hidden_states": torch.randn(1, tokens, 1152), **text, "timestep": time_rows}


def stable_diffusion_3(tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """Stable Diffusion 3 medium: 24 heads of 64, 333 tokens of text."""
    return JointTransformerBlock(1536, 24, 64), _joint(tokens, 333, 1536)


def flux(tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """Flux: 24 heads of 128, 512 tokens of text; one block of 19."""
    rotation = {"image_rotary_emb": (torch.randn(tokens + 512, 128), torch.randn(tokens + 512, 128))}
    return FluxTransformerBlock(3072, 24, 128), {**_joint(tokens, 512, 3072), **rotation}


def flux_single(tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """Flux: one block of 38 that keep attention and feed-forward net side by side."""
    return FluxSingleTransformerBlock(3072, 24, 128), flux(tokens)[1]


def _joint(tokens: int, text: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, tokens, width),
        "encoder_hidden_states": torch.randn(1, text, width),
        "temb": torch.randn(1, width),
    }


BLOCKS = {"pixart": pixart, "sd3": stable_diffusion_3, "flux": flux, "flux-single": flux_single}


class Host(nn.Module):
    """A denoiser of one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block


def quantized(block: nn.Module, weight_bits: int) -> Host:
    """A copy of the block in integers, fused; norms' own layers stay in float, as in a denoiser."""
    host = Host(deepcopy(block))
    layers = {n: m for n, m in host.named_modules() if isinstance(m, nn.Linear) and "norm" not in n}
    infos = [
        # Rotated as by default.
        LayerInfo(
            name,
            0,
            0,
            (weight_bits, 8),
            "",
            None,
            hadamard_block(layer.in_features) if weight_bits < 8 else 0,
        )
        for name, layer in layers.items()
    ]
    swap_layers(host, infos, 1, lambda slots: StepState(slots, 1))
    for layer in quant_layers(host).values():
        for quantizer in layer.quantizers:
            quantizer.set_ranges(
                torch.tensor([-RANGE]), torch.tensor([RANGE]), torch.zeros(1, dtype=torch.int32)
            )
        layer.freeze()
    host.get_submodule("adpdm_step").set_step(0)  # type: ignore[operator]
    fuse_blocks(host)
    return host


def contestants(name: str, tokens: int, device: torch.device) -> dict[str, Call]:
    """What is timed; ours reads float32 on a CPU and bfloat16 on a GPU."""
    block, given = BLOCKS[name](tokens)
    block = block.eval().requires_grad_(False)
    found: dict[str, Call] = {}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for bits in (8, 4):
        host = quantized(block, bits).to(device, dtype)
        found[f"W{bits}A8"] = _call(host.block, given, dtype, device)
        if bits == 8:
            found["layer by layer"] = _without_fusion(host, found["W8A8"])
    found["torch f32"] = _call(deepcopy(block).to(device), given, torch.float32, device)
    found["torch bf16"] = _call(deepcopy(block).to(device, torch.bfloat16), given, torch.bfloat16, device)
    return found


def _call(block: Any, given: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Call:
    def moved(x: Any) -> Any:
        return x.to(device, dtype) if isinstance(x, Tensor) else x

    # Angles of positions stay in float32 in diffusers as well.
    own = {
        k: tree_map(lambda x: x.to(device), v) if isinstance(v, tuple) else moved(v) for k, v in given.items()
    }
    return lambda: block(**own)


def _without_fusion(host: Host, call: Call) -> Call:
    def run() -> None:
        with unfused(host):
            call()

    return run


@dataclass(frozen=True)
class Row:
    """One contestant on one block; the ratio is its time divided by that of W8A8: quartiles."""

    block: str
    contestant: str
    milliseconds: float
    ratio: list[float]


def measure(
    name: str, tokens: int, device: torch.device, repeats: int, clock: Callable[[], float]
) -> list[Row]:
    """Time all contestants in turns."""
    calls = contestants(name, tokens, device)

    def seconds(call: Call) -> float:
        start = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    for call in calls.values():
        seconds(call)
    rounds = [{key: seconds(call) for key, call in calls.items()} for _ in range(repeats)]
    return [
        Row(
            name,
            key,
            1e3 * statistics.median(r[key] for r in rounds),
            statistics.quantiles((r[key] / r["W8A8"] for r in rounds), n=4),
        )
        for key in calls
    ]


def main() -> None:
    """Print a table; write it as JSON where asked."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--blocks", nargs="+", choices=list(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--tokens", type=int, default=256, help="of the image")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds, at least 20")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    if args.repeats < 20:
        parser.error(f"--repeats must be at least 20, got {args.repeats}")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    is_alone = args.threads == 1 and args.device == "cpu"
    clock = time.process_time if is_alone else time.perf_counter
    kernels = build_info()["isa"] if args.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{kernels}, {args.threads} thread(s), {args.tokens} tokens, torch {torch.__version__}; ms (/ W8A8):"
    )
    rows = []
    for name in args.blocks:
        found = measure(name, args.tokens, torch.device(args.device), args.repeats, clock)
        cells = [f"{r.contestant} {r.milliseconds:.4g} ({r.ratio[1]:.2f})" for r in found]
        print(f"{name:12} {', '.join(cells)}", flush=True)
        rows += found
    if args.json:
        results_file.write(args.json, vars(args), map(asdict, rows), args.device)


if __name__ == "__main__":
    main()
