"""SQNR of every layer's output inside a quantized network, against the same layer of the original."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import loaded_layers, quant_layers
from ..trajectory import own_containers
from .metrics import energies, sqnr_db


@torch.no_grad()
def layer_sqnr(
    reference: nn.Module, quantized: nn.Module, inputs: Iterable[tuple[Tensor, Any, dict[str, Tensor]]]
) -> dict[str, float]:
    """SQNR in dB by layer name, pooled over all inputs; includes the error that arrives from earlier layers.

    Args:
        reference, quantized: the float network and its quantized copy.
        inputs: (sample [B, C, H, W], timestep, conditioning) triples; outputs of one at a time are held.
    """
    names = list(quant_layers(quantized) or loaded_layers(quantized))
    totals = {name: [0.0, 0.0] for name in names}
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: kept.__setitem__(name, output)

    def judge(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            signal, error = energies(kept[name], output)
            totals[name][0] += signal
            totals[name][1] += error

        return hook

    handles = [reference.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    handles += [quantized.get_submodule(name).register_forward_hook(judge(name)) for name in names]
    try:
        for sample, timestep, conditioning in inputs:
            for denoiser in (reference, quantized):
                denoiser(sample, timestep, **own_containers(conditioning))
    finally:
        for handle in handles:
            handle.remove()
    return {name: sqnr_db(*total) for name, total in totals.items()}
