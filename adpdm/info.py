"""What this build of adpdm, this CPU and this torch are: the facts `adpdm info` prints and reports quote."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from . import __version__, _native


def gather_info() -> dict[str, str]:
    """Return the facts, from label to text, in the order to print them."""
    build = _native.build_info()
    threads = _native.worker_threads()
    obstacle = build["isa_obstacles"]["amx"]
    return {
        "adpdm": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (extension built against {build['torch_version_built']})",
        "compiler": build["compiler"],
        "processor": processor_name(),
        "logical CPUs": str(os.cpu_count()),
        "instruction set": build["isa"],
        "CPU features": " ".join(build["cpu_features"]) or "none of those adpdm uses",
        "AMX tiles": f"not available: {obstacle}" if obstacle else "available",
        "worker threads": f"{threads} of torch.get_num_threads() = {torch.get_num_threads()}",
        "CUDA kernels": build["cuda_archs"] if build["cuda_built"] else "not built",
        "CUDA device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def render_info(info: dict[str, str]) -> str:
    """Return the facts as aligned lines of text."""
    width = max(len(label) for label in info)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in info.items())


def processor_name() -> str:
    """Return the processor's marketing name, or the architecture where the system does not tell it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
