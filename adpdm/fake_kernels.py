"""Fake kernels of the native operators for `torch.compile` and opcheck: shapes, dtypes and strides alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _native
from .operands import Activation, ConvGeometry
from .reference import int4_row_bytes


def _fake(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Enter a function as the fake kernel of an operator.

    Raises:
        ImportError: the compiled extension does not have the operator.
    """

    def enter(kernel: Callable[..., Any]) -> Any:
        try:
            return torch.library.register_fake(f"adpdm::{name}", kernel)
        except RuntimeError as error:
            raise ImportError(
                f"adpdm: the native extension has no operator {name}, so it is older than the package; "
                f"rebuild it with `{_native.BUILD_COMMAND}` ({error})"
            ) from error

    return enter


def _packed_shape(x: Tensor) -> list[int]:
    return [*x.shape[:-1], int4_row_bytes(x.shape[-1])]


def _dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of x's shape, dense, in channels_last where x is (also a channel slice of such)."""
    channels_last = x.dim() == 4 and x.stride(1) == 1 and (x.shape[1] > 1 or x.stride(3) == x.shape[1])
    layout = torch.channels_last if channels_last and not x.is_contiguous() else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout)


@_fake("quantize")
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_index: Tensor,
    num_bits: int,
    channels_last: bool = False,
    hadamard: int = 0,
) -> Tensor:
    if hadamard:
        return x.new_empty(x.shape, dtype=torch.int8)
    if channels_last:
        return torch.empty(x.shape, dtype=torch.int8, device=x.device, memory_format=torch.channels_last)
    return _dense_like(x, torch.int8)


@_fake("dequantize")
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, group_index: Tensor, dtype: torch.dtype) -> Tensor:
    return _dense_like(codes, dtype)


@_fake("quantize_int4")
def _(x: Tensor, scale: Tensor, zero_point: Tensor, group_index: Tensor) -> Tensor:
    return x.new_empty(_packed_shape(x), dtype=torch.uint8)


@_fake("dequantize_int4")
def _(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_index: Tensor,
    num_columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty([*packed.shape[:-1], num_columns], dtype=dtype)


@_fake("pack_int4")
def _(codes: Tensor) -> Tensor:
    return codes.new_empty(_packed_shape(codes), dtype=torch.uint8)


@_fake("unpack_int4")
def _(packed: Tensor, num_columns: int) -> Tensor:
    return packed.new_empty([*packed.shape[:-1], num_columns], dtype=torch.int8)


@_fake("hadamard")
def _(x: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@_fake("fake_quantize")
def _(x: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    return _dense_like(x, x.dtype)


@_fake("fake_quantize_backward")
def _(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _dense_like(x, x.dtype), torch.empty_like(scale), torch.empty_like(zero_point)


@_fake("fake_quantize_mixture")
def _(x: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    return _dense_like(x, x.dtype)


@_fake("fake_quantize_mixture_backward")
def _(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, importance: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (torch.empty_like(scale), torch.empty_like(zero_point), torch.empty_like(importance))
    return (_dense_like(x, x.dtype), *rows)


@_fake("observe")
def _(x: Tensor, counts: Tensor, extrema: Tensor, step_index: Tensor) -> None:
    return None


@_fake("set_step")
def _(timestep: Tensor, *rest: Any) -> None:
    return None


def _results(outputs: int, activation: int) -> int:
    return outputs // 2 if activation == Activation.GEGLU else outputs


@_fake("linear")
def _(x: Tensor, *rest: Any) -> Tensor:
    out_features, _, activation, _, output_bits, dtype = rest[-6:]
    shape = [*x.shape[:-1], _results(out_features, activation)]
    return x.new_empty(shape, dtype=torch.int8 if output_bits else dtype)


@_fake("conv2d")
def _(x: Tensor, *rest: Any) -> Tensor:
    g, _, activation, _, output_bits, dtype = rest[-6:]
    size = x.shape[1:3] if x.dtype == torch.uint8 else x.shape[2:]
    shape = [x.shape[0], _results(g[0], activation), *ConvGeometry.from_numbers(g).output_size(*size)]
    dtype = torch.int8 if output_bits else dtype
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


@_fake("group_norm_quantize")
def _(inputs: list[Tensor], *rest: Any) -> Tensor:
    batch, _, *size = inputs[0].shape
    shape = [batch, sum(x.shape[1] for x in inputs), *size]
    return torch.empty(shape, dtype=torch.int8, device=inputs[0].device, memory_format=torch.channels_last)


@_fake("group_norm_quantize_each")
def _(first: Tensor, second: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    layout = torch.channels_last
    a, b = (
        torch.empty(x.shape, dtype=torch.int8, device=x.device, memory_format=layout) for x in (first, second)
    )
    return a, b


@_fake("layer_norm_quantize")
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@_fake("attention_quantize")
def _(query: Tensor, *rest: Any) -> Tensor:
    return torch.empty(query.shape, dtype=torch.int8, device=query.device)


@_fake("timestep_embedding")
def _(
    waves: Tensor,
    first_weight: Tensor,
    first_bias: Tensor | None,
    second_weight: Tensor,
    second_bias: Tensor | None,
    table: Tensor | None,
    labels: Tensor | None,
) -> Tensor:
    rows = waves if labels is None else labels
    return waves.new_empty([rows.shape[0], second_weight.shape[0]])


@_fake("silu_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty([x.shape[0], weight.shape[0]])


@_fake("adaptive_rows")
def _(embedding: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = weight.shape[0] // 6
    modulation, gate = ((embedding.shape[0], width) for width in (2 * channels, channels))
    first, second = ((embedding.new_empty(modulation), embedding.new_empty(gate)) for _ in range(2))
    return (*first, *second)
