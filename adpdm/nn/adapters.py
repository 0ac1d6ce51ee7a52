"""Notices when PEFT wraps a quantized layer, so that the adapter learns what folding into codes means."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .coded import BEFORE_ANOTHER, CodedLayer

EQUALIZED = "adpdm_equalized"  # attribute of modules
IMAGE_PROJECTIONS = ("encoder_hid_proj.image_projection_layers.", "image_proj.")  # of IP-Adapters
BASE = "base_layer"  # the name under which PEFT keeps the layer that it wraps


def watch_adapters() -> None:
    """Look at every layer that PEFT wraps from now on; PEFT itself is neither imported nor changed.

    For LoRA, PEFT asks the type of the wrapped layer alone and has no registry for new ones. What is left to
    hear of it is torch's hook on modules that get children.
    """
    register_module_module_registration_hook(_notice)


def mark_equalized(model: nn.Module, names: Iterable[str]) -> None:
    """Remember of modules that their weights, and what flows between them, are no longer the float model's.

    Raises:
        ValueError: for a name that the model does not have.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(
                f"adpdm checkpoint: equalized must name modules of {type(model).__name__}, got {name!r}"
            )
        setattr(modules[name], EQUALIZED, True)


def equalized_modules(model: nn.Module) -> list[str]:
    """Names of the modules that `mark_equalized` has marked."""
    return [name for name, module in model.named_modules() if getattr(module, EQUALIZED, False)]


def _notice(owner: nn.Module, name: str, child: nn.Module | None) -> None:
    """Give a PEFT layer that wraps a quantized one the class that knows codes."""
    peft = sys.modules.get("peft.tuners.tuners_utils") if name == BASE else None
    if peft is None or not isinstance(owner, peft.BaseTunerLayer):
        return
    if getattr(child, EQUALIZED, False):
        raise ValueError(
            "adpdm: adapters are made for the channels of the float model, which equalization has changed in "
            "some of the layers they name; quantize with equalization='off', which at 8-bit activations is "
            f"the default, or {BEFORE_ANOTHER} on other layers"
        )
    if isinstance(child, CodedLayer):
        from .peft_layers import adapted_class  # imports PEFT, which is there by now

        owner.__class__ = adapted_class(owner)


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """The layers of PEFT in a model, by name."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None:
        return {}
    return {name: m for name, m in model.named_modules() if isinstance(m, peft.BaseTunerLayer)}


def refuse_adapters(verb: str, model: nn.Module, may_fuse: bool = True) -> None:
    """For what changes layers, which with adapters have other names and other work.

    Args:
        verb: what refuses them.
        model: whose layers are looked at.
        may_fuse: whether `verb` takes a model into which adapters were fused.

    Raises:
        ValueError: if there are any.
    """
    found = list(adapters_of(model))
    if found:
        raise ValueError(
            f"{verb}: wanted {type(model).__name__} without adapters, got them on {found[:5]}; call "
            f"unload_lora(){', after fuse_lora() if they shall stay in effect' if may_fuse else ' first'}"
        )


def without_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a model under the names it has without adapters; said if there were any.

    Of an IP-Adapter, whose layers lie in attention processors, nothing is kept; a model that is made of its
    config has none.

    Raises:
        ValueError: for modules that PEFT copies whole (`modules_to_save`), of which two would claim a name.
    """
    copied = [key for key in state if ".modules_to_save." in key]
    if copied:
        raise ValueError(
            f"save_pretrained: wanted adapters that are LoRA alone, got modules_to_save as in {copied[0]!r}; "
            "call unload_lora() first"
        )
    state = _without_image_adapter(state)
    middle = f".{BASE}."
    wrapped = {key.partition(middle)[0] + "." for key in state if middle in key}
    if not wrapped:
        return state
    warnings.warn(
        "save_pretrained: adapters are left out, unless fused; save_lora_adapter() or save_lora_weights() "
        "writes them",
        stacklevel=4,
    )
    return {
        key.replace(middle, "."): value
        for key, value in state.items()
        if middle in key or not any(key.startswith(name) for name in wrapped)
    }


def _without_image_adapter(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict without an IP-Adapter; said if there was one."""
    if not any(".processor.to_k_ip." in key for key in state):
        return state
    warnings.warn("save_pretrained: the IP-Adapter is left out; load it again after loading", stacklevel=5)
    own = {key: x for key, x in state.items() if ".processor." not in key}
    own = {key: x for key, x in own.items() if not key.startswith(IMAGE_PROJECTIONS)}
    moved = "text_encoder_hid_proj."  # where loading an adapter has put the one that Kolors has
    return {
        key.replace(moved, "encoder_hid_proj.") if key.startswith(moved) else key: x for key, x in own.items()
    }
