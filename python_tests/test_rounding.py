"""Learned rounding of weights: which inputs it sees, and that outputs come nearer than by plain rounding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adpdm
from adpdm import QuantConfig, ops, rounding
from adpdm.nn import QuantConv2d, QuantLayer, QuantLinear, quant_layers
from adpdm.quantizers.activation import Mode
from adpdm.rounding import ColumnBlock, LayerInputs, round_columns
from adpdm.step import StepState
from adpdm.testing import ddim_scheduler, tiny_unet

STEPS = 4


def quantized(layer: nn.Conv2d | nn.Linear, bits: int = 4, split: int | None = None) -> Any:
    """A twin of the layer in float mode, whose activations cover [-4, 4] in 8 bits."""
    state = StepState(1 if split is None else 2, STEPS)
    kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    twin = kind.of(layer, (bits, 8), 1, 0, state, split)
    for quantizer in twin.quantizers:
        quantizer.set_ranges(torch.tensor([-4.0]), torch.tensor([4.0]), torch.zeros(STEPS, dtype=torch.int32))
    twin.set_mode(Mode.FLOAT)
    return twin.requires_grad_(False)


def smooth(*shape: int, seed: int = 0) -> Tensor:
    """Inputs whose channels depend on one another, as in a network, [*shape] with channels second."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    hidden = torch.randn(shape[0], 3, *shape[2:], generator=generator)
    mixing = torch.randn(channels, 3, generator=torch.Generator().manual_seed(99))
    noise = 0.1 * torch.randn(shape, generator=generator)
    return (torch.einsum("ch,nh...->nc...", mixing, hidden) + noise + 0.5).clamp(-3.9, 3.9)


def weighted_error(error: Tensor, moments: Tensor) -> float:
    return float(((error @ moments) * error).sum())


def moments_of(columns: int, seed: int = 0) -> Tensor:
    x = smooth(400, columns, seed=seed).double()
    return x.t() @ x / len(x)


def test_columns_without_correlation_are_rounded_to_nearest() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 10, generator=generator).double()
    scale = torch.full_like(weight, 0.3)
    moments = torch.diag(torch.rand(10, generator=generator).double() + 0.1)
    codes = round_columns(weight, scale, moments, 7)
    assert torch.equal(codes.double(), (weight / scale).round().clamp(-7, 7))


def test_codes_are_near_the_best_there_are() -> None:
    # All 3^6 roundings of a row (down, nearest, up) are tried; greedy need not find the best, but comes near.
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 6, generator=generator).double()
    scale = torch.full_like(weight, 0.4)
    moments = moments_of(6)
    codes = round_columns(weight, scale, moments, 7).double()
    nearest = (weight / scale).round()
    for row in range(8):
        offsets = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=6))).double()
        errors = weight[row] - (nearest[row] + offsets).clamp(-7, 7) * scale[row]
        best = ((errors @ moments) * errors).sum(1).min()
        mine = weighted_error((weight[row] - codes[row] * scale[row])[None], moments)
        plain = weighted_error((weight[row] - nearest[row] * scale[row])[None], moments)
        assert mine <= max(0.6 * plain, 2.0 * float(best) + 1e-12)


def textbook(weight: Tensor, scale: Tensor, moments: Tensor, bound: int) -> Tensor:
    """GPTQ as published: errors are passed on by the factor of the inverse of the damped moments."""
    order = moments.diagonal().argsort(descending=True, stable=True)
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(len(moments)).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    rest, codes = weight[:, order].clone(), torch.empty_like(weight)
    for k, column in enumerate(order.tolist()):
        codes[:, column] = (rest[:, k] / scale[:, column]).round().clamp(-bound, bound)
        error = rest[:, k] - codes[:, column] * scale[:, column]
        rest[:, k:] -= torch.outer(error / factor[k, k], factor[k, k:])
    return codes.to(torch.int8)


@pytest.mark.parametrize("columns", [1, 2, 50, 300])
def test_codes_are_those_of_gptq_as_published(columns: int) -> None:
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(5, columns, generator=generator).double()
    scale = 0.2 + 0.2 * torch.rand(5, columns, generator=generator).double()
    moments = moments_of(columns)
    found = round_columns(weight, scale, moments, 7)
    assert torch.equal(found, textbook(weight, scale, moments, 7))
    assert not torch.equal(found.double(), (weight / scale).round().clamp(-7, 7)) or columns < 50


