"""A denoiser's forward without Python: captured once per input shape, replayed at every timestep."""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import _native
from .denoisers import find_denoiser
from .memory import trim_heap
from .nn import adapters_of
from .nn.coded import CodedLayer
from .nn.fusion import FusedBlock
from .nn.tracing import were_edited

WARMUP_CALLS = 3  # lazy module loading and cuDNN's choices come to rest within two; one to spare
FREEU = ("s1", "s2", "b1", "b2")  # what `enable_freeu` of diffusers writes into the blocks on the way up
MAX_GRAPHS = 8  # each keeps its activations: SD 1.5 at batch 2 about 2 GB


class Recorder(Protocol):
    """What can record the work of a function once and repeat it on the same memory."""

    def record(self, work: Callable[[], Any]) -> Any:
        """Run the function, remember its work, return its result (which `replay` refreshes in place)."""

    def replay(self) -> None:
        """Do the work again on what the input tensors hold now."""


class CudaRecorder:
    """A torch.cuda.CUDAGraph, warmed up on a side stream as capturing demands."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Any]) -> Any:
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP_CALLS):
                    work()
            torch.cuda.current_stream().wait_stream(side)
            # By itself it captures on a stream of the device that was the first to capture. "thread_local":
            # what other threads allocate meanwhile is no error.
            capturing = torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local")
            with capturing, _without_autocast_cache():
                return work()

    def replay(self) -> None:
        self._graph.replay()


class CpuRecorder:
    """The operator calls of one forward, made again one after the other by C++ (csrc/bindings/tape.h).

    What the forward decides in Python is decided once. So it is an error when it reads the value of a tensor,
    or gives another result the second time (random numbers).

    Raises:
        RuntimeError: in `record`, for such a forward.
    """

    def __init__(self, device: torch.device) -> None:
        self._tape = _native.Tape()

    def record(self, work: Callable[[], Any]) -> Any:
        work()  # derives what is derived at first use, outside of the recording
        with _Listener(self._tape), _without_autocast_cache():
            result = work()
        leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        before = [leaf.clone() for leaf in leaves]
        self._tape.finish(leaves)
        trim_heap()  # the recording held everything that the forward computed
        self._tape.replay()
        if not all(_is_same(a, b) for a, b in zip(leaves, before, strict=True)):
            raise RuntimeError("adpdm.graph: the forward is not repeatable: same inputs, another result")
        return result

    def replay(self) -> None:
        self._tape.replay()


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same values; NaN is the same as NaN."""
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


class _Listener(TorchDispatchMode):
    """Puts every operator call on a tape."""

    def __init__(self, tape: Any) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise _value_read("`.item()`, `if tensor:`")
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if isinstance(result, bool | int | float):
            raise _value_read(f"`{schema.name}`")
        self._tape.add(schema.name, schema.overload_name, args, kwargs or {}, result)
        return result


