"""The `quantization_config` of a diffusers model: what a user asks for, and what a checkpoint holds."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal, get_args

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from .config import MAX_BITS, MIN_BITS, QuantConfig
from .nn.loaded import runs_on_kernels
from .nn.swap import (
    CAST_TO_WEIGHT,
    EMBEDDING_PATTERNS,
    INPUT_OUTPUT_NAMES,
    LAYER_CLASSES,
    LayerInfo,
    excluded,
)
from .reference_hadamard import BLOCKS

ActivationScales = Literal["dynamic", "static"]

CALIBRATED_FORMAT = 2  # 1 had a step for every training timestep, which noise levels do not fit into
UNCALIBRATED_FORMAT = 3  # layers without scales for activations; readers of 2 refuse it by its number
MAX_STEPS = 10_000  # calibrated timesteps: ten times the training steps of any model known to us
CALIBRATED_KEYS = {"quant_config", "num_steps", "equalized", "corrects_prediction"}
CHOICE_KEYS = {"weight_bits", "activation_bits", "activation_scales", "modules_to_not_convert"}
COMMON_KEYS = {"quant_method", "format_version", "layers"}
CALIBRATED_LAYER_KEYS = {"name", "weight_bits", "activation_bits", "split"}
OPTIONAL_LAYER_KEYS = {"hadamard"}  # of calibrated layers
LAYER_KEYS = {"name", "weight_bits", "activation_bits"}

Row = dict[str, Any]  # one quantized layer: LAYER_KEYS or CALIBRATED_LAYER_KEYS


class Method(str, Enum):
    """The name under which diffusers finds us; it reads `.value`, so a plain string will not do."""

    ADPDM = "adpdm"


class AdpdmConfig(QuantizationConfigMixin):
    """Quantizes the weights of a float model while `from_pretrained` loads it; no calibration.

        UNet2DModel.from_pretrained(path, quantization_config=adpdm.AdpdmConfig(weight_bits=8))

    All Conv2d and Linear layers are quantized. The first and last layers and those of the timestep embedding
    take 8-bit weights and float inputs, whatever is asked for: they are small, and errors in them reach
    everything. The other arguments are the record that a checkpoint holds, and not for users.

    Args:
        weight_bits: 2 to 8, per output channel, symmetric, rounded to nearest; up to 4, two weights share a
            byte, at a loss of quality that `adpdm.quantize` avoids (demo model: 14 dB PSNR, 46 at 8 bits).
        activation_bits: None keeps inputs of layers float (weight-only); with 2 to 8 bits, layers run in
            integers.
        activation_scales: `dynamic` measures the range of every input, over the whole batch, at every call;
            `static` ranges come from calibration alone, see `adpdm.quantize`.
        modules_to_not_convert: names that stay float: of layers, of modules with layers inside, or any part
            of a dotted name; shell patterns.

    Raises:
        ValueError: for values outside these, with what was wanted and what was given.
    """

    def __init__(
        self,
        weight_bits: int = 8,
        activation_bits: int | None = None,
        activation_scales: ActivationScales = "dynamic",
        modules_to_not_convert: Sequence[str] | None = None,
        layers: list[Row] | None = None,
        quant_config: dict[str, Any] | None = None,
        num_steps: int | None = None,
        equalized: Sequence[str] = (),
        corrects_prediction: bool = False,
        format_version: int | None = None,
        quant_method: str = Method.ADPDM.value,
        **unknown: Any,
    ) -> None:
        if quant_method != Method.ADPDM.value:
            raise ValueError(f"quantization_config: quant_method must be 'adpdm', got {quant_method!r}")
        self.quant_method = Method.ADPDM  # type: ignore[assignment]
        found = (quant_config, num_steps, equalized or None, corrects_prediction or None)
        calibrated = any(x is not None for x in found)
        _check_version(format_version, calibrated, calibrated or layers is not None)
        if unknown:
            raise ValueError(f"quantization_config: unknown keys {sorted(unknown, key=str)}")
        self.quant_config, self.num_steps = quant_config, num_steps
        self.equalized = _checked_names(equalized)
        self.corrects_prediction = _checked_switch("corrects_prediction", corrects_prediction)
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.activation_scales: ActivationScales = activation_scales
        self.modules_to_not_convert = modules_to_not_convert
        self.layers = _checked_layers(layers, CALIBRATED_LAYER_KEYS if calibrated else LAYER_KEYS)
        if calibrated:
            self._take_from_calibration()
        self._check_choices(calibrated)

    @property
    def is_calibrated(self) -> bool:
        """Whether this describes a model made by `adpdm.quantize`."""
        return self.quant_config is not None

    @property
    def format_version(self) -> int:
        """Of a checkpoint with this config."""
        return CALIBRATED_FORMAT if self.is_calibrated else UNCALIBRATED_FORMAT

    def _take_from_calibration(self) -> None:
        if not isinstance(self.quant_config, dict):
            raise ValueError(
                f"quantization_config: quant_config must be the settings as a dict, got {self.quant_config!r}"
            )
        if type(self.num_steps) is not int or not 1 <= self.num_steps <= MAX_STEPS:
            raise ValueError(
                f"quantization_config: num_steps must be an integer in [1, {MAX_STEPS}], "
                f"got {self.num_steps!r}"
            )
        if self.layers is None:
            raise ValueError("quantization_config: layers must list the calibrated layers, got None")
        settings = QuantConfig.from_dict(self.quant_config)
        settings.groups_per_layer(self.num_steps)
        self.weight_bits, self.activation_bits = settings.weight_bits, settings.activation_bits
        self.activation_scales = "static"
        self.modules_to_not_convert = settings.modules_to_not_convert

    def _check_choices(self, calibrated: bool) -> None:
        _bits("weight_bits", self.weight_bits)
        if self.activation_bits is not None:
            _bits("activation_bits", self.activation_bits, " or None")
        if self.activation_scales not in get_args(ActivationScales):
            raise ValueError(
                "AdpdmConfig: activation_scales must be 'dynamic' or 'static', "
                f"got {self.activation_scales!r}"
            )
        if self.activation_scales == "static" and not calibrated:
            raise ValueError(
                "AdpdmConfig: static activation scales need calibration, which loading cannot do; load the "
                "model without quantization_config and call adpdm.quantize(pipe), or ask for 'dynamic'"
            )
        names = self.modules_to_not_convert
        names = () if names is None else names
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) and n for n in names):
            raise ValueError(
                f"AdpdmConfig: modules_to_not_convert must be a list of names or patterns, got {names!r}"
            )
        self.modules_to_not_convert = tuple(names)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of `to_dict`; unknown keys and keys that do not belong together are errors."""
        if not isinstance(config_dict, dict):
            raise ValueError(f"quantization_config: wanted a dict, got {type(config_dict).__name__}")
        keys, calibrated = set(config_dict), bool(CALIBRATED_KEYS & set(config_dict))
        if config_dict.get("quant_method", Method.ADPDM.value) == Method.ADPDM.value:
            required = calibrated or config_dict.get("layers") is not None
            _check_version(config_dict.get("format_version"), calibrated, required)
            known = COMMON_KEYS | (CALIBRATED_KEYS if calibrated else CHOICE_KEYS)
            if keys - known:
                raise ValueError(f"quantization_config: unknown keys {sorted(keys - known, key=str)}")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; diffusers serialises this at every load."""
        common = {
            "quant_method": Method.ADPDM.value,
            "format_version": self.format_version,
            "layers": copy.deepcopy(self.layers),
        }
        if self.is_calibrated:
            found = {"quant_config": copy.deepcopy(self.quant_config), "num_steps": self.num_steps}
            # Only where there is something to say, as checkpoints from before do not have these.
            equalized = {"equalized": list(self.equalized)} if self.equalized else {}
            corrects = {"corrects_prediction": True} if self.corrects_prediction else {}
            return {**common, **found, **equalized, **corrects}
        return {
            **common,
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "activation_scales": self.activation_scales,
            "modules_to_not_convert": list(self.modules_to_not_convert or ()),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What diffusers prints of a config: all of it."""
        return self.to_dict()

    def with_layers(self, layers: list[Row] | None) -> AdpdmConfig:
        """A copy with the record of what was quantized."""
        changed = copy.deepcopy(self)
        changed.layers = layers
        return changed


