"""What the training scripts share: data, loss, moving average, a resumable and time-bounded loop."""

from __future__ import annotations

import argparse
import gzip
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

EMA_DECAY = 0.9995  # half-life of 1400 steps: long enough to average out the noise of batch 64
GRADIENT_CLIP = 1.0
NUM_TRAIN_TIMESTEPS = 1000
WARMUP_STEPS = 200


@dataclass(frozen=True)
class Recipe:
    """How one kind of model is trained.

    Args:
        make: a denoiser with random weights.
        folder: of the denoiser below the output folder, as its pipeline calls it.
        num_classes: of the labels it is given; None for an unconditional one.
    """

    make: Callable[[], Any]
    folder: str
    learning_rate: float
    batch_size: int = 64
    num_classes: int | None = None
    label_dropout: float = 0.1  # share of the images that train the unconditional half of guidance


def load_fashion_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """60 000 training images, zero-padded to 32x32, [60000, 1, 32, 32] u8, and their labels [60000] i64."""
    pixels = _read(folder / "train-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    labels = _read(folder / "train-labels-idx1-ubyte.gz", 8)
    return F.pad(torch.from_numpy(pixels), (2, 2, 2, 2)), torch.from_numpy(labels).long()


def _read(path: Path, header: int) -> np.ndarray:
    if not path.exists():
        raise SystemExit(f"wanted {path}, which does not exist; the head of this script says where to get it")
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header).copy()


class Trainer:
    """Everything that must survive an interruption: weights, EMA, optimizer, counters, generator."""

    def __init__(self, recipe: Recipe, out: Path, init: Path | None, seed: int) -> None:
        self.recipe, self.out = recipe, out
        self.step, self.seen, self.loss = 0, 0, float("nan")
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.denoiser = recipe.make()
        if init is not None:
            self.denoiser = type(self.denoiser).from_pretrained(init)
        self.denoiser = self.denoiser.float().train().to(memory_format=torch.channels_last)
        self.ema = {name: value.detach().clone() for name, value in self.denoiser.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.denoiser.parameters(), lr=recipe.learning_rate, weight_decay=0.0
        )
        self.scheduler = DDPMScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, beta_schedule="linear")
        if self.state_path.exists():
            self._load()

    @property
    def state_path(self) -> Path:
        return self.out / "state.pt"

    def _load(self) -> None:
        state = torch.load(self.state_path, weights_only=True)
        self.denoiser.load_state_dict(state["denoiser"])
        self.ema = state["ema"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.seen = state["step"], state["seen"]
        print(f"continuing at {self.seen} images (step {self.step})", flush=True)

    def save(self) -> None:
        """Write the state, then the EMA model in float16, the state under a temporary name first."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "denoiser": self.denoiser.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seen": self.seen,
        }
        temporary = self.state_path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.state_path)
        model = type(self.denoiser).from_config(self.denoiser.config)
        model.load_state_dict(self.ema)
        model.half().save_pretrained(self.out / self.recipe.folder)
        self.scheduler.save_pretrained(self.out / "scheduler")

    def train_step(
        self, forward: Callable[..., Any], images: Tensor, labels: Tensor, learning_rate: float
    ) -> None:
        """One optimizer step on a random batch of images [N, C, H, W] u8 with labels [N] i64."""
        batch, generator = self.recipe.batch_size, self.generator
        index = torch.randint(0, len(images), (batch,), generator=generator)
        clean = images[index].float() / 127.5 - 1
        noise = torch.randn(clean.shape, generator=generator)
        timestep = torch.randint(0, NUM_TRAIN_TIMESTEPS, (batch,), generator=generator)
        noisy = self.scheduler.add_noise(clean, noise, timestep).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            noise_pred = forward(noisy, timestep, **self._condition(labels[index])).sample
        loss = F.mse_loss(noise_pred.float(), noise)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), GRADIENT_CLIP)
        self.optimizer.step()
        self.step, self.seen = self.step + 1, self.seen + batch
        self.loss = loss.item() if self.loss != self.loss else 0.99 * self.loss + 0.01 * loss.item()
        self._update_ema()

    def _condition(self, labels: Tensor) -> dict[str, Tensor]:
        """Class labels, some of them replaced by the class that stands for none."""
        if self.recipe.num_classes is None:
            return {}
        dropped = torch.rand(labels.shape, generator=self.generator) < self.recipe.label_dropout
        return {"class_labels": labels.masked_fill(dropped, self.recipe.num_classes)}

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        weights = self.denoiser.state_dict()
        floating = [name for name, value in self.ema.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.ema[n] for n in floating], [weights[n] for n in floating], 1 - decay)


def learning_rate(base: float, seen: int, step: int, total: int, decay: int) -> float:
    """Warm up, stay constant, then fall linearly to 2 % over the last `decay` images."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    remaining = max(0.0, min(1.0, (total - seen) / max(decay, 1)))
    return base * warmup * max(0.02, remaining)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of every training script."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("--data", type=Path, required=True, help="folder with train-images-idx3-ubyte.gz")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for denoiser, scheduler/ and state.pt"
    )
    parser.add_argument("--init", type=Path, help="folder of a denoiser to start from")
    parser.add_argument("--images", type=int, default=2_000_000, help="images to train on in total")
    parser.add_argument("--decay-images", type=int, default=400_000, help="images of linear decay at the end")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop and save after this time")
    parser.add_argument("--save-every", type=int, default=250, help="steps between state files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser (needs g++)")
    return parser


def train(recipe: Recipe, args: argparse.Namespace) -> None:
    """Train until the images or the minutes are used up; an interrupted run continues from its last state."""
    images, labels = load_fashion_mnist(args.data)
    trainer = Trainer(recipe, args.out, args.init, args.seed)
    forward = torch.compile(trainer.denoiser) if args.compile else trainer.denoiser
    start, first = time.monotonic(), trainer.seen
    while trainer.seen < args.images and time.monotonic() - start < 60 * args.minutes:
        rate = learning_rate(recipe.learning_rate, trainer.seen, trainer.step, args.images, args.decay_images)
        trainer.train_step(forward, images, labels, rate)
        if trainer.step % 50 == 0:
            speed = (trainer.seen - first) / (time.monotonic() - start)
            left = (args.images - trainer.seen) / speed / 60
            print(
                f"images {trainer.seen}/{args.images} loss {trainer.loss:.4f} "
                f"{speed:.0f} images/s, {left:.0f} min left",
                flush=True,
            )
        if trainer.step % args.save_every == 0:
            trainer.save()
    trainer.save()
