"""SQNR of every layer's output inside a quantized network, against the same layer of the original."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..nn import loaded_layers, quant_layers
from ..trajectory import Conditioning, DenoiserCall, own_containers
from .metrics import energies, sqnr_db
from .sample_set import rows_in_turn
from .sampling import Trajectory, device_of, image_seeds, sample_shape, shape_of_call

PROBED_IMAGES, PROBED_CALLS = 4, 5  # of `probe_layers`


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
    kept: dict[str, list[Tensor]] = {name: [] for name in names}  # of calls that are not judged yet

    def keep(name: str) -> Any:
        return lambda module, args, output: kept[name].append(output)

    def judge(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            signal, error = energies(kept[name].pop(0), output)
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


@torch.no_grad()
def probe_layers(
    reference: nn.Module,
    quantized: nn.Module,
    scheduler: Any,
    num_inference_steps: int,
    seed: int,
    *,
    conditioning: Conditioning | None = None,
    call: DenoiserCall | None = None,
) -> dict[str, float]:
    """SQNR in dB by layer name, at a few calls that are spread over one trajectory of the reference.

    Args:
        num_inference_steps: of that trajectory; a quantized network may know no timesteps but those of its
            calibration, and a schedule of the call may fix their number.
        conditioning: tensors with the same number of rows each; image i has row i modulo that number.
        call: what else both denoisers are given.
    """
    shape, device = shape_of_call(call) or sample_shape(reference), device_of(reference)
    given = rows_in_turn(conditioning or {}, 0, PROBED_IMAGES)
    seeds = image_seeds(seed, PROBED_IMAGES)
    path = Trajectory(scheduler, num_inference_steps, seeds, shape, device, call)
    probed = set(np.linspace(0, len(path.timesteps) - 1, PROBED_CALLS).round().astype(int).tolist())
    inputs: list[tuple[Tensor, Any, dict[str, Any]]] = []
    for index, timestep in enumerate(path.timesteps):
        seen = path.model_input(index)
        if index in probed:
            at = path.call.given_timestep(timestep).expand(len(seen))
            inputs.append((seen, at, {**given, **path.call.constants}))
        path.advance(path.predict(reference, seen, index, given), index)
    return layer_sqnr(reference, quantized, inputs)