def choose_layers(model: nn.Module, config: AdpdmConfig, keep_in_fp32: Sequence[str]) -> list[Row]:
    """The layers of a float model that `config` quantizes without calibration, one entry each.

    Args:
        keep_in_fp32: parts of dotted names that the model's class wants in float32; they stay float.

    Raises:
        ValueError: for a pattern that matches no layer, or if no layer is left.
    """
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if type(m) in LAYER_CLASSES}
    kept = excluded(layers, config.modules_to_not_convert or ())
    kept |= {name for pattern in CAST_TO_WEIGHT for name in fnmatch.filter(layers, pattern)}
    kept |= {name for name in layers if set(name.split(".")) & set(keep_in_fp32)}
    rows = [_row(name, layer, config) for name, layer in layers.items() if name not in kept]
    if not rows:
        raise ValueError("no layer left to quantize: every Conv2d and Linear is excluded")
    return rows


def _row(name: str, layer: nn.Conv2d | nn.Linear, config: AdpdmConfig) -> Row:
    careful = name in INPUT_OUTPUT_NAMES or any(fnmatch.fnmatchcase(name, p) for p in EMBEDDING_PATTERNS)
    return {
        "name": name,
        "weight_bits": MAX_BITS if careful else config.weight_bits,
        "activation_bits": None if careful or not runs_on_kernels(layer) else config.activation_bits,
    }


