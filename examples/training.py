"""What the training scripts share: recipe, loss curve, moving average, a resumable and time-bounded loop."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_data import FASHION_MNIST, ImageData
from training_files import RECORD_FILE, load_weights, read_record, record_of_part, replace_text
from winograd import use_winograd

from adpdm.files import share

GRADIENT_CLIP = 1.0
NUM_TRAIN_TIMESTEPS = 1000
CURVE_STEPS = 50  # steps whose mean loss makes a row of loss.csv and a line of progress
CURVE_FILE = "loss.csv"


@dataclass(frozen=True)
class Recipe:
    """How one kind of model is trained.

    Args:
        make: a denoiser with random weights.
        folder: of the denoiser below the output folder, as its pipeline calls it.
        num_classes: of the labels it is given; None for an unconditional one.
        data: what --data holds.
        flips: mirror half of the images left to right.
        ema_decay: of the moving average that is saved; 0.9995 has a half-life of 1400 steps, long enough to
            average out the noise of batch 64.
        min_snr: gamma of min-SNR weights (Hang et al., ICCV 2023): squared errors count min(SNR, gamma) / SNR
            times, so that timesteps of little noise, which say little of what is in the image, take less of
            the gradient; None for equal weights.
    """

    make: Callable[[], Any]
    folder: str
    learning_rate: float
    batch_size: int = 64
    num_classes: int | None = None
    label_dropout: float = 0.1  # share of the images that train the unconditional half of guidance
    data: ImageData = FASHION_MNIST
    flips: bool = False
    ema_decay: float = 0.9995
    warmup_steps: int = 200
    min_snr: float | None = None


class LossCurve:
    """Mean losses of CURVE_STEPS steps each, [(images seen, mean loss)], and the sum since the last."""

    def __init__(self, device: torch.device) -> None:
        self.rows: list[tuple[int, float]] = []
        self.total = torch.zeros((), dtype=torch.float64, device=device)  # read once per row: reading waits
        self.count = 0

    def add(self, loss: Tensor) -> None:
        """Add the loss [] of one step."""
        self.total += loss.detach()
        self.count += 1

    def close_row(self, seen: int) -> float:
        """Append the mean since the last row and return it."""
        mean = self.total.item() / self.count
        self.rows.append((seen, mean))
        self.total.zero_()
        self.count = 0
        return mean

    def state(self) -> dict[str, Any]:
        """What `load` takes, of plain types."""
        return {"rows": self.rows, "total": self.total.item(), "count": self.count}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.rows = [(seen, loss) for seen, loss in state["rows"]]
        self.total.fill_(state["total"])
        self.count = state["count"]

    def csv(self) -> str:
        """The rows under a head; losses with the digits that a float32 has."""
        return "images,loss\n" + "".join(f"{seen},{loss:.9g}\n" for seen, loss in self.rows)


class Trainer:
    """Everything that must survive an interruption: weights, EMA, optimizer, counters, curve, generator.

    The generator is of the CPU wherever the model is, so that a seed means the same batches and noise.
    """

    def __init__(self, recipe: Recipe, args: argparse.Namespace) -> None:
        self.recipe, self.out, self.seed = recipe, args.out, args.seed
        self.device = torch.device(args.device)
        self.precision: str = args.precision or default_precision(self.device)
        self.step, self.seen = 0, 0
        self.generator = torch.Generator().manual_seed(args.seed)
        torch.manual_seed(args.seed)
        self.denoiser = recipe.make()
        self.before = None  # the record of the training that --init comes from
        if args.init is not None:
            self.before = record_of_part(args.init, recipe.folder)
            if not self.state_path.exists():
                load_weights(self.denoiser, args.init)
        self.denoiser = self.denoiser.float().train().to(self.device, memory_format=torch.channels_last)
        self.ema = {name: value.detach().clone() for name, value in self.denoiser.state_dict().items()}
        # None is torch's default, on a GPU several tensors at once; False would be one at a time.
        self.fused = True if self.device.type == "cpu" else None
        self.optimizer = torch.optim.AdamW(
            self.denoiser.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=self.fused
        )
        self.scheduler = DDPMScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, beta_schedule="linear")
        self.curve = LossCurve(self.device)
        if self.state_path.exists():
            self._load(args.precision)
        if args.winograd:
            if (self.device.type, self.precision) != ("cpu", "float32"):
                where = f"{self.device.type} in {self.precision}"
                raise SystemExit(f"--winograd is for the CPU in float32, this training is on {where}")
            use_winograd(self.denoiser)
        self.commands = self._commands(args)

    @property
    def state_path(self) -> Path:
        return self.out / "state.pt"

    def _load(self, precision: str | None) -> None:
        state = torch.load(self.state_path, map_location="cpu", weights_only=True)
        got = {name: value.shape for name, value in state["denoiser"].items()}
        if got != {name: value.shape for name, value in self.denoiser.state_dict().items()}:
            raise SystemExit(
                f"{self.state_path} is the state of another model; continue with the same options, "
                "or choose another --out"
            )
        self.denoiser.load_state_dict(state["denoiser"])
        self.ema = {name: value.to(self.device) for name, value in state["ema"].items()}
        for group in state["optimizer"]["param_groups"]:
            group["fused"], group["foreach"] = self.fused, None  # of here, not of where it was written
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.seen = state["step"], state["seen"]
        record = read_record(self.out)
        if record is not None:
            self._keep_settings(record, precision)
        if "curve" in state:  # states of before 2026-11-28 have none: their curve begins where they go on
            self.curve.load(state["curve"])
        print(f"continuing at {self.seen} images (step {self.step})", flush=True)

    def _keep_settings(self, record: dict[str, Any], precision: str | None) -> None:
        """Go on as the training began, which its record tells."""
        self.before, self.seed = record.get("before"), record["seed"]
        # Records of before 2026-11-29 say neither: there was one precision, and there were no weights.
        self.precision = precision or record.get("precision", "bfloat16")
        gamma, given = record.get("min_snr"), self.recipe.min_snr
        if given is not None and given != gamma:
            began = "without --min-snr" if gamma is None else f"with --min-snr {gamma:g}"
            raise SystemExit(
                f"{self.out} was trained {began}, got --min-snr {given:g}; "
                "continue without the option, or choose another --out"
            )
        self.recipe = replace(self.recipe, min_snr=gamma)

    def save(self) -> None:
        """Write the state, then the EMA model in float16, the curve and the record of the training.

        The state is written under a temporary name first; the rest follows from it.

        Raises:
            SystemExit: losses or weights are no numbers; what was saved before is left alone.
        """
        self._check_finite()
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.state_path.exists():
            self._save_constant_parts()
        state = {
            "denoiser": self.denoiser.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seen": self.seen,
            "curve": self.curve.state(),
        }
        temporary = self.state_path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.state_path)
        self._save_model()
        share(self.out / self.recipe.folder)
        replace_text(self.out / CURVE_FILE, self.curve.csv())
        replace_text(self.out / RECORD_FILE, json.dumps(self._record(), indent=2) + "\n")

    def _check_finite(self) -> None:
        loss = self.curve.total.item()
        if not math.isfinite(loss):
            raise self.diverged(f"the loss is {loss}")
        weights = (*self.denoiser.state_dict().values(), *self.ema.values())
        if not all(bool(value.isfinite().all()) for value in weights):
            raise self.diverged("the weights are not finite")

    def diverged(self, what: str) -> SystemExit:
        """To be raised when a training has come to what is no number."""
        is_there = self.state_path.exists()
        kept = f"{self.state_path} is of the last save before" if is_there else "nothing was saved before"
        return SystemExit(f"{what} at {self.seen} images; {kept}")

    def _save_constant_parts(self) -> None:
        """Write what training does not change; once, before there is a state that goes on with it."""

    def _save_model(self) -> None:
        self._averaged().half().save_pretrained(self.out / self.recipe.folder)
        self.scheduler.save_pretrained(self.out / "scheduler")

    def _averaged(self) -> Any:
        """A copy of the model with the weights of the moving average, on the CPU."""
        model = type(self.denoiser).from_config(self.denoiser.config)
        model.load_state_dict(self.ema)
        return model

    def _commands(self, args: argparse.Namespace) -> list[dict[str, Any]]:
        """The commands that trained and where each began; one that is repeated to continue stands once."""
        record = read_record(self.out)
        before = record["commands"] if self.seen and record else []
        if before and (before[-1]["command"] == args.command or self.seen >= args.images):
            return list(before)
        return [*before, {"from_images": self.seen, "command": args.command}]

    def _record(self) -> dict[str, Any]:
        """How the model came to be, for its card."""
        recipe = self.recipe
        before = {} if self.before is None else {"before": self.before}
        return {
            **before,
            "data": recipe.data.name,
            "num_classes": recipe.num_classes,
            "images": self.seen,
            "steps": self.step,
            "batch_size": recipe.batch_size,
            "learning_rate": recipe.learning_rate,
            "warmup_steps": recipe.warmup_steps,
            "ema_decay": recipe.ema_decay,
            "flips": recipe.flips,
            "min_snr": recipe.min_snr,
            "precision": self.precision,
            "seed": self.seed,
            "device": self.device.type,
            "commands": self.commands,
        }

    def train_step(
        self,
        forward: Callable[..., Any],
        images: Tensor,  # [N, C, H, W] u8 pixels or f32 latents, on the device
        labels: Tensor,  # [N] i64 on the CPU
        learning_rate: float,
    ) -> None:
        """One optimizer step on a random batch."""
        batch = self.recipe.batch_size
        index = torch.randint(0, len(images), (batch,), generator=self.generator)
        drawn = images[index.to(self.device)]
        clean = self._flipped(drawn if drawn.is_floating_point() else drawn.float() / 127.5 - 1)
        loss, shown = self.loss(forward, clean, labels[index])
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), GRADIENT_CLIP)
        self.optimizer.step()
        self.step, self.seen = self.step + 1, self.seen + batch
        self.curve.add(shown)
        self._update_ema()

    def loss(
        self,
        forward: Callable[..., Any],
        clean: Tensor,  # [B, C, H, W] f32
        labels: Tensor,  # [B] i64 on the CPU
    ) -> tuple[Tensor, Tensor]:
        """What the weights follow and what the curve shows, []: squared errors of the predicted noise."""
        device = self.device
        noise = torch.randn(clean.shape, generator=self.generator).to(device)
        timestep = torch.randint(0, NUM_TRAIN_TIMESTEPS, (len(clean),), generator=self.generator).to(device)
        noisy = self.scheduler.add_noise(clean, noise, timestep).to(memory_format=torch.channels_last)
        with reduced_precision(device, self.precision), fastest_attention(device):
            noise_pred = forward(noisy, timestep, **self._condition(labels)).sample
        if self.recipe.min_snr is None:
            loss = F.mse_loss(noise_pred.float(), noise)
            return loss, loss
        errors = F.mse_loss(noise_pred.float(), noise, reduction="none").mean((1, 2, 3))  # [B]
        weights = min_snr_weights(self.scheduler.alphas_cumprod, self.recipe.min_snr)  # [T]
        return (errors * weights.to(device)[timestep]).mean(), errors.mean()

    def _flipped(
        self,
        images: Tensor,  # [B, C, H, W]
    ) -> Tensor:
        """The images, half of them mirrored where the recipe says so."""
        if not self.recipe.flips:
            return images
        mirrored = torch.rand((len(images), 1, 1, 1), generator=self.generator) < 0.5
        return torch.where(mirrored.to(self.device), images.flip(3), images)

    def _condition(
        self,
        labels: Tensor,  # [B] i64 on the CPU
    ) -> dict[str, Tensor]:
        """Class labels, some of them replaced by the class that stands for none."""
        if self.recipe.num_classes is None:
            return {}
        dropped = torch.rand(labels.shape, generator=self.generator) < self.recipe.label_dropout
        return {"class_labels": labels.masked_fill(dropped, self.recipe.num_classes).to(self.device)}

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        weights = self.denoiser.state_dict()
        floating = [name for name, value in self.ema.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.ema[n] for n in floating], [weights[n] for n in floating], 1 - decay)


def min_snr_weights(
    alphas_cumprod: Tensor,  # [T] f32
    gamma: float,
) -> Tensor:
    """Weights [T] f32 of squared errors of the noise, see Recipe."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / snr


