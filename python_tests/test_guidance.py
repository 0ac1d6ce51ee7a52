"""Classifier-free guidance as a denoiser: its formula, its one call, and quantized models under it."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import Tensor, nn

import adpdm
from adpdm import QuantConfig
from adpdm.evaluate import EvaluationConfig, GuidedDenoiser, compare, generate
from adpdm.testing import tiny_transformer

NULL = 10


class Labelled(nn.Module):
    """Predicts the sample times the label, and counts its images."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple, self.batches = as_tuple, []
        self.config = SimpleNamespace(in_channels=1, sample_size=2)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> object:
        assert timestep.shape == class_labels.shape == sample.shape[:1]
        self.batches.append(len(sample))
        output = sample * class_labels.view(-1, 1, 1, 1)
        return (output,) if self.as_tuple else SimpleNamespace(sample=output)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_guidance_extrapolates_from_none_to_the_class(as_tuple: bool) -> None:
    denoiser = Labelled(as_tuple)
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
        GuidedDenoiser(Labelled(True), 2.0)
    with pytest.raises(ValueError, match="wanted null_class or null_text, got both"):
        GuidedDenoiser(Labelled(True), 2.0, NULL, text[:1])
    with pytest.raises(ValueError, match="wanted class_labels alone"):
        GuidedDenoiser(Labelled(True), 2.0, NULL)(sample, timestep, encoder_hidden_states=text)
    with pytest.raises(ValueError, match="wanted encoder_hidden_states alone"):
        GuidedDenoiser(Labelled(True), 2.0, null_text=text[:1])(sample, timestep, labels, text)
    guided = GuidedDenoiser(Labelled(True), 2.0, null_text=text[:1])
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
