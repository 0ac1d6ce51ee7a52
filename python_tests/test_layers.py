"""QuantConv2d and QuantLinear: integer codes, integer and fake-quantized outputs, copies and stored forms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adpdm
from adpdm import QuantConfig, reference
from adpdm.nn import QuantLayer, quant_layers
from adpdm.nn.layers import QuantConv2d, QuantLinear
from adpdm.quantizers.activation import Mode
from adpdm.step import StepState
from adpdm.testing import ddim_scheduler, tiny_unet

STEPS, GROUPS = 4, 3
UNIT_ROUNDOFF = 2.0**-24  # of float32


def set_ranges(layer: QuantLayer, generator: torch.Generator) -> None:
    """Random ranges, some one-sided, and tables that use every group."""
    for quantizer in layer.quantizers:
        low, high = (torch.rand(GROUPS, generator=generator) * 2 for _ in range(2))
        low[0] = 0.0
        quantizer.set_ranges(-low, high, torch.tensor([2, 0, 1, 2], dtype=torch.int32))


def build(
    layer: nn.Conv2d | nn.Linear, bits: tuple[int, int], split: int | None, generator: torch.Generator
) -> tuple[QuantLayer, StepState]:
    """The twin of a float layer, calibrated, not yet frozen."""
    step = StepState(1 if split is None else 2, STEPS)
    kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    twin = kind.of(layer, bits, GROUPS, 0, step, split)
    set_ranges(twin, generator)
    step.set_step(0)
    return twin, step


def real_weight(twin: QuantLayer) -> Tensor:
    """The float64 values that the integer weight codes stand for."""
    codes, scales = twin.codes(), twin.weight_scale.double()
    parts = twin.weight_quantizer.segments(codes)
    shape = (-1,) + (1,) * (codes.dim() - 1)
    return torch.cat([c.double() * s.view(shape) for c, s in zip(parts, scales, strict=True)], 1)


def real_input(twin: QuantLayer, x: Tensor) -> Tensor:
    """The float64 values of the reference's input codes; checks the layer's codes bit for bit."""
    values = []
    for quantizer, part in zip(twin.quantizers, twin.split_input(x), strict=True):
        group = quantizer.group_index
        wanted = reference.quantize(part, quantizer.scale, quantizer.zero_point, group, quantizer.num_bits)
        assert torch.equal(quantizer.codes(part), wanted)
        z, s = (p[int(group)].double() for p in (quantizer.zero_point, quantizer.scale))
        values.append((wanted.double() - z) * s)
    return torch.cat(values, twin.channel_dim)


def assert_integer_output(twin: QuantLayer, x: Tensor, functional: Any) -> None:
    """Compare the frozen layer with float64 arithmetic on the real values of its codes."""
    operands = (real_input(twin, x), real_weight(twin))
    bias = None if twin.bias is None else twin.bias.detach().double()
    wanted = functional(*operands, bias)
    magnitude = functional(*(t.abs() for t in operands), None if bias is None else bias.abs())
    # Per segment one rounding of scale_a * scale_w, one of an integer sum beyond 2^24, one multiply-add.
    slack = 3 * len(twin.quantizers) * UNIT_ROUNDOFF * magnitude
    actual = twin(x)
    assert actual.dtype == x.dtype
    assert bool(((actual.double() - wanted).abs() <= slack).all())


@settings(max_examples=30)
@given(
    channels=st.integers(1, 12),
    outputs=st.integers(1, 9),
    groups=st.sampled_from([1, 1, 2, 3]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 3)),
    dilation=st.integers(1, 2),
    batch=st.integers(0, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    has_bias=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 999),
)
def test_conv2d_in_integers_equals_real_arithmetic(
    channels: int,
    outputs: int,
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: int,
    batch: int,
    size: tuple[int, int],
    bits: tuple[int, int],
    has_bias: bool,
    channels_last: bool,
    seed: int,
) -> None:
    assume(all(n + 2 * p >= dilation * (k - 1) + 1 for n, p, k in zip(size, padding, kernel, strict=True)))
    channels, outputs = channels * groups, outputs * groups
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, has_bias)
    split = channels // 2 if groups == 1 and channels > 1 and seed % 2 else None
    twin, step = build(conv, bits, split, generator)
    twin.freeze()
    x = torch.randn(batch, channels, *size, generator=generator)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    step.set_step(seed % STEPS)

    def functional(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, w, bias, stride, padding, dilation, groups)

    assert_integer_output(twin, x, functional)


def test_conv2d_quantizes_contiguous_inputs_to_channels_last(generator: torch.Generator) -> None:
    twin, _ = build(nn.Conv2d(7, 3, 3), (8, 8), 4, generator)
    twin.freeze()
    parts = twin.split_input(torch.randn(2, 7, 5, 6, generator=generator))
    codes = twin.packed(torch.device("cpu")).quantize(parts)
    assert [tuple(part.shape) for part in codes] == [(2, 4, 5, 6), (2, 3, 5, 6)]
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in codes)


@settings(max_examples=30)
@given(
    leading=st.lists(st.integers(0, 4), max_size=2),
    features=st.integers(1, 70),
    outputs=st.integers(1, 20),
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    has_bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_linear_in_integers_equals_real_arithmetic(
    leading: list[int], features: int, outputs: int, bits: tuple[int, int], has_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    split = features // 3 if features > 2 and seed % 2 else None
    twin, step = build(nn.Linear(features, outputs, has_bias), bits, split, generator)
    twin.freeze()
    step.set_step(seed % STEPS)
    assert_integer_output(twin, torch.randn(*leading, features, generator=generator), F.linear)


@pytest.mark.parametrize("split", [None, 5])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_frozen_output_equals_fake_quantized_output(
    kind: str, split: int | None, generator: torch.Generator
) -> None:
    layer: nn.Conv2d | nn.Linear = nn.Conv2d(12, 7, 3, padding=1) if kind == "conv" else nn.Linear(12, 7)
    x = torch.randn(2, 12, 6, 6, generator=generator) if kind == "conv" else torch.randn(9, 12)
    twin, step = build(layer, (8, 8), split, generator)
    twin.quantize_weight()
    for k in range(STEPS):
        step.set_step(k)
        for quantizer in twin.quantizers:
            quantizer.mode = Mode.FAKE
        fake = twin(x)
        frozen = copy.deepcopy(twin)
        frozen.freeze()  # in integers from here on, whatever its quantizers did before
        terms = layer.weight[0].numel() + 1
        weight, bias = real_weight(frozen).abs(), layer.bias.detach().double().abs()
        magnitude = (F.conv2d if kind == "conv" else F.linear)(
            real_input(twin, x).abs(), weight, bias, **({"padding": 1} if kind == "conv" else {})
        )
        # float32 accumulation of K products, and the rounding of both operands and of the integer epilogue.
        assert bool(((frozen(x) - fake).abs() <= (terms + 8) * UNIT_ROUNDOFF * magnitude).all())


def rounding(layer: nn.Module, operands: tuple[Tensor, Tensor, Tensor], terms: int) -> Tensor:
    """Bound on the float32 rounding of a layer's output: `terms` products added up, in any order."""
    x, weight, bias = (t.detach().double().abs() for t in operands)
    output = (
        layer._conv_forward(x, weight, bias) if isinstance(layer, nn.Conv2d) else F.linear(x, weight, bias)
    )
    return (terms + 4) * UNIT_ROUNDOFF * output


