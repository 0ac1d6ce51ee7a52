"""One denoiser in several threads: its layers share the current step, so calls take turns."""

from __future__ import annotations

import copy
import math
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def test_threads_take_turns() -> None:
    denoiser = SlowDenoiser()
    attach_step_hook(denoiser)
    steps = [0, 1, 2, 1] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda step: denoiser(torch.zeros(1), (900, 600, 300)[step]), steps))
    assert found == steps


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
    else:  # torch runs no hooks then: the thread still has its turn, and gives it back after the next call
        with pytest.raises(KeyboardInterrupt):
            denoiser(torch.zeros(1), 600, scale=math.nan)
        assert denoiser(torch.zeros(1), 300) == 2
    assert call_elsewhere(denoiser, 600) == 1


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
    with ThreadPoolExecutor(1) as pool:
        pool.submit(hook.turn.take).result()  # type: ignore[attr-defined]
        child = os.fork()
        if child == 0:
            os._exit(0 if denoiser(torch.zeros(1), 600) == 1 else 1)
        _, status = os.waitpid(child, 0)
        pool.submit(hook.turn.give_back).result()  # type: ignore[attr-defined]
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
