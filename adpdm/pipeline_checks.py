"""What `quantize` refuses before it changes anything: arguments, denoisers, conditions that do not fit."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from .config import QuantConfig
from .nn import CodedLayer, refuse_adapters
from .schedulers import first_sample, lists_steps, model_input, step_arguments
from .trajectory import Conditioning, DenoiserCall, Guidance, Sampler

CALIBRATION_DEVICES = ("cpu", "cuda")
# Beginnings of names of denoisers that their pipelines in diffusers give a timestep between 0 and 1.
GIVEN_SHARES_OF_TIME = (
    *("AuraFlow", "BriaFibo2", "Chroma", "Flux", "Krea2", "LongCatAudioDiT", "LongCatImage"),
    *("NucleusMoEImage", "OvisImage", "PRX", "QwenImage"),
)
GIVEN_TIME_THAT_IS_OVER = ("Lumina",)  # 1 - t / 1000, and whose predictions are negated
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


def _refuse_shared_layers(denoiser: nn.Module) -> None:
    """Refuse a layer in two places: one would become integer, and the other stay what it is.

    Blocks may be shared, with all their layers.
    """
    places: dict[nn.Module, tuple[str, str]] = {}
    for owner_name, owner in denoiser.named_modules():
        for child_name, child in owner._modules.items():
            if not isinstance(child, nn.Conv2d | nn.Linear):
                continue
            place = (owner_name, child_name)
            if places.setdefault(child, place) != place:
                first, second = ".".join(places[child]), ".".join(place)
                raise ValueError(
                    f"quantize: wanted layers in one place each, got one that is {first} and {second}; "
                    "parameters may be shared, and blocks, but not layers"
                )


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
    _refuse_shared_layers(denoiser)
    refuse_replaced_forwards("quantize", denoiser)
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
                f"{parameter.dtype} on {parameter.device}; "
                + (
                    "load with torch_dtype=torch.float32"
                    if parameter.device.type in CALIBRATION_DEVICES
                    else "remove what moves it between devices, such as pipe.remove_all_hooks()"
                )
            )
        if parameter.device != device:
            raise ValueError(
                f"quantize: wanted all parameters on one device to calibrate, got {device} and {name} on "
                f"{parameter.device}; load without device_map"
            )


def refuse_replaced_forwards(caller: str, denoiser: nn.Module) -> None:
    """Refuse layers with a forward of their own: their twins would run it, on the weights of before.

    Raises:
        ValueError: names the first of them.
    """
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and "forward" in module.__dict__:
            raise ValueError(
                f"{caller}: wanted layers with the forward of their class, got {name} with another, as "
                "offloading and other hooks leave it; remove them first (pipe.remove_all_hooks(), or load "
                "again), and offload the quantized model"
            )


def refuse_second_denoiser(pipe_or_denoiser: Any, denoiser: nn.Module) -> None:
    """Refuse pipelines that sample by turns from several denoisers of a kind, as Wan 2.2 does.

    Raises:
        ValueError: names them. One would stay float, and both be calibrated at timesteps they never see.
    """
    components = {} if pipe_or_denoiser is denoiser else getattr(pipe_or_denoiser, "components", {})
    twins = [name for name, part in components.items() if type(part) is type(denoiser)]
    if len(twins) > 1:
        raise ValueError(
            f"quantize: wanted a pipeline with one denoiser, got {' and '.join(twins)}; quantize each by "
            f"itself at the timesteps it samples: quantize(pipe.{twins[0]}, scheduler=pipe.scheduler, "
            "call=DenoiserCall(schedule={'timesteps': ...}))"
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
    _try_step(sampler, prediction)


def make_sampler(
    denoiser: nn.Module,
    scheduler: Any,
    shape: tuple[int, ...],
    num_inference_steps: int,
    conditioning: Conditioning | None,
    call: DenoiserCall | None,
    guidance: Guidance | None,
) -> Sampler:
    """A Sampler of these arguments.

    Raises:
        ValueError: where the scheduler cannot be set to the steps, with its reason, for another number of
            listed steps, and for timesteps in another unit than the denoiser's.
    """
    _check_schedule(scheduler, call)
    given = (conditioning, call, guidance)
    try:
        sampler = Sampler(denoiser, scheduler, shape, num_inference_steps, *given)
    except Exception as error:
        raise _unsuited(scheduler, error) from error
    _check_number_of_steps(sampler, num_inference_steps)
    highest, kind = float(sampler.timesteps.max()), type(denoiser).__name__
    if kind.startswith(GIVEN_TIME_THAT_IS_OVER):
        raise ValueError(
            f"quantize: the pipeline of {kind} gives it 1 - t / 1000 and negates its prediction, as no "
            "DenoiserCall can say, so it cannot be calibrated; AdpdmConfig quantizes it while it loads"
        )
    if kind.startswith(GIVEN_SHARES_OF_TIME) and sampler.call.timestep_factor == 1 and highest > 1:
        raise ValueError(
            f"quantize: {kind} is given timesteps between 0 and 1 by its pipeline, wanted "
            f"call=DenoiserCall(timestep_factor=1e-3), got a factor of 1 for timesteps up to {highest:g}"
        )
    return sampler


def _check_schedule(scheduler: Any, call: DenoiserCall | None) -> None:
    """Refuse arguments of `set_timesteps` that the scheduler does not have.

    Raises:
        ValueError: names them.
    """
    takes = inspect.signature(scheduler.set_timesteps).parameters
    unknown = sorted(({} if call is None else call.schedule).keys() - takes.keys())
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        raise ValueError(
            f"quantize: call.schedule must hold arguments of {type(scheduler).__name__}.set_timesteps, which "
            f"takes {sorted(takes)}; got {unknown}"
        )


def _check_number_of_steps(sampler: Sampler, wanted: int) -> None:
    """Refuse a schedule that lists another number of steps than the config says.

    Raises:
        ValueError: names both numbers.
    """
    calls, steps = len(sampler.calls), len(sampler.timesteps)
    # Of second order ask more often, and some count the ends of steps; None where steps are the caller's own.
    counted = getattr(sampler.scheduler, "num_inference_steps", None)
    if lists_steps(sampler.call.schedule) and wanted not in (calls, steps, counted):
        raise ValueError(
            f"quantize: call.schedule must list config.num_inference_steps={wanted} steps, got "
            f"{calls if counted is None else counted}"
        )


def _try_step(sampler: Sampler, prediction: Tensor) -> None:
    """Steps of copies of the scheduler from noise, and a copy of what that leaves, which a probe needs.

    Raises:
        ValueError: they fail, or depend on torch's global seed: no image would be that of its number.
    """
    scheduler, made = sampler.scheduler, []
    try:
        for seed in (0, 1):
            with _global_seed(sampler.device, seed):
                made.append(_first_step(sampler, prediction))
    except Exception as error:
        raise _unsuited(scheduler, error) from error
    first, other = made
    if not torch.allclose(first, other, rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            "quantize: wanted a scheduler that draws noise from the generators that its step is given, got "
            f"{type(scheduler).__name__}, which draws from torch's global one; set a seed of its own, such "
            "as noise_sampler_seed, or calibrate with another scheduler"
        )


def _first_step(sampler: Sampler, prediction: Tensor) -> Tensor:
    """The sample [1, *] after the first step of a copy of the scheduler, from the same noise every time."""
    scheduler, generator = copy.deepcopy(sampler.scheduler), torch.Generator().manual_seed(0)
    timestep = scheduler.timesteps[0]
    noise = torch.randn(1, *sampler.sample_shape, generator=generator, device="cpu").to(sampler.device)
    sample = first_sample(scheduler, noise)
    model_input(scheduler, sample, timestep)
    after: Tensor = scheduler.step(
        prediction, timestep, sample, **step_arguments(scheduler, [generator])
    ).prev_sample
    copy.deepcopy(scheduler)
    return after


@contextmanager
def _global_seed(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators, of the CPU and of a device, while the block runs."""
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        torch.default_generator.manual_seed(seed)
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _unsuited(scheduler: Any, error: Exception) -> ValueError:
    return ValueError(
        "quantize: wanted a scheduler that is set to a number of steps, steps from a prediction, a timestep "
        f"and a sample as DDIM does, and can be copied in between; got {type(scheduler).__name__}, which "
        f"fails with {type(error).__name__}: {error}"
    )


_GIVEN_ANYWAY = ("timestep", "return_dict")


def _key(path: tuple[Any, ...]) -> str:
    """Where a leaf stands, as 'image_rotary_emb'[0]."""
    first, *rest = path
    return repr(getattr(first, "key", first)) + keystr(tuple(rest))


def _described(given: Conditioning) -> str:
    """Arguments of a call in words: shapes and dtypes of tensors, other values as they are."""
    leaves = [(_key(path), x) for path, x in tree_flatten_with_path(given)[0]]
    return ", ".join(
        f"{name} {tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"{name} {x!r}"
        for name, x in leaves
    )