@pytest.mark.parametrize("split", [None, 5])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_corrected_bias_takes_the_mean_error_out_of_every_channel(
    kind: str, split: int | None, generator: torch.Generator
) -> None:
    layer: nn.Conv2d | nn.Linear = nn.Conv2d(12, 7, 3, padding=1) if kind == "conv" else nn.Linear(12, 7)
    shape = (3, 12, 6, 6) if kind == "conv" else (4, 9, 12)
    x = torch.randn(shape, generator=generator) + 0.5  # activations with a mean turn weight errors into one
    twin, step = build(layer, (3, 4), split, generator)
    twin.quantize_weight()
    step.set_step(1)
    others = [0, 2, 3] if kind == "conv" else [0, 1]
    wanted = layer(x)

    def mean_error() -> Tensor:
        twin.set_mode(Mode.FAKE)
        output = twin(x)
        twin.set_mode(Mode.FLOAT)
        return (output.double() - wanted.double()).mean(others)

    before = mean_error().detach()
    twin.bias_shift = twin.output_shift(x).float()
    assert all(q.mode is Mode.FLOAT for q in twin.quantizers)
    assert torch.equal(twin(x), wanted)  # the float path, teacher of the search, knows no shift
    assert twin.bias is layer.bias
    bias = layer.bias.detach().abs() + twin.bias_shift.abs()
    terms = layer.weight[0].numel() + 1
    slack = rounding(layer, (x, layer.weight, layer.bias), terms)
    # Quantized operands are at most one step, of 2^-2 of the largest weight, beyond the float ones.
    ceiling = layer.weight.detach().abs() + layer.weight.detach().abs().max() / 4
    slack = slack + 2 * rounding(layer, (x, ceiling, bias), terms)
    assert bool((mean_error().abs() <= slack.mean(others)).all())
    assert float(before.abs().max()) > 100 * float(slack.detach().max())


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_freezing_adds_the_shift_once(kind: str, generator: torch.Generator) -> None:
    layer: nn.Conv2d | nn.Linear = nn.Conv2d(6, 5, 1) if kind == "conv" else nn.Linear(6, 5)
    x = torch.randn(2, 6, 3, 3, generator=generator) if kind == "conv" else torch.randn(4, 6)
    twin, step = build(layer, (8, 8), None, generator)
    twin.quantize_weight()
    step.set_step(2)
    original, shift = layer.bias.detach().clone(), torch.randn(5, generator=generator)
    twin.bias_shift = shift
    twin.freeze()
    assert twin.bias is not None
    assert torch.equal(twin.bias, original + shift)
    assert torch.equal(layer.bias, original)  # an interrupted run goes back to this layer
    assert twin.bias_shift is None
    assert_integer_output(twin, x, F.conv2d if kind == "conv" else F.linear)