def calibrated_row(layer: LayerInfo) -> Row:
    """The entry of a layer that was calibrated; of rotations only where there are such."""
    assert layer.bits is not None
    row = {"name": layer.name, "weight_bits": layer.bits[0], "activation_bits": layer.bits[1]}
    rotation = {"hadamard": layer.hadamard} if layer.hadamard else {}
    return {**row, "split": layer.split, **rotation}


def check_rotation(row: Row, layer: nn.Conv2d | nn.Linear) -> None:
    """Refuse an entry whose rotation its layer cannot have.

    Raises:
        ValueError: it is none of the blocks that divide the input channels of a linear layer.
    """
    if "hadamard" not in row:
        return
    block = row["hadamard"]
    fits = type(block) is int and block in BLOCKS and isinstance(layer, nn.Linear)
    if not fits or layer.in_features % block != 0:
        raise ValueError(
            f"adpdm checkpoint: hadamard of layer {row['name']!r} must be one of {BLOCKS} that divides the "
            f"input channels of a linear layer, got {block!r} for a weight {tuple(layer.weight.shape)}"
        )


def _check_version(version: object, calibrated: bool, required: bool) -> None:
    """Refuse other formats by number; only what a user asks for, a config without layers, needs none."""
    wanted = CALIBRATED_FORMAT if calibrated else UNCALIBRATED_FORMAT
    if (version is not None or required) and (type(version) is not int or version != wanted):
        raise ValueError(
            f"quantization_config: this adpdm reads format_version {wanted}, got {version!r}; "
            "install the version that wrote the checkpoint, or quantize again"
        )


def _checked_layers(layers: Any, keys: set[str]) -> list[Row] | None:
    """The entries as they are, after a look at their form; whether they fit a model, `stored_layer` says."""
    if layers is None:
        return None
    if not isinstance(layers, list | tuple):
        raise ValueError(f"quantization_config: layers must be a list, got {type(layers).__name__}")
    names: set[str] = set()
    for row in layers:
        known = keys | OPTIONAL_LAYER_KEYS if keys == CALIBRATED_LAYER_KEYS else keys
        if not isinstance(row, dict) or not keys <= set(row) <= known:
            got = sorted(row, key=str) if isinstance(row, dict) else repr(row)
            raise ValueError(f"adpdm checkpoint: a layer must have the keys {sorted(keys)}, got {got}")
        name = row["name"]
        if not isinstance(name, str) or name in names:
            raise ValueError(f"adpdm checkpoint: each layer needs a name of its own, got {name!r}")
        names.add(name)
    return list(layers)


def _checked_names(names: Any) -> tuple[str, ...]:
    """Names of equalized modules."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"quantization_config: equalized must be a list of names, got {names!r}")
    return tuple(names)


def _checked_switch(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"quantization_config: {name} must be true or false, got {value!r}")
    return value


def _bits(name: str, value: object, also: str = "") -> None:
    if type(value) is not int or not MIN_BITS <= value <= MAX_BITS:
        raise ValueError(
            f"AdpdmConfig: {name} must be an integer in [{MIN_BITS}, {MAX_BITS}]{also}, got {value!r}"
        )
