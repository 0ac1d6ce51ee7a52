"""What `adpdm doctor` finds: the kernels in use here and why not faster ones, threads, a model's layers.

Reads what the extension, torch, Linux and a saved model say; runs nothing and measures nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from . import _native
from .config import QuantConfig
from .denoisers import find_denoiser, load_pipeline
from .info import gather_info
from .layer_runs import read_record, work_shares
from .nn import FusionInfo, LoadedLayer, QuantLayer, block_around, describe_fusion, summarize_fusion, swap

REPORT_NAME = "adpdm_report.json"  # what `adpdm quantize` leaves beside the model

# What a level of kernels needs, by the names of /proc/cpuinfo, fastest first; isa.cpp decides by the same.
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
LEVELS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512, "amx_tile", "amx_int8"),
    "avx512": _AVX512,
    "avx_vnni": (*_AVX2, "avx_vnni"),
    "avx2": _AVX2,
    "portable": (),
}

# They encode the one instruction of AVX-VNNI that kernels use, too, in 256 bits.
_EVEX_VNNI = {"avx512_vnni", "avx512vl"}

# The integer kernels compute whole tiles (csrc/core/igemm.h): outputs of one group, by input channels.
TILE_OUTPUTS, TILE_CHANNELS, TILE_CHANNELS_NIBBLES = 16, 4, 8
NIBBLE_BITS = 4  # weights of so many bits are stored two to a byte
WELL_FILLED = 0.66  # a layer that wastes more than a third of its products is named

Runs = Literal["fused", "per layer", "float"]
NOT_QUANTIZED = "the model is not quantized"


@dataclass(frozen=True)
class Level:
    """One level of CPU kernels on this machine."""

    name: str
    state: Literal["used", "available", "unavailable"]
    reason: str  # why it is not used; empty for the one that is


@dataclass(frozen=True)
class Advice:
    """Something that is slow or wrong, and what to do about it."""

    what: str
    do: str


@dataclass(frozen=True)
class LayerState:
    """How one convolution or linear layer of a model runs, and why not faster."""

    name: str
    shape: str
    runs: Runs
    reason: str  # why not fused, or why float; empty when fused
    bits: tuple[int, int] | None  # weight, activation
    filled: float | None  # share of the products of its tiles that are its own; None in float
    macs: float | None  # share of the model's multiply-accumulates, where the model's report tells


@dataclass(frozen=True)
class ModelState:
    """The layers of a saved model."""

    path: str
    denoiser: str
    fusion: str
    layers: list[LayerState]


@dataclass(frozen=True)
class Diagnosis:
    """All that was found."""

    facts: dict[str, str]
    kernels: list[Level]
    threads: dict[str, int | str | None]
    model: ModelState | None
    advice: list[Advice]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def diagnose(model: Path | str | None = None) -> Diagnosis:
    """Gather everything.

    Args:
        model: folder of a saved pipeline, quantized or not.

    Raises:
        ValueError, OSError: the folder does not hold a model that can be loaded.
    """
    build = _native.build_info()
    kernels = cpu_levels(build["isa"], build["cpu_features"], build["isa_obstacles"], os.environ)
    threads = thread_facts(os.environ)
    advice = [*_kernel_advice(kernels, build["cpu_features"]), *thread_advice(threads)]
    devices = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    advice += cuda_advice(build["cuda_archs"], devices, torch.version.cuda)
    state = None if model is None else model_state(Path(model))
    if state is not None:
        advice += model_advice(state)
    return Diagnosis(gather_info(), kernels, threads, state, advice)


# ---- kernels -----------------------------------------------------------------------------------------------


def cpu_levels(
    active: str, features: Sequence[str], obstacles: Mapping[str, str], environment: Mapping[str, str]
) -> list[Level]:
    """Every level of CPU kernels, fastest first, and why it is or is not used.

    Args:
        active: the level in use.
        features: of the CPU, as the extension found them.
        obstacles: why levels cannot be used though the CPU has their features, by name; empty where they can.
        environment: ADPDM_CPU is read from it.
    """
    levels, below = [], False
    usable = {*features, *(("avx_vnni",) if set(features) >= _EVEX_VNNI else ())}
    for name, needs in LEVELS.items():
        missing = [feature for feature in needs if feature not in usable]
        if name == active:
            levels.append(Level(name, "used", ""))
            below = True
        elif missing:
            present = [f for f in needs if f in features and f not in _AVX2] if name != "avx2" else []
            beside = f", though it has {', '.join(present)}" if present else ""
            levels.append(Level(name, "unavailable", f"the CPU lacks {', '.join(missing)}{beside}"))
        elif obstacles.get(name):
            levels.append(Level(name, "unavailable", obstacles[name]))
        elif below:
            levels.append(Level(name, "available", f"{active} is faster"))
        elif "ADPDM_CPU" in environment:
            levels.append(Level(name, "available", f"ADPDM_CPU={environment['ADPDM_CPU']} asks for {active}"))
        else:
            levels.append(Level(name, "available", f"only on request: set ADPDM_CPU={name}"))
    return levels


def _kernel_advice(kernels: Sequence[Level], features: Sequence[str]) -> list[Advice]:
    advice = []
    for level in kernels:
        if level.state == "used":
            break
        if level.state == "available" and level.name == "amx":
            do = "set ADPDM_CPU=amx and compare; these kernels have run under emulation only so far"
            advice.append(Advice("this CPU has AMX tiles, which are not used unless asked for", do))
        elif level.state == "available":
            do = "unset ADPDM_CPU"
            advice.append(Advice(f"kernels for {level.name} would run here: {level.reason}", do))
            break
        elif level.name == "avx512" and "avx512f" in features:
            do = "nothing: without vpdpbusd the AVX2 kernels are the ones that run"
            advice.append(Advice(f"AVX-512 is present but not enough of it: {level.reason}", do))
        elif level.name == "avx_vnni" and "avx_vnni" in features:
            do = "build with GCC 11 and binutils 2.36, or later ones"
            advice.append(Advice(f"this CPU's AVX-VNNI is not used: {level.reason}", do))
    if kernels[-1].state == "used" and "avx2" not in features:
        do = "expect the speed of plain C++, or use a machine with AVX2 or AVX-512 VNNI"
        advice.append(Advice("no vector instructions that adpdm has kernels for", do))
    return advice


# ---- CUDA --------------------------------------------------------------------------------------------------


def covers(entry: str, capability: tuple[int, int]) -> Literal["code", "ptx", ""]:
    """How one architecture of the build, e.g. 80-real, serves a device: machine code, PTX, or not at all."""
    name, _, kind = entry.partition("-")
    number, wanted = int(name.rstrip("a")), 10 * capability[0] + capability[1]
    if name.endswith("a"):
        return "code" if number == wanted else ""
    if number > wanted:
        return ""
    if kind != "virtual" and number // 10 == capability[0]:
        return "code"
    return "ptx" if kind != "real" else ""


def cuda_advice(archs: str, devices: Sequence[tuple[int, int]], torch_cuda: str | None) -> list[Advice]:
    """What stands between the devices of this machine and the CUDA kernels.

    Args:
        archs: that the extension was built for, separated by semicolons; empty without CUDA.
        devices: compute capability of every device that torch sees.
        torch_cuda: version of CUDA that torch was built with, None for a CPU build.
    """
    advice = []
    for index, capability in enumerate(devices):
        name = f"CUDA device {index} (sm_{capability[0]}{capability[1]})"
        how = {covers(entry, capability) for entry in archs.split(";") if entry}
        mend = f"build with nvcc on PATH and ADPDM_CUDA_ARCHS={capability[0]}{capability[1]}-real"
        if not archs:
            advice.append(Advice(f"{name} is not used: the extension was built without CUDA", mend))
        elif not how - {""}:
            advice.append(Advice(f"{name} has no kernels: the build is for {archs}", mend))
        elif "code" not in how:
            what = f"{name} has kernels as PTX only, which the driver compiles at their first use"
            advice.append(Advice(what, mend))
        elif capability == (9, 0) and not any(entry.startswith("90a") for entry in archs.split(";")):
            what = f"{name} runs without wgmma: the build is for {archs}"
            advice.append(Advice(what, "build with ADPDM_CUDA_ARCHS=90a-real"))
    if archs and not devices and torch_cuda is None and Path("/dev/nvidia0").exists():
        what = "there is an NVIDIA device, but this torch is a CPU build"
        advice.append(Advice(what, "install a CUDA build of torch, then adpdm again"))
    return advice


# ---- threads -----------------------------------------------------------------------------------------------


def thread_facts(environment: Mapping[str, str]) -> dict[str, int | str | None]:
    """Threads that are set, and CPUs that this process may use."""
    return {
        "torch_threads": torch.get_num_threads(),
        "kernel_threads": _native.worker_threads(),
        "logical_cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)),
        "cpu_quota": _cpu_quota(Path("/sys/fs/cgroup/cpu.max")),
        "load_average": f"{os.getloadavg()[0]:.2f}",
        **{name: environment.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
    }


def _cpu_quota(path: Path) -> str | None:
    """CPUs' worth of time that a control group may use, as a decimal; None where there is no limit."""
    if not path.is_file():
        return None
    quota, _, period = path.read_text().strip().partition(" ")
    return None if quota == "max" else f"{int(quota) / int(period):.2f}"