def test_outputs_follow_the_step(generator: torch.Generator) -> None:
    twin, step = build(nn.Linear(6, 4), (8, 4), None, generator)
    twin.freeze()
    x = torch.randn(3, 6, generator=generator)
    outputs = []
    for k in range(STEPS):
        step.set_step(k)
        outputs.append(twin(x))
    assert torch.equal(outputs[0], outputs[3])  # both in group 2
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_float_and_observing_layers_do_not_change_the_output(generator: torch.Generator) -> None:
    conv = nn.Conv2d(4, 5, 3, stride=2, padding=1)
    x = torch.randn(2, 4, 7, 7, generator=generator)
    wanted = conv(x)
    twin, _ = build(conv, (8, 8), 3, generator)
    assert torch.equal(twin(x), wanted)
    for quantizer in twin.quantizers:
        quantizer.start_observing(STEPS)
    assert torch.equal(twin(x), wanted)
    counts = [int(q.counts.sum()) for q in twin.quantizers if q.counts is not None]
    assert counts == [2 * 3 * 49, 2 * 1 * 49]  # each half saw its own channels
    assert twin.quantizers[1].extrema is not None
    assert twin.quantizers[1].extrema[0].tolist() == [float(x[:, 3].min()), float(x[:, 3].max())]


def test_split_halves_have_weight_scales_of_their_own() -> None:
    linear = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[100.0, -50.0, 0.1, -0.05]]))
    twin, _ = build(linear, (8, 8), 2, torch.Generator().manual_seed(0))
    twin.freeze()
    # One scale for both halves, 100 / 127, would round the second one to zero.
    assert int(twin.codes().abs().min()) >= 63
    assert float(twin.weight_scale[0] / twin.weight_scale[1]) == pytest.approx(1000, rel=0.02)


