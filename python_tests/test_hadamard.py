"""Layers that rotate the channels of their inputs: alone, in fused blocks, in whole denoisers, in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_blocks import sqnr_db
from torch import Tensor, nn
from transformer_cases import STEPS, make_case

import adpdm
from adpdm import QuantConfig, ops
from adpdm.doctor import _shape_of as shape_of
from adpdm.nn import LayerInfo, describe_fusion, fuse_blocks, quant_layers, swap_layers, unfused
from adpdm.nn.layers import QuantLinear
from adpdm.nn.swap import rotates_inputs
from adpdm.quantizers.activation import Mode
from adpdm.reference_hadamard import hadamard
from adpdm.step import StepState

# ---- layers ------------------------------------------------------------------------------------------------

CHANNELS, OUTPUTS, BLOCK = 256, 24, 16


def outliers(*shape: int, seed: int = 3) -> Tensor:
    """Inputs with a channel that stands out."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 7] *= 20
    return x


def rotated_layer(bits: tuple[int, int] = (4, 8), bound: float = 25.0) -> tuple[nn.Linear, QuantLinear]:
    """A float layer and its twin, which rotates, with one range."""
    layer = nn.Linear(CHANNELS, OUTPUTS)
    step = StepState(1, 1)
    twin = QuantLinear.of(layer, bits, 1, 0, step, None, BLOCK)
    twin.quantizers[0].set_ranges(
        torch.tensor([-bound]), torch.tensor([bound]), torch.zeros(1, dtype=torch.int32)
    )
    return layer, twin


def test_float_layer_computes_what_it_did() -> None:
    layer, twin = rotated_layer()
    x = outliers(5, CHANNELS)
    assert not torch.equal(twin.weight, layer.weight)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=1e-4)
    assert torch.equal(twin.rotated(twin.rotated(x)), hadamard(hadamard(x, BLOCK), BLOCK))


def test_integer_layer_is_codes_of_rotated_inputs_times_codes_of_the_rotated_weight() -> None:
    layer, twin = rotated_layer()
    x = outliers(2, 5, CHANNELS)
    twin.freeze()
    quantizer = twin.quantizers[0]
    values = (quantizer.codes(hadamard(x, BLOCK)).float() - quantizer.zero_point[0]) * quantizer.scale[0]
    codes, scales = twin.weight_quantizer.quantize(hadamard(layer.weight.detach(), BLOCK))
    weight = twin.weight_quantizer.dequantize(codes, scales)
    wanted = nn.functional.linear(values.double(), weight.double(), layer.bias.detach().double())
    torch.testing.assert_close(twin(x).double(), wanted, rtol=0, atol=1e-4)


def test_rotation_makes_coarse_weights_finer_where_a_column_stands_out() -> None:
    layer = nn.Linear(CHANNELS, OUTPUTS, bias=False)
    with torch.no_grad():
        layer.weight[:, ::50] *= 8
    x = torch.randn(64, CHANNELS, generator=torch.Generator().manual_seed(0))
    found = []
    for block in (0, BLOCK):
        twin = QuantLinear.of(layer, (4, 8), 1, 0, StepState(1, 1), None, block)
        twin.set_mode(Mode.FLOAT)
        twin.quantize_weight()
        by_weight, _ = twin.output_errors(x)
        found.append(float(by_weight.detach().square().mean()))
    assert found[1] < 0.5 * found[0]


def test_gradient_passes_as_through_the_float_layer_of_its_codes() -> None:
    _, twin = rotated_layer((8, 8))
    twin.freeze()
    x = outliers(3, CHANNELS).requires_grad_()
    cotangent = torch.randn(3, OUTPUTS, generator=torch.Generator().manual_seed(1))
    twin(x).backward(cotangent)
    wanted = cotangent @ twin.dequantized_weight()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wanted, rtol=0, atol=1e-4)  # all inputs are within the range


def test_gradient_stops_where_a_rotated_channel_is_clipped() -> None:
    _, twin = rotated_layer((8, 8), bound=1.0)
    twin.freeze()
    x = (5 * outliers(3, CHANNELS)).requires_grad_()
    twin(x).sum().backward()
    scale = twin.quantizers[0].scale[0]
    codes = (hadamard(x.detach(), BLOCK) / scale).round() + twin.quantizers[0].zero_point[0]
    inside = ((codes >= -128) & (codes <= 127)).float()
    rows = torch.ones(3, OUTPUTS) @ hadamard(twin.dequantized_weight(), BLOCK)
    assert 0.05 < float(inside.mean()) < 0.5
    torch.testing.assert_close(x.grad, hadamard(rows * inside, BLOCK), rtol=0, atol=1e-3)


