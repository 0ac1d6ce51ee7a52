"""Ceilings of this GPU: copies and integer tensor cores (adpdm_gpu_peaks), cuBLAS and cuDNN in bfloat16.

python benchmarks/gpu_peaks.py build/core/adpdm_gpu_peaks --json peaks.json

mma_s8_TOPS and wgmma_s8_TOPS are the rates of int8 products by mma.sync, which our kernels use everywhere,
and by wgmma, which they use on compute capability 9.0; mma_s4_TOPS that of int4. What the card lacks is null,
and ..._obstacle says why.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_timing import Timed
from unet_results import write_whole

ROUNDS = 25


def median_seconds(timed: Timed) -> float:
    """Of one call."""
    return 1e-6 * sorted(timed.microseconds() for _ in range(ROUNDS))[ROUNDS // 2]


def bf16_matmul_tflops(size: int) -> float:
    """cuBLAS, square matrices of random numbers: zeros draw less power and run faster."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2e-12 * size**3 / median_seconds(Timed(lambda: a @ b, 2))


def bf16_conv_tflops(batch: int, channels: int, size: int) -> float:
    """CuDNN, 3 x 3, channels_last."""
    x = torch.randn(batch, channels, size, size, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(channels, channels, 3, 3, device="cuda", dtype=torch.bfloat16)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    operations = 2 * 9 * batch * channels**2 * size**2
    return 1e-12 * operations / median_seconds(Timed(lambda: F.conv2d(x, weight, padding=1), 4))


def main() -> None:
    """Print all ceilings; write them as JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", type=Path, help="adpdm_gpu_peaks, built by CMake with ADPDM_TESTS=ON")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    done = subprocess.run([args.program.resolve()], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"gpu_peaks: {args.program} failed: {done.stderr.strip()}")
    peaks = json.loads(done.stdout)
    peaks["bf16_matmul_8192_TFLOPS"] = bf16_matmul_tflops(8192)
    peaks["bf16_conv3x3_2x640x64_TFLOPS"] = bf16_conv_tflops(2, 640, 64)
    peaks["bf16_conv3x3_128x256x16_TFLOPS"] = bf16_conv_tflops(128, 256, 16)
    print(json.dumps(peaks, indent=1))
    if args.json:
        write_whole(args.json, peaks)


if __name__ == "__main__":
    main()
