"""Quantizing within a span of time: what the estimate counts, and what is taken out first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adpdm import QuantConfig, SearchConfig, cli
from adpdm.budget import PARTITION_SECONDS, estimate, fit_budget, reductions, time_image
from adpdm.pipeline import calibration_sampler
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_unet
from adpdm.trajectory import Sampler

ASKED = QuantConfig(num_inference_steps=50, calibration_images=128, search=SearchConfig(num_steps=160))


def seconds_of(config: QuantConfig) -> float:
    return estimate(config, num_calls=50, image_seconds=0.01)


def test_estimate_is_proportional_to_the_denoiser_and_grows_with_the_work() -> None:
    assert estimate(ASKED, 50, 0.02) - PARTITION_SECONDS == pytest.approx(
        2 * (seconds_of(ASKED) - PARTITION_SECONDS)
    )
    for more in (
        {"calibration_images": 256},
        {"histogram_images": 32},
        {"weight_bits": 4},
        {"search": SearchConfig(num_steps=320)},
        {"search": SearchConfig(batch_size=16)},
        {"guidance_scale": 3.0},
    ):
        assert seconds_of(ASKED.replace(**more)) > seconds_of(ASKED), more
    assert estimate(ASKED, 100, 0.01) > seconds_of(ASKED)
    assert seconds_of(ASKED.replace(correct_prediction=False)) < seconds_of(ASKED)
    assert seconds_of(ASKED.replace(grouping="dp")) < seconds_of(ASKED) / 3


def test_one_group_is_not_searched_so_it_costs_what_the_partition_does() -> None:
    one = ASKED.replace(num_groups=1)
    assert seconds_of(one) == seconds_of(one.replace(grouping="dp"))
    assert {(c.calibration_images, c.search.num_steps) for c in reductions(one)} == {(128, 160)}
    assert {c.grouping for c in reductions(one)} == {"search"}


def test_reductions_take_from_the_search_first_and_give_it_up_last() -> None:
    all_of_them = list(reductions(ASKED))
    assert all_of_them[0] == ASKED
    groupings = [c.grouping for c in all_of_them]
    assert groupings == sorted(groupings, reverse=True)  # search .. dp
    with_search = [c for c in all_of_them if c.grouping == "search"]
    assert [c.histogram_images for c in with_search] == sorted(
        (c.histogram_images for c in with_search), reverse=True
    )
    full = [c for c in with_search if c.histogram_images == ASKED.histogram_images]
    times = [seconds_of(c) for c in full]
    assert times == sorted(times, reverse=True)
    assert all(c.calibration_images >= c.round_size and c.search.num_steps >= 20 for c in with_search)
    assert min(c.histogram_images for c in all_of_them) == 4


@pytest.mark.parametrize("grouping", ["dp", "shared", "uniform"])
def test_reductions_leave_other_groupings_alone(grouping: Any) -> None:
    config = ASKED.replace(grouping=grouping, histogram_images=2)
    assert list(reductions(config)) == [config, config]


def test_small_settings_are_never_raised() -> None:
    small = ASKED.replace(calibration_images=3, search=SearchConfig(num_steps=5), histogram_images=4)
    for config in reductions(small):
        assert config.calibration_images <= 3
        assert config.search.num_steps <= 5
        assert config.histogram_images <= 4


def small_sampler(config: QuantConfig) -> Sampler:
    return calibration_sampler(tiny_unet(**ONE_BLOCK), config, scheduler=ddim_scheduler())


@pytest.fixture
def fixed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A denoiser that takes a millisecond for an image, on any machine."""
    monkeypatch.setattr("adpdm.budget.time_image", lambda sampler, config: 0.001)


