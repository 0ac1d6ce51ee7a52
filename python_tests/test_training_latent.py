"""Training in latents: captions and their encoder, the autoencoder, the pipeline that comes out."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

import adpdm
from adpdm.evaluate import generate, image_seeds
from adpdm.model_folder import ModelFolder

pytest.importorskip("transformers", reason="it encodes captions")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import captions  # noqa: E402
import model_card  # noqa: E402
import train_autoencoder  # noqa: E402
import train_latent  # noqa: E402
import training  # noqa: E402
import winograd  # noqa: E402

BATCH = 4


def tiny_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32,
        latent_channels=8,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
    )


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=captions.HIDDEN_SIZE,
        attention_head_dim=2,
        norm_num_groups=4,
    )


@pytest.fixture(autouse=True)
def small_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models and batches, in both scripts."""
    small = partial(training.Recipe)

    def recipe(make: Any, *args: Any, **settings: Any) -> training.Recipe:
        return small(make, *args, **{**settings, "batch_size": BATCH})

    for script in (train_autoencoder, train_latent):
        monkeypatch.setattr(script, "Recipe", recipe)
    monkeypatch.setattr(train_autoencoder, "make_autoencoder", tiny_autoencoder)
    monkeypatch.setattr(train_latent, "make_unet", tiny_unet)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of noise, darker from left to right, in the file that fetch_cifar10.py writes."""
    path = tmp_path_factory.mktemp("data") / "cifar10.npz"
    noise = np.random.default_rng(0).integers(0, 128, (12, 32, 32, 3))
    pixels = (noise + np.linspace(127, 0, 32)[None, None, :, None]).astype(np.uint8)
    np.savez(path, x_train=pixels, y_train=np.arange(12, dtype=np.uint8) % 10)
    return path


def run(script: ModuleType, data: Path, out: Path, steps: int, *options: str | Path) -> Path:
    words = ["--data", data, "--out", out, "--images", steps * BATCH, "--decay-images", 0, *options]
    script.main([str(word) for word in words])
    return out


def weights(folder: Path) -> bytes:
    return (folder / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    """A folder with random weights and a scaling factor."""
    torch.manual_seed(0)
    vae = tiny_autoencoder()
    vae.register_to_config(scaling_factor=2.0)
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_every_word_of_the_captions_is_one_token(tmp_path: Path) -> None:
    tokenizer = captions.make_tokenizer()
    for text in captions.all_captions():
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2, text  # begin and end
        assert tokenizer.unk_token_id not in ids[:-1]
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("a photo of an automobile").input_ids == tokenizer("a photo of an automobile").input_ids
    assert len(tokenizer("zebra").input_ids) == 5 + 2  # a word it does not know, letter by letter


def test_captions_are_told_apart_and_their_encoder_depends_on_the_seed_alone() -> None:
    tokenizer = captions.make_tokenizer()
    texts = captions.all_captions()
    assert len(texts) == len(set(texts)) == 31
    assert "a photo of an airplane" in texts
    first, again, other = (
        captions.encode(tokenizer, captions.make_text_encoder(tokenizer, seed), texts) for seed in (0, 0, 1)
    )
    assert first.shape == (31, captions.MAX_TOKENS, captions.HIDDEN_SIZE)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)
    distances = torch.cdist(first.flatten(1), first.flatten(1)).fill_diagonal_(torch.inf)
    assert distances.min() > 0.1 * distances[distances.isfinite()].mean()


def test_merges_take_the_most_frequent_pair_first() -> None:
    merges = [("a", "b</w>"), ("a", "d</w>"), ("c", "ab</w>"), ("c", "ad</w>")]
    assert captions.merges_of(["ab", "cab", "cad"]) == merges  # equally frequent ones in alphabetical order


def test_autoencoder_resumes_to_the_same_files_and_scales_latents(data: Path, tmp_path: Path) -> None:
    whole = run(train_autoencoder, data, tmp_path / "whole", 6)
    for steps in (1, 4, 6):
        parts = run(train_autoencoder, data, tmp_path / "parts", steps)
    assert weights(parts / "vae") == weights(whole / "vae")
    assert not (whole / "scheduler").exists()  # it is no denoiser
    vae = AutoencoderKL.from_pretrained(whole / "vae").float()
    images, _ = train_autoencoder.CIFAR10.load(data)
    with torch.no_grad():
        latents = vae.encode(images.float() / 127.5 - 1).latent_dist.mean
    assert float(latents.std()) * vae.config.scaling_factor == pytest.approx(1, abs=0.01)  # rounded weights


def test_autoencoder_learns(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CURVE_STEPS", 10)
    curve = run(train_autoencoder, data, tmp_path, 40) / "loss.csv"
    losses = [float(row.split(",")[1]) for row in curve.read_text().splitlines()[1:]]
    assert losses[-1] < 0.95 * losses[0]


def test_autoencoder_is_not_compiled(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(train_autoencoder, data, tmp_path / "out", 1, "--compile")
    assert "--compile" in capsys.readouterr().err


def test_latents_are_those_of_images_and_their_mirror_images(
    data: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kept in a file, and made again for another precision, scale or autoencoder."""
    cache = tmp_path / "out" / "latents.safetensors"
    latents, labels = train_latent.load_latents(data, autoencoder, cache, "bfloat16")
    images, wanted = train_latent.CIFAR10.load(data)
    assert labels.tolist() == [*wanted.tolist(), *wanted.tolist()]
    vae = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        exact = 2 * vae.encode(torch.cat([images, images.flip(3)]).float() / 127.5 - 1).latent_dist.mean
    assert latents.shape == (24, 8, 8, 8)
    assert (latents - exact).abs().max() < 0.02 * exact.abs().max()  # encoded in bfloat16
    before = cache.stat().st_mtime_ns
    assert torch.equal(train_latent.load_latents(data, autoencoder, cache, "bfloat16")[0], latents)
    assert cache.stat().st_mtime_ns == before
    closer = train_latent.load_latents(data, autoencoder, cache, "float32")[0]
    assert (closer - exact).abs().max() < 0.1 * (latents - exact).abs().max()
    vae.register_to_config(scaling_factor=4.0)  # the weights stay
    vae.save_pretrained(autoencoder)
    doubled = train_latent.load_latents(data, autoencoder, cache, "float32")[0]
    assert (doubled - 2 * closer).abs().max() <= 2**-23  # float16 near 0 has steps of 2**-24
    vae.encoder.conv_in.bias.data += 1
    vae.save_pretrained(autoencoder)
    assert not torch.equal(train_latent.load_latents(data, autoencoder, cache, "bfloat16")[0], latents)


