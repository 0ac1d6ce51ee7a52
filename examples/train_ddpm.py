"""Train (or continue) an unconditional DDPM on CIFAR-10, resumably and reproducibly.

    python examples/fetch_cifar10.py --out cifar10.npz
    python examples/train_ddpm.py --data cifar10.npz --out runs/cifar10-small --images 1000000
    python examples/train_ddpm.py --data cifar10.npz --out runs/cifar10 --size ddpm --device cuda --compile \
        --images 5000000 --save-every 2500

`small` (4.4 M parameters) is for two CPU cores: 18 images/s on one thread of a shared EPYC. `ddpm` (35.7 M)
has the shape of google/ddpm-cifar10-32 and is for a GPU; its state file takes 570 MB. A seed means the same
batches and noise on both. Interrupt it whenever you like: the same command continues from the last state
(on a CPU to the same bytes).
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import UNet2DModel
from training import Recipe, argument_parser, parse, train
from training_data import CIFAR10


def make_small() -> UNet2DModel:
    """Build the 4.4 M parameter denoiser with random weights: 1.0 G multiply-accumulates per image."""
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=32,
        attention_head_dim=64,
    )


def make_ddpm() -> UNet2DModel:
    """Build the 35.7 M parameter denoiser of Ho et al. 2020 with random weights, without their dropout.

    Dropout answers overfitting, which they saw over 2000 epochs; 5 million images are 100.
    """
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
        norm_num_groups=32,
        norm_eps=1e-6,
    )


RECIPES = {
    "small": Recipe(make_small, "unet", learning_rate=4e-4, data=CIFAR10, flips=True),
    "ddpm": Recipe(
        make_ddpm,
        "unet",
        learning_rate=2e-4,  # with the batch, of Ho et al. 2020, appendix B
        batch_size=128,
        data=CIFAR10,
        flips=True,
        ema_decay=0.9998,  # half-life of 3500 steps: a tenth of 5 million images
        warmup_steps=1000,
    ),
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__, CIFAR10)
    parser.add_argument("--size", choices=tuple(RECIPES), default="small")
    args = parse(parser, __file__, words)
    train(RECIPES[args.size], args)


if __name__ == "__main__":
    main()
