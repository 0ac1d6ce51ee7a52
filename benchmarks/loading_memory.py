"""Memory that quantizing while loading takes: peak of the resident size, in a process of its own per width.

python benchmarks/loading_memory.py [--model sd15] [--shard 500MB] [--weight-bits 8 4]

Writes the model of `unets.py` with random weights in float16, in shards, into a temporary folder (1.7 GB for
sd15). The bar is 1.3 times the quantized model plus the largest shard.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import unets

BAR = 1.3  # times the size of the quantized model, plus the largest shard


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes; Linux alone tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values[field].split()[0]) * 1024


def load(folder: Path, model: str, weight_bits: int) -> dict[str, int]:
    """Load a checkpoint quantized; sizes in bytes. The libraries that loading imports do not count."""
    import accelerate  # noqa: F401
    import safetensors.torch  # noqa: F401

    import adpdm

    kind, config = unets.class_of(model), adpdm.AdpdmConfig(weight_bits=weight_bits)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
    before = resident("VmRSS")
    loaded = kind.from_pretrained(folder, quantization_config=config, torch_dtype=torch.float16)
    return {"peak": resident("VmHWM") - before, "model": loaded.get_memory_footprint()}


def measure(folder: Path, model: str, weight_bits: int) -> str:
    """What a process of its own found, as a line."""
    command = [sys.executable, __file__, "--model", model, "--load", str(folder)]
    command += ["--weight-bits", str(weight_bits)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    shard = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    bar = BAR * found["model"] + shard
    return (
        f"{model} W{weight_bits}: peak {found['peak'] / 1e6:.0f} MB, model {found['model'] / 1e6:.0f} MB, "
        f"largest shard {shard / 1e6:.0f} MB, bar {bar / 1e6:.0f} MB: {found['peak'] / bar:.2f} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="sd15", help="a name of unets.py with random weights")
    parser.add_argument("--shard", default="500MB", help="size of a file, as for save_pretrained")
    parser.add_argument("--weight-bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # in the process that is measured
    args = parser.parse_args()
    if args.load is not None:
        print(json.dumps(load(args.load, args.model, args.weight_bits[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = unets.build(args.model, torch.float16)
        model.save_pretrained(folder, max_shard_size=args.shard)
        del model
        for bits in args.weight_bits:
            print(measure(Path(folder), args.model, bits), flush=True)


if __name__ == "__main__":
    main()
