"""Train (or continue) the demo DDPM on Fashion-MNIST, on a CPU, resumably and reproducibly.

The data is Debian's package `dataset-fashion-mnist`; unpacking needs no root:

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist*.deb fm
    python examples/train_fashion_mnist.py --data fm/usr/share/datasets/fashion-mnist \
        --out runs/fashion --images 2000000

Interrupt it whenever you like: the same command continues from the last state file.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import UNet2DModel
from training import Recipe, argument_parser, parse, train
from training_data import FASHION_MNIST


def make_unet() -> UNet2DModel:
    """Build the 2.6 M parameter denoiser with random weights."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        attention_head_dim=64,
    )


def main(words: Sequence[str] | None = None) -> None:
    train(
        Recipe(make_unet, "unet", learning_rate=4e-4),
        parse(argument_parser(__doc__, FASHION_MNIST), __file__, words),
    )


if __name__ == "__main__":
    main()
