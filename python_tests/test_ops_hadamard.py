"""Hadamard rotations against the plain-torch reference: equal bits, gradients, what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adpdm import ops
from adpdm.reference_hadamard import BLOCKS, hadamard, hadamard_block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(
    shape=st.lists(st.integers(0, 5), max_size=2),
    block=st.sampled_from(BLOCKS),
    apart=st.integers(1, 40),
    gap=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_operator_equals_reference(
    dtype: torch.dtype, shape: list[int], block: int, apart: int, gap: int, seed: int
) -> None:
    x = torch.randn(*shape, block * apart + gap, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x = x[..., : block * apart]
    y = ops.hadamard(x, block)
    assert y.dtype == torch.float32
    assert torch.equal(y, hadamard(x, block))


@pytest.mark.parametrize("block", BLOCKS)
def test_reference_is_the_matrix_over_its_root(block: int) -> None:
    # Sylvester's construction, by itself.
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.randn(3, 5 * block, generator=torch.Generator().manual_seed(0))
    wanted = torch.einsum("ij,njk->nik", matrix / block**0.5, x.double().view(3, block, 5)).flatten(1)
    torch.testing.assert_close(hadamard(x, block).double(), wanted, rtol=0, atol=2e-6)


def test_gradient_is_the_same_rotation(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 256, generator=generator).to(device, torch.bfloat16).requires_grad_()
    cotangent = torch.randn(4, 256, generator=generator).to(device)
    ops.hadamard(x, 16).backward(cotangent)
    assert torch.equal(x.grad, ops.hadamard(cotangent, 16).bfloat16())
    torch.library.opcheck(torch.ops.adpdm.hadamard.default, (x, 16))


@pytest.mark.parametrize(
    ("x", "block", "message"),
    [
        (torch.zeros(2, 64), 8, "hadamard: block must be 4, 16 or 64, got 8"),
        (torch.zeros(2, 60), 16, "hadamard: x must have a multiple of block=16 channels, got 60"),
        (
            torch.zeros(2, 64, dtype=torch.int32),
            16,
            "hadamard: x must be torch.float32, torch.bfloat16 or torch.float16",
        ),
        (torch.zeros(()), 16, "hadamard: x must have at least one dimension"),
    ],
)
def test_operator_refuses(x: Tensor, block: int, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ops.hadamard(x, block)


@pytest.mark.parametrize(
    ("channels", "block"),
    [
        (1280, 64),
        (1024, 64),
        (1152, 64),
        (320, 16),
        (640, 16),
        (256, 64),
        (64, 64),
        (128, 64),
        (192, 4),
        (60, 0),
        (72, 4),
    ],
)
def test_block_leaves_many_side_by_side_or_a_power_of_two(channels: int, block: int) -> None:
    assert hadamard_block(channels) == block
