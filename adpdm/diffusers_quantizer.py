"""Teaches diffusers to save and load quantized denoisers with save_pretrained and from_pretrained."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import diffusers.quantizers.auto as auto
import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from .config import MAX_BITS, MIN_BITS, QuantConfig
from .nn import LayerInfo, fuse_blocks, quant_layers, swap_layers
from .step import StepState, attach_step_hook

FORMAT_VERSION = 2  # 1 had a step for every training timestep, which noise levels do not fit into
LAYER_KEYS = {"name", "weight_bits", "activation_bits", "split"}


class Method(str, Enum):
    """The name under which diffusers finds us; it reads `.value`, so a plain string will not do."""

    ADPDM = "adpdm"


class AdpdmConfig(QuantizationConfigMixin):
    """The `quantization_config` of a saved model's config.json.

    Args:
        quant_config: the settings it was quantized with, as a dict.
        layers: per quantized layer name, weight bits, activation bits, groups and split.
        num_steps: T, calibrated timesteps.
        format_version: of the checkpoint.
    """

    def __init__(
        self,
        quant_config: dict[str, Any],
        layers: list[dict[str, Any]],
        num_steps: int | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = Method.ADPDM.value,
        **unknown: Any,
    ) -> None:
        if quant_method != Method.ADPDM.value:
            raise ValueError(f"quantization_config: quant_method must be 'adpdm', got {quant_method!r}")
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"quantization_config: this adpdm reads format_version {FORMAT_VERSION}, "
                f"got {format_version!r}; install the version that wrote the checkpoint, or quantize again"
            )
        if unknown:
            raise ValueError(f"quantization_config: unknown keys {sorted(unknown)}")
        if type(num_steps) is not int or num_steps < 1:
            raise ValueError(
                f"quantization_config: num_steps must be an integer of at least 1, got {num_steps!r}"
            )
        self.quant_method = Method.ADPDM  # type: ignore[assignment]
        self.format_version = format_version
        self.quant_config, self.layers = quant_config, layers
        self.num_steps: int = num_steps

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; diffusers serialises this at every load."""
        return {
            "quant_method": Method.ADPDM.value,
            "format_version": self.format_version,
            "quant_config": self.quant_config,
            "layers": self.layers,
            "num_steps": self.num_steps,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What diffusers prints of a config: all of it."""
        return self.to_dict()


class AdpdmQuantizer(DiffusersQuantizer):
    """Builds the quantized layers of a saved model before its tensors are loaded into them."""

    use_keep_in_fp32_modules = False
    requires_calibration = False
    required_packages: list[str] = []  # type: ignore[assignment]

    def __init__(self, quantization_config: AdpdmConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loaded_keys: list[str] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what from_pretrained cannot do: quantize on the fly, without calibration."""
        if not self.pre_quantized:
            raise ValueError(
                "adpdm needs calibration, so a float checkpoint cannot be quantized while it loads; "
                "load it without quantization_config and call adpdm.quantize(pipe)"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        assert isinstance(self.quantization_config, AdpdmConfig)
        build_frozen(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        step = model.get_submodule("adpdm_step")
        assert isinstance(step, StepState)
        step.group_index = step.group_index.to(step.table.device)
        step.step_index = step.step_index.to(step.table.device)
        step.set_step(0)
        # The layout it was calibrated in: another one would round the float layers differently.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        attach_step_hook(model)
        fuse_blocks(model)
        return model

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._loaded_keys = list(loaded_keys)
        return loaded_keys

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Keys must agree exactly: a checkpoint that lacks a scale would sample noise without a word."""
        unexpected = sorted(set(self._loaded_keys) - set(model.state_dict()))
        if missing_keys or unexpected:
            raise ValueError(
                f"adpdm checkpoint does not fit its config: missing tensors {sorted(missing_keys)[:5]}, "
                f"unexpected tensors {unexpected[:5]}"
            )
        return missing_keys

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Tensor],
        **kwargs: Any,
    ) -> bool:
        """Claim everything that must keep its stored dtype: codes, scales, zero-points and tables."""
        return _owner(model, param_name) is not None and not param_name.endswith(".bias")

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
        """Install a tensor exactly as stored: diffusers hands over `param_value` already cast."""
        module_name, _, name = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        stored, wanted = state_dict[param_name], getattr(module, name)
        if stored.dtype != wanted.dtype:
            raise ValueError(f"adpdm checkpoint: {param_name} must be {wanted.dtype}, got {stored.dtype}")
        value = stored.to(target_device)
        if isinstance(wanted, nn.Parameter):
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(name, value)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def supports_safetensors_serialization(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _owner(model: nn.Module, name: str) -> str | None:
    """Name of the quantized layer or step state that a state-dict key belongs to."""
    if name.startswith("adpdm_step."):
        return "adpdm_step"
    return next((layer for layer in quant_layers(model) if name.startswith(layer + ".")), None)


def _stored_layer(model: nn.Module, row: dict[str, Any]) -> LayerInfo:
    """One entry of `AdpdmConfig.layers`, checked against the model."""
    if set(row) != LAYER_KEYS:
        raise ValueError(
            f"adpdm checkpoint: a layer must have the keys {sorted(LAYER_KEYS)}, got {sorted(row)}"
        )
    name = row["name"]
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"adpdm checkpoint quantizes layer {name!r}, which {type(model).__name__} does not have"
        ) from None
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise ValueError(f"adpdm checkpoint: {name!r} must be a Conv2d or Linear, got {type(layer).__name__}")
    channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    limits = {"weight_bits": (MIN_BITS, MAX_BITS), "activation_bits": (MIN_BITS, MAX_BITS)}
    if row["split"] is not None:
        limits["split"] = (1, channels - 1)
    for key, (low, high) in limits.items():
        if type(row[key]) is not int or not low <= row[key] <= high:
            raise ValueError(
                f"adpdm checkpoint: {key} of layer {name!r} must be an integer in [{low}, {high}], "
                f"got {row[key]!r}"
            )
    bits = (row["weight_bits"], row["activation_bits"])
    return LayerInfo(name, 0, layer.weight.numel(), bits, "", row["split"])


def build_frozen(model: nn.Module, config: AdpdmConfig) -> None:
    """Swap in frozen layers with the shapes that a checkpoint of this config has."""
    settings = QuantConfig.from_dict(config.quant_config)
    infos = [_stored_layer(model, row) for row in config.layers]

    def make_step(num_slots: int) -> StepState:
        return StepState(num_slots, config.num_steps, settings.timestep_policy)

    swap_layers(model, infos, settings.groups_per_layer(config.num_steps), make_step)
    for twin in quant_layers(model).values():
        twin.prepare_frozen()


def mark_quantized(model: nn.Module, config: QuantConfig, layers: Sequence[LayerInfo]) -> None:
    """Tell diffusers that this model is quantized, so that save_pretrained writes all it needs."""
    step = model.get_submodule("adpdm_step")
    assert isinstance(step, StepState)
    rows = [
        {"name": x.name, "weight_bits": x.bits[0], "activation_bits": x.bits[1], "split": x.split}
        for x in layers
        if x.bits is not None
    ]
    quantization_config = AdpdmConfig(config.to_dict(), rows, step.timesteps.numel())
    quantizer = AdpdmQuantizer(quantization_config, pre_quantized=True)
    untyped: Any = model
    untyped.hf_quantizer = quantizer
    untyped.is_quantized, untyped.quantization_method = True, Method.ADPDM
    untyped.register_to_config(quantization_config=quantization_config)


def register() -> None:
    """Enter our classes into the two dictionaries of diffusers (it has no entry point for third parties)."""
    auto.AUTO_QUANTIZER_MAPPING[Method.ADPDM.value] = AdpdmQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.ADPDM.value] = AdpdmConfig
