"""Runs the full-precision sampler: from noise to trajectories of denoiser inputs and outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .fingerprint import fingerprint_of, named_tensors
from .processes import Processes
from .schedulers import (
    first_sample,
    in_channels_last,
    lists_steps,
    model_input,
    set_steps,
    step_arguments,
    used_output,
)

SEED_STRIDE = 1_000_003  # prime, so that streams of neighbouring seeds do not meet
PROBE_SIZE = 0.01  # error of the noise prediction, whose variance is 1, that probes a step's sensitivity
PROBE_SEED = 20_230_518
# Images that one process generates at once. Sixteen take 8 to 20 % longer in batches of 4 than of 8 on the
# shipped models with one thread, and no less in one of 16.
UNIT_IMAGES = 8

OnStep = Callable[[int], None]
OnUnitStep = Callable[[int, int, int], None]  # calls made in the unit, images times calls done, in total
Conditioning = dict[str, Any]  # tensors [N, ...], or dicts of them


@dataclass(frozen=True)
class Trajectory:
    """Inputs and outputs of the denoiser at the M calls of the sampler, two rows per image under guidance."""

    samples: Tensor  # [M, B, *], as the denoiser sees them
    noise_preds: Tensor  # [M, B, *]
    final: Tensor  # [B, *]
    sensitivity: Tensor  # [M] f64 on the CPU, squared error of the next sample per squared error of the noise
    conditioning: Conditioning  # [B, ...] each


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class DenoiserCall:
    """How a pipeline calls its denoiser, where that is more than images, timestep and conditioning.

    Args:
        sample_shape: of one sample, (C, H, W), or (L, C) for packed latents; None takes it from the config.
        constants: keyword arguments that every call gets as they are: ids of tokens, flags.
        timestep_factor: the denoiser is given the scheduler's timestep times this; 1e-3 for Flux.
        schedule: keyword arguments of the scheduler's set_timesteps, such as the shift `mu`, or `timesteps`.

    Raises:
        ValueError: for a shape that is not of positive integers, a factor that is no positive number, and
            constants or a schedule that is no dict.
    """

    sample_shape: tuple[int, ...] | None = None
    constants: dict[str, Any] = field(default_factory=dict)
    timestep_factor: float = 1.0
    schedule: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape, factor = self.sample_shape, self.timestep_factor
        if shape is not None:
            sizes = isinstance(shape, list | tuple) and all(type(n) is int and n > 0 for n in shape)
            if not sizes or not shape:
                raise ValueError(
                    f"DenoiserCall: sample_shape must be positive integers, as (C, H, W), got {shape!r}"
                )
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise ValueError(f"DenoiserCall: timestep_factor must be a positive number, got {factor!r}")
        for name in ("constants", "schedule"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"DenoiserCall: {name} must be a dict, got {getattr(self, name)!r:.60}")

    def given_timestep(self, timestep: Tensor) -> Tensor:
        """What the denoiser is given for a timestep of the scheduler."""
        return timestep if self.timestep_factor == 1.0 else timestep * self.timestep_factor

    @property
    def fingerprint(self) -> str:
        """Of all that it gives to a denoiser and a scheduler."""
        leaves, structure = tree_flatten([self.constants, self.schedule])
        # The words of an array are rounded, and of a long one only its ends.
        plain = [
            (x.dtype, x.tolist()) if isinstance(x, np.ndarray) else x
            for x in leaves
            if not isinstance(x, Tensor)
        ]
        words = f"{self.sample_shape} {self.timestep_factor} {structure} {plain}"
        scheduled = [(f"schedule {path}", x) for path, x in named_tensors(self.schedule)]
        return fingerprint_of([*named_tensors(self.constants), *scheduled], words)

    def on(self, device: torch.device) -> DenoiserCall:
        """The same call with its constants on a device."""
        return replace(self, constants=tree_map(lambda x: _moved(x, device), self.constants))


def call_denoiser(
    denoiser: Any,
    scheduler: Any,
    call: DenoiserCall,
    sample: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
) -> Tensor:
    """Prediction [B, *] as far as the scheduler uses it.

    Args:
        sample: [B, *], as the denoiser wants it.
        timestep: [], of the scheduler.
        denoiser: answers with a tensor, a tuple or an object with `.sample`.
        conditioning: tensors [B, ...] by argument name, or dicts of them.
    """
    given = call.given_timestep(timestep).to(sample.device).expand(sample.shape[0])
    output = denoiser(sample, timestep=given, **own_containers({**conditioning, **call.constants}))
    return used_output(scheduler, prediction_of(output), sample.shape[1])


def prediction_of(output: Any) -> Tensor:
    """The tensor in what a denoiser answers: itself, the first of a tuple or of named ones, or `.sample`."""
    if isinstance(output, dict):  # as BaseOutput of diffusers
        output = tuple(output.values())
    if isinstance(output, tuple):
        output = output[0]
    prediction: Tensor = output if isinstance(output, Tensor) else output.sample
    return prediction


def own_containers(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values in lists and dicts of their own: diffusers takes residuals of adapters off theirs."""
    return tree_map(lambda value: value, arguments)  # type: ignore[no-any-return]