def default_precision(device: torch.device) -> str:
    """The faster one: bfloat16 on a GPU and on CPUs that multiply it.

    Elsewhere products of it are emulated: a step of train_latent.py took 20 times as long (Zen 3).
    """
    if device.type != "cpu":
        return "bfloat16"
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bfloat16" if can.get("avx512_bf16") or can.get("amx_bf16") else "float32"


def reduced_precision(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16, or nothing for "float32"."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def fastest_attention(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Plain matrix products on a CPU: torch's fused backward is far slower at 64 tokens."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def command_line(script: str, words: Sequence[str]) -> str:
    """A command as a shell takes it, absolute paths shortened to their last part: a card tells no folders."""
    short = []
    for word in words:
        name, equals, value = word.rpartition("=")
        short.append(name + equals + (Path(value).name if value.startswith("/") else value))
    return shlex.join(["python", f"examples/{Path(script).name}", *short])


def learning_rate(recipe: Recipe, seen: int, step: int, total: int, decay: int) -> float:
    """Warm up, stay constant, then fall linearly to 2 % over the last `decay` images."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    remaining = max(0.0, min(1.0, (total - seen) / max(decay, 1)))
    return recipe.learning_rate * warmup * max(0.02, remaining)


def argument_parser(description: str | None, data: ImageData) -> argparse.ArgumentParser:
    """The options of every training script."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("--data", type=Path, required=True, help=data.wanted)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for denoiser, scheduler/, state.pt and loss.csv"
    )
    parser.add_argument("--init", type=Path, help="folder of a model of the same shape to start from")
    parser.add_argument("--images", type=int, default=2_000_000, help="images to train on in total")
    parser.add_argument("--decay-images", type=int, default=400_000, help="images of linear decay at the end")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop and save after this time")
    parser.add_argument("--save-every", type=int, default=250, help="steps between state files")
    parser.add_argument(
        "--seed", type=int, default=0, help="of a new training; a continued one keeps its own"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float32"),
        help="of products; by default that of the training so far, at its beginning the faster one: "
        "bfloat16 on a GPU and on CPUs that multiply it",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser (needs g++)")
    parser.add_argument(
        "--winograd",
        action="store_true",
        help="3x3 convolutions of maps of 4x4 and 8x8 with a quarter of the products, on a CPU in float32",
    )
    return parser


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Refuse a device that this machine does not have."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")


