"""`adpdm quantize` and `evaluate` of conditional pipelines: a tiny DiT under classes, and what is refused."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from safetensors.torch import save_file

import adpdm
from adpdm import DenoiserCall, cli, conditioning
from adpdm.conditioning import read_call, read_conditioning, try_call
from adpdm.demo import save_image_grid
from adpdm.evaluate import EvaluationConfig, GuidedDenoiser, SampleSet, compare, generate
from adpdm.evaluate.sampling import to_uint8
from adpdm.testing import (
    CROSS_ATTENTION_DIM,
    ddim_scheduler,
    tiny_conditional_unet,
    tiny_pipeline,
    tiny_transformer,
)

LABELS = torch.tensor([1, 7, 9])
SAMPLING = ["--images", "4", "--steps", "2", "--batch", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional pipeline of latents, float and quantized, and labels for three images."""
    torch.manual_seed(0)
    transformer = tiny_transformer(in_channels=4, out_channels=8, patch_size=2, num_embeds_ada_norm=10)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8, scaling_factor=0.5)
    pipe = DiTPipeline(transformer.eval(), vae, DDIMScheduler())
    path = tmp_path_factory.mktemp("dit")
    pipe.save_pretrained(path / "float")
    settings = {"num_groups": 1, "grouping": "shared", "num_inference_steps": 2, "histogram_images": 1}
    adpdm.quantize(pipe, adpdm.QuantConfig(**settings), conditioning={"class_labels": LABELS})
    pipe.save_pretrained(path / "quantized")
    save_file({"class_labels": LABELS}, path / "labels.safetensors")
    return path


@pytest.fixture(autouse=True)
def no_extractors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their networks take seconds to load."""
    for name in ("load_lite0", "load_lpips"):
        monkeypatch.setattr(f"adpdm.evaluate.comparison.{name}", lambda *_: None)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image pipeline of random weights that reads letters, float and quantized."""
    transformers = pytest.importorskip("transformers", reason="diffusers encodes texts with it")
    from diffusers import StableDiffusionPipeline

    path = tmp_path_factory.mktemp("texts")
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    files = [str(path / name) for name in ("vocab.json", "merges.txt")]
    size = {"hidden_size": CROSS_ATTENTION_DIM, "intermediate_size": 8, "max_position_embeddings": 8}
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(words)}
    ends = {"bos_token_id": len(letters), "eos_token_id": len(letters) + 1}
    torch.manual_seed(0)
    parts = {
        "text_encoder": transformers.CLIPTextModel(
            transformers.CLIPTextConfig(**size, **shape, **ends)
        ).eval(),
        "tokenizer": transformers.CLIPTokenizer(*files, model_max_length=8),
        "vae": AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8, scaling_factor=0.5),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        **dict.fromkeys(("safety_checker", "feature_extractor")),
    }
    pipe = StableDiffusionPipeline(unet=tiny_conditional_unet(), **parts, requires_safety_checker=False)
    pipe.save_pretrained(path / "float")
    settings = {"num_groups": 1, "grouping": "shared", "num_inference_steps": 2, "histogram_images": 1}
    adpdm.quantize(pipe, adpdm.QuantConfig(**settings), prompts=["a cat"])
    pipe.save_pretrained(path / "quantized")
    return path


def embeddings(pipe: Any, texts: list[str]) -> torch.Tensor:
    """[N, 8, D] f32 of texts, by the parts of a pipeline."""
    ids = pipe.tokenizer(texts, padding="max_length", max_length=8, return_tensors="pt").input_ids
    with torch.no_grad():
        rows: torch.Tensor = pipe.text_encoder(ids).last_hidden_state
    return rows


def evaluate(folder: Path, *options: str) -> int:
    return cli.main(
        ["evaluate", str(folder / "float"), str(folder / "quantized"), *SAMPLING, *options, "--json"]
    )


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    return " ".join(captured.err.split())


def test_evaluate_takes_conditioning_in_turn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(folder, "--conditioning", str(folder / "labels.safetensors")) == 0
    got = json.loads(capsys.readouterr().out)
    pipes = [adpdm.load_pipeline(folder / name) for name in ("float", "quantized")]
    vae = pipes[0].vae
    wanted = compare(
        *(pipe.transformer for pipe in pipes),
        pipes[0].scheduler,
        EvaluationConfig(num_images=4, num_inference_steps=2, batch_size=2, timing_batch_sizes=()),
        conditioning={"class_labels": torch.tensor([1, 7, 9, 1])},
        decode=lambda z: torch.cat([vae.decode(row / 0.5).sample for row in z.split(1)]),
    )
    assert got["psnr_per_image_db"] == wanted.psnr_per_image_db.tolist()
    assert 10 < got["psnr_db"] < 100


