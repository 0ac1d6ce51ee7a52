"""Layers quantized from their weight alone: values, gradients, odd inputs, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adpdm import reference
from adpdm.nn import LoadedConv2d, LoadedLayer, LoadedLinear, float_twin
from adpdm.nn.loaded import measure, quantize_rows
from adpdm.operands import OutputQuantizer
from adpdm.qparams import CHUNK, weight_codes, weight_scale_mse

CPU = torch.device("cpu")
BITS = [(8, None), (4, None), (8, 8), (4, 8), (8, 4)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conv(**settings: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(6, 8, 3, **{"padding": 1, **settings})


def linear(**settings: Any) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(20, 7, **settings)


def loaded(layer: nn.Conv2d | nn.Linear, bits: tuple[int, int | None]) -> LoadedLayer:
    weight = layer.weight.detach().clone()
    twin = (LoadedConv2d if isinstance(layer, nn.Conv2d) else LoadedLinear).of(layer, bits)
    twin.fill(weight, CPU)
    return twin


CASES = [(conv(), (2, 6, 5, 7)), (conv(stride=2, groups=2), (1, 6, 8, 8)), (linear(), (3, 4, 20))]


@pytest.mark.parametrize("num_bits", [2, 3, 4, 6, 8])
def test_codes_are_nearest_under_scales_that_clip_little(num_bits: int) -> None:
    weight = random(5, 40)
    codes, scale = quantize_rows(weight, num_bits)
    assert torch.equal(codes, weight_codes(weight, scale, num_bits))
    searched = weight_scale_mse(weight, num_bits)
    error = (codes * scale[:, None] - weight).square().sum()
    least = (weight_codes(weight, searched, num_bits) * searched[:, None] - weight).square().sum()
    assert least <= error <= least * 1.10  # 0.4 dB; the grid of clipping ratios is five times coarser


@pytest.mark.parametrize("num_bits", [8, 4])
def test_large_weights_are_filled_in_chunks_with_the_codes_of_the_whole(num_bits: int) -> None:
    layer = nn.Linear(CHUNK // 2 + 1, 5)  # a row each
    twin = loaded(layer, (num_bits, None))
    codes, scale = quantize_rows(layer.weight, num_bits)
    assert torch.equal(twin.codes(), codes)
    assert torch.equal(twin.weight_scale[0], scale)


@pytest.mark.parametrize(("layer", "shape"), CASES, ids=["conv", "grouped", "linear"])
@pytest.mark.parametrize("num_bits", [8, 4])
def test_weight_only_layer_multiplies_by_the_values_of_its_codes(
    layer: Any, shape: tuple[int, ...], num_bits: int
) -> None:
    layer = copy.deepcopy(layer)
    codes, scale = quantize_rows(layer.weight, num_bits)
    wanted = copy.deepcopy(layer)
    values = codes * scale.view(-1, *[1] * (codes.dim() - 1))
    wanted.weight.data = values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values
    x = random(*shape)
    assert torch.equal(loaded(layer, (num_bits, None))(x), wanted(x))


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (8, 4)])
def test_measured_linear_is_the_reference_under_the_range_of_its_input(bits: tuple[int, int]) -> None:
    layer, x = linear(), random(3, 20)
    twin = loaded(layer, bits)
    q = measure(x, bits[1])
    codes = reference.quantize(x, q.scale, q.zero_point, q.group_index, bits[1])
    exact = (codes.double() - q.zero_point) * q.scale.double() @ twin.dequantized_weight().double().t()
    exact = (exact + layer.bias).detach()
    # One rounding of the scales' product, one of the product with the sum, one of the sum with the bias.
    bound = 3 * 2.0**-24 * (exact.abs() + layer.bias.abs()).max()
    assert float((twin(x).detach().double() - exact).abs().max()) <= bound


@pytest.mark.parametrize("num_bits", [8, 4, 2])
def test_measured_range_is_that_of_the_input_and_of_zero(num_bits: int) -> None:
    q = measure(torch.tensor([[1.0, 3.0], [2.0, 0.5]]), num_bits)
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    assert (q.scale.shape, q.scale.dtype) == ((1,), torch.float32)
    assert (int(q.zero_point), q.zero_point.dtype, q.num_bits) == (low, torch.int32, num_bits)
    assert float((high - q.zero_point) * q.scale) == pytest.approx(3.0, rel=2**-23)
    assert isinstance(q, OutputQuantizer)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("layer", "shape"), CASES, ids=["conv", "grouped", "linear"])
def test_gradient_of_the_input_is_that_of_the_float_layer_with_these_weights(
    layer: Any, shape: tuple[int, ...], bits: tuple[int, int | None]
) -> None:
    twin = loaded(copy.deepcopy(layer), bits)
    plain = float_twin(twin, torch.float32)
    x, y = random(*shape).requires_grad_(), random(*shape).requires_grad_()
    cotangent = random(*plain(y).shape, seed=1)
    twin(x).backward(cotangent)
    plain(y).backward(cotangent)
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [(8, 8), (4, 8)])
def test_forward_with_gradients_gives_the_same_bits(bits: tuple[int, int]) -> None:
    twin, x = loaded(conv(), bits), random(2, 6, 5, 7)
    with torch.no_grad():
        wanted = twin(x)
    assert torch.equal(twin(x.clone().requires_grad_()), wanted)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_input_gives_no_finite_numbers_it_reaches(bits: tuple[int, int | None], value: float) -> None:
    x = random(3, 20)
    x[1, 2] = value
    result = loaded(linear(), bits)(x)
    assert not result[1].isfinite().any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_give_16_bit_results(bits: tuple[int, int | None], dtype: torch.dtype) -> None:
    layer = conv()
    twin, x = loaded(layer, bits), random(2, 6, 5, 7)
    wanted = twin(x).detach()
    twin.bias = nn.Parameter(layer.bias.detach().to(dtype))
    twin.drop_packed()
    with torch.no_grad():
        result = twin(x.to(dtype))
    assert result.dtype == dtype
    step = 2.0 / 2 ** (bits[1] - 1) if bits[1] else 0.0  # a changed rounding of the input moves a code by one
    eps = torch.finfo(dtype).eps
    assert float((result.float() - wanted).norm() / wanted.norm()) <= 3 * eps + step


@pytest.mark.parametrize("bits", BITS)
def test_empty_batch_gives_an_empty_result(bits: tuple[int, int | None]) -> None:
    assert loaded(linear(), bits)(torch.zeros(0, 20)).shape == (0, 7)
    assert loaded(conv(), bits)(torch.zeros(0, 6, 5, 7)).shape == (0, 8, 5, 7)


@pytest.mark.parametrize("bits", BITS)
def test_constant_zero_input_gives_the_bias(bits: tuple[int, int | None]) -> None:
    layer = linear()
    result = loaded(layer, bits)(torch.zeros(2, 20))
    assert torch.equal(result, layer.bias.detach().expand(2, 7))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
def test_integers_are_refused(dtype: torch.dtype) -> None:
    # What a model's `x.to(layer.weight.dtype)` would make of its input.
    with pytest.raises(TypeError, match=rf"LoadedLinear: input must be floating point, got {dtype}"):
        loaded(linear(), (8, None))(torch.zeros(2, 20, dtype=dtype))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_weight_only_convolution_takes_any_padding(padding: str) -> None:
    for settings in ({"padding": padding}, {"padding_mode": "circular"}):
        twin, x = loaded(conv(**settings), (8, None)), random(1, 6, 8, 8)
        assert torch.equal(twin(x), float_twin(twin, torch.float32)(x))


def test_scales_stay_float32_when_the_layer_is_cast() -> None:
    twin = loaded(linear(), (8, 8))
    scale = twin.weight_scale.clone()
    twin.to(torch.bfloat16)
    assert twin.weight_scale.dtype == torch.float32
    assert torch.equal(twin.weight_scale, scale)
    assert twin.weight.dtype == torch.int8


def test_float_twin_has_the_settings_and_values() -> None:
    twin = loaded(conv(stride=2, groups=2, bias=False), (4, 8))
    plain = float_twin(twin, torch.bfloat16)
    assert type(plain) is nn.Conv2d
    assert (plain.stride, plain.groups, plain.bias, plain.weight.dtype) == ((2, 2), 2, None, torch.bfloat16)
    assert torch.equal(plain.weight, twin.dequantized_weight().bfloat16())
    x = random(1, 6, 8, 8).bfloat16()
    assert torch.equal(plain(x), F.conv2d(x, plain.weight, None, 2, 1, 1, 2))
