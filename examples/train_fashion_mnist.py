"""Train (or continue) the demo DDPM on Fashion-MNIST, on a CPU, resumably and reproducibly.

The data is Debian's package `dataset-fashion-mnist`; unpacking needs no root:

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist*.deb fm
    python examples/train_fashion_mnist.py --data fm/usr/share/datasets/fashion-mnist \
        --out runs/fashion --images 2000000

Interrupt it whenever you like: the same command continues from the last state file.
"""

from __future__ import annotations

import argparse
import gzip
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel

BATCH_SIZE = 64
LEARNING_RATE = 4e-4
WARMUP_STEPS = 200
EMA_DECAY = 0.9995  # half-life of 1400 steps: long enough to average out the noise of batch 64
GRADIENT_CLIP = 1.0
NUM_TRAIN_TIMESTEPS = 1000


def load_images(folder: Path) -> torch.Tensor:
    """Read the 60 000 training images, zero-padded to 32x32: [60000, 1, 32, 32] uint8."""
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as file:
        raw = file.read()
    pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy()
    return F.pad(torch.from_numpy(pixels), (2, 2, 2, 2))


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


def learning_rate(seen: int, step: int, total: int, decay: int) -> float:
    """Warm up, stay constant, then fall linearly to 2 % over the last `decay` images."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    remaining = max(0.0, min(1.0, (total - seen) / decay))
    return LEARNING_RATE * warmup * max(0.02, remaining)


class Trainer:
    """Everything that must survive an interruption: weights, EMA, optimizer, counters, generator."""

    def __init__(self, out: Path, init: Path | None, seed: int) -> None:
        self.out, self.step, self.seen, self.loss = out, 0, 0, float("nan")
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.unet = UNet2DModel.from_pretrained(init) if init else make_unet()
        self.unet = self.unet.train().to(memory_format=torch.channels_last)
        self.ema = {name: p.detach().clone() for name, p in self.unet.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self.scheduler = DDPMScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, beta_schedule="linear")
        if self.state_path.exists():
            self.load()

    @property
    def state_path(self) -> Path:
        return self.out / "state.pt"

    def load(self) -> None:
        state = torch.load(self.state_path, weights_only=True)
        self.unet.load_state_dict(state["unet"])
        self.ema = state["ema"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.seen = state["step"], state["seen"]
        print(f"continuing at {self.seen} images (step {self.step})", flush=True)

    def save(self) -> None:
        """Write the state, then the EMA model, each under a temporary name first."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "unet": self.unet.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seen": self.seen,
        }
        temporary = self.state_path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.state_path)
        model = UNet2DModel.from_config(self.unet.config)
        model.load_state_dict(self.ema)
        model.half().save_pretrained(self.out / "unet")
        self.scheduler.save_pretrained(self.out / "scheduler")

    def train_step(self, forward: torch.nn.Module, images: torch.Tensor, lr: float) -> None:
        index = torch.randint(0, len(images), (BATCH_SIZE,), generator=self.generator)
        clean = images[index].float() / 127.5 - 1
        noise = torch.randn(clean.shape, generator=self.generator)
        timestep = torch.randint(0, NUM_TRAIN_TIMESTEPS, (BATCH_SIZE,), generator=self.generator)
        noisy = self.scheduler.add_noise(clean, noise, timestep).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            noise_pred = forward(noisy, timestep).sample
        loss = F.mse_loss(noise_pred.float(), noise)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), GRADIENT_CLIP)
        self.optimizer.step()
        self.step, self.seen = self.step + 1, self.seen + BATCH_SIZE
        self.loss = loss.item() if self.loss != self.loss else 0.99 * self.loss + 0.01 * loss.item()
        self.update_ema()

    @torch.no_grad()
    def update_ema(self) -> None:
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        weights = self.unet.state_dict()
        torch._foreach_lerp_(list(self.ema.values()), [weights[n] for n in self.ema], 1 - decay)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train-images-idx3-ubyte.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder for unet/, scheduler/ and state.pt")
    parser.add_argument("--init", type=Path, help="folder of a UNet2DModel to start from")
    parser.add_argument("--images", type=int, default=2_000_000, help="images to train on in total")
    parser.add_argument("--decay-images", type=int, default=400_000, help="images of linear decay at the end")
    parser.add_argument("--save-every", type=int, default=250, help="steps between state files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser (needs g++)")
    args = parser.parse_args()

    images = load_images(args.data)
    trainer = Trainer(args.out, args.init, args.seed)
    forward = torch.compile(trainer.unet) if args.compile else trainer.unet
    start, first = time.monotonic(), trainer.seen
    while trainer.seen < args.images:
        lr = learning_rate(trainer.seen, trainer.step, args.images, args.decay_images)
        trainer.train_step(forward, images, lr)
        if trainer.step % 50 == 0:
            rate = (trainer.seen - first) / (time.monotonic() - start)
            eta = (args.images - trainer.seen) / rate / 60
            print(
                f"images {trainer.seen}/{args.images} loss {trainer.loss:.4f} "
                f"{rate:.0f} images/s, {eta:.0f} min left",
                flush=True,
            )
        if trainer.step % args.save_every == 0:
            trainer.save()
    trainer.save()


if __name__ == "__main__":
    main()
