"""Correction of predictions: shares of prediction and sample that lessen the error of quantization."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .processes import ALONE, Processes
from .schedulers import in_channels_last
from .step import StepState
from .trajectory import Sampler, Trajectory, pick

CORRECTION_IMAGES = 8  # of the cached trajectories; 4 and 16 gave the same quality
MIN_GAIN = 0.1  # share of the squared error that must go, else a step stays as it is
SINGULAR = 1e-9  # smallest eigenvalue, of the largest, that still counts


@dataclass(frozen=True)
class Correction:
    """What `fit_correction` found.

    Args:
        weights: [T, 2] f32, of prediction and sample at each step; 1 and 0 where others gain too little.
        energy_left: squared error behind the correction over that before it, at each step, each image
            corrected by what the others say.
    """

    weights: Tensor
    energy_left: list[float]


@torch.no_grad()
def fit_correction(
    sampler: Sampler,
    trajectory: Trajectory,
    watch: Callable[[int, int], None],
    processes: Processes = ALONE,
) -> Correction:
    """Regress the errors of quantized predictions on the predictions and their samples, step by step.

    At high noise a prediction is nearly the sample, and the clean image is in their small difference, which
    quantization noise may exceed. Least squares over calibration images weighs the two by what they are
    worth (a Wiener filter with two taps). It also shrinks, and what is shrunk at every step adds up along the
    trajectory where noise averages out: hence MIN_GAIN. Our own addition [R]; PTQD (He et al. 2023) has the
    part along the prediction, which alone gains nothing.

    Args:
        sampler: its denoiser is quantized, and not corrected yet.
        trajectory: of the full-precision denoiser.
        watch: called with (calls done, calls in total) of this process.
        processes: that share the calls.
    """
    each = 1 if sampler.guidance is None else 2  # rows of an image, of one sample
    count = min(each * CORRECTION_IMAGES, trajectory.samples.shape[1])
    conditioning = pick(trajectory.conditioning, torch.arange(count, device=trajectory.samples.device))
    num_calls = len(sampler.step_of_call)
    done, total = 0, len(processes.share([1.0] * num_calls))

    def moments_at(call: int) -> list[Tensor]:
        nonlocal done
        sample, exact = trajectory.samples[call, :count], trajectory.noise_preds[call, :count]
        prediction = sampler.predict(in_channels_last(sample), sampler.calls[call], conditioning)
        error = prediction - exact
        channels = sample.shape[1]  # learned variances follow, which are no prediction of an image
        rows = torch.stack([x[:, :channels].double().flatten(1) for x in (prediction, sample, error)], 1)
        products = rows @ rows.transpose(1, 2)  # [B, 3, 3]
        done += 1
        watch(done, total)
        return [products.unflatten(0, (-1, each)).sum(1).cpu()]

    # Of prediction, sample and error.
    moments = torch.zeros(len(sampler.timesteps), count // each, 3, 3, dtype=torch.float64, device="cpu")
    by_call = processes.map(range(num_calls), moments_at)
    for step, (of_call,) in zip(sampler.step_of_call, by_call, strict=True):
        moments[step] += of_call
    return _regress(moments)


def _regress(moments: Tensor) -> Correction:
    """Least squares at each step, kept where it pays on images that it was not fitted to.

    Args: moments [T, B, 3, 3] f64 of prediction, sample and error.
    """
    total = moments.sum(1)
    others = _shares(total[:, None] - moments)  # [T, B, 2]: for each image by all but that image
    coefficients = torch.cat([-others, torch.ones_like(others[..., :1])], -1)
    errors = torch.einsum("tbi,tbij,tbj->t", coefficients, moments, coefficients)
    energy = total[:, 2, 2]
    left = errors / energy.clamp_min(torch.finfo(energy.dtype).tiny)
    helps = errors < (1 - MIN_GAIN) * energy
    shares = torch.where(helps[:, None], _shares(total), 0.0)
    weights = torch.tensor([1.0, 0.0], dtype=shares.dtype, device="cpu") - shares
    return Correction(weights.float(), torch.where(helps, left, 1.0).tolist())


def _shares(moments: Tensor) -> Tensor:
    """What of prediction and sample is nearest to the error, [*, 2], by moments [*, 3, 3]."""
    inverse = torch.linalg.pinv(moments[..., :2, :2], rtol=SINGULAR, hermitian=True)
    shares: Tensor = (inverse @ moments[..., :2, 2:])[..., 0]
    return shares


def correct(prediction: Tensor, sample: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of a prediction [B, C or more, *] and its sample, in the dtype of the prediction.

    Args:
        sample: [B, C, *], what the denoiser was given.
        weights: [2] f32, of the current step.
    """
    channels = sample.shape[1]
    of_prediction, of_sample = weights.to(prediction.device).unbind()
    scaled = prediction[:, :channels].float() * of_prediction
    result = torch.addcmul(scaled, sample.float(), of_sample).to(prediction.dtype)
    if prediction.shape[1] == channels:
        return result
    return torch.cat([result, prediction[:, channels:]], 1)


class _Correct:
    """The hook of a denoiser; a class, so that it can be found again and pickled with its denoiser."""

    def __init__(self, sample_name: str) -> None:
        self.sample_name = sample_name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        weights: Tensor = module.adpdm_step.current_correction  # type: ignore[assignment, union-attr]
        # Looking is free on a CPU, and most steps of many models have nothing to correct.
        on_cpu = weights.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and weights.tolist() == [1.0, 0.0]:
            return output
        sample = args[0] if args else kwargs[self.sample_name]
        if isinstance(output, Tensor):
            return correct(output, sample, weights)
        if isinstance(output, tuple):
            return (correct(output[0], sample, weights), *output[1:])
        name = next(iter(output)) if isinstance(output, dict) else "sample"
        setattr(output, name, correct(getattr(output, name), sample, weights))
        return output


@contextmanager
def corrected(sampler: Sampler, trajectory: Trajectory, processes: Processes = ALONE) -> Iterator[Correction]:
    """Correct the denoiser as it quantizes now, until the block ends; arguments as of `fit_correction`."""
    denoiser = sampler.denoiser
    step = denoiser.get_submodule("adpdm_step")
    assert isinstance(step, StepState)
    found = fit_correction(sampler, trajectory, lambda done, total: None, processes)
    step.set_correction(found.weights)
    attach_correction(denoiser)
    try:
        yield found
    finally:
        detach_correction(denoiser)
        step.set_correction(None)


def attach_correction(denoiser: nn.Module) -> None:
    """Let predictions be corrected, where the denoiser's steps have a correction."""
    step = denoiser.get_submodule("adpdm_step")
    assert isinstance(step, StepState)
    if step.correction is None:
        return
    sample_name = list(inspect.signature(type(denoiser).forward).parameters)[1]
    # First of all, while no other thread can have changed the step.
    denoiser.register_forward_hook(_Correct(sample_name), with_kwargs=True, prepend=True)


def detach_correction(denoiser: nn.Module) -> None:
    """Undo `attach_correction`."""
    for key, hook in list(denoiser._forward_hooks.items()):
        if isinstance(hook, _Correct):
            del denoiser._forward_hooks[key]
            denoiser._forward_hooks_with_kwargs.pop(key, None)
