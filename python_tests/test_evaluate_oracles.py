"""Times, sets of images, layers and tables of evaluations against values computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from adpdm import DenoiserCall, evaluate
from adpdm.evaluate import EvaluationConfig, EvaluationResult, PairTiming, SampleSettings, time_pair
from adpdm.evaluate.layers import probe_layers
from adpdm.evaluate.words import evaluation_rows
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_unet

CPU = torch.device("cpu")


class Clock:
    """A clock that stands still but for what is said to take time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of `time_pair`."""
    made = Clock()
    monkeypatch.setattr("adpdm.evaluate.timing.time", made)
    return made


def taking(clock: Clock, name: str, seconds: list[float], calls: list[str]) -> Callable[[], None]:
    """A call that takes 100 seconds twice, while both warm up, and then these, one after the other."""
    left = [100.0, 100.0, *seconds]

    def call() -> None:
        clock.now += left.pop(0)
        calls.append(name)

    return call


def test_time_pair_takes_medians_of_seconds_and_of_ratios_in_swapped_order(clock: Clock) -> None:
    calls: list[str] = []
    reference = taking(clock, "r", [2, 9, 4, 12, 10], calls)
    quantized = taking(clock, "q", [1, 3, 4, 2, 2], calls)
    found = time_pair(reference, quantized, 8, CPU, 5)
    # Ratios 2, 3, 1, 6 and 5.
    assert found == PairTiming(8, 5, 9.0, 2.0, 3.0, 2.0, 5.0)
    assert "".join(calls) == "qrrqqrrqqrrqqr"


def test_time_pair_refuses_no_pairs() -> None:
    with pytest.raises(ValueError, match="time_pair: num_pairs must be at least 1, got 0"):
        time_pair(lambda: None, lambda: None, 1, CPU, 0)


def test_compare_times_the_quantized_denoiser_against_the_reference(clock: Clock) -> None:
    def denoiser(seconds: float) -> Callable[..., tuple[Tensor]]:
        def call(sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
            clock.now += seconds * len(sample)
            return (0.3 * sample,)

        return call

    config = EvaluationConfig(
        num_images=2, num_inference_steps=2, use_extractors=False, timing_batch_sizes=(1, 4), timing_pairs=2
    )
    found = evaluate.compare(denoiser(3.0), denoiser(1.0), DDIMScheduler(), config, shape=(1, 4, 4))
    assert found.timings == (
        PairTiming(1, 2, 3.0, 1.0, 3.0, 3.0, 3.0),
        PairTiming(4, 2, 12.0, 4.0, 3.0, 3.0, 3.0),
    )


def test_rows_of_an_evaluation() -> None:
    values = dict.fromkeys(EvaluationResult.__dataclass_fields__)
    told = {
        "psnr_db": 31.254,
        "sqnr_db": 20.0,
        "lpips": 0.01234,
        "frechet": evaluate.FrechetResult(1.5, 1.25, 2.0, (16, 16), 4, 0.9, 200),
        "kernel": evaluate.KernelResult(0.5, 0.02, (16, 16), 1, (16, 16)),
        "timings": (PairTiming(8, 20, 0.9, 0.2, 4.0, 3.5, 4.75),),
        "reference_bytes": 4_000_000,
        "quantized_bytes": 1_000_000,
        "missing": ("One.", "Two."),
    }
    assert evaluation_rows(EvaluationResult(**{**values, **told})) == {
        "PSNR of samples": "31.25 dB",
        "SQNR of samples": "20.00 dB",
        "LPIPS (AlexNet)": "0.0123",
        "Frechet distance (EfficientNet-Lite0)": "1.50 [1.25, 2.00], 16 images, 4 dimensions",
        "Kernel distance (EfficientNet-Lite0)": "0.50000 with standard error 0.02, 16 and 16 images",
        "time per step, batch 8": "200.0 ms against 900.0 ms, 4.00x (quartiles 3.50 to 4.75)",
        "weights": "1.00 MB, 25.0% of the original",
        "not measured": "One. Two. ",
    }


@pytest.mark.parametrize(
    ("scheduler", "call", "steps", "wanted"),
    [
        (ddim_scheduler(), None, 10, [900, 700, 500, 200, 0]),
        (ddim_scheduler(), None, 2, [500, 0]),
        # A schedule of its own takes no other number of steps than its own.
        (
            FlowMatchEulerDiscreteScheduler(),
            DenoiserCall(schedule={"sigmas": [1.0, 0.75, 0.5]}),
            3,
            [1000, 750, 500],
        ),
        # Nor the number of its steps, where it lists them.
        (EulerDiscreteScheduler(), DenoiserCall(schedule={"timesteps": [900, 500, 100]}), 3, [900, 500, 100]),
    ],
)
def test_layers_are_probed_at_steps_of_the_run(
    scheduler: Any, call: DenoiserCall | None, steps: int, wanted: list[int]
) -> None:
    reference, quantized = (tiny_unet(**ONE_BLOCK) for _ in range(2))
    seen: list[Tensor] = []
    quantized.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    probe_layers(reference, quantized, scheduler, steps, 0, call=call)
    assert [timesteps.tolist() for timesteps in seen] == [4 * [step] for step in wanted]


def test_set_distance_measures_lpips_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_less_ten_times_second(first: Tensor, second: Tensor) -> Tensor:
        return (first - 10 * second).mean((1, 2, 3))

    stubs = {
        "load_lpips": lambda cache_dir: SimpleNamespace(distance=first_less_ten_times_second),
        "load_lite0": lambda: SimpleNamespace(features=lambda images: images.flatten(1).numpy()),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(f"adpdm.evaluate.distance.{name}", stub)
    settings = SampleSettings(num_images=16, num_inference_steps=1, seed=0, chunk_size=16)
    means = []
    for name, seed in (("a", 0), ("b", 1)):
        made = evaluate.sample_set(tiny_unet(seed, **ONE_BLOCK), ddim_scheduler(), tmp_path / name, settings)
        means.append(float((made.images() / 127.5 - 1).mean(dtype=np.float64)))
    found = evaluate.set_distance(tmp_path / "a", tmp_path / "b", batch_size=5)
    assert found.lpips == pytest.approx(means[0] - 10 * means[1], abs=1e-6)
    assert abs(means[0] - means[1]) > 1e-3
