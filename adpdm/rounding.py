"""Learned rounding: weight codes whose outputs are nearest on the layer's own quantized inputs (GPTQ)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import QuantConfig
from .nn import QuantConv2d, QuantLayer
from .quantizers.activation import Mode
from .replay import Replay

NEAREST_FROM_BITS = 8  # learned rounding gains nothing there: method.md section 5
ROUNDING_STEPS = 16  # of all images of the cached trajectories
MEMORY_LIMIT = 2**30  # bytes of moments
MAX_COLUMNS = 2304  # of one matrix of moments, 42 MB: 256 channels of a 3x3 kernel; longer reductions are cut
ROWS_PER_CALL = 512  # input vectors that one call of a layer contributes, drawn from all its positions
DAMPING = 0.01  # of the mean of the moments' diagonal, added to it (Frantar et al. 2022)
LAZY_COLUMNS = 128  # columns that the errors of all before them reach in one matrix product
MOMENT_ROWS = 288  # of moments, symmetric, made at a time: short enough to leave out most of the upper half


def round_weights(replay: Replay, names: Sequence[str], config: QuantConfig) -> dict[str, float]:
    """Give layers codes that are fitted to their inputs; returns squared error over that of nearest, by name.

    Layers hold ranges. Each process fits its share of them: it runs all calls, and keeps the moments of its
    own layers. These take MEMORY_LIMIT bytes at a time; what does not fit takes another pass.
    """
    costs = [_cost(replay.layers[name]) for name in names]
    own = replay.processes.share(costs)
    made: dict[int, list[Tensor]] = {}
    for part in _within_memory(replay.layers, names, own):
        inputs = {i: LayerInputs(replay.layers[names[i]], config.seed, config.correct_bias) for i in part}
        observers = {names[i]: seen.observe for i, seen in inputs.items()}
        for done, call in enumerate(replay.calls(ROUNDING_STEPS), 1):
            replay.show(observers, call)
            replay.progress("layer inputs", done, ROUNDING_STEPS)
        for i, seen in inputs.items():
            codes, scales, ratio = seen.round()
            made[i] = [codes, scales, torch.tensor(ratio, dtype=torch.float64, device="cpu")]
            replay.progress("weights", len(made), len(own))
    ratios = {}
    fitted = replay.processes.gather(costs, made)
    for name, (codes, scales, ratio_of_layer) in zip(names, fitted, strict=True):
        replay.layers[name].set_codes(codes, scales)
        ratios[name] = float(ratio_of_layer)
    return ratios


@dataclass
class ColumnBlock:
    """Columns of a weight that are rounded together, and the moments of their inputs."""

    rows: slice  # outputs
    channels: slice  # of the layer's input
    columns: slice  # of the weight as [O, K]
    second: Tensor  # [K, K] f64, sum over calls of the mean of x x^T, the lower half of it
    first: Tensor  # [K] f64, sum over calls of the mean of x

    def add(self, inputs: Tensor) -> None:
        """Add a call's inputs [R, K] f32."""
        for top in range(0, inputs.shape[1], MOMENT_ROWS):
            end = min(top + MOMENT_ROWS, inputs.shape[1])
            product = inputs[:, top:end].t() @ inputs[:, :end]
            self.second[top:end, :end].add_(product, alpha=1 / len(inputs))
        self.first += inputs.double().mean(0)

    def moments(self) -> Tensor:
        """Both halves of `second`."""
        lower = self.second.tril()
        return lower + lower.tril(-1).t()


