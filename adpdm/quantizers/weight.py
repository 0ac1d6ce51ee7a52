"""Weight quantizer: per-output-channel symmetric codes with a least-squares clip, in int8 or packed int4."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..qparams import weight_codes, weight_scale_mse
from ..reference import int4_row_bytes

INT4_BITS = 4  # up to here two codes share a byte


def stored_in_int4(num_bits: int) -> bool:
    """Whether codes of this width are stored two to a byte."""
    return num_bits <= INT4_BITS


@dataclass(frozen=True)
class WeightQuantizer:
    """Quantizes the weight of one layer, each input segment with its own scales.

    Args:
        num_bits: 2 to 8.
        split: input channels of the first segment, None for a single segment.
    """

    num_bits: int
    split: int | None = None

    def quantize(self, weight: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Nearest codes [O, C, *] i8 of weight [O, C, *] float, and their scales [S, O] f32.

        Args:
            scales: None for those of least error.
        """
        parts = self.segments(weight)
        if scales is None:
            scales = torch.stack([weight_scale_mse(part, self.num_bits) for part in parts])
        pairs = zip(parts, scales, strict=True)
        return torch.cat([weight_codes(part, scale, self.num_bits) for part, scale in pairs], 1), scales

    def dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Weight values [O, C, *] f32 of codes [O, C, *] i8 and scales [S, O]."""
        shape = (-1,) + (1,) * (codes.dim() - 1)
        parts = [c.float() * s.view(shape) for c, s in zip(self.segments(codes), scales, strict=True)]
        return torch.cat(parts, 1)

    def store(self, codes: Tensor) -> Tensor:
        """Codes as they are saved: int8 as they are, or packed [O, ceil(K/32) * 16] u8 up to 4 bits."""
        return ops.pack_int4(codes.flatten(1)) if stored_in_int4(self.num_bits) else codes

    def restore(self, stored: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `store` for codes of `shape`."""
        if not stored_in_int4(self.num_bits):
            return stored
        return ops.unpack_int4(stored, int(torch.Size(shape[1:]).numel())).view(shape)

    def stored_shape(self, shape: torch.Size) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype that `store` gives for codes of `shape`."""
        if not stored_in_int4(self.num_bits):
            return tuple(shape), torch.int8
        return (shape[0], int4_row_bytes(torch.Size(shape[1:]).numel())), torch.uint8

    def segments(self, tensor: Tensor) -> list[Tensor]:
        """Split along the input channels (dim 1)."""
        if self.split is None:
            return [tensor]
        return [tensor[:, : self.split], tensor[:, self.split :]]

    def pack(self, codes: Tensor, groups: int) -> tuple[list[Tensor], list[Tensor]]:
        """Kernel-ready weights and their sums [O] i32, one per segment."""
        parts = [part.contiguous() for part in self.segments(codes)]
        packed = [ops.pack_weight(part, self.num_bits, groups) for part in parts]
        return packed, [part.flatten(1).sum(1, dtype=torch.int32) for part in parts]
