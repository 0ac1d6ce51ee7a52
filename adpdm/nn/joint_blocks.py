"""Fused forms of blocks that attend to image and text at once: Stable Diffusion 3, Flux."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Activation
from .embedding_blocks import Adaptive, rows_of_block
from .fusion import FusedBlock, NormCodes, fuses, pack_of
from .layers import QuantLinear
from .packed import Packed, quantize
from .transformer_parts import FeedForwardPart, FeedForwardPlan, Projections, attend, attended

FLOAT16_BOUND = 65504.0  # Flux keeps what it passes on between these in float16
Rotation = tuple[Tensor, Tensor]  # cosines and sines [L, D] f32


class _Attention:
    """An attention whose forward is not called.

    Args:
        owner: the fused form of the block, which skips the modules of the attention.
        name: of the attention within the block.
        kind, processor: class names of the attention and the processor that are known.
    """

    def __init__(self, owner: FusedBlock, name: str, kind: str, processor: str) -> None:
        attn: Any = owner.block.get_submodule(name)
        self.attn, self.name, self.owner = attn, name, owner
        owner.require(type(attn).__name__ == kind, f"its {name} is a {type(attn).__name__}")
        owner.skip(name, type(attn))
        self.processor, found = attn.processor, type(attn.processor).__name__
        owner.require(found == processor, f"the processor of {name} is {found}")
        owner.require(not self.reason(), self.reason())
        self.heads: int = attn.heads

    def reason(self) -> str:
        """What diffusers was asked for later, if anything; a backend of all models is not looked at."""
        if self.attn.processor is not self.processor:
            return f"the processor of {self.name} is {type(self.attn.processor).__name__} now"
        if any(
            getattr(self.processor, x, None) is not None for x in ("_attention_backend", "_parallel_config")
        ):
            return f"the processor of {self.name} has a backend of its own"
        # Flux's processor asks for it; that of Stable Diffusion 3 would be another.
        joined = type(self.processor).__name__ == "FluxAttnProcessor" and self.attn.fused_projections
        return f"{self.name} has joined projections" if joined else ""

    def layer(self, name: str) -> QuantLinear:
        """A layer of the attention, which reads one segment."""
        layer: QuantLinear = self.owner.skip(f"{self.name}.{name}", QuantLinear)
        self.owner.require(len(layer.quantizers) == 1, f"{self.name}.{name} reads two segments")
        return layer

    def output(self) -> QuantLinear:
        """The output, a layer and a dropout."""
        self.owner.require(len(self.attn.to_out) == 2, f"{self.name} ends in more than a layer and a dropout")
        self.owner.skip(f"{self.name}.to_out.1", nn.Dropout)
        return self.layer("to_out.0")

    def heads_norm(self, name: str) -> _HeadsNorm:
        """The norm of this name, if there is one: it is called, and must stay the one that it is."""
        norm = getattr(self.attn, name, None)
        self.owner.hold(f"{self.name}.{name}", norm)
        return _HeadsNorm(norm, self.heads)

    def rotate(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """x [N, L, heads * D], pairs (even, odd) of channels turned by the angles of their positions."""
        if rotation is None:
            return x
        cosine, sine = (part.to(x.device)[:, None] for part in rotation)
        heads = x.unflatten(2, (self.heads, -1))
        even, odd = heads.unflatten(3, (-1, 2)).unbind(4)
        across = torch.stack([-odd, even], 4).flatten(3)
        turned: Tensor = heads.float() * cosine + across.float() * sine
        return turned.to(x.dtype).flatten(2)


@dataclass(frozen=True)
class _HeadsNorm:
    """A norm over [N, L, heads * D], of each head by itself."""

    norm: nn.Module | None
    heads: int

    def __call__(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return x
        result: Tensor = self.norm(x.unflatten(2, (self.heads, -1)))
        return result.flatten(2)


class _JointBlock(FusedBlock):
    """What the blocks share: attentions whose settings may change."""

    attentions: list[_Attention]

    def applies(self, *inputs: Tensor | None) -> bool:
        return not any(a.reason() for a in self.attentions) and super().applies(*inputs)

    def reason(self) -> str:
        return next((r for a in self.attentions if (r := a.reason())), "") or super().reason()

    def adaptive_norm(self, name: str, kind: str) -> nn.LayerNorm:
        """The layer norm within an adaptive one, whose embedding is an argument of the block."""
        norm: Any = self.block.get_submodule(name)
        self.skip(name, type(norm))
        embeds = getattr(norm, "emb", None) is not None
        self.require(type(norm).__name__ == kind and not embeds, f"its {name} is no {kind} without embedding")
        return self.skip(f"{name}.norm", nn.LayerNorm)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Stream:
    """The modules of one sequence, of image or text: norm, projections, output."""

    norm: nn.LayerNorm
    projections: Sequence[QuantLinear]  # query, key, value; key and value where nobody reads the result
    out: QuantLinear | None
    heads_norms: Sequence[_HeadsNorm]  # of query and key

    def make_plan(self) -> _StreamPlan:
        out = None if self.out is None else pack_of(self.out)
        norm = NormCodes(self.norm, Activation.NONE)
        return _StreamPlan(norm, Projections(self.projections), out, self.heads_norms)


@dataclass(frozen=True)
class _StreamPlan:
    norm: NormCodes
    projections: Projections
    out: Packed | None
    heads_norms: Sequence[_HeadsNorm]

    def project(self, x: Tensor, adaptive: Adaptive) -> tuple[Tensor | None, Tensor, Tensor]:
        """Query, key and value [N, L, heads * D] of x [N, L, C]; no query where nobody reads the result."""
        *query, key, value = self.projections(lambda q: self.norm.layer(x, q, adaptive.modulation), x.dtype)
        of_query, of_key = self.heads_norms
        return of_query(query[0]) if query else None, of_key(key), value

    def add(self, x: Tensor, codes: list[Tensor], adaptive: Adaptive) -> Tensor:
        """x [N, L, C] plus its gated attention, given by codes [N, L, C] i8."""
        assert self.out is not None
        return self.out(codes, x.dtype, row_scale=adaptive.gate, residual=x)


@dataclass(frozen=True)
class _NetPlan:
    norm: NormCodes
    feed_forward: FeedForwardPlan

    def __call__(self, x: Tensor, adaptive: Adaptive) -> Tensor:
        return self.feed_forward(x, self.norm, adaptive)


class _Net:
    """The second norm of a sequence and the feed-forward net behind it."""

    def __init__(self, owner: FusedBlock, suffix: str) -> None:
        self.norm: nn.LayerNorm = owner.skip(f"norm2{suffix}", nn.LayerNorm)
        self.feed_forward = FeedForwardPart(owner, f"ff{suffix}")

    def make_plan(self) -> _NetPlan:
        return _NetPlan(NormCodes(self.norm, Activation.NONE), self.feed_forward.make_plan())


@dataclass(frozen=True)
class _JointPlan:
    image: _StreamPlan
    image_net: _NetPlan
    text: _StreamPlan
    text_net: _NetPlan | None
    itself: _StreamPlan | None


class FusedJoint(_JointBlock):
    """Norms end in codes, projections of one sequence are one product, attention ends in its outputs' codes.

    Tokens of the text come first, as in Flux, where it matters to the rotation of positions.
    """

    known_attention: tuple[str, str]  # class names of attention and processor
    is_bounded: bool  # whether the text stays within float16

    def inspect(self) -> None:
        b: Any = self.block
        self.text_ends = bool(getattr(b, "context_pre_only", False))  # in Stable Diffusion 3's last block
        attends_twice = bool(getattr(b, "use_dual_attention", False))
        joint = _Attention(self, "attn", *self.known_attention)
        self.attentions = [joint]
        norm = self.adaptive_norm("norm1", "SD35AdaLayerNormZeroX" if attends_twice else "AdaLayerNormZero")
        self.image = self._stream(joint, norm, [f"to_{x}" for x in "qkv"], joint.output(), "norm_")
        self.image_net = _Net(self, "")
        kind = "AdaLayerNormContinuous" if self.text_ends else "AdaLayerNormZero"
        text_norm = self.adaptive_norm("norm1_context", kind)
        names = [f"add_{x}_proj" for x in "qkv"]
        if self.text_ends:  # its queries ask for what nobody reads
            joint.layer(names.pop(0))
        out = None if self.text_ends else joint.layer("to_add_out")
        self.text = self._stream(joint, text_norm, names, out, "norm_added_")
        self.text_net = None if self.text_ends else _Net(self, "_context")
        self.itself: _Stream | None = None
        if attends_twice:  # the image once more, to itself alone
            itself = _Attention(self, "attn2", *self.known_attention)
            self.attentions.append(itself)
            self.itself = self._stream(itself, norm, [f"to_{x}" for x in "qkv"], itself.output(), "norm_")
        self.int8 = ops.HAS_FAST_INT8_ATTENTION

    def _stream(
        self,
        attention: _Attention,
        norm: nn.LayerNorm,
        names: Sequence[str],
        out: QuantLinear | None,
        heads_norms: str,
    ) -> _Stream:
        norms = [attention.heads_norm(heads_norms + x) for x in "qk"]
        return _Stream(norm, [attention.layer(name) for name in names], out, norms)

    def make_plan(self) -> _JointPlan:
        return _JointPlan(
            self.image.make_plan(),
            self.image_net.make_plan(),
            self.text.make_plan(),
            None if self.text_net is None else self.text_net.make_plan(),
            None if self.itself is None else self.itself.make_plan(),
        )

    def run(
        self,
        image: Tensor,  # [N, L, C] float
        text: Tensor,  # [N, M, C] float
        embedding: Tensor,  # [N, C] float
        rotation: Rotation | None,  # of all tokens
    ) -> tuple[Tensor | None, Tensor]:
        """The block; returns text, None where it ends, and image."""
        block: Any = self.block
        plan: _JointPlan = self.plan
        first, second, *third = rows_of_block(block.norm1, embedding, image.shape[0])
        text_first, *text_second = self._text_parts(text, embedding)
        tokens = plan.image.project(image, first)
        *text_codes, codes = self._attend(tokens, plan.text.project(text, text_first), rotation)
        attended = plan.image.add(image, codes, first)
        if plan.itself is not None:
            codes = self._attend_itself(image, third[0])
            attended = plan.itself.add(attended, codes, third[0])
        image = plan.image_net(attended, second)
        if plan.text_net is None:
            return None, image
        text = plan.text_net(plan.text.add(text, text_codes[0], text_first), text_second[0])
        return _bounded(text) if self.is_bounded else text, image

    def _text_parts(self, text: Tensor, embedding: Tensor) -> list[Adaptive]:
        """Rows of attention and feed-forward net; of a text that ends, scale and shift alone."""
        block: Any = self.block
        norm = block.norm1_context
        if not self.text_ends:
            return rows_of_block(norm, embedding, text.shape[0])
        rows = norm.linear(norm.silu(embedding).to(text.dtype)).float()
        return [Adaptive(rows.expand(text.shape[0], -1).contiguous())]

    def _attend(
        self,
        image: tuple[Tensor | None, Tensor, Tensor],
        text: tuple[Tensor | None, Tensor, Tensor],
        rotation: Rotation | None,
    ) -> list[list[Tensor]]:
        """Codes for the output of the text, unless it ends, and of the image, of their projections."""
        plan: _JointPlan = self.plan
        attention = self.attentions[0]
        queries, readers = [], []
        for (query, *_), out in ((text, plan.text.out), (image, plan.image.out)):
            if query is not None and out is not None:
                queries.append(query)
                readers.append((query.shape[1], out))
        query = torch.cat(queries, 1)
        key, value = (torch.cat([t, i], 1) for t, i in zip(text[1:], image[1:], strict=True))
        query, key = (attention.rotate(x, rotation) for x in (query, key))
        return attend(query, key, value, readers, attention.heads, bool(self.int8))

    def _attend_itself(self, image: Tensor, adaptive: Adaptive) -> list[Tensor]:
        """Codes for the output of the image's attention to itself alone."""
        plan: _JointPlan = self.plan
        assert plan.itself is not None
        assert plan.itself.out is not None
        query, key, value = plan.itself.project(image, adaptive)
        assert query is not None
        readers = [(image.shape[1], plan.itself.out)]
        return attend(query, key, value, readers, self.attentions[1].heads, bool(self.int8))[0]


