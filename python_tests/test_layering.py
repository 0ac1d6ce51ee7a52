"""Enforces the direction of dependencies: which Python module and which C++ folder may know which others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import modules of earlier lines only. A folder (quantizers, nn) is one module, free inside.
LAYERS: list[set[str]] = [
    {"config", "_native", "operands", "memory"},
    {"reference_attention", "reference_embedding", "reference_hadamard"},
    {"processes", "fingerprint", "files", "progress"},
    {"reference"},
    {"qparams", "info", "fake_kernels"},
    {"ops", "schedulers"},
    {"step"},
    {"quantizers"},
    {"nn"},
    {"search_state", "timesteps", "partition", "trajectory", "report", "outputs"},
    {"search", "replay", "evaluate", "facts", "layer_runs"},
    {"rounding", "precision", "bias", "correction", "equalize"},
    {"budget", "quantize_options", "search_run"},
    {"calibrate", "pipeline_checks"},
    {"diffusers_config"},
    {"model_methods"},
    {"diffusers_quantizer", "denoisers"},
    {"pipeline"},
    {"graph"},
    {"testing", "demo", "tables", "doctor", "conditioning"},
    {"model_folder"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
MAY_IMPORT_DIFFUSERS = {
    "pipeline",
    "pipeline_checks",
    "diffusers_config",
    "diffusers_quantizer",
    "testing",
    "denoisers",
}

# A C++ folder may include these folders, the standard library, and of other headers what the pattern names.
CPP_FOLDERS: dict[str, tuple[set[str], str]] = {
    "core": ({"core"}, r"(cuda_fp16|cuda_bf16)\.h"),
    "cpu": ({"core", "cpu"}, r"(immintrin|cpuid|sys/syscall|unistd)\.h"),
    "simt": ({"simt"}, r"ucontext\.h|sanitizer/\w+\.h"),
    "cuda": ({"core", "cuda"}, r"(cuda\w*|nvtx3/nvToolsExt)\.h"),
    "bindings": ({"core", "cpu", "cuda", "bindings"}, r"(torch|ATen|c10|pybind11)/.*|pthread\.h"),
}
STANDARD_HEADER = r"[a-z_]+"
# Where the instructions of the device are replaced by calls of the host executor.
MAY_INCLUDE_SIMT = {"device.cuh", "launch.cuh", "device_info.cu"}


def module_of(path: Path) -> str:
    """The layer name of a file below adpdm/: its stem, or the folder it is in."""
    parts = path.relative_to(ROOT / "adpdm").with_suffix("").parts
    return parts[0]


def imported_names(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Every absolute dotted name a file of `package` (('adpdm', 'nn') for adpdm/nn/x.py) imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def python_faults(module: str, package: tuple[str, ...], source: str) -> list[str]:
    """Sentences on what the source of `module` may not do."""
    if module not in RANK:
        return [f"adpdm.{module} has no layer: add it to LAYERS in python_tests/test_layering.py"]
    tree = ast.parse(source)
    faults = []
    for name in imported_names(tree, package):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "adpdm" and target != module and RANK.get(target, -1) >= RANK[module]:
            faults.append(f"adpdm.{module} imports adpdm.{target}, which is not in an earlier layer")
        if top == "diffusers" and module not in MAY_IMPORT_DIFFUSERS:
            faults.append(f"adpdm.{module} imports diffusers; only {sorted(MAY_IMPORT_DIFFUSERS)} may")
    if module != "ops" and any(ast.unparse(node) == "torch.ops.adpdm" for node in ast.walk(tree)):
        faults.append(f"adpdm.{module} uses torch.ops.adpdm; only adpdm.ops may")
    return faults


def cpp_faults(folder: str, source: str, name: str = "") -> list[str]:
    """Sentences on what the file csrc/<folder>/<name> may not include."""
    if folder not in CPP_FOLDERS:
        return [f"csrc/{folder} has no layer: add it to CPP_FOLDERS in python_tests/test_layering.py"]
    folders, others = CPP_FOLDERS[folder]
    if folder == "cuda" and name in MAY_INCLUDE_SIMT:
        folders = folders | {"simt"}
    faults = []
    for kind, header in re.findall(r'^\s*#\s*include\s*(["<])([^">]+)[">]', source, re.MULTILINE):
        if kind == '"' and header.partition("/")[0] not in folders:
            faults.append(f'csrc/{folder} includes "{header}"; wanted a path below csrc in {sorted(folders)}')
        if kind == "<" and not re.fullmatch(f"{STANDARD_HEADER}|{others}", header):
            faults.append(f"csrc/{folder} includes <{header}>; wanted the standard library or {others}")
    return faults


PYTHON_FILES = sorted((ROOT / "adpdm").rglob("*.py"))
CPP_FILES = sorted(
    path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".inc", ".cpp", ".cu", ".cuh"}
)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_file_depends_on_earlier_layers_only(path: Path) -> None:
    package = path.relative_to(ROOT).parent.parts
    assert python_faults(module_of(path), package, path.read_text()) == []


@pytest.mark.parametrize("path", CPP_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_cpp_file_includes_allowed_folders_only(path: Path) -> None:
    assert cpp_faults(path.relative_to(ROOT / "csrc").parts[0], path.read_text(), path.name) == []


def test_layers_and_the_table_of_the_design_name_the_modules_that_exist() -> None:
    modules = {module_of(path) for path in PYTHON_FILES}
    assert set(RANK) == modules
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)(?:\.py|/)`", row)}
    assert modules - named == {"__init__", "__main__"}


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("ops", "from .nn import layers", "adpdm.ops imports adpdm.nn, which is not in an earlier layer"),
        ("ops", "from . import step", "adpdm.ops imports adpdm.step, which is not in an earlier layer"),
        ("step", "import adpdm.cli", "adpdm.step imports adpdm.cli, which is not in an earlier layer"),
        ("nn", "def f():\n    import diffusers.models", "adpdm.nn imports diffusers; only "),
        ("nn", "import torch\ntorch.ops.adpdm.linear", "adpdm.nn uses torch.ops.adpdm; only adpdm.ops may"),
        ("helpers", "", "adpdm.helpers has no layer: add it to LAYERS"),
    ],
)
def test_python_rule_finds_the_fault(module: str, source: str, fault: str) -> None:
    (found,) = python_faults(module, ("adpdm",), source)
    assert found.startswith(fault)


def test_python_rule_resolves_relative_imports_of_a_subpackage() -> None:
    package = ("adpdm", "nn")
    assert (
        python_faults("nn", package, "from .layers import A\nfrom ..ops import B\nfrom .. import step") == []
    )
    assert len(python_faults("nn", package, "from ..calibrate import C")) == 1


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("core", '#include "cpu/isa.h"'),
        ("core", "#include <immintrin.h>"),
        ("cpu", "#  include <ATen/Parallel.h>"),
        ("cpu", '#include "isa.h"'),
        ("cuda", '#include "cpu/isa.h"'),
        ("cuda", '#include "simt/executor.h"'),
        ("simt", '#include "core/types.h"'),
        ("bindings", "#include <cuda_runtime.h>"),
        ("metal", ""),
    ],
)
def test_cpp_rule_finds_the_fault(folder: str, source: str) -> None:
    assert len(cpp_faults(folder, source)) == 1


def test_cpp_rule_allows_what_the_layers_allow() -> None:
    assert cpp_faults("cpu", '#include "core/types.h"\n#include <immintrin.h>\n#include <vector>') == []
    assert cpp_faults("bindings", '#include <torch/library.h>\n#include "cpu/isa.h"') == []
    assert cpp_faults("cuda", '#include "simt/executor.h"', "device.cuh") == []