class LayerInputs:
    """Moments of the fake-quantized inputs of one layer, and the codes that follow from them.

    A reduction longer than MAX_COLUMNS is cut into blocks of channels whose correlations are ignored.

    Args:
        layer: with ranges and, for `round`, a float weight.
        seed: of the positions that are drawn from an input.
        corrects_bias: whether a bias will take over the mean of the output's error.
    """

    def __init__(self, layer: QuantLayer, seed: int, corrects_bias: bool) -> None:
        self.layer, self.seed, self.calls = layer, seed, 0
        self.keeps_means = layer.bias is None or not corrects_bias
        device = layer.weight.device
        self.blocks = []
        for rows, channels, columns in _column_blocks(layer):
            k = columns.stop - columns.start
            second = torch.zeros(k, k, dtype=torch.float64, device=device)
            self.blocks.append(ColumnBlock(rows, channels, columns, second, torch.zeros_like(second[0])))

    def observe(self, x: Tensor) -> None:
        """Add an input of `layer.forward`, under the current groups of its quantizers."""
        rows = _input_rows(self.layer, x, torch.Generator().manual_seed(self.seed + self.calls))
        self.calls += 1
        for block in self.blocks:
            part = rows[:, block.channels].flatten(1)  # [R, K]
            if len(part):
                block.add(part)

    def round(self) -> tuple[Tensor, Tensor, float]:
        """Codes [O, C, *] i8, scales [S, O] f32, and the squared error over that of rounding to nearest."""
        quantizer, weight = self.layer.weight_quantizer, self.layer.weight.detach()
        codes, scales = quantizer.quantize(weight)
        flat = weight.double().flatten(1)
        steps = (
            quantizer.dequantize(torch.ones_like(codes), scales).double().flatten(1)
        )  # scale of each column
        nearest, learned = codes.flatten(1), codes.flatten(1).clone()
        bound = 2 ** (quantizer.num_bits - 1) - 1
        before = after = 0.0
        for block in self.blocks:
            at = (block.rows, block.columns)
            moments = self._moments(block)
            learned[at] = round_columns(flat[at], steps[at], moments, bound)
            before += _squared_error(flat[at] - nearest[at] * steps[at], moments)
            after += _squared_error(flat[at] - learned[at] * steps[at], moments)
        return learned.view(weight.shape), scales, after / before if before else 1.0

    def _moments(self, block: ColumnBlock) -> Tensor:
        """What an error of the weight costs, [K, K]: without the mean where the bias takes it over."""
        second, first = block.moments() / max(self.calls, 1), block.first / max(self.calls, 1)
        return second if self.keeps_means else second - torch.outer(first, first)


def round_columns(weight: Tensor, scale: Tensor, moments: Tensor, bound: int) -> Tensor:
    """Codes [O, K] i8 that minimise (w - q s) M (w - q s)^T one column after the other.

    Each column is rounded to nearest and its error is made up for by the columns that are still real numbers;
    those whose inputs are largest come first. Source: GPTQ (Frantar et al. 2022), with activation order, as
    Babai's nearest plane (Chen et al. 2025): with M = L L^T the columns after k can make good all but
    sum_{m <= k} e_m L_mk, so no inverse of M is needed.

    Args:
        weight, scale: [O, K] f64.
        moments: M [K, K] f64, positive semidefinite.
        bound: codes lie in [-bound, bound].
    """
    diagonal = moments.diagonal()
    order = diagonal.argsort(descending=True, stable=True).flip(0)  # the last row of L is rounded first
    lower = _cholesky(moments[order][:, order], DAMPING * diagonal.mean())
    pivots, across = lower.diagonal().tolist(), lower.t().contiguous()
    # Columns as rows: each is one stretch of memory.
    real, step = weight.t()[order], scale.t()[order]
    codes, errors = torch.empty_like(real), torch.empty_like(real)
    for last in range(len(order), 0, -LAZY_COLUMNS):
        first = max(last - LAZY_COLUMNS, 0)
        carried = across[first:last, last:] @ errors[last:]
        for k in range(last - 1, first - 1, -1):
            owed = torch.addmv(carried[k - first], errors[k + 1 : last].t(), across[k, k + 1 : last])
            wanted = real[k] + owed / pivots[k]
            codes[k] = (wanted / step[k]).round_().clamp_(-bound, bound)
            errors[k] = real[k] - codes[k] * step[k]
    return codes[order.argsort()].t().to(torch.int8)


