"""`quantize`: from a float pipeline or denoiser to an integer one, in place; the verb of the method."""

from __future__ import annotations

import inspect
import json
import platform
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map_only

from .calibrate import Calibration, CalibrationTrace
from .config import AttentionProducts, QuantConfig
from .correction import attach_correction, detach_correction, fit_correction
from .denoisers import find_denoiser
from .diffusers_quantizer import mark_quantized, unmark
from .equalize import Equalization, equalize, is_wanted
from .facts import asked_for, depends_on, state_tensors
from .fingerprint import fingerprint_of
from .nn import (
    Coverage,
    FusionInfo,
    LayerInfo,
    describe_fusion,
    describe_layers,
    fuse_blocks,
    quant_layers,
    swap_layers,
    to_channels_last,
    unfuse_blocks,
)
from .nn.adapters import EQUALIZED, equalized_modules
from .pipeline_checks import (
    check_conditioning,
    check_denoiser,
    check_kinds,
    check_objective,
    check_rows,
    find_scheduler,
    make_sampler,
    refuse_second_denoiser,
    trace_forward,
)
from .processes import Processes, joined
from .progress import Progress, silent
from .step import StepState, attach_step_hook, detach_step_hook
from .trajectory import Conditioning, DenoiserCall, Guidance, Sampler


@dataclass
class QuantizationReport:
    """What was quantized, how calibration went, and what it cost."""

    config: QuantConfig
    layers: list[LayerInfo]
    coverage: Coverage
    trace: CalibrationTrace
    timesteps: list[float]  # calibrated, noisiest first
    fusion: list[FusionInfo]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "config": self.config.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "coverage": dict(self.coverage.__dict__),
            "trace": self.trace.to_dict(),
            "timesteps": self.timesteps,
            "fusion": [info.to_dict() for info in self.fusion],
            "machine": platform.machine(),
            "torch": torch.__version__,
        }


def quantize(
    pipe_or_denoiser: Any,
    config: QuantConfig | None = None,
    *,
    scheduler: Any = None,
    conditioning: Conditioning | None = None,
    call: DenoiserCall | None = None,
    prompts: Sequence[str] | str | None = None,
    null_conditioning: Conditioning | None = None,
    progress: Progress = silent,
    state_file: Path | str | None = None,
) -> QuantizationReport:
    """Quantize a trained diffusion model by ADP-DM, in place, from nothing but the model itself.

    Where torch.distributed is initialised, all of its processes call this with the same arguments and share
    the work (docs/quantize.md). Each ends with the same model, that of one process, bit for bit.

    Args:
        pipe_or_denoiser: diffusers pipeline, or its U-Net or transformer, in float32 on the CPU or on one
            CUDA device, where it is calibrated. Noise depends on the seed alone.
        config: bits, groups and search; see QuantConfig.
        scheduler: to calibrate with; needed for a bare denoiser, otherwise the pipeline's own.
        conditioning: tensors [N, ...] by argument name of the denoiser, e.g. encoder_hidden_states [N, L, D],
            or dicts of them, e.g. added_cond_kwargs; image i is generated under entry i modulo N.
        call: what else the denoiser is given, where it takes more than images, timestep and conditioning.
        prompts: texts, or one, to encode with the pipeline instead.
        null_conditioning: tensors [1, ...] that stand for no condition, under `config.guidance_scale`; known
            for prompts (the empty text) and for transformers with a class for none.
        progress: called with (phase, done, total).
        state_file: the search saves itself here after every round and resumes from it; of several processes
            the first does.

    Returns: what was done; the model now samples with integer kernels.

    Raises:
        ValueError, TypeError: before anything is changed, for input that cannot work. On any error or
            interrupt the model is put back as it was.
        OtherProcessFailed: a RuntimeError, with what another process failed with.
    """
    config = QuantConfig() if config is None else config
    with joined() as processes:
        sampler = calibration_sampler(
            pipe_or_denoiser,
            config,
            scheduler=scheduler,
            conditioning=conditioning,
            call=call,
            prompts=prompts,
            null_conditioning=null_conditioning,
        )
        return quantize_denoiser(sampler, config, progress, state_file, processes)


