"""Metrics against hand-computed values; sampling and comparison of small synthetic denoisers."""

from __future__ import annotations

import json
import math
import types

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from adpdm import DenoiserCall, evaluate
from adpdm.evaluate import extractors
from adpdm.evaluate.sampling import sample_shape, to_uint8
from adpdm.evaluate.words import evaluation_rows

SHAPE = (1, 4, 4)


class Denoiser:
    """eps = gain * sample + bias * timestep / 1000, elementwise: exact in any batch size."""

    def __init__(self, gain: float, bias: float = 0.0) -> None:
        self.gain, self.bias, self.batch_sizes, self.timesteps = gain, bias, [], []

    def __call__(
        self, sample: torch.Tensor, timestep: torch.Tensor, **conditioning: torch.Tensor
    ) -> tuple[torch.Tensor]:
        self.batch_sizes.append(len(sample))
        self.timesteps.append(float(timestep[0]))
        shift = conditioning["shift"].view(-1, 1, 1, 1) if conditioning else 0.0
        return (self.gain * sample + self.bias * timestep.view(-1, 1, 1, 1) / 1000 + shift,)


def small_config(**changes: object) -> evaluate.EvaluationConfig:
    values = {
        "num_images": 5,
        "num_inference_steps": 4,
        "batch_size": 2,
        "use_extractors": False,
        "timing_batch_sizes": (),
    }
    return evaluate.EvaluationConfig(**{**values, **changes})


def test_psnr_of_known_error():
    reference, test = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 0.2)
    assert evaluate.psnr(reference, test) == pytest.approx(20.0, abs=1e-6)  # 10 log10(4 / 0.04)
    test[1] = 0.02
    assert evaluate.psnr_per_image(reference, test) == pytest.approx([20.0, 40.0], abs=1e-6)
    assert evaluate.psnr(reference, test) == pytest.approx(
        10 * math.log10(4 / ((0.04 + 0.0004) / 2)), abs=1e-6
    )


def test_sqnr_of_known_error():
    reference = torch.tensor([3.0, 4.0])
    assert evaluate.sqnr(reference, torch.tensor([3.0, 3.5])) == pytest.approx(20.0)  # 25 / 0.25
    rows = torch.stack([reference, reference * 2])
    assert evaluate.sqnr_per_image(rows, rows * 0.9) == pytest.approx([20.0, 20.0], abs=1e-5)
    assert evaluate.pooled_sqnr(np.array([100.0]), np.array([1.0])) == pytest.approx([20.0])


def test_equal_inputs_are_infinite_and_no_signal_is_minus_infinite():
    x = torch.ones(2, 3)
    assert evaluate.psnr(x, x) == math.inf
    assert evaluate.sqnr(x, x) == math.inf
    assert evaluate.sqnr(torch.zeros(3), torch.ones(3)) == -math.inf


def test_psnr_rejects_shapes():
    with pytest.raises(ValueError, match=r"psnr: test must have the shape \(2, 3\), got \(3, 2\)"):
        evaluate.psnr(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="sqnr: wanted at least one element"):
        evaluate.sqnr(torch.ones(0), torch.ones(0))


def test_image_seeds_do_not_overlap_between_seeds():
    first, second = evaluate.image_seeds(0, 64), evaluate.image_seeds(1, 64)
    assert len({*first, *second}) == 128
    assert evaluate.image_seeds(0, 3) == first[:3]
    assert max(first) < 2**32


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler],
    ids=lambda s: s.__name__,
)
def test_generate_is_independent_of_batch_size(scheduler):
    runs = [evaluate.generate(Denoiser(0.3, 0.1), scheduler(), 5, 4, 7, size, SHAPE) for size in (5, 2)]
    assert torch.equal(runs[0].samples, runs[1].samples)
    assert runs[0].samples.shape == (5, *SHAPE)
    assert runs[0].samples.isfinite().all()
    assert runs[1].seconds_per_step.shape == (3, len(runs[0].timesteps))
    other = evaluate.generate(Denoiser(0.3, 0.1), scheduler(), 5, 4, 8, 5, SHAPE)
    assert not torch.equal(runs[0].samples, other.samples)


