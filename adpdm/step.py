"""The one clock: which sampling step the denoiser is in, written by a hook and read by kernels as tensors."""

from __future__ import annotations

import inspect
import os
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .config import TimestepPolicy

POLL_SECONDS = 0.2  # between looks whether the call that is waited for is still running


class Record(NamedTuple):
    """What the clock looks up."""

    timesteps: Tensor  # [T] f32, noisiest first
    table: Tensor  # [T, num_slots] i32
    correction: Tensor | None  # [T, 2] f32, weights of prediction and sample (correction.py)


class StepState(nn.Module):
    """The calibrated timesteps, the groups at each of them, and the current row of both.

    Layers refer to this module and read `group_index` through their slot; only `set_timestep` writes. The key
    is the value that the denoiser is given, in whatever unit: a training timestep, or a noise level.

    What is read is out of reach of group offloading, which exchanges the data of buffers for that on another
    device, or for nothing while they are on disk: `record` shares memory with them, the current step is none.

    Args:
        num_slots: number of grouped quantizers in the denoiser.
        num_steps: T, calibrated timesteps.
        policy: `nearest` calibrated timestep, or `error` for any other.
        device: of all tensors; the quantizers that refer to this module are made there, too.
    """

    group_index: Tensor  # [num_slots] i32, groups of the current step
    step_index: Tensor  # [1] i32, current step
    current_correction: Tensor  # [2] f32
    timesteps: Tensor  # of the record, for state_dict
    table: Tensor
    correction: Tensor | None

    def __init__(
        self,
        num_slots: int,
        num_steps: int,
        policy: TimestepPolicy = "nearest",
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.group_index, self.step_index = zeros(num_slots), zeros(1)
        self.current_correction = torch.zeros(2, device=device)
        self.register_buffer("timesteps", torch.zeros(num_steps, device=device))
        self.register_buffer("table", zeros(num_steps, num_slots))
        self.register_buffer("correction", None)
        self.take_record()
        self.register_load_state_dict_post_hook(_take_loaded)

    def take_record(self) -> None:
        """Read what the buffers hold from now on, with the current step on their device."""
        correction = None if self.correction is None else self.correction.detach()
        self.record = Record(self.timesteps.detach(), self.table.detach(), correction)
        device = self.table.device
        self.group_index, self.step_index = _moved(self.group_index, device), _moved(self.step_index, device)
        self.current_correction = _moved(self.current_correction, device)

    def set_correction(self, correction: Tensor | None) -> None:
        """Take the correction of predictions, [T, 2] f32, which is saved from now on; None takes it away."""
        self.correction = None if correction is None else correction.to(self.table.device)
        self.take_record()

    def set_timesteps(self, timesteps: Tensor) -> None:
        """Take the calibrated timesteps [T], noisiest first."""
        self.timesteps.copy_(timesteps)

    def set_timestep(self, timestep: Tensor | float | int) -> None:
        """Make the groups of one timestep current. A [B] tensor must hold one value B times.

        Raises:
            ValueError: for mixed timesteps in a batch (checked on the CPU only, where looking is free), or
                for a timestep outside the calibrated ones under the policy `error`.
        """
        value = self._one_value(timestep)
        on_cpu = value.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and self.policy == "nearest":
            current = (self.step_index, self.group_index, self.current_correction)
            ops.set_step(value, *self.record, *current)
            return
        distance = (self.record.timesteps - value.float()).abs()
        step = distance.argmin(0, keepdim=True)
        if self.policy == "error":
            self._refuse_unknown(value, distance.index_select(0, step))
        self._make_current(step)

    def set_step(self, step: int) -> None:
        """Make step `step` of the calibrated timesteps current where no denoiser runs that sets it."""
        self._make_current(torch.tensor([step], device=self.group_index.device))

    def _make_current(self, step: Tensor) -> None:
        """Copy row `step` [1] of all tables to where layers and hooks read it."""
        self.step_index.copy_(step)
        self.group_index.copy_(self.record.table.index_select(0, step)[0])
        if self.record.correction is not None:
            self.current_correction.copy_(self.record.correction.index_select(0, step)[0])

    def _one_value(self, timestep: Tensor | float | int) -> Tensor:
        """The timestep as [1], in the dtype it came in."""
        if not isinstance(timestep, Tensor):
            return torch.tensor([timestep], device=self.group_index.device)
        if timestep.numel() == 1:
            return timestep.detach().reshape(1).to(self.group_index.device)
        flat = timestep.detach().reshape(-1)
        if flat.numel() == 0:
            raise ValueError("timestep must hold at least one value, got an empty tensor")
        if flat.device.type == "cpu":
            _demand(
                (flat == flat[0]).all(),
                "adpdm quantizes one timestep per call, but the batch mixes timesteps; "
                "call the denoiser once per timestep",
                lambda: f": {sorted({float(t) for t in flat})[:8]}",
            )
        return flat[:1].to(self.group_index.device)

    def _refuse_unknown(self, value: Tensor, distance: Tensor) -> None:
        """Raise for a timestep [1] at a distance [1] that rounding to its dtype does not explain.

        Pipelines of flow matching hand over timesteps in the dtype of the samples, and divided by 1000 once
        they are: two roundings of half an epsilon each.
        """
        tolerance: Tensor | float = 0.5
        known = self.record.timesteps
        if value.dtype.is_floating_point:
            eps = max(torch.finfo(value.dtype).eps, torch.finfo(torch.float32).eps)
            tolerance = eps * value.abs().float()
        _demand(
            (distance <= tolerance)[0],
            "the timestep was not calibrated and timestep_policy is 'error'",
            lambda: f": got {float(value):g}, calibrated are {[round(t, 6) for t in known.tolist()]}",
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow .to() to another device but not to another dtype: bfloat16 would merge timesteps."""
        timesteps, correction = self.timesteps, self.correction
        super()._apply(fn, recurse)
        if self.timesteps.dtype != torch.float32:
            self.timesteps = timesteps.to(self.timesteps.device)
            self.correction = None if correction is None else correction.to(self.timesteps.device)
        self.take_record()
        return self


def _moved(current: Tensor, device: torch.device) -> Tensor:
    """What the current step holds on another device; from the meta device nothing, until the next call."""
    return torch.zeros_like(current, device=device) if current.is_meta else current.to(device)


def _take_loaded(state: nn.Module, incompatible_keys: object) -> None:
    """After `load_state_dict`, which with `assign=True` puts other buffers in their place."""
    assert isinstance(state, StepState)
    if state.record.table.data_ptr() != state.table.data_ptr():
        state.take_record()


def _demand(condition: Tensor, sentence: str, details: Callable[[], str]) -> None:
    """Raise ValueError unless the condition holds; RuntimeError in a compiled graph, which sees no values."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, sentence)
    elif not bool(condition):
        raise ValueError(sentence + details())


class _Turn:
    """Calls of a denoiser, one thread after the other: its layers share one current step.

    A call that ends without hooks, as torch has it after Ctrl-C, leaves its turn behind. Whoever waits sees
    that the frame of that call is on no stack any more, and takes over. Copies have turns of their own.
    """

    def __init__(self) -> None:
        self.reset()
        _turns.add(self)

    def reset(self) -> None:
        self.free = threading.Condition()
        self.frames: list[FrameType] = []  # of the call whose turn it is, and of those within it
        self.thread = 0

    def take(self, frame: FrameType) -> None:
        """Wait for the turn; `frame` is of the call. A call within another of the thread waits for nobody."""
        thread = threading.get_ident()
        with self.free:
            while self.frames and self.thread != thread and _is_running(self.frames[0], self.thread):
                self.free.wait(POLL_SECONDS)
            if self.thread != thread:
                self.frames.clear()  # of a call that was left without hooks
            self._forget_ended()
            self.frames.append(frame)
            self.thread = thread

    def give_back(self, frame: FrameType) -> None:
        """After a call, from its frame or from where that has ended in an error."""
        with self.free:
            if self.thread == threading.get_ident():
                if self.frames and self.frames[-1] is frame:
                    self.frames.pop()
                self._forget_ended()
                if not self.frames:
                    self.thread = 0
                    self.free.notify()

    def _forget_ended(self) -> None:
        while self.frames and not _is_running(self.frames[-1], threading.get_ident()):
            self.frames.pop()

    def __reduce__(self) -> tuple[type[_Turn], tuple[()]]:
        return _Turn, ()


def _is_running(frame: FrameType, thread: int) -> bool:
    """Whether a frame is on the stack of a thread."""
    found = sys._current_frames().get(thread)
    while found is not None and found is not frame:
        found = found.f_back
    return found is frame


def _reset_turns() -> None:
    for turn in list(_turns):
        turn.reset()


_turns: weakref.WeakSet[_Turn] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_turns)  # the threads that had them are not there


class _SetStep:
    """The hooks of a denoiser; a class, so that they can be found again and pickled with their denoiser.

    A compiled graph sees no threads: there calls of one denoiser have to wait for one another by themselves.
    """

    def __init__(self, position: int) -> None:
        self.position, self.turn = position, _Turn()

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the forward pass and the hooks that were there before, also where it failed."""
        if not torch.compiler.is_compiling():
            self.turn.give_back(sys._getframe(1))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.turn.take(sys._getframe(1))
        timestep = args[self.position] if len(args) > self.position else kwargs.get("timestep")
        if timestep is None:
            raise ValueError(
                f"{type(module).__name__}: adpdm needs the timestep, as positional argument {self.position} "
                "or as keyword argument `timestep`; got neither"
            )
        module.adpdm_step.set_timestep(timestep)  # type: ignore[operator, union-attr]


# Where dynamo gives up on the denoiser it would compile each hook by itself, and a compiled `end` gives
# nothing back. Within a graph of the denoiser they are traced all the same.
with suppress(ImportError, AttributeError):
    from torch._dynamo.eval_frame import skip_code

    skip_code(_SetStep.__call__.__code__)
    skip_code(_SetStep.end.__code__)


def attach_step_hook(denoiser: nn.Module) -> None:
    """Let the denoiser set the step from its `timestep` argument before every forward pass, one at a time."""
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]  # without self
    if "timestep" not in names:
        raise TypeError(
            f"{type(denoiser).__name__}.forward must have an argument `timestep` that says which groups to "
            f"use, got {names}"
        )
    hook = _SetStep(names.index("timestep"))
    denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    denoiser.register_forward_hook(hook.end, always_call=True)


def detach_step_hook(denoiser: nn.Module) -> None:
    """Undo `attach_step_hook`."""
    for key, hook in list(denoiser._forward_pre_hooks.items()):
        if isinstance(hook, _SetStep):
            del denoiser._forward_pre_hooks[key]
            denoiser._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, hook in list(denoiser._forward_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), _SetStep):
            del denoiser._forward_hooks[key]
            denoiser._forward_hooks_always_called.pop(key, None)
