"""Fused forms of the convolutional blocks of diffusers: residual blocks, up blocks, resampling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Activation, ConvGeometry
from .embedding_blocks import embedding_rows
from .fusion import FusedBlock, NormCodes, SplitNormCodes, fuses, grad_checkpointed, pack_of
from .layers import QuantConv2d, QuantLayer
from .packed import Packed


@dataclass(frozen=True)
class _ResnetPlan:
    norm1: NormCodes | SplitNormCodes
    conv1: Packed
    norm2: NormCodes
    conv2: Packed


@fuses("ResnetBlock2D")
class FusedResnet(FusedBlock):
    """norm, SiLU, codes; conv1 with the time embedding; norm, SiLU, codes; conv2 with residual and factor."""

    def inspect(self) -> None:
        b: Any = self.block
        self.require(b.upsample is None and b.downsample is None, "it resamples inside")
        self.require(b.time_embedding_norm in ("default", "scale_shift"), "its time embedding is not known")
        self.skip("norm1", nn.GroupNorm)
        self.conv1: QuantConv2d = self.skip("conv1", QuantConv2d)
        self.skip("norm2", nn.GroupNorm)
        self.skip("nonlinearity", nn.SiLU)
        self.skip("dropout", nn.Dropout)
        self.conv2: QuantConv2d = self.skip("conv2", QuantConv2d)
        self.require(len(self.conv2.quantizers) == 1, "conv2 reads two segments")
        if isinstance(b.conv_shortcut, QuantConv2d):
            self.skip("conv_shortcut", QuantConv2d)
        self.split = self.conv1.weight_quantizer.split

    def make_plan(self) -> _ResnetPlan:
        norm1, norm2 = (self.block.get_submodule(name) for name in ("norm1", "norm2"))
        assert isinstance(norm1, nn.GroupNorm)
        assert isinstance(norm2, nn.GroupNorm)
        first: NormCodes | SplitNormCodes = NormCodes(norm1, Activation.SILU)
        if self.split is not None:
            first = SplitNormCodes(norm1, Activation.SILU, self.split)
        return _ResnetPlan(first, pack_of(self.conv1), NormCodes(norm2, Activation.SILU), pack_of(self.conv2))

    def __call__(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self.takes(temb) or not self.applies(input_tensor, temb):
            return self.per_layer(input_tensor, temb, *args, **kwargs)  # type: ignore[no-any-return]
        return self.run([input_tensor], temb)

    def takes(self, temb: Tensor | None) -> bool:
        """Whether there is a time embedding exactly where there is a projection of it."""
        return (temb is None) == (self.block._modules.get("time_emb_proj") is None)

    def run(self, sources: list[Tensor], temb: Tensor | None) -> Tensor:
        """The block on an input [N, C, H, W], or on the two parts of a skip concatenation."""
        plan: _ResnetPlan = self.plan
        dtype = sources[0].dtype
        sources = self._sources(sources)
        row_bias, modulation = self._embed(temb, sources[0].shape[0])
        norm1 = plan.norm1
        if isinstance(norm1, SplitNormCodes):
            codes = norm1.group(sources, plan.conv1.quantizers)
        else:
            codes = [norm1.group(sources, plan.conv1.quantizers[0])]
        hidden = plan.conv1(codes, dtype, row_bias=row_bias)
        codes = [plan.norm2.group([hidden], plan.conv2.quantizers[0], modulation)]
        block: Any = self.block
        return plan.conv2(
            codes, dtype, residual=self._residual(sources), output_scale=1.0 / block.output_scale_factor
        )

    def _sources(self, sources: list[Tensor]) -> list[Tensor]:
        """Join the parts of a concatenation where conv1 does not split it in the same place."""
        if len(sources) == 2 and self.split is not None and sources[0].shape[1] != self.split:
            return [torch.cat(sources, 1)]
        return sources

    def _embed(self, temb: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """Projected time embedding as bias of each image [N, O] or modulation of norm2 [N, 2 O], f32."""
        if temb is None:
            return None, None
        block: Any = self.block
        row = embedding_rows(block.time_emb_proj, temb, silu=not block.skip_time_act)
        if row.shape[0] != batch:
            row = row.expand(batch, -1).contiguous()
        return (row, None) if block.time_embedding_norm == "default" else (None, row)

    def _residual(self, sources: list[Tensor]) -> Tensor:
        """What conv2 adds: the input, through the shortcut where there is one."""
        shortcut: Any = self.block.conv_shortcut
        if shortcut is None:
            return sources[0] if len(sources) == 1 else torch.cat(sources, 1)
        if not isinstance(shortcut, QuantLayer):
            return shortcut(sources[0] if len(sources) == 1 else torch.cat(sources, 1))  # type: ignore[no-any-return]
        packed = shortcut.packed(sources[0].device)
        return packed(_shortcut_codes(shortcut, packed, sources), sources[0].dtype)


def _shortcut_codes(shortcut: QuantLayer, packed: Packed, sources: list[Tensor]) -> list[Tensor]:
    """Codes of the parts of a concatenation, one segment each, or one for both."""
    split = shortcut.weight_quantizer.split
    if len(sources) == 1:
        return packed.quantize(shortcut.split_input(sources[0]))
    if split is None:
        codes = [packed.quantize([source])[0] for source in sources]
        return [torch.cat(codes, 1)]
    if split == sources[0].shape[1]:
        return packed.quantize(sources)
    return packed.quantize(shortcut.split_input(torch.cat(sources, 1)))


class _FusedUp(FusedBlock):
    """An up block that hands its residual blocks the parts of a skip concatenation, without joining them."""

    def inspect(self) -> None:
        b: Any = self.block
        fused = [isinstance(r.__dict__.get("forward"), FusedResnet) for r in b.resnets]
        self.require(any(fused), "none of its residual blocks is fused")

    def unknown_now(self) -> bool:
        """Whether to leave a call to the class: hooks, training, FreeU, checkpointing."""
        block: Any = self.block
        freeu = all(block.__dict__.get(name) for name in ("s1", "s2", "b1", "b2"))
        return freeu or grad_checkpointed(block) or not self.applies()

    @staticmethod
    def joined(resnet: nn.Module, hidden: Tensor, skip: Tensor, temb: Tensor | None) -> Tensor:
        """The residual block on the concatenation of two tensors."""
        fused = resnet.__dict__.get("forward")
        if isinstance(fused, FusedResnet) and fused.takes(temb) and fused.applies(hidden, skip, temb):
            return fused.run([hidden, skip], temb)
        return resnet(torch.cat([hidden, skip], 1), temb)  # type: ignore[no-any-return]


@fuses("UpBlock2D")
class FusedUpBlock(_FusedUp):
    """Residual blocks, then upsampling."""

    def __call__(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        upsample_size: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if args or kwargs or self.unknown_now():
            return self.per_layer(
                hidden_states, res_hidden_states_tuple, temb, upsample_size, *args, **kwargs
            )
        block: Any = self.block
        for resnet, skip in zip(block.resnets, reversed(res_hidden_states_tuple), strict=False):
            hidden_states = self.joined(resnet, hidden_states, skip, temb)
        for upsampler in block.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


@fuses("AttnUpBlock2D")
class FusedAttnUpBlock(_FusedUp):
    """Residual blocks with self-attention, then upsampling."""

    def __call__(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        upsample_size: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if args or kwargs or self.unknown_now():
            return self.per_layer(
                hidden_states, res_hidden_states_tuple, temb, upsample_size, *args, **kwargs
            )
        block: Any = self.block
        skips = reversed(res_hidden_states_tuple)
        for resnet, attention, skip in zip(block.resnets, block.attentions, skips, strict=False):
            hidden_states = attention(self.joined(resnet, hidden_states, skip, temb))
        for upsampler in block.upsamplers or ():
            takes_temb = block.upsample_type == "resnet"
            hidden_states = upsampler(hidden_states, temb=temb) if takes_temb else upsampler(hidden_states)
        return hidden_states


@fuses("CrossAttnUpBlock2D")
class FusedCrossAttnUpBlock(_FusedUp):
    """Residual blocks with transformers, then upsampling."""

    def __call__(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: Any = None,
        **masks: Any,
    ) -> Any:
        context: dict[str, Any] = {
            "encoder_hidden_states": encoder_hidden_states,
            "cross_attention_kwargs": cross_attention_kwargs,
            **masks,
        }
        if self.unknown_now():
            return self.per_layer(
                hidden_states, res_hidden_states_tuple, temb, upsample_size=upsample_size, **context
            )
        block: Any = self.block
        skips = reversed(res_hidden_states_tuple)
        for resnet, attention, skip in zip(block.resnets, block.attentions, skips, strict=False):
            hidden_states = self.joined(resnet, hidden_states, skip, temb)
            hidden_states = attention(hidden_states, **context, return_dict=False)[0]
        for upsampler in block.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


@dataclass(frozen=True)
class _ResamplePlan:
    conv: Packed
    geometry: ConvGeometry


class _Resample(FusedBlock):
    """A convolution that repeats or drops pixels."""

    child = "conv"

    def inspect(self) -> None:
        b: Any = self.block
        self.require(b.use_conv, "it has no convolution")
        self.require(b.norm is None, "it has a norm")
        self.conv: QuantConv2d = self.skip(self.child, QuantConv2d)

    def geometry(self) -> ConvGeometry:
        """The convolution together with the resampling."""
        raise AssertionError("a subclass resamples")

    def make_plan(self) -> _ResamplePlan:
        return _ResamplePlan(pack_of(self.conv), self.geometry())

    def run(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] float to the resampled result."""
        plan: _ResamplePlan = self.plan
        codes = plan.conv.quantize(self.conv.split_input(x))
        return plan.conv(codes, x.dtype, plan.geometry)


@fuses("Upsample2D")
class FusedUpsample(_Resample):
    """Codes of the small image, seen twice in both directions by the convolution."""

    def inspect(self) -> None:
        b: Any = self.block
        self.require(not b.use_conv_transpose and b.interpolate, "it does not interpolate")
        self.child = "conv" if b.name == "conv" else "Conv2d_0"
        super().inspect()

    def geometry(self) -> ConvGeometry:
        return replace(self.conv.outputs, upsample=2)

    def __call__(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        doubled = output_size is None or list(output_size) == [2 * n for n in hidden_states.shape[2:]]
        if args or kwargs or not doubled or not self.applies(hidden_states):
            return self.per_layer(hidden_states, output_size, *args, **kwargs)  # type: ignore[no-any-return]
        return self.run(hidden_states)


@fuses("Downsample2D")
class FusedDownsample(_Resample):
    """Padding below and right (where the block pads by itself) as part of the convolution."""

    def geometry(self) -> ConvGeometry:
        block: Any = self.block
        own = self.conv.outputs
        return replace(own, padding_end=(1, 1)) if block.padding == 0 else own

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self.applies(hidden_states):
            return self.per_layer(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        return self.run(hidden_states)
