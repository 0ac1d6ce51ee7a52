"""What an outcome of `make gpu` holds for: sources, toolchain, and programs that were built elsewhere.

    python tools/gpu_sources.py > build/gpu/prebuilt/sources.txt

notes beside such programs, right after they were built, what they were built of; gpu_run.py compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gpu_stages

SUFFIXES = {".cpp", ".h", ".inc", ".cu", ".cuh", ".py", ".txt", ".json"}
# What adpdm_gpu_tests and adpdm_gpu_peaks are built of.
PROGRAM_SOURCES = ("csrc", "cpp_tests", "benchmarks/cuda", "CMakeLists.txt")
SOURCES = ("csrc", "adpdm", "cpp_tests", "python_tests", "benchmarks", "tools", "CMakeLists.txt", "setup.py")
TOOLCHAIN = ("device", "python", "torch", "cuda", "nvcc", "g++")  # of the facts of a run


def hash_files(root: Path, names: Iterable[str]) -> str:
    """One hash of files and of all sources in folders: not the commit, which a bare copy does not have."""
    total = hashlib.sha256()
    given = [root / name for name in names]
    for path in sorted([*given, *(file for folder in given for file in folder.rglob("*"))]):
        if path.is_relative_to(root / "benchmarks" / "results"):
            continue  # where gpu_run.py writes
        if path.is_file() and path.suffix in SUFFIXES:
            total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()


def made_of(root: Path, facts: Mapping[str, Any]) -> dict[str, str]:
    """All that decides whether a stage which has passed would pass again, by name."""
    programs = hashlib.sha256()
    for path in gpu_stages.prebuilt_programs() if gpu_stages.is_prebuilt() else ():
        programs.update(path.read_bytes())
    return {
        "sources": hash_files(root, SOURCES),
        "programs": programs.hexdigest(),
        **{name: str(facts[name]) for name in TOOLCHAIN},
    }


def check_prebuilt(root: Path) -> None:
    """Exit with a sentence where programs built elsewhere are not known to be of these sources."""
    if not gpu_stages.is_prebuilt():
        return
    note = gpu_stages.PREBUILT / "sources.txt"
    found = note.read_text().strip() if note.exists() else "no such file"
    if found != (wanted := hash_files(root, PROGRAM_SOURCES)):
        raise SystemExit(
            f"make gpu: wanted programs of these sources in {gpu_stages.PREBUILT} ({wanted[:12]} in "
            f"{note.name}), found {found[:12]}: build them anew, then python tools/gpu_sources.py > {note}"
        )


if __name__ == "__main__":
    print(hash_files(gpu_stages.ROOT, PROGRAM_SOURCES))
