"""Frozen layers as the kernels want them: packed weights, their scales, and the quantizers before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..memory import release_file_pages
from .tracing import derived

if TYPE_CHECKING:
    from .coded import CodedLayer
    from .layers import QuantLayer


@dataclass(frozen=True)
class Packed:
    """One integer layer, or several that read the same codes: call it with codes of its input segments."""

    quantizers: tuple[ops.OutputQuantizer, ...]  # one per input segment; none where each input is measured
    weights: tuple[tuple[Tensor, ...], ...]  # packed weight u8, weight scale [O] f32, weight sum [O] i32
    epilogue: ops.Epilogue  # holds the bias
    outputs: int | ops.ConvGeometry  # outputs of a linear layer, or a convolution
    weight_bits: int

    @property
    def device(self) -> torch.device:
        return self.weights[0][0].device

    @property
    def reads_channels_last(self) -> bool:
        """Whether codes are wanted in this memory format, as by convolutions."""
        return not isinstance(self.outputs, int)

    def copies(self, bias: Tensor | None) -> bool:
        """Whether it has a copy of this bias of its layer, and does not read it where it lies."""
        own = self.epilogue.bias
        return bias is not None and own is not None and own.data_ptr() != bias.data_ptr()

    @cached_property
    def known(self) -> list[tuple[Tensor, ...]]:
        """What a segment consists of besides codes."""
        pairs = zip(self.quantizers, self.weights, strict=True)
        return [(q.scale, q.zero_point, q.group_index, *weight) for q, weight in pairs]

    def quantize(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Codes i8 of float input segments, as the layer reads them."""
        pairs = zip(parts, self.quantizers, strict=True)
        return [quantize(part, q, self.reads_channels_last) for part, q in pairs]

    def __call__(
        self,
        codes: Sequence[Tensor],
        dtype: torch.dtype,
        geometry: ops.ConvGeometry | None = None,
        **epilogue: Any,
    ) -> Tensor:
        """Result of `dtype`; `epilogue` adds fields of ops.Epilogue, `geometry` replaces the layer's own."""
        known = derived(self, "known")
        segments = [ops.Segment(part, *rest) for part, rest in zip(codes, known, strict=True)]
        end = ops.Epilogue(self.epilogue.bias, **epilogue) if epilogue else self.epilogue
        return self.run(segments, end, dtype, geometry)

    def run(
        self,
        segments: Sequence[ops.Segment],
        end: ops.Epilogue,
        dtype: torch.dtype,
        geometry: ops.ConvGeometry | None = None,
    ) -> Tensor:
        """The operator of the layer's kind; arguments as of `__call__`."""
        if isinstance(self.outputs, int):
            return ops.linear(segments, end, self.outputs, self.weight_bits, dtype)
        return ops.conv2d(segments, end, geometry or self.outputs, self.weight_bits, dtype)


def quantize(x: Tensor, quantizer: ops.OutputQuantizer, channels_last: bool = False) -> Tensor:
    """Codes i8 of x under the quantizer of the layer that reads them, channels_last for a convolution."""
    q = quantizer
    return ops.quantize(x, *q.qparams, q.num_bits, channels_last, q.hadamard)


def pack(layers: Sequence[CodedLayer], order: Tensor | None = None) -> Packed:
    """Pack a frozen layer, or linear layers that read the same codes as one with all their outputs.

    Args:
        layers: of one weight width; several need equal input quantizers (`agree`).
        order: [O] i64, rows of the weight in the order the kernel shall compute them.
    """
    first = layers[0]
    for layer in layers:
        layer.drop_with_codes()
    codes = torch.cat([layer.codes() for layer in layers])
    scales = torch.cat([layer.weight_scale for layer in layers], 1)
    bias = _joined_bias(layers)
    if order is not None:
        order = order.to(codes.device)
        codes, scales, bias = codes[order], scales[:, order], None if bias is None else bias[order]
    weights, sums = first.weight_quantizer.pack(codes, first.groups)
    for layer in layers:
        release_file_pages(layer.weight.data)
    outputs = first.outputs
    return Packed(
        tuple(_reader(q, first.hadamard) for q in first.quantizers),
        tuple(zip(weights, scales.contiguous(), sums, strict=True)),
        ops.Epilogue(bias),
        sum(layer.weight_shape[0] for layer in layers) if isinstance(outputs, int) else outputs,
        first.weight_quantizer.num_bits,
    )


def _reader(q: Any, hadamard: int) -> ops.OutputQuantizer:
    return ops.OutputQuantizer(q.scale, q.zero_point, q.group_index, q.num_bits, hadamard)


def _joined_bias(layers: Sequence[CodedLayer]) -> Tensor | None:
    """Bias [O] f32 of all outputs; a layer without one adds zeros, which changes nothing.

    That of one layer in float32 is the memory of the layer's own, where every edit is seen.
    """
    if all(layer.bias is None for layer in layers):
        return None
    rows = [x.weight_scale.new_zeros(x.weight_shape[0]) if x.bias is None else x.bias for x in layers]
    values = [row.detach().float() for row in rows]
    return values[0].contiguous() if len(values) == 1 else torch.cat(values)


def agree(first: QuantLayer, second: QuantLayer) -> bool:
    """Whether two layers give one input the same codes at every step, and so can share them."""
    if not len(first.quantizers) == len(second.quantizers) == 1:
        return False
    a, b = first.quantizers[0], second.quantizers[0]
    return (
        first.bits == second.bits
        and first.hadamard == second.hadamard
        and torch.equal(a.scale, b.scale)
        and torch.equal(a.zero_point, b.zero_point)
        and torch.equal(a.table, b.table)
    )