def test_pipeline_resumes_to_the_same_bytes_and_samples_texts(
    data: Path, autoencoder: Path, tmp_path: Path
) -> None:
    options = ("--autoencoder", autoencoder)
    whole = run(train_latent, data, tmp_path / "whole", 4, *options)
    for steps in (1, 4):
        parts = run(train_latent, data, tmp_path / "parts", steps, *options)
    assert weights(parts / "unet") == weights(whole / "unet")
    record = json.loads((whole / "training.json").read_text())
    assert (record["data"], record["flips"]) == ("CIFAR-10", True)  # by the mirror images among the latents
    assert not any(str(tmp_path.parent) in file.read_text() for file in whole.rglob("*.json"))
    pipe = adpdm.load_pipeline(whole)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.clip_sample is False  # latents are not images
    images = [
        pipe(text, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
        for text in ("a cat", "a dog")
    ]
    assert images[0].shape == (1, 32, 32, 3)
    assert not np.array_equal(*images)
    text = pipe.encode_prompt(["a photo of a frog"], "cpu", 1, False)[0]
    tokenizer = captions.make_tokenizer()
    trained = captions.encode(tokenizer, captions.make_text_encoder(tokenizer, 0), ["a photo of a frog"])
    assert torch.allclose(text.float(), trained, atol=0.01)  # weights in float16


def test_training_goes_on_from_a_shipped_pipeline(trained: Path, data: Path, tmp_path: Path) -> None:
    """Its weights, its autoencoder and what is known of both; weighted errors; also when it is resumed."""
    options = ("--init", trained / "unet", "--autoencoder", trained / "vae", "--min-snr", "5", "--seed", "1")
    out = run(train_latent, data, tmp_path / "out", 1, *options)
    record, before = (json.loads((folder / "training.json").read_text()) for folder in (out, trained))
    assert record["before"] == before
    assert record["autoencoder"] == before["autoencoder"]
    assert (record["images"], record["min_snr"]) == (BATCH, 5)
    assert weights(out / "vae") == weights(trained / "vae")
    texts = [folder / "text_encoder" / "model.safetensors" for folder in (out, trained)]
    assert texts[0].read_bytes() == texts[1].read_bytes()
    got, start = (
        UNet2DConditionModel.from_pretrained(folder / "unet").state_dict() for folder in (out, trained)
    )
    # the first step of AdamW moves a weight by at most the learning rate of the first step of warm-up
    assert all((got[name] - start[name]).abs().max() < 1e-3 for name in got)
    assert any(not torch.equal(got[name], start[name]) for name in got)
    run(train_latent, data, out, 2, *options[2:])
    assert json.loads((out / "training.json").read_text())["before"] == before
    model_card.main([str(out), "--images", "10", "--steps", "2", "--batch", "5"])
    words = " ".join((out / "README.md").read_text().split())
    assert f"It went on from weights that had seen {before['images']:,} images" in words
    assert "min-SNR weights of gamma 5" in words
    assert words.count("python examples/train_latent.py") == 3


def test_first_save_that_is_interrupted_goes_on(
    data: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as there is a state, there is what resuming reads beside it; that is written once."""

    def interrupt(self: Any) -> None:
        raise KeyboardInterrupt

    options = ("--autoencoder", autoencoder)
    whole = run(train_latent, data, tmp_path / "whole", 2, *options)
    with monkeypatch.context() as patch:
        patch.setattr(train_latent.LatentTrainer, "_save_model", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(train_latent, data, tmp_path / "parts", 1, *options)
    parts = tmp_path / "parts"
    assert (parts / "state.pt").exists()
    constant = [file for name in ("vae", "text_encoder", "tokenizer") for file in (parts / name).iterdir()]
    times = [file.stat().st_mtime_ns for file in constant]
    run(train_latent, data, parts, 2, *options)
    assert weights(parts / "unet") == weights(whole / "unet")
    assert {file.name for file in parts.iterdir()} == {file.name for file in whole.iterdir()}
    assert [file.stat().st_mtime_ns for file in constant] == times


def test_resumed_training_keeps_seed_and_gamma(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    """As its record tells them; one of before there was a gamma had none."""
    options = ("--autoencoder", autoencoder, "--precision", "float32")
    whole = run(train_latent, data, tmp_path / "whole", 2, *options, "--min-snr", "0.01", "--seed", "3")
    parts = run(train_latent, data, tmp_path / "parts", 1, *options, "--min-snr", "0.01", "--seed", "3")
    with pytest.raises(
        SystemExit, match="parts was trained with --min-snr 0.01, got --min-snr 0.02; continue"
    ):
        run(train_latent, data, parts, 2, *options, "--min-snr", "0.02")
    run(train_latent, data, parts, 2, *options)
    assert weights(parts / "unet") == weights(whole / "unet")
    record = json.loads((parts / "training.json").read_text())
    assert (record["seed"], record["min_snr"]) == (3, 0.01)
    run(train_latent, data, parts, 2, *options, "--min-snr", "0.01")
    del record["min_snr"], record["precision"]
    (parts / "training.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="parts was trained without --min-snr, got --min-snr 0.01; continue"):
        run(train_latent, data, parts, 3, *options, "--min-snr", "0.01")
    run(train_latent, data, parts, 3, *options)
    assert json.loads((parts / "training.json").read_text())["min_snr"] is None


def test_autoencoder_goes_on_from_that_of_a_pipeline(trained: Path, data: Path, tmp_path: Path) -> None:
    """Whose scaling factor is its own; its record is not the denoiser's."""
    out = run(train_autoencoder, data, tmp_path / "out", 1, "--init", trained / "vae")
    records = [json.loads((folder / "training.json").read_text()) for folder in (out, trained)]
    assert records[0]["before"] == records[1]["autoencoder"]


def test_autoencoder_keeps_no_images_but_its_probe(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_autoencoder, "PROBE_IMAGES", 4)
    words = ["--data", str(data), "--out", str(tmp_path / "out")]
    args = training.parse(training.argument_parser("", train_autoencoder.CIFAR10), "x.py", words)
    recipe = training.Recipe(tiny_autoencoder, "vae", 1e-3, data=train_autoencoder.CIFAR10)
    probe = train_autoencoder.AutoencoderTrainer(recipe, args).probe
    assert probe.untyped_storage().nbytes() == probe.nbytes == 4 * 3 * 32 * 32


def test_what_safetensors_writes_may_be_read_by_whom_the_umask_says(
    data: Path, autoencoder: Path, tmp_path: Path
) -> None:
    before = os.umask(0o022)
    try:
        out = run(train_latent, data, tmp_path / "out", 1, "--autoencoder", autoencoder)
    finally:
        os.umask(before)
    written = sorted(out.rglob("*.safetensors"))
    assert [file.parent.name for file in written] == ["out", "text_encoder", "unet", "vae"]
    assert [file.stat().st_mode & 0o777 for file in written] == [0o644] * 4


def test_gamma_that_is_no_weight_is_refused(
    data: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(train_latent, data, tmp_path / "out", 1, "--autoencoder", autoencoder, "--min-snr", "0")
    assert "--min-snr must be greater than 0, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_winograd_computes_the_same_gradients(
    data: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first step of a training, up to rounding; what is saved knows nothing of it."""
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 8)
    gradients: list[list[torch.Tensor]] = []
    clip = torch.nn.utils.clip_grad_norm_

    def keep(parameters: Any, norm: float) -> torch.Tensor:
        parameters = list(parameters)
        gradients.append([parameter.grad.clone() for parameter in parameters])
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    calls = []
    apply = winograd.Winograd.apply
    monkeypatch.setattr(winograd.Winograd, "apply", lambda *args: calls.append(args) or apply(*args))
    options = ("--autoencoder", autoencoder, "--precision", "float32")
    run(train_latent, data, tmp_path / "direct", 1, *options)
    assert not calls
    out = run(train_latent, data, tmp_path / "out", 1, *options, "--winograd")
    assert calls
    for got, wanted in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    model = UNet2DConditionModel.from_pretrained(out / "unet")
    assert not any(isinstance(layer, winograd.WinogradConv2d) for layer in model.modules())


def test_winograd_is_for_float32(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    options = ("--autoencoder", autoencoder, "--precision", "bfloat16", "--winograd")
    with pytest.raises(SystemExit, match="CPU in float32, this training is on cpu in bfloat16"):
        run(train_latent, data, tmp_path / "out", 1, *options)
    assert not (tmp_path / "out" / "state.pt").exists()


def test_texts_and_latents_stay_those_of_the_beginning(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    out = run(train_latent, data, tmp_path / "out", 1, "--autoencoder", autoencoder)
    texts = (out / "text_encoder" / "model.safetensors").read_bytes()
    run(train_latent, data, out, 2, "--autoencoder", autoencoder, "--seed", "7")
    assert (out / "text_encoder" / "model.safetensors").read_bytes() == texts
    latents = (out / "latents.safetensors").read_bytes()
    torch.manual_seed(5)
    other = tmp_path / "other"
    tiny_autoencoder().save_pretrained(other)
    with pytest.raises(SystemExit, match="was trained in the latents of another autoencoder than"):
        run(train_latent, data, out, 3, "--autoencoder", other)
    assert (out / "latents.safetensors").read_bytes() == latents  # no image was encoded by the other one


def test_images_are_conditioned_on_captions_of_their_class(
    data: Path, autoencoder: Path, tmp_path: Path
) -> None:
    parser = training.argument_parser("", train_latent.CIFAR10)
    parser.add_argument("--autoencoder", type=Path)
    words = ["--data", str(data), "--out", str(tmp_path / "out"), "--autoencoder", str(autoencoder)]
    recipe = training.Recipe(tiny_unet, "unet", 1e-3, num_classes=10)
    trainer = train_latent.LatentTrainer(recipe, training.parse(parser, "x.py", words))
    labels = torch.arange(10).repeat(100)
    given = trainer._condition(labels)["encoder_hidden_states"]
    rows = torch.cdist(given.flatten(1), trainer.embeddings.flatten(1)).argmin(1)
    dropped = rows == len(trainer.embeddings) - 1
    assert 60 < dropped.sum() < 140  # a tenth, 4 standard deviations
    assert torch.equal(rows[~dropped] % 10, labels[~dropped])
    templates = (rows[~dropped] // 10).bincount()
    assert len(templates) == 3
    assert templates.min() > 200


def test_recipes_are_as_their_scripts_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in make().parameters()) / 1e6
            for make in (train_autoencoder.make_autoencoder, train_latent.make_unet)
        ]
    assert [round(size, 1) for size in sizes] == [1.0, 12.5]


@pytest.fixture
def trained(data: Path, autoencoder: Path, tmp_path: Path) -> Path:
    """A pipeline as it is shipped, its autoencoder with a record of its training."""
    command = {"from_images": 0, "command": "python examples/train_autoencoder.py"}
    record = json.dumps({"images": 4096, "commands": [command]})
    (autoencoder.parent / "training.json").write_text(record)
    return run(train_latent, data, tmp_path / "tiny", 2, "--autoencoder", autoencoder)


def test_model_folder_samples_the_captions_as_the_pipeline_does(trained: Path) -> None:
    model = ModelFolder.open(trained)
    assert model.num_classes == 10
    given = model.conditioning(12)["encoder_hidden_states"]
    assert torch.equal(given[0], given[10])
    assert len(model.conditioning(with_none=True)["encoder_hidden_states"]) == 11
    guided = model.guided(model.denoiser(), 3.0)
    texts = {"encoder_hidden_states": given[:2]}
    latents = generate(guided, model.scheduler(), 2, 2, conditioning=texts).samples
    decode = model.decoder(guided)
    assert decode is not None
    with torch.no_grad():
        images = decode(latents)
    pipe = adpdm.load_pipeline(trained)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        model.captions[:2],
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(s) for s in image_seeds(0, 2)],
        output_type="np",
    ).images
    assert np.abs(made.transpose(0, 3, 1, 2) - (images / 2 + 0.5).clamp(0, 1).numpy()).max() < 1e-3


def test_quantizing_a_model_folder_under_guidance(trained: Path) -> None:
    model = ModelFolder.open(trained)
    denoiser = model.denoiser()
    config = adpdm.QuantConfig(
        num_groups=1, grouping="shared", num_inference_steps=2, histogram_images=2, guidance_scale=3.0
    )
    report = adpdm.quantize(
        denoiser,
        config,
        scheduler=model.scheduler(),
        conditioning=model.conditioning(),
        null_conditioning=model.null_conditioning,
    )
    assert report.coverage.macs > 0.5


def test_card_tells_of_texts_and_of_the_autoencoder(trained: Path) -> None:
    options = ["--images", "10", "--steps", "2", "--guidance", "3", "--batch", "5"]
    model_card.main([str(trained), *options])
    words = " ".join((trained / "README.md").read_text().split())
    for sentence in (
        "- text-to-image - adpdm",
        "A small text-to-image latent diffusion model (UNet2DConditionModel, 0.0 million parameters)",
        'scale 3; a row per text: "a photo of an airplane", "a photo of an automobile"',
        'texts = ["a photo of an airplane"',
        "images = pipe(texts, num_inference_steps=2, guidance_scale=3).images",
        "Its autoencoder has seen 4,096 images before; its text encoder has random weights.",
        "python examples/train_autoencoder.py python examples/train_latent.py --data",
    ):
        assert sentence in words
    assert "clipped" not in words
    with Image.open(trained / "grid.png") as grid:
        assert grid.size == (2 * 32, 2 * 32 * 10)  # a row per text, enlarged twofold