@pytest.mark.parametrize(
    ("bits", "dtype"), [(2, torch.uint8), (4, torch.uint8), (5, torch.int8), (8, torch.int8)]
)
def test_weights_up_to_four_bits_are_stored_two_to_a_byte(
    bits: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    twin, _ = build(nn.Conv2d(10, 3, 3), (bits, 8), None, generator)
    before = twin.codes()
    twin.freeze()
    assert twin.weight.dtype == dtype
    # 90 columns are three blocks of 32, of 16 bytes each.
    assert tuple(twin.weight.shape) == ((3, 48) if bits <= 4 else (3, 10, 3, 3))
    assert not twin.weight.requires_grad
    assert torch.equal(twin.codes(), before)


def test_four_bit_weights_are_packed_to_these_bytes() -> None:
    linear = nn.Linear(33, 1, bias=False)
    values = torch.arange(33) % 15 - 7
    with torch.no_grad():
        linear.weight.copy_(values[None].float())
    twin, _ = build(linear, (4, 8), None, torch.Generator().manual_seed(0))
    twin.freeze()
    codes = [int(v) & 0xF for v in values]
    first = [codes[j] | codes[j + 16] << 4 for j in range(16)]
    assert twin.weight.tolist() == [[*first, codes[32], *([0] * 15)]]
    assert float(twin.weight_scale) == 1.0


class Pair(nn.Module):
    """Two frozen layers and their clock, as in a denoiser."""

    def __init__(self, bits: tuple[int, int] = (4, 8), calibrated: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        step = StepState(3, STEPS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            conv, linear = nn.Conv2d(4, 5, 3), nn.Linear(5, 6)
        self.conv = QuantConv2d.of(conv, bits, GROUPS, 0, step, 2)
        self.linear = QuantLinear.of(linear, bits, GROUPS, 2, step, None)
        for layer in (self.conv, self.linear):
            if calibrated:
                set_ranges(layer, generator)
                layer.freeze()
            else:
                layer.prepare_frozen()
        self.add_module("adpdm_step", step)

    @property
    def step(self) -> StepState:
        step = self.get_submodule("adpdm_step")
        assert isinstance(step, StepState)
        return step

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).permute(0, 2, 3, 1))


def test_deepcopy_shares_one_clock_within_the_copy_only(generator: torch.Generator) -> None:
    x = torch.randn(2, 4, 5, 5, generator=generator)
    original = Pair()
    by_step = []
    for k in range(STEPS):
        original.step.set_step(k)
        by_step.append(original(x))
    duplicate = copy.deepcopy(original)
    original.step.set_step(0)
    duplicate.step.set_step(1)
    assert torch.equal(original(x), by_step[0])
    assert torch.equal(duplicate(x), by_step[1])
    for layer in (duplicate.conv, duplicate.linear):
        assert all(q.step is duplicate.step for q in layer.quantizers)
    original.conv.weight.data.zero_()
    assert torch.equal(duplicate(x), by_step[1])


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (3, 5)])
def test_state_dict_round_trip(bits: tuple[int, int], generator: torch.Generator) -> None:
    x = torch.randn(2, 4, 5, 5, generator=generator)
    original, loaded = Pair(bits), Pair(bits, calibrated=False)
    assert sorted(original.state_dict()) == sorted(loaded.state_dict())
    assert sum("table" in key for key in original.state_dict()) == 1
    loaded.load_state_dict(copy.deepcopy(original.state_dict()))
    for k in range(STEPS):
        original.step.set_step(k)
        loaded.step.set_step(k)
        assert torch.equal(loaded(x), original(x))


