"""Fused forms of the attention and transformer blocks of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Activation
from .embedding_blocks import PLAIN, Adaptive, adaptive_parts, rows_of_block
from .fusion import FusedBlock, NormCodes, fuses, grad_checkpointed, pack_of
from .layers import QuantConv2d, QuantLayer, QuantLinear
from .packed import Packed, quantize
from .tracing import derived
from .transformer_parts import FeedForwardPart, FeedForwardPlan, Projections, Quantize, attend


class _AttentionPlan:
    """What an attention derives from its weights; projections are packed for the use they are put to."""

    def __init__(self, norm: NormCodes | None, out: Packed, projections: Sequence[QuantLinear]) -> None:
        self.norm, self.out = norm, out
        self._layers = projections  # query, key, value

    @cached_property
    def to_itself(self) -> Projections:
        return Projections(self._layers)

    @cached_property
    def query(self) -> Projections:
        return Projections(self._layers[:1])

    @cached_property
    def context(self) -> Projections:
        return Projections(self._layers[1:])


@fuses("Attention")
class FusedAttention(FusedBlock):
    """One pass from norm to codes for query, key and value; residual and factor at the end of the output."""

    def inspect(self) -> None:
        b: Any = self.block
        self.processor = type(b.processor)  # which keeps nothing: one is as good as another
        self.require(
            type(b.processor).__name__ == "AttnProcessor2_0", f"its processor is {_name(b.processor)}"
        )
        for name in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj"):
            self.require(getattr(b, name, None) is None, f"it has {name}")
        if b.group_norm is not None:
            self.skip("group_norm", nn.GroupNorm)
        projections = [self.skip(f"to_{x}", QuantLinear) for x in "qkv"]
        self.out: QuantLinear = self.skip("to_out.0", QuantLinear)
        self.skip("to_out.1", nn.Dropout)
        self.require(len(b.to_out) == 2, "its output has more than a linear layer and a dropout")
        single = all(len(p.quantizers) == 1 for p in (*projections, self.out))
        self.require(single, "a projection reads two segments")
        self.projections: list[QuantLinear] = projections
        self.int8 = ops.HAS_FAST_INT8_ATTENTION

    def make_plan(self) -> _AttentionPlan:
        norm = self.block.get_submodule("group_norm") if self.block._modules.get("group_norm") else None
        assert norm is None or isinstance(norm, nn.GroupNorm)
        codes = None if norm is None else NormCodes(norm, Activation.NONE)
        return _AttentionPlan(codes, pack_of(self.out), self.projections)

    def applies(self, *inputs: Tensor | None) -> bool:
        block: Any = self.block
        return type(block.processor) is self.processor and super().applies(*inputs)

    def reason(self) -> str:
        block: Any = self.block
        if type(block.processor) is not self.processor:
            return f"its processor is {_name(block.processor)} now"
        return super().reason()

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        block: Any = self.block
        # `temb` is for the spatial norm, which there is none of.
        known = kwargs.keys() <= {"temb"} and attention_mask is None
        shape_known = hidden_states.dim() == (3 if block.group_norm is None else 4)
        if not known or not shape_known or not self.applies(hidden_states, encoder_hidden_states):
            return self.per_layer(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        residual = hidden_states if block.residual_connection else None
        factor = 1.0 / block.rescale_output_factor
        if hidden_states.dim() == 3:

            def codes_of(q: ops.OutputQuantizer) -> Tensor:
                return quantize(hidden_states, q)

            return self.run(codes_of, hidden_states.dtype, encoder_hidden_states, residual, factor)
        return self._spatial(hidden_states, encoder_hidden_states, residual, factor)

    def _spatial(self, x: Tensor, context: Tensor | None, residual: Tensor | None, factor: float) -> Tensor:
        """Attention over the pixels of x [N, C, H, W], whose channels_last memory is [N, H * W, C]."""
        norm = self.plan.norm

        def codes_of(q: ops.OutputQuantizer) -> Tensor:
            return _tokens(norm.group([x], q))

        rows = None if residual is None else _tokens(residual)
        result = self.run(codes_of, x.dtype, context, rows, factor)
        return result.view(x.shape[0], x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)

    def run(
        self,
        codes_of: Quantize,
        dtype: torch.dtype,
        context: Tensor | None,
        residual: Tensor | None,  # [N, L, O] float
        factor: float,
        gate: Tensor | None = None,  # [N, O] f32, multiplies before the residual is added
        mask: Tensor | None = None,  # [N, 1 or L, M] float, added to the scores
    ) -> Tensor:
        """Attention [N, L, O] of an input given by its codes [N, L, C] i8, to itself or to a context."""
        plan: _AttentionPlan = self.plan
        if context is None:
            query, key, value = derived(plan, "to_itself")(codes_of, dtype)
        else:
            (query,) = derived(plan, "query")(codes_of, dtype)
            key, value = derived(plan, "context")(lambda q: quantize(context, q), dtype)
        readers = [(query.shape[1], plan.out)]
        heads: int = self.block.heads  # type: ignore[assignment]
        (codes,) = attend(query, key, value, readers, heads, bool(self.int8), mask)
        return plan.out(codes, dtype, row_scale=gate, residual=residual, output_scale=factor)


@dataclass(frozen=True)
class _TransformerPlan:
    norm1: NormCodes
    norm2: NormCodes | None  # before attention to the context
    norm3: NormCodes  # before the feed-forward net
    feed_forward: FeedForwardPlan


@fuses("BasicTransformerBlock")
class FusedTransformer(FusedBlock):
    """Norms end in codes, layers gate and add residuals, activations end in the codes of the next layer."""

    def inspect(self) -> None:
        b: Any = self.block
        self.norms = b.norm_type
        known = self.norms in ("layer_norm", "ada_norm_zero", "ada_norm_single")
        self.require(known, f"its norms are {b.norm_type}")
        self.require(b.pos_embed is None, "it embeds positions")
        self.require(not hasattr(b, "fuser"), "it has a fuser")
        self.require(not b.only_cross_attention, "it attends to the context alone")
        self.feed_forward = FeedForwardPart(self, "ff")
        if self.norms == "ada_norm_zero":
            self.skip("norm1", type(b.norm1))
            known = type(b.norm1).__name__ == "AdaLayerNormZero" and b.norm1.emb is not None
            self.require(known, "its first norm is no AdaLayerNormZero with an embedding of its own")
        for name in self._norm_names():
            if name is not None:
                self.skip(name, nn.LayerNorm)
        self.attention1: FusedAttention = self._attention("attn1")
        self.attention2 = None if b.attn2 is None else self._attention("attn2")

    def _norm_names(self) -> tuple[str, str | None, str]:
        """Names of the norms before attention, attention to the context, the feed-forward net."""
        if self.norms == "ada_norm_single":
            return "norm1", None, "norm2"
        first = "norm1.norm" if self.norms == "ada_norm_zero" else "norm1"
        return first, None if self.block.attn2 is None else "norm2", "norm3"

    def _attention(self, name: str) -> FusedAttention:
        fused = self.contain(name)
        assert isinstance(fused, FusedAttention)
        block: Any = fused.block
        plain = not block.residual_connection and block.rescale_output_factor == 1.0
        self.require(plain and block.group_norm is None, f"{name} has a residual, factor or norm of its own")
        return fused

    def make_plan(self) -> _TransformerPlan:
        first, second, third = self._norm_names()
        context = None if second is None else self._norm(second)
        return _TransformerPlan(self._norm(first), context, self._norm(third), self.feed_forward.make_plan())

    def _norm(self, name: str) -> NormCodes:
        norm = self.block.get_submodule(name)
        assert isinstance(norm, nn.LayerNorm)
        return NormCodes(norm, Activation.NONE)

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Any:
        block: Any = self.block
        rows = timestep if isinstance(timestep, Tensor) else None  # which PixArt made outside of the block
        unknown = attention_mask is not None or cross_attention_kwargs or block._chunk_size is not None
        unknown = unknown or not _is_bias(encoder_attention_mask, hidden_states, encoder_hidden_states)
        unknown = unknown or not self.applies(
            hidden_states, encoder_hidden_states, rows, encoder_attention_mask
        )
        if unknown or hidden_states.dim() != 3:
            return self.per_layer(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        parts = self._embed(hidden_states, timestep, class_labels)
        return self.run(hidden_states, encoder_hidden_states, encoder_attention_mask, *parts)

    def _embed(self, x: Tensor, timestep: Any, class_labels: Any) -> Sequence[Adaptive]:
        """What timestep and class make of the attention and of the feed-forward net."""
        if self.norms == "layer_norm":
            return PLAIN, PLAIN
        block: Any = self.block
        if self.norms == "ada_norm_single":
            rows = block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
            return adaptive_parts(rows.float())
        embedding = block.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        return rows_of_block(block.norm1, embedding, x.shape[0])

    def run(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, first: Adaptive, second: Adaptive
    ) -> Tensor:
        """The block on tokens x [N, L, C] float, with a context [N, M, D] float and its mask."""
        plan: _TransformerPlan = self.plan
        x = self._attend(self.attention1, plan.norm1, x, adaptive=first)
        if self.attention2 is not None:
            x = self._attend(self.attention2, plan.norm2, x, context, mask)
        return plan.feed_forward(x, plan.norm3, second)

    @staticmethod
    def _attend(
        attention: FusedAttention,
        norm: NormCodes | None,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        adaptive: Adaptive = PLAIN,
    ) -> Tensor:
        def codes_of(q: ops.OutputQuantizer) -> Tensor:
            return quantize(x, q) if norm is None else norm.layer(x, q, adaptive.modulation)

        return attention.run(codes_of, x.dtype, context, x, 1.0, adaptive.gate, mask)


def _is_bias(mask: Tensor | None, x: Tensor, context: Tensor | None) -> bool:
    """Whether there is no mask, or one that is added to the scores of x [N, L, C] and its context."""
    if mask is None:
        return True
    if context is None or mask.dtype != x.dtype or mask.dim() != 3:
        return False
    batch, queries, keys = mask.shape
    return batch == x.shape[0] and queries in (1, x.shape[1]) and keys == context.shape[1]


@dataclass(frozen=True)
class _SpatialPlan:
    norm: NormCodes
    inward: Packed
    outward: Packed


@fuses("Transformer2DModel")
class FusedTransformer2D(FusedBlock):
    """Norm to codes for the projection into tokens; the projection out of them adds the residual."""

    def inspect(self) -> None:
        b: Any = self.block
        self.require(b.is_input_continuous, "its input is no image")
        self.kind = QuantLinear if b.use_linear_projection else QuantConv2d
        self.skip("norm", nn.GroupNorm)
        self.inward: QuantLayer = self.skip("proj_in", self.kind)
        self.outward: QuantLayer = self.skip("proj_out", self.kind)
        single = len(self.inward.quantizers) == len(self.outward.quantizers) == 1
        self.require(single, "a projection reads two segments")

    def make_plan(self) -> _SpatialPlan:
        norm = self.block.get_submodule("norm")
        assert isinstance(norm, nn.GroupNorm)
        return _SpatialPlan(NormCodes(norm, Activation.NONE), pack_of(self.inward), pack_of(self.outward))

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Any = None,
        added_cond_kwargs: Any = None,
        class_labels: Any = None,
        cross_attention_kwargs: Any = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        masked = attention_mask is not None or encoder_attention_mask is not None
        unknown = masked or bool(cross_attention_kwargs) or return_dict or grad_checkpointed(self.block)
        if unknown or not self.applies(hidden_states, encoder_hidden_states):
            return self.per_layer(
                hidden_states,
                encoder_hidden_states,
                timestep,
                added_cond_kwargs,
                class_labels,
                cross_attention_kwargs,
                attention_mask,
                encoder_attention_mask,
                return_dict,
            )
        context = {"encoder_hidden_states": encoder_hidden_states, "timestep": timestep}
        return (self.run(hidden_states, {**context, "class_labels": class_labels}),)

    def run(self, image: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The transformer on an image [N, C, H, W], which its blocks see as tokens [N, H * W, inner]."""
        plan: _SpatialPlan = self.plan
        batch, _, height, width = image.shape
        codes = plan.norm.group([image], plan.inward.quantizers[0])
        is_linear = self.kind is QuantLinear
        x = plan.inward([_tokens(codes) if is_linear else codes], image.dtype)
        x = x if is_linear else _tokens(x)
        block: Any = self.block
        for transformer in block.transformer_blocks:
            x = transformer(x, **arguments)
        if is_linear:
            x = plan.outward(plan.outward.quantize([x]), image.dtype, residual=_tokens(image))
            return x.view(batch, height, width, -1).permute(0, 3, 1, 2)
        x = x.view(batch, height, width, -1).permute(0, 3, 1, 2)
        return plan.outward(plan.outward.quantize([x]), image.dtype, residual=image)


def _tokens(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H * W, C]: a view of channels_last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _name(value: Any) -> str:
    return type(value).__name__