class _Watch(TorchFunctionMode):
    """Refuses what reads values without an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise _value_read(f"`.{func.__name__}()`")
        return func(*args, **(kwargs or {}))


_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


def _value_read(how: str) -> RuntimeError:
    return RuntimeError(
        f"adpdm.graph: the forward reads a value of a tensor ({how}), which a recording cannot repeat"
    )


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Let a recording cast weights by calls of its own, not take what an earlier forward has cast.

    Autocast frees that when its context ends, and a CUDA graph would go on reading it.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def recorder_of(device: torch.device) -> Recorder:
    """The recorder for a device."""
    return CudaRecorder(device) if device.type == "cuda" else CpuRecorder(device)


@dataclass
class _Captured:
    """One graph with the memory it reads from and writes to."""

    recorder: Recorder
    inputs: list[Tensor]
    outputs: list[Any]
    rebuild: Callable[[list[Any]], Any]  # what the forward returns, of its leaves

    def run(self, tensors: list[Tensor]) -> Any:
        for static, given in zip(self.inputs, tensors, strict=True):
            static.copy_(given)
        self.recorder.replay()
        fresh = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.outputs]
        return self.rebuild(fresh)


class _Parts:
    """What a recording takes for granted of a denoiser: modules, how much adapters act, attention, FreeU.

    And what was derived of quantized layers, which it holds: CUDA graphs read that memory, whoever else has
    forgotten it.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        modules = list(denoiser.modules())
        coded = [m for m in modules if isinstance(m, CodedLayer)]
        derived = [entry for layer in coded for entry in layer.derived_entries()]
        self._children = _native.Children([m._modules for m in modules if m._modules], derived)
        self._copied = [pair for layer in coded for pair in layer.copied()]
        self._adapters = list(adapters_of(denoiser).values())
        forwards = [m.__dict__.get("forward") for m in modules]
        self._attentions = [f for f in forwards if isinstance(f, FusedBlock) and f.int8 is not None]
        # Read from dictionaries: nn.Module's way to an attribute that is missing takes microseconds.
        self._processed = [m.__dict__ for m in modules if "processor" in m.__dict__]
        processors = [m.__dict__.get("processor", m._modules.get("processor")) for m in modules]
        self._tuned = [vars(p) for p in processors if p is not None and _plain(vars(p))]
        up_blocks = denoiser._modules.get("up_blocks")
        self._up_blocks = [block.__dict__ for block in up_blocks.children()] if up_blocks else []
        self._settings = self._read()

    def _read(self) -> list[Any]:
        return [
            *[attention.int8 for attention in self._attentions],
            *[_settings(adapter) for adapter in self._adapters],
            *[attributes.get("processor") for attributes in self._processed],
            *[_plain(attributes) for attributes in self._tuned],
            *[attributes.get(name) for attributes in self._up_blocks for name in FREEU],
        ]

    def are_as_recorded(self) -> bool:
        """Whether nothing was exchanged, activated, rescaled, folded in, derived or set anew since."""
        is_same = self._children.unchanged() and not were_edited(self._copied)
        return is_same and self._read() == self._settings


def _plain(attributes: dict[str, Any]) -> list[tuple[str, Any]]:
    """Settings of an attention processor that Python decides by, such as the scales of IP-Adapters."""
    plain = (bool, int, float, str)
    found: list[tuple[str, Any]] = []
    for name, value in attributes.items():
        if type(value) in plain:
            found.append((name, value))
        elif type(value) is list and all(type(x) in plain for x in value):
            found.append((name, tuple(value)))
    return found


def _settings(adapter: Any) -> Hashable:
    """What of an adapter's layer is decided in Python, and where its tensors lie; their values may vary."""
    scaling = getattr(adapter, "scaling", {})
    return (
        adapter.disable_adapters,
        tuple(adapter.active_adapters),
        tuple(adapter.merged_adapters),
        tuple((name, id(x) if isinstance(x, Tensor) else x) for name, x in scaling.items()),
        tuple(parameter.data_ptr() for parameter in adapter.parameters()),
    )


