"""Teaches diffusers to quantize models while it loads them, and to save and load quantized ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers.quantizers.auto as auto
import torch
from accelerate.utils import CustomDtype  # type: ignore[import-untyped]
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils.import_utils import is_transformers_available
from torch import Tensor, nn

from .config import MAX_BITS, MIN_BITS, QuantConfig
from .correction import attach_correction, detach_correction
from .diffusers_config import (
    CALIBRATED_FORMAT,
    AdpdmConfig,
    Method,
    Row,
    calibrated_row,
    check_rotation,
    choose_layers,
)
from .model_methods import replace_methods, restore_methods
from .nn import (
    CodedLayer,
    LayerInfo,
    LoadedLayer,
    float_twin,
    fuse_blocks,
    has_state_hooks,
    load_layer,
    loaded_layers,
    mark_equalized,
    quant_layers,
    reason_to_stay,
    refuse_adapters,
    runs_on_kernels,
    swap_layers,
    to_channels_last,
    unfuse_blocks,
    watch_adapters,
    without_adapters,
)
from .quantizers.activation import ActivationQuantizer
from .quantizers.weight import stored_in_int4
from .step import StepState, attach_step_hook, detach_step_hook

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of activations


class AdpdmQuantizer(DiffusersQuantizer):
    """Puts quantized layers into a model on the meta device, and fills each as its tensor arrives.

    A float checkpoint is quantized tensor by tensor (`AdpdmConfig` without layers), a quantized one is taken
    as stored.
    """

    use_keep_in_fp32_modules = True
    requires_calibration = False
    required_packages: list[str] = []  # type: ignore[assignment]

    def __init__(self, quantization_config: AdpdmConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: AdpdmConfig = quantization_config
        # from_single_file takes every checkpoint for quantized; only layers on record say so.
        self.pre_quantized = self.pre_quantized and quantization_config.layers is not None
        self._loaded_keys: list[str] = []

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what from_pretrained cannot do: calibrate, and quantize tensors on their way to the disk."""
        if self.quantization_config.is_calibrated and not self.pre_quantized:
            raise ValueError(
                "adpdm needs calibration for static activation scales, so a float checkpoint cannot get them "
                "while it loads; load it without quantization_config and call adpdm.quantize(pipe)"
            )
        on_disk = [k for k, v in device_map.items() if v == "disk"] if isinstance(device_map, dict) else []
        if on_disk:
            raise ValueError(
                f"adpdm: device_map puts {on_disk[:5]} on disk, where diffusers writes tensors as they are; "
                "wanted devices with memory, or group offloading after loading"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of what stays float; diffusers keeps it as the original one, and None is none."""
        torch_dtype = torch.get_default_dtype() if torch_dtype is None else torch_dtype
        if torch_dtype not in KERNEL_DTYPES and self.quantization_config.activation_bits is not None:
            raise ValueError(
                f"adpdm: torch_dtype must be one of {KERNEL_DTYPES}, which the integer kernels take, got "
                f"{torch_dtype}; activation_bits=None needs no such kernels"
            )
        return torch_dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype | None) -> Any:
        """What device_map='auto' takes for the size of a weight."""
        if self.pre_quantized:
            return torch_dtype
        small = stored_in_int4(self.quantization_config.weight_bits)
        return CustomDtype.INT4 if small else torch.int8

    def get_special_dtypes_update(
        self, model: nn.Module, torch_dtype: torch.dtype | None
    ) -> dict[str, torch.dtype]:
        """The same for the tensors that stay float."""
        if self.pre_quantized:
            return {}
        weights = {f"{name}.weight" for name in loaded_layers(model)}
        return {n: torch_dtype or torch.float32 for n, _ in model.named_parameters() if n not in weights}

    def get_cuda_warm_up_factor(self) -> int:
        """Bytes of the model in 16 bits are divided by half of this."""
        return 8 if stored_in_int4(self.quantization_config.weight_bits) else 4

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            build_frozen(model, self.quantization_config)
            return
        rows = choose_layers(model, self.quantization_config, keep_in_fp32_modules or ())
        for row in rows:
            load_layer(model, row["name"], (row["weight_bits"], row["activation_bits"]))
        self.quantization_config = self.quantization_config.with_layers(rows)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not hasattr(model, "hf_device_map"):  # which leaves tensors of other devices on meta, on purpose
            absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
            if absent:
                raise ValueError(f"adpdm: the checkpoint lacks tensors of the model: {sorted(absent)[:5]}")
        if self.quantization_config.is_calibrated:
            start_calibrated(model, self.quantization_config)
        untyped: Any = model
        untyped.register_to_config(quantization_config=self.quantization_config)
        replace_methods(model, self.quantization_config)
        return model

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._loaded_keys = list(loaded_keys)
        return loaded_keys

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Keys must agree exactly: a checkpoint that lacks a scale would sample noise without a word.

        Of a float checkpoint, diffusers itself warns of keys that are too many.
        """
        unexpected = sorted(set(self._loaded_keys) - set(model.state_dict())) if self.pre_quantized else []
        if not self.pre_quantized:
            made_here = {f"{name}.weight_scale" for name in loaded_layers(model)}
            missing_keys = [key for key in missing_keys if key not in made_here]
        if missing_keys or unexpected:
            raise ValueError(
                f"adpdm checkpoint does not fit its config: missing tensors {sorted(missing_keys)[:5]}, "
                f"unexpected tensors {unexpected[:5]}{self._hint(missing_keys)}"
            )
        return missing_keys

    def _hint(self, missing_keys: Sequence[str]) -> str:
        """Where float weights under a quantized config come from, if no layer is quantized."""
        scales = {f"{row['name']}.weight_scale" for row in self.quantization_config.layers or []}
        if not self.pre_quantized or not scales <= set(missing_keys):
            return ""
        return (
            "; it holds a float model: one that from_config makes of a quantized model's config keeps its "
            "quantization_config, so leave that key out of the config that from_config is given"
        )

    def check_if_quantized_param(self, *args: Any, **kwargs: Any) -> bool:
        """Claim every tensor: codes and scales keep their dtype, floats get memory of their own."""
        return True

    def check_quantized_param_shape(self, param_name: str, current: Tensor, loaded: Tensor) -> None:
        raise ValueError(
            f"adpdm checkpoint: {param_name} must have shape {tuple(current.shape)}, "
            f"got {tuple(loaded.shape)}"
        )

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Install one tensor: codes from what is stored, as `param_value` is already cast."""
        module_name, _, name = param_name.rpartition(".")
        module, stored = model.get_submodule(module_name), state_dict[param_name]
        if isinstance(module, LoadedLayer) and name == "weight" and not self.pre_quantized:
            _fill(module, param_name, stored, torch.device(target_device))
        elif _is_ours(module, name):
            wanted = getattr(module, name)
            if stored.dtype != wanted.dtype:
                raise ValueError(f"adpdm checkpoint: {param_name} must be {wanted.dtype}, got {stored.dtype}")
            _install(module, name, stored.to(target_device))
        else:
            _check_float(module, name, param_name, stored)
            value = param_value.to(target_device)
            # The stored tensor is the mapped file: as long as one lives, all that was read of it counts as
            # memory, which is the float model.
            mapped = value.data_ptr() == stored.data_ptr()
            _install(module, name, value.clone() if mapped else value)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What save_pretrained writes: the model without adapters, but with those that were fused."""
        return without_adapters(state_dict), {}

    def dequantize(self, model: nn.Module) -> nn.Module:
        """Replace quantized layers by float ones in the model's dtype; nothing of adpdm remains."""
        untyped: Any = model
        refuse_adapters("dequantize", model)
        coded = [(n, m) for n, m in model.named_modules() if isinstance(m, CodedLayer)]
        watched = [name for name, layer in coded if has_state_hooks(layer)]
        if watched:
            raise ValueError(
                "dequantize: wanted layers without hooks that see their state_dict, which holds codes, got "
                f"them on {watched[:5]}; remove them first"
            )
        dtype = untyped.dtype
        unfuse_blocks(model)
        for name, layer in coded:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, float_twin(layer, dtype))
        mark_equalized(model, self.quantization_config.equalized)  # of which the float model is still made
        if hasattr(model, "adpdm_step"):
            detach_step_hook(model)
            detach_correction(model)
            del model.adpdm_step
        unmark(model)
        untyped.is_quantized = False  # as diffusers' own leaves it
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def supports_safetensors_serialization(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether gradients pass, for adapters: straight through all layers, within calibrated ranges."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _fill(layer: LoadedLayer, name: str, weight: Tensor, device: torch.device) -> None:
    """Quantize one arriving weight, where it lies: on the CPU, so that codes are the same everywhere."""
    if not weight.is_floating_point():
        raise ValueError(
            f"adpdm: {name} must be floating point to be quantized, got {weight.dtype}; a quantized "
            "checkpoint must have a quantization_config with its layers in config.json"
        )
    if weight.numel() and not all(x.isfinite() for x in torch.aminmax(weight)):
        raise ValueError(f"adpdm: {name} must be finite to be quantized, got NaN or infinity")
    layer.fill(weight, device)


def _check_float(module: nn.Module, name: str, param_name: str, stored: Tensor) -> None:
    wanted = getattr(module, name)
    if stored.is_floating_point() != wanted.is_floating_point():
        kind = "floating point" if wanted.is_floating_point() else "integer"
        raise ValueError(f"adpdm checkpoint: {param_name} must be {kind}, got {stored.dtype}")


def _is_ours(module: nn.Module, name: str) -> bool:
    """Whether a tensor is one that must keep its stored dtype: codes, scales, zero-points and tables."""
    if isinstance(module, CodedLayer):
        return name in ("weight", "weight_scale")
    return isinstance(module, ActivationQuantizer | StepState)


def _install(module: nn.Module, name: str, value: Tensor) -> None:
    before = getattr(module, name)
    if isinstance(before, nn.Parameter):
        setattr(module, name, nn.Parameter(value, requires_grad=before.requires_grad))
    else:
        module.register_buffer(name, value)


def start_calibrated(model: nn.Module, config: AdpdmConfig) -> None:
    """Let a model whose frozen layers are filled run: the first step, the hook of the clock, fused blocks."""
    step = model.get_submodule("adpdm_step")
    assert isinstance(step, StepState)
    step.take_record()
    step.set_step(0)
    # The layout it was calibrated in: another one would round the float layers differently.
    to_channels_last(model)
    attach_step_hook(model)
    attach_correction(model)
    # As `quantize` leaves it: inputs with gradients keep blocks from running fused.
    model.requires_grad_(False)
    fuse_blocks(model, QuantConfig.from_dict(config.quant_config or {}).attention)


def _stored_layer(model: nn.Module, row: Row) -> nn.Conv2d | nn.Linear:
    """The layer of one entry of `AdpdmConfig.layers`, checked against the model."""
    name = row["name"]
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"adpdm checkpoint quantizes layer {name!r}, which {type(model).__name__} does not have"
        ) from None
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise ValueError(f"adpdm checkpoint: {name!r} must be a Conv2d or Linear, got {type(layer).__name__}")
    if reason := reason_to_stay(layer):
        raise ValueError(f"adpdm checkpoint quantizes layer {name!r}, which must stay float here: {reason}")
    channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    limits = {"weight_bits": (MIN_BITS, MAX_BITS), "activation_bits": (MIN_BITS, MAX_BITS)}
    if "split" not in row and row["activation_bits"] is None:
        del limits["activation_bits"]
    elif not runs_on_kernels(layer):
        raise ValueError(
            f"adpdm checkpoint: layer {name!r} pads as the integer kernels cannot, so its activation_bits "
            f"must be None, got {row['activation_bits']!r}"
        )
    if row.get("split") is not None:
        limits["split"] = (1, channels - 1)
    check_rotation(row, layer)
    for key, (low, high) in limits.items():
        if type(row[key]) is not int or not low <= row[key] <= high:
            raise ValueError(
                f"adpdm checkpoint: {key} of layer {name!r} must be an integer in [{low}, {high}], "
                f"got {row[key]!r}"
            )
    return layer


