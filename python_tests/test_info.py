"""Tests of the facts about the build: right, complete, and errors for wishes the CPU cannot meet."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adpdm
from adpdm import _native, info

FEATURES_OF = {
    "portable": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx_vnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
}
FEATURES_OF["amx"] = FEATURES_OF["avx512"] | {"amx_tile", "amx_int8"}


def usable_features() -> set[str]:
    """Of this CPU; that of the level avx_vnni also where AVX-512 encodes it."""
    features = set(_native.build_info()["cpu_features"])
    return features | ({"avx_vnni"} if features >= {"avx512_vnni", "avx512vl"} else set())


LOAD_EXTENSION = """
import sys, importlib.util, torch
spec = importlib.util.spec_from_file_location("adpdm._C", sys.argv[1])
extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
print(extension.build_info()["isa"])
"""


def load_with_cpu(level: str) -> subprocess.CompletedProcess[str]:
    """Load the extension in a new process with ADPDM_CPU=level and print the instruction set in use.

    Without the package around it, whose import takes three times as long.
    """
    path = importlib.util.find_spec("adpdm._C")
    assert path is not None
    arguments = [sys.executable, "-c", LOAD_EXTENSION, str(path.origin)]
    return subprocess.run(arguments, env={**os.environ, "ADPDM_CPU": level}, capture_output=True, text=True)


def test_build_info_agrees_with_python() -> None:
    build = _native.build_info()
    assert build["version"] == adpdm.__version__
    assert torch.__version__.startswith(build["torch_version_built"])
    assert build["cuda_built"] == bool(build["cuda_archs"])
    assert build["isa"] in FEATURES_OF
    assert usable_features() >= FEATURES_OF[build["isa"]]


def test_cpu_features_are_those_the_kernel_reports() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    reported = set(next((line for line in lines if line.startswith("flags")), "").split())
    known = FEATURES_OF["amx"] | FEATURES_OF["avx_vnni"] | {"avx512_bf16"}
    assert set(_native.build_info()["cpu_features"]) == known & reported


@pytest.mark.parametrize("level", FEATURES_OF)
def test_adpdm_cpu_chooses_the_level_or_says_that_the_cpu_lacks_it(level: str) -> None:
    result = load_with_cpu(level)
    obstacle = _native.build_info()["isa_obstacles"].get(level, "")
    if usable_features() >= FEATURES_OF[level] and not obstacle:
        assert result.stdout.strip() == level, result.stderr
    else:
        assert result.returncode != 0
        assert f"ADPDM_CPU: wanted {level}, but the best this CPU supports is" in result.stderr
        assert obstacle in result.stderr


def test_unknown_adpdm_cpu_is_an_error() -> None:
    result = load_with_cpu("fastest")
    assert result.returncode != 0
    assert "ADPDM_CPU: wanted portable, avx2, avx_vnni, avx512 or amx, got 'fastest'" in result.stderr


def test_info_says_whether_amx_can_be_used_and_if_not_why() -> None:
    obstacle = _native.build_info()["isa_obstacles"]["amx"]
    features = set(_native.build_info()["cpu_features"])
    if not features >= {"amx_tile", "amx_int8"}:
        assert obstacle
    assert info.gather_info()["AMX tiles"] == (f"not available: {obstacle}" if obstacle else "available")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_kernels_use_as_many_threads_as_torch(count: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        assert _native.worker_threads() == count
    finally:
        torch.set_num_threads(before)


def test_render_info_names_every_fact_once() -> None:
    facts = info.gather_info()
    lines = info.render_info(facts).splitlines()
    assert [line.split("  ")[0] for line in lines] == list(facts)
    assert facts["adpdm"] == adpdm.__version__
    assert all(facts.values())
