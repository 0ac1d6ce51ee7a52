"""Fused forms of the attention and transformer blocks of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import AttentionProducts
from ..ops import Activation
from .embedding_blocks import rows_of_block
from .fusion import FusedBlock, NormCodes, fuses, grad_checkpointed, pack_of
from .layers import QuantConv2d, QuantLayer, QuantLinear
from .packed import Packed, agree, pack, quantize
from .tracing import derived

Quantize = Callable[[ops.OutputQuantizer], Tensor]  # codes of an input, given whose


class _Projections:
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


class _AttentionPlan:
    """What an attention derives from its weights; projections are packed for the use they are put to."""

    def __init__(self, norm: NormCodes | None, out: Packed, projections: Sequence[QuantLinear]) -> None:
        self.norm, self.out = norm, out
        self._layers = projections  # query, key, value

    @cached_property
    def to_itself(self) -> _Projections:
        return _Projections(self._layers)

    @cached_property
    def query(self) -> _Projections:
        return _Projections(self._layers[:1])

    @cached_property
    def context(self) -> _Projections:
        return _Projections(self._layers[1:])


@fuses("Attention")
class FusedAttention(FusedBlock):
    """One pass from norm to codes for query, key and value; residual and factor at the end of the output."""

    def inspect(self) -> None:
        b: Any = self.block
        self.processor = b.processor
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
        self.choose_attention("auto")

    def choose_attention(self, products: AttentionProducts) -> None:
        self.int8 = ops.HAS_FAST_INT8_ATTENTION if products == "auto" else products == "int8"

    @property
    def attention(self) -> str:
        return "int8" if self.int8 and self.out.weight.device.type == "cpu" else "float"

    def make_plan(self) -> _AttentionPlan:
        norm = self.block.get_submodule("group_norm") if self.block._modules.get("group_norm") else None
        assert norm is None or isinstance(norm, nn.GroupNorm)
        codes = None if norm is None else NormCodes(norm, Activation.NONE)
        return _AttentionPlan(codes, pack_of(self.out), self.projections)

    def applies(self, *inputs: Tensor | None) -> bool:
        block: Any = self.block
        return block.processor is self.processor and super().applies(*inputs)

    def reason(self) -> str:
        block: Any = self.block
        if block.processor is not self.processor:
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
    ) -> Tensor:
        """Attention [N, L, O] of an input given by its codes [N, L, C] i8, to itself or to a context."""
        plan: _AttentionPlan = self.plan
        if context is None:
            query, key, value = derived(plan, "to_itself")(codes_of, dtype)
        else:
            (query,) = derived(plan, "query")(codes_of, dtype)
            key, value = derived(plan, "context")(lambda q: quantize(context, q), dtype)
        codes = self._attend(query, key, value, plan.out)
        return plan.out(codes, dtype, row_scale=gate, residual=residual, output_scale=factor)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, out: Packed) -> list[Tensor]:
        """Codes [N, L, C] i8 of the attention, for the layer behind it."""
        heads: int = self.block.heads  # type: ignore[assignment]
        if query.device.type == "cpu" and (ops.HAS_FAST_ATTENTION or self.int8):
            return [ops.attention_quantize(query, key, value, out.quantizers[0], heads, self.int8)]
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        return out.quantize([F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)])


@dataclass(frozen=True)
class _TransformerPlan:
    norm1: NormCodes
    norm2: NormCodes | None
    norm3: NormCodes
    inward: Packed  # with GEGLU, rows of value and gate in turn
    out: Packed


@dataclass(frozen=True)
class _Adaptive:
    """What the embedding of timestep and class makes of a block: scale and shift of a norm, and a gate."""

    modulation: Tensor | None = None  # [N, 2C] f32
    gate: Tensor | None = None  # [N, C] f32


_PLAIN = _Adaptive()
# Activation of a feed-forward net by its first module and how that approximates.
_ACTIVATIONS = {
    ("GEGLU", None): Activation.GEGLU,
    ("GELU", "none"): Activation.GELU,
    ("GELU", "tanh"): Activation.GELU_TANH,
}


@fuses("BasicTransformerBlock")
class FusedTransformer(FusedBlock):
    """Norms end in codes, layers gate and add residuals, activations end in the codes of the next layer."""

    def inspect(self) -> None:
        b: Any = self.block
        self.is_adaptive = b.norm_type == "ada_norm_zero"
        self.require(self.is_adaptive or b.norm_type == "layer_norm", f"its norms are {b.norm_type}")
        self.require(b.pos_embed is None, "it embeds positions")
        self.require(not hasattr(b, "fuser"), "it has a fuser")
        self.require(not b.only_cross_attention, "it attends to the context alone")
        self._inspect_feed_forward()
        if self.is_adaptive:
            self.skip("norm1", type(b.norm1))
            known = type(b.norm1).__name__ == "AdaLayerNormZero" and b.norm1.emb is not None
            self.require(known, "its first norm is no AdaLayerNormZero with an embedding of its own")
            self.skip("norm1.norm", nn.LayerNorm)
        else:
            self.skip("norm1", nn.LayerNorm)
        self.skip("norm3", nn.LayerNorm)
        self.attention1: FusedAttention = self._attention("attn1")
        self.attention2: FusedAttention | None = None
        if b.attn2 is not None:
            self.skip("norm2", nn.LayerNorm)
            self.attention2 = self._attention("attn2")

    def _inspect_feed_forward(self) -> None:
        ff: Any = self.block.ff
        self.skip("ff", type(ff))
        self.require(type(ff).__name__ == "FeedForward", f"its ff is {_name(ff)}")
        first = ff.net[0]
        activation = _ACTIVATIONS.get((_name(first), getattr(first, "approximate", None)))
        self.require(activation is not None, f"its feed-forward starts with {_name(first)}")
        self.activation = activation
        self.skip("ff.net.0", type(first))
        self.inward: QuantLinear = self.skip("ff.net.0.proj", QuantLinear)
        self.skip("ff.net.1", nn.Dropout)
        self.out: QuantLinear = self.skip("ff.net.2", QuantLinear)
        for i in range(3, len(ff.net)):
            self.skip(f"ff.net.{i}", nn.Dropout)
        single = len(self.inward.quantizers) == len(self.out.quantizers) == 1
        self.require(single, "its feed-forward reads two segments")

    def _attention(self, name: str) -> FusedAttention:
        fused = self.contain(name)
        assert isinstance(fused, FusedAttention)
        block: Any = fused.block
        plain = not block.residual_connection and block.rescale_output_factor == 1.0
        self.require(plain and block.group_norm is None, f"{name} has a residual, factor or norm of its own")
        return fused

    def make_plan(self) -> _TransformerPlan:
        names = ("norm1.norm" if self.is_adaptive else "norm1", "norm2", "norm3")
        first, second, third = (self._norm(name) for name in names)
        assert first is not None
        assert third is not None
        inward = pack_of(self.inward)
        if self.activation is Activation.GEGLU:
            half = self.inward.out_features // 2
            in_order = torch.arange(2 * half, device="cpu").view(2, half)
            inward = pack([self.inward], in_order.t().reshape(-1))  # value 0, gate 0, value 1, ...
        return _TransformerPlan(first, second, third, inward, pack_of(self.out))

    def _norm(self, name: str) -> NormCodes | None:
        owner_name, _, child_name = name.rpartition(".")
        norm = self.block.get_submodule(owner_name)._modules.get(child_name)
        if norm is None:
            return None
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
        **others: Any,
    ) -> Any:
        block: Any = self.block
        masked = attention_mask is not None or encoder_attention_mask is not None
        unknown = masked or cross_attention_kwargs or block._chunk_size is not None
        unknown = unknown or not self.applies(hidden_states, encoder_hidden_states)
        if unknown or hidden_states.dim() != 3:
            return self.per_layer(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                **others,
            )
        first, second = self._embed(hidden_states, timestep, others.get("class_labels"))
        return self.run(hidden_states, encoder_hidden_states, first, second)

    def _embed(self, x: Tensor, timestep: Any, class_labels: Any) -> tuple[_Adaptive, _Adaptive]:
        """What timestep and class make of the attention and of the feed-forward net."""
        if not self.is_adaptive:
            return _PLAIN, _PLAIN
        norm: Any = self.block.norm1
        embedding = norm.emb(timestep, class_labels, hidden_dtype=x.dtype)
        first, first_gate, second, second_gate = rows_of_block(norm, embedding, x.shape[0])
        return _Adaptive(first, first_gate), _Adaptive(second, second_gate)

    def run(self, x: Tensor, context: Tensor | None, first: _Adaptive, second: _Adaptive) -> Tensor:
        """The block on tokens x [N, L, C] float, with a context [N, M, D] float for cross-attention."""
        plan: _TransformerPlan = self.plan
        x = self._attend(self.attention1, plan.norm1, x, None, first)
        if self.attention2 is not None:
            assert plan.norm2 is not None
            x = self._attend(self.attention2, plan.norm2, x, context, _PLAIN)
        codes = plan.norm3.layer(x, plan.inward.quantizers[0], second.modulation)
        codes = plan.inward([codes], x.dtype, activation=self.activation, quantizer=plan.out.quantizers[0])
        return plan.out([codes], x.dtype, row_scale=second.gate, residual=x)

    @staticmethod
    def _attend(
        attention: FusedAttention, norm: NormCodes, x: Tensor, context: Tensor | None, adaptive: _Adaptive
    ) -> Tensor:
        def codes_of(q: ops.OutputQuantizer) -> Tensor:
            return norm.layer(x, q, adaptive.modulation)

        return attention.run(codes_of, x.dtype, context, x, 1.0, adaptive.gate)


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
