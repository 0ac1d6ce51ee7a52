"""Follows tensors through one forward pass: which function made each, and which functions used it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

# They only rearrange, and keep every channel apart from the others.
VIEWS = frozenset(
    (
        "view",
        "reshape",
        "permute",
        "transpose",
        "contiguous",
        "unsqueeze",
        "squeeze",
        "flatten",
        "__getitem__",
        "to",
        "split_with_sizes",
    )
)
PRODUCTS = frozenset(("linear", "conv2d"))


@dataclass(frozen=True)
class Node:
    """A tensor of the forward pass, by its number; the tensor itself is not kept."""

    number: int
    shape: torch.Size


@dataclass(frozen=True, eq=False)
class Call:
    """One function that ran.

    Args:
        name: e.g. `linear`, `__add__`.
        arguments: positional, then by keyword; a Node for a tensor, a tuple of them for a list of tensors.
        results: the tensors that came out.
    """

    name: str
    arguments: tuple[Any, ...]
    results: tuple[Node, ...]

    @property
    def inputs(self) -> list[Node]:
        """Tensors among the arguments."""
        parts = [a if isinstance(a, tuple) else (a,) for a in self.arguments]
        return [x for part in parts for x in part if isinstance(x, Node)]

    @property
    def is_view(self) -> bool:
        """Whether it only rearranges its first argument, and indexes no tensor by another."""
        return self.name in VIEWS and len(self.inputs) == 1


class Dataflow:
    """The calls of one forward pass, from both ends of every tensor.

    Args: model: whose modules' own parameters are known by module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.made: dict[Node, Call] = {}
        self.used: dict[Node, list[Call]] = defaultdict(list)
        self._numbers = itertools.count()
        self._owners = {
            id(parameter): (module, name)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
        }
        self._parameters: dict[Node, tuple[nn.Module, str]] = {}
        self._nodes: Any = WeakTensorKeyDictionary()  # of tensors that are still there

    @classmethod
    def of(cls, model: nn.Module, forward: Callable[[], object]) -> Dataflow:
        """Trace `forward`, which runs the model once."""
        flow = cls(model)
        with torch.no_grad(), _Recorder(flow):
            forward()
        return flow

    def record(self, name: str, arguments: Iterable[Any], output: Any) -> None:
        """Add a call; one that returns no tensor, as asking for a shape, uses nothing."""
        tensors = _tensors(output)
        if not tensors:
            return
        described = tuple(self._described(a) for a in arguments)  # first: the output may be an argument
        call = Call(name, described, tuple(self._new_node(x) for x in tensors))
        for node in call.results:
            self.made[node] = call
        for node in dict.fromkeys(call.inputs):
            self.used[node].append(call)

    def owner(self, node: Any) -> nn.Module | None:
        """The module whose weight it is."""
        module, name = self._parameters.get(node, (None, "")) if isinstance(node, Node) else (None, "")
        return module if name == "weight" else None

    def times_run(self, module: nn.Module) -> int:
        """How often the weight of a module was an argument."""
        return sum(len(self.used[n]) for n, owner in self._parameters.items() if owner == (module, "weight"))

    def origin(self, node: Any) -> tuple[Node | None, Call | None]:
        """What a tensor is without its views, and the call that made that."""
        while isinstance(node, Node):
            call = self.made.get(node)
            if call is None or not call.is_view:
                return node, call
            node = call.inputs[0]
        return None, None

    def users(self, node: Node) -> list[Call]:
        """Calls that use a tensor or a view of it."""
        found = []
        for call in self.used[node]:
            found += [user for part in call.results for user in self.users(part)] if call.is_view else [call]
        return found

    def _described(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self._node(argument)
        if isinstance(argument, list | tuple) and any(isinstance(x, Tensor) for x in argument):
            return tuple(self._described(x) for x in argument)
        return argument

    def _node(self, tensor: Tensor) -> Node:
        node = self._nodes.get(tensor)
        return self._new_node(tensor) if node is None else node

    def _new_node(self, tensor: Tensor) -> Node:
        node = Node(next(self._numbers), tensor.shape)
        self._nodes[tensor] = node
        if id(tensor) in self._owners:
            self._parameters[node] = self._owners[id(tensor)]
        return node


class _Recorder(TorchFunctionMode):
    """Tells a Dataflow of every function while it is active."""

    def __init__(self, flow: Dataflow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.flow.record(getattr(func, "__name__", str(func)), [*args, *(kwargs or {}).values()], output)
        return output


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [x for x in output if isinstance(x, Tensor)] if isinstance(output, list | tuple) else []
