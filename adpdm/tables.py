"""Tables without weights: what calibration found, in a small file that quantizes the float model again.

The file holds scales, zero-points, groups, timesteps, and the biases of quantized layers, which calibration
corrects. Weight codes are made again; a hash of the whole quantized model says whether they came out alike.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import ops
from .denoisers import find_denoiser
from .diffusers_config import AdpdmConfig
from .diffusers_quantizer import attach_config, build_frozen, start_calibrated
from .files import replacing
from .nn import CodedLayer, QuantLayer, refuse_adapters
from .pipeline_checks import refuse_replaced_forwards
from .quantizers.weight import WeightQuantizer
from .rounding import NEAREST_FROM_BITS

TABLES_FORMAT = 1
METADATA = "adpdm_tables"  # key in the header of the file


def save_tables(pipe_or_denoiser: Any, path: Path | str) -> None:
    """Write what `adpdm.quantize` found, without weights, to one safetensors file.

    Args:
        pipe_or_denoiser: pipeline or model in float32 that `adpdm.quantize` made with 8-bit weights, or with
            weight_rounding="nearest"; below 8-bit activations with equalization="off" as well.
        path: of the file; replaced where it exists.

    Raises:
        ValueError: for any other model, with adapters among them, beside the layers or fused. Weights that
            "gptq" rounded depend on calibration images, and equalization changes weights of other layers, so
            the float model alone does not give them again.
        OSError: the file cannot be written there.
    """
    model: Any = find_denoiser(pipe_or_denoiser)
    path = _checked_path(path)
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if not isinstance(config, AdpdmConfig) or not config.is_calibrated:
        raise ValueError(
            f"save_tables: wanted a model that adpdm.quantize made, got {type(model).__name__}; models "
            "quantized while loading have no tables, their AdpdmConfig says it all"
        )
    if config.equalized:
        raise ValueError(
            "save_tables: equalization changed weights of layers that are not quantized, so tables do not "
            "give the model again; use save_pretrained, or quantize with equalization='off'"
        )
    assert config.quant_config is not None
    rounding, rows = config.quant_config["weight_rounding"], config.layers or []
    if rounding != "nearest" and any(row["weight_bits"] < NEAREST_FROM_BITS for row in rows):
        raise ValueError(
            f"save_tables: weights of fewer than {NEAREST_FROM_BITS} bits were rounded by {rounding!r}, "
            "which depends on calibration images, so they cannot be made again from the float model; use "
            "save_pretrained, or quantize with weight_rounding='nearest'"
        )
    _demand_own_layers(model, [row["name"] for row in rows])
    state = model.state_dict()
    _demand_float32("save_tables", state)
    about = {
        "format_version": TABLES_FORMAT,
        "model": type(model).__name__,
        "config": config.to_dict(),
        "sha256": _digest(state),
    }
    tables = {key: state[key].contiguous() for key in _table_keys(state, config)}
    with replacing(path) as temporary:
        # One entry: safetensors writes several in no fixed order, and equal tables shall be equal files.
        save_file(tables, temporary, {METADATA: json.dumps(about, sort_keys=True)})


def load_tables(pipe_or_denoiser: Any, path: Path | str) -> None:
    """Quantize a float model in place by the tables of `save_tables`: the same bits, without calibration.

    Args:
        pipe_or_denoiser: pipeline or model with the float32 weights that were calibrated.
        path: of the file.

    Raises:
        ValueError: before anything is changed, for a file that holds no such tables, for another model, and
            for weights that do not give the model whose tables these are.
    """
    model: Any = find_denoiser(pipe_or_denoiser)
    if any(isinstance(m, CodedLayer) for m in model.modules()):
        raise ValueError(f"load_tables: {type(model).__name__} is quantized already; load the original again")
    refuse_adapters("load_tables", model, may_fuse=False)
    refuse_replaced_forwards("load_tables", model)
    about, tables = _read(path)
    if about["model"] != type(model).__name__:
        raise ValueError(f"load_tables: {path} is for a {about['model']}, got a {type(model).__name__}")
    config = AdpdmConfig.from_dict(about["config"])
    if not config.is_calibrated:
        raise ValueError(f"load_tables: {path} must hold the config of a calibrated model, got none")
    state = model.state_dict()
    _demand_float32("load_tables", state)
    quantized = _quantized_state(model, state, tables, config, path)
    if _digest(quantized) != about["sha256"]:
        raise ValueError(
            f"load_tables: the weights of this {type(model).__name__} are not those that {path} was made for"
        )
    model.eval().requires_grad_(False)
    build_frozen(model, config)
    model.load_state_dict(quantized, strict=True, assign=True)
    start_calibrated(model, config)
    attach_config(model, config)


def _checked_path(path: Path | str) -> Path:
    """Where tables can become a file."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"save_tables: wanted a file to write, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save_tables: wanted a file in a folder that exists, got {path}")
    return path


