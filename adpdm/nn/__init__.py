"""Quantized twins of torch layers and the functions that put them into a denoiser."""

from .layers import QuantConv2d, QuantLayer, QuantLinear
from .swap import Coverage, LayerInfo, describe_layers, quant_layers, swap_layers

__all__ = [
    "Coverage",
    "LayerInfo",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "describe_layers",
    "quant_layers",
    "swap_layers",
]
