"""Mixed precision: what each layer's quantization does to the noise prediction, and which get 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .nn import QuantLayer, input_of
from .quantizers.activation import Mode
from .replay import Replay

RAISED_BITS = 8
PROBE_STEPS = 8  # of all images of the cached trajectories


@dataclass(frozen=True)
class Sensitivity:
    """Squared error of the noise prediction that one layer causes alone, summed over probes."""

    weight: float
    activation: float
    macs: int  # of one sample
    parameters: int


def measure_sensitivity(replay: Replay, macs: Mapping[str, int], seed: int) -> dict[str, Sensitivity]:
    """Every layer's share of the error of the noise prediction, summed over steps by weight.

    Layers hold ranges and codes. Forward and backward passes of PROBE_STEPS steps serve all layers.

    Args: macs: multiply-accumulates of each layer, for one sample.
    """
    replay.set_mode(Mode.FLOAT)
    layers = replay.layers

    def probe(index: int, call: int) -> list[Tensor]:
        sample, timestep = replay.input(call)
        seen = sample.clone().requires_grad_()
        return [_probe(list(layers.values()), lambda: replay.predict(seen, timestep), seed + index)]

    probes = [errors for (errors,) in replay.map_calls(PROBE_STEPS, "sensitivity", probe)]
    rows = sum(probes[1:], probes[0]).tolist()
    return {
        name: Sensitivity(by_weight, by_activation, macs[name], layers[name].weight.numel())
        for name, (by_weight, by_activation) in zip(layers, rows, strict=True)
        if macs[name]  # nothing reached it in the one that counted
    }


def _probe(layers: Sequence[QuantLayer], predict: Callable[[], Tensor], seed: int) -> Tensor:
    """Estimate every layer's squared error at the prediction, by its weight and by its input, [L, 2] f64.

    With v random of unit covariance, g = J^T v is the gradient of v . prediction at a layer's output, and the
    expectation of (g . e)^2 is ||J e||^2: what an error e of that output does to the prediction, to first
    order. One gradient serves all layers, where trying each would take a forward pass per layer. An image is
    one sample: 200 of them give a tenth of accuracy, a ranking needs fewer.
    """
    found = torch.zeros(len(layers), 2, dtype=torch.float64, device="cpu")

    def watch(layer: QuantLayer, errors: Tensor) -> Any:
        def after_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = input_of(args, kwargs).detach()
            if not output.requires_grad:  # what a layer makes of the conditioning alone
                output.requires_grad_()
            output.register_hook(lambda gradient: _add(errors, layer, x, gradient))

        return layer.register_forward_hook(after_forward, with_kwargs=True)

    handles = [watch(layer, errors) for layer, errors in zip(layers, found, strict=True)]
    try:
        with torch.enable_grad():
            prediction = predict()
            generator = torch.Generator().manual_seed(seed)
            direction = torch.randn(prediction.shape, generator=generator, device="cpu")
            (prediction * direction.to(prediction)).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def _add(errors: Tensor, layer: QuantLayer, x: Tensor, gradient: Tensor) -> None:
    """Add to [2] what rounding a layer's weight, and its input, does along a gradient of its output."""
    for i, error in enumerate(layer.output_errors(x)):
        errors[i] += (error * gradient).flatten(1).double().sum(1).square().sum().cpu()


def raise_bits(layers: Mapping[str, QuantLayer], found: Mapping[str, Sensitivity], share: float) -> list[str]:
    """Give 8 bits to the activations, and to the weights, of the layers that gain most; returns their names.

    Args: share: of the multiply-accumulates that may get wider activations, and of the weights that may get
        wider themselves.
    """
    narrow = {name: layers[name].bits for name in found}
    by_weight = {n: s.weight for n, s in found.items() if narrow[n][0] < RAISED_BITS}
    by_activation = {n: s.activation for n, s in found.items() if narrow[n][1] < RAISED_BITS}
    wide_weight = most_sensitive(by_weight, {n: s.parameters for n, s in found.items()}, share)
    wide_activation = most_sensitive(by_activation, {n: s.macs for n, s in found.items()}, share)
    for name, (weight_bits, activation_bits) in narrow.items():
        layers[name].set_bits(
            RAISED_BITS if name in wide_weight else weight_bits,
            RAISED_BITS if name in wide_activation else activation_bits,
        )
    return [name for name in found if name in wide_weight + wide_activation]


def most_sensitive(gain: Mapping[str, float], cost: Mapping[str, int], share: float) -> list[str]:
    """Names with the largest gain per cost that together cost at most a share of all costs.

    Greedy: one that no longer fits is skipped, smaller ones after it may still fit.
    """
    left = share * sum(cost.values())
    chosen = []
    for name in sorted(gain, key=lambda n: gain[n] / cost[n], reverse=True):
        if gain[name] > 0 and cost[name] <= left:
            chosen.append(name)
            left -= cost[name]
    return chosen