def build_frozen(model: nn.Module, config: AdpdmConfig) -> None:
    """Swap in frozen layers with the shapes that a checkpoint of this config has."""
    rows = config.layers or []
    layers = [_stored_layer(model, row) for row in rows]
    if not config.is_calibrated:
        for row in rows:
            load_layer(model, row["name"], (row["weight_bits"], row["activation_bits"])).prepare_frozen()
        return
    assert config.quant_config is not None
    assert config.num_steps is not None
    num_steps, settings = config.num_steps, QuantConfig.from_dict(config.quant_config)
    infos = [
        LayerInfo(
            r["name"],
            0,
            x.weight.numel(),
            (r["weight_bits"], r["activation_bits"]),
            "",
            r["split"],
            r.get("hadamard", 0),
        )
        for r, x in zip(rows, layers, strict=True)
    ]

    def make_step(num_slots: int) -> StepState:
        state = StepState(num_slots, num_steps, settings.timestep_policy)
        if config.corrects_prediction:
            state.set_correction(torch.tensor([[1.0, 0.0]] * num_steps))
        return state

    swap_layers(model, infos, settings.groups_per_layer(num_steps), make_step)
    for twin in quant_layers(model).values():
        twin.prepare_frozen()
    mark_equalized(model, config.equalized)