def calibration_sampler(
    pipe_or_denoiser: Any,
    config: QuantConfig,
    *,
    scheduler: Any = None,
    conditioning: Conditioning | None = None,
    call: DenoiserCall | None = None,
    prompts: Sequence[str] | str | None = None,
    null_conditioning: Conditioning | None = None,
) -> Sampler:
    """What `quantize` calibrates with, its arguments checked; nothing is changed or run but text encoders."""
    check_kinds(config, call, conditioning, null_conditioning, scheduler)
    denoiser = find_denoiser(pipe_or_denoiser)
    check_denoiser(denoiser)
    refuse_second_denoiser(pipe_or_denoiser, denoiser)
    scheduler = find_scheduler(pipe_or_denoiser, scheduler)
    if prompts is not None:
        text, empty = _encoded(pipe_or_denoiser, prompts)
        if config.guidance_scale == 1 and not conditioning:
            text = torch.cat([empty, text])  # guidance will ask for it
        elif not conditioning and null_conditioning is None:
            null_conditioning = {"encoder_hidden_states": empty}
        conditioning = {**(conditioning or {}), "encoder_hidden_states": text}
    conditioning, null_conditioning = _with_gradients(conditioning), _with_gradients(null_conditioning)
    check_conditioning(denoiser, conditioning)
    check_rows(denoiser, "null_conditioning", null_conditioning or {})
    check_objective(scheduler, config)
    guidance = _guidance(denoiser, config.guidance_scale, conditioning or {}, null_conditioning)
    shape = call.sample_shape if call and call.sample_shape else _sample_shape(denoiser)
    return make_sampler(denoiser, scheduler, shape, config.num_inference_steps, conditioning, call, guidance)


def quantize_denoiser(
    sampler: Sampler,
    config: QuantConfig,
    progress: Progress,
    state_file: Path | str | None,
    processes: Processes,
) -> QuantizationReport:
    """`quantize` for what calibrates a denoiser, and the processes that share the work."""
    denoiser, processes.device = sampler.denoiser, sampler.device
    if processes.size > 1:
        processes.agree("quantize", depends_on(sampler, config))
    before = _Before(denoiser)
    try:
        # Whatever the caller is in.
        with torch.inference_mode(False), torch.enable_grad(), _no_autocast(sampler.device.type):
            report = _quantize(sampler, config, progress, state_file, processes)
        if processes.size > 1:
            processes.agree("quantize", {"result": fingerprint_of(state_tensors(denoiser))})
    except BaseException:
        before.restore(denoiser)
        raise
    return report


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Products in the dtype of their operands; nothing where a device has no autocast, as meta."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _quantize(
    sampler: Sampler,
    config: QuantConfig,
    progress: Progress,
    state_file: Path | str | None,
    processes: Processes,
) -> QuantizationReport:
    denoiser = sampler.denoiser
    denoiser.eval().requires_grad_(False)
    path = Path(state_file) if state_file is not None and config.searches else None
    fingerprint = "" if path is None else json.dumps(asked_for(sampler, config))  # before anything is changed
    layers = describe_layers(denoiser, config, lambda: trace_forward(sampler))
    marked = equalized_modules(denoiser)  # by an earlier quantization, before `dequantize`
    equalized = _equalize(sampler, layers, config, progress)
    num_groups = config.groups_per_layer(len(sampler.timesteps))

    def make_step(num_slots: int) -> StepState:
        state = StepState(num_slots, len(sampler.timesteps), config.timestep_policy, sampler.device)
        state.set_timesteps(sampler.timesteps)
        return state

    to_channels_last(denoiser)
    step = swap_layers(denoiser, layers, num_groups, make_step)
    attach_step_hook(denoiser)
    quant = quant_layers(denoiser)
    macs = {x.name: x.macs for x in layers}
    calibration = Calibration(sampler, quant, macs, config, progress, path, processes, fingerprint)
    trace = calibration.run()
    if equalized.seconds:
        trace.seconds = {"equalization": equalized.seconds, **trace.seconds}
    trace.equalization = equalized.spread
    trace.warnings += [equalized.warning] if equalized.warning else []
    layers = [replace(x, bits=quant[x.name].bits) if x.name in quant else x for x in layers]
    freeze(denoiser, config.attention)
    if config.correct_prediction:
        _correct_predictions(step, calibration)
    timesteps = [float(t) for t in sampler.timesteps]
    fusion = describe_fusion(denoiser)
    mark_quantized(denoiser, config, layers, [*dict.fromkeys([*equalized.changed, *marked])])
    return QuantizationReport(config, layers, Coverage.of(layers), trace, timesteps, fusion)


