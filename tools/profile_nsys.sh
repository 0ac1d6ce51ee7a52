#!/usr/bin/env bash
# Profiles a command with Nsight Systems as docs/profiling.md describes: kernels inside CUDA graphs one by one, NVTX ranges
# of adpdm, a summary per kernel and per range at the end.
#
#   tools/profile_nsys.sh OUTPUT COMMAND...       for example: tools/profile_nsys.sh unet python my_sampling.py
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "profile_nsys: wanted OUTPUT and a command, got $# argument(s): tools/profile_nsys.sh OUTPUT COMMAND..." >&2
  exit 2
fi
if ! command -v nsys > /dev/null; then
  echo "profile_nsys: wanted nsys (Nsight Systems) on PATH, found none" >&2
  exit 2
fi
output=$1
shift
nsys profile --trace=cuda,nvtx,cublas,cudnn --cuda-graph-trace=node --sample=none --cpuctxsw=none \
  --force-overwrite=true --output="$output" "$@"
nsys stats --report cuda_gpu_kern_sum --report nvtx_gpu_proj_sum --format table "$output.nsys-rep"