def test_generate_goes_on_where_another_call_ended():
    whole = evaluate.generate(Denoiser(0.3, 0.1), DDIMScheduler(), 5, 4, 7, shape=SHAPE)
    rest = evaluate.generate(Denoiser(0.3, 0.1), DDIMScheduler(), 3, 4, 7, shape=SHAPE, first=2)
    assert torch.equal(rest.samples, whole.samples[2:])
    assert evaluate.image_seeds(7, 3, first=2) == evaluate.image_seeds(7, 5)[2:]


def test_generate_follows_the_schedulers_clip_setting():
    # eps = 0 makes x0 = x / sqrt(alpha_bar), far outside [-1, 1] at the noisy end
    inputs = {}
    for clip in (True, False):
        seen = []
        evaluate.generate(
            Denoiser(0.0),
            DDIMScheduler(clip_sample=clip),
            1,
            4,
            shape=SHAPE,
            on_step=lambda k, t, x, e, seen=seen: seen.append(x),
        )
        inputs[clip] = seen[1].abs().max().item()
    assert inputs[True] < 1.0 < inputs[False]


def test_generate_streams_steps_and_progress_and_leaves_the_scheduler_alone():
    scheduler, steps, ticks = DDIMScheduler(), [], []
    result = evaluate.generate(
        Denoiser(0.3),
        scheduler,
        3,
        4,
        batch_size=2,
        shape=SHAPE,
        on_step=lambda k, t, x, e: steps.append((k, int(t), tuple(x.shape), torch.equal(e, 0.3 * x))),
        progress=lambda *tick: ticks.append(tick),
    )
    assert [s[0] for s in steps] == [0, 1, 2, 3] * 2
    assert [s[1] for s in steps[:4]] == result.timesteps.tolist()
    assert {s[2] for s in steps} == {(2, *SHAPE), (1, *SHAPE)}
    assert all(s[3] for s in steps)
    assert ticks[0] == ("sampling", 1, 8)
    assert ticks[-1] == ("sampling", 8, 8)
    assert scheduler.num_inference_steps is None


@pytest.mark.parametrize(
    ("scheduler", "calls"), [(DDIMScheduler, 3), (HeunDiscreteScheduler, 5)], ids=["DDIM", "Heun"]
)
@pytest.mark.parametrize("factor", [1.0, 1e-3])
def test_timesteps_are_those_that_the_denoiser_is_given(scheduler, calls, factor):
    call, model, reference = DenoiserCall(timestep_factor=factor), Denoiser(0.3), Denoiser(0.3)
    made = evaluate.generate(model, scheduler(), 1, 3, shape=SHAPE, call=call)
    assert made.timesteps.tolist() == model.timesteps
    assert len(model.timesteps) == calls
    config = small_config(num_inference_steps=3, num_images=1)
    found = evaluate.compare(reference, Denoiser(0.4), scheduler(), config, shape=SHAPE, call=call)
    assert found.timesteps.tolist() == reference.timesteps == model.timesteps
    assert len(found.noise_sqnr_same_input_db) == calls


@pytest.mark.parametrize("size", [None, (8, 8, 8)])
def test_sample_shape_that_the_config_does_not_say_is_asked_for(size):
    model = types.SimpleNamespace(config=types.SimpleNamespace(in_channels=4, sample_size=size))
    with pytest.raises(
        ValueError, match=r"sample_shape of a DenoiserCall \(--call\).* in_channels 4 and sample_size"
    ):
        sample_shape(model)
    model.config.sample_size = [8, 16]
    assert sample_shape(model) == (4, 8, 16)


