"""Fused blocks in tests: one in a denoiser with random weights and ranges, compared with its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adpdm.nn import LayerInfo, describe_fusion, fuse_blocks, quant_layers, swap_layers
from adpdm.step import StepState

STEPS, GROUPS = 6, 3
# Floats round differently in a norm or an addition, by 2^-24, and a few codes in a million by one of 255.
WANTED_DB = 45.0
SECOND_SPLIT = 8


class Host(nn.Module):
    """A denoiser of one block, with its clock."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    @property
    def step(self) -> StepState:
        step = self.get_submodule("adpdm_step")
        assert isinstance(step, StepState)
        return step


def frozen(block: nn.Module, split: int | None = None, bits: tuple[int, int] = (8, 8)) -> Any:
    """The block with quantized layers of random weights and ranges, fused.

    Args:
        split: channels of the first segment of layers that read the block's concatenated input; those of an
            up block's second residual block are SECOND_SPLIT.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():  # norms would be the identity, many biases zero
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
    host = Host(block.eval().requires_grad_(False)).to(memory_format=torch.channels_last)
    infos = []
    for name, layer in host.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not name.endswith("time_emb_proj"):
            reads_input = name.endswith(("conv1", "conv_shortcut")) and split is not None
            halves = None if not reads_input else SECOND_SPLIT if "resnets.1." in name else split
            infos.append(LayerInfo(name, 0, 0, bits, "", halves))
    swap_layers(host, infos, GROUPS, lambda slots: StepState(slots, STEPS))
    table = torch.tensor([2, 0, 1, 2, 0, 1], dtype=torch.int32)
    for layer in quant_layers(host).values():
        for quantizer in layer.quantizers:
            high = 2 + torch.rand(GROUPS, generator=torch.Generator().manual_seed(1)) * 2
            quantizer.set_ranges(-high, 0.8 * high, table)
        layer.freeze()
    host.step.set_step(0)
    fuse_blocks(host, attention="float")  # as the layers compute it, one after the other
    return host


def sqnr_db(actual: Tensor, wanted: Tensor) -> float:
    error = (actual.double() - wanted.double()).square().sum()
    return float(10 * torch.log10(wanted.double().square().sum() / error.clamp_min(1e-30)))


def randn(*shape: int, seed: int = 3) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def reason_of(host: Any) -> str:
    return next(info.reason for info in describe_fusion(host) if info.name == "block")
