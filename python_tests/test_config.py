"""Settings are checked when they are made, and survive JSON."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from diffusers.quantizers.auto import DiffusersAutoQuantizer

from adpdm import QuantConfig, SearchConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 1}, "weight_bits must be in [2, 8], got 1"),
        ({"weight_bits": 9}, "weight_bits must be in [2, 8], got 9"),
        ({"activation_bits": 0}, "activation_bits must be in [2, 8], got 0"),
        ({"activation_bits": 4.5}, "activation_bits must be an integer, got 4.5"),
        ({"weight_bits": True}, "weight_bits must be an integer, got True"),
        ({"num_groups": 0}, "num_groups must be in [1, 256], got 0"),
        ({"num_groups": 257, "num_inference_steps": 300}, "num_groups must be in [1, 256], got 257"),
        (
            {"num_groups": 8, "num_inference_steps": 7},
            "num_groups must be at most num_inference_steps=7, got 8",
        ),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"calibration_images": 0}, "calibration_images must be at least 1, got 0"),
        ({"round_size": -1}, "round_size must be at least 1, got -1"),
        ({"histogram_images": 0}, "histogram_images must be at least 1, got 0"),
        ({"seed": 1.0}, "seed must be an integer, got 1.0"),
        ({"exclude_first": 1.0}, "exclude_first must be in [0.0, 0.9], got 1.0"),
        (
            {"grouping": "kmeans"},
            "grouping must be one of shared, uniform, per_step, dp, search; got 'kmeans'",
        ),
        ({"selection": "best"}, "selection must be one of srm, uniform, normal, random; got 'best'"),
        ({"timestep_policy": "skip"}, "timestep_policy must be one of nearest, error; got 'skip'"),
        ({"input_output_bits": 4}, "input_output_bits must be one of 8, None; got 4"),
        ({"shared_groups": "false"}, "shared_groups must be one of True, False; got 'false'"),
        ({"split_skip_connections": 2}, "split_skip_connections must be one of True, False; got 2"),
        ({"correct_bias": "yes"}, "correct_bias must be one of True, False; got 'yes'"),
        ({"weight_bits": "8"}, "weight_bits must be an integer, got '8'"),
        ({"input_output_bits": 8.0}, "input_output_bits must be an integer, got 8.0"),
        ({"correct_prediction": 1.5}, "correct_prediction must be one of True, False; got 1.5"),
    ],
)
def test_config_refuses_with_wanted_and_got(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "search.num_steps must be at least 1, got 0"),
        ({"refit_steps": -1}, "search.refit_steps must be at least 0, got -1"),
        ({"batch_size": 0}, "search.batch_size must be at least 1, got 0"),
        ({"replay": 1.5}, "search.replay must be in [0.0, 1.0], got 1.5"),
        ({"entropy_weight": -0.1}, "search.entropy_weight must be at least 0.0, got -0.1"),
        ({"entropy_weight": float("nan")}, "search.entropy_weight must be at least 0.0, got nan"),
        ({"entropy_weight": float("inf")}, "search.entropy_weight must be finite, got inf"),
        ({"learning_rate": float("inf")}, "search.learning_rate must be finite, got inf"),
        ({"logits_learning_rate": float("inf")}, "search.logits_learning_rate must be finite, got inf"),
        ({"objective": "mse"}, "search.objective must be one of teacher, noise; got 'mse'"),
    ],
)
def test_search_config_refuses_with_wanted_and_got(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SearchConfig(**settings)


def test_config_accepts_as_many_groups_as_steps() -> None:
    assert QuantConfig(num_groups=5, num_inference_steps=5).groups_per_layer(5) == 5


@pytest.mark.parametrize(("grouping", "groups"), [("shared", 1), ("per_step", 4)])
def test_groupings_without_a_number_of_groups_take_any_number_of_steps(grouping: Any, groups: int) -> None:
    config = QuantConfig(grouping=grouping, num_inference_steps=4)
    assert config.num_groups > 4
    assert config.groups_per_layer(4) == groups


def test_config_is_no_config_of_diffusers() -> None:
    with pytest.raises(AttributeError, match=r"must be an adpdm.AdpdmConfig, got QuantConfig"):
        DiffusersAutoQuantizer.from_config(QuantConfig())
    assert not hasattr(QuantConfig(), "quant_method")
    assert copy.deepcopy(QuantConfig(seed=3)) == QuantConfig(seed=3)


def test_config_refuses_more_groups_than_the_scheduler_visits_timesteps() -> None:
    message = "at most 4, the number of different timesteps that the scheduler visits for .*=5; got 5"
    with pytest.raises(ValueError, match=message):
        QuantConfig(num_groups=5, num_inference_steps=5).groups_per_layer(4)


@pytest.mark.parametrize(
    ("grouping", "groups"), [("shared", 1), ("uniform", 4), ("per_step", 39), ("dp", 4), ("search", 4)]
)
def test_config_groups_per_layer_follows_grouping(grouping: Any, groups: int) -> None:
    config = QuantConfig(grouping=grouping, num_groups=4, num_inference_steps=20)
    assert config.groups_per_layer(39) == groups  # a scheduler of second order


@pytest.mark.parametrize(
    ("grouping", "groups", "searches"), [("search", 2, True), ("search", 1, False), ("dp", 2, False)]
)
def test_config_searches_where_there_is_a_choice_of_groups(
    grouping: Any, groups: int, searches: bool
) -> None:
    assert QuantConfig(grouping=grouping, num_groups=groups).searches == searches


def test_config_counts_the_round_that_is_not_full() -> None:
    assert QuantConfig(calibration_images=10, round_size=4).num_rounds == 3
    assert QuantConfig(calibration_images=8, round_size=4).num_rounds == 2


def test_config_json_round_trip_keeps_every_setting() -> None:
    config = QuantConfig(
        weight_bits=4,
        activation_bits=6,
        num_groups=3,
        grouping="dp",
        range_method="minmax",
        weight_rounding="nearest",
        hadamard="on",
        equalization="on",
        attention="int8",
        raised_layers=0.1,
        weigh_steps=False,
        shared_groups=True,
        num_inference_steps=20,
        guidance_scale=7.5,
        selection="normal",
        calibration_images=7,
        round_size=3,
        histogram_images=5,
        exclude_first=0.25,
        input_output_bits=8,
        split_skip_connections=False,
        correct_bias=False,
        correct_prediction=False,
        modules_to_not_convert=("mid_block.*", "up_blocks.0.*"),
        timestep_policy="error",
        seed=11,
        search=SearchConfig(9, 2, 4, 1e-3, 0.02, 0.3, 0.5, 0.25, "noise", True, 2),
    )
    default = QuantConfig().to_dict()
    assert all(
        value != default[name] for name, value in config.to_dict().items()
    )  # nothing rests on a default
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_bit": 4}, "QuantConfig: unknown settings ['weight_bit']; known are ["),
        ({"search": {"steps": 4}}, "SearchConfig: unknown settings ['steps']; known are ["),
    ],
)
def test_config_from_dict_refuses_unknown_keys(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantConfig.from_dict(values)


def test_config_replace_checks_again() -> None:
    config = QuantConfig(num_groups=8)
    assert config.replace(weight_bits=4) == QuantConfig(num_groups=8, weight_bits=4)
    with pytest.raises(ValueError, match="num_groups must be at most num_inference_steps=4, got 8"):
        config.replace(num_inference_steps=4)
