"""Write the model card of a trained model: samples, loss curve, Frechet distance, how it came to be.

    python examples/model_card.py runs/dit
    python examples/model_card.py runs/cifar10-small --data cifar10.npz --frechet-images 10000

Writes README.md, grid.png and loss.svg into the folder. With --data it measures the Frechet distance to the
training images on EfficientNet-Lite0 features (not FID, whose features are another network's). Samples are
kept in FOLDER.samples, so that an interrupted run continues where it was; delete that folder afterwards.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from model_samples import Quality, Samples, Sampling, load_model, measure
from PIL import Image
from training import CURVE_FILE, check_device, command_line
from training_data import CIFAR10, FASHION_MNIST, IMAGE_DATA
from training_files import replace_text

from adpdm.evaluate import INSTALL_SENTENCE, load_lite0
from adpdm.evaluate.frechet import MIN_IMAGES
from adpdm.model_folder import ModelFolder
from adpdm.report.charts import Scale, path, text, x_axis, y_axis
from adpdm.report.markup import Html, tag

GUIDANCE = 1.5  # the scale of the best distances in Peebles and Xie, "Scalable Diffusion Models", 2022
ENLARGED = 2  # pixels of the grid per pixel of a sample
POINTS = 200  # of the drawn loss curve
# Where the commands of ImageData.fetch leave what --data wants.
FETCHED = {FASHION_MNIST.name: "fm/usr/share/datasets/fashion-mnist", CIFAR10.name: "cifar10.npz"}
SVG_STYLE = (
    "svg{background:#fff;font:11.5px sans-serif}text{fill:#555}.grid{stroke:#ddd}"
    ".curve{fill:none;stroke:#2563a8;stroke-width:1.5}"
)


@dataclass(frozen=True)
class Card:
    """What a card tells.

    Args:
        curve: [R, 2] f64, images seen and mean loss.
        quality: None where it was not measured; `why` is the sentence then.
        command: that wrote the card.
    """

    model: ModelFolder
    sampling: Sampling
    curve: np.ndarray
    quality: Quality | None
    why: str
    command: str


def read_curve(file: Path) -> np.ndarray:
    """[R, 2] f64 of loss.csv; R is 0 where there is no file."""
    if not file.is_file():
        return np.zeros((0, 2))
    rows = list(csv.reader(io.StringIO(file.read_text())))[1:]
    return np.array(rows, np.float64).reshape(-1, 2)


def draw_curve(
    curve: np.ndarray,  # [R, 2] f64, R > 0
) -> Html:
    """The loss curve as a stand-alone SVG, means of neighbouring rows, cut above 2.5 times the median."""
    rows = np.array([part.mean(0) for part in np.array_split(curve, min(POINTS, len(curve)))])
    seen, loss = rows[:, 0] / 1000, rows[:, 1]
    high = min(float(loss.max()), 2.5 * float(np.median(loss)))
    left, right, top, bottom = 56.0, 620.0, 16.0, 240.0
    x = Scale(float(min(seen[0], curve[0, 0] / 1000)), float(seen[-1]), left, right)
    y = Scale(0.0, high * 1.04, bottom, top)
    heights = [y(v) if v <= high else math.nan for v in loss]
    cut = "" if loss.max() <= high else f"the beginning, above {high:.2g}, is not drawn"
    return tag(
        "svg",
        tag("style", Html(SVG_STYLE)),
        y_axis(y, left, right),
        x_axis(x, top, bottom),
        path([x(v) for v in seen], heights, "curve"),
        text((left + right) / 2, bottom + 36, "thousands of images seen", "middle"),
        text(left, top - 4, "mean squared error of the noise"),
        text(right, top - 4, cut, "end"),
        viewBox="0 0 640 284",
        width="640",
        height="284",
        xmlns="http://www.w3.org/2000/svg",
    )


def make_grid(
    images: np.ndarray,  # [N, H, W, C] u8, C 1 or 3
    num_classes: int | None,
) -> Image.Image:
    """A row per class of images i, i + classes, ...; without classes the squarest grid."""
    count, height, width, channels = images.shape
    if num_classes is None:
        rows = next(r for r in range(math.isqrt(count), 0, -1) if count % r == 0)
        cells = images.reshape(rows, -1, height, width, channels)
    else:
        cells = images.reshape(-1, num_classes, height, width, channels).swapaxes(0, 1)
    pixels = cells.swapaxes(1, 2).reshape(cells.shape[0] * height, -1, channels)
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    return image.resize((ENLARGED * image.width, ENLARGED * image.height), Image.Resampling.NEAREST)


def render(card: Card) -> str:
    """The card, with front matter of the hub."""
    model = card.model
    kind, shape = _kind(model)
    data = IMAGE_DATA[model.record["data"]]
    parts = [
        _front_matter(kind),
        f"# {model.name}",
        _fill(
            f"A small {kind} {shape} ({_size(model)} parameters) of 32x32 images, in float16, trained on "
            f"{data.name} for the project adpdm, post-training quantization of diffusion models. It predicts "
            "the noise of a linear schedule of 1000 steps."
        ),
        "![Samples](grid.png)",
        _sampler(card),
        f"## Use\n\n```python\n{_usage(card)}```",
        f"## Training\n\n{_training(card)}",
        f"## Quality\n\n{_quality(card)}",
        "## Data and licence\n\n"
        + _fill(f"Trained on {data.about}. The weights are licensed under Apache-2.0, as the project is."),
        f"## Commands\n\n{_commands(card)}",
    ]
    return "\n\n".join(parts) + "\n"


def _kind(model: ModelFolder) -> tuple[str, str]:
    """What it is asked with, and what it is."""
    if model.captions:
        return "text-to-image", "latent diffusion model"
    kind = "class-conditional" if model.num_classes else "unconditional"
    return kind, "diffusion transformer" if model.part == "transformer" else "DDPM U-Net"


def _front_matter(kind: str) -> str:
    """Licence, library and tags."""
    task = kind if kind == "text-to-image" else f"{kind}-image-generation"
    tags = ["diffusion", task, "adpdm"]
    lines = ["license: apache-2.0", "library_name: diffusers", "tags:", *(f"- {name}" for name in tags)]
    return "\n".join(["---", *lines, "---"])


def _fill(words: str) -> str:
    return textwrap.fill(words, 110, break_long_words=False, break_on_hyphens=False)


def _size(model: ModelFolder) -> str:
    """Class and parameters of the denoiser."""
    denoiser = model.denoiser()
    return f"{type(denoiser).__name__}, {sum(p.numel() for p in denoiser.parameters()) / 1e6:.1f} million"


def _sampler(card: Card) -> str:
    """How the grid was sampled."""
    sampling, classes = card.sampling, card.model.num_classes
    rows = f"a row per class, 0 to {(classes or 0) - 1}"
    if card.model.captions:
        rows = "a row per text: " + ", ".join(f'"{text}"' for text in card.model.captions)
    guided = f", classifier-free guidance of scale {sampling.guidance:g}; {rows}" if classes else ""
    clipped = "" if card.model.captions else "predicted images clipped to [-1, 1], "
    return _fill(
        f"Samples: DDIM, {sampling.steps} steps, eta 0, {clipped}seed {sampling.seed} with a generator per "
        f"image, not selected{guided}."
    )


def _usage(card: Card) -> str:
    """Lines of Python that sample."""
    name, sampling, classes = card.model.name, card.sampling, card.model.num_classes
    if card.model.captions:
        given = f"num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance:g}"
        return (
            "import adpdm  # texts need `pip install transformers`\n\n"
            f'pipe = adpdm.load_pipeline("{name}")\n'
            f"texts = {json.dumps(card.model.captions[:4])}\n"
            f"images = pipe(texts, {given}).images\n"
        )
    if classes is None:
        return (
            "import adpdm\n\n"
            f'pipe = adpdm.load_pipeline("{name}")\n'
            f"images = pipe(batch_size=4, num_inference_steps={sampling.steps}).images\n"
        )
    return (
        "import torch\nfrom diffusers import DDIMScheduler, DiTTransformer2DModel\n"
        "from adpdm.evaluate import GuidedDenoiser, generate\n\n"
        f'transformer = DiTTransformer2DModel.from_pretrained("{name}/transformer").eval()\n'
        f'scheduler = DDIMScheduler.from_pretrained("{name}/scheduler")\n'
        f"guided = GuidedDenoiser(transformer, scale={sampling.guidance:g}, null_class={classes})\n"
        'labels = {"class_labels": torch.tensor([0, 1, 2, 3])}\n'
        f"result = generate(guided, scheduler, 4, {sampling.steps}, conditioning=labels)\n"
        "result.samples  # [4, C, 32, 32] f32 in [-1, 1]\n"
    )


def _trainings(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of what this training went on from, the first one first, and its own."""
    return [*(_trainings(record["before"]) if "before" in record else []), record]


