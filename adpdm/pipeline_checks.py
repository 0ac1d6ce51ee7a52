"""What `quantize` refuses before it changes anything: arguments, denoisers, conditions that do not fit."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from .config import QuantConfig
from .nn import CodedLayer, refuse_adapters
from .trajectory import Conditioning, DenoiserCall, Sampler

CALIBRATION_DEVICES = ("cpu", "cuda")
MAX_SEED = 2**39 - 1  # times the largest stride between streams, 15 485 863, it leaves room in 63 bits


def check_kinds(
    config: object, call: object, conditioning: object, null_conditioning: object, scheduler: object
) -> None:
    """Refuse arguments of another class, and seeds that others cannot be made of.

    Raises:
        TypeError: names the class that is wanted, and what came.
        ValueError: for such seeds.
    """
    if not isinstance(config, QuantConfig):
        hint = {
            "AdpdmConfig": "; that one is for from_pretrained(quantization_config=...)",
            "dict": "; make one by QuantConfig.from_dict",
        }.get(type(config).__name__, "")
        raise TypeError(f"quantize: config must be a QuantConfig, got {_kind(config)}{hint}")
    if not 0 <= config.seed <= MAX_SEED:
        raise ValueError(f"quantize: seed must be in [0, {MAX_SEED}], got {config.seed}")
    if call is not None and not isinstance(call, DenoiserCall):
        raise TypeError(f"quantize: call must be a DenoiserCall, got {_kind(call)}")
    for name, given in (("conditioning", conditioning), ("null_conditioning", null_conditioning)):
        if given is not None and not isinstance(given, dict):
            raise TypeError(
                f"quantize: {name} must be a dict of tensors by argument name of the denoiser, e.g. "
                f"{{'encoder_hidden_states': [N, L, D]}}; got {_kind(given)}"
            )
    if isinstance(scheduler, type):
        raise TypeError(
            f"quantize: wanted a diffusers scheduler, got the class {scheduler.__name__} itself; make one, "
            f"e.g. {scheduler.__name__}.from_pretrained(folder, subfolder='scheduler')"
        )


def _kind(value: object) -> str:
    return f"the class {value.__name__} itself" if isinstance(value, type) else type(value).__name__


def check_denoiser(denoiser: nn.Module) -> None:
    """Refuse a denoiser that cannot be calibrated as it is: quantized, captured, in another dtype."""
    by_others = getattr(denoiser, "is_quantized", False)  # as diffusers marks what any library has quantized
    if by_others or any(isinstance(m, CodedLayer) for m in denoiser.modules()):
        raise ValueError(f"quantize: {type(denoiser).__name__} is quantized already; load the original again")
    if getattr(denoiser.__dict__.get("forward"), "is_capture", False):  # of graph.py, in a later layer
        name = type(denoiser).__name__
        raise ValueError(f"quantize: {name} is captured; call adpdm.graph.release() on it first")
    if not isinstance(denoiser, ModelMixin):
        raise TypeError(f"quantize: wanted a diffusers model, got {type(denoiser).__name__}")
    refuse_adapters("quantize", denoiser)
    for name, module in denoiser.named_modules():
        if getattr(module, "fused_projections", False):
            # Attention of U-Nets keeps the fused layers when it is unfused.
            can_unfuse = hasattr(module, "unfuse_projections")
            raise ValueError(
                "quantize: wanted separate projections of queries, keys and values, got fused ones in "
                f"{name}, which could not be loaded from a file; "
                + ("call unfuse_qkv_projections() first" if can_unfuse else "load the original again")
            )
    device = next(denoiser.parameters()).device
    for name, parameter in denoiser.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                "quantize: wanted parameters that were made outside of torch.inference_mode, got "
                f"{name}; load the model outside of it"
            )
        if parameter.dtype != torch.float32 or parameter.device.type not in CALIBRATION_DEVICES:
            raise ValueError(
                f"quantize: wanted float32 parameters on the CPU or on CUDA to calibrate, got {name} as "
                f"{parameter.dtype} on {parameter.device}; load with torch_dtype=torch.float32"
            )
        if parameter.device != device:
            raise ValueError(
                f"quantize: wanted all parameters on one device to calibrate, got {device} and {name} on "
                f"{parameter.device}; load without device_map"
            )


def find_scheduler(pipe_or_denoiser: Any, scheduler: Any) -> Any:
    """The scheduler that is given, or else the pipeline's own.

    Raises:
        ValueError: there is none.
        TypeError: for something else than a scheduler of diffusers.
    """
    found = scheduler if scheduler is not None else getattr(pipe_or_denoiser, "scheduler", None)
    if found is None:
        raise ValueError(
            "quantize: a bare denoiser needs scheduler=..., the sampler it will be used with; got None"
        )
    for name in ("set_timesteps()", "step()", "config"):
        if not hasattr(found, name.rstrip("()")):
            raise TypeError(f"quantize: wanted a diffusers scheduler with {name}, got {_kind(found)}")
    return found


def check_objective(scheduler: Any, config: QuantConfig) -> None:
    """Refuse the paper's objective for denoisers that predict something else than the noise."""
    prediction = getattr(scheduler.config, "prediction_type", "velocity of a flow")
    if config.search.objective == "noise" and prediction != "epsilon":
        raise ValueError(
            "quantize: search.objective 'noise' needs a denoiser that predicts the noise; that of "
            f"{type(scheduler).__name__} predicts: {prediction}; use 'teacher'"
        )


