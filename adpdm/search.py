"""Differentiable search over group importance weights: mixtures of quantizers against the full precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import QuantConfig
from .fingerprint import fingerprint_of
from .processes import ALONE, Processes
from .quantizers import ActivationQuantizer, Importance
from .quantizers.activation import Mode
from .trajectory import pick

WARN_BELOW_MAX_IMPORTANCE = 0.9  # hardening a softer choice changes the network (method.md section 6)
FINAL_LEARNING_RATE = 0.1  # of the start, reached linearly


class RowAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015) that leaves an element alone in steps in which it has no gradient.

    A batch shows one sampling step, so most rows of logits have no gradient in it and, once hardened, most
    groups. Plain Adam would go on moving them by momentum, ten learning rates for a single noisy visit.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(groups, {"betas": betas, "eps": 1e-8})
        for group in self.param_groups:
            for parameter in group["params"]:
                names = ("mean", "square", "visits")
                self.state[parameter] = {name: torch.zeros_like(parameter.data) for name in names}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every element that has a gradient."""
        for group in self.param_groups:
            (beta1, beta2), rate, eps = group["betas"], group["lr"], group["eps"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, grad = self.state[parameter], parameter.grad
                mean, square, visits = state["mean"], state["square"], state["visits"]
                seen = grad != 0
                visits += seen
                mean.copy_(torch.where(seen, mean.lerp(grad, 1 - beta1), mean))
                square.copy_(torch.where(seen, square.lerp(grad * grad, 1 - beta2), square))
                count = visits.clamp_min(1)
                spread = (square / (1 - beta2**count)).sqrt() + eps
                update = mean / (1 - beta1**count) / spread
                parameter.sub_(torch.where(seen, rate * update, 0.0))


@dataclass(frozen=True)
class Batch:
    """Denoiser inputs at one step with the target of the loss."""

    timestep: Tensor  # [], of the scheduler
    sample: Tensor  # [B, *], as the denoiser sees it
    target: Tensor  # [B, *], the full-precision noise prediction (or the noise)
    weight: float  # of the step, 1 on average
    conditioning: dict[str, Any]  # [B, ...] each

    def parts(self, size: int) -> list[Batch]:
        """The batch cut into batches of at most `size` images."""
        parts = [slice(first, first + size) for first in range(0, len(self.sample), size)]
        return [
            replace(
                self, sample=self.sample[i], target=self.target[i], conditioning=pick(self.conditioning, i)
            )
            for i in parts
        ]


@dataclass(frozen=True)
class SearchOutcome:
    """What hardening cost and how decided the search was."""

    start_loss: float  # of the partition that the search started from
    soft_loss: float  # relative squared error of the mixture on held-out batches
    hard_loss: float  # the same after hardening and re-fitting
    start_error: float  # squared error of held-out final samples, of the partition that was started from
    hard_error: float  # the same after hardening and re-fitting
    max_importance: float  # mean over layers and steps of max pi before hardening
    is_kept: bool  # False where it ended worse by either than it started, and the start was put back
    moved: float  # share of (layer, step) pairs whose group changed against the start

    @property
    def is_better(self) -> bool:
        """Whether it ended no worse than it started, by loss and by samples."""
        return self.hard_loss <= self.start_loss and self.hard_error <= self.start_error

    @property
    def gap_db(self) -> float:
        """Loss of hardening in dB, positive when the hard network is worse."""
        return 10 * math.log10(max(self.hard_loss, 1e-30) / max(self.soft_loss, 1e-30))

    @property
    def sample_gain_db(self) -> float:
        """What the search gains on the final samples of held-out images in dB, negative when it loses."""
        return 10 * math.log10(max(self.start_error, 1e-30) / max(self.hard_error, 1e-30))

    @property
    def warnings(self) -> list[str]:
        """What a user should know of it, in sentences."""
        told = []
        if not self.is_better:
            told.append(
                f"the search ended with a held-out loss of {self.hard_loss:.3g}, from {self.start_loss:.3g}, "
                f"and {self.sample_gain_db:+.2f} dB on held-out samples, against the dynamic-programming "
                "partition it started from"
                f"{', and is kept all the same' if self.is_kept else ', which is used'}; "
                "try more search steps"
            )
        if self.max_importance < WARN_BELOW_MAX_IMPORTANCE:
            told.append(
                "the search ended undecided: mean largest importance weight "
                f"{self.max_importance:.2f}, wanted at least {WARN_BELOW_MAX_IMPORTANCE}; "
                "more search steps or a larger entropy_weight harden it"
            )
        return told

    def to_dict(self) -> dict[str, float | None]:
        """Plain JSON types; what a diverged search left without a finite value is None."""
        values = {**asdict(self), "gap_db": self.gap_db, "sample_gain_db": self.sample_gain_db}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


class GroupSearch:
    """One search over all layers of a denoiser whose quantizers already hold a starting partition.

    Args:
        quantizers: of all layers of a swapped denoiser with fake-quantized weights, in fake mode.
        predict: runs the denoiser on a batch and returns the noise prediction.
        held_out: batches that the starting partition is judged on.
        processes: that share the images of an optimizer step, and the batches that a partition is judged on.
    """

    def __init__(
        self,
        quantizers: Sequence[ActivationQuantizer],
        config: QuantConfig,
        predict: Callable[[Batch], Tensor],
        held_out: Sequence[Batch],
        processes: Processes = ALONE,
    ) -> None:
        self.quantizers, self.predict, self.processes = quantizers, predict, processes
        self.settings = config.search
        self.start_tables = [q.table.clone() for q in quantizers]
        self._start = [(q.scale.clone(), q.zero_point.clone()) for q in quantizers]
        self.start_loss = self.mean_loss(held_out)  # of the hard partition, before anything is learned
        shared = self._importance(quantizers[0]) if config.shared_groups else None
        for quantizer in quantizers:
            quantizer.learn()
            quantizer.importance = shared or self._importance(quantizer)
        self.set_mode(Mode.MIXTURE)
        self.optimizer = RowAdam(self._parameter_groups())
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
        ranges = [p for q in self.quantizers for p in (q.low_factor, q.high_factor)]
        logits = [i.logits for i in self.importances]
        return [
            {"params": ranges, "lr": self.settings.learning_rate},
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
        loss = self._take_gradients(batch)
        if self.quantizers[0].mode is Mode.MIXTURE:
            self._decide(self.settings.entropy_weight * min(fraction, 1.0))
        self.optimizer.step()
        self.steps_done += 1
        return loss

    def _decide(self, weight: float) -> None:
        """Take every row of logits one step down the gradient of its own entropy.

        Beside Adam, as decoupled weight decay is (Loshchilov and Hutter 2019): Adam divides out the size of a
        gradient, so inside it rows that no batch has shown would harden at full rate whatever the weight is.
        """
        logits = [importance.logits for importance in self.importances]
        total = torch.stack([i.normalized_entropy().sum() for i in self.importances]).sum()
        rate = self.optimizer.param_groups[-1]["lr"] * weight
        with torch.no_grad():
            for rows, gradient in zip(logits, torch.autograd.grad(total, logits), strict=True):
                rows.sub_(rate * gradient)

    def _take_gradients(self, batch: Batch) -> float:
        """Give parameters the gradients of a batch's relative loss, whose parts processes share; the loss."""
        size = -(-len(batch.sample) // self.settings.parts)
        parts, parameters = batch.parts(size), self._parameters()
        energy = self._energy(batch)

        def gradients(part: Batch) -> list[Tensor]:
            loss = self._error(part) / energy * (len(part.sample) / len(batch.sample))
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))
            return [loss, *zeros]

        sums = [sum(x[1:], x[0]) for x in zip(*self.processes.map(parts, gradients), strict=True)]
        for parameter, gradient in zip(parameters, sums[1:], strict=True):
            parameter.grad = gradient
        return float(sums[0])

    def relative_loss(self, batch: Batch) -> Tensor:
        """Squared error of the prediction relative to the energy of the target, weighted by the step, []."""
        return self._error(batch) / self._energy(batch)

    def _error(self, batch: Batch) -> Tensor:
        return batch.weight * (self.predict(batch) - batch.target).square().mean()

    @staticmethod
    def _energy(batch: Batch) -> Tensor:
        return batch.target.square().mean().clamp_min(1e-12)

    @torch.no_grad()
    def mean_loss(self, batches: Sequence[Batch]) -> float:
        losses = self.processes.map(batches, lambda batch: [self.relative_loss(batch)])
        return sum(float(loss) for (loss,) in losses) / len(batches)

    def max_importance(self) -> float:
        """Mean over layers and steps of the largest importance weight."""
        with torch.no_grad():
            peaks = [torch.softmax(i.logits, 1).amax(1).mean() for i in self.importances]
            return float(torch.stack(peaks).mean())

    def harden(self) -> float:
        """Fix every step to its most important group; returns the share of steps that moved."""
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

    def put_back(self) -> None:
        """Undo the search: the ranges and tables that it started from."""
        for quantizer, (scale, zero_point), table in zip(
            self.quantizers, self._start, self.start_tables, strict=True
        ):
            quantizer.scale, quantizer.zero_point = scale, zero_point
            quantizer.table.copy_(table)

    # ---- state, for resuming ----

    def start_facts(self) -> dict[str, str]:
        """Fingerprints of what it started from: factors of ranges and logits are relative to that."""
        scales, zero_points = zip(*self._start, strict=True)
        tensors: dict[str, Sequence[Tensor]] = {
            "groups": self.start_tables,
            "scales": scales,
            "zero-points": zero_points,
        }
        facts = {k: fingerprint_of((str(i), x) for i, x in enumerate(v)) for k, v in tensors.items()}
        return {**facts, "bits": fingerprint_of([], str([q.num_bits for q in self.quantizers]))}

    def state(self) -> dict[str, Tensor]:
        """Everything that training changed, as flat tensors."""
        tensors: dict[str, Tensor] = {}
        for i, parameter in enumerate(self._parameters()):
            tensors[f"parameter.{i}"] = parameter.detach().clone()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{i}.{key}"] = value.clone()
        return tensors

    def load_state(self, tensors: dict[str, Tensor], steps_done: int) -> None:
        """Inverse of `state`."""
        self.steps_done = steps_done
        with torch.no_grad():
            for i, parameter in enumerate(self._parameters()):
                parameter.copy_(tensors[f"parameter.{i}"])
                for key, value in self.optimizer.state[parameter].items():
                    value.copy_(tensors[f"adam.{i}.{key}"])

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]
