"""Plain-torch twins of the operators that embed a timestep and make rows of blocks of the embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(
    waves: Tensor,
    first: nn.Linear,
    second: nn.Linear,
    table: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """second(silu(first(waves))) + table[labels], [N, D] f64 of what float32 holds.

    Args: waves [N, K] f32, with labels one row or N; table [classes, D] f32 and labels [N] i64, or neither.
    """
    times = _dense(F.silu(_dense(waves, first)), second)
    return times if table is None else times + table.double()[labels]


def silu_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(silu(x)), [N, O] f64 of x [N, K] f32."""
    return _dense(F.silu(x.double()), layer)


def adaptive_rows(embedding: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """layer(silu(embedding)) in f64: modulation [N, 2C] (scale, shift) and gate [N, C], twice (adaLN-Zero).

    Args: embedding [N, D] f32; layer with 6C outputs: shift, scale and gate, twice.
    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", section 3.2.
    """
    shift, scale, gate, shift2, scale2, gate2 = silu_linear(embedding, layer).chunk(6, 1)
    return torch.cat([scale, shift], 1), gate, torch.cat([scale2, shift2], 1), gate2


def _dense(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
