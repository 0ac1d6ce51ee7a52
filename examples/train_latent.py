"""Train (or continue) a text-to-image latent diffusion model on CIFAR-10, resumably: a tiny Stable Diffusion.

    python examples/fetch_cifar10.py --out cifar10.npz
    python examples/train_autoencoder.py --data cifar10.npz --out runs/cifar10-autoencoder --images 160000
    python examples/train_latent.py --data cifar10.npz --autoencoder runs/cifar10-autoencoder/vae \
        --out runs/sd-cifar10 --images 1000000

The output folder is a StableDiffusionPipeline: a U-Net with cross-attention (12.5 M parameters, 60 images/s
on one thread of a shared EPYC), the autoencoder, and a text encoder of random weights that tells the captions
of `captions.py` apart ("a photo of a cat"). Interrupt it whenever you like: the same command continues.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from captions import (
    CIFAR10_NAMES,
    HIDDEN_SIZE,
    TEMPLATES,
    all_captions,
    captions,
    encode,
    make_text_encoder,
    make_tokenizer,
)
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from training import (
    Recipe,
    Trainer,
    argument_parser,
    default_precision,
    parse,
    reduced_precision,
    train,
)
from training_data import CIFAR10
from training_files import read_record, record_of_part
from transformers import CLIPTextModel

from adpdm.files import replacing, share

ENCODED_AT_ONCE = 250  # images


def make_unet() -> UNet2DConditionModel:
    """Build the denoiser of 8x8x8 latents with random weights: attention to itself and the text at 8x8."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(128, 256),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=HIDDEN_SIZE,
        attention_head_dim=4,  # the number of heads, under this name
    )


