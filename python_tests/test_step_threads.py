"""One denoiser in several threads: its layers share the current step, so calls take turns."""

from __future__ import annotations

import copy
import math
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from test_step import Denoiser
from torch import Tensor, nn

import adpdm
from adpdm import QuantConfig
from adpdm.step import attach_step_hook
from adpdm.testing import ddim_scheduler, tiny_unet


class SlowDenoiser(Denoiser):
    """Waits before it reads the step."""

    def forward(self, sample: Tensor, timestep: object = None, scale: float = 1.0) -> int:
        if math.isnan(scale):
            raise KeyboardInterrupt
        time.sleep(0.01)
        return super().forward(sample, timestep, scale)


def call_elsewhere(denoiser: nn.Module, timestep: int) -> int:
    """From another thread, which must not wait for ever."""
    with ThreadPoolExecutor(1) as pool:
        return int(pool.submit(denoiser, torch.zeros(1), timestep).result(timeout=20))


@pytest.mark.parametrize("fails_in", ["hook", "forward", "interrupted"])
def test_a_call_that_failed_keeps_nobody_waiting(fails_in: str) -> None:
    denoiser = SlowDenoiser()
    attach_step_hook(denoiser)
    if fails_in == "hook":
        with pytest.raises(ValueError, match="needs the timestep"):
            denoiser(torch.zeros(1))
    elif fails_in == "forward":
        with pytest.raises(TypeError):
            denoiser(torch.zeros(1), 600, scale="no number")
    else:  # torch runs no hooks then
        with pytest.raises(KeyboardInterrupt):
            denoiser(torch.zeros(1), 600, scale=math.nan)
    assert call_elsewhere(denoiser, 600) == 1
    assert denoiser(torch.zeros(1), 300) == 2


def test_the_turn_of_a_thread_that_is_gone_is_taken_over() -> None:
    denoiser = SlowDenoiser()
    attach_step_hook(denoiser)
    dead = threading.Thread(target=lambda: suppressed(denoiser))
    dead.start()
    dead.join()
    assert call_elsewhere(denoiser, 600) == 1


def suppressed(denoiser: nn.Module) -> None:
    with suppress(KeyboardInterrupt):
        denoiser(torch.zeros(1), 900, scale=math.nan)


class HalvedDenoiser(SlowDenoiser):
    """Calls itself for a part of the batch first."""

    def forward(self, sample: Tensor, timestep: object = None, scale: float = 1.0) -> int:
        if len(sample) == 2:
            self(sample[:1], timestep)
            time.sleep(0.02)
        return super().forward(sample, timestep, scale)


@pytest.mark.parametrize(("kind", "images"), [(SlowDenoiser, 1), (HalvedDenoiser, 2)])
def test_threads_take_turns(kind: type[Denoiser], images: int) -> None:
    """Whole calls, with those that they make of themselves."""
    denoiser = kind()
    attach_step_hook(denoiser)
    steps = [0, 1, 2, 1] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda step: denoiser(torch.zeros(images), (900, 600, 300)[step]), steps))
    assert found == steps
    assert call_elsewhere(denoiser, 300) == 2


def test_a_call_within_a_call_that_fails_before_its_turn_gives_nothing_back() -> None:
    def refuse_no_images(module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args[0]) == 0:
            raise ZeroDivisionError

    denoiser = HalvedDenoiser()
    denoiser.register_forward_pre_hook(refuse_no_images)
    attach_step_hook(denoiser)
    hook: Any = list(denoiser._forward_pre_hooks.values())[-1]
    seen = []

    def forward(sample: Tensor, timestep: object = None) -> int:
        if len(sample) == 2:
            with pytest.raises(ZeroDivisionError):
                denoiser(sample[:0], timestep)
            seen.append(len(hook.turn.frames))
        return 0

    denoiser.forward = forward  # type: ignore[method-assign, assignment]
    denoiser(torch.zeros(2), 600)
    assert seen == [1]
    assert not hook.turn.frames


class CompiledDenoiser(Denoiser):
    def forward(self, sample: Tensor, timestep: object = None, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return sample + self.get_submodule("adpdm_step").step_index


def test_a_denoiser_that_is_compiled_no_more_keeps_nobody_waiting() -> None:
    """Behind dynamo's limit hooks run as they are, and one of them must not be compiled by itself."""
    denoiser = CompiledDenoiser()
    attach_step_hook(denoiser)
    kinds = [600, torch.tensor(600), torch.tensor([600.0]), torch.tensor(600, dtype=torch.int32)]
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled = torch.compile(denoiser, backend="eager")
        assert [int(compiled(torch.zeros(1), kind)) for kind in kinds] == [1] * 4
    hook = next(iter(denoiser._forward_pre_hooks.values()))
    assert not hook.turn.frames  # type: ignore[attr-defined]
    assert call_elsewhere(denoiser, 300) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_take_turns_of_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    denoiser = SlowDenoiser()
    attach_step_hook(denoiser)
    other = copied(denoiser)
    with pytest.raises(KeyboardInterrupt):
        denoiser(torch.zeros(1), 600, scale=math.nan)
    assert call_elsewhere(other, 300) == 2
    steps = [0, 1, 2] * 3
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda step: other(torch.zeros(1), (900, 600, 300)[step]), steps))
    assert found == steps


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded")
def test_a_forked_process_does_not_wait_for_threads_it_has_not() -> None:
    denoiser = SlowDenoiser()
    attach_step_hook(denoiser)
    hook = next(iter(denoiser._forward_pre_hooks.values()))
    turn: Any = hook.turn  # type: ignore[attr-defined]
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        turn.take(sys._getframe())
        entered.set()
        leave.wait()
        turn.give_back(sys._getframe())

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(hold)
        entered.wait()
        child = os.fork()
        if child == 0:
            os._exit(0 if denoiser(torch.zeros(1), 600) == 1 else 1)
        _, status = os.waitpid(child, 0)
        leave.set()
        done.result()
    assert status == 0


def test_pipelines_in_threads_share_a_quantized_denoiser() -> None:
    unet = tiny_unet()
    config = QuantConfig(grouping="per_step", num_inference_steps=8, histogram_images=2)
    adpdm.quantize(unet, config, scheduler=ddim_scheduler())

    def images(steps: int) -> Any:
        pipe: Any = DDIMPipeline(unet, ddim_scheduler())
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe(num_inference_steps=steps, generator=generator, output_type="np").images

    wanted = {steps: images(steps) for steps in (6, 8)}
    with ThreadPoolExecutor(2) as pool:
        for steps, found in [(steps, pool.submit(images, steps)) for steps in (6, 8) * 3]:
            assert np.array_equal(found.result(), wanted[steps])
