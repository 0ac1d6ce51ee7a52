"""Runs a diffusers scheduler with one random generator per image, so that the batch size changes no image."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..progress import Progress, silent
from ..schedulers import first_sample, model_input, set_steps, step_arguments
from ..trajectory import Conditioning, DenoiserCall, call_denoiser, pick

IMAGE_CHANNELS = (1, 3)  # grey and colour; samples of other numbers of channels are latents
# (number of the call, timestep of the scheduler, sample, noise_pred)
StepObserver = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class GenerationResult:
    """What `generate` returns.

    Args:
        samples: [N, *] f32, as the scheduler leaves them: images in [-1, 1] or a little beyond, or latents.
        timesteps: [M] values given to the denoiser, in the order of its calls: those of the scheduler times
            the factor of the call, some of them twice under schedulers that come back, as Heun's.
        seconds_per_step: [batches, M] wall time of one denoiser call and scheduler step of one batch.
    """

    samples: Tensor
    timesteps: np.ndarray
    seconds_per_step: np.ndarray


def image_seeds(seed: int, num_images: int, first: int = 0) -> list[int]:
    """Returns one 32-bit seed per image, unrelated for different `seed`, from image `first` on.

    `pipe(batch_size=n, generator=[torch.Generator().manual_seed(s) for s in image_seeds(seed, n)])` draws the
    same images. They are hashed, not counted up, because images 1..n of seed 0 would be images 0..n-1 of
    seed 1, and 32 bits because torch's CPU generator ignores the rest.
    """
    numbers = range(first, first + num_images)
    return [int(np.random.SeedSequence((seed, i)).generate_state(1)[0]) for i in numbers]


class Trajectory:
    """One batch on its way from noise to images; several denoisers can be stepped side by side.

    Args:
        scheduler: a diffusers scheduler, used as it is configured (`clip_sample` included); copied.
        seeds: one per image.
        shape: of one sample, (C, H, W), or (L, C) for packed latents.
        device: where the samples live.
        call: what denoisers are given besides samples, timestep and conditioning.

    `timesteps` [M] are the scheduler's, one per call of a denoiser.
    """

    def __init__(
        self,
        scheduler: Any,
        num_inference_steps: int,
        seeds: list[int],
        shape: tuple[int, ...],
        device: torch.device,
        call: DenoiserCall | None = None,
    ) -> None:
        self.call = (call or DenoiserCall()).on(device)
        # a fresh copy per batch: multistep schedulers remember earlier predictions
        self.scheduler = copy.deepcopy(scheduler)
        set_steps(self.scheduler, num_inference_steps, {**self.call.schedule, "device": device})
        self.timesteps: Tensor = self.scheduler.timesteps
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        noise = torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(device)
        self.sample = first_sample(self.scheduler, noise)
        self._step_arguments = step_arguments(self.scheduler, self.generators)

    @property
    def given_timesteps(self) -> np.ndarray:
        """[M] what the denoiser is given for `timesteps`."""
        given: np.ndarray = self.call.given_timestep(self.timesteps).cpu().numpy()
        return given

    def model_input(self, step_index: int) -> Tensor:
        """The sample as the denoiser wants it at this step (sigma schedulers scale it)."""
        return model_input(self.scheduler, self.sample, self.timesteps[step_index])

    def predict(self, denoiser: Any, sample: Tensor, step_index: int, conditioning: Conditioning) -> Tensor:
        """A denoiser's prediction for model inputs at this step."""
        timestep = self.timesteps[step_index]
        return call_denoiser(denoiser, self.scheduler, self.call, sample, timestep, conditioning)

    def advance(self, noise_pred: Tensor, step_index: int) -> None:
        """Takes the scheduler's step in place."""
        step = self.scheduler.step(
            noise_pred, self.timesteps[step_index], self.sample, **self._step_arguments
        )
        self.sample = step.prev_sample