def check_conditioning(denoiser: nn.Module, conditioning: Conditioning | None) -> None:
    """Refuse conditions without the text that the denoiser needs, and those of `check_rows`."""
    config: Any = denoiser.config
    wants_text = getattr(config, "cross_attention_dim", None) is not None
    given = set(conditioning or {})
    if wants_text and "encoder_hidden_states" not in given:
        raise ValueError(
            f"quantize: {type(denoiser).__name__} needs conditioning={{'encoder_hidden_states': [N, L, D]}} "
            f"or prompts=[...], got {sorted(given) or 'neither'}"
        )
    check_rows(denoiser, "conditioning", conditioning or {})


def check_rows(denoiser: nn.Module, name: str, conditioning: Conditioning) -> None:
    """Refuse conditions that are no tensors with a row per image, and classes that there are not."""
    leaves = {name + keystr(path): x for path, x in tree_flatten_with_path(conditioning)[0]}
    for path, leaf in leaves.items():
        if not isinstance(leaf, Tensor):
            raise TypeError(f"quantize: {path} must be a tensor [N, ...], got {_kind(leaf)}")
        if leaf.dim() == 0 or len(leaf) == 0:
            raise ValueError(
                f"quantize: {path} must have a row per image, at least one; got shape {tuple(leaf.shape)}"
            )
    rows = {path: len(leaf) for path, leaf in leaves.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(
            f"quantize: all of {name} must have the same number of rows, one per image, got {rows}; prompts "
            "make one each, after one of the empty text where nothing guides; what all images share belongs "
            "in call=DenoiserCall(constants=...)"
        )
    classes, labels = _num_classes(denoiser), conditioning.get("class_labels")
    if classes is None or not isinstance(labels, Tensor) or labels.is_floating_point():
        return
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"quantize: {name}['class_labels'] must be in [0, {classes - 1}], got "
            f"{int(labels.min())} to {int(labels.max())}"
        )


def _num_classes(denoiser: nn.Module) -> int | None:
    """How many a denoiser has an embedding of, with that for none of a transformer; None if not known."""
    config: Any = denoiser.config
    classes = getattr(config, "num_embeds_ada_norm", None)
    if classes is not None and hasattr(denoiser, "transformer_blocks"):
        return int(classes) + 1
    classes = getattr(config, "num_class_embeds", None)
    return int(classes) if classes is not None and getattr(config, "class_embed_type", None) is None else None


def trace_forward(sampler: Sampler) -> None:
    """One forward pass on zeros at the first timestep.

    Raises:
        ValueError: if the call fails, with its reason and what it was given; for a prediction of another
            shape than the sample, which no scheduler could go on from.
    """
    sample = torch.zeros(1, *sampler.sample_shape, device=sampler.device)
    conditioning = sampler.conditions(0, 1)
    try:
        prediction = sampler.predict(sample, sampler.calls[0], conditioning)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        kind = type(sampler.denoiser)
        known = [x for x in list(inspect.signature(kind.forward).parameters)[2:] if x not in _GIVEN_ANYWAY]
        raise ValueError(
            f"quantize: {kind.__name__} must work on samples {tuple(sampler.sample_shape)} with "
            f"{_described({**conditioning, **sampler.call.constants}) or 'nothing else'}, got "
            f"{type(error).__name__}: {error}; its arguments are {known}, which are given by conditioning= "
            "(--conditioning) and call=DenoiserCall(constants=...) (--call, --constants)"
        ) from error
    learned = prediction.shape[1] == 2 * sample.shape[1]
    if prediction.shape != sample.shape and not learned:
        raise ValueError(
            f"quantize: {type(sampler.denoiser).__name__} must predict what it is given, got "
            f"{tuple(prediction.shape)} for samples {tuple(sample.shape)}; denoisers that take more channels "
            "than they predict, as those made for inpainting, cannot be calibrated"
        )


_GIVEN_ANYWAY = ("timestep", "return_dict")


def _described(given: Conditioning) -> str:
    """Arguments of a call in words: shapes and dtypes of tensors, other values as they are."""
    leaves = [(keystr(path)[1:-1], x) for path, x in tree_flatten_with_path(given)[0]]
    return ", ".join(
        f"{name} {tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"{name} {x!r}"
        for name, x in leaves
    )