def test_generate_rejects_bad_arguments():
    with pytest.raises(ValueError, match=r"the shape of a sample must be given, by shape=\(C, H, W\)"):
        evaluate.generate(Denoiser(0.3), DDIMScheduler(), 1, 4)
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        evaluate.generate(Denoiser(0.3), DDIMScheduler(), 0, 4, shape=SHAPE)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate.generate(Denoiser(0.3), DDIMScheduler(), 1, 4, batch_size=0, shape=SHAPE)


def test_generate_passes_conditioning_rows():
    shift = torch.tensor([0.0, 0.5, 1.0])
    whole = evaluate.generate(
        Denoiser(0.3), DDIMScheduler(), 3, 4, 0, 3, SHAPE, conditioning={"shift": shift}
    )
    split = evaluate.generate(
        Denoiser(0.3), DDIMScheduler(), 3, 4, 0, 2, SHAPE, conditioning={"shift": shift}
    )
    assert torch.equal(whole.samples, split.samples)


def test_compare_of_a_model_with_itself_is_infinite():
    result = evaluate.compare(Denoiser(0.3), Denoiser(0.3), DDIMScheduler(), small_config(), shape=SHAPE)
    assert result.psnr_db == math.inf
    assert np.isinf(result.noise_sqnr_same_input_db).all()
    assert np.isinf(result.noise_sqnr_own_trajectory_db).all()
    json.dumps(result.to_dict(), allow_nan=False)


def test_compare_separates_the_two_senses_of_noise_sqnr():
    # eps = gain * x: on the same input the relative error is 1 % at every step, exactly 40 dB
    scheduler = DDIMScheduler(clip_sample=False)
    result = evaluate.compare(Denoiser(1.0), Denoiser(0.99), scheduler, small_config(), shape=SHAPE)
    assert result.noise_sqnr_same_input_db == pytest.approx([40.0] * 4, abs=1e-3)
    assert result.noise_sqnr_own_trajectory_db[0] == result.noise_sqnr_same_input_db[0]
    assert (result.noise_sqnr_own_trajectory_db[1:] != result.noise_sqnr_same_input_db[1:]).all()


def test_compare_equals_two_separate_runs():
    scheduler = DDIMScheduler()
    result = evaluate.compare(Denoiser(0.3), Denoiser(0.4), scheduler, small_config(), shape=SHAPE)
    a, b = (evaluate.generate(Denoiser(g), scheduler, 5, 4, shape=SHAPE).samples for g in (0.3, 0.4))
    assert result.psnr_db == evaluate.psnr(a, b)
    assert result.psnr_per_image_db.tolist() == evaluate.psnr_per_image(a, b).tolist()
    assert np.array_equal(result.reference_images, to_uint8(a))
    assert np.array_equal(result.quantized_images, to_uint8(b))
    assert result.reference_images.shape == (5, 4, 4, 1)


def test_compare_without_extractors_says_so_and_makes_no_number_up(tmp_path, monkeypatch):
    monkeypatch.setattr("adpdm.evaluate.comparison.load_lite0", lambda: None)
    config = small_config(use_extractors=True, cache_dir=tmp_path)
    result = evaluate.compare(Denoiser(0.3), Denoiser(0.4), DDIMScheduler(), config, shape=SHAPE)
    assert result.lpips is None
    assert result.frechet is None
    assert len(result.missing) == 2
    assert all(evaluate.INSTALL_SENTENCE in sentence for sentence in result.missing)


def test_compare_refuses_a_frechet_distance_of_few_images(tmp_path, monkeypatch):
    monkeypatch.setattr("adpdm.evaluate.comparison.load_lite0", lambda: object())
    config = small_config(use_extractors=True, cache_dir=tmp_path, num_images=15)
    result = evaluate.compare(Denoiser(0.3), Denoiser(0.4), DDIMScheduler(), config, shape=SHAPE)
    assert result.frechet is None
    assert result.missing[1].endswith("it needs at least 16 images.")