def _precision(record: dict[str, Any]) -> str:
    """Records of before 2026-11-29 do not say it: there was one."""
    return "float32" if record.get("precision") == "float32" else "autocast to bfloat16"


def _training(card: Card) -> str:
    """Images seen, settings and the curve."""
    record, curve = card.model.record, card.curve
    flips = "half of the images mirrored, " if record["flips"] else ""
    device = "CPU" if record["device"] == "cpu" else "GPU"
    label = (
        f"; labels replaced by class {record['num_classes']}, which means none, in a tenth of the images"
        if record["num_classes"]
        else ""
    )
    if card.model.captions:
        label = "; a caption of three templates for each image, the empty one for a tenth of them"
    words = (
        f"{record['images']:,} images seen in {record['steps']:,} steps of {record['batch_size']}: {flips}"
        f"AdamW without weight decay, learning rate {record['learning_rate']:g} after "
        f"{record['warmup_steps']} steps of warm-up with a linear decay at the end, {_precision(record)}, "
        f"moving average of the weights {record['ema_decay']:g} (which is what is saved), seed "
        f"{record['seed']}, on a {device}{label}."
    )
    if record.get("min_snr"):
        words += f" Squared errors have min-SNR weights of gamma {record['min_snr']:g}; the curve has none."
    if "before" in record:
        seen = sum(part["images"] for part in _trainings(record)[:-1])
        words += f" It went on from weights that had seen {seen:,} images (commands below)."
    if "autoencoder" in record:
        seen = sum(part["images"] for part in _trainings(record["autoencoder"]))
        words += f" Its autoencoder has seen {seen:,} images before; its text encoder has random weights."
    if not len(curve):
        return _fill(words + " No loss curve was recorded.")
    words += f" Loss over the last 5 % of the curve: {curve[-max(1, len(curve) // 20) :, 1].mean():.4f}."
    if curve[0, 0] > 2 * (curve[1, 0] - curve[0, 0] if len(curve) > 1 else curve[0, 0]):
        words += f" The curve was recorded from {curve[0, 0]:,.0f} images on."
    return f"{_fill(words)}\n\n![Loss over images seen](loss.svg)"


