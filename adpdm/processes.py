"""Processes that share a calibration: who does which part of it, and the results of all in one order.

Nothing that is computed may depend on their number. So work is cut into items that are the same for any
number, each item is done by one process, and whole results are gathered in the order of the items. Across
processes integers are added up and extrema taken, which is exact; sums of real numbers depend on their order.

What is exchanged goes through gloo and the memory of the CPU, whatever device calibrates: it is little beside
the work that it saves, and a group of our own does not depend on the backend that a program chose.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # at a meeting, for shares that take longer; who ended is missed at once
LONGEST_FACT = 40  # characters that an error repeats; fingerprints say nothing to a reader
CPU = torch.device("cpu")


class OtherProcessFailed(RuntimeError):
    """Another process ended with an error, told in its words, or without a word."""


class Processes:
    """The processes of one calibration; without a group there is one, and every method costs nothing.

    All of them call the same methods in the same order: each is a meeting, at which a process also learns
    that another one failed.

    Args:
        group: of gloo, over all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.device = CPU  # of this process, for results that are not on the CPU
        self.is_over = False  # no meeting follows: one of them failed, and the others know
        self.in_touch = True  # False once a process left without a word

    # ---- sharing work ----

    def share(self, costs: Sequence[float]) -> list[int]:
        """Items that this process does, ascending; the first process does item 0 if costs are equal."""
        return [i for i, owner in enumerate(owners(costs, self.size)) if owner == self.rank]

    def gather(self, costs: Sequence[float], made: Mapping[int, Sequence[Tensor]]) -> list[list[Tensor]]:
        """Results of all items in their order, contiguous, on the device where they were made or its like.

        Args:
            costs: as given to `share`.
            made: tensors of any shape and dtype of each item that was this process's share.
        """
        whole = {i: [t.detach().contiguous() for t in tensors] for i, tensors in made.items()}
        if self.group is None:
            return [whole[i] for i in range(len(costs))]
        with _interrupts_held():
            forms: dict[int, list[Form]] = {}
            for said in self.meet({i: [_form(t) for t in tensors] for i, tensors in whole.items()}):
                forms.update(said)
            with self._exchanging():
                for i, owner in enumerate(owners(costs, self.size)):
                    buffer = _packed(whole[i]) if owner == self.rank else _buffer_of(forms[i])
                    with self._talking():
                        dist.broadcast(buffer, dist.get_global_rank(self.group, owner), self.group)
                    if owner != self.rank:
                        whole[i] = _unpacked(buffer, forms[i], self.device)
        return [whole[i] for i in range(len(costs))]

    def map(
        self,
        items: Sequence[T],
        work: Callable[[T], Sequence[Tensor]],
        costs: Sequence[float] | None = None,
    ) -> list[list[Tensor]]:
        """What `work` makes of each item, in their order; costs are equal unless told."""
        costs = [1.0] * len(items) if costs is None else costs
        return self.gather(costs, {i: work(items[i]) for i in self.share(costs)})

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first process, which alone runs it."""
        value = work() if self.rank == 0 else None
        return self.meet(value)[0]  # type: ignore[no-any-return]

    def add_up(self, counts: Sequence[Tensor]) -> None:
        """Replace integers by their sums over all processes, in place."""
        assert not any(x.is_floating_point() for x in counts), "sums of real numbers depend on their order"
        self._reduce(counts, "SUM")

    def widen(self, extrema: Sequence[Tensor]) -> None:
        """Replace minima and maxima [*, 2] by those over all processes, in place; none may be NaN."""
        self._reduce([x[..., 0] for x in extrema], "MIN")
        self._reduce([x[..., 1] for x in extrema], "MAX")
        for x in extrema:
            x += 0.0  # makes 0 of -0, which is as small: which one is met first depends on the shares

    def _reduce(self, tensors: Sequence[Tensor], operation: str) -> None:
        if self.group is None:
            return
        with _interrupts_held():
            self.meet()
            with self._exchanging():
                for x in tensors:
                    here = x.to(CPU).contiguous()
                    with self._talking():
                        dist.all_reduce(here, getattr(dist.ReduceOp, operation), self.group)
                    x.copy_(here)

    # ---- going on together ----

    def agree(self, what: str, facts: Mapping[str, str]) -> None:
        """Refuse to go on with facts that are others on another process.

        Raises:
            ValueError: on every process, with the name of one that differs.
        """
        everyone = self.meet(dict(facts))
        for rank, said in enumerate(everyone):
            for name in sorted({*said, *everyone[0]}):
                here, there = everyone[0].get(name, "none"), said.get(name, "none")
                if here == there:
                    continue
                self.is_over = True
                is_short = max(len(here), len(there)) <= LONGEST_FACT
                words = f"has {there}, process 0 has {here}" if is_short else "and process 0 differ in it"
                raise ValueError(f"{what}: all processes must have the same {name}; process {rank} {words}")

    def meet(self, value: Any = None) -> list[Any]:
        """Wait for all processes; what each of them says, in their order.

        Raises:
            OtherProcessFailed, KeyboardInterrupt: what ended another process ends this one, too.
        """
        if self.group is None:
            return [value]
        said = self._say((None, value))
        for rank, (failure, _) in enumerate(said):
            if failure is not None:
                self.is_over = True
                if failure == INTERRUPTED:
                    raise KeyboardInterrupt
                raise OtherProcessFailed(f"process {rank}: {failure}")
        return [word for _, word in said]

    def tell(self, error: BaseException) -> None:
        """Let the others end at their next meeting, for which this waits."""
        if self.group is None or self.is_over:
            return
        self.is_over = True
        with suppress(OtherProcessFailed):
            self._say((_sentence(error), None))

    def _say(self, word: Any) -> list[Any]:
        said: list[Any] = [None] * self.size
        with _interrupts_held(), self._talking():
            dist.all_gather_object(said, word, self.group)
        return said

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Around what all processes do in step; after an error in it nobody knows where the others are."""
        try:
            yield
        except BaseException:
            self.is_over, self.in_touch = True, False
            raise

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Around one call of torch.distributed, which fails when another process is no longer there."""
        try:
            with self._exchanging():
                yield
        except RuntimeError as error:
            raise OtherProcessFailed(f"another process ended without a word ({error})") from error


ALONE = Processes()  # for those who are not told


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of torch.distributed, which all enter and leave this block; an error on one ends all.

    One process where torch.distributed is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield Processes()
        return
    processes = Processes(dist.new_group(backend="gloo", timeout=PATIENCE))
    try:
        yield processes
        processes.meet()
    except BaseException as error:
        processes.tell(error)
        raise
    finally:
        dist.destroy_process_group(processes.group)
        processes.group = None  # the last reference: who still waits for this process learns that it left


@contextmanager
def launched() -> Iterator[None]:
    """Initialise torch.distributed for the processes that torchrun started, while the block runs.

    Does nothing for a process that runs alone, or where it is initialised.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, _interrupt_once)
    try:
        dist.init_process_group("gloo")
    except dist.DistError as error:
        raise OtherProcessFailed(f"the other processes of torchrun were not found ({error})") from error
    try:
        yield
    finally:
        dist.destroy_process_group()
        if signal.getsignal(signal.SIGINT) is _interrupt_once:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block, as the others wait for the rest of what was begun in it."""
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()  # which alone is interrupted
    if not (is_main and callable(before)):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        before(*held[0])


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Ctrl-C comes from the terminal and from torchrun: the second one must not disturb the first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def owners(costs: Sequence[float], size: int) -> list[int]:
    """Process of each item: the dearest first, each to the one that has least to do so far."""
    loads, owner = [0.0] * size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[i] = loads.index(min(loads))
        loads[owner[i]] += costs[i]
    return owner


# ---- what goes over the wire -------------------------------------------------------------------------------

INTERRUPTED = "interrupted"
Form = tuple[tuple[int, ...], torch.dtype, str]  # shape, dtype and type of the device


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, ValueError | TypeError | OSError):  # sentences by themselves
        return str(error)
    return f"{type(error).__name__}: {error}"


def _form(x: Tensor) -> Form:
    return tuple(x.shape), x.dtype, x.device.type


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """Bytes [B] u8 of contiguous tensors, one after the other."""
    return torch.cat([torch.empty(0, dtype=torch.uint8, device=CPU), *(_bytes(x.to(CPU)) for x in tensors)])


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def _size(form: Form) -> int:
    shape, dtype, _ = form
    return torch.Size(shape).numel() * dtype.itemsize


def _buffer_of(forms: Sequence[Form]) -> Tensor:
    return torch.empty(sum(map(_size, forms)), dtype=torch.uint8, device=CPU)


def _unpacked(buffer: Tensor, forms: Sequence[Form], device: torch.device) -> list[Tensor]:
    """Inverse of `_packed`; what was not on the CPU comes to `device`."""
    tensors = []
    for part, (shape, dtype, kind) in zip(buffer.split(list(map(_size, forms))), forms, strict=True):
        x = part.clone().view(dtype).view(shape)  # a copy, because its offset may not suit the dtype
        tensors.append(x if kind == "cpu" else x.to(device))
    return tensors