class GraphedForward:
    """Replacement of a denoiser's `forward` that captures each input shape once and replays it afterwards.

    The step hook runs outside the graph and writes the groups into the tensor that the captured kernels read:
    that is why one graph serves all timesteps. Nothing else of the call may vary but the values of tensors;
    other arguments (flags, dictionaries) and autocast are part of the key. When modules were exchanged, as
    PEFT does, quantized layers moved or derived anew, or adapters, attention or FreeU set otherwise, graphs
    are forgotten and captured anew. Threads wait for one another, since a graph reads and writes memory of
    its own.

    Raises:
        RuntimeError: of a call with gradients enabled, of one that would need more than `max_graphs` graphs,
            and of a forward that cannot be recorded.
        TypeError: for arguments without a sample or timestep, given twice, or that cannot be compared.
        ValueError: for tensors on several devices.
    """

    is_capture = True  # pipeline_checks.py, in an earlier layer, asks for it

    def __init__(
        self,
        denoiser: nn.Module,
        make_recorder: Callable[[torch.device], Recorder] = recorder_of,
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        self._denoiser, self._forward = denoiser, denoiser.forward
        self._replaced = denoiser.__dict__.get("forward")  # another library's, as accelerate's hooks leave it
        self._names = _names_of(denoiser)
        self._make_recorder = make_recorder
        self._max_graphs = max_graphs
        self._captured: dict[Hashable, _Captured] = {}
        self._parts = _Parts(denoiser)
        self._lock = threading.RLock()  # a forward may call its denoiser for a part of the batch
        _graphed.add(self)

    def __len__(self) -> int:
        return len(self._captured)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "adpdm.graph: a captured denoiser has no gradients; call it in torch.no_grad()"
            )
        given = self._by_name(args, kwargs)
        sample: Tensor = given[self._names[0]]
        device = sample.device
        # A number would be burnt into the graph: as a tensor it is an input like the others.
        timestep = torch.as_tensor(given.pop("timestep")).to(device)
        # One value stands for all images, so that it shares a graph with what pipelines expand to the batch.
        shape = sample.shape[:1] if timestep.dim() < 2 and timestep.numel() == 1 else timestep.shape
        leaves, spec = _flatten(given)
        kinds = [_leaf_key(leaf, device) for leaf in leaves]
        key = (spec, _autocast_dtype(device.type), timestep.dtype, shape, *kinds)
        with self._lock:
            if not self._parts.are_as_recorded():
                self._captured.clear()
                self._parts = _Parts(self._denoiser)
            captured = self._captured.get(key)
            if captured is None:
                captured = self._capture(leaves, spec, timestep.expand(shape))
                if not self._parts.are_as_recorded():  # it was the first, or derived anew what others read
                    self._captured.clear()
                    self._parts = _Parts(self._denoiser)
                self._captured[key] = captured
            return captured.run([timestep, *[leaf for leaf in leaves if isinstance(leaf, Tensor)]])

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call in one order.

        Pipelines name the sample, the timestep, both or neither, and its place differs between models.
        """
        given = dict(zip(self._names, args, strict=False)) | kwargs
        if len(given) < len(args) + len(kwargs):
            raise TypeError(
                f"adpdm.graph: wanted each of the arguments {self._names} at most once, got {len(args)} by "
                f"position and {sorted(kwargs)} by name"
            )
        if missing := {self._names[0], "timestep"} - given.keys():
            raise TypeError(
                f"adpdm.graph: wanted the arguments {self._names[0]} and timestep, got no {sorted(missing)}"
            )
        return {name: given.pop(name) for name in self._names if name in given} | given

    def _capture(self, leaves: list[Any], spec: Hashable, timestep: Tensor) -> _Captured:
        if len(self._captured) == self._max_graphs:
            raise RuntimeError(
                f"adpdm.graph: wanted at most max_graphs={self._max_graphs} different inputs (shapes, "
                "dtypes, flags), got another one; raise max_graphs, or keep shapes fixed"
            )
        # What is made in inference mode could never be written outside of it again.
        with torch.inference_mode(False), torch.no_grad():
            own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            own_timestep = timestep.clone(memory_format=torch.contiguous_format)
            recorder = self._make_recorder(timestep.device)
            # Containers of its own for every call: diffusers takes residuals of adapters off their list.
            with _Watch():
                result = recorder.record(
                    lambda: self._forward(**_unflatten(own, spec), timestep=own_timestep)
                )
        inputs = [own_timestep, *[x for x in own if isinstance(x, Tensor)]]
        return _Captured(recorder, inputs, pytree.tree_leaves(result), _rebuild(result))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Copies have the `forward` that was replaced: a recording is of this denoiser's memory."""
        if self._replaced is None:
            return getattr, (self._denoiser, "forward")
        return _itself, (self._replaced,)

    def reset_after_fork(self) -> None:
        """Forget what a thread that is not in this process was about to write."""
        if not self._lock.acquire(blocking=False):
            self._lock = threading.RLock()
            self._captured.clear()
            return
        self._lock.release()

    def restore(self) -> None:
        """Give the denoiser the `forward` back that it had."""
        if self._replaced is None:
            del self._denoiser.forward
        else:
            self._denoiser.forward = self._replaced


_graphed: weakref.WeakSet[GraphedForward] = weakref.WeakSet()


def _reset_graphed() -> None:
    for graphed in _graphed:
        graphed.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_graphed)


