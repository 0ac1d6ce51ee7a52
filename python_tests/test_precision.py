"""Mixed precision: the estimate of each layer's share of the error, and who gets 8 bits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

import adpdm
from adpdm import QuantConfig
from adpdm.nn import QuantLayer, QuantLinear, quant_layers
from adpdm.precision import Sensitivity, _probe, most_sensitive, raise_bits
from adpdm.quantizers.activation import Mode
from adpdm.step import StepState
from adpdm.testing import CROSS_ATTENTION_DIM, ddim_scheduler, tiny_conditional_unet, tiny_unet

STEPS = 4


def chain(bits: tuple[int, int] = (4, 4)) -> tuple[nn.Sequential, dict[str, QuantLayer]]:
    """Two linear layers, quantized but in float mode: small enough to know the answer."""
    torch.manual_seed(0)
    state = StepState(2, STEPS)
    layers: dict[str, QuantLayer] = {}
    for slot, (name, plain) in enumerate({"first": nn.Linear(6, 8), "second": nn.Linear(8, 5)}.items()):
        layer = QuantLinear.of(plain, bits, 1, slot, state, None)
        table = torch.zeros(STEPS, dtype=torch.int32)
        layer.quantizers[0].set_ranges(torch.tensor([-3.0]), torch.tensor([3.0]), table)
        layer.set_codes(*layer.weight_quantizer.quantize(layer.weight))
        layer.set_mode(Mode.FLOAT)
        layers[name] = layer
    net = nn.Sequential(layers["first"], nn.Tanh(), layers["second"])
    return net.requires_grad_(False), layers


def test_estimate_is_the_error_that_each_layer_alone_causes() -> None:
    net, layers = chain((7, 7))  # small errors: the estimate is of first order
    x = torch.randn(2000, 6, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    found = _probe(list(layers.values()), lambda: net(x.clone().requires_grad_()), 0)
    exact = net(x)
    for layer, (by_weight, by_activation) in zip(layers.values(), found.tolist(), strict=True):
        layer.set_mode(Mode.FAKE)  # both errors of this layer, which are independent of each other
        together = float((net(x) - exact).square().sum())
        layer.set_mode(Mode.FLOAT)
        # (g . e)^2 scatters by sqrt(2) of its mean: 3 per cent over 2000 samples, here 4 deviations.
        assert by_weight + by_activation == pytest.approx(together, rel=0.13)


def test_costs_are_those_that_the_report_lists() -> None:
    _, report = quantize_tiny()
    costs = {x.name: (x.macs, x.parameters) for x in report.layers if x.bits is not None}
    found = report.trace.sensitivity
    assert {name: (row["macs"], row["parameters"]) for name, row in found.items()} == costs


def test_a_layer_that_runs_twice_costs_both_runs() -> None:
    unet = tiny_unet()
    unet.mid_block.resnets[1] = unet.mid_block.resnets[0]
    report = adpdm.quantize(unet, tiny_config(), scheduler=ddim_scheduler())
    found = report.trace.sensitivity
    names = ["mid_block.resnets.0.conv1", "up_blocks.0.resnets.0.conv2"]  # of the same shape
    assert found[names[0]]["parameters"] == found[names[1]]["parameters"]
    assert found[names[0]]["macs"] == 2 * found[names[1]]["macs"]


def test_most_sensitive_takes_the_best_per_cost_that_fit() -> None:
    gain = {"a": 10.0, "b": 9.0, "c": 1.0, "d": 0.0, "e": 5.0}
    cost = {"a": 50, "b": 10, "c": 5, "d": 1, "e": 34}
    # per cost b .9, c .2, a .2, e .147, d nothing; a does not fit after b and c, e does
    assert most_sensitive(gain, cost, 0.5) == ["b", "c", "e"]
    assert most_sensitive(gain, cost, 0.0) == []
    assert most_sensitive(gain, cost, 1.0) == ["b", "a", "c", "e"]


def test_bits_are_raised_separately_for_weights_and_activations() -> None:
    _, layers = chain()
    found = {"first": Sensitivity(9.0, 1.0, 50, 50), "second": Sensitivity(1.0, 9.0, 50, 50)}
    assert raise_bits(layers, found, 0.5) == ["first", "second"]
    assert [layer.bits for layer in layers.values()] == [(8, 4), (4, 8)]


def test_layers_that_have_8_bits_use_none_of_the_share() -> None:
    _, layers = chain((4, 8))
    found = {"first": Sensitivity(1.0, 100.0, 50, 50), "second": Sensitivity(9.0, 100.0, 50, 50)}
    assert raise_bits(layers, found, 0.5) == ["second"]
    assert [layer.bits for layer in layers.values()] == [(4, 8), (8, 8)]


def tiny_config(**changes: Any) -> QuantConfig:
    settings: dict[str, Any] = {
        "weight_bits": 4,
        "activation_bits": 4,
        "grouping": "dp",
        "num_groups": 2,
        "num_inference_steps": STEPS,
        "histogram_images": 4,
    }
    return QuantConfig(**{**settings, **changes})


def quantize_tiny(**changes: Any) -> tuple[UNet2DModel, Any]:
    unet = tiny_unet()
    return unet, adpdm.quantize(unet, tiny_config(**changes), scheduler=ddim_scheduler())


def test_a_denoiser_gets_no_more_than_the_share_and_a_smaller_error() -> None:
    x, t = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor(500)
    exact = tiny_unet()(x, t).sample.detach()
    errors = []
    for share in (0.0, 0.2):
        unet, report = quantize_tiny(raised_layers=share)
        infos = [layer for layer in report.layers if layer.bits is not None]
        for part, cost in ((0, "parameters"), (1, "macs")):
            raised = sum(getattr(layer, cost) for layer in infos if layer.bits[part] == 8)
            assert raised <= share * sum(getattr(layer, cost) for layer in infos)
            assert (raised > 0) == (share > 0)
        assert {n: q.bits for n, q in quant_layers(unet).items()} == {
            layer.name: layer.bits for layer in infos
        }
        errors.append(float((unet(x, t).sample - exact).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_nothing_is_measured_where_nothing_can_be_raised() -> None:
    assert quantize_tiny(raised_layers=0.0)[1].trace.sensitivity == {}
    assert quantize_tiny(weight_bits=8, activation_bits=8)[1].trace.sensitivity == {}
    unet, report = quantize_tiny(weight_bits=8)
    assert report.trace.sensitivity.keys() == quant_layers(unet).keys()


def test_a_share_that_no_layer_fits_raises_nothing() -> None:
    unet, report = quantize_tiny(raised_layers=1e-6)
    assert {layer.bits for layer in quant_layers(unet).values()} == {(4, 4)}
    assert report.trace.sensitivity.keys() == quant_layers(unet).keys()


def test_one_partition_for_the_net_stays_one() -> None:
    unet, _ = quantize_tiny(shared_groups=True, raised_layers=0.2)
    tables = unet.get_submodule("adpdm_step").table
    assert all(torch.equal(tables[:, 0], tables[:, i]) for i in range(tables.shape[1]))


def test_mixed_bits_are_saved_and_loaded(tmp_path: Path) -> None:
    unet, _ = quantize_tiny(raised_layers=0.2)
    unet.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert {n: q.bits for n, q in quant_layers(loaded).items()} == {
        n: q.bits for n, q in quant_layers(unet).items()
    }
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    assert torch.equal(unet(x, 500).sample, loaded(x, 500).sample)


def test_layers_that_see_only_the_conditioning_are_measured_too() -> None:
    unet = tiny_conditional_unet()
    words = torch.randn(4, 3, CROSS_ATTENTION_DIM, generator=torch.Generator().manual_seed(5))
    settings = QuantConfig(
        weight_bits=4, grouping="dp", num_groups=2, num_inference_steps=STEPS, histogram_images=4
    )
    report = adpdm.quantize(
        unet, settings, scheduler=ddim_scheduler(), conditioning={"encoder_hidden_states": words}
    )
    found = report.trace.sensitivity
    keys = [name for name in found if name.endswith("attn2.to_k")]
    assert found.keys() == quant_layers(unet).keys()
    assert keys
    assert all(found[name]["weight"] > 0 for name in keys)
