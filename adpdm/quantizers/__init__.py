"""Quantizers: activations with one function per timestep group, weights with one scale per output channel."""

from .activation import ActivationQuantizer, Importance
from .weight import WeightQuantizer

__all__ = ["ActivationQuantizer", "Importance", "WeightQuantizer"]
