"""Which layers become integer: patterns that exclude some, classes and padding that must stay float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adpdm
from adpdm import AdpdmConfig, QuantConfig
from adpdm.diffusers_config import choose_layers
from adpdm.nn import describe_layers, quant_layers
from adpdm.nn.swap import excluded, reason_to_keep
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_unet

NAMES = ("down.0.conv1", "down.0.attn.to_q", "down.10.conv1", "mid.conv1", "mid.conv_shortcut", "conv_in")
QUICK: dict[str, Any] = {
    "num_inference_steps": 2,
    "num_groups": 2,
    "histogram_images": 2,
    "grouping": "uniform",
}


def layers_of(model: nn.Module, **changes: Any) -> dict[str, Any]:
    """What `describe_layers` says, by name."""
    sample = torch.zeros(1, 1, 8, 8)
    found = describe_layers(model, QuantConfig(**{**QUICK, **changes}), lambda: model(sample, 10))
    return {layer.name: layer for layer in found}


# ---- patterns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("mid.conv1", {3}),
        ("down.0", {0, 1}),  # and not down.10
        ("mid", {3, 4}),
        ("conv1", {0, 2, 3}),
        ("attn.to_q", {1}),
        ("down.*", {0, 1, 2}),
        ("*conv_shortcut", {4}),
        ("*.0.*1", {0}),
        ("conv_??", {5}),
        ("*", {0, 1, 2, 3, 4, 5}),
    ],
)
def test_pattern_means_a_layer_a_module_around_it_or_a_part(pattern: str, meant: set[int]) -> None:
    assert excluded(NAMES, [pattern]) == {NAMES[i] for i in meant}


@pytest.mark.parametrize("pattern", ["down.1", "conv", "to_z", "Mid", "", "n.0"])
def test_pattern_that_means_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=rf"pattern '{pattern}' matches no layer; layers are e.g. \['con"):
        excluded(NAMES, ["mid", pattern])


@pytest.mark.parametrize("patterns", [("down_blocks.0",), ("resnets", "*.to_q"), ("mid_block.*",)])
def test_quantize_and_loading_exclude_the_same_layers(patterns: tuple[str, ...]) -> None:
    model = tiny_unet()
    found = layers_of(model, modules_to_not_convert=patterns)
    kept = {x.name for x in found.values() if x.reason == "excluded by modules_to_not_convert"}
    config = AdpdmConfig(modules_to_not_convert=patterns)
    loaded = {row["name"] for row in choose_layers(model, config, ())}
    assert kept == set(found) - loaded
    assert len(kept) > 3


# ---- layers that are not what they seem --------------------------------------------------------------------


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Unpaired(nn.Module):
    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.pair(x)[0]
        return result


def test_layers_of_derived_classes_keep_their_own_forward() -> None:
    model = tiny_unet()
    model.mid_block.resnets[0].conv1 = Doubled(16, 16, 3, padding=1)
    model.mid_block.attentions[0].to_out[0] = Unpaired(Pair(16, 16))
    report = adpdm.quantize(model, QuantConfig(**QUICK), scheduler=ddim_scheduler())
    reasons = {x.name: x.reason for x in report.layers}
    own = "derives from a layer and may have a forward of its own"
    assert reasons["mid_block.resnets.0.conv1"] == f"Doubled {own}"
    assert reasons["mid_block.attentions.0.to_out.0.pair"] == f"Pair {own}"
    assert type(model.mid_block.resnets[0].conv1) is Doubled
    assert "mid_block.resnets.0.conv2" in quant_layers(model)


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 8, 3, padding="same"), "padding 'same' with mode 'zeros' is not supported"),
        (
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
            "padding (1, 1) with mode 'circular' is not supported",
        ),
        (Doubled(8, 8, 3), "Doubled derives from a layer and may have a forward of its own"),
    ],
    ids=["same", "circular", "derived"],
)
def test_reasons_of_the_layer_itself_come_before_that_it_does_not_run(
    layer: Any, reason: str, runs: bool
) -> None:
    assert reason_to_keep("mid.conv", layer, QuantConfig(), runs) == reason


def test_layer_that_does_not_run_says_so() -> None:
    model = tiny_unet(**ONE_BLOCK)
    model.mid_block.spare = nn.Linear(4, 4)
    assert layers_of(model)["mid_block.spare"].reason == "not reached by the traced forward pass"


class TimeEmbedder(nn.Module):
    """As in Wan and AnyFlow, which cast to the dtype of its first parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedder = nn.ModuleDict({"linear_1": nn.Linear(4, 8)})
        self.text_embedder = nn.Linear(4, 8)


def test_loading_leaves_float_what_others_cast_to() -> None:
    model = nn.ModuleDict(
        {"condition_embedder": TimeEmbedder(), "timestep_embedder": nn.ModuleList([nn.Linear(4, 8)])}
    )
    names = {row["name"] for row in choose_layers(model, AdpdmConfig(weight_bits=4), ())}
    assert names == {"condition_embedder.text_embedder", "timestep_embedder.0"}
