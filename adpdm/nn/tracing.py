"""What is derived from parameters and kept: ready made for traced graphs, outdated by edits in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Copied = list[tuple[Tensor, int]]  # parameters that something derived holds copies of, and versions they had


def derived(owner: Any, name: str) -> Any:
    """`owner.name`, a property that is computed at first use and kept.

    torch.compile would take its computation into the graph, from where it cannot be kept. So while a graph is
    traced it is computed beforehand, at compile time.
    """
    if torch.compiler.is_compiling():
        from torch._dynamo.comptime import comptime

        comptime(_compute)
    return getattr(owner, name)


def versions(parameters: Iterable[Tensor | None]) -> Copied:
    """What `were_edited` looks at; tensors of inference mode, which count no edits, are left out."""
    return [(x, x._version) for x in parameters if x is not None and not x.is_inference()]


def were_edited(copied: Copied) -> bool:
    """Whether one was changed in place since, but for edits through `.data`; compiled graphs do not look."""
    is_compiling = torch.compiler.is_compiling()
    return not is_compiling and any(parameter._version != version for parameter, version in copied)


def _compute(context: Any) -> None:
    """Compute the property of the locals `owner` and `name` on the objects behind what dynamo traces."""
    owner = context.get_local("owner")._i_will_not_complain_if_bc_breaks_VariableTracker().value
    getattr(owner, context.get_local("name").as_python_constant())