def test_weights_are_given_and_taken_as_the_float_layer_has_them() -> None:
    layer, twin = rotated_layer((8, 8))
    twin.freeze()
    assert sqnr_db(twin.dequantized_weight(), layer.weight.detach()) > 35
    other = torch.randn(OUTPUTS, CHANNELS, generator=torch.Generator().manual_seed(5))
    twin.requantize(other)
    assert sqnr_db(twin.dequantized_weight(), other) > 35


# ---- whole denoisers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "choice", "rotates"),
    [
        (4, 8, "auto", True),
        (3, 6, "auto", True),
        (4, 4, "auto", True),
        (8, 8, "auto", False),
        (6, 8, "auto", True),
        (8, 6, "auto", True),
        (8, 8, "on", True),
        (4, 8, "off", False),
    ],
)
def test_rotations_pay_below_8_bits(
    weight_bits: int, activation_bits: int, choice: Any, rotates: bool
) -> None:
    settings = QuantConfig(weight_bits=weight_bits, activation_bits=activation_bits, hadamard=choice)
    assert rotates_inputs(settings) == rotates


def quantized(name: str, choice: Any = "on") -> Any:
    """A tiny denoiser, calibrated; its feed-forward nets, wide enough, rotate."""
    case = make_case(name)
    settings = QuantConfig(
        weight_bits=8,
        num_groups=2,
        num_inference_steps=STEPS,
        histogram_images=3,
        grouping="dp",
        hadamard=choice,
        attention="float",
    )
    run = case.sampler(case.denoiser).run(5, 0, 2)
    adpdm.quantize(
        case.denoiser, settings, scheduler=case.scheduler, conditioning=case.conditioning, call=case.call
    )
    return case, run


def rotating(denoiser: nn.Module) -> list[str]:
    return [name for name, layer in quant_layers(denoiser).items() if layer.hadamard]


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "sdxl"])
def test_denoiser_rotates_samples_and_loads(name: str, tmp_path: Path) -> None:
    case, run = quantized(name)
    denoiser = case.denoiser
    assert rotating(denoiser)
    assert all(isinstance(quant_layers(denoiser)[layer], QuantLinear) for layer in rotating(denoiser))
    sampler = case.sampler(denoiser)
    with torch.no_grad():
        pred = sampler.predict(run.samples[1], sampler.calls[1], run.conditioning)
        assert sqnr_db(pred, run.noise_preds[1]) > 20
        assert all(info.fused for info in describe_fusion(denoiser) if info.kind != "QuantLinear")
        with unfused(denoiser):
            one_by_one = sampler.predict(run.samples[1], sampler.calls[1], run.conditioning)
    assert sqnr_db(pred, one_by_one) > 45  # float sums in other orders, and the codes that they tip
    denoiser.save_pretrained(tmp_path)
    loaded = type(denoiser).from_pretrained(tmp_path)
    assert rotating(loaded) == rotating(denoiser)
    assert torch.equal(case.sampler(loaded).run(5, 0, 2).final, sampler.run(5, 0, 2).final)


def test_layers_that_do_not_rotate_say_nothing_of_it() -> None:
    case, _ = quantized("dit", "off")
    assert not rotating(case.denoiser)
    rows = case.denoiser.config.quantization_config.layers
    assert all(set(row) == {"name", "weight_bits", "activation_bits", "split"} for row in rows)