def test_plan_fits_and_says_how_to_ask_for_it_again(fixed_speed: None) -> None:
    config = QuantConfig(num_inference_steps=8)
    sampler = small_sampler(config)
    whole = fit_budget(sampler, config, 1e6)
    assert whole.config == config
    # Passes of one image: 16 images at 8 steps observed and fitted at 2.2, 128 generated half the way, 200
    # optimizer steps of 8 images at 4.5, 3 trajectories of 8 images held out, 3 corrections of 8 images.
    passes = 16 * 8 * 2.2 + 128 * 4 + 200 * 8 * 4.5 + 3 * 8 * 8 + 3 * 8 * 8
    assert whole.seconds == whole.wanted_seconds == pytest.approx(3 + 1.3 * 0.001 * passes)  # 13.9
    half = fit_budget(sampler, config, whole.wanted_seconds / 2)
    assert half.config == config.replace(calibration_images=16, search=SearchConfig(num_steps=20))
    assert half.seconds == pytest.approx(6.75648)
    assert half.wanted_seconds == whole.wanted_seconds
    assert half.options == "--grouping search --histogram-images 16 --images 16 --search-steps 20"
    least = fit_budget(sampler, config, 3.3)
    assert least.config == config.replace(grouping="dp", histogram_images=8)
    assert least.options == "--grouping dp --histogram-images 8"


@pytest.mark.parametrize(
    ("seconds", "batches", "wanted"),
    [([0.02, 0.32, 0.16, 0.24], [1, 16, 16, 16], 0.01), ([0.6], [1], 0.6)],
    ids=["the quickest of three batches", "one image where that takes long"],
)
def test_an_image_is_timed(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float], batches: list[int], wanted: float
) -> None:
    asked: list[int] = []

    def time_batch(sampler: Sampler, batch: int) -> float:
        asked.append(batch)
        return seconds[len(asked) - 1]

    monkeypatch.setattr("adpdm.budget._time_batch", time_batch)
    assert time_image(small_sampler(ASKED), ASKED) == pytest.approx(wanted)
    assert asked == batches


def test_budget_that_nothing_fits_into_is_an_error() -> None:
    sampler = small_sampler(ASKED)
    with pytest.raises(ValueError, match=r"wanted at most 1e-06 s, the least calibration takes about"):
        fit_budget(sampler, ASKED, 1e-6)
    with pytest.raises(ValueError, match="wanted a positive time, got 0 s"):
        fit_budget(sampler, ASKED, 0)


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from diffusers import DDIMPipeline

    DDIMPipeline(tiny_unet(**ONE_BLOCK), ddim_scheduler()).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_quantize_within_a_budget_prints_options_that_give_the_same_model(
    model: Path, capsys: pytest.CaptureFixture[str], fixed_speed: None
) -> None:
    common = ["quantize", str(model), "--offline", "--steps", "8", "--groups", "2", "--json"]
    first, second = model.parent / "first", model.parent / "second"
    assert cli.main([*common, "--out", str(first), "--budget", "7s"]) == 0
    captured = capsys.readouterr()
    line = next(line for line in captured.err.splitlines() if line.startswith("to get the same again: "))
    options = line.partition(": ")[2].split()
    stored = json.loads(captured.out)["config"]
    assert (stored["grouping"], stored["search"]["num_steps"]) == ("search", 20)
    assert cli.main([*common, "--out", str(second), *options]) == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_budget_of_a_call_that_fails_names_the_call_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import DDIMPipeline

    model, out = tmp_path / "classes", tmp_path / "q"
    DDIMPipeline(tiny_unet(num_class_embeds=3), ddim_scheduler()).save_pretrained(model)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    arguments = ["quantize", str(model), "--offline", "--out", str(out), "--budget", "1m"]
    assert cli.main(arguments) == cli.EXIT_FAILURE
    message = " ".join(capsys.readouterr().err.split())
    assert (
        "quantize: UNet2DModel must work on samples (1, 8, 8) with nothing else, got ValueError: " in message
    )
    assert "class_labels should be provided" in message
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["classes"]


@pytest.mark.parametrize("text", ["15", "m", "-3m", "15 minutes", "1d"])
def test_budget_must_look_like_a_time(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["quantize", "model", "--out", "q", f"--budget={text}"])
    assert "wanted a time like 90s, 15m or 2h" in " ".join(capsys.readouterr().err.split())


def test_budget_and_resume_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", "model", "--out", str(tmp_path / "q"), "--budget", "1m", "--resume"]
    assert cli.main(arguments) == cli.EXIT_FAILURE
    assert "give the options that the interrupted run printed" in " ".join(capsys.readouterr().err.split())
