"""Equalization: evens out the channels of inputs where the layers before and behind can take it over.

One scale serves all channels of an input, so that large channels decide how coarse the small ones become.
Dividing channel c of an input by f_c and multiplying the weight's column c by it changes nothing in float.
The division folds into what made the input: the weights of a norm, the rows of a linear layer that makes
the scale and shift of an adaptive norm, or the rows that make the values of an attention.
Source: SmoothQuant (Xiao et al. 2023), which folds into norms; our choice of f: docs/method.md section 5.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .config import QuantConfig
from .nn import input_of
from .nn.dataflow import PRODUCTS, Call, Dataflow, Node
from .progress import Progress
from .trajectory import Sampler

EXPONENT = 0.5  # of the root mean square of a channel; docs/accuracy.md has others
FULL_BITS = 8  # inputs of so many bits are left alone, unless asked
SMALLEST = 1e-3  # of the mean: channels that are smaller count as that
PROBE_IMAGES = 8
PROBE_STEPS = 12  # at most, spread over the trajectory
MAX_CHANGE = 1e-3  # relative, of the prediction of the float model
NORMS = ("layer_norm", "group_norm", "rms_norm")
SUMS = ("add", "__add__", "__radd__")
ATTENTION = "scaled_dot_product_attention"
CONCATENATIONS = ("cat", "concat")
MULTIPLICATIONS = ("mul", "__mul__", "__rmul__")


@dataclass(frozen=True)
class Rows:
    """Outputs of a layer that take over a division.

    Args:
        plus: added to the outputs where they are used: 1 for the scales of an adaptive norm.
    """

    layer: nn.Linear
    rows: slice
    plus: float = 0.0

    def divide(self, factors: Tensor) -> None:
        weight, bias = _fresh(self.layer, "weight"), _fresh(self.layer, "bias")
        assert weight is not None
        weight[self.rows] /= factors[:, None]
        if bias is not None:
            bias[self.rows] = (bias[self.rows] + self.plus) / factors - self.plus


@dataclass(frozen=True)
class Affine:
    """A norm with weights of its own."""

    layer: nn.Module

    def divide(self, factors: Tensor) -> None:
        for name in ("weight", "bias"):
            values = _fresh(self.layer, name)
            if values is not None:
                values /= factors


@dataclass(frozen=True)
class Site:
    """An input of channels [C] that can be evened out: what makes it, and all layers that read it."""

    makers: tuple[Rows | Affine, ...]
    readers: tuple[nn.Module, ...]

    @property
    def layers(self) -> list[nn.Module]:
        return [*(maker.layer for maker in self.makers), *self.readers]

    def fold(self, factors: Tensor) -> None:
        """Divide what makes the input by factors [C], and multiply the columns of its readers."""
        for maker in self.makers:
            maker.divide(factors)
        for reader in self.readers:
            weight = _fresh(reader, "weight")
            assert weight is not None
            weight *= factors.view(1, -1, *(1,) * (weight.dim() - 2))


@dataclass
class Equalization:
    """What was done.

    Args:
        spread: by layer, its largest factor over its smallest.
        changed: names of all modules whose float weights are others now.
        warning: a sentence if it was tried and put back, else empty.
        seconds: that it took; 0 if it was not wanted.
    """

    spread: dict[str, float] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    warning: str = ""
    seconds: float = 0.0


def is_wanted(config: QuantConfig) -> bool:
    """Whether inputs gain more than weights lose, if the config leaves that open.

    Weights of 4 bits lose more by wider columns than 8-bit inputs gain (docs/accuracy.md).
    """
    if config.equalization != "auto":
        return config.equalization == "on"
    return config.activation_bits < FULL_BITS and config.activation_bits <= config.weight_bits


def equalize(
    sampler: Sampler,
    names: set[str],
    config: QuantConfig,
    forward: Callable[[], object],
    progress: Progress,
) -> Equalization:
    """Even out the inputs of layers where that folds exactly; the float model keeps its predictions.

    Parameters that change are replaced by new ones: whoever holds the old ones can put them back.

    Args:
        names: of the layers that are going to be quantized.
        forward: runs the denoiser once, on any input.
    """
    start, denoiser = time.perf_counter(), sampler.denoiser
    by_layer = {module: name for name, module in denoiser.named_modules()}
    layers = {module for module, name in by_layer.items() if name in names}
    sites = list(find_sites(Dataflow.of(denoiser, forward), layers))
    result = Equalization()
    if sites:
        _fold(sampler, sites, config, progress, by_layer, result)
    result.seconds = time.perf_counter() - start
    return result


def _fold(
    sampler: Sampler,
    sites: list[Site],
    config: QuantConfig,
    progress: Progress,
    names: dict[nn.Module, str],
    result: Equalization,
) -> None:
    """Fold factors for all sites, or leave a warning and everything as it was."""
    squares, seen = mean_squares(sampler, config, [site.readers[0] for site in sites], progress)
    modules = {module for site in sites for module in site.layers}
    before = {module: dict(module.named_parameters(recurse=False)) for module in modules}
    wanted = seen()
    for site in sites:
        factors = channel_factors(squares[site.readers[0]])
        site.fold(factors)
        for layer in site.readers:
            result.spread[names[layer]] = float(factors.max() / factors.min())
    change = float((seen() - wanted).norm() / wanted.norm().clamp(min=torch.finfo(wanted.dtype).tiny))
    if not change <= MAX_CHANGE:
        for module, parameters in before.items():
            for name, parameter in parameters.items():
                setattr(module, name, parameter)
        result.spread = {}
        result.warning = (
            f"equalization changed the float model by {change:.1e} of its prediction, where at most "
            f"{MAX_CHANGE:.0e} was expected, and was put back"
        )
        return
    result.changed = sorted(names[module] for module in modules)


def channel_factors(mean_square: Tensor) -> Tensor:
    """What to divide the channels of an input by, [C] f32 with geometric mean 1, from mean squares [C]."""
    size = mean_square.double().sqrt()
    size = size.clamp_min(float(size.mean()) * SMALLEST).clamp_min(torch.finfo(torch.float32).tiny)
    power = EXPONENT * size.log()
    return (power - power.mean()).exp().float()


def mean_squares(
    sampler: Sampler, config: QuantConfig, layers: list[nn.Module], progress: Progress
) -> tuple[dict[nn.Module, Tensor], Callable[[], Tensor]]:
    """Sums over calls of the mean squares [C] f64 of inputs of float layers, and a prediction to compare.

    The trajectory has fewer steps than the one that is calibrated: channels differ alike at all of them.
    """
    zero = torch.zeros((), dtype=torch.float64, device=sampler.device)
    sums: dict[nn.Module, Tensor] = dict.fromkeys(layers, zero)

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(args, kwargs).detach()
        dims = (0, 2, 3) if isinstance(module, nn.Conv2d) else tuple(range(x.dim() - 1))
        sums[module] = sums[module] + x.double().square().mean(dims)

    short = sampler.with_steps(min(PROBE_STEPS, config.num_inference_steps))
    handles = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in layers]
    try:
        images, calls = min(PROBE_IMAGES, config.histogram_images), len(short.calls)
        made = short.run(config.seed, 0, images, on_step=lambda i: progress("equalization", i + 1, calls))
    finally:
        for handle in handles:
            handle.remove()
    middle = len(short.calls) // 2

    def predict() -> Tensor:
        with torch.no_grad():
            return short.predict(made.samples[middle], short.calls[middle], made.conditioning).double()

    return sums, predict


def find_sites(flow: Dataflow, layers: set[nn.Module]) -> Iterator[Site]:
    """Inputs of `layers` whose division folds exactly, in the order of the trace.

    All who use such an input must be among `layers`, and what makes it must make nothing else.
    """
    found: set[Node] = set()
    for call in dict.fromkeys(flow.made.values()):
        if call.name in PRODUCTS and _layer_of(flow, call) in layers:
            node, maker = flow.origin(call.arguments[0])
            if node is not None and maker is not None and node not in found:
                found.add(node)
                site = _site(flow, node, maker, layers)
                if site is not None:
                    yield site


def _site(flow: Dataflow, node: Node, maker: Call, layers: set[nn.Module]) -> Site | None:
    """The input at `node`, which `maker` made, if dividing it folds."""
    makers = _makers(flow, maker)
    users = flow.users(node)
    readers = [_layer_of(flow, user) for user in users]
    if not makers or not all(reader in layers for reader in readers):
        return None
    modules: list[Any] = [*(m.layer for m in makers), *readers]
    channels = {x.rows.stop - x.rows.start for x in makers if isinstance(x, Rows)}
    channels |= {reader.weight.shape[1] for reader in modules[len(makers) :]}
    plain = all(flow.times_run(m) == 1 and getattr(m, "groups", 1) == 1 for m in modules)
    return Site(tuple(makers), tuple(modules[len(makers) :])) if plain and len(channels) == 1 else None


def _layer_of(flow: Dataflow, call: Call) -> nn.Module | None:
    """The Conv2d or Linear whose forward made this call."""
    return flow.owner(call.arguments[1]) if call.name in PRODUCTS else None


def _makers(flow: Dataflow, call: Call) -> list[Rows | Affine]:
    """What could take over a division of the result of `call`; none if nothing can."""
    if call.name in NORMS:
        norm = flow.owner(call.arguments[2])
        return [] if norm is None else [Affine(norm)]
    if call.name == ATTENTION:
        return _value_makers(flow, call)
    return _modulation(flow, call) if call.name in SUMS else []


def _value_makers(flow: Dataflow, attention: Call) -> list[Rows | Affine]:
    """The linear layers that make the values of an attention, which averages each channel over tokens."""
    values, maker = flow.origin(attention.arguments[2])
    if values is None or maker is None or flow.users(values) != [attention]:
        return []
    parts = [maker]
    if maker.name in CONCATENATIONS:  # of tokens: those of the text beside those of the image
        origins = [flow.origin(x) for x in maker.inputs]
        if any(node is None or call is None or flow.users(node) != [maker] for node, call in origins):
            return []
        parts = [call for _, call in origins if call is not None]
    layers = [_layer_of(flow, part) for part in parts]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return [Rows(x, slice(0, x.out_features)) for x in linear] if len(linear) == len(parts) else []


def _modulation(flow: Dataflow, total: Call) -> list[Rows | Affine]:
    """The rows behind scale and shift, where `total` is x * (1 + scale) + shift and a layer makes both."""
    for product, shift in itertools.permutations(total.arguments[:2]):
        made = flow.made.get(product) if isinstance(product, Node) else None
        if made is None or made.name not in MULTIPLICATIONS or flow.users(product) != [total]:
            continue
        for argument in made.arguments[:2]:
            scale = _one_plus(flow, argument, made)
            rows = [_chunk(flow, scale, 1.0), _chunk(flow, shift, 0.0)]
            if all(rows):
                return [x for x in rows if x is not None]
    return []


def _one_plus(flow: Dataflow, argument: Any, user: Call) -> Node | None:
    """x of 1 + x, if `argument` is that or a view of it and only `user` uses it."""
    node, call = flow.origin(argument)
    if node is None or call is None or call.name not in SUMS or flow.users(node) != [user]:
        return None
    others = [a for a in call.arguments[:2] if not isinstance(a, Node)]
    return call.inputs[0] if others == [1] else None


def _chunk(flow: Dataflow, node: Any, plus: float) -> Rows | None:
    """The rows of a linear layer that make a tensor, if it is one of the equal parts of its output."""
    part, call = flow.origin(node)
    if part is None or call is None or call.name != "chunk" or len(flow.users(part)) != 1:
        return None
    _, maker = flow.origin(call.arguments[0])
    layer = None if maker is None else _layer_of(flow, maker)
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        return None
    width = layer.out_features // len(call.results)
    if part.shape[-1] != width or width * len(call.results) != layer.out_features:
        return None
    first = call.results.index(part) * width
    return Rows(layer, slice(first, first + width), plus)


def _fresh(module: nn.Module, name: str) -> Tensor | None:
    """A copy of a parameter in its place, to be changed; None where there is none, as a bias of RMSNorm."""
    parameter = getattr(module, name, None)
    if parameter is None:
        return None
    copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    setattr(module, name, copied)
    return copied.detach()