def _demand_own_layers(model: Any, names: list[str]) -> None:
    """Refuse what the float model does not give again; first what unload_lora() would make final."""
    changed = [name for name, m in model.named_modules() if isinstance(m, CodedLayer) and m.is_requantized]
    if changed:
        raise ValueError(
            f"save_tables: fused adapters changed the weights of {changed[:5]}, so tables do not give the "
            "model again; call unfuse_lora() if they are not unloaded yet, or use save_pretrained"
        )
    refuse_adapters("save_tables", model, may_fuse=False)
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, QuantLayer):
            raise ValueError(f"save_tables: {name} must be as quantized, got a {type(layer).__name__} there")


def _read(path: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says of itself, and its tensors."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[METADATA])
            tables = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"load_tables: {path} is no file of save_tables: {error}") from error
    version = about.get("format_version") if isinstance(about, dict) else None
    if version != TABLES_FORMAT:
        raise ValueError(
            f"load_tables: this adpdm reads tables of format_version {TABLES_FORMAT}, got {version!r}"
        )
    missing = {"model", "config", "sha256"} - set(about)
    if missing:
        raise ValueError(f"load_tables: the header of {path} lacks {sorted(missing)}")
    return about, tables


def _quantized_state(
    model: Any, state: dict[str, Tensor], tables: dict[str, Tensor], config: AdpdmConfig, path: Path | str
) -> dict[str, Tensor]:
    """The state_dict of the quantized model; the model itself stays as it is."""
    with init_empty_weights():
        shell = type(model).from_config(model.config)
    build_frozen(shell, config)
    wanted: dict[str, Tensor] = shell.state_dict()
    keys = _table_keys(wanted, config)
    if set(tables) != set(keys):
        raise ValueError(
            f"load_tables: {path} does not fit its config: missing {sorted(set(keys) - set(tables))[:5]}, "
            f"unexpected {sorted(set(tables) - set(keys))[:5]}"
        )
    for key in keys:
        got, want = tables[key], wanted[key]
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            raise ValueError(
                f"load_tables: {key} must be {want.dtype} {tuple(want.shape)}, got {got.dtype} "
                f"{tuple(got.shape)}"
            )
    # In the order of the model, as save_pretrained would write it.
    elsewhere = next(model.parameters()).device
    placed = {key: table.to(_device_for(key, state, elsewhere)) for key, table in tables.items()}
    result = {key: placed[key] if key in placed else state[key] for key in wanted}
    for row in config.layers or []:
        name = row["name"]
        quantizer = WeightQuantizer(row["weight_bits"], row["split"])
        weight, block = state[f"{name}.weight"], row.get("hadamard", 0)
        weight = ops.hadamard(weight, block) if block else weight
        codes, _ = quantizer.quantize(weight, placed[f"{name}.weight_scale"])
        result[f"{name}.weight"] = quantizer.store(codes)
    return result


def _device_for(key: str, state: dict[str, Tensor], elsewhere: torch.device) -> torch.device:
    """Of the weight of the layer that a table belongs to; `elsewhere` for the clock, which has none."""
    owner = key.rpartition(".")[0]
    while owner:
        if f"{owner}.weight" in state:
            return state[f"{owner}.weight"].device
        owner = owner.rpartition(".")[0]
    return elsewhere


def _table_keys(state: dict[str, Tensor], config: AdpdmConfig) -> list[str]:
    """Keys of a quantized model that are not weights: of the clock, and of quantized layers."""
    owners = tuple(f"{row['name']}." for row in config.layers or [])
    weights = {f"{row['name']}.weight" for row in config.layers or []}
    return [k for k in state if k.startswith(("adpdm_step.", *owners)) and k not in weights]


def _digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _demand_float32(verb: str, state: dict[str, Tensor]) -> None:
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"{verb}: wanted float32, as it was calibrated, got {key} as {tensor.dtype}")
