"""Classifier-free guidance as a denoiser of its own, for class-conditional models without a pipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class GuidedDenoiser(nn.Module):
    """A class-conditional denoiser under classifier-free guidance: one call with twice the batch.

    Takes the place of the denoiser in `generate` and `compare`.

    Args:
        denoiser: (sample, timestep=[B], class_labels=[B]) -> object with `.sample`, or a tuple.
        scale: 1 is the conditional prediction alone, 0 the unconditional one.
        null_class: label of the class that stands for none.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, Eq. 6, with scale = 1 + w.
    """

    def __init__(self, denoiser: nn.Module, scale: float, null_class: int) -> None:
        super().__init__()
        self.denoiser, self.scale, self.null_class = denoiser, scale, null_class

    @property
    def config(self) -> Any:
        """The denoiser's."""
        return self.denoiser.config

    def forward(
        self,
        sample: Tensor,  # [B, C, H, W] float
        timestep: Tensor,  # [B]
        class_labels: Tensor,  # [B] i64
    ) -> tuple[Tensor]:
        """The guided prediction [B, *], of the shape and dtype that the denoiser predicts."""
        labels = torch.cat([class_labels, torch.full_like(class_labels, self.null_class)])
        output = self.denoiser(
            torch.cat([sample] * 2), timestep=torch.cat([timestep] * 2), class_labels=labels
        )
        both: Tensor = output[0] if isinstance(output, tuple) else output.sample
        conditional, unconditional = both.chunk(2)
        return (unconditional + self.scale * (conditional - unconditional),)