def _correct_predictions(step: StepState, calibration: Calibration) -> None:
    """Fit the correction to the model as it will run, in integers; attach it if it pays at any step."""
    start, sampler, trace = time.perf_counter(), calibration.sampler, calibration.trace

    def watch(done: int, total: int) -> None:
        calibration.progress("correction", done, total)

    found = fit_correction(sampler, calibration.replay.trajectory, watch, calibration.processes)
    if min(found.energy_left) < 1:
        step.set_correction(found.weights)
        attach_correction(sampler.denoiser)
    trace.correction = {"weights": found.weights.tolist(), "energy_left": found.energy_left}
    trace.seconds["correction"] = time.perf_counter() - start


def _equalize(
    sampler: Sampler, layers: list[LayerInfo], config: QuantConfig, progress: Progress
) -> Equalization:
    """Even out the inputs of the layers that become integer, where the config wants it."""
    if not is_wanted(config):
        return Equalization()
    chosen = {layer.name for layer in layers if layer.bits is not None}
    return equalize(sampler, chosen, config, lambda: trace_forward(sampler), progress)


class _Before:
    """What `quantize` changes of a denoiser, to put it back after an error or interrupt."""

    def __init__(self, denoiser: nn.Module) -> None:
        modules = dict(denoiser.named_modules())
        self.layers = {n: m for n, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)}
        self.training = [(m, m.training) for m in modules.values()]
        self.equalized = {m for m in modules.values() if hasattr(m, EQUALIZED)}
        self.parameters = [
            (module, name, p, p.requires_grad, p.stride())
            for module in modules.values()
            for name, p in module.named_parameters(recurse=False)
        ]

    def restore(self, denoiser: nn.Module) -> None:
        """Put the float layers back, in the memory format they had: another one rounds differently."""
        unfuse_blocks(denoiser)
        for name, layer in self.layers.items():
            parent, _, child = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, layer)
        for module, training in self.training:
            module.training = training
        for module, name, parameter, requires_grad, stride in self.parameters:
            setattr(module, name, parameter)  # equalization has put others in
            parameter.requires_grad_(requires_grad)
            if parameter.stride() != stride:
                before = parameter.data.new_empty_strided(parameter.shape, stride)
                parameter.data = before.copy_(parameter.data)
        detach_correction(denoiser)
        detach_step_hook(denoiser)
        if hasattr(denoiser, "adpdm_step"):
            del denoiser.adpdm_step
        for module in denoiser.modules():
            if module not in self.equalized:
                module.__dict__.pop(EQUALIZED, None)
        unmark(denoiser)


def freeze(denoiser: nn.Module, attention: AttentionProducts = "auto") -> None:
    """Pack the weights of all layers; from here on they run in integers, and known blocks fused."""
    for layer in quant_layers(denoiser).values():
        layer.freeze()
    fuse_blocks(denoiser, attention)