@fuses("JointTransformerBlock")
class FusedStableDiffusion3(FusedJoint):
    """Of Stable Diffusion 3 and 3.5: no rotation; in 3.5 norms of heads, and a second attention in some."""

    known_attention = ("Attention", "JointAttnProcessor2_0")
    is_bounded = False

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        block: Any = self.block
        unknown = bool(joint_attention_kwargs) or block._chunk_size is not None
        if unknown or not self.applies(hidden_states, encoder_hidden_states, temb):
            return self.per_layer(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        return self.run(hidden_states, encoder_hidden_states, temb, None)


class _FluxBlock(_JointBlock):
    """How Flux calls its blocks of either kind."""

    def run(
        self, image: Tensor, text: Tensor, embedding: Tensor, rotation: Rotation | None
    ) -> tuple[Tensor | None, Tensor]:
        raise AssertionError("a subclass computes")

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotation | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if joint_attention_kwargs or not self.applies(hidden_states, encoder_hidden_states, temb):
            return self.per_layer(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        return self.run(hidden_states, encoder_hidden_states, temb, image_rotary_emb)


@fuses("FluxTransformerBlock")
class FusedFlux(FusedJoint, _FluxBlock):
    """Of Flux, the blocks that keep image and text apart."""

    known_attention = ("FluxAttention", "FluxAttnProcessor")
    is_bounded = True


@dataclass(frozen=True)
class _SinglePlan:
    stream: _StreamPlan
    inward: Packed


@fuses("FluxSingleTransformerBlock")
class FusedSingle(_FluxBlock):
    """Attention and feed-forward net side by side on one norm; both end in the codes of one layer."""

    def inspect(self) -> None:
        attention = _Attention(self, "attn", "FluxAttention", "FluxAttnProcessor")
        self.attentions = [attention]
        norm = self.adaptive_norm("norm", "AdaLayerNormZeroSingle")
        self.inward: QuantLinear = self.skip("proj_mlp", QuantLinear)
        activation = self.skip("act_mlp", nn.GELU)
        self.require(activation.approximate == "tanh", "its GELU is exact")
        out: QuantLinear = self.skip("proj_out", QuantLinear)
        single = len(self.inward.quantizers) == len(out.quantizers) == 1
        self.require(single, "its feed-forward reads two segments")
        projections = [attention.layer(f"to_{x}") for x in "qkv"]
        norms = [attention.heads_norm(f"norm_{x}") for x in "qk"]
        self.stream = _Stream(norm, projections, out, norms)
        self.int8 = ops.HAS_FAST_INT8_ATTENTION

    def make_plan(self) -> _SinglePlan:
        return _SinglePlan(self.stream.make_plan(), pack_of(self.inward))

    def run(
        self, image: Tensor, text: Tensor, embedding: Tensor, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor]:
        """The block on image [N, L, C] and text [N, M, C] float, which become one sequence, text first."""
        result = _bounded(self._run(torch.cat([text, image], 1), embedding, rotation))
        return result[:, : text.shape[1]], result[:, text.shape[1] :]

    def _run(self, x: Tensor, embedding: Tensor, rotation: Rotation | None) -> Tensor:
        """Tokens x [N, L, C] float through the block."""
        block: Any = self.block
        plan: _SinglePlan = self.plan
        attention, stream, inward = self.attentions[0], plan.stream, plan.inward
        (part,) = rows_of_block(block.norm, embedding, x.shape[0])
        query, key, value = stream.project(x, part)
        assert query is not None
        query, key = (attention.rotate(y, rotation) for y in (query, key))
        assert stream.out is not None
        codes, end = stream.norm.layer(x, inward.quantizers[0], part.modulation), stream.out.quantizers[0]
        if end.hadamard:  # it rotates channels of both, which are one input
            net = inward([codes], x.dtype, activation=Activation.GELU_TANH)
            both = torch.cat([attended(query, key, value, attention.heads), net], 2)
            return stream.add(x, [quantize(both, end)], part)
        readers = [(x.shape[1], stream.out)]
        ((first,),) = attend(query, key, value, readers, attention.heads, bool(self.int8))
        net = inward([codes], x.dtype, activation=Activation.GELU_TANH, quantizer=end)
        return stream.add(x, [torch.cat([first, net], 2)], part)


def _bounded(x: Tensor) -> Tensor:
    return x.clip(-FLOAT16_BOUND, FLOAT16_BOUND) if x.dtype == torch.float16 else x