def thread_advice(facts: Mapping[str, int | str | None]) -> list[Advice]:
    """Whether more threads run than there are CPUs, or fewer than could."""
    threads = int(facts["torch_threads"] or 1)
    usable = int(facts["usable_cpus"] or 1)
    quota = facts["cpu_quota"]
    limit = usable if quota is None else max(1, min(usable, int(float(quota))))
    advice = []
    if threads > limit:
        setting = facts["OMP_NUM_THREADS"] or "not set"
        what = f"{threads} threads share {limit} CPUs (OMP_NUM_THREADS is {setting})"
        do = f"set OMP_NUM_THREADS={limit} or torch.set_num_threads({limit}): waiting threads spin"
        advice.append(Advice(what, do))
    elif threads < limit:
        what = f"{threads} of {limit} usable CPUs work for one call"
        do = f"for latency torch.set_num_threads({limit}); for throughput run {limit // threads} processes"
        advice.append(Advice(what, do))
    load = float(facts["load_average"] or 0)
    if load - 1 > max(0, usable - threads):  # 1: this process
        what = f"the load average is {load:.1f} on {usable} CPUs: others are at work here"
        advice.append(Advice(what, "measure on an idle machine, or compare interleaved runs only"))
    return advice


# ---- a model -----------------------------------------------------------------------------------------------