def test_moments_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = smooth(30, 20)
    everything = slice(None)
    blocks = []
    for rows in (7, 288):
        monkeypatch.setattr(rounding, "MOMENT_ROWS", rows)
        second = torch.zeros(20, 20, dtype=torch.float64)
        block = ColumnBlock(everything, everything, everything, second, torch.zeros(20, dtype=torch.float64))
        block.add(x[:10])
        block.add(x[10:])
        blocks.append(block)
    wanted = (x[:10].double().t() @ x[:10].double()) / 10 + (x[10:].double().t() @ x[10:].double()) / 20
    for block in blocks:
        torch.testing.assert_close(block.moments(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(block.first, x[:10].double().mean(0) + x[10:].double().mean(0))


@pytest.mark.parametrize("bound", [1, 7, 127])
def test_codes_stay_within_the_bound(bound: int) -> None:
    weight = 100 * torch.randn(4, 40, generator=torch.Generator().manual_seed(3)).double()
    codes = round_columns(weight, torch.full_like(weight, 0.1), moments_of(40), bound)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) == bound


def test_inputs_that_are_always_zero_do_not_spoil_the_rest() -> None:
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(4)).double()
    scale, moments = torch.full_like(weight, 0.25), moments_of(5)
    moments[2], moments[:, 2] = 0, 0
    codes = round_columns(weight, scale, moments, 7)
    assert torch.equal(codes[:, 2].double(), (weight / scale).round()[:, 2].clamp(-7, 7))
    everything = round_columns(
        weight, scale, torch.zeros_like(moments), 7
    )  # an input that never was anything
    assert torch.equal(everything.double(), (weight / scale).round().clamp(-7, 7))