def pick(conditioning: Conditioning, images: Tensor | slice) -> Conditioning:
    """Rows `images` of every tensor."""
    return tree_map(lambda value: value[images], conditioning)  # type: ignore[no-any-return]


def guide(conditional: Tensor, unconditional: Tensor, scale: float, channels: int) -> Tensor:
    """The guided prediction [B, *]; what is predicted beyond `channels`, variances, is that of the condition.

    Source: the pipelines of diffusers, such as DiTPipeline.
    """
    rest = conditional[:, channels:]
    if rest.shape[1] == 0:
        return unconditional + scale * (conditional - unconditional)
    noise = unconditional[:, :channels]
    return torch.cat([noise + scale * (conditional[:, :channels] - noise), rest], 1)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a sampler (Ho and Salimans 2022).

    Every image is a pair of rows, of one sample under its condition and under none.

    Args:
        scale: 1 is the conditional prediction alone.
        null: conditioning that stands for none, tensors [1, ...] as those of the sampler.
    """

    scale: float
    null: Conditioning

    @staticmethod
    def paired(sample: Tensor) -> Tensor:
        """Every row [B, *] twice, [2 B, *]."""
        return in_channels_last(sample.repeat_interleave(2, 0))

    def conditions(self, conditioning: Conditioning) -> Conditioning:
        """Rows [B, ...] each followed by none, [2 B, ...]."""

        def pairs(rows: Tensor, none: Tensor) -> Tensor:
            return torch.stack([rows, none.expand_as(rows)], 1).flatten(0, 1)

        return tree_map(pairs, conditioning, self.null)  # type: ignore[no-any-return]

    def combined(self, predictions: Tensor, channels: int) -> Tensor:
        """The guided prediction [B, *] of pairs [2 B, *] for samples of `channels`."""
        return guide(predictions[0::2], predictions[1::2], self.scale, channels)


class Sampler:
    """A denoiser, its scheduler and its conditioning as one function from noise to samples.

    The scheduler asks for M calls at `calls` [M]. Those of second order ask twice at a timestep, or at some
    in between; `timesteps` [T] are the different ones, noisiest first, `step_of_call` says where a call is.

    Args:
        denoiser: called with sample, timestep [N] and conditioning, see `call_denoiser`.
        scheduler: any diffusers scheduler; copied, so that the caller's keeps its own timesteps.
        sample_shape: (C, H, W), or any other without the batch.
        num_inference_steps: what the scheduler is asked for.
        conditioning: tensors [N, ...] by argument name, in dicts where the denoiser wants dicts; image i uses
            entry i modulo N.
        call: what else the denoiser is given.
        guidance: makes two rows of a trajectory of every image, of one sample under its condition and none.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: Any,
        sample_shape: tuple[int, ...],
        num_inference_steps: int,
        conditioning: Conditioning | None = None,
        call: DenoiserCall | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        self.denoiser, self.sample_shape = denoiser, sample_shape
        self.scheduler = copy.deepcopy(scheduler)
        self.conditioning: Conditioning = tree_map(lambda x: _moved(x, self.device), conditioning or {})
        self.call = (call or DenoiserCall()).on(self.device)
        self.guidance = guidance
        if guidance is not None:
            null = tree_map(lambda x: _moved(x, self.device), guidance.null)
            self.guidance = Guidance(guidance.scale, null)
        set_steps(self.scheduler, num_inference_steps, self.call.schedule)
        self.calls: Tensor = self.scheduler.timesteps
        given = self.call.given_timestep(self.calls).float()
        ascending, positions = torch.unique(given, return_inverse=True)
        self.timesteps = ascending.flip(0)  # [T] f32
        self.step_of_call: list[int] = (len(ascending) - 1 - positions).tolist()

    @property
    def given(self) -> list[Any]:
        """All tensors besides samples and timesteps, nested as they are."""
        null = {} if self.guidance is None else self.guidance.null
        return [self.conditioning, self.call.constants, null]

    def with_steps(self, num_inference_steps: int) -> Sampler:
        """The same with another number of steps, unless the call says itself at which steps it samples."""
        if lists_steps(self.call.schedule):
            return self
        given = (self.conditioning, self.call, self.guidance)
        return Sampler(self.denoiser, self.scheduler, self.sample_shape, num_inference_steps, *given)

    @property
    def device(self) -> torch.device:
        """Where images are generated: with the parameters of the denoiser."""
        return next(self.denoiser.parameters()).device

    def conditions(self, first: int, batch: int) -> Conditioning:
        """Conditioning of images first .. first + batch - 1."""
        images = torch.arange(first, first + batch, device=self.device)
        return tree_map(lambda value: value[images % value.shape[0]], self.conditioning)  # type: ignore[no-any-return]

    def row_conditions(self, first: int, batch: int) -> Conditioning:
        """Of the rows of these images in a trajectory: one each, or a pair under guidance."""
        rows = self.conditions(first, batch)
        return rows if self.guidance is None else self.guidance.conditions(rows)

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Prediction [B, *] at a timestep of the scheduler, as far as the scheduler uses it."""
        return call_denoiser(self.denoiser, self.scheduler, self.call, sample, timestep, conditioning)

    @torch.no_grad()
    def run(
        self, seed: int, first: int, batch: int, stop: int | None = None, on_step: OnStep | None = None
    ) -> Trajectory:
        """Generate images first .. first + batch - 1 of a seed's stream.

        Every image has a generator of its own, so that the batch size does not change it, and on the CPU, so
        that the device does not.

        Args:
            stop: last call to make (inclusive); None goes to the end.
            on_step: called with the number of the call before the denoiser runs.
        """
        scheduler, guidance = copy.deepcopy(self.scheduler), self.guidance
        generators = [
            torch.Generator().manual_seed(seed * SEED_STRIDE + i) for i in range(first, first + batch)
        ]
        shape = (1, *self.sample_shape)
        noise = torch.cat([torch.randn(shape, generator=g, device="cpu") for g in generators]).to(self.device)
        sample = in_channels_last(first_sample(scheduler, noise))
        conditioning = self.row_conditions(first, batch)
        extra = step_arguments(scheduler, generators)
        samples, preds, sensitivity = [], [], []
        last = len(self.calls) - 1 if stop is None else stop
        for index, timestep in enumerate(scheduler.timesteps[: last + 1]):
            if on_step is not None:
                on_step(index)
            seen = model_input(scheduler, sample, timestep)
            samples.append(seen if guidance is None else guidance.paired(seen))
            preds.append(self.predict(samples[-1], timestep, conditioning))
            pred = preds[-1] if guidance is None else guidance.combined(preds[-1], seen.shape[1])
            probe = self._probe(scheduler, pred, timestep, sample, generators)
            sample = scheduler.step(pred, timestep, sample, **extra).prev_sample
            sensitivity.append(float((probe - sample).double().square().mean()) / PROBE_SIZE**2)
        return Trajectory(
            torch.stack(samples),
            torch.stack(preds),
            sample if guidance is None else guidance.paired(sample),
            torch.tensor(sensitivity, dtype=torch.float64, device="cpu"),
            conditioning,
        )

    def _probe(
        self,
        scheduler: Any,
        pred: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generators: list[torch.Generator],
    ) -> Tensor:
        """The next sample if the noise prediction were off by PROBE_SIZE; all states are left as they were.

        How far a step carries an error of the noise prediction into the sample differs by orders of magnitude
        along the trajectory, and clipping makes it a matter of the sample: so it is measured.
        """
        generator = torch.Generator().manual_seed(PROBE_SEED)
        noise = torch.randn(pred.shape, generator=generator, device="cpu").to(pred.device)
        states = [g.get_state() for g in generators]
        extra = step_arguments(scheduler, generators)
        other = (
            copy.deepcopy(scheduler).step(pred + PROBE_SIZE * noise, timestep, sample, **extra).prev_sample
        )
        for image, state in zip(generators, states, strict=True):
            image.set_state(state)
        result: Tensor = other
        return result


def run_in_units(
    sampler: Sampler,
    processes: Processes,
    seed: int,
    images: range,
    unit: int = UNIT_IMAGES,
    stop: int | None = None,
    on_step: OnUnitStep = lambda calls, done, total: None,
) -> Trajectory:
    """Generate images as `Sampler.run` does, some at once, which processes share; all of them get all.

    Args:
        unit: images at once. Rounding of a denoiser may depend on it, so it must not depend on the number of
            processes.
        on_step: called before each call of the denoiser and at the end of each unit, with what this process
            has done of its share.
    """
    units = [images[first : first + unit] for first in range(0, len(images), unit)]
    sizes = [len(part) for part in units]
    num_calls = len(sampler.calls) if stop is None else stop + 1
    total = num_calls * sum(sizes[i] for i in processes.share(sizes))
    done = 0

    def run(part: range) -> list[Tensor]:
        nonlocal done

        def watch(calls: int) -> None:
            on_step(calls, done + calls * len(part), total)

        made = sampler.run(seed, part.start, len(part), stop, watch)
        watch(num_calls)
        done += num_calls * len(part)
        return [made.samples, made.noise_preds, made.final, made.sensitivity]

    samples, predictions, finals, sensitivities = zip(*processes.map(units, run, sizes), strict=True)
    weighted = [size * x for size, x in zip(sizes, sensitivities, strict=True)]
    return Trajectory(
        torch.cat(samples, 1),
        torch.cat(predictions, 1),
        torch.cat(finals),
        torch.stack(weighted).sum(0) / len(images),
        sampler.row_conditions(images.start, len(images)),
    )