def _itself(forward: Any) -> Any:
    return forward


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast computes in, where it is enabled."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _names_of(denoiser: nn.Module) -> list[str]:
    """Names of the arguments of a forward: the sample first, the timestep somewhere."""
    signature = inspect.signature(denoiser.forward)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    unnamed = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}
    names = [n for n, p in signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if kinds & unnamed or "timestep" not in names[1:]:
        raise TypeError(
            "adpdm.graph: wanted a forward that takes a sample first and arguments by name, among them "
            f"timestep; got {type(denoiser).__name__}.forward{signature}"
        )
    return names


_LEAVES = (Tensor, bool, int, float, str, type(None))


def _flatten(given: dict[str, Any]) -> tuple[list[Any], Hashable]:
    """The leaves of a call's arguments, and where they belong.

    Most calls have nothing nested, and pytree would take longer over them than a small layer does.
    """
    values = list(given.values())
    if all(isinstance(value, _LEAVES) for value in values):
        return values, tuple(given)
    return pytree.tree_flatten(given)


def _unflatten(leaves: list[Any], spec: Any) -> dict[str, Any]:
    """Inverse of `_flatten`."""
    if isinstance(spec, pytree.TreeSpec):
        given: dict[str, Any] = pytree.tree_unflatten(leaves, spec)
        return given
    return dict(zip(spec, leaves, strict=True))


def _rebuild(result: Any) -> Callable[[list[Any]], Any]:
    """Makes such a result of other leaves; what diffusers returns, tensors by name, without pytree."""
    if isinstance(result, dict) and all(isinstance(value, Tensor) for value in result.values()):
        kind, names = type(result), list(result)
        return lambda leaves: kind(**dict(zip(names, leaves, strict=True)))
    spec = pytree.tree_structure(result)
    return lambda leaves: pytree.tree_unflatten(leaves, spec)


def _leaf_key(leaf: Any, device: torch.device) -> Hashable:
    """What has to agree for a graph to serve another call."""
    if isinstance(leaf, Tensor):
        if leaf.device != device:
            raise ValueError(
                f"adpdm.graph: all tensors must be on the sample's device {device}, got one on {leaf.device}"
            )
        return (leaf.shape, leaf.dtype, leaf.stride())
    if not isinstance(leaf, Hashable):
        raise TypeError(
            f"adpdm.graph: arguments must be tensors or hashable values, got {type(leaf).__name__}"
        )
    return (type(leaf), leaf)


def is_captured(denoiser: nn.Module) -> bool:
    """Whether the denoiser's `forward` is one that `capture` put there."""
    return isinstance(denoiser.__dict__.get("forward"), GraphedForward)


def capture(
    pipe_or_denoiser: Any,
    *,
    make_recorder: Callable[[torch.device], Recorder] = recorder_of,
    max_graphs: int = MAX_GRAPHS,
) -> GraphedForward:
    """Let a denoiser run without Python: its first call at a shape captures, later ones replay.

    On a GPU, launching the few hundred kernels of a U-Net takes longer than running them at small batches; a
    replay is one launch (a CUDA graph). On a CPU, finding the next operator takes Python a third of the time
    of a small U-Net; a replay calls the same operators from C++. Works for any denoiser, quantized or not;
    adapters may come and go, quantized layers may move; call `release` before changing it otherwise, moving
    one that is not quantized, or adding hooks to its parts. Calls from several threads wait for one another;
    on a GPU they must use the same stream. Copies of a captured denoiser, by `copy.deepcopy` or pickle, are
    not captured.

    Args:
        pipe_or_denoiser: diffusers pipeline or denoiser on a CPU or CUDA device.
        make_recorder: gives the recorder of one graph, for tests and other devices.
        max_graphs: different inputs to keep graphs of; one more is an error.

    Returns: the callable that now is the denoiser's `forward`; its length is the number of graphs.

    Raises:
        ValueError: if the denoiser is on another device, or captured already.
        TypeError: if there is no denoiser.
    """
    denoiser = find_denoiser(pipe_or_denoiser)
    if is_captured(denoiser):
        raise ValueError("adpdm.graph: this denoiser is captured already; call adpdm.graph.release first")
    device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    if make_recorder is recorder_of and device.type not in ("cpu", "cuda"):
        raise ValueError(f"adpdm.graph: wanted a denoiser on a CPU or CUDA device, got one on {device}")
    graphed = GraphedForward(denoiser, make_recorder, max_graphs)
    denoiser.forward = graphed
    return graphed


def release(pipe_or_denoiser: Any) -> None:
    """Give a captured denoiser its own `forward` back and free the graphs.

    Raises:
        ValueError: if it was not captured.
    """
    denoiser = find_denoiser(pipe_or_denoiser)
    if not is_captured(denoiser):
        raise ValueError(f"adpdm.graph: this {type(denoiser).__name__} is not captured")
    denoiser.__dict__["forward"].restore()
