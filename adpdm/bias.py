"""Bias correction: takes the mean error that quantization adds to each output channel out of the bias."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import QuantConfig
from .quantizers.activation import Mode
from .replay import Observer, Replay

BIAS_STEPS = 12  # forward passes that the mean errors are averaged over


def correct_bias(replay: Replay, config: QuantConfig) -> None:
    """Fit biases to the present ranges and codes, where the config wants it; layers are left in fake mode."""
    if config.correct_bias:
        _take_out_mean_errors(replay)
    replay.set_mode(Mode.FAKE)


def _take_out_mean_errors(replay: Replay) -> None:
    """Give every layer with a bias the shift [O] that makes up for its mean error over the trajectory.

    Rounding of weights shifts the mean of an output, as activations have a mean. Along the trajectory a shift
    adds up where zero-mean noise averages out: it costs more than its share of the squared error.
    Source: Nagel et al. 2019, section 4.2; here each layer at its full-precision input, over steps [R].
    """
    layers = {name: layer for name, layer in replay.layers.items() if layer.bias is not None}
    for layer in layers.values():
        layer.bias_shift = None

    def shifts_at(index: int, call: int) -> list[Tensor]:
        found: dict[str, list[Tensor]] = {name: [] for name in layers}  # [O] f64, for each time a layer runs

        def observer(name: str) -> Observer:
            return lambda x: found[name].append(layers[name].output_shift(x))

        replay.show({name: observer(name) for name in layers}, call)
        return [torch.stack(x) if x else torch.empty(0, 0, device="cpu") for x in found.values()]

    by_call = replay.map_calls(BIAS_STEPS, "bias correction", shifts_at)
    for layer, shifts in zip(layers.values(), zip(*by_call, strict=True), strict=True):
        seen = [x for x in shifts if len(x)]
        if seen:
            layer.bias_shift = torch.cat(seen).mean(0).to(layer.weight.dtype)
