"""Classifier-free guidance: its formula, its one call, calibration under it, and quantized models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

import adpdm
from adpdm import QuantConfig
from adpdm.evaluate import EvaluationConfig, GuidedDenoiser, compare, generate
from adpdm.pipeline import calibration_sampler
from adpdm.testing import CROSS_ATTENTION_DIM, ddim_scheduler, tiny_conditional_unet, tiny_transformer
from adpdm.trajectory import Guidance, Sampler

NULL = 10


class Labelled(nn.Module):
    """Predicts the sample times the label, and counts its images."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.answer, self.batches = answer, []
        self.config = SimpleNamespace(in_channels=1, sample_size=2)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> object:
        assert timestep.shape == class_labels.shape == sample.shape[:1]
        self.batches.append(len(sample))
        output = sample * class_labels.view(-1, 1, 1, 1)
        return {"tensor": output, "tuple": (output,), "object": SimpleNamespace(sample=output)}[self.answer]


@pytest.mark.parametrize("answer", ["tensor", "tuple", "object"])
def test_guidance_extrapolates_from_none_to_the_class(answer: str) -> None:
    denoiser = Labelled(answer)
    sample = torch.ones(2, 1, 2, 2)
    labels, timestep = torch.tensor([1, 4]), torch.tensor([7, 7])
    for scale, wanted in ((1.0, [1, 4]), (0.0, [10, 10]), (3.0, [-17, -8])):  # none + scale (class - none)
        (result,) = GuidedDenoiser(denoiser, scale, NULL)(sample, timestep, labels)
        assert result[:, 0, 0, 0].tolist() == wanted
    assert denoiser.batches == [4, 4, 4]


def test_guidance_extrapolates_from_the_empty_text() -> None:
    def denoiser(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        return (sample * encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1),)

    guided = GuidedDenoiser(denoiser, 3.0, null_text=torch.full((1, 2, 3), 10.0))  # type: ignore[arg-type]
    text = torch.tensor([1.0, 4.0]).view(2, 1, 1).expand(2, 2, 3)
    (result,) = guided(torch.ones(2, 1, 2, 2), torch.tensor([7, 7]), encoder_hidden_states=text)
    assert result[:, 0, 0, 0].tolist() == [-17, -8]


def test_guidance_refuses_what_it_cannot_pair() -> None:
    text, labels = torch.zeros(2, 2, 3), torch.tensor([1, 4])
    sample, timestep = torch.ones(2, 1, 2, 2), torch.tensor([7, 7])
    with pytest.raises(ValueError, match="wanted null_class or null_text, got neither"):
        GuidedDenoiser(Labelled("tuple"), 2.0)
    with pytest.raises(ValueError, match="wanted null_class or null_text, got both"):
        GuidedDenoiser(Labelled("tuple"), 2.0, NULL, text[:1])
    with pytest.raises(ValueError, match="wanted class_labels alone"):
        GuidedDenoiser(Labelled("tuple"), 2.0, NULL)(sample, timestep, encoder_hidden_states=text)
    with pytest.raises(ValueError, match="wanted encoder_hidden_states alone"):
        GuidedDenoiser(Labelled("tuple"), 2.0, null_text=text[:1])(sample, timestep, labels, text)
    guided = GuidedDenoiser(Labelled("tuple"), 2.0, null_text=text[:1])
    with pytest.raises(ValueError, match=r"with \(L, D\) = \(2, 3\), as null_text, got \(2, 1, 3\)"):
        guided(sample, timestep, encoder_hidden_states=text[:, :1])


def test_guided_transformer_samples_and_is_compared_when_quantized() -> None:
    """Calibrated with the class for none as well; the table's row follows the timestep under guidance."""
    torch.manual_seed(0)
    denoiser = tiny_transformer(patch_size=2, num_embeds_ada_norm=NULL)
    for parameter in denoiser.parameters():  # those that start at zero hide the class
        nn.init.normal_(parameter, std=0.2)
    original = diffusers.DiTTransformer2DModel.from_config(denoiser.config).eval()
    original.load_state_dict(denoiser.state_dict())
    scheduler, given = diffusers.DDIMScheduler(), torch.tensor([1, 7, NULL])
    settings = QuantConfig(num_groups=2, num_inference_steps=4, histogram_images=3, grouping="dp")
    adpdm.quantize(denoiser, settings, scheduler=scheduler, conditioning={"class_labels": given})
    config = EvaluationConfig(
        num_images=3, num_inference_steps=4, use_extractors=False, timing_batch_sizes=()
    )
    labels = {"class_labels": torch.tensor([0, 3, 9])}
    pair = [GuidedDenoiser(x, 2.0, NULL) for x in (original, denoiser)]
    result = compare(pair[0], pair[1], scheduler, config, conditioning=labels)
    assert result.psnr_db > 30  # of 8 bits
    plain = generate(original, scheduler, 3, 4, conditioning=labels).samples
    guided = generate(pair[0], scheduler, 3, 4, conditioning=labels).samples
    assert (guided - plain).abs().max() > 0.01