def wide_attention(out_rotates: bool) -> tuple[Any, nn.Module]:
    """An attention of diffusers in a frozen host, with heads wide enough to rotate."""
    from diffusers.models.attention_processor import Attention

    host = nn.Module()
    host.block = Attention(64, heads=2, dim_head=32, bias=True).eval().requires_grad_(False)
    infos = [
        LayerInfo(name, 0, 0, (8, 8), "", None, 4 if "to_out" not in name or out_rotates else 0)
        for name, layer in host.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    swap_layers(host, infos, 1, lambda slots: StepState(slots, 1))
    for layer in quant_layers(host).values():
        ends = torch.tensor([4.0])
        layer.quantizers[0].set_ranges(-ends, ends, torch.zeros(1, dtype=torch.int32))
        layer.freeze()
    return host, host.block


@pytest.mark.parametrize("out_rotates", [True, False])
def test_attention_multiplies_codes_whether_or_not_its_reader_rotates(out_rotates: bool) -> None:
    host, block = wide_attention(out_rotates)
    fuse_blocks(host, "int8")
    assert [info.attention for info in describe_fusion(host)] == ["int8"]
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fused = block(x)
        with unfused(host):
            assert sqnr_db(fused, block(x)) > 30  # 8-bit scores, where they are


def test_operators_that_rotate_nothing_refuse_a_reader_that_does() -> None:
    host, _ = wide_attention(out_rotates=True)
    layer = next(iter(quant_layers(host).values()))
    (reader,) = layer.packed(torch.device("cpu")).quantizers
    assert reader.hadamard == 4
    x = torch.zeros(1, 32, 4, 4)
    with pytest.raises(AssertionError, match="whole rows, whose channels are rotated"):
        ops.group_norm_quantize_each([x, x], None, None, [reader, reader], 4, 1e-5, ops.Activation.NONE)


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [True, 3, 0, 256, "4", None])
def test_checkpoint_with_a_block_that_no_layer_has_is_refused(block: Any, tmp_path: Path) -> None:
    case, _ = quantized("dit")
    case.denoiser.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    row = next(row for row in config["quantization_config"]["layers"] if "hadamard" in row)
    row["hadamard"] = block
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"hadamard of layer '{row['name']}' must be one of"):
        type(case.denoiser).from_pretrained(tmp_path)


def test_tables_give_the_same_bits(tmp_path: Path) -> None:
    case = make_case("dit")
    settings = QuantConfig(
        weight_bits=4,
        num_groups=2,
        num_inference_steps=STEPS,
        histogram_images=2,
        grouping="dp",
        weight_rounding="nearest",
        hadamard="auto",
    )
    adpdm.quantize(case.denoiser, settings, scheduler=case.scheduler, conditioning=case.conditioning)
    assert rotating(case.denoiser)
    adpdm.save_tables(case.denoiser, tmp_path / "tables.safetensors")
    again = make_case("dit").denoiser
    adpdm.load_tables(again, tmp_path / "tables.safetensors")
    wanted, got = case.denoiser.state_dict(), again.state_dict()
    assert sorted(got) == sorted(wanted)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_learned_rounding_and_search_see_what_the_kernels_see() -> None:
    case = make_case("dit")
    settings = QuantConfig(
        weight_bits=4,
        num_groups=2,
        num_inference_steps=STEPS,
        histogram_images=2,
        calibration_images=2,
        hadamard="auto",
        search=adpdm.SearchConfig(num_steps=4, refit_steps=2, batch_size=2, keep_if_worse=True),
    )
    report = adpdm.quantize(case.denoiser, settings, scheduler=case.scheduler, conditioning=case.conditioning)
    learned = [name for name in rotating(case.denoiser) if name in report.trace.rounding]
    assert learned
    assert all(report.trace.rounding[name] < 1 for name in learned)  # error over that of nearest
    assert report.trace.outcome is not None
    assert report.trace.outcome.soft_loss < 0.5


def test_half_precision_is_not_rounded_between_rotation_and_quantizer() -> None:
    _, twin = rotated_layer((8, 8))
    twin.freeze()
    x = outliers(64, CHANNELS).bfloat16()
    (quantizer,) = twin.packed(torch.device("cpu")).quantizers
    codes = twin.packed(torch.device("cpu")).quantize([x])[0]
    wanted = twin.quantizers[0].codes(hadamard(x, BLOCK))
    assert torch.equal(codes, wanted)
    assert not torch.equal(codes, twin.quantizers[0].codes(hadamard(x, BLOCK).bfloat16()))
    x.requires_grad_()
    twin.bfloat16()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert quantizer.hadamard == BLOCK


def test_doctor_tells_which_layers_rotate() -> None:
    layer, twin = rotated_layer()
    assert shape_of(twin) == f"linear {CHANNELS}->{OUTPUTS}, channels rotated"
    assert shape_of(layer) == f"linear {CHANNELS}->{OUTPUTS}"
