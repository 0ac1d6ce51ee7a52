"""What fused attention and transformer blocks share: projections, attention, feed-forward nets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops import Activation
from .embedding_blocks import Adaptive
from .fusion import FusedBlock, NormCodes, pack_of
from .layers import QuantLayer, QuantLinear
from .packed import Packed, agree, pack, quantize

Quantize = Callable[[ops.OutputQuantizer], Tensor]  # codes of an input, given whose


class Projections:
    """Linear layers of one input; those whose quantizers agree are one matrix product on the same codes."""

    def __init__(self, layers: Sequence[QuantLayer]) -> None:
        groups: list[list[int]] = []
        for i, layer in enumerate(layers):
            group = next((g for g in groups if agree(layers[g[0]], layer)), None)
            if group is None:
                groups.append([i])
            else:
                group.append(i)
        self.groups = groups
        self.packed = [pack([layers[i] for i in g]) if len(g) > 1 else pack_of(layers[g[0]]) for g in groups]
        self.sizes = [[layers[i].weight_shape[0] for i in g] for g in groups]
        self.count = len(layers)

    def __call__(self, codes_of: Quantize, dtype: torch.dtype) -> list[Tensor]:
        """Results [N, L, O] in the order of the layers, views of fewer tensors where layers agree."""
        results: list[Any] = [None] * self.count
        for members, packed, sizes in zip(self.groups, self.packed, self.sizes, strict=True):
            together = packed([codes_of(packed.quantizers[0])], dtype)
            for i, result in zip(members, torch.split(together, sizes, -1), strict=True):
                results[i] = result
        return results


# ---- attention ---------------------------------------------------------------------------------------------


def attend(
    query: Tensor,  # [N, L, heads * D] float
    key: Tensor,  # [N, M, heads * D] of query's dtype
    value: Tensor,  # [N, M, heads * D] of query's dtype
    readers: Sequence[tuple[int, Packed]],
    heads: int,
    int8: bool,
    mask: Tensor | None = None,  # [N, 1 or L, M], added to the scores
) -> list[list[Tensor]]:
    """Attention of each head in the codes of the layers behind it.

    Args:
        readers: how many of the L tokens each layer reads, in order.

    Returns:
        The input segment [N, tokens, heads * D] i8 of each layer.
    """
    counts = [count for count, _ in readers]
    if mask is None and query.device.type == "cpu" and (ops.HAS_FAST_ATTENTION or int8):
        queries = [query] if len(counts) == 1 else query.split(counts, 1)
        return [
            [ops.attention_quantize(q, key, value, out.quantizers[0], heads, int8)]
            for q, (_, out) in zip(queries, readers, strict=True)
        ]
    parts = zip(attended(query, key, value, heads, mask).split(counts, 1), readers, strict=True)
    return [out.quantize([part.contiguous()]) for part, (_, out) in parts]


def attended(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of each head in floats, [N, L, heads * D]; arguments as of `attend`."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    rows = None if mask is None else mask.unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=rows).transpose(1, 2).flatten(2)


# ---- feed-forward nets -------------------------------------------------------------------------------------

# Activation of a feed-forward net by its first module and how that approximates.
_ACTIVATIONS = {
    ("GEGLU", None): Activation.GEGLU,
    ("GELU", "none"): Activation.GELU,
    ("GELU", "tanh"): Activation.GELU_TANH,
}


@dataclass(frozen=True)
class FeedForwardPlan:
    """Packed layers of a feed-forward net."""

    activation: Activation
    inward: Packed  # with GEGLU, rows of value and gate in turn
    out: Packed

    def __call__(self, x: Tensor, norm: NormCodes, adaptive: Adaptive) -> Tensor:
        """x [N, L, C] float plus the gated net of its norm."""
        codes = norm.layer(x, self.inward.quantizers[0], adaptive.modulation)
        end = self.out.quantizers[0]
        if end.hadamard:
            codes = quantize(self.inward([codes], x.dtype, activation=self.activation), end)
        else:
            codes = self.inward([codes], x.dtype, activation=self.activation, quantizer=end)
        return self.out([codes], x.dtype, row_scale=adaptive.gate, residual=x)


class FeedForwardPart:
    """The feed-forward net of a block: its activation ends in the codes of its second layer.

    Args:
        owner: the fused form of the block, which skips the modules of the net.
        name: of the net within the block.

    Raises:
        NotFusable: for nets of other layers or activations.
    """

    def __init__(self, owner: FusedBlock, name: str) -> None:
        ff: Any = owner.block.get_submodule(name)
        owner.skip(name, type(ff))
        owner.require(type(ff).__name__ == "FeedForward", f"its {name} is {type(ff).__name__}")
        first = ff.net[0]
        activation = _ACTIVATIONS.get((type(first).__name__, getattr(first, "approximate", None)))
        owner.require(activation is not None, f"its feed-forward starts with {type(first).__name__}")
        self.activation: Any = activation
        owner.skip(f"{name}.net.0", type(first))
        self.inward: QuantLinear = owner.skip(f"{name}.net.0.proj", QuantLinear)
        owner.skip(f"{name}.net.1", nn.Dropout)
        self.out: QuantLinear = owner.skip(f"{name}.net.2", QuantLinear)
        for i in range(3, len(ff.net)):
            owner.skip(f"{name}.net.{i}", nn.Dropout)
        single = len(self.inward.quantizers) == len(self.out.quantizers) == 1
        owner.require(single, "its feed-forward reads two segments")

    def make_plan(self) -> FeedForwardPlan:
        """Its packed layers."""
        inward = pack_of(self.inward)
        if self.activation is Activation.GEGLU:
            half = self.inward.out_features // 2
            in_order = torch.arange(2 * half, device="cpu").view(2, half)
            inward = pack([self.inward], in_order.t().reshape(-1))  # value 0, gate 0, value 1, ...
        return FeedForwardPlan(self.activation, inward, pack_of(self.out))