class WithVariance(Labelled):
    """Labelled, with channels of a variance that is the label."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> object:
        labels = class_labels.view(-1, 1, 1, 1).expand_as(sample)
        return (torch.cat([0.1 * sample * labels, 0.1 * labels], 1),)


def test_variance_is_that_of_the_condition() -> None:
    """As in DiTPipeline, which guides the channels of the latents only."""
    sample, labels, timestep = torch.ones(2, 1, 2, 2), torch.tensor([1, 4]), torch.tensor([7, 7])
    (result,) = GuidedDenoiser(WithVariance(True), 3.0, NULL)(sample, timestep, labels)
    assert result[:, 0, 0, 0].tolist() == pytest.approx([-1.7, -0.8])
    assert result[:, 1, 0, 0].tolist() == pytest.approx([0.1, 0.4])
    pairs = WithVariance(True)(sample.repeat(2, 1, 1, 1), timestep, torch.tensor([1, NULL, 4, NULL]))
    combined = Guidance(3.0, {}).combined(pairs[0], 1)  # type: ignore[index]
    assert torch.allclose(combined, result)


def test_trajectories_step_by_the_variance_of_the_condition() -> None:
    labels, scheduler = {"class_labels": torch.tensor([1, 4])}, DDPMScheduler(variance_type="learned_range")
    denoiser = WithVariance(True)
    denoiser.register_parameter("here", nn.Parameter(torch.zeros(1)))
    guided = GuidedDenoiser(denoiser, 3.0, NULL)
    guidance = Guidance(3.0, {"class_labels": torch.tensor([NULL])})
    made = Sampler(denoiser, scheduler, (1, 2, 2), 5, labels, guidance=guidance).run(5, 0, 2)
    wanted = Sampler(guided, scheduler, (1, 2, 2), 5, labels).run(5, 0, 2)
    assert made.noise_preds.shape == (5, 4, 2, 2, 2)
    assert torch.allclose(made.final[0::2], wanted.final, atol=1e-5)


# ---- calibration -------------------------------------------------------------------------------------------


class Sized(Labelled):
    """Labelled, with a parameter to say where it is, and predictions that shrink."""

    def __init__(self) -> None:
        super().__init__("object")
        self.here = nn.Parameter(torch.zeros(1))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> object:
        return super().forward(0.1 * sample, timestep, class_labels)


def sampler(scale: float | None, labels: Tensor) -> Sampler:
    guidance = None if scale is None else Guidance(scale, {"class_labels": torch.tensor([NULL])})
    return Sampler(Sized(), ddim_scheduler(), (1, 2, 2), 5, {"class_labels": labels}, guidance=guidance)


def test_trajectories_are_those_of_the_guided_denoiser_in_pairs() -> None:
    labels = torch.tensor([1, 4])
    made = sampler(3.0, labels).run(seed=5, first=0, batch=2)
    plain = Sampler(
        GuidedDenoiser(Sized(), 3.0, NULL), ddim_scheduler(), (1, 2, 2), 5, {"class_labels": labels}
    )
    wanted = plain.run(seed=5, first=0, batch=2)
    assert made.conditioning["class_labels"].tolist() == [1, NULL, 4, NULL]
    for rows in (made.samples[:, 0::2], made.samples[:, 1::2]):
        assert torch.allclose(rows, wanted.samples, atol=1e-5)
    conditional, none = made.noise_preds[:, 0::2], made.noise_preds[:, 1::2]
    assert torch.allclose(none + 3 * (conditional - none), wanted.noise_preds, atol=1e-5)
    assert torch.allclose(made.final, wanted.final.repeat_interleave(2, 0), atol=1e-5)
    assert torch.allclose(made.sensitivity, wanted.sensitivity)


def test_a_scale_of_one_is_the_condition_alone() -> None:
    labels = torch.tensor([1, 4])
    made, wanted = (sampler(scale, labels).run(seed=5, first=0, batch=2) for scale in (1.0, None))
    assert torch.allclose(made.samples[:, 0::2], wanted.samples, atol=1e-6)
    assert wanted.samples.shape[1] == 2


def trained_like_transformer(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    denoiser = tiny_transformer(patch_size=2, num_embeds_ada_norm=NULL)
    for parameter in denoiser.parameters():  # those that start at zero hide the class
        nn.init.normal_(parameter, std=0.2)
    return denoiser


def test_observed_ranges_are_those_of_both_predictions_under_guidance() -> None:
    """At every step, what the first attention's input is on guided samples, under classes and none."""
    labels, scheduler = torch.tensor([1, 7]), diffusers.DDIMScheduler()
    config = QuantConfig(
        num_groups=2, num_inference_steps=4, histogram_images=2, grouping="dp", guidance_scale=5.0
    )
    given = {"class_labels": labels}
    report = adpdm.quantize(trained_like_transformer(), config, scheduler=scheduler, conditioning=given)
    layer = "transformer_blocks.0.attn1.to_q"
    observed = next(q["observed"] for q in report.trace.quantizers if q["name"] == layer)

    original, seen = trained_like_transformer(), []
    original.get_submodule(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    guidance = Guidance(5.0, {"class_labels": torch.tensor([NULL])})
    shape = (original.config.in_channels, original.config.sample_size, original.config.sample_size)
    Sampler(original, scheduler, shape, 4, given, guidance=guidance).run(config.seed, 0, 2)
    assert [len(x) for x in seen] == [4] * 4
    wanted = [[float(x.min()), float(x.max())] for x in seen]
    assert torch.allclose(torch.tensor(observed), torch.tensor(wanted), atol=1e-5)


def test_search_works_on_pairs() -> None:
    search = adpdm.SearchConfig(num_steps=2, refit_steps=1, batch_size=2)
    few = {"num_groups": 2, "num_inference_steps": 4, "histogram_images": 2, "calibration_images": 2}
    config = QuantConfig(**few, round_size=2, guidance_scale=3.0, search=search)
    labels = {"class_labels": torch.tensor([1, 7])}
    report = adpdm.quantize(
        trained_like_transformer(), config, scheduler=diffusers.DDIMScheduler(), conditioning=labels
    )
    assert report.trace.outcome is not None
    assert len(report.trace.losses) == 3


TEXT = {"encoder_hidden_states": torch.zeros(2, 5, CROSS_ATTENTION_DIM)}
NONE = {"encoder_hidden_states": torch.ones(1, 5, CROSS_ATTENTION_DIM)}


def text_sampler(scale: float, **given: Any) -> Sampler:
    config = QuantConfig(guidance_scale=scale)
    return calibration_sampler(tiny_conditional_unet(), config, scheduler=ddim_scheduler(), **given)


def test_prompts_are_guided_away_from_the_empty_text() -> None:
    def encode_prompt(prompt: list[str], device: str, num_images_per_prompt: int,
                      do_classifier_free_guidance: bool) -> tuple[Tensor, None]:  # fmt: skip
        numbers = torch.tensor([float(len(text)) for text in prompt])
        return numbers.view(-1, 1, 1).expand(-1, 5, CROSS_ATTENTION_DIM), None

    pipe = SimpleNamespace(
        unet=tiny_conditional_unet(), scheduler=ddim_scheduler(), encode_prompt=encode_prompt
    )
    made = calibration_sampler(pipe, QuantConfig(guidance_scale=7.5), prompts=["a", "bcd"])
    assert made.guidance is not None
    assert made.guidance.scale == 7.5
    assert made.guidance.null["encoder_hidden_states"].unique().tolist() == [0]
    assert made.conditioning["encoder_hidden_states"][:, 0, 0].tolist() == [1, 3]
    plain = calibration_sampler(pipe, QuantConfig(), prompts=["a", "bcd"])
    assert plain.guidance is None
    assert plain.conditioning["encoder_hidden_states"][:, 0, 0].tolist() == [0, 1, 3]


def test_what_stands_for_no_condition_can_be_given() -> None:
    made = text_sampler(3.0, conditioning=TEXT, null_conditioning=NONE)
    assert made.guidance is not None
    assert torch.equal(made.guidance.null["encoder_hidden_states"], NONE["encoder_hidden_states"])
    assert made.with_steps(3).guidance == made.guidance


@pytest.mark.parametrize(
    ("scale", "given", "message"),
    [
        (3.0, {"conditioning": TEXT}, r"guidance_scale=3 needs prompts, .*; got \['encoder_hidden_states'\]"),
        (1.0, {"conditioning": TEXT, "null_conditioning": NONE}, "null_conditioning is for guidance"),
        (3.0, {"conditioning": TEXT, "null_conditioning": TEXT}, "must have one row of .*2, 5"),
        (
            3.0,
            {"conditioning": TEXT, "null_conditioning": {"class_labels": torch.zeros(1)}},
            r"must have one row of .*encoder_hidden_states.*got .*class_labels",
        ),
    ],
)
def test_guidance_of_calibration_that_does_not_fit_is_refused(
    scale: float, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        text_sampler(scale, **given)


def test_guidance_scale_is_checked() -> None:
    with pytest.raises(ValueError, match=r"guidance_scale must be in \[0.0, 100.0\], got -1"):
        QuantConfig(guidance_scale=-1.0)
