"""Bias correction: takes the mean error that quantization adds to each output channel out of the bias."""

from __future__ import annotations

import torch
from torch import Tensor

from .replay import Observer, Replay

BIAS_STEPS = 12  # forward passes that the mean errors are averaged over


def correct_bias(replay: Replay) -> None:
    """Give every layer with a bias the shift [O] that makes up for its mean error over the trajectory.

    Rounding of weights shifts the mean of an output, as activations have a mean. Along the trajectory a shift
    adds up where zero-mean noise averages out: it costs more than its share of the squared error.
    Source: Nagel et al. 2019, section 4.2; here each layer at its full-precision input, over steps [R].
    """
    layers = {name: layer for name, layer in replay.layers.items() if layer.bias is not None}
    for layer in layers.values():
        layer.bias_shift = None
    shifts: dict[str, list[Tensor]] = {name: [] for name in layers}  # [O] f64, one per call

    def observer(name: str) -> Observer:
        return lambda x: shifts[name].append(layers[name].output_shift(x))

    replay.show({name: observer(name) for name in layers}, BIAS_STEPS, "bias correction")
    for name, layer in layers.items():
        if shifts[name]:
            layer.bias_shift = torch.stack(shifts[name]).mean(0).to(layer.weight.dtype)
