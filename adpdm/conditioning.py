"""What a conditional denoiser is given besides images, from files or texts, for the command line."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .evaluate import GuidedDenoiser
from .evaluate.sampling import IMAGE_CHANNELS, Trajectory, sample_shape
from .pipeline import encode_texts
from .trajectory import Conditioning, DenoiserCall, pick

CALL_KEYS = tuple(field.name for field in fields(DenoiserCall))


def read_conditioning(path: Path, denoiser: nn.Module) -> Conditioning:
    """Tensors by argument name, for images in turn.

    Args:
        path: of a safetensors file; a dot in a name makes a dict (`added_cond_kwargs.text_embeds`). Floating
            tensors are taken in the denoiser's dtype.

    Raises:
        ValueError: for another file, names that are no arguments, names that are a tensor and a dict, and
            numbers of rows that differ.
    """
    tensors = _tensors("--conditioning", path)
    rows = {name: value.shape[0] if value.dim() else 0 for name, value in tensors.items()}
    if len(set(rows.values())) != 1 or 0 in rows.values():
        raise ValueError(
            f"--conditioning {path}: tensors must have the same number of rows, one per image; got {rows}"
        )
    _demand_arguments("--conditioning", path, tensors, denoiser)
    dtype = next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), torch.float32)
    moved = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    return _nested("--conditioning", path, moved)


def conditioning_of_prompts(pipe: Any, prompts: Sequence[str]) -> Conditioning:
    """Embeddings of texts by the pipeline's own encoder, for images in turn.

    Raises:
        TypeError: for a pipeline that cannot encode texts in the way of Stable Diffusion 1 and 2.
    """
    return {"encoder_hidden_states": encode_texts("--prompt", pipe, prompts)}


def add_input_options(sub: argparse.ArgumentParser) -> None:
    """Options that name the files of `read_inputs`."""
    sub.add_argument(
        "--conditioning",
        metavar="FILE.safetensors",
        help="tensors by argument of the denoiser (a dot makes a dict), one row per image, repeated in turn",
    )
    sub.add_argument(
        "--call",
        metavar="FILE.json",
        help="how the denoiser is called: sample_shape, timestep_factor, schedule, constants (DenoiserCall)",
    )
    sub.add_argument(
        "--constants", metavar="FILE.safetensors", help="tensors that every call is given as they are"
    )


def read_inputs(
    args: argparse.Namespace, denoiser: nn.Module
) -> tuple[Conditioning | None, DenoiserCall | None]:
    """What the files of `add_input_options` hold: conditions of images in turn, how the denoiser is called.

    Raises:
        ValueError: as `read_conditioning` and `read_call`, and for texts given twice.
    """
    files = [None if name is None else Path(name) for name in (args.conditioning, args.call, args.constants)]
    call = read_call(files[1], files[2], denoiser)
    given = None if files[0] is None else read_conditioning(files[0], denoiser)
    if args.prompt and "encoder_hidden_states" in (given or {}):
        raise ValueError("--prompt and --conditioning must not both give encoder_hidden_states, got both")
    return given, call


class LatentDecoder(nn.Module):
    """From final samples [B, C, h, w] of a latent model to images [B, 3, H, W] in [-1, 1] by its VAE.

    Args:
        factor, shift: the VAE decodes samples / factor + shift.
        normal: mean and standard deviation [C] of every channel of the VAE's latents; given, the VAE decodes
            samples * deviation / factor + mean instead. Source: diffusers' pipeline of Stable Diffusion XL.
    """

    def __init__(
        self,
        vae: Any,
        factor: float,
        shift: float,
        normal: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.vae = vae
        # Buffers, so that what the images depend on is in the state of this module.
        self.register_buffer("scaling", torch.tensor([factor, shift], dtype=torch.float64))
        self._factor, self._shift, self._normal = factor, shift, None
        if normal is not None:
            self.register_buffer("normal", torch.tensor(normal, dtype=torch.float64))
            self._normal = torch.tensor(normal, dtype=torch.float64).view(2, 1, -1, 1, 1)  # mean, deviation

    @torch.no_grad()
    def forward(self, samples: Tensor) -> Tensor:
        latents = samples.to(self.vae.device, self.vae.dtype)
        if self._normal is None:
            latents = latents / self._factor + self._shift
        else:
            mean, deviation = self._normal.to(latents)
            latents = latents * deviation / self._factor + mean
        # One at a time: a decoder needs more memory per image than a denoiser.
        return torch.cat([self.vae.decode(latent).sample for latent in latents.split(1)])


def guided(pipe: Any, denoisers: Sequence[nn.Module], scale: float, given: Conditioning) -> list[nn.Module]:
    """Denoisers under classifier-free guidance away from the empty text, or from the class for none.

    Raises:
        ValueError: for conditions that are neither texts nor classes alone, or without a class for none.
    """
    if set(given) == {"encoder_hidden_states"}:
        text = encode_texts("--guidance-scale", pipe, [""])
        return [GuidedDenoiser(x, scale, null_text=text) for x in denoisers]
    classes = getattr(getattr(denoisers[0], "config", None), "num_embeds_ada_norm", None)
    if set(given) != {"class_labels"} or classes is None:
        raise ValueError(
            "--guidance-scale needs encoder_hidden_states (--prompt) alone, or class_labels of a denoiser "
            f"with a class for none; got {sorted(given) or 'nothing'} for {type(denoisers[0]).__name__}"
        )
    return [GuidedDenoiser(x, scale, null_class=classes) for x in denoisers]


def read_call(settings: Path | None, constants: Path | None, denoiser: nn.Module) -> DenoiserCall | None:
    """How the denoiser is called: a JSON object of DenoiserCall's fields, and tensors for its `constants`.

    Raises:
        ValueError: for other files, keys or values, constants that are no arguments, and names that are a
            tensor and a dict, or in both files.
    """
    if settings is None and constants is None:
        return None
    values = {} if settings is None else _call_settings(settings)
    fixed = dict(values.get("constants", {}))
    if settings is not None:
        _demand_arguments("--call", settings, fixed, denoiser)
    if constants is not None:
        tensors = _tensors("--constants", constants)
        _demand_arguments("--constants", constants, tensors, denoiser)
        nested = _nested("--constants", constants, tensors)
        if twice := sorted(fixed.keys() & nested.keys()):
            raise ValueError(
                f"--call {settings} and --constants {constants}: a constant must come from one of them, "
                f"got {twice} from both"
            )
        fixed.update(nested)
    return DenoiserCall(**{**values, "constants": fixed})


def decoder_of(pipe: Any, shape: tuple[int, ...]) -> LatentDecoder | None:
    """From final samples to images by the pipeline's VAE; None where samples are images.

    Raises:
        ValueError: for samples that are neither images nor latents [C, H, W] of a VAE with a scaling factor,
            and for means and deviations of latents that are not one per channel.
    """
    vae = getattr(pipe, "vae", None)
    factor = getattr(getattr(vae, "config", None), "scaling_factor", None)
    if vae is None and len(shape) == 3 and shape[0] in IMAGE_CHANNELS:
        return None
    if vae is None or factor is None or len(shape) != 3:
        raise ValueError(
            f"samples of shape {shape} must be images with {IMAGE_CHANNELS} channels, or latents (C, H, W) "
            f"of a pipeline with a VAE that has a scaling_factor; got {type(pipe).__name__} with "
            f"{'no VAE' if vae is None else type(vae).__name__}: call adpdm.evaluate.compare with decode="
        )
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return LatentDecoder(vae, factor, shift, _normal_of(vae.config, shape[0]))


def _normal_of(config: Any, channels: int) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of a VAE's latents, channel by channel; None unless both are set.

    Raises:
        ValueError: for other than one number per channel.
    """
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or deviation is None:
        return None
    if len(mean) != channels or len(deviation) != channels:
        raise ValueError(
            f"latents_mean and latents_std of the VAE must have {channels} numbers, one per channel of a "
            f"sample, got {len(mean)} and {len(deviation)}"
        )
    return list(mean), list(deviation)


