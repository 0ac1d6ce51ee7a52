"""Tests of building and loading: what a user sees when torch, a tool or the extension is missing."""

from __future__ import annotations

import importlib.machinery
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adpdm
from adpdm._native import build_info, same_minor_version
from adpdm.fake_kernels import _fake

ROOT = Path(adpdm.__file__).parents[1]


def run_python(arguments: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with changed environment variables."""
    merged = {**os.environ, **env}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=merged, capture_output=True, text=True)


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A folder that holds adpdm's Python files without the extension."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "adpdm", tmp_path / "adpdm", ignore=ignore)
    return tmp_path


def import_error(folder: Path) -> str:
    """Import the adpdm of that folder, which must fail; return the last line of the traceback."""
    code = """
import sys
# An editable install of the repository offers its own extension to any package called adpdm.
editable = [f for f in sys.meta_path if getattr(f, "__module__", "").startswith("__editable__")]
sys.meta_path[:] = [f for f in sys.meta_path if f not in editable]
import adpdm
"""
    result = run_python(["-c", code], folder, PYTHONPATH="")
    assert result.returncode != 0, "import adpdm succeeded"
    return result.stderr.strip().splitlines()[-1]


def test_backend_sees_the_installed_torch_behind_the_isolated_setuptools(tmp_path: Path) -> None:
    stub = tmp_path / "setuptools"
    stub.mkdir()
    (stub / "__init__.py").write_text("")
    (stub / "build_meta.py").write_text("build_editable = 'the isolated one'\n")
    code = f"""
import importlib.util, sys
own = [{str(tmp_path)!r}, {str(ROOT / "tools")!r}]
sys.path = own + [path for path in sys.path if path and "site-packages" not in path]
assert importlib.util.find_spec("torch") is None, "torch was visible before the backend"
import build_backend
print(importlib.util.find_spec("torch") is not None, build_backend.build_editable)
"""
    result = run_python(["-c", code], tmp_path, PYTHONPATH="")
    assert result.stdout.strip() == "True the isolated one", result.stderr


def test_setup_without_torch_says_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    result = run_python(["setup.py", "build_ext"], ROOT, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "run `pip install 'torch>=2.11'` first, then install adpdm again" in result.stderr
    assert "Traceback" not in result.stderr


def test_setup_without_cmake_says_to_install_it(tmp_path: Path) -> None:
    code = f"""
import runpy, sys, sysconfig
get_path = sysconfig.get_path
sysconfig.get_path = lambda name, *rest: {str(tmp_path)!r} if name == "scripts" else get_path(name, *rest)
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""
    result = run_python(["-c", code], ROOT, PATH=str(tmp_path))
    assert result.returncode == 1
    assert "adpdm's C++ core is built with cmake, found none: run `pip install cmake`." in result.stderr


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ({}, {"-UADPDM_CUDA", "-UADPDM_CUDA_ARCHS"}),
        ({"ADPDM_CUDA": "", "ADPDM_CUDA_ARCHS": ""}, {"-UADPDM_CUDA", "-UADPDM_CUDA_ARCHS"}),
        (
            {"ADPDM_CUDA": "1", "ADPDM_CUDA_ARCHS": "90a-real"},
            {"-DADPDM_CUDA=1", "-DADPDM_CUDA_ARCHS=90a-real"},
        ),
    ],
)
def test_setup_takes_nothing_of_cuda_from_an_earlier_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], options: set[str]
) -> None:
    core_build = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["build_core"]
    commands: list[list[str]] = []
    (tmp_path / "core_config.txt").write_text("libraries=a.a")
    for name in ("ADPDM_CUDA", "ADPDM_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(core_build.__globals__, "CORE_BUILD", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda c: commands.append(c) or subprocess.CompletedProcess(c, 0))
    assert core_build() == {"libraries": "a.a"}
    assert {word for word in commands[0] if "ADPDM_CUDA" in word} == options


def test_import_without_extension_names_the_build_command(package_copy: Path) -> None:
    message = import_error(package_copy)
    assert (
        "adpdm: the native extension is not built for this Python; build it with `pip install -e .`"
        in message
    )


def test_import_of_an_extension_that_does_not_load_blames_another_torch(package_copy: Path) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (package_copy / "adpdm" / f"_C{suffix}").write_bytes(b"not a library")
    message = import_error(package_copy)
    assert "as happens when it was built against another torch; rebuild it with `pip install -e .`" in message


def test_import_of_an_extension_for_another_torch_names_both_versions(package_copy: Path) -> None:
    stub = "def build_info(): return {'torch_version_built': '1.13.1'}\n"
    (package_copy / "adpdm" / "_C.py").write_text(stub)
    message = import_error(package_copy)
    assert "the native extension was built against torch 1.13.1, but torch " in message


@pytest.mark.parametrize(
    ("built", "running", "same"),
    [
        ("2.13.0", "2.13.0+cpu", True),
        ("2.13.0", "2.13.1", True),
        ("2.13.0", "2.14.0", False),
        ("2.1.0", "2.11.0", False),
        ("3.13.0", "2.13.0", False),
    ],
)
def test_same_minor_version(built: str, running: str, same: bool) -> None:
    assert same_minor_version(built, running) is same


def test_extension_older_than_the_package_says_to_build_it_again() -> None:
    with pytest.raises(ImportError, match="no operator of_tomorrow, so it is older .* rebuild it with `pip"):
        _fake("of_tomorrow")(lambda x: x)


# On CUDA torch's operators run in their place: its attention, with `quantize` after it, its linear layers.
CPU_ONLY = {
    f"adpdm::{name}"
    for name in ("attention_quantize", "timestep_embedding", "silu_linear", "adaptive_rows", "set_step")
}


def test_every_operator_has_a_kernel_for_every_device_that_was_built() -> None:
    build = build_info()
    operators = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("adpdm::")]
    assert len(operators) >= 16, "the list must not be empty by mistake"
    for device, left_out in (("CPU", set()), ("CUDA", CPU_ONLY))[: 1 + build["cuda_built"]]:
        missing = {o for o in operators if not torch._C._dispatch_has_kernel_for_dispatch_key(o, device)}
        assert missing == left_out, f"without a {device} kernel"