def test_compare_rejects_conditioning_of_another_length():
    with pytest.raises(ValueError, match="compare: shift must have num_images=5 rows, got 2"):
        evaluate.compare(
            Denoiser(0.3),
            Denoiser(0.4),
            DDIMScheduler(),
            small_config(),
            shape=SHAPE,
            conditioning={"shift": torch.zeros(2)},
        )


def test_compare_refuses_latents_that_nothing_decodes():
    model = Denoiser(0.3)
    with pytest.raises(
        ValueError, match=r"compare: samples of shape \(4, 8, 8\) are no images .* \(1, 3\) channels; decode="
    ):
        evaluate.compare(model, Denoiser(0.4), DDIMScheduler(), small_config(), shape=(4, 8, 8))
    assert model.batch_sizes == []  # before anything ran


def test_compare_refuses_damaged_networks_and_real_images_before_anything_runs(tmp_path):
    (tmp_path / extractors.LPIPS_FILE).write_bytes(b"not safetensors")
    model, config = Denoiser(0.3), small_config(use_extractors=True, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        evaluate.compare(model, Denoiser(0.4), DDIMScheduler(), config, shape=SHAPE)
    for shape in ((20, 4, 8, 8), (2, 1, 8, 8), (8, 8)):
        with pytest.raises(ValueError, match=r"real_images must be \[M, C, H, W\] .* at least 3 of them"):
            evaluate.compare(
                model,
                Denoiser(0.4),
                DDIMScheduler(),
                small_config(),
                shape=SHAPE,
                real_images=torch.zeros(shape),
            )
    assert model.batch_sizes == []


class PooledFeatures:
    """Stands for EfficientNet-Lite0: the four quarters of an image, averaged."""

    def features(self, images: torch.Tensor) -> np.ndarray:
        return torch.nn.functional.avg_pool2d(images, 2).flatten(1).numpy()


class ToldLpips:
    """Stands for LPIPS: tells which images it was given, and in which order."""

    def distance(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first - 10 * second).mean((1, 2, 3))


def test_compare_measures_distances_of_pairs_and_to_real_images(monkeypatch):
    monkeypatch.setattr("adpdm.evaluate.comparison.load_lite0", PooledFeatures)
    monkeypatch.setattr("adpdm.evaluate.comparison.load_lpips", lambda cache_dir: ToldLpips())
    frechet = {"dimensions": 3, "resamples": 5, "seed": 7}
    config = small_config(
        use_extractors=True,
        num_images=16,
        kept_images=0,
        seed=7,
        frechet_dimensions=3,
        bootstrap_resamples=5,
    )
    real = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(0))
    result = evaluate.compare(
        Denoiser(0.3), Denoiser(0.4), DDIMScheduler(), config, shape=SHAPE, real_images=real
    )
    images = [
        evaluate.generate(Denoiser(g), DDIMScheduler(), 16, 4, 7, shape=SHAPE).samples.clamp(-1, 1)
        for g in (0.3, 0.4)
    ]
    a, b, data = (PooledFeatures().features(x) for x in (*images, real))
    assert result.lpips_per_image == pytest.approx(ToldLpips().distance(*images).numpy())
    assert result.lpips == pytest.approx(result.lpips_per_image.mean())
    assert result.frechet == evaluate.frechet_distance(a, b, is_paired=True, **frechet)
    assert result.frechet_reference_real == evaluate.frechet_distance(data, a, **frechet)
    assert result.frechet_quantized_real == evaluate.frechet_distance(data, b, **frechet)
    assert result.kernel == evaluate.kernel_distance(a, b, seed=7, is_paired=True)
    assert result.kernel_reference_real == evaluate.kernel_distance(data, a, seed=7)
    assert result.kernel_quantized_real == evaluate.kernel_distance(data, b, seed=7)
    assert "kernel" in result.to_dict()
    assert "Kernel distance (EfficientNet-Lite0)" in evaluation_rows(result)