def test_load_state_dict_refuses_a_missing_scale() -> None:
    # Known defect elsewhere: calibrated ranges not saved, or skipped silently when they are missing.
    state = Pair().state_dict()
    del state["conv.input_quantizers.1.scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*conv.input_quantizers.1.scale"):
        Pair(calibrated=False).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_run_the_same_codes(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    twin, _ = build(nn.Linear(16, 8), (8, 8), None, generator)
    twin.freeze()
    x = torch.randn(5, 16, generator=generator).to(dtype)
    actual = twin(x)
    assert actual.dtype == dtype
    assert torch.equal(actual, twin(x.float()).to(dtype))  # one rounding at the end


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_keeps_scales_in_float32(dtype: torch.dtype, generator: torch.Generator) -> None:
    pair, cast = Pair(), Pair().to(dtype)
    for before, after in ((pair.conv, cast.conv), (pair.linear, cast.linear)):
        assert torch.equal(after.weight_scale, before.weight_scale)
        assert torch.equal(after.weight, before.weight)
        for a, b in zip(after.quantizers, before.quantizers, strict=True):
            assert torch.equal(a.scale, b.scale)
    assert cast(torch.randn(1, 4, 5, 5, generator=generator).to(dtype)).dtype == dtype


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grouping", ["shared", "uniform"])
def test_gradients_pass_integer_layers_within_their_ranges(training: bool, grouping: Any) -> None:
    unet = tiny_unet()
    groups = 1 if grouping == "shared" else 2
    config = QuantConfig(grouping=grouping, num_groups=groups, num_inference_steps=2, histogram_images=1)
    adpdm.quantize(unet, config, scheduler=ddim_scheduler())
    unet.train(training)
    for layer in quant_layers(unet).values():
        unet.adpdm_step.set_step(0)
        # Twice the range, so that a part is clipped.
        low, high = (float(end[int(layer.quantizers[0].group_index)]) for end in layer.quantizers[0].ranges())
        shape = (2, layer.in_channels, 5, 5) if isinstance(layer, nn.Conv2d) else (3, layer.in_features)
        x = (torch.rand(shape) * 2 - 0.5) * (high - low) + low
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        result = layer(ours)
        layer.set_mode(Mode.FAKE)
        wanted = layer.multiply(layer.fake_input(theirs), layer.dequantized_weight(), layer.bias)
        direction = torch.randn(wanted.shape)
        (exact,) = torch.autograd.grad(wanted, theirs, direction)
        unet.adpdm_step.set_step(1)  # what comes after the forward must not change its gradient
        (got,) = torch.autograd.grad(result, ours, direction)
        assert torch.allclose(got, exact, rtol=1e-4, atol=1e-5)
        assert 0 < (exact == 0).float().mean() < 1


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_pass_a_whole_model(training: bool) -> None:
    unet = tiny_unet()
    original = copy.deepcopy(unet)
    config = QuantConfig(grouping="shared", num_groups=1, num_inference_steps=2, histogram_images=4)
    adpdm.quantize(unet, config, scheduler=ddim_scheduler())
    unet.train(training)
    gradients = []
    for model in (unet, original):
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        direction = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        gradients += torch.autograd.grad(model(x, 500).sample, x, direction)
    assert torch.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), 0) > 0.98


def test_packed_form_outlives_a_move_that_moves_nothing(generator: torch.Generator) -> None:
    twin, _ = build(nn.Linear(16, 8, bias=False), (8, 8), None, generator)
    twin.freeze()
    packed = twin.packed(torch.device("cpu"))
    twin.to("cpu").float()
    assert twin._packed is packed
    for move in ({"dtype": torch.bfloat16}, {"device": "meta"}):
        twin.to(**move)
        assert twin._packed is None
        if twin.weight.device.type == "cpu":
            assert twin.packed(torch.device("cpu")) is not packed
