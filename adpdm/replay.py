"""Replays cached trajectories through the full-precision denoiser, to show its layers their inputs again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .nn import QuantLayer
from .quantizers.activation import Mode
from .schedulers import in_channels_last
from .trajectory import Sampler, Trajectory

Progress = Callable[[str, int, int], None]  # phase, done, total
Observer = Callable[[Tensor], None]  # gets an input of a layer


@dataclass(frozen=True)
class Replay:
    """All images of a trajectory at calls that are chosen by how much an error counts there.

    Args:
        layers: of the sampler's denoiser, by name.
        call_weights: [M] f64.
    """

    sampler: Sampler
    layers: Mapping[str, QuantLayer]
    trajectory: Trajectory
    call_weights: Tensor
    progress: Progress

    def calls(self, count: int) -> list[int]:
        """Calls at equal distances of accumulated weight: more where an error counts more."""
        share = self.call_weights.cumsum(0) / self.call_weights.sum()
        wanted = (torch.arange(count, dtype=torch.float64, device=share.device) + 0.5) / count
        return torch.searchsorted(share, wanted).clamp(max=len(share) - 1).tolist()

    def inputs(self, count: int, phase: str) -> Iterator[tuple[Tensor, Tensor]]:
        """(sample [B, *], timestep []) of `count` calls; tells the progress after each."""
        for index, call in enumerate(self.calls(count)):
            yield in_channels_last(self.trajectory.samples[call]), self.sampler.calls[call]
            self.progress(phase, index + 1, count)

    def predict(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Prediction [B, *] of the denoiser, in the mode that its layers are in."""
        return self.sampler.predict(sample, timestep, self.trajectory.conditioning)

    def set_mode(self, mode: Mode) -> None:
        """Put all layers into one mode."""
        for layer in self.layers.values():
            layer.set_mode(mode)

    @torch.no_grad()
    def show(self, observers: Mapping[str, Observer], count: int, phase: str) -> None:
        """Call the observer of each named layer with the layer's full-precision input at every call."""
        self.set_mode(Mode.FLOAT)
        handles = [
            self.layers[name].register_forward_pre_hook(_before_forward(observe))
            for name, observe in observers.items()
        ]
        try:
            for sample, timestep in self.inputs(count, phase):
                self.predict(sample, timestep)
        finally:
            for handle in handles:
                handle.remove()


def _before_forward(observe: Observer) -> Callable[[Any, tuple[Tensor, ...]], None]:
    return lambda module, args: observe(args[0])