def test_compare_measures_times_and_sizes(tmp_path):
    for name, size in (("full", 400), ("int8", 100)):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "model.safetensors").write_bytes(bytes(size))
        (tmp_path / name / "config.json").write_text("{}")
    config = small_config(timing_batch_sizes=(1, 3), timing_pairs=2)
    reference = Denoiser(0.3)
    result = evaluate.compare(
        reference,
        Denoiser(0.4),
        DDIMScheduler(),
        config,
        shape=SHAPE,
        paths=(tmp_path / "full", tmp_path / "int8"),
    )
    assert (result.reference_bytes, result.quantized_bytes) == (400, 100)
    assert [t.batch_size for t in result.timings] == [1, 3]
    assert all(t.speedup_low <= t.speedup <= t.speedup_high for t in result.timings)
    assert reference.batch_sizes[-4:] == [3, 3, 3, 3]
    with pytest.raises(ValueError, match="wanted weight files"):
        evaluate.file_bytes(tmp_path / "none")


def test_config_rejects_nonsense():
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        evaluate.EvaluationConfig(num_images=0)
    with pytest.raises(ValueError, match=r"timing_batch_sizes must be at least 1 each, got \(4, 0\)"):
        evaluate.EvaluationConfig(timing_batch_sizes=(4, 0))


def test_frechet_of_known_gaussians():
    # 1-d: |m1 - m2|^2 + (s1 - s2)^2 with means 0 and 3, sample deviations 1 and 2
    base = np.array([-1.0, 1.0] * 8)
    base /= base.std(ddof=1)
    result = evaluate.frechet_distance(base[:, None], 2 * base[:, None] + 3, resamples=0)
    assert result.distance == pytest.approx(10.0)
    assert (result.dimensions, result.explained_variance) == (1, pytest.approx(1.0))


def test_frechet_against_the_closed_form_in_float64():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 6)), rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    result = evaluate.frechet_distance(a, b, dimensions=6, resamples=0)
    c1, c2 = np.cov(a.T), np.cov(b.T)
    cross = np.sqrt(np.linalg.eigvals(c1 @ c2).real).sum()
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c1 + c2) - 2 * cross
    assert result.distance == pytest.approx(wanted, rel=1e-9)  # all 6 axes kept: a rotation changes nothing


def test_frechet_of_equal_sets_is_zero_and_few_images_mean_few_dimensions():
    x = np.random.default_rng(0).normal(size=(16, 40)).astype(np.float32)
    result = evaluate.frechet_distance(x, x, is_paired=True)
    # sqrt of eigenvalue errors ~ eps: 1e-8 relative to a trace of about 30
    assert result.distance == pytest.approx(0.0, abs=1e-6)
    assert result.high == pytest.approx(0.0, abs=1e-6)
    assert result.dimensions == 4
    assert 0.1 < result.explained_variance < 1


def test_frechet_interval_is_seeded_and_holds_the_distance():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(64, 8)), rng.normal(size=(64, 8)) + 0.5
    first, again, other = (evaluate.frechet_distance(a, b, seed=s, resamples=50) for s in (0, 0, 1))
    assert first == again
    assert first.low != other.low
    assert first.low < first.distance < first.high


def test_frechet_of_one_distribution_is_biased_as_documented_and_its_interval_leaves_out_zero():
    rng, results = np.random.default_rng(0), []
    for _ in range(3):
        sets = rng.normal(size=(2, 1000, 32))
        results.append(evaluate.frechet_distance(*sets, resamples=40))
    # the formula is of second order: D / N = 3 % is left out, and single runs vary by 10 %
    assert np.mean([r.distance for r in results]) == pytest.approx(32 * 37 / 2000, rel=0.15)
    assert all(r.low > 0 for r in results)


def test_frechet_rejects_bad_sets():
    with pytest.raises(ValueError, match=r"wanted \[N, F\] and \[M, F\], got \(3, 2\) and \(3, 4\)"):
        evaluate.frechet_distance(np.zeros((3, 2)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="at least 2 images in each set, got 1 and 3"):
        evaluate.frechet_distance(np.zeros((1, 2)), np.zeros((3, 2)))