def _quality(card: Card) -> str:
    """The Frechet distance with its interval, its floor, and what it is not."""
    if card.quality is None:
        return _fill(card.why)
    samples, floor = card.quality.samples, card.quality.floor
    return _fill(
        f"Frechet distance on EfficientNet-Lite0 features: {samples.distance:.1f} (95 % bootstrap interval "
        f"{samples.low:.1f} to {samples.high:.1f}) between {samples.num_images[1]:,} samples and as many "
        f"training images; {floor.distance:.1f} ({floor.low:.1f} to {floor.high:.1f}) between other training "
        f"images and the same ones. Both on the {samples.dimensions} leading principal components of the "
        f"training images' features ({100 * samples.explained_variance:.0f} % of their variance), images "
        "enlarged to 64x64. It is not FID, whose features are another network's, and compares with no "
        "published figure."
    )


def _commands(card: Card) -> str:
    """Data, training and card, as a shell takes them one after the other."""
    data = {"--data": FETCHED[card.model.record["data"]]}
    runs = Runs(data)
    folder = runs.add(card.model.record, card.model.part)
    last = _placed(card.command if folder is None else _card_of(folder, card.command), data)
    lines = [*IMAGE_DATA[card.model.record["data"]].fetch, *runs.lines, last]
    return "```sh\n" + "\n".join(lines) + "\n```"


class Runs:
    """The commands of trainings in the order in which they need each other, each training in its own folder.

    Args:
        places: paths by option that all of them are given.
    """

    def __init__(self, places: dict[str, str]) -> None:
        self.places = places
        self.lines: list[str] = []
        self.done: list[tuple[dict[str, Any], str | None]] = []  # records and folders

    def add(self, record: dict[str, Any], part: str) -> str | None:
        """Append a training of a part behind those that it needs; its folder, where that is known."""
        for known, folder in self.done:
            if known == record:
                return folder
        places = dict(self.places)
        for option, key, made in (("--autoencoder", "autoencoder", "vae"), ("--init", "before", part)):
            if key in record and (folder := self.add(record[key], made)):
                places[option] = f"{folder}/{made}"
        if folder := self._own(_folder_of(record)):
            places["--out"] = folder
        for number, run in enumerate(record["commands"]):
            if run["from_images"]:
                before = "" if number else "; what came before was not recorded"
                self.lines.append(f"# from {run['from_images']:,} images on{before}")
            self.lines.append(_placed(run["command"], places))
        self.done.append((record, folder))
        return folder

    def _own(self, folder: str | None) -> str | None:
        """With a number where an earlier training has that name: in it, this one would continue that one."""
        taken = [known for _, known in self.done]
        if folder is None or folder not in taken:
            return folder
        return next(name for n in itertools.count(2) if (name := f"{folder}-{n}") not in taken)


