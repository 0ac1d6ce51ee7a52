"""Train (or continue) a small class-conditional diffusion transformer on Fashion-MNIST, resumably, on a CPU.

The data is Debian's package `dataset-fashion-mnist`; unpacking needs no root:

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist*.deb fm
    python examples/train_dit.py --data fm/usr/share/datasets/fashion-mnist --out runs/dit --images 2000000

Interrupt it whenever you like: the same command continues from the last state file. Class 10 means "none",
for classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import DiTTransformer2DModel
from training import Recipe, argument_parser, parse, train
from training_data import FASHION_MNIST

NUM_CLASSES = 10


def make_transformer() -> DiTTransformer2DModel:
    """Build a denoiser of pixels in patches of 4x4 with random weights: 64 tokens of 128 channels."""
    transformer = DiTTransformer2DModel(
        sample_size=32,
        patch_size=4,
        in_channels=1,
        out_channels=1,
        num_layers=8,
        num_attention_heads=4,
        attention_head_dim=32,
        norm_num_groups=32,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    # Labels are dropped by the trainer, with a generator that a resumed run continues.
    for block in transformer.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return transformer


def main(words: Sequence[str] | None = None) -> None:
    recipe = Recipe(make_transformer, "transformer", learning_rate=1e-3, num_classes=NUM_CLASSES)
    train(recipe, parse(argument_parser(__doc__, FASHION_MNIST), __file__, words))


if __name__ == "__main__":
    main()
