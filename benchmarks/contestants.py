"""Who is timed: every contestant's name, what it needs, and how torch's and our own are built.

Where a contestant can be written to disk, it is prepared in one process (calibrated, quantized, saved) and
loaded by the one that is timed, so that neither the float original nor the quantizer counts as its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peers
import torch
import unets
from engines import Denoiser, Engine, TorchEngine, compiled, cuda_graph, example_tensors
from job import Job
from torch import nn


@dataclass(frozen=True)
class Contestant:
    """One way to run a denoiser.

    Args:
        load: builds it in the process that is timed.
        devices: where it runs.
        needs: packages it runs on, beyond torch.
        prepare: writes what `load` reads, in a process of its own.
        artifact: name of what `prepare` writes; contestants with the same one share it.
        level: of our CPU kernels, as ADPDM_CPU takes it; empty: as the environment says.
    """

    load: Callable[[Job], Engine]
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: tuple[str, ...] = ()
    prepare: Callable[[Job], None] | None = None
    artifact: str = ""
    level: str = ""

    @property
    def is_ours(self) -> bool:
        return "adpdm" in self.needs

    @property
    def is_peer(self) -> bool:
        """Whether it needs a package that this project does not need itself."""
        return not set(self.needs) <= {"adpdm", "diffusers"}


# ---- torch ----


def torch_model(job: Job, dtype: torch.dtype) -> nn.Module:
    """The original in channels_last, on the device, with positional conditioning."""
    model = unets.build(job.model, dtype).to(device=job.device, memory_format=torch.channels_last)
    return Denoiser(model, unets.find(job.model).conditioning)


def load_torch(job: Job, dtype: torch.dtype, mode: str) -> Engine:
    """Torch eager, through torch.compile, or captured in a CUDA graph."""
    call: Callable[..., torch.Tensor] = torch_model(job, dtype)
    if mode == "compile":
        call = compiled(call, job.device)
    elif mode == "graph":
        call = cuda_graph(call, example_tensors(job, dtype))
    return TorchEngine(call, dtype, job.device)


def torch_contestant(dtype: torch.dtype, mode: str, *devices: str) -> Contestant:
    """Plain torch, which needs no package."""
    return Contestant(lambda job: load_torch(job, dtype, mode), devices or ("cpu", "cuda"), ("diffusers",))


# ---- ours ----


def quantize_ours(job: Job, weight_bits: int) -> None:
    """Quantize and save, as a user would; without the search, which moves ranges but not speed."""
    import adpdm

    unet = unets.find(job.model)
    config = adpdm.QuantConfig(
        weight_bits=weight_bits,
        num_groups=min(8, unet.calibration_steps),
        grouping="dp",
        num_inference_steps=unet.calibration_steps,
        histogram_images=unet.calibration_images,
        round_size=unet.calibration_images,
        seed=unets.CALIBRATION_SEED,
    )
    model = unets.build(job.model)
    conditions = unets.conditioning(job.model, unet.calibration_images, unets.CALIBRATION_SEED)
    adpdm.quantize(model, config, scheduler=unets.scheduler(job.model), conditioning=conditions)
    model.save_pretrained(ours_folder(job, weight_bits))


def ours_folder(job: Job, weight_bits: int) -> Path:
    """Where the quantized model lies: it serves all batch sizes."""
    return job.model_folder / f"ours-w{weight_bits}a8"


def load_ours(job: Job, weight_bits: int, dtype: torch.dtype, mode: str, attention: str) -> Engine:
    """The saved integer model; `dtype` is that of what stays in float."""
    import adpdm
    from adpdm.graph import capture
    from adpdm.nn import fuse_blocks

    model = unets.class_of(job.model).from_pretrained(ours_folder(job, weight_bits), torch_dtype=dtype)
    model.to(job.device).to(memory_format=torch.channels_last)
    fuse_blocks(model, attention)
    if mode == "graph":
        capture(model)
    call = Denoiser(model.eval(), unets.find(job.model).conditioning)
    info = adpdm._native.build_info()
    return TorchEngine(call, dtype, job.device, {"instruction set": str(info["isa"])})


def ours(
    weight_bits: int,
    dtype: torch.dtype,
    mode: str = "eager",
    *devices: str,
    attention: str = "auto",
    level: str = "",
) -> Contestant:
    """A quantized contestant of this project."""
    return Contestant(
        lambda job: load_ours(job, weight_bits, dtype, mode, attention),
        devices or ("cpu", "cuda"),
        needs=("adpdm", "diffusers"),
        prepare=lambda job: quantize_ours(job, weight_bits),
        artifact=f"ours-w{weight_bits}a8",
        level=level,
    )


# ---- everybody ----


def openvino(is_int8: bool, precision: str) -> Contestant:
    """OpenVINO at a precision hint; int8 is NNCF's post-training quantization."""
    return Contestant(
        lambda job: peers.load_openvino(job, is_int8, precision),
        ("cpu",),
        needs=("openvino", "nncf") if is_int8 else ("openvino",),
        prepare=lambda job: peers.prepare_openvino(job, is_int8),
        artifact=peers.openvino_file(is_int8),
    )


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REGISTRY: dict[str, Contestant] = {
    "torch-fp32": torch_contestant(F32, "eager"),
    "torch-bf16": torch_contestant(BF16, "eager"),
    "torch-fp16": torch_contestant(F16, "eager", "cuda"),
    "torch-bf16-compile": torch_contestant(BF16, "compile"),
    "torch-bf16-graph": torch_contestant(BF16, "graph", "cuda"),
    "torch-int8-pt2e": Contestant(peers.load_pt2e, ("cpu",), needs=("torchao", "diffusers")),
    "torchao-int8-compile": Contestant(peers.load_torchao, ("cuda",), needs=("torchao", "diffusers")),
    "openvino-fp32": openvino(False, "f32"),
    "openvino-bf16": openvino(False, "bf16"),
    "openvino-int8": openvino(True, "f32"),
    "openvino-int8-bf16": openvino(True, "bf16"),
    "onnxruntime-int8": Contestant(
        peers.load_onnxruntime,
        ("cpu",),
        needs=("onnx", "onnxruntime"),
        prepare=peers.prepare_onnxruntime,
        artifact="onnxruntime-int8",
    ),
    "ours-w8a8": ours(8, F32),
    "ours-w4a8": ours(4, F32),
    "ours-w8a8-graph": ours(8, F32, "graph", "cpu"),
    "ours-w4a8-graph": ours(4, F32, "graph", "cpu"),
    "ours-w8a8-float-attention-graph": ours(8, F32, "graph", "cpu", attention="float"),
    "ours-w8a8-bf16": ours(8, BF16),
    "ours-w4a8-bf16": ours(4, BF16),
    "ours-w8a8-bf16-graph": ours(8, BF16, "graph", "cuda"),
    "ours-w4a8-bf16-graph": ours(4, BF16, "graph", "cuda"),
}
# Levels of our CPU kernels against each other; a contestant fails where the CPU lacks its level.
REGISTRY |= {
    f"ours-w{bits}a8-graph-{level}": ours(bits, F32, "graph", "cpu", level=level)
    for bits in (8, 4)
    for level in ("avx2", "avx_vnni", "avx512", "amx")
}
DEFAULT = ("torch-fp32", "torch-bf16", "ours-w8a8", "ours-w4a8")
