"""Replays cached trajectories through the full-precision denoiser, to show its layers their inputs again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .nn import QuantLayer, input_of
from .processes import ALONE, Processes
from .progress import Progress
from .quantizers.activation import Mode
from .schedulers import in_channels_last
from .trajectory import Sampler, Trajectory

Observer = Callable[[Tensor], None]  # gets an input of a layer


@dataclass(frozen=True)
class Replay:
    """All images of a trajectory at calls that are chosen by how much an error counts there.

    Args:
        layers: of the sampler's denoiser, by name.
        call_weights: [M] f64.
        processes: that share what is done with the inputs.
    """

    sampler: Sampler
    layers: Mapping[str, QuantLayer]
    trajectory: Trajectory
    call_weights: Tensor
    progress: Progress
    processes: Processes = ALONE

    def calls(self, count: int) -> list[int]:
        """Calls at equal distances of accumulated weight: more where an error counts more."""
        share = self.call_weights.cumsum(0) / self.call_weights.sum()
        wanted = (torch.arange(count, dtype=torch.float64, device=share.device) + 0.5) / count
        return torch.searchsorted(share, wanted).clamp(max=len(share) - 1).tolist()

    def input(self, call: int) -> tuple[Tensor, Tensor]:
        """Sample [B, *] and timestep [] of one call."""
        return in_channels_last(self.trajectory.samples[call]), self.sampler.calls[call]

    def predict(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Prediction [B, *] of the denoiser, in the mode that its layers are in."""
        return self.sampler.predict(sample, timestep, self.trajectory.conditioning)

    def set_mode(self, mode: Mode) -> None:
        """Put all layers into one mode."""
        for layer in self.layers.values():
            layer.set_mode(mode)

    @torch.no_grad()
    def show(self, observers: Mapping[str, Observer], call: int) -> None:
        """Call the observer of each named layer with the layer's full-precision input at a call."""
        self.set_mode(Mode.FLOAT)
        handles = [
            self.layers[name].register_forward_pre_hook(_before_forward(observe), with_kwargs=True)
            for name, observe in observers.items()
        ]
        try:
            self.predict(*self.input(call))
        finally:
            for handle in handles:
                handle.remove()

    def map_calls(
        self, count: int, phase: str, work: Callable[[int, int], Sequence[Tensor]]
    ) -> list[list[Tensor]]:
        """What `work` makes of (index, call) for `count` calls, in their order; processes share them."""
        total, done = len(self.processes.share([1.0] * count)), 0

        def watched(item: tuple[int, int]) -> Sequence[Tensor]:
            nonlocal done
            made = work(*item)
            done += 1
            self.progress(phase, done, total)
            return made

        return self.processes.map(list(enumerate(self.calls(count))), watched)


def _before_forward(observe: Observer) -> Callable[..., None]:
    return lambda module, args, kwargs: observe(input_of(args, kwargs))