class LatentTrainer(Trainer):
    """Conditions on captions, a template drawn for each image; saves the whole pipeline."""

    def __init__(self, recipe: Recipe, args: argparse.Namespace) -> None:
        self.vae = AutoencoderKL.from_pretrained(args.autoencoder)
        self.vae.register_to_config(_name_or_path=args.autoencoder.name)  # which is saved, and tells a folder
        self.tokenizer = make_tokenizer()
        if (args.out / "state.pt").exists():
            self._refuse_another_autoencoder(args)
            self.text_encoder = load_text_encoder(args.out)
        elif args.init is not None and (args.init.parent / "text_encoder").is_dir():
            self.text_encoder = load_text_encoder(args.init.parent)  # whose captions the weights know
        else:
            # As it is saved, so that the pipeline that comes out has the texts that were trained on.
            self.text_encoder = make_text_encoder(self.tokenizer, args.seed).half().float()
        self.embeddings = encode(self.tokenizer, self.text_encoder, all_captions())
        self.autoencoder = record_of_part(args.autoencoder, "vae")
        super().__init__(recipe, args)

    def _refuse_another_autoencoder(self, args: argparse.Namespace) -> None:
        known = AutoencoderKL.from_pretrained(args.out / "vae").half().state_dict()
        given = {name: value.half() for name, value in self.vae.state_dict().items()}
        if known.keys() != given.keys() or any(not torch.equal(known[name], given[name]) for name in known):
            raise SystemExit(
                f"{args.out} was trained in the latents of another autoencoder than {args.autoencoder}; "
                "give that one, or choose another --out"
            )

    def _condition(self, labels: Tensor) -> dict[str, Tensor]:
        """Captions of labels [B] i64; the empty one in place of some of them."""
        classes = len(CIFAR10_NAMES)
        rows = torch.randint(0, len(TEMPLATES), labels.shape, generator=self.generator) * classes + labels
        dropped = torch.rand(labels.shape, generator=self.generator) < self.recipe.label_dropout
        rows = rows.masked_fill(dropped, len(self.embeddings) - 1)
        return {"encoder_hidden_states": self.embeddings[rows].to(self.device)}

    def _record(self) -> dict[str, Any]:
        """Also how the autoencoder came to be, the mirror images, and the texts that stand for classes."""
        autoencoder = {} if self.autoencoder is None else {"autoencoder": self.autoencoder}
        own = {"flips": True, **autoencoder, "captions": captions(TEMPLATES[-1])}
        return {**super()._record(), **own}

    def _save_constant_parts(self) -> None:
        """The whole pipeline, of which the U-Net alone changes."""
        parts = {"vae": self.vae, "text_encoder": self.text_encoder, "unet": self._averaged()}
        pipe = StableDiffusionPipeline(
            **{name: part.half() for name, part in parts.items()},
            tokenizer=self.tokenizer,
            scheduler=DDIMScheduler.from_config(
                self.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(self.out)
        for name in parts:
            share(self.out / name)

    def _save_model(self) -> None:
        self._averaged().half().save_pretrained(self.out / self.recipe.folder)


def load_text_encoder(folder: Path) -> CLIPTextModel:
    """The text encoder of a pipeline, in float32, not to be trained."""
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    return text_encoder.float().eval().requires_grad_(False)


def load_latents(path: Path, autoencoder: Path, cache: Path, precision: str) -> tuple[Tensor, Tensor]:
    """Latents [2 N, C, h, w] f32 of variance 1 of all images and their mirror images, and labels [2 N] i64.

    Args:
        path: of the images, for CIFAR10.load.
        cache: where they are kept, with a checksum of all that they follow from.
        precision: of the encoder's products, as --precision.
    """
    images, labels = CIFAR10.load(path)
    weights = (autoencoder / "diffusion_pytorch_model.safetensors").read_bytes()
    vae = AutoencoderKL.from_pretrained(autoencoder)
    settings = repr((precision, vae.config.scaling_factor)).encode()
    key = hashlib.sha256(weights + images.numpy().tobytes() + settings).hexdigest()
    if cache.exists():
        with safe_open(cache, "pt") as stored:
            if (stored.metadata() or {}).get("key") == key:
                return stored.get_tensor("latents").float(), labels.repeat(2)
    latents = encode_images(vae, torch.cat([images, images.flip(3)]), precision)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with replacing(cache) as temporary:
        save_file({"latents": latents}, temporary, metadata={"key": key})
    return latents.float(), labels.repeat(2)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, precision: str) -> Tensor:
    """Means of latents, scaled, [N, C, h, w] f16, of images [N, 3, H, W] u8; tells progress."""
    vae = vae.float().eval().to(memory_format=torch.channels_last)
    start, parts = time.monotonic(), []
    for batch in images.split(ENCODED_AT_ONCE):
        pixels = (batch.float() / 127.5 - 1).to(memory_format=torch.channels_last)
        with reduced_precision(torch.device("cpu"), precision):
            mean = vae.encode(pixels).latent_dist.mean
        parts.append((mean.float() * vae.config.scaling_factor).half())
        done = len(parts) * ENCODED_AT_ONCE
        if len(parts) % 40 == 0:
            left = (len(images) - done) * (time.monotonic() - start) / done / 60
            print(f"encoded {done}/{len(images)} images, {left:.0f} min left", flush=True)
    return torch.cat(parts).contiguous()


def main(words: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__, CIFAR10)
    parser.add_argument("--autoencoder", type=Path, required=True, help="vae/ of train_autoencoder.py")
    parser.add_argument(
        "--min-snr",
        type=float,
        metavar="GAMMA",
        help="gamma of min-SNR weights, such as 5; a continued training keeps its own",
    )
    args = parse(parser, __file__, words)
    if args.min_snr is not None and not args.min_snr > 0:
        parser.error(f"--min-snr must be greater than 0, got {args.min_snr:g}")
    cache = args.out / "latents.safetensors"
    record = read_record(args.out) if (args.out / "state.pt").exists() else None
    of_training = None if record is None else record.get("precision", "bfloat16")  # as Trainer has it
    precision = args.precision or of_training or default_precision(torch.device("cpu"))
    data = replace(CIFAR10, load=lambda path: load_latents(path, args.autoencoder, cache, precision))
    recipe = Recipe(
        make_unet,
        "unet",
        learning_rate=5e-4,
        num_classes=len(CIFAR10_NAMES),
        data=data,
        min_snr=args.min_snr,
    )
    train(recipe, args, LatentTrainer)


if __name__ == "__main__":
    main()
