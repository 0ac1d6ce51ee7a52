"""Differentiable search over group importance weights: mixtures of quantizers, trained against the full precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import QuantConfig
from .quantizers import ActivationQuantizer, Importance
from .quantizers.activation import Mode
from .step import StepState

WARN_BELOW_MAX_IMPORTANCE = (
    0.9  # hardening a softer choice than this changes the network (method.md section 4)
)
FINAL_LEARNING_RATE = 0.1  # of the start, reached linearly


@dataclass(frozen=True)
class Batch:
    """Denoiser inputs at one step with the target of the loss."""

    step_index: int
    timestep: Tensor  # []
    sample: Tensor  # [B, C, H, W], as the denoiser sees it
    target: Tensor  # [B, C, H, W], the full-precision noise prediction (or the noise)
    conditioning: dict[str, Tensor]  # [B, ...] each


@dataclass(frozen=True)
class SearchOutcome:
    """What hardening cost and how decided the search was."""

    soft_loss: float  # relative squared error of the mixture on held-out batches
    hard_loss: float  # the same after hardening and re-fitting
    max_importance: float  # mean over layers and steps of max pi before hardening
    moved: float  # share of (layer, step) pairs whose group changed against the start

    @property
    def gap_db(self) -> float:
        """Loss of hardening in dB, positive when the hard network is worse."""
        return 10 * math.log10(max(self.hard_loss, 1e-30) / max(self.soft_loss, 1e-30))

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "gap_db": self.gap_db}


class GroupSearch:
    """One search over all layers of a denoiser whose quantizers already hold a starting partition.

    Args:
        denoiser: swapped, in fake-quantized weights.
        quantizers: of all layers.
        predict: runs the denoiser on a batch and returns the noise prediction.
    """

    def __init__(
        self,
        quantizers: Sequence[ActivationQuantizer],
        step: StepState,
        config: QuantConfig,
        predict: Callable[[Batch], Tensor],
    ) -> None:
        self.quantizers, self.step, self.config, self.predict = quantizers, step, config, predict
        self.settings = config.search
        self.start_tables = [q.table.clone() for q in quantizers]
        shared = self._importance(quantizers[0]) if config.shared_groups else None
        for quantizer in quantizers:
            quantizer.learn()
            quantizer.importance = shared or self._importance(quantizer)
        self.set_mode(Mode.MIXTURE)
        self.optimizer = torch.optim.Adam(self._parameter_groups())
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps_done = 0

    def _importance(self, quantizer: ActivationQuantizer) -> Importance:
        return Importance(quantizer.table, quantizer.num_groups, self.settings.initial_logit)

    @property
    def importances(self) -> list[Importance]:
        """The logit tables, each once."""
        unique = {id(q.importance): q.importance for q in self.quantizers}
        return [i for i in unique.values() if i is not None]

    def _parameter_groups(self) -> list[dict[str, Any]]:
        rate = self.settings.learning_rate or (3e-3 if self.config.activation_bits == 8 else 5e-3)
        ranges = [p for q in self.quantizers for p in (q.log_scale, q.lower)]
        logits = [i.logits for i in self.importances]
        return [
            {"params": ranges, "lr": rate},
            {"params": logits, "lr": self.settings.logits_learning_rate},
        ]

    def set_mode(self, mode: Mode) -> None:
        for quantizer in self.quantizers:
            quantizer.mode = mode

    def entropy(self) -> Tensor:
        """Mean over layers of H(pi_k) / ln G for every step, [T]."""
        return torch.stack([i.normalized_entropy() for i in self.importances]).mean(0)

    def train_step(self, batch: Batch) -> float:
        """One optimizer step on one batch; returns the relative squared error."""
        fraction = self.steps_done / self.settings.num_steps
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * (1 - (1 - FINAL_LEARNING_RATE) * min(fraction, 1.0))
        loss = self.relative_loss(batch)
        mixing = self.quantizers[0].mode is Mode.MIXTURE
        ramp = self.settings.entropy_weight * min(fraction, 1.0)
        total = loss + ramp * self.entropy().mean() if mixing else loss
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.steps_done += 1
        return float(loss.detach())

    def relative_loss(self, batch: Batch) -> Tensor:
        """Squared error of the prediction relative to the energy of the target, []."""
        self.step.set_step(batch.step_index)
        error = (self.predict(batch) - batch.target).square().mean()
        return error / batch.target.square().mean().clamp_min(1e-12)

    @torch.no_grad()
    def mean_loss(self, batches: Sequence[Batch]) -> float:
        return sum(float(self.relative_loss(b)) for b in batches) / len(batches)

    def max_importance(self) -> float:
        """Mean over layers and steps of the largest importance weight."""
        with torch.no_grad():
            peaks = [torch.softmax(i.logits, 1).amax(1).mean() for i in self.importances]
            return float(torch.stack(peaks).mean())

    def harden(self) -> float:
        """Fix every step to its most important group; returns the share of steps that moved from the start."""
        moved = total = 0
        for quantizer, start in zip(self.quantizers, self.start_tables, strict=True):
            assert quantizer.importance is not None
            table = quantizer.importance.logits.detach().argmax(1).to(torch.int32)
            moved += int((table != start).sum())
            total += table.numel()
            quantizer.table.copy_(table)
        self.set_mode(Mode.FAKE)
        return moved / total

    def finish(self) -> None:
        """Turn what was learned into scales, zero-points and tables; nothing trainable remains."""
        for quantizer in self.quantizers:
            quantizer.settle()
            quantizer.importance = None

    # ---- state, for resuming ----

    def state(self) -> dict[str, Tensor]:
        """Everything that training changed, as flat tensors."""
        tensors: dict[str, Tensor] = {}
        for i, parameter in enumerate(self._parameters()):
            tensors[f"parameter.{i}"] = parameter.detach().clone()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{i}.{key}"] = value.clone()
        return tensors

    def load_state(self, tensors: dict[str, Tensor], steps_done: int) -> None:
        """Inverse of `state`."""
        self.steps_done = steps_done
        with torch.no_grad():
            for i, parameter in enumerate(self._parameters()):
                parameter.copy_(tensors[f"parameter.{i}"])
                prefix = f"adam.{i}."
                moments = {k[len(prefix) :]: v.clone() for k, v in tensors.items() if k.startswith(prefix)}
                if moments:
                    self.optimizer.state[parameter] = moments

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]
