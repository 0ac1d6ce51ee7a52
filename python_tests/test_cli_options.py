"""Options of `adpdm quantize`: each reaches the setting that it names, and without any the defaults stand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from adpdm import QuantConfig, SearchConfig, cli
from adpdm.quantize_options import add_quantize_options, quant_config
from adpdm.testing import ONE_BLOCK, tiny_pipeline


def config_of(*words: str) -> QuantConfig:
    parser = argparse.ArgumentParser()
    add_quantize_options(parser)
    return quant_config(parser.parse_args(words))


def test_without_options_the_settings_are_the_defaults() -> None:
    assert config_of() == QuantConfig()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--search-parts 2", {"search": SearchConfig(parts=2)}),
        ("--search-steps 7", {"search": SearchConfig(num_steps=7)}),
        ("--no-correct-prediction", {"correct_prediction": False}),
        ("--correct-prediction", {}),
        ("--equalization on", {"equalization": "on"}),
        ("--attention float", {"attention": "float"}),
        ("--images 5", {"calibration_images": 5}),
        ("--histogram-images 3", {"histogram_images": 3}),
        ("--guidance-scale 2.5", {"guidance_scale": 2.5}),
    ],
)
def test_an_option_sets_what_it_names_and_nothing_else(words: str, wanted: dict[str, Any]) -> None:
    assert config_of(*words.split()) == QuantConfig(**wanted)


def test_options_reach_the_saved_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline(**ONE_BLOCK).save_pretrained(tmp_path / "float")
    arguments = ["quantize", str(tmp_path / "float"), "--out", str(tmp_path / "quantized"), "--json"]
    few = "--grouping shared --steps 2"
    options = (
        "--search-parts 2 --no-correct-prediction --equalization on --attention float --histogram-images 3"
    )
    assert cli.main([*arguments, *few.split(), *options.split()]) == 0
    stored = json.loads(capsys.readouterr().out)["config"]
    wanted = {
        "correct_prediction": False,
        "equalization": "on",
        "attention": "float",
        "histogram_images": 3,
    }
    assert {name: stored[name] for name in wanted} == wanted
    assert stored["search"]["parts"] == 2
