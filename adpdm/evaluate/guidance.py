"""Classifier-free guidance as a denoiser of its own, for classes and texts, without a pipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..trajectory import guide, prediction_of


class GuidedDenoiser(nn.Module):
    """A class- or text-conditional denoiser under classifier-free guidance: one call with twice the batch.

    Takes the place of the denoiser in `generate` and `compare`.

    Args:
        denoiser: (sample, timestep=[B], class_labels=[B] or encoder_hidden_states=[B, L, D]) -> a tensor,
            a tuple or an object with `.sample`.
        scale: 1 is the conditional prediction alone, 0 the unconditional one.
        null_class: label of the class that stands for none, for a class-conditional denoiser.
        null_text: [1, L, D] float, embedding of the empty text, for a text-conditional one.

    Raises:
        ValueError: unless exactly one of `null_class` and `null_text` is given.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, Eq. 6, with scale = 1 + w.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        scale: float,
        null_class: int | None = None,
        null_text: Tensor | None = None,
    ) -> None:
        super().__init__()
        if (null_class is None) == (null_text is None):
            got = "neither" if null_class is None else "both"
            raise ValueError(f"GuidedDenoiser: wanted null_class or null_text, got {got}")
        self.denoiser, self.scale, self.null_class, self.null_text = denoiser, scale, null_class, null_text

    @property
    def config(self) -> Any:
        """The denoiser's."""
        return self.denoiser.config

    def forward(
        self,
        sample: Tensor,  # [B, C, H, W] float
        timestep: Tensor,  # [B]
        class_labels: Tensor | None = None,  # [B] i64
        encoder_hidden_states: Tensor | None = None,  # [B, L, D] float
    ) -> tuple[Tensor]:
        """The guided prediction [B, *], of the shape and dtype that the denoiser predicts.

        Raises:
            ValueError: for another condition than what stands for none, for none, and for texts of another
                shape.
        """
        output = self.denoiser(
            torch.cat([sample] * 2),
            timestep=torch.cat([timestep] * 2),
            **self._with_none(class_labels, encoder_hidden_states),
        )
        conditional, unconditional = prediction_of(output).chunk(2)
        return (guide(conditional, unconditional, self.scale, sample.shape[1]),)

    def _with_none(self, labels: Tensor | None, text: Tensor | None) -> dict[str, Tensor]:
        """The condition of every image, then what stands for none of it."""
        name = "encoder_hidden_states" if self.null_class is None else "class_labels"
        given, other = (text, labels) if self.null_class is None else (labels, text)
        if given is None or other is not None:
            raise ValueError(f"GuidedDenoiser: wanted {name} alone of the conditions, got another or none")
        if self.null_class is not None:
            return {name: torch.cat([given, torch.full_like(given, self.null_class)])}
        assert self.null_text is not None
        if given.shape[1:] != self.null_text.shape[1:]:
            wanted = tuple(self.null_text.shape[1:])
            raise ValueError(
                f"GuidedDenoiser: encoder_hidden_states must be [B, L, D] with (L, D) = {wanted}, as "
                f"null_text, got {tuple(given.shape)}"
            )
        return {name: torch.cat([given, self.null_text.to(given).expand_as(given)])}