def _cholesky(moments: Tensor, damping: Tensor) -> Tensor:
    """Lower factor [K, K] of moments with damping [] added; with more where rounding left them indefinite."""
    while True:
        damped = moments + torch.diag(damping.expand(len(moments)))
        damped = damped + torch.diag((damped.diagonal() <= 0).to(damped))  # inputs that are always the same
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
        damping = torch.maximum(10 * damping, DAMPING * moments.abs().max())


def _squared_error(error: Tensor, moments: Tensor) -> float:
    return float(((error @ moments) * error).sum())


def _cost(layer: QuantLayer) -> float:
    """Multiplications that a layer takes: its moments, their factor, and the errors that columns pass on."""
    widths = [columns.stop - columns.start for _, _, columns in _column_blocks(layer)]
    rows = ROUNDING_STEPS * ROWS_PER_CALL
    return float(sum(k * k * (rows + k + layer.weight.shape[0] // layer.groups) for k in widths))


def _within_memory(
    layers: Mapping[str, QuantLayer], names: Sequence[str], chosen: Sequence[int]
) -> Iterator[list[int]]:
    """Cut a choice of layers where their moments exceed MEMORY_LIMIT; one that does so alone stays whole."""
    part: list[int] = []
    total = 0
    for i in chosen:
        blocks = _column_blocks(layers[names[i]])
        size = sum(8 * (columns.stop - columns.start) ** 2 for _, _, columns in blocks)
        if part and total + size > MEMORY_LIMIT:
            yield part
            part, total = [], 0
        part.append(i)
        total += size
    if part:
        yield part


def _column_blocks(layer: QuantLayer) -> Iterator[tuple[slice, slice, slice]]:
    """Outputs, input channels and weight columns of each block."""
    outputs, channels = layer.weight.shape[0] // layer.groups, layer.weight.shape[1]
    area = layer.weight[0, 0].numel()
    width = max(MAX_COLUMNS // area, 1)
    for group in range(layer.groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        for first in range(0, channels, width):
            last = min(first + width, channels)
            start = group * channels
            yield rows, slice(start + first, start + last), slice(first * area, last * area)


def _input_rows(layer: QuantLayer, x: Tensor, generator: torch.Generator) -> Tensor:
    """Vectors that the layer multiplies with its weight, fake-quantized, [R, C, area] f32.

    Args: x [N, C, H, W] of a convolution or [*, C] of a linear layer; ROWS_PER_CALL positions at most.
    """
    if isinstance(layer, QuantConv2d):
        grid = torch.Size((len(x), *layer.outputs.output_size(*x.shape[2:])))  # N, Ho, Wo
        rows = _patches(layer, x, grid, _drawn(grid.numel(), generator, x.device))
    else:
        vectors = x.reshape(-1, x.shape[-1])
        rows = vectors[_drawn(len(vectors), generator, x.device)]
    layer.set_mode(Mode.FAKE)
    joined = layer.fake_input(rows).float()
    layer.set_mode(Mode.FLOAT)
    return joined if joined.dim() == 3 else joined[..., None]


def _drawn(positions: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """ROWS_PER_CALL of the positions, or all of them where they are fewer, ascending."""
    drawn = torch.randperm(positions, generator=generator, device="cpu")[:ROWS_PER_CALL]
    return drawn.sort().values.to(device)


def _patches(layer: QuantConv2d, x: Tensor, grid: torch.Size, drawn: Tensor) -> Tensor:
    """Receptive fields [R, C, area] of the output positions `drawn` [R]; outside the image is 0."""
    geometry = layer.outputs
    top, left = geometry.padding
    padded = torch.nn.functional.pad(x, (left, left, top, top)).permute(0, 2, 3, 1)  # [N, H, W, C]
    image, row, column = torch.unravel_index(drawn, grid)
    taps_down, taps_right = torch.meshgrid(
        *(
            torch.arange(k, device=x.device) * d
            for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)
        ),
        indexing="ij",
    )
    down = row[:, None] * geometry.stride[0] + taps_down.flatten()
    right = column[:, None] * geometry.stride[1] + taps_right.flatten()
    return padded[image[:, None], down, right].transpose(1, 2)  # [R, C, area]