def try_call(
    denoiser: nn.Module, scheduler: Any, steps: int, conditioning: Conditioning, call: DenoiserCall | None
) -> tuple[int, ...]:
    """Call a denoiser once, so that what does not fit is said before work starts; the shape of a sample.

    Raises:
        ValueError: if the call fails, with its reason and what it was given, and where nothing says the
            shape of a sample.
        torch.OutOfMemoryError: as it comes: nothing is wrong with what was given.
    """
    shape = (call.sample_shape if call else None) or sample_shape(denoiser)
    device = next(denoiser.parameters()).device
    try:
        path = Trajectory(scheduler, steps, [0], shape, device, call)
        with torch.no_grad():
            path.predict(denoiser, path.model_input(0), 0, pick(conditioning, torch.arange(1)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        given = sorted(conditioning) + sorted(call.constants if call else {})
        raise ValueError(
            f"{type(denoiser).__name__} must work on samples {shape} with {given or 'nothing else'}, got "
            f"{type(error).__name__}: {error}; its arguments are {_arguments(denoiser)}, which are given "
            "by --prompt, --conditioning, --call and --constants"
        ) from error
    return shape


def _call_settings(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--call {path} must be a JSON file: {error}") from error
    if not isinstance(values, dict) or set(values) - set(CALL_KEYS):
        got = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"--call {path} must hold an object with keys of {CALL_KEYS}, got {got}")
    if isinstance(values.get("sample_shape"), list):
        values["sample_shape"] = tuple(values["sample_shape"])
    try:
        DenoiserCall(**values)
    except ValueError as error:
        raise ValueError(f"--call {path}: {error}") from None
    return values


def _tensors(option: str, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{option} {path} must be a safetensors file, found none")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{option} {path} must be a safetensors file: {error}") from error
    if not tensors:
        raise ValueError(f"{option} {path} must hold tensors, got none")
    return tensors


def _arguments(denoiser: nn.Module) -> list[str]:
    """Of the denoiser's forward, without the sample and the timestep."""
    names = list(inspect.signature(type(denoiser).forward).parameters)[2:]
    return [name for name in names if name not in ("timestep", "return_dict")]


def _demand_arguments(option: str, path: Path, values: dict[str, Any], denoiser: nn.Module) -> None:
    known = _arguments(denoiser)
    unknown = sorted(name for name in values if name.partition(".")[0] not in known)
    if unknown:
        raise ValueError(
            f"{option} {path}: names must be arguments of {type(denoiser).__name__}, {known}; got {unknown}"
        )


def _nested(option: str, path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Dotted names as dicts."""
    dicts = {name.partition(".")[0] for name in tensors if "." in name}
    if both := sorted(dicts & tensors.keys()):
        raise ValueError(f"{option} {path}: a name must be a tensor or a dict of them, got {both} as both")
    result: dict[str, Any] = {}
    for name, value in tensors.items():
        outer, dot, inner = name.partition(".")
        if dot:
            result.setdefault(outer, {})[inner] = value
        else:
            result[outer] = value
    return result