def mark_quantized(
    model: nn.Module, config: QuantConfig, layers: Sequence[LayerInfo], equalized: Sequence[str]
) -> None:
    """Tell diffusers that this model is quantized, so that save_pretrained writes all it needs."""
    mark_equalized(model, equalized)
    step = model.get_submodule("adpdm_step")
    assert isinstance(step, StepState)
    rows = [calibrated_row(x) for x in layers if x.bits is not None]
    attach_config(
        model,
        AdpdmConfig(
            layers=rows,
            quant_config=config.to_dict(),
            num_steps=step.timesteps.numel(),
            equalized=equalized,
            corrects_prediction=step.correction is not None,
            format_version=CALIBRATED_FORMAT,
        ),
    )


def attach_config(model: nn.Module, config: AdpdmConfig) -> None:
    """What from_pretrained leaves behind on a model that it loaded quantized."""
    untyped: Any = model
    untyped.hf_quantizer = AdpdmQuantizer(config, pre_quantized=True)
    untyped.is_quantized, untyped.quantization_method = True, Method.ADPDM
    _change_config(model, {**untyped.config, "quantization_config": config})
    replace_methods(model, config)


def unmark(model: nn.Module) -> None:
    """Take back what `attach_config` and loading told diffusers of a model whose layers are float again.

    Otherwise it refuses `.to(dtype)`, and whatever is saved next is taken for quantized.
    """
    untyped: Any = model
    _change_config(model, {key: x for key, x in untyped.config.items() if key != "quantization_config"})
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        untyped.__dict__.pop(name, None)
    restore_methods(model)