def sample_shape(denoiser: Any) -> tuple[int, ...]:
    """(C, H, W) from the denoiser's config.

    Raises:
        ValueError: the config does not say it, or there is none.
    """
    config = getattr(denoiser, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if channels is None or len(sides) != 2:
        raise ValueError(
            f"the shape of a sample must be given, by shape=(C, H, W) or by sample_shape of a DenoiserCall "
            f"(--call), where the config of a denoiser does not say it; that of {type(denoiser).__name__} "
            f"has in_channels {channels} and sample_size {size}"
        )
    return int(channels), int(sides[0]), int(sides[1])


def shape_of_call(call: DenoiserCall | None) -> tuple[int, ...] | None:
    """The shape of one sample, where the call says it."""
    return None if call is None else call.sample_shape


def demand_images(caller: str, shape: tuple[int, ...]) -> None:
    """Refuse samples of a shape that is not (1 or 3, H, W), where nothing decodes them.

    Raises:
        ValueError: names `caller`, the shape, and what it takes.
    """
    if len(shape) != 3 or shape[0] not in IMAGE_CHANNELS:
        raise ValueError(
            f"{caller}: samples of shape {shape} are no images (C, H, W) with {IMAGE_CHANNELS} channels; "
            "decode= must say how to make them"
        )


def batches(total: int, batch_size: int) -> Iterator[slice]:
    """Slices of at most `batch_size` that cover range(total).

    Raises:
        ValueError: for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return (slice(i, min(i + batch_size, total)) for i in range(0, total, batch_size))


def in_batches(
    measure: Callable[..., Any], batch_size: int, what: str, progress: Progress, *sets: Any
) -> np.ndarray:
    """[N, ...] what `measure` says of N images, some at a time.

    Args:
        measure: takes as many images of each set, gives an array or a CPU tensor with a row for each.
        what: is said to `progress`.
        sets: [N, ...] each; image i of all of them is measured together.

    Raises:
        ValueError: for a batch size below 1.
    """
    parts = []
    for rows in batches(len(sets[0]), batch_size):
        parts.append(np.asarray(measure(*(images[rows] for images in sets))))
        progress(what, rows.stop, len(sets[0]))
    return np.concatenate(parts)


def device_of(denoiser: Any) -> torch.device:
    """The device of the first parameter or buffer; the CPU when there is none."""
    if isinstance(denoiser, torch.nn.Module):
        for tensor in (*denoiser.parameters(), *denoiser.buffers()):
            return tensor.device
    return torch.device("cpu")


def wait_for(device: torch.device) -> None:
    """Let a clock that is read next see what a CUDA device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_uint8(
    images: Tensor,  # [N, C, H, W] float in [-1, 1]
) -> np.ndarray:
    """[N, H, W, C] u8."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    array: np.ndarray = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array


@torch.no_grad()
def generate(
    denoiser: Any,
    scheduler: Any,
    num_images: int,
    num_inference_steps: int,
    seed: int = 0,
    batch_size: int = 8,
    shape: tuple[int, ...] | None = None,
    *,
    conditioning: Conditioning | None = None,
    call: DenoiserCall | None = None,
    first: int = 0,
    on_step: StepObserver | None = None,
    progress: Progress = silent,
) -> GenerationResult:
    """Samples images, deterministic but for the seed (eta = 0; ancestral noise per image).

    Args:
        denoiser: (sample, timestep=[B], **conditioning) -> noise prediction: a tensor, a tuple or an object
            with `.sample`.
        scheduler: diffusers scheduler; copied, so its state and settings are left alone.
        shape: of one sample, (C, H, W); None takes it from `call`, or from the denoiser's config.
        conditioning: keyword tensors with one row per image, such as encoder_hidden_states, or dicts of them.
        call: what else the denoiser is given, as for `adpdm.quantize`.
        first: number of the first image: images `first` .. `first + num_images - 1` of the seed are sampled.
        on_step: sees (number, timestep of the scheduler, model input [B, *], noise_pred) of every call.

    Returns:
        Samples in image order. Another batch size gives the same images up to the denoiser's own rounding.

    Raises:
        ValueError: for no images, a batch size below 1, and where nothing says the shape of a sample.
    """
    if num_images < 1:
        raise ValueError(f"generate: num_images must be at least 1, got {num_images}")
    shape, device = shape or shape_of_call(call) or sample_shape(denoiser), device_of(denoiser)
    seeds, slices = image_seeds(seed, num_images, first), list(batches(num_images, batch_size))
    samples, seconds, given = [], [], np.zeros(0)
    for number, rows in enumerate(slices):
        path = Trajectory(scheduler, num_inference_steps, seeds[rows], shape, device, call)
        extra = pick(conditioning or {}, rows)
        given, row = path.given_timesteps, []
        for k, timestep in enumerate(path.timesteps):
            start = time.perf_counter()
            model_input = path.model_input(k)
            noise_pred = path.predict(denoiser, model_input, k, extra)
            path.advance(noise_pred, k)
            wait_for(device)
            row.append(time.perf_counter() - start)
            if on_step is not None:
                on_step(k, timestep, model_input, noise_pred)
            progress("sampling", number * len(given) + k + 1, len(slices) * len(given))
        samples.append(path.sample.float())
        seconds.append(row)
    return GenerationResult(torch.cat(samples), given, np.array(seconds))