def test_inputs_that_never_change_do_not_spoil_the_rest() -> None:
    """Their centred moments are what rounding leaves of zero: of either sign, larger than the diagonal."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(3, 20, generator=generator).double()
    scale = torch.full_like(weight, 0.3)
    moments = moments_of(20)
    moments[:4], moments[:, :4] = 0, 0
    moments[0, 1] = moments[1, 0] = 1e-7
    moments[2, 2], moments[3, 3] = -1e-9, 1e-12
    rest = round_columns(weight[:, 4:], scale[:, 4:], moments[4:, 4:], 7)
    codes = round_columns(weight, scale, moments, 7)
    assert int(codes.abs().max()) <= 7
    assert (codes[:, 4:] != rest).double().mean() < 0.1  # damping is a share of a mean
    nothing_else = round_columns(weight[:, :4], scale[:, :4], moments[:4, :4], 7)
    assert int(nothing_else.abs().max()) <= 7


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(5)).double()
    scale = torch.full_like(weight, 0.3)
    whole = round_columns(weight, scale, moments_of(50), 7)
    monkeypatch.setattr(rounding, "LAZY_COLUMNS", 7)
    assert torch.equal(round_columns(weight, scale, moments_of(50), 7), whole)


CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": (0, 1)},
    {"kernel_size": (3, 1), "padding": (2, 0), "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2},
]


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_rows_are_what_the_convolution_multiplies(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Conv2d(4, 6, bias=False, **settings))
    x = smooth(2, 4, 7, 6)
    rows = rounding._input_rows(layer, x, torch.Generator())  # all positions: there are few
    layer.set_mode(Mode.FAKE)
    layer.set_codes(*layer.weight_quantizer.quantize(layer.weight))
    wanted = layer.matmul(x).permute(0, 2, 3, 1).reshape(-1, 6)
    weight = layer.effective_weight().flatten(1)
    groups = [
        part.flatten(1) @ w.t()
        for part, w in zip(rows.chunk(layer.groups, 1), weight.chunk(layer.groups), strict=True)
    ]
    torch.testing.assert_close(torch.cat(groups, 1), wanted, rtol=1e-5, atol=1e-5)


def test_rows_of_a_linear_layer_pass_both_quantizers_of_a_split() -> None:
    layer = quantized(nn.Linear(6, 2), split=2)
    layer.quantizers[1].set_ranges(
        torch.tensor([-1.0]), torch.tensor([1.0]), torch.zeros(STEPS, dtype=torch.int32)
    )
    x = smooth(5, 6)
    rows = rounding._input_rows(layer, x, torch.Generator())[..., 0]
    layer.set_mode(Mode.FAKE)
    assert torch.equal(rows, layer.fake_input(x))
    assert float(rows[:, 2:].max()) <= 1.0 < float(rows[:, :2].max())


def test_positions_are_drawn_where_there_are_many() -> None:
    layer = quantized(nn.Conv2d(4, 6, 3, padding=1))
    x = smooth(3, 4, 20, 20)
    first, again, other = (
        rounding._input_rows(layer, x, torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert first.shape == (rounding.ROWS_PER_CALL, 4, 9)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("max_columns", [18, 2304])
def test_blocks_cover_every_weight_once(
    groups: int, max_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "MAX_COLUMNS", max_columns)
    layer = quantized(nn.Conv2d(8, 6, 3, groups=groups))
    seen = torch.zeros(6, layer.weight[0].numel())
    for block in LayerInputs(layer, 0, True).blocks:
        seen[block.rows, block.columns] += 1
        width = (block.channels.stop - block.channels.start) * 9
        assert width == block.columns.stop - block.columns.start <= max_columns
    assert torch.equal(seen, torch.ones_like(seen))


@pytest.mark.parametrize("max_columns", [36, 2304])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(8, 12, 3, padding=1),
        lambda: nn.Conv2d(8, 12, 3, padding=1, bias=False),
        lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2),
        lambda: nn.Linear(24, 12),
    ],
)
def test_outputs_on_new_inputs_come_nearer(
    make: Any, max_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "MAX_COLUMNS", max_columns)
    torch.manual_seed(1)
    layer = quantized(make())
    shape = (4, 8, 12, 12) if isinstance(layer, nn.Conv2d) else (300, 24)
    inputs = LayerInputs(layer, 0, True)
    for seed in range(3):
        inputs.observe(smooth(*shape, seed=seed))
    codes, scales, ratio = inputs.round()
    fresh = smooth(*shape, seed=17)
    errors = []
    for pair in (layer.weight_quantizer.quantize(layer.weight), (codes, scales)):
        layer.set_codes(*pair)
        error = layer.output_errors(fresh)[0]
        if layer.bias is not None:  # the bias takes the mean away
            others = [d for d in range(error.dim()) if d != layer.channel_dim % error.dim()]
            error = error - error.mean(others, keepdim=True)
        errors.append(float(error.square().mean()))
    assert codes.shape == layer.weight.shape
    assert ratio < 0.7
    assert errors[1] < 0.8 * errors[0]


def test_means_count_where_no_bias_will_be_corrected() -> None:
    layer = quantized(nn.Linear(24, 12))
    errors = []
    for corrects_bias in (True, False):
        inputs = LayerInputs(layer, 0, corrects_bias)
        for seed in range(3):
            inputs.observe(smooth(300, 24, seed=seed) + 1)
        codes, scales, _ = inputs.round()
        layer.set_codes(codes, scales)
        errors.append(float(layer.output_errors(smooth(300, 24, seed=17) + 1)[0].square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_calibration_says_whether_biases_are_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    class Watched(LayerInputs):
        def __init__(self, layer: QuantLayer, seed: int, corrects_bias: bool) -> None:
            super().__init__(layer, seed, corrects_bias)
            told.append(corrects_bias)

    monkeypatch.setattr(rounding, "LayerInputs", Watched)
    for corrects_bias in (False, True):
        told.clear()
        quantize_tiny(correct_bias=corrects_bias)
        assert set(told) == {corrects_bias}


def rotated(weight: Tensor, layer: Any) -> Tensor:
    """The weight that a layer has codes of."""
    return ops.hadamard(weight, layer.hadamard) if layer.hadamard else weight


def quantize_tiny(**changes: Any) -> Any:
    unet = tiny_unet()
    settings = QuantConfig(
        **{
            "weight_bits": 4,
            "grouping": "dp",
            "num_groups": 2,
            "num_inference_steps": STEPS,
            "histogram_images": 4,
            "raised_layers": 0.0,
            **changes,
        }
    )
    report = adpdm.quantize(unet, settings, scheduler=ddim_scheduler())
    return unet, report


def test_a_denoiser_keeps_the_codes_that_were_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    learned: dict[int, Tensor] = {}
    plain = QuantLayer.set_codes

    def watched(layer: QuantLayer, codes: Tensor, scales: Tensor) -> None:
        learned[id(layer)] = codes
        plain(layer, codes, scales)

    monkeypatch.setattr(QuantLayer, "set_codes", watched)
    unet, report = quantize_tiny()
    layers = quant_layers(unet)
    assert report.trace.rounding.keys() == layers.keys()
    assert all(torch.equal(layer.codes(), learned[id(layer)]) for layer in layers.values())
    assert sum(report.trace.rounding.values()) / len(layers) < 0.8


def test_little_memory_takes_more_passes_and_gives_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_tiny()[0]
    monkeypatch.setattr(rounding, "MEMORY_LIMIT", 300_000)
    parts = quantize_tiny()[0]
    pairs = zip(quant_layers(whole).values(), quant_layers(parts).values(), strict=True)
    assert all(torch.equal(a.weight, b.weight) for a, b in pairs)


def test_nearest_is_the_plain_rounding() -> None:
    unet, report = quantize_tiny(weight_rounding="nearest")
    original = dict(tiny_unet().named_modules())
    assert report.trace.rounding == {}
    for name, layer in quant_layers(unet).items():
        codes, scales = layer.weight_quantizer.quantize(rotated(original[name].weight, layer))
        assert torch.equal(layer.codes(), codes)
        assert torch.equal(layer.weight_scale, scales)


def test_weights_of_eight_bits_are_rounded_to_nearest() -> None:
    plain, learned = (
        quantize_tiny(weight_bits=8, weight_rounding="nearest")[0],
        quantize_tiny(weight_bits=8)[0],
    )
    pairs = zip(quant_layers(plain).values(), quant_layers(learned).values(), strict=True)
    assert all(torch.equal(a.weight, b.weight) for a, b in pairs)


def test_a_layer_that_was_raised_to_eight_bits_is_rounded_to_nearest() -> None:
    unet, report = quantize_tiny(raised_layers=0.3)
    original = dict(tiny_unet().named_modules())
    raised = {n: x for n, x in quant_layers(unet).items() if x.weight_quantizer.num_bits == 8}
    assert raised
    assert report.trace.rounding.keys() == quant_layers(unet).keys() - raised.keys()
    for name, layer in raised.items():
        weight = rotated(original[name].weight, layer)
        assert torch.equal(layer.codes(), layer.weight_quantizer.quantize(weight)[0])
