"""Chooses the timesteps at which calibration images are generated, and measures how well they cover all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .config import QuantConfig

VISIT_BONUS_NATS = 1.5  # eta of method.md section 7, on the un-normalised entropy
MMD_POINTS = 2048  # memory goes by their square: 130 MB
MMD_COLUMNS = 1024  # numbers of a sample at a time: 17 MB of MMD_POINTS
NORMAL_MEAN, NORMAL_SPREAD = 0.4, 0.4  # PTQ4DM's N(0.4 T, 0.4 T), counted from the noisy end


@dataclass
class TimestepSelector:
    """Picks one step index per round by the selection of the config, and remembers why.

    Source: method.md section 7. `srm` maximises mean normalised entropy + eta / (visits + 1).
    """

    config: QuantConfig
    num_rounds: int
    num_steps: int  # T
    visits: list[int] = field(default_factory=list)  # [T]
    trace: list[dict[str, Any]] = field(default_factory=list)  # one row per round

    def __post_init__(self) -> None:
        if not self.visits:
            self.visits = [0] * self.num_steps

    @property
    def first_allowed(self) -> int:
        """First step index that `exclude_first` leaves selectable."""
        # 0.14 of 50 is a little more than 7 in floating point.
        excluded = math.ceil(self.config.exclude_first * self.num_steps - 1e-9)
        return min(excluded, self.num_steps - 1)

    def choose(self, entropy: Tensor) -> int:
        """Return the step index of the next round; entropy [T] is the mean over layers of H(pi_k) / ln G."""
        round_index = len(self.trace)
        bonus = VISIT_BONUS_NATS / math.log(max(self.config.num_groups, 2))
        entropy = entropy.cpu()
        score = entropy.double() + bonus / (torch.tensor(self.visits, dtype=torch.float64, device="cpu") + 1)
        if self.config.selection == "srm":
            allowed = score[self.first_allowed :]
            step = self.first_allowed + int(allowed.argmax())
        else:
            step = self._draw(round_index)
        self.trace.append(
            {
                "round": round_index,
                "step_index": step,
                "entropy": [round(float(e), 6) for e in entropy],
                "score": [round(float(s), 6) for s in score],
                "visits": list(self.visits),
            }
        )
        self.visits[step] += 1
        return step

    def _draw(self, round_index: int) -> int:
        first, span = self.first_allowed, self.num_steps - self.first_allowed
        if self.config.selection == "uniform":
            return first + (round_index * span) // self.num_rounds
        # A generator per round, so that a resumed run draws what the uninterrupted one would have.
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + round_index)
        if self.config.selection == "random":
            return first + int(torch.randint(0, span, (1,), generator=generator, device="cpu"))
        draw = NORMAL_MEAN * self.num_steps + NORMAL_SPREAD * self.num_steps * float(
            torch.randn(1, generator=generator, device="cpu")
        )
        return min(max(round(draw), first), self.num_steps - 1)


def fixed_visits(config: QuantConfig, num_rounds: int, num_steps: int) -> list[int]:
    """Visits per step [T] of a selection without a search, where `srm` means every step once."""
    if config.selection == "srm":
        return [1] * num_steps
    selector = TimestepSelector(config, num_rounds, num_steps)
    for _ in range(num_rounds):
        selector.choose(torch.zeros(num_steps, device="cpu"))
    return selector.visits


def mmd_trace(samples: Tensor, chosen: Sequence[int]) -> list[float]:
    """Maximum mean discrepancy between the samples of all steps and of the chosen ones, after every round.

    Args:
        samples: [M, N, *] inputs of the denoiser at every call; the first MMD_POINTS // M images count.
        chosen: call of each round, repetitions count.
    Returns: biased estimate with an RBF kernel, bandwidth by the median heuristic; 0 when the sets agree.
    Source: method.md section 7; reported because the surrogate of the selection only stands for it.
    """
    steps = samples.shape[0]
    images = max(1, min(samples.shape[1], MMD_POINTS // steps))
    distance = _squared_distances(samples[:, :images].flatten(0, 1).flatten(1))
    kernel = torch.exp(-distance / distance[distance > 0].median().clamp_min(1e-12))
    step_kernel = kernel.view(steps, images, steps, images).mean((1, 3)).cpu()  # [T, T]
    visits = step_kernel.new_zeros(steps)
    trace = []
    for round_index, step in enumerate(chosen):
        visits[step] += 1
        weight = 1.0 / steps - visits / (round_index + 1)
        trace.append(max(float(weight @ step_kernel @ weight), 0.0) ** 0.5)
    return trace


def _squared_distances(points: Tensor) -> Tensor:
    """Between all pairs of points [P, D], [P, P] f64; float64 copies of MMD_COLUMNS numbers at a time."""
    products = points.new_zeros(len(points), len(points), dtype=torch.float64)
    for part in points.split(MMD_COLUMNS, 1):
        columns = part.double()
        products.addmm_(columns, columns.t())
    squares = products.diagonal().clone()
    return (squares[:, None] + squares - 2 * products).clamp_min_(0).fill_diagonal_(0)
