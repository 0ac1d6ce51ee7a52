"""Reference of Hadamard rotations: what `ops.hadamard` computes, and which channels go together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCKS = (64, 16, 4)  # powers of four: the factor of the matrix is a power of two
# Blocks of a row that kernels rotate quickly: a vector holds one channel of each, or a whole row of them.
SIDE_BY_SIDE = (1, 2, 4, 8)
MANY = 16


def hadamard_block(channels: int) -> int:
    """How many of so many channels are rotated together, as many as is quick; 0 where no block fits."""

    def is_quick(blocks: int) -> bool:
        return blocks >= MANY or blocks in SIDE_BY_SIDE

    return next((b for b in BLOCKS if channels % b == 0 and is_quick(channels // b)), 0)


def hadamard(x: Tensor, block: int) -> Tensor:
    """Rotate channels [*, C] f32|bf16|f16: [*, C] f32.

    Channels k, k + C / block, k + 2 C / block, ... are multiplied by the Hadamard matrix (Sylvester's) over
    the root of its size, which is orthonormal and symmetric: applied twice, nothing changes but by rounding.
    In float32, in this order of sums, so that every backend gives the same bits.

    Source: QuaRot (Ashkboos et al. 2024) for rotations before quantizers.
    """
    v: Tensor = x.float().unflatten(-1, (block, -1)).movedim(-2, 0)  # [block, *, C / block]
    size = 1
    while size < block:
        first, second = v.unflatten(0, (-1, 2, size)).unbind(1)
        v = torch.stack([first + second, first - second], 1).flatten(0, 2)
        size *= 2
    return (v / math.sqrt(block)).movedim(0, -2).flatten(-2)
