"""QuantConv2d and QuantLinear: float while calibrating, fake-quantized in the search, integer once frozen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..quantizers.activation import ActivationQuantizer, Mode
from ..quantizers.weight import WeightQuantizer
from ..step import StepState
from .coded import CodedConv2d, CodedLayer, CodedLinear

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantLayer(CodedLayer):
    """What both layers share: one activation quantizer per input segment, and the weight in two forms.

    Until `freeze`, `weight` is the float original; after it, integer codes as saved (int8, or packed int4).
    """

    channel_dim: int  # dimension of the input that holds the channels
    input_quantizers: nn.ModuleList
    bias_shift: Tensor | None  # [O], joins the bias when the layer is frozen
    _codes: Tensor | None  # [O, C, *] i8, until they become the weight
    _fake_weight: Tensor | None  # [O, C, *] float, the values of `_codes`

    @classmethod
    def of(
        cls,
        layer: nn.Conv2d | nn.Linear,
        bits: tuple[int, int],
        num_groups: int,
        slot: int,
        step: StepState,
        split: int | None,
        hadamard: int = 0,
    ) -> Self:
        """Take over a float layer; its parameters are shared, not copied, but for a weight that is rotated.

        Args:
            bits: of the weight, and of the activations.
            slot: of the first input quantizer; slots count up, one per segment.
            split: input channels of the first segment, None for a single segment.
            hadamard: input channels of a linear layer that are rotated together, 0 for none.
        """
        twin = cls.taking_over(layer)
        if hadamard:
            twin.hadamard = hadamard
            weight = twin.rotated(layer.weight.detach()).to(layer.weight.dtype)
            twin.weight = nn.Parameter(weight, requires_grad=False)
        twin.set_up_weight(WeightQuantizer(bits[0], split), step.table.device)
        segments = 1 if split is None else 2
        twin.input_quantizers = nn.ModuleList(
            ActivationQuantizer(bits[1], num_groups, slot + s, step) for s in range(segments)
        )
        twin.bias_shift = twin._codes = twin._fake_weight = None
        return twin

    def forward(self, input: Tensor) -> Tensor:  # torch's own layers call it so
        """input [N, C, H, W] or [*, K] float to the result of the layer, of the same dtype."""
        return self.with_gradient(input) if self.is_frozen else self.matmul(input)

    @property
    def quantizers(self) -> list[ActivationQuantizer]:
        return list(self.input_quantizers)  # type: ignore[arg-type]

    def split_input(self, x: Tensor) -> list[Tensor]:
        """The input segments of x, views."""
        split = self.weight_quantizer.split
        if split is None:
            return [x]
        return [x.narrow(self.channel_dim, 0, split), x.narrow(self.channel_dim, split, self._rest(x))]

    def _rest(self, x: Tensor) -> int:
        return x.shape[self.channel_dim] - (self.weight_quantizer.split or 0)

    def quantize_weight(self) -> None:
        """Round the weight to nearest; the original stays."""
        self.set_codes(*self.weight_quantizer.quantize(self.weight))

    def set_codes(self, codes: Tensor, scales: Tensor) -> None:
        """Fix the codes [O, C, *] i8 and scales [S, O] that the search runs on and that freezing keeps."""
        self._codes, self.weight_scale = codes, scales.to(self.weight.device)
        self._fake_weight = self._like_weight(self.weight_quantizer.dequantize(codes, scales))

    def _like_weight(self, value: Tensor) -> Tensor:
        """Give a weight the dtype and memory format of the original."""
        value = value.to(self.weight.dtype)
        return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value

    def codes(self) -> Tensor:
        """Weight codes [O, C, *] i8: of the frozen layer, or those that freezing would give."""
        if self.is_frozen:
            return super().codes()
        return self.weight_quantizer.quantize(self.weight)[0] if self._codes is None else self._codes

    def freeze(self) -> None:
        """Replace the float weight by integer codes; from here on `forward` runs in integers."""
        if self._codes is None:
            self.quantize_weight()
        codes = self.codes()
        if self.bias is not None and self.bias_shift is not None:
            self.bias = nn.Parameter(self.bias.detach() + self.bias_shift, requires_grad=False)
            self.bias_shift = None
        self._become_integer(self.weight_quantizer.store(codes))

    def quantize_values(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = self.weight_quantizer.quantize(weight)
        return self.weight_quantizer.store(codes), scales

    def _become_integer(self, stored: Tensor) -> None:
        self._codes = self._fake_weight = None
        super()._become_integer(stored)

    def integer(self, x: Tensor) -> Tensor:
        """The layer in integers, without anything fused."""
        packed = self.packed(x.device)
        return packed(packed.quantize(self.split_input(x)), x.dtype)

    def gradient_mask(self, x: Tensor) -> Tensor:
        """Within the ranges of the current step: beyond them an input, rotated if so, changes nothing."""
        parts = zip(self.split_input(self.rotated(x)), self.quantizers, strict=True)
        return torch.cat([q.reaches(part) for part, q in parts], self.channel_dim)

    def fake_input(self, x: Tensor) -> Tensor:
        """Pass x, in rotated channels if the layer has such, through the quantizers in their current mode."""
        x, quantizers = self.rotated(x), self.quantizers
        if len(quantizers) == 1:
            return quantizers[0](x)  # type: ignore[no-any-return]
        parts = self.split_input(x)
        if not quantizers[0].mode.quantizes:
            for quantizer, part in zip(quantizers, parts, strict=True):
                quantizer(part)
            return x
        return torch.cat([q(p) for q, p in zip(quantizers, parts, strict=True)], self.channel_dim)

    def matmul(self, x: Tensor) -> Tensor:
        """The layer before it is frozen, by the mode of its quantizers."""
        assert not self.is_frozen, "its weight holds codes"
        return self.multiply(self.fake_input(x), self.effective_weight(), self.effective_bias())

    def output_shift(self, x: Tensor) -> Tensor:
        """Mean per channel of float output minus fake-quantized output at input x, [O] f64."""
        self.set_mode(Mode.FLOAT)
        exact = self.matmul(x)
        self.set_mode(Mode.FAKE)
        error = exact - self.matmul(x)
        self.set_mode(Mode.FLOAT)
        others = [d for d in range(error.dim()) if d != self.channel_dim % error.dim()]
        return error.double().mean(others)

    def output_errors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Errors of the float output at input x if only the weight, and if only the input, is quantized."""
        assert self._fake_weight is not None, "codes come before their errors"
        self.set_mode(Mode.FAKE)
        rounded = self.fake_input(x)
        self.set_mode(Mode.FLOAT)
        exact = self.rotated(x)
        by_weight = self.multiply(exact, self._fake_weight - self.weight, None)
        return by_weight, self.multiply(rounded - exact, self.weight, None)

    def set_bits(self, weight_bits: int, activation_bits: int) -> None:
        """Change the widths before ranges and codes are fixed."""
        self.weight_quantizer = replace(self.weight_quantizer, num_bits=weight_bits)
        for quantizer in self.quantizers:
            quantizer.num_bits = activation_bits

    @property
    def bits(self) -> tuple[int, int]:
        """Of the weight and of the activations."""
        return self.weight_quantizer.num_bits, self.quantizers[0].num_bits

    def set_mode(self, mode: Mode) -> None:
        """Put all activation quantizers of the layer into one mode."""
        for quantizer in self.quantizers:
            quantizer.mode = mode

    def effective_bias(self) -> Tensor | None:
        """The bias that `matmul` adds, by the mode: corrected where the weight is quantized."""
        if self.bias is None or self.bias_shift is None or not self.quantizers[0].mode.quantizes:
            return self.bias
        return self.bias + self.bias_shift

    def effective_weight(self) -> Tensor:
        """The weight that `matmul` multiplies with, by the mode."""
        if not self.quantizers[0].mode.quantizes:
            return self.weight
        assert self._fake_weight is not None, "quantize_weight comes before the fake-quantized forward"
        return self._fake_weight


class QuantConv2d(QuantLayer, CodedConv2d):
    """Group-quantized twin of nn.Conv2d: [N, C, H, W] float to [N, O, Ho, Wo] of the same dtype."""

    channel_dim = 1


class QuantLinear(QuantLayer, CodedLinear):  # type: ignore[misc]  # torch types the bias as never None
    """Group-quantized twin of nn.Linear: [*, K] float to [*, O] of the same dtype."""

    channel_dim = -1