def _folder_of(record: dict[str, Any]) -> str | None:
    """What --out of a training was, where its last command says it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    given, _ = parser.parse_known_args(shlex.split(record["commands"][-1]["command"]))
    folder: str | None = given.out
    return folder


def _card_of(folder: str, command: str) -> str:
    """The command of a card with another folder: its only word that is no option and no option's value."""
    words = shlex.split(command)
    for i, (before, word) in enumerate(itertools.pairwise(words), 1):
        if i > 1 and not word.startswith("-") and ("=" in before or not before.startswith("-")):
            words[i] = folder
    return shlex.join(words)


def _placed(command: str, places: dict[str, str]) -> str:
    """A command with paths by option: of an absolute path a record has the last part alone."""
    words: list[str] = []
    for word in shlex.split(command):
        option = word.partition("=")[0]
        if words and words[-1] in places:
            words.append(places[words[-1]])
        else:
            words.append(f"{option}={places[option]}" if "=" in word and option in places else word)
    return shlex.join(words)


def _measure(args: argparse.Namespace, samples: Samples) -> tuple[Quality | None, str]:
    """The Frechet distances, or None and the sentence that says why there are none."""
    if args.data is None:
        return None, "The Frechet distance was not measured."
    lite0 = load_lite0()
    if lite0 is None:
        raise ValueError(f"--data: the Frechet distance needs EfficientNet-Lite0; {INSTALL_SENTENCE}")
    real, _ = IMAGE_DATA[samples.model.record["data"]].load(args.data)
    if 2 * args.frechet_images > len(real):
        raise ValueError(
            f"--frechet-images must be at most half of the {len(real)} images of --data, "
            f"got {args.frechet_images}"
        )
    return measure(lite0, samples.images(args.frechet_images), real, args.seed), ""


def write_card(args: argparse.Namespace, command: str) -> None:
    """Sample, measure and write the three files.

    Raises:
        ValueError: the folder or an option does not fit; before anything is sampled.
    """
    model = load_model(args.folder)
    if model.num_classes is None and args.guidance is not None:
        raise ValueError(f"--guidance needs a conditional model; {args.folder} has no classes")
    if model.num_classes is not None and args.images % model.num_classes:
        raise ValueError(f"--images must be a multiple of {model.num_classes} classes, got {args.images}")
    guidance = GUIDANCE if args.guidance is None else args.guidance
    sampling = Sampling(args.steps, args.seed, 1.0 if model.num_classes is None else guidance, args.batch)
    cache = model.folder.with_name(model.name + ".samples")
    samples = Samples(model, sampling, cache, args.device)
    quality, why = _measure(args, samples)
    make_grid(samples.images(args.images), model.num_classes).save(args.folder / "grid.png")
    curve = read_curve(args.folder / CURVE_FILE)
    if len(curve):
        replace_text(args.folder / "loss.svg", draw_curve(curve) + "\n")
    card = Card(model, sampling, curve, quality, why, command)
    replace_text(args.folder / "README.md", render(card))
    print(f"wrote {args.folder / 'README.md'}; the samples are in {samples.folder}")


def main(words: Sequence[str] | None = None) -> None:
    """Run the command; a failure is one sentence on stderr and exit code 1."""
    words = sys.argv[1:] if words is None else words
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="what a training script wrote")
    parser.add_argument("--data", type=Path, help="as for training: measure the Frechet distance to it")
    parser.add_argument("--frechet-images", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=100, help="of the grid")
    parser.add_argument("--steps", type=int, default=50, help="of the DDIM sampler")
    parser.add_argument("--guidance", type=float, help=f"conditional models: scale, default {GUIDANCE}")
    parser.add_argument("--batch", type=int, default=50, help="images that are sampled and kept at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(words)
    args.folder = args.folder.resolve()
    check_device(parser, args.device)
    for name, least in (("frechet_images", MIN_IMAGES), ("images", 1), ("steps", 1), ("batch", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    try:
        write_card(args, command_line(__file__, words))
    except (ValueError, OSError) as error:
        raise SystemExit(f"model_card: {error}") from error
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