@pytest.mark.parametrize("scale", [None, 3.0])
def test_evaluate_encodes_texts_in_turn(
    texts: Path, scale: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    guidance = [] if scale is None else ["--guidance-scale", str(scale)]
    assert evaluate(texts, "--prompt", "a cat", "--prompt", "a dog", *guidance) == 0
    got = json.loads(capsys.readouterr().out)
    pipes = [adpdm.load_pipeline(texts / name) for name in ("float", "quantized")]
    pair, vae = [pipe.unet for pipe in pipes], pipes[0].vae
    if scale is not None:
        pair = [GuidedDenoiser(unet, scale, null_text=embeddings(pipes[0], [""])) for unet in pair]
    wanted = compare(
        *pair,
        pipes[0].scheduler,
        EvaluationConfig(num_images=4, num_inference_steps=2, batch_size=2, timing_batch_sizes=()),
        conditioning={"encoder_hidden_states": embeddings(pipes[0], ["a cat", "a dog"] * 2)},
        decode=lambda z: torch.cat([vae.decode(row / 0.5).sample for row in z.split(1)]),
    )
    assert got["psnr_per_image_db"] == wanted.psnr_per_image_db.tolist()
    assert len(set(got["psnr_per_image_db"])) == 4


CALIBRATION = ["--grouping", "shared", "--steps", "2", "--images", "2", "--histogram-images", "1"]


def test_quantize_takes_conditioning_in_turn(folder: Path, tmp_path: Path) -> None:
    command = ["quantize", str(folder / "float"), *CALIBRATION]
    labels = ["--conditioning", str(folder / "labels.safetensors")]
    assert cli.main([*command, *labels, "--out", str(tmp_path / "a")]) == 0
    pipe = adpdm.load_pipeline(folder / "float")
    settings = adpdm.QuantConfig(
        grouping="shared", num_inference_steps=2, calibration_images=2, histogram_images=1
    )
    adpdm.quantize(pipe, settings, conditioning={"class_labels": LABELS})
    wanted, got = pipe.transformer.state_dict(), adpdm.load_pipeline(tmp_path / "a").transformer.state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_quantize_without_the_classes_of_a_denoiser_says_what_is_missing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quantize", str(folder / "float"), *CALIBRATION, "--out", str(tmp_path / "b")]) == 1
    assert "class_labels" in error_of(capsys)
    assert not (tmp_path / "b").exists()


def test_evaluate_guides_away_from_no_class(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["--conditioning", str(folder / "labels.safetensors")]
    results = []
    for scale in ("1", "4"):
        assert evaluate(folder, *labels, "--guidance-scale", scale) == 0
        results.append(json.loads(capsys.readouterr().out)["psnr_db"])
    assert evaluate(folder, *labels) == 0
    plain = json.loads(capsys.readouterr().out)["psnr_db"]
    assert results[0] == pytest.approx(plain, abs=0.5)  # twice the batch may round otherwise
    assert abs(results[1] - plain) > 0.5


def decoded(folder: Path, count: int, scale: float) -> torch.Tensor:
    """The first samples of seed 0 by the pipeline's own parts, [N, C, H, W] f32 in [-1, 1]."""
    pipe = adpdm.load_pipeline(folder)
    guided = GuidedDenoiser(pipe.unet, scale, null_text=embeddings(pipe, [""]))
    text = {"encoder_hidden_states": embeddings(pipe, ["a cat", "a dog"] * count)[:count]}
    latents = generate(guided, pipe.scheduler, count, 2, 0, 2, conditioning=text).samples
    assert latents.abs().max() > 2  # which an image would not hold
    with torch.no_grad():
        images: torch.Tensor = torch.cat([pipe.vae.decode(z / 0.5).sample for z in latents.split(1)])
    return images.clamp(-1, 1)


GUIDED = ("--prompt", "a cat", "--prompt", "a dog", "--guidance-scale", "3")


def test_sample_decodes_guided_latents_of_texts(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    assert cli.main(["sample", str(texts / "quantized"), *SAMPLING, *GUIDED, "--out", str(out)]) == 0
    save_image_grid(decoded(texts / "quantized", 4, 3.0), tmp_path / "wanted.png")
    assert out.read_bytes() == (tmp_path / "wanted.png").read_bytes()


def test_dataset_decodes_guided_latents_and_knows_its_guidance(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["dataset", str(texts / "quantized"), "--out", str(tmp_path / "set"), *SAMPLING]
    assert cli.main([*command, *GUIDED]) == 0
    wanted = to_uint8(decoded(texts / "quantized", 4, 3.0))
    assert np.array_equal(SampleSet.open(tmp_path / "set").images(), wanted)
    capsys.readouterr()
    assert cli.main([*command, *GUIDED[:-1], "4"]) == 1
    assert "holds samples of another model, decoder" in error_of(capsys)


def test_guidance_without_a_condition_is_refused(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(texts, "--guidance-scale", "3") == 1
    assert "got nothing for UNet2DConditionModel" in error_of(capsys)


def test_texts_given_twice_or_without_an_encoder_are_refused(
    texts: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"encoder_hidden_states": torch.zeros(1, 8, CROSS_ATTENTION_DIM)}, tmp_path / "file")
    assert evaluate(texts, "--prompt", "a cat", "--conditioning", str(tmp_path / "file")) == 1
    assert "must not both give encoder_hidden_states" in error_of(capsys)
    assert evaluate(folder, "--prompt", "a cat") == 1
    assert "--prompt: prompts need a pipeline with encode_prompt, got DiTPipeline" in error_of(capsys)


def test_report_of_a_conditional_pipeline(texts: Path, tmp_path: Path) -> None:
    """Layers are measured under the condition, and corrected predictions are drawn."""
    config = adpdm.QuantConfig(num_groups=1, grouping="shared", num_inference_steps=2, histogram_images=1)
    pipe = adpdm.load_pipeline(texts / "float")
    report = adpdm.quantize(
        pipe.unet,
        config,
        scheduler=pipe.scheduler,
        conditioning={"encoder_hidden_states": embeddings(pipe, ["a cat"])},
    )
    pipe.save_pretrained(tmp_path / "quantized")
    stored = report.to_dict()
    stored["trace"]["correction"] = {"weights": [[0.25, 0.75], [1.0, 0.0]], "energy_left": [0.125, 1.0]}
    (tmp_path / "quantized" / cli.REPORT_NAME).write_text(json.dumps(stored))
    out = tmp_path / "report.html"
    command = ["report", str(texts / "float"), str(tmp_path / "quantized"), *SAMPLING, *GUIDED]
    assert cli.main([*command, "--out", str(out)]) == 0
    page = out.read_text()
    assert "attn2.to_q" in page
    assert "0.25 prediction +0.75 sample" in page
    assert "1.00 prediction +0.00 sample" in page  # in the chart; the table has corrected steps alone
    assert page.count("0.25 prediction +0.75 sample") == page.count("1.00 prediction +0.00 sample") + 1


def test_missing_conditioning_is_said_before_work_starts(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "compare", lambda *_, **__: pytest.fail("work started"))
    assert evaluate(folder) == 1
    error = error_of(capsys)
    assert "DiTTransformer2DModel must work on samples (4, 8, 8) with nothing else, got" in error
    assert "its arguments are ['class_labels', 'cross_attention_kwargs'], which are given by" in error


BAD_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"labels": LABELS}, r"names must be arguments of DiT.*'class_labels'.*; got \['labels'\]"),
    "sample": ({"hidden_states": LABELS}, r"got \['hidden_states'\]"),
    "ragged": (
        {"class_labels": LABELS, "cross_attention_kwargs.x": LABELS[:2].clone()},
        "same number of rows",
    ),
    "scalar": ({"class_labels": LABELS[0]}, r"got \{'class_labels': 0\}"),
    "empty": ({"class_labels": LABELS[:0]}, r"same number of rows, one per image"),
    "none": ({}, "must hold tensors, got none"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_conditioning_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, case: str) -> None:
    tensors, sentence = BAD_TENSORS[case]
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=sentence):
        read_conditioning(path, adpdm.load_pipeline(folder / "float").transformer)


def test_files_that_are_no_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    denoiser = tiny_conditional_unet()
    (tmp_path / "text").write_text("class_labels: 1")
    with pytest.raises(ValueError, match=r"--conditioning .*text must be a safetensors file"):
        read_conditioning(tmp_path / "text", denoiser)
    with pytest.raises(ValueError, match=r"--conditioning .*absent must be a safetensors file, found none"):
        read_conditioning(tmp_path / "absent", denoiser)
    with pytest.raises(ValueError, match=r"--constants .*text must be a safetensors file"):
        read_call(None, tmp_path / "text", denoiser)


def test_dots_make_dicts_and_floats_the_dtype_of_the_denoiser(tmp_path: Path) -> None:
    denoiser = tiny_conditional_unet()
    text = torch.randn(2, 5, CROSS_ATTENTION_DIM).half()
    tensors = {"encoder_hidden_states": text, "added_cond_kwargs.time_ids": torch.arange(2)}
    save_file(tensors, tmp_path / "file")
    given = read_conditioning(tmp_path / "file", denoiser)
    assert torch.equal(given["encoder_hidden_states"], text.float())
    assert given["added_cond_kwargs"]["time_ids"].tolist() == [0, 1]


@pytest.mark.parametrize("order", [1, -1])
def test_names_that_are_a_tensor_and_a_dict_are_refused(
    tmp_path: Path, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["added_cond_kwargs", "added_cond_kwargs.time_ids"][::order]
    monkeypatch.setattr(conditioning, "load_file", lambda _: {name: torch.ones(1) for name in names})
    (tmp_path / "file").touch()
    sentence = r"{} .*file: a name must be a tensor or a dict of them, got \['added_cond_kwargs'\] as both"
    with pytest.raises(ValueError, match=sentence.format("--conditioning")):
        read_conditioning(tmp_path / "file", tiny_conditional_unet())
    with pytest.raises(ValueError, match=sentence.format("--constants")):
        read_call(None, tmp_path / "file", tiny_conditional_unet())


def test_call_settings_are_read(tmp_path: Path) -> None:
    denoiser = tiny_conditional_unet()
    settings = {"sample_shape": [4, 16, 16], "timestep_factor": 0.5, "schedule": {"mu": 0.8}}
    (tmp_path / "call").write_text(json.dumps({**settings, "constants": {"timestep_cond": None}}))
    save_file({"added_cond_kwargs.ids": LABELS}, tmp_path / "constants")
    call = read_call(tmp_path / "call", tmp_path / "constants", denoiser)
    assert call is not None
    assert (call.sample_shape, call.timestep_factor, call.schedule) == ((4, 16, 16), 0.5, {"mu": 0.8})
    assert call.constants["timestep_cond"] is None
    assert torch.equal(call.constants["added_cond_kwargs"]["ids"], LABELS)
    assert read_call(None, None, denoiser) is None


def test_constants_in_both_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "call").write_text(json.dumps({"constants": {"added_cond_kwargs": {"scale": 2}}}))
    save_file({"added_cond_kwargs.ids": LABELS}, tmp_path / "constants")
    with pytest.raises(
        ValueError, match=r"must come from one of them, got \['added_cond_kwargs'\] from both"
    ):
        read_call(tmp_path / "call", tmp_path / "constants", tiny_conditional_unet())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ("[1]", "must hold an object with keys of .* got list"),
        ("{", "must be a JSON file"),
        ('{"shape": [4]}', r"got \['shape'\]"),
        ('{"sample_shape": [4, 0]}', r"--call .*: DenoiserCall: sample_shape must be positive integers"),
        ('{"timestep_factor": true}', "timestep_factor must be a positive number, got True"),
        (
            '{"timestep_factor": Infinity}',
            "--call .*: DenoiserCall: timestep_factor must be a positive number",
        ),
        ('{"schedule": 3}', "schedule must be a dict, got 3"),
        ('{"constants": {"ids": 1}}', r"names must be arguments of UNet2DConditionModel.* got \['ids'\]"),
    ],
)
def test_call_settings_that_do_not_fit_are_refused(tmp_path: Path, values: str, sentence: str) -> None:
    (tmp_path / "call").write_text(values)
    with pytest.raises(ValueError, match=sentence):
        read_call(tmp_path / "call", None, tiny_conditional_unet())


def test_latents_without_a_decoder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny_pipeline(in_channels=4, out_channels=4)
    pipe.save_pretrained(tmp_path)
    assert cli.main(["evaluate", str(tmp_path), str(tmp_path), *SAMPLING]) == 1
    assert "samples of shape (4, 8, 8) must be images with (1, 3) channels" in error_of(capsys)


def test_trial_says_what_a_scheduler_lacks() -> None:
    call = DenoiserCall(schedule={"mu": 0.8})
    with pytest.raises(ValueError, match="must work on samples .* got TypeError: .*mu"):
        try_call(tiny_conditional_unet(), ddim_scheduler(), 2, {}, call)


def test_trial_lets_a_lack_of_memory_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("wanted 1 GiB")

    unet = tiny_conditional_unet()
    monkeypatch.setattr(unet, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError, match="wanted 1 GiB"):
        try_call(unet, ddim_scheduler(), 2, {}, None)
