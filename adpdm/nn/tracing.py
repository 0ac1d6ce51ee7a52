"""Lets a traced graph find the packed weights of a layer ready made, instead of the work of packing."""

from __future__ import annotations

from typing import Any

import torch


def derived(owner: Any, name: str) -> Any:
    """`owner.name`, a property that is computed at first use and kept.

    torch.compile would take its computation into the graph, from where it cannot be kept. So while a graph is
    traced it is computed beforehand, at compile time.
    """
    if torch.compiler.is_compiling():
        from torch._dynamo.comptime import comptime

        comptime(_compute)
    return getattr(owner, name)


def _compute(context: Any) -> None:
    """Compute the property of the locals `owner` and `name` on the objects behind what dynamo traces."""
    owner = context.get_local("owner")._i_will_not_complain_if_bc_breaks_VariableTracker().value
    getattr(owner, context.get_local("name").as_python_constant())
