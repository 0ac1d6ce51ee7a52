"""Methods of diffusers' models that a quantized one needs otherwise, or cannot have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .diffusers_config import AdpdmConfig

# Methods that would fail on codes halfway, or cast to what the kernels do not take.
REFUSED = {
    "fuse_qkv_projections": (
        "fuse_qkv_projections: wanted a float model, got a quantized one, whose projections are codes; its "
        "fused blocks multiply those of one input together already"
    ),
    "double": (
        "double: the integer kernels take activations in float32, float16 or bfloat16, got torch.float64; "
        "call dequantize() first"
    ),
}


@contextmanager
def _castable(model: Any) -> Iterator[None]:
    """Let diffusers 0.42 cast a quantized model for a while; codes and scales keep their dtypes."""
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True


class _SaveAdapter:
    """`save_lora_adapter` of a quantized model; a class, so that it is copied and pickled with its model.

    That of diffusers 0.42 first casts the model to the dtype None, which `to` refuses of quantized models.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: Any,
        adapter_name: str = "default",
        upcast_before_saving: bool = False,
        **kwargs: Any,
    ) -> None:
        untyped: Any = self.model
        if upcast_before_saving:
            raise ValueError(
                "save_lora_adapter: a quantized model cannot be cast, so upcast_before_saving must be False; "
                "adapters on quantized layers are float32 already unless loaded otherwise"
            )
        with _castable(untyped):
            type(untyped).save_lora_adapter(untyped, save_directory, adapter_name, **kwargs)


class _LoadImageAdapter:
    """`_load_ip_adapter_weights` of a quantized model, behind `pipe.load_ip_adapter`; see `_SaveAdapter`.

    That of diffusers 0.42 last casts the model to the dtype that it has.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        untyped: Any = self.model
        with _castable(untyped):
            type(untyped)._load_ip_adapter_weights(untyped, *args, **kwargs)


class _Refusal:
    """In place of a method that a quantized model cannot have; a class, as `_SaveAdapter` is."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(self.sentence)


REPLACED = {"save_lora_adapter": _SaveAdapter, "_load_ip_adapter_weights": _LoadImageAdapter}


def replace_methods(model: nn.Module, config: AdpdmConfig) -> None:
    """Give a quantized model methods for adapters that work, and sentences for what cannot work."""
    for name, kind in REPLACED.items():
        if hasattr(type(model), name):
            model.__dict__[name] = kind(model)
    for name, sentence in REFUSED.items():
        works = name == "double" and config.activation_bits is None  # no kernels run
        if hasattr(type(model), name) and not works:
            model.__dict__[name] = _Refusal(sentence)


def restore_methods(model: nn.Module) -> None:
    """Undo `replace_methods`."""
    for name in (*REPLACED, *REFUSED):
        model.__dict__.pop(name, None)
