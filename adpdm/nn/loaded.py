"""Layers that are quantized from their weight alone, without calibration: weight-only, or ranges per call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..qparams import CLIP_RATIOS, range_to_qparams, row_chunks, weight_codes, weight_scale_mse
from ..quantizers.weight import WeightQuantizer
from .coded import CodedConv2d, CodedLayer, CodedLinear
from .hooks import share_hooks
from .packed import quantize

COARSE_RATIOS = CLIP_RATIOS[::5]


class LoadedLayer(CodedLayer):
    """A layer whose scales come from its weight, and whose inputs stay float or are measured at each call."""

    activation_bits: int | None

    @classmethod
    def of(cls, layer: nn.Conv2d | nn.Linear, bits: tuple[int, int | None]) -> LoadedLayer:
        """Take over a float layer on any device, meta included; `fill` gives it its codes.

        Args:
            bits: of the weight, and of the activations, None to keep those float.
        """
        twin = cls.taking_over(layer)
        twin.set_up_weight(WeightQuantizer(bits[0]), layer.weight.device)
        twin.activation_bits = bits[1]
        return twin

    def fill(self, weight: Tensor, device: torch.device) -> None:
        """Quantize a weight [O, C, *] float where it is, and keep codes and scales on `device`."""
        stored, self.weight_scale = self._quantized(weight, device)
        self._become_integer(stored)

    def quantize_values(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self._quantized(weight, weight.device)

    def _quantized(self, weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        shape, dtype = self.weight_quantizer.stored_shape(weight.shape)
        stored = torch.empty(shape, dtype=dtype, device=device)
        scale = torch.empty(1, weight.shape[0], device=device)
        for rows in row_chunks(weight):
            codes, scale[0, rows] = quantize_rows(weight[rows], self.weight_quantizer.num_bits)
            stored[rows] = self.weight_quantizer.store(codes)
        return stored, scale

    def forward(self, input: Tensor) -> Tensor:  # torch's own layers call it so
        """input [N, C, H, W] or [*, K] float to the result of the layer, of the same dtype.

        Raises:
            TypeError: for integers. Code that casts inputs to the dtype of a weight would hand over such.
        """
        if not input.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: input must be floating point, got {input.dtype}; "
                "the weight holds codes, whose dtype says nothing about inputs"
            )
        if self.activation_bits is None:
            return self.multiply(input, self.dequantized_weight().to(input.dtype), self.bias)
        return self.with_gradient(input)

    def integer(self, x: Tensor) -> Tensor:
        """The layer in integers, with the range that x has in this call."""
        assert self.activation_bits is not None
        packed = self.packed(x.device)
        q = measure(x, self.activation_bits)
        codes = quantize(x, q, packed.reads_channels_last)
        segment = ops.Segment(codes, q.scale, q.zero_point, q.group_index, *packed.weights[0])
        return packed.run([segment], packed.epilogue, x.dtype)

    def extra_repr(self) -> str:
        activations = "float" if self.activation_bits is None else f"{self.activation_bits} bits, measured"
        return f"{super().extra_repr()}, weight={self.weight_quantizer.num_bits} bits, input={activations}"


class LoadedConv2d(LoadedLayer, CodedConv2d):
    """Quantized twin of nn.Conv2d without calibration."""


class LoadedLinear(LoadedLayer, CodedLinear):  # type: ignore[misc]  # torch types the bias as never None
    """Quantized twin of nn.Linear without calibration."""


def quantize_rows(weight: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Codes [O, C, *] i8 and scales [O] f32 of a weight [O, C, *] float, in little time.

    The search tries 13 of the 61 clipping ratios, which costs up to 0.2 dB of the weight's SQNR, and with 8
    bits none, which costs up to 0.1 dB (normal, Student t and the demo model's weights, 3 to 8 bits).
    """
    ratios = COARSE_RATIOS if num_bits < 8 else (1.0,)
    scale = weight_scale_mse(weight, num_bits, ratios)
    return weight_codes(weight, scale, num_bits), scale


def measure(x: Tensor, num_bits: int) -> ops.OutputQuantizer:
    """The quantizer of one group whose range is that of x [*] float; NaN in it makes the scale NaN."""
    x = x.detach()
    low, high = torch.aminmax(x) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    low, high = low.reshape(1).float(), high.reshape(1).float()
    finite = (high - low).isfinite()
    scale, zero_point = range_to_qparams(low.where(finite, 0.0), high.where(finite, 0.0), num_bits)
    group = torch.zeros(1, dtype=torch.int32, device=x.device)
    return ops.OutputQuantizer(scale.where(finite, float("nan")), zero_point, group, num_bits)


def load_layer(model: nn.Module, name: str, bits: tuple[int, int | None]) -> LoadedLayer:
    """Replace the Conv2d or Linear `name` by its twin, which waits for its codes."""
    layer: Any = model.get_submodule(name)
    kind = LoadedConv2d if isinstance(layer, nn.Conv2d) else LoadedLinear
    twin = kind.of(layer, bits)
    model.set_submodule(name, twin)
    return twin


def loaded_layers(model: nn.Module) -> dict[str, LoadedLayer]:
    """Layers of this kind by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoadedLayer)}


def runs_on_kernels(layer: nn.Conv2d | nn.Linear) -> bool:
    """Whether the integer kernels know the layer's padding; otherwise it can only be weight-only."""
    return not isinstance(layer, nn.Conv2d) or (
        layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def float_twin(layer: CodedLayer, dtype: torch.dtype) -> nn.Conv2d | nn.Linear:
    """The plain layer of a quantized one, with the values of its codes and with its hooks."""
    plain: nn.Conv2d | nn.Linear
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Conv2d):
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size)
        settings = (layer.stride, layer.padding, layer.dilation, layer.groups, has_bias, layer.padding_mode)
        plain = nn.Conv2d(*shape, *settings, device="meta")  # type: ignore[arg-type]
    else:
        assert isinstance(layer, nn.Linear)
        plain = nn.Linear(layer.in_features, layer.out_features, has_bias, device="meta")
    plain.weight = nn.Parameter(layer.dequantized_weight().to(dtype))
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(dtype, copy=True))
    plain.training = layer.training
    share_hooks(layer, plain)
    return plain
