"""Denoisers in pipelines and in folders, with their schedulers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

DENOISER_NAMES = ("unet", "transformer")


def find_denoiser(pipe_or_denoiser: Any) -> nn.Module:
    """The network that predicts noise: the module itself, or a pipeline's unet or transformer."""
    if isinstance(pipe_or_denoiser, nn.Module):
        return pipe_or_denoiser
    for name in DENOISER_NAMES:
        component = getattr(pipe_or_denoiser, name, None)
        if isinstance(component, nn.Module):
            return component
    raise TypeError(
        "adpdm: wanted a diffusers pipeline with a unet or transformer, or a denoiser module, such as the "
        f"prior or decoder of a pipeline; got {type(pipe_or_denoiser).__name__}"
    )


class BarePipeline(DiffusionPipeline):
    """A denoiser with its scheduler, a pair that no pipeline of diffusers samples from by itself."""

    _optional_components = list(DENOISER_NAMES)

    def __init__(self, scheduler: Any, unet: Any = None, transformer: Any = None) -> None:
        super().__init__()
        untyped: Any = self
        untyped.register_modules(scheduler=scheduler, unet=unet, transformer=transformer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        untyped: Any = self
        pair = f"{type(find_denoiser(self)).__name__} and {type(untyped.scheduler).__name__}"
        raise TypeError(
            f"load_pipeline: diffusers has no pipeline that samples from {pair} alone; call "
            "adpdm.evaluate.generate with the two, or `adpdm sample`"
        )

    def save_pretrained(self, save_directory: Path | str, **kwargs: Any) -> None:
        """Write what `load_pipeline` reads as such a pair: each part in its folder, no model_index.json."""
        untyped: Any = self
        for name, part in untyped.components.items():
            if part is not None:
                part.save_pretrained(Path(save_directory) / name, **kwargs)


def load_pipeline(path: Path | str, **kwargs: Any) -> Any:
    """Load a diffusers pipeline, or unet/ or transformer/ with scheduler/ beside it, as trainings leave them.

    Of such parts, a UNet2DModel that samples by DDIM becomes a DDIMPipeline, others a pair with their names
    that is quantized, saved and loaded alike, and sampled from by `adpdm.evaluate.generate`. The scheduler is
    that of `load_scheduler`.

    In float32 unless `torch_dtype` says otherwise: diffusers does so by itself, but transformers loads a text
    encoder in the dtype of its file, and a float32 denoiser refuses the embeddings of a float16 one.
    """
    folder = Path(path)
    if (folder / "model_index.json").exists() or not folder.exists():
        try:
            pipe = DiffusionPipeline.from_pretrained(str(path), **kwargs)
        except (OSError, ValueError) as error:
            if folder.exists() or not kwargs.get("local_files_only"):
                raise
            raise FileNotFoundError(
                f"{path} must be a folder, or a model in the cache of the Hugging Face Hub; found neither"
            ) from error
        if not kwargs.keys() & {"torch_dtype", "dtype"}:
            _to_float32(pipe)
        return pipe
    parts = [name for name in (*DENOISER_NAMES, "scheduler") if (folder / name).is_dir()]
    if len(parts) < 2 or parts[-1] != "scheduler":
        raise ValueError(
            f"{folder} must hold model_index.json, or unet/ or transformer/ with scheduler/ beside it; got "
            f"{' and '.join(f'{name}/' for name in parts) or 'none of them'}"
        )
    denoiser, scheduler = load_denoiser(folder / parts[0], **kwargs), load_scheduler(folder / "scheduler")
    if type(denoiser) is diffusers.UNet2DModel and type(scheduler) is diffusers.DDIMScheduler:
        return diffusers.DDIMPipeline(denoiser, scheduler)
    return BarePipeline(scheduler, **{parts[0]: denoiser})


def load_denoiser(folder: Path, **kwargs: Any) -> Any:
    """The model in a folder, of the class that its config names."""
    return _class_named(folder / "config.json").from_pretrained(folder, **kwargs)


def load_scheduler(folder: Path) -> Any:
    """The scheduler in a folder, of the class that its config names; DDIM where that is DDPM.

    DDPMScheduler is what trainings draw their noise with and leave beside their model. DDIM has the same
    noise schedule, and samples in fewer steps and without further noise.

    Raises:
        ValueError: for a class that diffusers does not have.
    """
    kind = _class_named(folder / "scheduler_config.json")
    return (diffusers.DDIMScheduler if kind is diffusers.DDPMScheduler else kind).from_pretrained(folder)


def _class_named(config: Path) -> Any:
    """The class of diffusers that a config, a file with a JSON object, names."""
    try:
        values = json.loads(config.read_text())
    except ValueError as error:  # of JSON, and of bytes that are no text
        raise ValueError(f"{config} must be a config of diffusers, got no JSON: {error}") from None
    name = values.get("_class_name") if isinstance(values, dict) else None
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type):
        raise ValueError(
            f"{config} must name a class of diffusers {diffusers.__version__} as _class_name, got {name!r}"
        )
    return found


def _to_float32(pipe: Any) -> None:
    """Convert the models that are not of diffusers, unless they are quantized."""
    for part in pipe.components.values():
        is_quantized = getattr(part, "hf_quantizer", None) is not None
        if isinstance(part, nn.Module) and not isinstance(part, ModelMixin) and not is_quantized:
            part.float()
