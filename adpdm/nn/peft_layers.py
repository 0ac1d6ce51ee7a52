"""LoRA layers of PEFT around quantized layers: folding into codes, and exact unfolding."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .coded import BEFORE_ANOTHER, CodedLayer

# Of the named ways to start an adapter, those that do not compute it from the weight of the layer.
WEIGHT_FREE_STARTS = ("gaussian", "orthogonal")


@dataclass(frozen=True)
class _Original:
    """What a layer held before an adapter was folded in; kept on the device where it was."""

    weight: Tensor  # as stored: [O, C, *] i8, or packed u8
    scale: Tensor  # [S, O] f32
    bias: Tensor | None  # [O] float
    is_requantized: bool  # by adapters that were fused, and unloaded, before

    @classmethod
    def of(cls, layer: CodedLayer) -> _Original:
        bias = None if layer.bias is None else layer.bias.data
        return cls(layer.weight.data, layer.weight_scale.data, bias, layer.is_requantized)

    def restore(self, layer: CodedLayer) -> None:
        device = layer.weight.device
        layer.store(self.weight.to(device), self.scale.to(device))
        if layer.bias is not None and self.bias is not None:
            layer.bias.data = self.bias.to(layer.bias)
        layer.is_requantized = self.is_requantized


class _Adapted:
    """What both kinds share: PEFT's layer, but for what it would do to a float weight."""

    _original: _Original | None = None

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Of the variants of PEFT none: they read the weight, which holds codes here."""
        return {(): None}

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; those that start from the weight, or compute with it, are refused.

        Raises:
            ValueError: for DoRA, and for PiSSA, OLoRA, LoftQ and other starts of that kind.
        """
        config = kwargs.get("config")
        wanted = kwargs if config is None else vars(config)
        start = wanted.get("init_lora_weights", True)
        if wanted.get("use_dora") or (isinstance(start, str) and start not in WEIGHT_FREE_STARTS):
            what = "use_dora=True" if wanted.get("use_dora") else f"init_lora_weights={start!r}"
            raise ValueError(
                f"adpdm: adapters on a {_kind(self)}, whose weight is codes, must be plain LoRA with "
                f"init_lora_weights True, False or one of {WEIGHT_FREE_STARTS}; got {what}, which computes "
                f"with a float weight; {BEFORE_ANOTHER}"
            )
        untyped: Any = super()
        untyped.update_layer(adapter_name, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the codes: values of the codes plus all updates, quantized once, to nearest.

        Args:
            safe_merge: taken for PEFT's sake; that the result is finite is always checked before it is used.
            adapter_names: None for the active ones.

        Raises:
            ValueError: for a convolution with groups, a bias where there is none, NaN or infinity.
        """
        me: Any = self
        names = [n for n in check_adapters_to_merge(me, adapter_names) if n in me.lora_A]
        if not names:
            return
        layer: CodedLayer = me.get_base_layer()
        if layer.groups > 1:
            raise ValueError(
                f"adpdm: fuse_lora on a convolution must find groups=1, got groups={layer.groups}; PEFT has "
                "no float weight of such adapters"
            )
        update = torch.zeros(layer.weight_shape, device=layer.weight.device)
        for name in names:
            update += me.get_delta_weight(name).to(update)
        bias = self._fused_bias(layer, names)
        finite = torch.isfinite(update).all() and (bias is None or torch.isfinite(bias).all())
        if not finite:
            raise ValueError(f"adpdm: adapters {names} must be finite to be fused, got NaN or infinity")
        before = _Original.of(layer)
        wanted = layer.dequantized_weight() + update
        layer.requantize(wanted)
        if bias is not None:
            layer.bias.data = bias.to(layer.bias)  # type: ignore[union-attr]
        self._original = self._original or before
        me.merged_adapters += names
        _warn_if_lost(layer, wanted, update)

    def _fused_bias(self, layer: CodedLayer, names: list[str]) -> Tensor | None:
        """The bias with those of adapters that have one, [O] float; None leaves it as it is."""
        me: Any = self
        names = [n for n in names if getattr(me, "lora_bias", {}).get(n)]
        if not names:
            return None
        if layer.bias is None:
            raise ValueError(
                f"adpdm: adapters {names} with lora_bias=True need a layer with a bias to be fused into, got "
                f"{type(layer).__name__} without"
            )
        bias: Tensor = sum((me.lora_B[n].bias.data * me.scaling[n] for n in names), layer.bias.data)
        return bias

    def unmerge(self) -> None:
        """Put the codes, scales and bias back that were there before the first adapter was folded in."""
        me: Any = self
        if self._original is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._original.restore(me.get_base_layer())
        self._original = None
        me.merged_adapters.clear()


class AdaptedLinear(_Adapted, Linear):
    """LoRA of PEFT beside a quantized linear layer."""


class AdaptedConv2d(_Adapted, Conv2d):
    """LoRA of PEFT beside a quantized convolution."""

    lora_A: Any
    lora_B: Any

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._kernel_dim = 4  # PEFT counts the dimensions of the weight, which packed 4-bit codes lack
        super().update_layer(adapter_name, *args, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update [O, C, kh, kw] of one adapter; PEFT's own reads the kernel's size off the weight."""
        down, up = self.lora_A[adapter].weight.detach(), self.lora_B[adapter].weight.detach()
        product: Tensor = up.flatten(1).float() @ down.flatten(1).float()
        product *= self.scaling[adapter]
        return product.view(-1, *down.shape[1:])


CLASSES: dict[type[nn.Module], type[Any]] = {
    kind: adapted
    for plain, adapted in ((Linear, AdaptedLinear), (Conv2d, AdaptedConv2d))
    for kind in (plain, adapted)
}


def adapted_class(owner: nn.Module) -> type[Any]:
    """The class that takes the place of a PEFT layer's own around a quantized layer.

    Raises:
        TypeError: for other methods than LoRA, many of which compute with the weight.
    """
    try:
        return CLASSES[type(owner)]
    except KeyError:
        raise TypeError(
            "adpdm: adapters on quantized layers must be LoRA on Linear or Conv2d, got "
            f"{type(owner).__module__}.{type(owner).__name__}; load the model in full precision for others, "
            f"or {BEFORE_ANOTHER}"
        ) from None


def _warn_if_lost(layer: CodedLayer, wanted: Tensor, update: Tensor) -> None:
    """Say so when rounding takes more away than the adapter gave: beside the layer it works in full."""
    error = (layer.dequantized_weight() - wanted).norm()
    if error > update.norm():
        warnings.warn(
            f"adpdm: in at least one layer, rounding to {layer.weight_quantizer.num_bits} bits moves weights "
            "further than the fused adapter does; unfuse_lora() and leave the adapter beside the layers",
            stacklevel=4,
        )


def _kind(owner: Any) -> str:
    return type(owner.get_base_layer()).__name__
