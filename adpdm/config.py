"""The settings of a quantization: frozen dataclasses, checked when they are made, JSON in and out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

Grouping = Literal["shared", "uniform", "per_step", "dp", "search"]
Selection = Literal["srm", "uniform", "normal", "random"]
TimestepPolicy = Literal["nearest", "error"]
RangeMethod = Literal["clip_weighted", "mse", "minmax"]
Equalization = Literal["auto", "on", "off"]
Hadamard = Literal["auto", "on", "off"]
AttentionProducts = Literal["auto", "int8", "float"]
Rounding = Literal["nearest", "gptq"]
Objective = Literal["teacher", "noise"]

MIN_BITS, MAX_BITS = 2, 8
MAX_GROUPS = 256  # more than any use was found for
MAX_GUIDANCE = 100.0  # more than any image was found to bear
MAX_LOGIT = 80.0  # exp of the difference of two such still is a float32


@dataclass(frozen=True)
class SearchConfig:
    """Differentiable search over group importance weights (method.md section 6).

    Args:
        num_steps: optimizer steps on mixtures, spread evenly over the selection rounds.
        refit_steps: optimizer steps after hardening, which re-fit each group on its own steps.
        batch_size: images per optimizer step.
        learning_rate: of the factors on the ends of the ranges; above 3e-3 they wander more than they learn.
        logits_learning_rate: of the group logits, which must travel further than a scale does.
        entropy_weight: lambda of J = J_d + lambda * J_e: in an optimizer step each row of logits moves by
            lambda times the gradient of its entropy, and an element that the batch shows by about 1, both
            times `logits_learning_rate`.
        initial_logit: how far the logits start towards the dynamic-programming group.
        replay: share of optimizer steps on steps of the cached trajectories, so that every
            row of the logits is trained, not only the selected ones.
        objective: `teacher` (the full-precision noise prediction) or `noise` (the paper's form).
        keep_if_worse: keep a search that ends worse than its start on held-out images, as the paper does.
        parts: of an optimizer step's images, computed one after the other, or each by another of the
            processes that share a calibration. It changes low bits of the gradients, so it is a setting.
    """

    num_steps: int = 160
    refit_steps: int = 40
    batch_size: int = 8
    learning_rate: float = 1e-3
    logits_learning_rate: float = 0.2
    entropy_weight: float = 5.0
    initial_logit: float = 1.0
    replay: float = 0.75
    objective: Objective = "teacher"
    keep_if_worse: bool = False
    parts: int = 1

    def __post_init__(self) -> None:
        for name in ("num_steps", "refit_steps", "batch_size", "parts"):
            _integer(f"search.{name}", getattr(self, name))
        _at_least("search.num_steps", self.num_steps, 1)
        _at_least("search.refit_steps", self.refit_steps, 0)
        _at_least("search.batch_size", self.batch_size, 1)
        _within("search.parts", self.parts, 1, self.batch_size)
        _within("search.replay", self.replay, 0.0, 1.0)
        _at_least("search.entropy_weight", self.entropy_weight, 0.0)
        for name in ("learning_rate", "logits_learning_rate"):
            _at_least(f"search.{name}", getattr(self, name), 0.0)
        _within("search.initial_logit", self.initial_logit, -MAX_LOGIT, MAX_LOGIT)
        _one_of("search.objective", self.objective, get_args(Objective))
        _one_of("search.keep_if_worse", self.keep_if_worse, (True, False))


@dataclass(frozen=True)
class QuantConfig:
    """What to quantize, how finely, and how to find the groups (method.md sections 2 to 8).

    Args:
        weight_bits: 2 to 8, per output channel, symmetric.
        activation_bits: 2 to 8, per tensor and group, asymmetric.
        num_groups: G, quantization functions per layer; at most the number of inference steps.
        grouping: how timesteps are partitioned; `search` is the paper's method.
        range_method: a group's range has the least squared error on its histogram, clipped values counting
            more than rounded ones (`clip_weighted`, method.md section 4) or like them (`mse`), or covers all
            that was seen (`minmax`); the latter two are the baselines of the literature.
        weight_rounding: weights to `nearest`, or so that the layer's outputs on its own quantized inputs are
            nearest (`gptq`); those of 8 bits always to nearest.
        equalization: even out the channels of inputs by factors that fold into what is before (equalize.py):
            `auto` where inputs have fewer than 8 bits and no more than weights, `on`, or `off`. Layers that
            changed take no adapters.
        hadamard: rotate the input channels of linear layers by Hadamard matrices, which spreads what stands
            out in weights and inputs: `auto` where either has fewer than 8 bits, `on`, or `off`.
            On CPUs norms and attention before such layers rotate what they end in; elsewhere it costs passes.
        attention: what attention multiplies on a CPU, in blocks that run fused: codes of 8 bits (`int8`),
            floats (`float`), or what takes less time there (`auto`: int8 with AVX-512 VNNI or AVX-VNNI). Can
            be changed later by `adpdm.nn.fuse_blocks`.
        raised_layers: share of the multiply-accumulates that may have 8-bit activations, and share of the
            weights that may have 8 bits, in the layers where fewer bits were measured to cost most.
        weigh_steps: let a step's error count by what it was measured to do to the final sample; otherwise all
            calls count alike.
        shared_groups: one partition for the whole network instead of one per layer.
        num_inference_steps: of the sampler that is calibrated for; T, the number of different timesteps it
            visits, is another one with some schedulers.
        guidance_scale: of the classifier-free guidance that the model will be sampled under, 1 for none.
            Calibration images are generated under it, and both predictions of every step are calibrated.
        selection: how timesteps of calibration images are chosen.
        calibration_images: images generated for the search in total, in rounds of `round_size`.
        histogram_images: full trajectories whose activations fill the histograms.
        exclude_first: fraction of the trajectory, from the noisy end, that is never selected.
        input_output_bits: 8 quantizes the first and last layer too; None keeps them in full precision.
        split_skip_connections: quantize the two halves of a skip concatenation separately.
        modules_to_not_convert: names that stay in full precision: of layers, of modules with layers inside,
            or any part of a dotted name; shell patterns.
        correct_bias: remove the mean error that quantization adds to each output channel.
        correct_prediction: take out of every prediction the part of the quantization error that is a fixed
            combination of prediction and sample at its step (correction.py).
        timestep_policy: for timesteps that were not calibrated: the group of the `nearest`, or an `error`.
        seed: of every random draw, 0 to 2^39 - 1 to calibrate with.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    num_groups: int = 8
    grouping: Grouping = "search"
    range_method: RangeMethod = "clip_weighted"
    weight_rounding: Rounding = "gptq"
    equalization: Equalization = "auto"
    hadamard: Hadamard = "auto"
    attention: AttentionProducts = "auto"
    raised_layers: float = 0.05
    weigh_steps: bool = True
    shared_groups: bool = False
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    selection: Selection = "srm"
    calibration_images: int = 128
    round_size: int = 16
    histogram_images: int = 16
    exclude_first: float = 0.0
    input_output_bits: Literal[8] | None = None
    split_skip_connections: bool = True
    modules_to_not_convert: tuple[str, ...] = ()
    correct_bias: bool = True
    correct_prediction: bool = True
    timestep_policy: TimestepPolicy = "nearest"
    seed: int = 0
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        _names("modules_to_not_convert", self.modules_to_not_convert)
        object.__setattr__(self, "modules_to_not_convert", tuple(self.modules_to_not_convert))
        if not isinstance(self.search, SearchConfig):
            raise ValueError(f"search must be a SearchConfig, got {self.search!r}")
        for name in _INTEGERS:
            _integer(name, getattr(self, name))
        for name in _SWITCHES:
            _one_of(name, getattr(self, name), (True, False))
        _within("weight_bits", self.weight_bits, MIN_BITS, MAX_BITS)
        _within("activation_bits", self.activation_bits, MIN_BITS, MAX_BITS)
        _within("num_groups", self.num_groups, 1, MAX_GROUPS)
        for name in ("num_inference_steps", "calibration_images", "round_size", "histogram_images"):
            _at_least(name, getattr(self, name), 1)
        _within("raised_layers", self.raised_layers, 0.0, 1.0)
        _within("guidance_scale", self.guidance_scale, 0.0, MAX_GUIDANCE)
        _within("exclude_first", self.exclude_first, 0.0, 0.9)
        _one_of("grouping", self.grouping, get_args(Grouping))
        _one_of("range_method", self.range_method, get_args(RangeMethod))
        _one_of("weight_rounding", self.weight_rounding, get_args(Rounding))
        _one_of("equalization", self.equalization, get_args(Equalization))
        _one_of("hadamard", self.hadamard, get_args(Hadamard))
        _one_of("attention", self.attention, get_args(AttentionProducts))
        _one_of("selection", self.selection, get_args(Selection))
        _one_of("timestep_policy", self.timestep_policy, get_args(TimestepPolicy))
        if self.input_output_bits is not None:
            _integer("input_output_bits", self.input_output_bits)
        _one_of("input_output_bits", self.input_output_bits, (8, None))
        if self.grouping not in ("shared", "per_step") and self.num_groups > self.num_inference_steps:
            raise ValueError(
                f"num_groups must be at most num_inference_steps={self.num_inference_steps}, "
                f"got {self.num_groups}"
            )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Says to diffusers, which asks for `quant_method`, what `from_pretrained` was given."""
            if name == "quant_method":
                raise AttributeError(
                    "from_pretrained: quantization_config must be an adpdm.AdpdmConfig, got QuantConfig; "
                    "QuantConfig is for adpdm.quantize(pipe, config)"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def searches(self) -> bool:
        """Whether groups are searched for; one group for all steps leaves nothing to find."""
        return self.grouping == "search" and self.num_groups > 1

    @property
    def num_rounds(self) -> int:
        """How often a timestep is selected."""
        return -(-self.calibration_images // self.round_size)

    def groups_per_layer(self, num_steps: int) -> int:
        """G for T = `num_steps` after the grouping has had its say: 1 for `shared`, T for `per_step`.

        Raises:
            ValueError: for more groups than timesteps; rounding merges some with some schedulers.
        """
        if self.grouping == "shared":
            return 1
        if self.grouping == "per_step":
            return num_steps
        if self.num_groups > num_steps:
            raise ValueError(
                f"num_groups must be at most {num_steps}, the number of different timesteps that the "
                f"scheduler visits for num_inference_steps={self.num_inference_steps}; got {self.num_groups}"
            )
        return self.num_groups

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        values = asdict(self)
        values["modules_to_not_convert"] = list(self.modules_to_not_convert)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantConfig:
        """Inverse of `to_dict`; an unknown key is an error."""
        if not isinstance(values, dict):
            raise ValueError(f"QuantConfig: wanted the settings as a dict, got {values!r}")
        _check_known(cls, values)
        values = dict(values)
        if isinstance(values.get("search"), dict):
            _check_known(SearchConfig, values["search"])
            values["search"] = SearchConfig(**values["search"])
        return cls(**values)

    def replace(self, **changes: Any) -> QuantConfig:
        """Return a copy with some settings changed, checked again."""
        return replace(self, **changes)


_SWITCHES = ("weigh_steps", "shared_groups", "split_skip_connections", "correct_bias", "correct_prediction")
_INTEGERS = (
    "weight_bits",
    "activation_bits",
    "num_groups",
    "num_inference_steps",
    "calibration_images",
    "round_size",
    "histogram_images",
    "seed",
)


def _check_known(kind: type, values: dict[str, Any]) -> None:
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(values) - known, key=str)
    if unknown:
        raise ValueError(f"{kind.__name__}: unknown settings {unknown}; known are {sorted(known)}")


def _integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")


def _names(name: str, value: object) -> None:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name} must be a list of strings, got {value!r}")


def _within(name: str, value: float, low: float, high: float) -> None:
    _number(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def _at_least(name: str, value: float, low: float) -> None:
    _number(name, value)
    if not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if value == math.inf:
        raise ValueError(f"{name} must be finite, got {value}")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")