def model_state(folder: Path) -> ModelState:
    """How every convolution and linear layer of a saved model runs."""
    if not folder.is_dir():
        raise ValueError(f"doctor: wanted the folder of a saved pipeline, got {folder}, which is none")
    denoiser = find_denoiser(load_pipeline(folder, local_files_only=True))
    fusion = describe_fusion(denoiser)
    stored = folder / REPORT_NAME
    record = read_record(stored) if stored.is_file() else {"layers": []}
    work = work_shares(record)
    reasons = {row["name"]: row["reason"] for row in record["layers"] if row["bits"] is None}
    layers = [
        _layer_state(name, module, fusion, denoiser, work.get(name), reasons.get(name, ""))
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    return ModelState(str(folder), type(denoiser).__name__, summarize_fusion(fusion), layers)


def _layer_state(
    name: str,
    layer: nn.Conv2d | nn.Linear,
    fusion: Sequence[FusionInfo],
    denoiser: Any,
    macs: float | None,
    recorded: str,
) -> LayerState:
    """Of one layer; `recorded` is why it stayed float, where the model's record tells."""
    shape = _shape_of(layer)
    if isinstance(layer, LoadedLayer):
        return _loaded_state(name, layer, shape, macs)
    if not isinstance(layer, QuantLayer):
        reason = _why_float(name, layer, denoiser, recorded)
        return LayerState(name, shape, "float", reason, None, None, macs)
    block = block_around(name, fusion)
    runs: Runs = "fused" if block.fused else "per layer"
    reason = "" if block.fused else f"{block.label}: {block.reason}"
    return LayerState(name, shape, runs, reason, layer.bits, tile_share(layer), macs)


def _loaded_state(name: str, layer: LoadedLayer, shape: str, macs: float | None) -> LayerState:
    """A layer that was quantized while it was loaded."""
    weight_bits = layer.weight_quantizer.num_bits
    if layer.activation_bits is None:
        reason = f"its {weight_bits}-bit weight becomes float at every call, as AdpdmConfig says"
        return LayerState(name, shape, "float", reason, None, None, macs)
    reason = "quantized while loading: its range is measured at every call"
    return LayerState(name, shape, "per layer", reason, (weight_bits, layer.activation_bits), None, macs)


def _shape_of(layer: nn.Conv2d | nn.Linear) -> str:
    if isinstance(layer, nn.Linear):
        rotates = isinstance(layer, QuantLayer) and layer.hadamard > 0
        return f"linear {layer.in_features}->{layer.out_features}{', channels rotated' if rotates else ''}"
    height, width = layer.kernel_size
    groups = "" if layer.groups == 1 else f", {layer.groups} groups"
    return f"conv {height}x{width} {layer.in_channels}->{layer.out_channels}{groups}"


def _why_float(name: str, layer: nn.Conv2d | nn.Linear, denoiser: Any, recorded: str) -> str:
    settings = getattr(denoiser.config, "quantization_config", None)
    if settings is None:
        return NOT_QUANTIZED
    if not settings.is_calibrated:
        return "AdpdmConfig left it out"
    if recorded:  # by who saw a forward pass, and layers that a saved model may not show as they were
        return recorded
    config = QuantConfig.from_dict(settings.quant_config)
    return swap.reason_to_keep(name, layer, config, runs=False)


def tile_share(layer: QuantLayer) -> float:
    """Share of the products in the tiles of an integer layer that are its own; the rest multiplies zeros."""
    outputs, inputs = layer.weight_shape[0] // layer.groups, layer.weight_shape[1]
    if layer.groups > 1 and outputs == inputs == 1:  # depthwise: a channel in each lane
        return layer.groups / (-(-layer.groups // TILE_OUTPUTS) * TILE_OUTPUTS)
    parts = [inputs]
    if (split := layer.weight_quantizer.split) is not None:
        parts = [split, inputs - split]
    step = TILE_CHANNELS_NIBBLES if layer.bits[0] <= NIBBLE_BITS else TILE_CHANNELS
    computed = sum(-(-part // step) * step for part in parts)
    return float(outputs * inputs / (-(-outputs // TILE_OUTPUTS) * TILE_OUTPUTS * computed))


def model_advice(model: ModelState) -> list[Advice]:
    """What is slow in a model and what to do, the largest share of the work first where it is known."""
    if all(layer.reason == NOT_QUANTIZED for layer in model.layers):
        do = f"adpdm quantize {model.path} --out DIR --bits w8a8"
        return [Advice("the model is not quantized: every layer runs in float", do)]
    advice = []
    for layer in sorted(model.layers, key=lambda x: -(x.macs or 0)):
        work = "" if layer.macs is None else f", {layer.macs:.1%} of the work"
        if layer.filled is not None and layer.filled < WELL_FILLED:
            what = f"{layer.name} ({layer.shape}{work}) fills {layer.filled:.1%} of its tiles"
            do = f"compare with it in float: adpdm quantize --exclude '{layer.name}'"
            advice.append(Advice(what, do))
        elif layer.runs == "float" and (layer.macs or 0) >= 0.05:
            what = f"{layer.name} ({layer.shape}{work}) runs in float: {layer.reason}"
            advice.append(Advice(what, "quantize it too, unless it was left out for its accuracy"))
    slow = sorted({layer.reason for layer in model.layers if layer.runs == "per layer"})
    return advice + [Advice(f"runs one layer after the other: {reason}", _mend(reason)) for reason in slow]


# Clauses of the reasons of adpdm.nn.describe_fusion that the user can do something about.
_MENDS = {
    "measured at every call": "calibrate with adpdm.quantize: static ranges let blocks run fused",
    "is not quantized": "quantize that layer too: a block runs fused as a whole or not at all",
    "reads two segments": "quantize with split_skip_connections=False and compare",
}


def _mend(reason: str) -> str:
    found = (do for clause, do in _MENDS.items() if clause in reason)
    return next(found, "nothing to set: only the blocks that adpdm knows run fused")


# ---- text --------------------------------------------------------------------------------------------------


def render(diagnosis: Diagnosis) -> str:
    """The diagnosis as text: facts, kernels, threads, layers, advice."""
    rows: dict[str, list[tuple[str, str]]] = {
        "machine and build": list(diagnosis.facts.items()),
        "CPU kernels": [(k.name, f"{k.state}{k.reason and f': {k.reason}'}") for k in diagnosis.kernels],
        "threads": [(k, "not set" if v is None else str(v)) for k, v in diagnosis.threads.items()],
    }
    if (model := diagnosis.model) is not None:
        rows[f"layers of {model.path} ({model.denoiser})"] = [(x.name, _layer_text(x)) for x in model.layers]
        rows["fused"] = [("blocks", model.fusion)]
    rows["what to do"] = [(a.what, f"-> {a.do}") for a in diagnosis.advice] or [("nothing", "")]
    lines = []
    for title, entries in rows.items():
        width = max(len(label) for label, _ in entries)
        separator = "\n    " if title == "what to do" else "  "
        pad = 0 if title == "what to do" else width
        lines += [title, *(f"  {label:<{pad}}{separator}{text}".rstrip() for label, text in entries), ""]
    return "\n".join(lines).rstrip()


def _layer_text(layer: LayerState) -> str:
    parts = [
        layer.shape,
        layer.runs if layer.bits is None else f"W{layer.bits[0]}A{layer.bits[1]} {layer.runs}",
    ]
    if layer.macs is not None:
        parts.append(f"{layer.macs:.1%} of the work")
    if layer.filled is not None and layer.filled < WELL_FILLED:
        parts.append(f"{layer.filled:.1%} of its tiles")
    return ", ".join(parts) + (f": {layer.reason}" if layer.reason else "")
