"""Train (or continue) a small variational autoencoder on CIFAR-10, resumably, for latent diffusion.

    python examples/fetch_cifar10.py --out cifar10.npz
    python examples/train_autoencoder.py --data cifar10.npz --out runs/cifar10-autoencoder --images 200000

Images of 32x32x3 become latents of 8x8x8, a sixth of the numbers, in which `train_latent.py` trains a
denoiser. 1 M parameters, 70 images/s on one thread of a shared EPYC. Interrupt it whenever you like: the same
command continues.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from training import Recipe, Trainer, argument_parser, parse, reduced_precision, train
from training_data import CIFAR10

KL_WEIGHT = 1e-4  # of the mean over latents, against the mean over pixels: keeps latents near N(0, 1)
PROBE_IMAGES = 1024  # whose latents say the scaling factor


def make_autoencoder() -> AutoencoderKL:
    """Build the autoencoder with random weights: latents of 8 channels, a quarter of height and width."""
    return AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=16,
    )


class AutoencoderTrainer(Trainer):
    """Trains on absolute errors of pixels; saves the scaling factor that gives latents a variance of 1."""

    def __init__(self, recipe: Recipe, args: argparse.Namespace) -> None:
        super().__init__(recipe, args)
        images: Tensor = recipe.data.load(args.data)[0]
        self.probe = images[:PROBE_IMAGES].clone()  # a view would keep all of them

    def loss(self, forward: Callable[..., Any], clean: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean absolute error of the decoded images and KL_WEIGHT of the divergence, [], twice."""
        clean = clean.to(memory_format=torch.channels_last)
        with reduced_precision(self.device, self.precision):
            posterior = self.denoiser.encode(clean).latent_dist
            latents = posterior.sample(generator=self.generator)
            decoded = self.denoiser.decode(latents).sample
        divergence: Tensor = posterior.kl().mean() / latents[0].numel()
        loss = F.l1_loss(decoded.float(), clean) + KL_WEIGHT * divergence
        return loss, loss

    @torch.no_grad()
    def _save_model(self) -> None:
        model = self._averaged().eval()
        latents = model.encode(self.probe.float() / 127.5 - 1).latent_dist.mean
        model.register_to_config(scaling_factor=1 / float(latents.std()))
        model.half().save_pretrained(self.out / self.recipe.folder)


def main(words: Sequence[str] | None = None) -> None:
    recipe = Recipe(make_autoencoder, "vae", learning_rate=1e-3, batch_size=32, data=CIFAR10, flips=True)
    parser = argument_parser(__doc__, CIFAR10)
    args = parse(parser, __file__, words)
    if args.compile:
        parser.error("--compile: the autoencoder is trained without")
    train(recipe, args, AutoencoderTrainer)


if __name__ == "__main__":
    main()
