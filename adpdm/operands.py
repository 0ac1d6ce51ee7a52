"""What operators are told besides tensors of codes: activations, next quantizers, epilogues, geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from torch import Tensor


class Activation(IntEnum):
    """Function applied to the result of an integer layer or a normalisation."""

    NONE = 0
    SILU = 1  # y * sigmoid(y)
    GEGLU = 2  # outputs are pairs (value, gate): value * gelu(gate), half as many results
    GELU = 3  # y * Phi(y)
    GELU_TANH = 4  # its approximation by tanh


@dataclass(frozen=True)
class OutputQuantizer:
    """The quantizer of the next layer, where a layer ends in its codes."""

    scale: Tensor  # [G] f32
    zero_point: Tensor  # [G] i32
    group_index: Tensor  # [1] i32
    num_bits: int
    hadamard: int = 0  # channels that are rotated together before it, 0 for none

    @property
    def qparams(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero-point and current group."""
        return self.scale, self.zero_point, self.group_index

    @property
    def unrotated(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same for operators that end in codes and cannot rotate."""
        assert not self.hadamard, "the operator has no whole rows, whose channels are rotated"
        return self.qparams


@dataclass(frozen=True)
class Epilogue:
    """What becomes of the result y [M, O] f32 of an integer layer; the order is that of the fields.

    (y + bias[o]) * row_scale[image, o] + row_bias[image, o] + residual[m, o], times output_scale, the
    activation, the quantizer.
    """

    bias: Tensor | None = None  # [O] f32
    row_scale: Tensor | None = None  # [images, O] f32: gate of an adaptive norm
    row_bias: Tensor | None = None  # [images, O] f32: time embedding
    residual: Tensor | None = None  # the shape of the result, f32|bf16|f16; not with GEGLU
    output_scale: float = 1.0
    activation: Activation = Activation.NONE
    quantizer: OutputQuantizer | None = None


@dataclass(frozen=True)
class ConvGeometry:
    """The numbers that describe a convolution, as in torch.nn.Conv2d."""

    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)  # above and left
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_end: tuple[int, int] | None = None  # below and right; None: as padding
    upsample: int = 1  # 2: the convolution sees every pixel of the input twice in both directions
    _numbers: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ends = self.padding if self.padding_end is None else self.padding_end
        pairs = (self.kernel_size, self.stride, self.padding, ends, self.dilation)
        numbers = [self.out_channels, *(n for pair in pairs for n in pair), self.groups, self.upsample]
        object.__setattr__(self, "_numbers", numbers)

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> ConvGeometry:
        """Inverse of `numbers`."""
        pairs = [(numbers[i], numbers[i + 1]) for i in range(1, 11, 2)]
        kernel_size, stride, padding, padding_end, dilation = pairs
        return cls(numbers[0], kernel_size, stride, padding, dilation, numbers[11], padding_end, numbers[12])

    def numbers(self) -> list[int]:
        """The 13 numbers of the operator's schema, in its order."""
        return self._numbers

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for those of the input as stored."""
        ends = self.padding if self.padding_end is None else self.padding_end
        sizes = []
        for i, size in enumerate((height, width)):
            padded = self.upsample * size + self.padding[i] + ends[i]
            sizes.append((padded - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i] + 1)
        return sizes[0], sizes[1]
