"""How the peers are built: PT2E, torchao, OpenVINO with NNCF, ONNX Runtime, calibrated on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import unets
from engines import Denoiser, Engine, TorchEngine, compiled, example_tensors, to_tensors
from job import Job

VNNI_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}  # any of them sums u8 x s8 products without saturating
EXTERNAL_DATA_BYTES = 1_500_000_000  # a protobuf holds 2 GB at most; with room for the graph
OPSET = 17


def needs_reduced_range() -> bool:
    """Whether 7-bit weights are advised: before VNNI, sums of u8 x s8 products saturate at 16 bits."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    return not VNNI_FLAGS & set(flags)


def range_note(is_reduced: bool) -> dict[str, str]:
    return {"weights": "7 bits, as advised for CPUs without VNNI" if is_reduced else "8 bits"}


def float_denoiser(job: Job) -> Denoiser:
    """The original in float32 on the CPU, to export."""
    return Denoiser(unets.build(job.model), unets.find(job.model).conditioning).eval()


def calibration(job: Job) -> list[unets.Arrays]:
    """The calibration inputs in batches of the job."""
    return unets.load_batches(job.calibration_file, job.batch)


def input_names(job: Job) -> list[str]:
    return ["sample", "timestep", *unets.find(job.model).conditioning]


# ---- torch's own quantizers ----


def load_pt2e(job: Job) -> Engine:
    """X86InductorQuantizer through torch.export: int8 convolutions and linear layers of oneDNN."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    reduced = needs_reduced_range()
    config = x86.get_default_x86_inductor_quantization_config(reduce_range=reduced)
    quantizer = x86.X86InductorQuantizer()
    for kind in (torch.nn.Conv2d, torch.nn.Linear):
        quantizer.set_module_type_qconfig(kind, config)
    exported = torch.export.export(float_denoiser(job), tuple(example_tensors(job))).module()
    observed = prepare_pt2e(exported, quantizer)
    for inputs in calibration(job):
        observed(*to_tensors(inputs, torch.float32, "cpu"))
    call = compiled(convert_pt2e(observed), "cpu")
    return TorchEngine(call, torch.float32, "cpu", range_note(reduced))


def load_torchao(job: Job) -> Engine:
    """torchao's dynamic int8 linear layers around bf16 convolutions, compiled."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = unets.build(job.model, torch.bfloat16).to(device=job.device, memory_format=torch.channels_last)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    call = compiled(Denoiser(model, unets.find(job.model).conditioning), job.device)
    return TorchEngine(call, torch.bfloat16, job.device, {"int8": "linear layers only"})


# ---- OpenVINO ----


def openvino_file(is_int8: bool) -> str:
    return "openvino-int8.xml" if is_int8 else "openvino-fp32.xml"


def prepare_openvino(job: Job, is_int8: bool) -> None:
    """Convert at a fixed batch; quantize with NNCF's mixed preset (asymmetric activations), which errs less.

    Denoisers under text are mostly transformer blocks, for which NNCF has a scheme of its own. Its default
    halves the range of the first convolution's weights alone, and sums of the others saturate before VNNI.
    """
    import openvino as ov

    model = ov.convert_model(float_denoiser(job), example_input=tuple(example_tensors(job)))
    data = calibration(job)
    shapes = [value.shape for value in data[0].values()]
    model.reshape({port: list(shape) for port, shape in zip(model.inputs, shapes, strict=True)})
    if is_int8:
        import nncf

        dataset = nncf.Dataset([tuple(inputs.values()) for inputs in data])
        kind = nncf.ModelType.TRANSFORMER if unets.find(job.model).conditioning else None
        fix = nncf.OverflowFix.ENABLE if needs_reduced_range() else nncf.OverflowFix.FIRST_LAYER
        options = {
            "preset": nncf.QuantizationPreset.MIXED,
            "model_type": kind,
            "advanced_parameters": nncf.AdvancedQuantizationParameters(overflow_fix=fix),
        }
        model = nncf.quantize(model, dataset, subset_size=len(data), **options)
    ov.save_model(model, job.batch_folder / openvino_file(is_int8), compress_to_fp16=False)


class OpenVinoEngine:
    """A compiled OpenVINO model with one infer request per bound input."""

    def __init__(self, model: Any, notes: dict[str, str]) -> None:
        self.model, self.notes = model, notes

    def bind(self, inputs: unets.Arrays) -> Callable[[], Any]:
        request = self.model.create_infer_request()
        named = dict(zip(self.model.inputs, inputs.values(), strict=True))
        return lambda: request.infer(named, share_inputs=True, share_outputs=True)[0]

    def fetch(self, output: Any) -> np.ndarray:
        return np.array(output, np.float32)  # a copy: the request writes into its own output again

    def synchronize(self) -> None:
        """Calls return when they are done."""


def load_openvino(job: Job, is_int8: bool, precision: str) -> Engine:
    """One stream of latency-optimised inference on the job's threads."""
    import openvino as ov

    properties = {
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,
    }
    path = job.batch_folder / openvino_file(is_int8)
    model = ov.Core().compile_model(path, "CPU", properties)
    used = model.get_property("INFERENCE_PRECISION_HINT")
    notes = range_note(needs_reduced_range()) if is_int8 else {}
    return OpenVinoEngine(model, {"float precision used": used.to_string(), **notes})


# ---- ONNX Runtime ----


def onnx_file(job: Job) -> Path:
    return job.batch_folder / "onnxruntime-int8.onnx"


def prepare_onnxruntime(job: Job) -> None:
    """Export, fold, and quantize statically: u8 activations, per-channel s8 weights, min-max ranges."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names, model = input_names(job), float_denoiser(job)
    is_large = sum(p.nbytes for p in model.parameters()) > EXTERNAL_DATA_BYTES
    exported, folded = job.batch_folder / "float.onnx", job.batch_folder / "folded.onnx"
    example = tuple(example_tensors(job))
    torch.onnx.export(
        model, example, exported, input_names=names, output_names=["y"], opset_version=OPSET, dynamo=False
    )
    quant_pre_process(exported, folded, skip_symbolic_shape=True, save_as_external_data=is_large)

    class Reader(CalibrationDataReader):
        """Hands out the calibration inputs one by one."""

        def __init__(self) -> None:
            self.left: Iterator[unets.Arrays] = iter(calibration(job))

        def get_next(self) -> unets.Arrays | None:
            return next(self.left, None)

    quantize_static(
        folded,
        onnx_file(job),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=needs_reduced_range(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        use_external_data_format=is_large,
    )


class OnnxRuntimeEngine:
    """An ONNX Runtime session."""

    def __init__(self, session: Any, notes: dict[str, str]) -> None:
        self.session, self.notes = session, notes

    def bind(self, inputs: unets.Arrays) -> Callable[[], Any]:
        return lambda: self.session.run(None, inputs)[0]

    def fetch(self, output: Any) -> np.ndarray:
        return np.asarray(output, np.float32)

    def synchronize(self) -> None:
        """Calls return when they are done."""


def load_onnxruntime(job: Job) -> Engine:
    """One session on the job's threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
    session = onnxruntime.InferenceSession(onnx_file(job), options, providers=["CPUExecutionProvider"])
    return OnnxRuntimeEngine(session, range_note(needs_reduced_range()))