def parse(parser: argparse.ArgumentParser, script: str, words: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command, `command` with them; `words` of None are those of the process."""
    words = sys.argv[1:] if words is None else words
    args = parser.parse_args(words)
    check_device(parser, args.device)
    if args.save_every < 1:
        parser.error(f"--save-every must be at least 1, got {args.save_every}")
    args.command = command_line(script, words)
    return args


def train(recipe: Recipe, args: argparse.Namespace, trainer_type: type[Trainer] = Trainer) -> None:
    """Train until the images or the minutes are used up; an interrupted run continues from its last state."""
    trainer = trainer_type(recipe, args)  # first, for what it refuses: reading the data may take minutes
    images, labels = recipe.data.load(args.data)
    images = images.to(trainer.device)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    forward = torch.compile(trainer.denoiser) if args.compile else trainer.denoiser
    start, first = time.monotonic(), trainer.seen
    while trainer.seen < args.images and time.monotonic() - start < 60 * args.minutes:
        rate = learning_rate(recipe, trainer.seen, trainer.step, args.images, args.decay_images)
        trainer.train_step(forward, images, labels, rate)
        if trainer.step % CURVE_STEPS == 0:
            speed = (trainer.seen - first) / (time.monotonic() - start)
            _report(trainer, args, speed)
        if trainer.step % args.save_every == 0:
            trainer.save()
    trainer.save()


def _report(trainer: Trainer, args: argparse.Namespace, images_per_second: float) -> None:
    """Close a row of the curve and tell it, the speed and the time left."""
    loss = trainer.curve.close_row(trainer.seen)
    if not math.isfinite(loss):
        raise trainer.diverged(f"the loss is {loss}")
    print(
        f"images {trainer.seen}/{args.images} loss {loss:.4f} {images_per_second:.0f} images/s, "
        f"{(args.images - trainer.seen) / images_per_second / 60:.0f} min left",
        flush=True,
    )