def _change_config(model: nn.Module, items: dict[str, Any]) -> None:
    """Exchange the items of a model's config for others, and keep what is an attribute alone.

    So diffusers tells a U-Net that an IP-Adapter is loaded (`encoder_hid_dim_type`), which is not saved.
    """
    untyped: Any = model
    config = untyped.config
    attributes = {key: x for key, x in vars(config).items() if not key.startswith("_")}
    told = {key: x for key, x in attributes.items() if key not in config or config[key] is not x}
    untyped._internal_dict = FrozenDict(items)
    for key, value in told.items():
        setattr(untyped._internal_dict, key, value)


def register() -> None:
    """Enter our classes where diffusers looks (it has no entry point for third parties).

    PipelineQuantizationConfig(quant_backend=...) also looks among the configs of transformers, if installed.
    """
    watch_adapters()
    auto.AUTO_QUANTIZER_MAPPING[Method.ADPDM.value] = AdpdmQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.ADPDM.value] = AdpdmConfig
    if is_transformers_available():
        import transformers.quantizers.auto as of_transformers

        of_transformers.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.ADPDM.value] = AdpdmConfig
        refusal: Any = _refuse_transformers
        of_transformers.AUTO_QUANTIZER_MAPPING[Method.ADPDM.value] = refusal


def _refuse_transformers(*args: Any, **kwargs: Any) -> None:
    """In place of a quantizer of transformers, for who names no components."""
    raise ValueError(
        "adpdm quantizes models of diffusers, got one of transformers, such as a text encoder; name those "
        "to quantize in PipelineQuantizationConfig(components_to_quantize=[...])"
    )
