"""Hooks that users have on a layer when another takes its place: which go along, and what forbids that."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# nn.Module's own names: of what is called around forward and backward, and of what sees the state_dict.
_CALLED = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_OF_STATE = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def share_hooks(layer: nn.Module, twin: nn.Module) -> None:
    """Let a twin call the hooks around forward and backward that a layer has.

    They share the dictionaries: what a hook's handle removes is gone from both, whichever is in the model.
    """
    for name in _CALLED:
        twin.__dict__[name] = layer.__dict__[name]


def has_state_hooks(layer: nn.Module) -> bool:
    """Whether hooks see the layer's state_dict; made for a float weight, they cannot know codes."""
    return any(layer.__dict__[name] for name in _OF_STATE)


def reason_to_stay(layer: nn.Module) -> str:
    """Why a quantized twin could not do what the float layer does; empty when it can."""
    if "forward" in layer.__dict__:
        return "its forward was replaced, as offloading does"
    if layer._parameters.get("weight") is None:
        return "its weight is made before each call, as by torch.nn.utils.prune until prune.remove()"
    return "hooks see its state_dict" if has_state_hooks(layer) else ""


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a convolution or linear layer was given, by position or, as some of diffusers do, by name."""
    given: Tensor = args[0] if args else kwargs["input"]
    return given