def _sample_shape(denoiser: nn.Module) -> tuple[int, int, int]:
    config: Any = denoiser.config
    size = getattr(config, "sample_size", None)
    if size is None:
        raise ValueError(
            f"quantize: {type(denoiser).__name__}.config.sample_size must be set, got None; "
            "or say call=DenoiserCall(sample_shape=...)"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(config.in_channels), int(height), int(width)


def _encoded(pipe: Any, prompts: Sequence[str] | str) -> tuple[Tensor, Tensor]:
    """Text embeddings of prompts [N, L, D], and of the empty one [1, L, D], which stands for none."""
    if isinstance(prompts, str):
        prompts = [prompts]  # as pipelines take one
    if not prompts:
        raise ValueError("quantize: prompts must hold at least one text, got none")
    encoded = encode_texts("quantize", pipe, ["", *prompts])
    return encoded[1:], encoded[:1]


def _guidance(
    denoiser: nn.Module, scale: float, conditioning: Conditioning, null: Conditioning | None
) -> Guidance | None:
    """What images of the calibration are guided by; None where they are not."""
    if scale == 1:
        if null is not None:
            raise ValueError(
                "quantize: null_conditioning is for guidance: wanted config.guidance_scale, got 1 (none)"
            )
        return None
    classes = getattr(getattr(denoiser, "config", None), "num_embeds_ada_norm", None)
    if null is None and set(conditioning) == {"class_labels"} and classes is not None:
        null = {"class_labels": torch.tensor([classes], device="cpu")}
    wanted = _row_shapes(conditioning)
    if null is None or not wanted:
        raise ValueError(
            f"quantize: guidance_scale={scale:g} needs prompts, class labels of a transformer with a class "
            "for none, or conditioning and null_conditioning; got "
            f"{sorted(conditioning) or 'no conditioning'}"
        )
    if _row_shapes(null) != wanted or any(len(x) != 1 for x in tree_leaves(null)):
        raise ValueError(
            f"quantize: null_conditioning must have one row of {wanted}, as the conditioning; got "
            f"{ {keystr(path): tuple(x.shape) for path, x in tree_flatten_with_path(null)[0]} }"
        )
    return Guidance(scale, null)


def _row_shapes(conditioning: Conditioning) -> dict[str, tuple[int, ...]]:
    """The shape of a row of every tensor, by its path."""
    return {keystr(path): tuple(x.shape[1:]) for path, x in tree_flatten_with_path(conditioning)[0]}


def encode_texts(verb: str, pipe: Any, texts: Sequence[str]) -> Tensor:
    """Embeddings [N, L, D] f32 of texts by a pipeline's own encoder, on the denoiser's device.

    Raises:
        TypeError: for pipelines whose `encode_prompt` is not that of Stable Diffusion 1 and 2.
    """
    if isinstance(pipe, nn.Module) or not hasattr(pipe, "encode_prompt"):
        raise TypeError(f"{verb}: prompts need a pipeline with encode_prompt, got {type(pipe).__name__}")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{verb}: prompts must be a list of texts, got {texts!r:.60}")
    takes = list(inspect.signature(pipe.encode_prompt).parameters)
    wanted = ["prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance"]
    if takes[:4] != wanted:
        raise TypeError(
            f"{verb}: prompts need an encode_prompt that takes {wanted}, as of Stable Diffusion 1 and 2; "
            f"that of {type(pipe).__name__} takes {takes[:4]}: encode them and pass conditioning"
        )
    with torch.no_grad():
        embeddings: Tensor = pipe.encode_prompt(list(texts), find_denoiser(pipe).device, 1, False)[0]
    return embeddings.float()


def _with_gradients(conditioning: Conditioning | None) -> Conditioning | None:
    """The same, with copies of tensors from inference mode, which the search could not use."""
    with torch.inference_mode(False):
        copied: Conditioning | None = tree_map_only(
            Tensor, lambda x: x.clone() if x.is_inference() else x, conditioning
        )
    return copied
