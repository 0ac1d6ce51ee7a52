"""Activation quantizer: G quantization functions per tensor, the current one picked by the step state."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..qparams import MIN_SCALE, qparams_to_range, range_to_qparams
from ..reference import HISTOGRAM_BINS, signed_range
from ..step import StepState


class Mode(Enum):
    """What an activation quantizer does to what passes through, until its layer is frozen."""

    FLOAT = "float"  # nothing
    OBSERVE = "observe"  # record, pass on
    FAKE = "fake"  # quantize and dequantize by the current group
    MIXTURE = "mixture"  # importance-weighted sum over all groups

    @property
    def quantizes(self) -> bool:
        """Whether the layer computes with quantized values, its weight included."""
        return self in (Mode.FAKE, Mode.MIXTURE)


class Importance(nn.Module):
    """Group logits of every step: one table for a quantizer, or shared by all of them."""

    def __init__(self, table: Tensor, num_groups: int, initial_logit: float) -> None:
        """Start with `initial_logit` on the groups in table [T] i32, 0 elsewhere."""
        super().__init__()
        logits = torch.zeros(table.numel(), num_groups, device=table.device)
        logits[torch.arange(table.numel(), device=table.device), table.long()] = initial_logit
        self.logits = nn.Parameter(logits)  # [T, G] f32

    def weights(self, step_index: Tensor) -> Tensor:
        """Importance weights pi [G] of one step."""
        return torch.softmax(self.logits.index_select(0, step_index.clone())[0], 0)

    def normalized_entropy(self, steps: Tensor | None = None) -> Tensor:
        """H(pi_k) / ln G per step, [T] or [len(steps)]; 0 when there is one group only."""
        logits = self.logits if steps is None else self.logits.index_select(0, steps)
        if logits.shape[1] == 1:
            return logits.new_zeros(logits.shape[0])
        log_pi = torch.log_softmax(logits, 1)  # finite where softmax underflows: no 0 * log 0
        return -(log_pi.exp() * log_pi).sum(1) / math.log(logits.shape[1])


class ActivationQuantizer(nn.Module):
    """Per-tensor asymmetric quantizer with `num_groups` functions (method.md sections 2 and 3).

    After calibration it holds scale [G] f32 and zero_point [G] i32. While training it holds the ends of the
    range and their learned logarithmic factors [G] f32, from which both follow; `learn` and `settle` switch
    between the two. Factors, because ranges of layers differ by orders of magnitude and one learning rate has
    to suit all.
    """

    scale: Tensor  # [G] f32
    zero_point: Tensor  # [G] i32
    step: StepState

    def __init__(self, num_bits: int, num_groups: int, slot: int, step: StepState) -> None:
        super().__init__()
        self.num_bits, self.slot, self.mode = num_bits, slot, Mode.FLOAT
        self.__dict__["step"] = step  # by reference: the denoiser owns it, state_dict lists it once
        device = step.table.device
        self.register_buffer("scale", torch.ones(num_groups, device=device))
        self.register_buffer("zero_point", torch.zeros(num_groups, dtype=torch.int32, device=device))
        self.counts: Tensor | None = None  # [T, HISTOGRAM_BINS] i64
        self.extrema: Tensor | None = None  # [T, 2] f32
        self.low_factor: nn.Parameter | None = None  # range end = start * exp(factor)
        self.high_factor: nn.Parameter | None = None
        self._start: tuple[Tensor, Tensor] | None = None  # range ends [G] before learning
        self.importance: Importance | None = None

    @property
    def num_groups(self) -> int:
        return self.scale.numel()

    @property
    def group_index(self) -> Tensor:
        """Current group, [1] i32: a view of the step state, or a copy where that is on another device."""
        return self.step.group_index.narrow(0, self.slot, 1).to(self.scale.device)

    @property
    def is_beside_its_step(self) -> bool:
        """Whether `group_index` goes on showing the current group; not while group offloading parts them."""
        return self.step.group_index.device == self.scale.device

    @property
    def table(self) -> Tensor:
        """Group of every step, [T] i32, a view of the step state."""
        return self.step.record.table[:, self.slot]

    def forward(self, x: Tensor) -> Tensor:
        """x [*] float to x^ [*] of the same dtype, by the mode."""
        if self.mode is Mode.FLOAT:
            return x
        if self.mode is Mode.OBSERVE:
            assert self.counts is not None
            assert self.extrema is not None
            ops.observe(x, self.counts, self.extrema, self.step.step_index)
            return x
        scale, zero_point = self.qparams()
        bounds = signed_range(self.num_bits)
        if self.mode is Mode.FAKE:
            return ops.fake_quantize(x, scale, zero_point, self.group_index, *bounds)
        assert self.importance is not None
        pi = self.importance.weights(self.step.step_index)
        return ops.fake_quantize_mixture(x, scale, zero_point, pi, *bounds)

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x [*] under the current group: int8, same shape."""
        return ops.quantize(x, self.scale, self.zero_point, self.group_index, self.num_bits)

    def reaches(self, x: Tensor) -> Tensor:
        """Where x [*] float is within the current group's range, bool: where its gradient passes."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            bounds = signed_range(self.num_bits)
            value = ops.fake_quantize(x, self.scale, self.zero_point.float(), self.group_index, *bounds)
        return torch.autograd.grad(value, x, torch.ones_like(value))[0] != 0

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero-point [G] f32, differentiable while learning."""
        if self._start is None or self.low_factor is None or self.high_factor is None:
            return self.scale, self.zero_point.float()
        quant_min, quant_max = signed_range(self.num_bits)
        low = self._start[0] * self.low_factor.exp()
        high = self._start[1] * self.high_factor.exp()
        scale = ((high - low) / (quant_max - quant_min)).clamp_min(MIN_SCALE)
        return scale, quant_min - low / scale

    # ---- calibration ----

    def start_observing(self, num_steps: int) -> None:
        """Allocate an empty histogram per step."""
        device = self.scale.device
        self.counts = torch.zeros(num_steps, HISTOGRAM_BINS, dtype=torch.int64, device=device)
        nothing_seen = torch.tensor([math.inf, -math.inf], device="cpu").repeat(num_steps, 1)
        self.extrema = nothing_seen.to(device)
        self.mode = Mode.OBSERVE

    def set_ranges(self, low: Tensor, high: Tensor, table: Tensor) -> None:
        """Install group ranges [G] and the group of every step [T]; a new G replaces the old one."""
        scale, zero_point = range_to_qparams(low, high, self.num_bits)
        device = self.scale.device
        self.scale, self.zero_point = scale.to(device), zero_point.to(device)
        self.table.copy_(table)

    def ranges(self) -> tuple[Tensor, Tensor]:
        """Real values of the smallest and largest code of each group, [G] each."""
        return qparams_to_range(self.scale, self.zero_point, self.num_bits)

    def learn(self) -> None:
        """Turn scale and zero-point into parameters."""
        self._start = self.ranges()
        self.low_factor = nn.Parameter(torch.zeros_like(self.scale))
        self.high_factor = nn.Parameter(torch.zeros_like(self.scale))

    def settle(self) -> None:
        """Turn the parameters back into scale and zero-point, as the integer kernels will see them."""
        with torch.no_grad():
            scale, zero_point = self.qparams()
            quant_min, quant_max = signed_range(self.num_bits)
            self.scale = scale.clamp_min(MIN_SCALE).clone()
            self.zero_point = zero_point.clamp(quant_min, quant_max).round().to(torch.int32)
        self.low_factor = self.high_factor = self._start = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow .to() to another device but not to another dtype: scales stay float32."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"bits={self.num_bits}, groups={self.num_groups}"
