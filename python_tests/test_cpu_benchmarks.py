"""The CPU benchmarks of single operators: what they write and compare with, and `make bench`."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a benchmark; what it sets in torch is taken back."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads, is_grad_enabled = torch.get_num_threads(), torch.is_grad_enabled()
    with torch.random.fork_rng(devices=[]):
        yield importlib.import_module
    torch.set_num_threads(threads)
    torch.set_grad_enabled(is_grad_enabled)


@pytest.fixture
def kernels(load: Load, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench_kernels.py with samples of a single call."""
    monkeypatch.setattr(load("cpu_timing"), "MIN_SAMPLE_SECONDS", 0)
    return load("bench_kernels")


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """The script with these options."""
    monkeypatch.setattr("sys.argv", [module.__name__, "--repeats", "20", *options])
    module.main()


def written(folder: Path) -> dict[str, Any]:
    """The one file of a folder."""
    (path,) = folder.iterdir()
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def write_peaks(path: Path, level: str, instructions: str, best_gops: float | None) -> str:
    """A file of adpdm_cpu_peaks with one row; returns its name."""
    row = {"level": level, "instructions": instructions, "best_gops": best_gops}
    path.write_text(json.dumps({"rows": [row]}))
    return str(path)


# ---- files ----


def test_bench_norm_writes_its_rows(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("bench_norm")
    monkeypatch.setattr(load("cpu_timing"), "MIN_SAMPLE_SECONDS", 0)
    monkeypatch.setattr(module, "SHAPES", [(1, 32, 4)])
    run(module, monkeypatch, "--json", str(tmp_path / "new" / "norm.json"))
    result = written(tmp_path / "new")
    assert {"isa", "torch", "cpu", "commit", "date"} <= set(result["machine"])
    assert result["settings"] == {"threads": 1, "repeats": 20}
    (row,) = result["rows"]
    assert (row["batch"], row["channels"], row["side"]) == (1, 32, 4)
    assert min(row["ours_microseconds"], row["torch_microseconds"], row["ratio"]) > 0


def test_bench_elementwise_writes_its_rows(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("bench_elementwise")
    run(module, monkeypatch, "--size", "64", "--json", str(tmp_path / "elementwise.json"))
    result = written(tmp_path)
    assert result["settings"] == {"threads": 1, "repeats": 20, "size": 64, "dtype": "f32"}
    names = [row["operator"] for row in result["rows"]]
    assert names == list(module.cases(64, torch.float32))
    with_copy = {row["operator"] for row in result["rows"] if row["share_of_copy"] is not None}
    assert with_copy == {"quantize", "quantize_int4", "dequantize"}


def test_results_that_cannot_be_written_leave_the_old_file(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        load("results_file").write(path, {}, [{"ratio": float("nan")}])
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("result.json", "old")]


def test_too_few_rounds_are_refused(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bench_norm", "bench_elementwise", "bench_kernels"):
        with pytest.raises(SystemExit):
            run(load(name), monkeypatch, "--repeats", "19")
        assert "--repeats must be at least 20, got 19" in capsys.readouterr().err


# ---- peaks ----


@pytest.mark.parametrize(
    ("level", "instructions"),
    [("avx2", "vpmaddwd + vpaddd"), ("avx_vnni", "vpdpbusd"), ("avx512", "vpdpbusd"), ("amx", "tdpbssd")],
)
def test_every_level_is_compared_with_its_own_instruction(
    kernels: ModuleType, tmp_path: Path, level: str, instructions: str
) -> None:
    source = (ROOT / "benchmarks" / "cpu" / "peaks.cpp").read_text()
    name = {"avx2": "kAvx2", "avx_vnni": "kAvxVnni", "avx512": "kAvx512", "amx": "kAmx"}[level]
    assert f'{{Isa::{name}, "{instructions}"' in source, "bench_kernels and adpdm_cpu_peaks agree on names"
    path = Path(write_peaks(tmp_path / "peaks.json", level, instructions, 100.0))
    assert kernels.read_peak(path, level) == kernels.Peak(instructions, 100.0)


def test_a_peak_that_was_not_measured_is_refused(kernels: ModuleType, tmp_path: Path) -> None:
    path = Path(write_peaks(tmp_path / "peaks.json", "amx", "tdpbssd", None))
    for level in ("amx", "avx2"):
        with pytest.raises(ValueError, match=f"the rate of .* at {level}, found none in .*peaks.json"):
            kernels.read_peak(path, level)
    with pytest.raises(ValueError, match="levels avx2, avx_vnni, avx512, amx, got portable"):
        kernels.read_peak(path, "portable")


def test_share_of_peak_stands_in_table_and_file(
    kernels: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kernels, "build_info", lambda: {"isa": "avx2"})
    monkeypatch.setitem(kernels.MODELS, "fashion", [kernels.Layer(16, 4, 16, 3)])
    peaks = write_peaks(tmp_path / "peaks.json", "avx2", "vpmaddwd + vpaddd", 100.0)
    run(kernels, monkeypatch, "--peaks", peaks, "--json", str(tmp_path / "new" / "kernels.json"))
    _, explanation, head, _ = capsys.readouterr().out.splitlines()
    assert explanation == "W8/peak: W8A8 in 1 x 100 GOP/s of vpmaddwd + vpaddd"
    assert head.endswith(" W8/peak")
    result = written(tmp_path / "new")
    assert result["settings"]["peaks"] == {"instructions": "vpmaddwd + vpaddd", "gops": 100.0}
    shares = {row["contestant"]: row["share_of_peak"] for row in result["rows"]}
    ours = result["rows"][0]
    assert shares.pop("W8A8") == pytest.approx(ours["gops"] / 100)
    assert set(shares.values()) == {None}


def test_depthwise_layers_have_no_peak(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(kernels, monkeypatch, "--model", "depthwise", "--peaks", "peaks.json")
    assert "--peaks: wanted layers that are not depthwise" in capsys.readouterr().err


# ---- layers ----


def test_cifar_layers_are_those_of_the_denoiser(kernels: ModuleType, load: Load) -> None:
    unets = load("unets")
    with torch.device("meta"):
        model = unets.class_of("cifar10")(**unets.settings_of(unets.find("cifar10")))
        sample, timestep = torch.empty(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)
    found = set()

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Conv2d):
            stride, size = module.stride[0], output.shape[-1] * module.stride[0]
            kernel = module.kernel_size[0]
            found.add(kernels.Layer(module.in_channels, size, module.out_channels, kernel, stride))
        elif isinstance(module, torch.nn.Linear):
            rows = inputs[0].numel() // module.in_features
            found.add(kernels.Layer(module.in_features, rows, module.out_features, 0))

    for module in model.modules():
        module.register_forward_hook(note)
    model(sample, timestep)
    layers = kernels.MODELS["cifar"]
    assert len(set(layers)) == len(layers)
    assert set(layers) <= found
    missing = {dataclasses.astuple(layer)[:4] for layer in found - set(layers) if layer.kernel == 3}
    assert not missing, "every 3x3 convolution is timed"


# ---- make bench ----

SCRIPT = "import pathlib, sys; pathlib.Path(sys.argv[2]).write_text(sys.argv[1]); sys.exit({code})"


def make_bench(folder: Path, has_gpu: bool) -> subprocess.CompletedProcess[str]:
    """`make bench` with stand-ins for torch and the scripts, of which bench_broken.py fails."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    (folder / "benchmarks").mkdir()
    for name, code in (("broken", 3), ("gpu_kernels", 0), ("norm", 0), ("unet", 0)):
        (folder / "benchmarks" / f"bench_{name}.py").write_text(SCRIPT.format(code=code))
    (folder / "torch.py").write_text(f"class cuda:\n    is_available = staticmethod(lambda: {has_gpu})\n")
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = ["make", "-f", str(ROOT / "Makefile"), "-o", "build/.installed", "bench", "VENV=none"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_make_bench_runs_what_the_machine_can(tmp_path: Path) -> None:
    done = make_bench(tmp_path, has_gpu=False)
    assert "bench: without benchmarks/bench_gpu_kernels.py: torch finds no CUDA device\n" in done.stdout
    options = {path.name: path.read_text() for path in (tmp_path / "runs" / "bench").iterdir()}
    assert options == {
        "bench_broken.json": "--json",
        "bench_norm.json": "--json",
        "bench_unet.json": "--output",
    }


def test_make_bench_fails_at_the_end_where_a_script_fails(tmp_path: Path) -> None:
    done = make_bench(tmp_path, has_gpu=True)
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1] == "bench: failed: bench_broken"
    assert (tmp_path / "runs" / "bench" / "bench_gpu_kernels.json").is_file()
