"""Parameters of quantized layers that are edited, loaded or trained after the first call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from fused_blocks import frozen, randn
from torch import Tensor, nn

import adpdm
from adpdm import QuantConfig
from adpdm.diffusers_quantizer import build_frozen, start_calibrated
from adpdm.nn import CodedLayer, load_layer, quant_layers, to_channels_last, unfuse_blocks
from adpdm.step import StepState
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_unet

LAYER = "down_blocks.0.resnets.0.conv1"
IMAGE, TOKENS = randn(2, 8, 6, 4), randn(2, 7, 8)


@pytest.fixture(scope="module")
def quantized_once() -> Any:
    unet = tiny_unet(**ONE_BLOCK)
    settings = QuantConfig(num_inference_steps=2, num_groups=2, histogram_images=2, grouping="uniform")
    adpdm.quantize(unet, settings, scheduler=ddim_scheduler())
    return unet


@pytest.fixture
def quantized(quantized_once: Any) -> Any:
    """A calibrated model, to change."""
    return copy.deepcopy(quantized_once)


@torch.no_grad()
def predict(unet: Any) -> list[Tensor]:
    return [unet(torch.ones(1, 1, 8, 8), timestep).sample for timestep in (500, 0)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- edits -------------------------------------------------------------------------------------------------


def add_in_place(layer: Any, name: str) -> None:
    with torch.no_grad():
        getattr(layer, name).add_(1.0)


def add_to_data(layer: Any, name: str) -> None:
    getattr(layer, name).data.add_(1.0)


def assign(layer: Any, name: str) -> None:
    setattr(layer, name, nn.Parameter(getattr(layer, name).detach() + 1.0, requires_grad=False))


Edit = Callable[[Any, str], None]
EDITS: dict[str, Edit] = {"in place": add_in_place, "data": add_to_data, "assigned": assign}


@torch.no_grad()
def outputs_around(host: Any, x: Tensor, edit: Callable[[], None]) -> tuple[Tensor, Tensor, Tensor]:
    """What a block makes of x before an edit, after it, and after it with everything derived anew."""
    before = host.block(x)
    edit()
    after = host.block(x)
    for layer in quant_layers(host).values():
        layer.drop_packed()
    return before, after, host.block(x)


def resnet() -> Any:
    host = frozen(ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=None, groups=4))
    conv2 = host.block.conv2
    # As new as a parameter that is assigned: no count of edits tells the two apart.
    conv2.bias = nn.Parameter(conv2.bias.detach().clone(), requires_grad=False)
    return host


def called_without_time(host: Any) -> Any:
    """The residual block as a function of the image alone."""
    forward = host.block.forward
    host.block.forward = lambda x: forward(x, None)
    return host


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_bias_of_a_layer_is_the_one_it_has_now(edit: Edit) -> None:
    host = resnet()
    unfuse_blocks(host)
    conv2 = host.block.conv2
    before, after, wanted = outputs_around(called_without_time(host), IMAGE, lambda: edit(conv2, "bias"))
    assert torch.equal(after, wanted)
    assert torch.allclose(after - before, torch.ones(()), atol=1e-5)  # sums of a few units in float32


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_bias_in_a_fused_block_is_the_one_it_has_now(edit: Edit, no_fallback: None) -> None:
    host = resnet()
    conv2 = host.block.conv2
    before, after, wanted = outputs_around(called_without_time(host), IMAGE, lambda: edit(conv2, "bias"))
    assert torch.equal(after, wanted)
    assert torch.allclose(after - before, torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("layer", ["norm2", "conv2"])
def test_edits_of_16_bit_biases_are_seen(layer: str, no_fallback: None) -> None:
    host = resnet().to(torch.bfloat16)
    edited = host.block.get_submodule(layer)
    results = outputs_around(
        called_without_time(host), IMAGE.bfloat16(), lambda: add_in_place(edited, "bias")
    )
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[1])


def test_edits_of_biases_that_are_joined_are_seen(no_fallback: None) -> None:
    host = frozen(Attention(8, None, 2, None, 4, bias=True))
    before, after, wanted = outputs_around(host, TOKENS, lambda: add_in_place(host.block.to_v, "bias"))
    assert torch.equal(after, wanted)
    assert not torch.equal(after, before)


def test_plan_is_kept_while_nothing_changes(no_fallback: None) -> None:
    host = resnet()
    fused = host.block.forward
    called_without_time(host)
    with torch.no_grad():
        host.block(IMAGE)
        plan = fused.plan
        host.block(IMAGE)
    assert fused.plan is plan
    assert host.block.conv1.packed(torch.device("cpu")) is plan.conv1


# ---- trained biases ----------------------------------------------------------------------------------------


def small_layer(kind: str) -> tuple[Any, Tensor, tuple[int, ...]]:
    """A quantized layer with a trained bias, an input, and the dimensions of its result without channels."""
    is_conv = "conv" in kind
    layer: Any = nn.Conv2d(3, 4, 3) if is_conv else nn.Linear(3, 4)
    if kind.startswith("measured"):
        model = nn.Sequential(layer)
        loaded = load_layer(model, "0", (8, 8))
        loaded.fill(layer.weight.detach(), torch.device("cpu"))
        made: Any = loaded
    else:
        made = frozen(layer).block
        made.bias.requires_grad_(True)
    return made, randn(2, 3, 5, 5) if is_conv else randn(2, 5, 3), (0, 2, 3) if is_conv else (0, 1)


@pytest.mark.parametrize("trains_input", [False, True])
@pytest.mark.parametrize("kind", ["conv", "linear", "measured conv", "measured linear"])
def test_bias_gets_the_sum_of_the_gradients(kind: str, trains_input: bool) -> None:
    layer, x, others = small_layer(kind)
    x.requires_grad_(trains_input)
    result = layer(x)
    cotangent = randn(*result.shape, seed=8)
    result.backward(cotangent)
    assert torch.allclose(layer.bias.grad, cotangent.sum(others), rtol=0, atol=1e-5)
    assert (x.grad is not None) == trains_input


def test_every_bias_that_peft_trains_gets_a_gradient(quantized: Any) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["conv1", "conv2"], bias="all")
    peft.inject_adapter_in_model(settings, quantized)
    trained = {n: p for n, p in quantized.named_parameters() if p.requires_grad}
    assert f"{LAYER}.base_layer.bias" in trained
    quantized(torch.ones(1, 1, 8, 8), 500).sample.square().sum().backward()
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []


def test_trained_bias_is_used_by_the_next_call(quantized: Any) -> None:
    bias = quantized.get_submodule(LAYER).bias.requires_grad_(True)
    before = predict(quantized)
    quantized(torch.ones(1, 1, 8, 8), 500).sample.square().sum().backward()
    torch.optim.SGD([bias], lr=1.0).step()
    bias.requires_grad_(False)
    after = predict(quantized)
    assert not same(before, after)
    assert same(predict(copy.deepcopy(quantized)), after)


# ---- loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [{"strict": False}, {"strict": True}, {"strict": False, "assign": True}])
def test_float_weights_are_not_loaded_as_codes(quantized: Any, way: dict[str, bool]) -> None:
    codes = {n: m.weight.clone() for n, m in quantized.named_modules() if isinstance(m, CodedLayer)}
    assert len(codes) == 12
    message = f"{LAYER}.weight must be torch.int8, its codes, got torch.float32"
    with pytest.raises(RuntimeError, match=message):
        quantized.load_state_dict(tiny_unet(**ONE_BLOCK).state_dict(), **way)
    assert all(torch.equal(quantized.get_submodule(name).weight, x) for name, x in codes.items())


def test_weights_load_into_a_layer_that_has_no_codes_yet() -> None:
    layer = load_layer(nn.Sequential(nn.Linear(2, 1)), "0", (8, 8))
    weight = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    layer.load_state_dict({"weight": weight, "bias": torch.ones(1)}, strict=False)
    assert layer.weight.tolist() == [[3.0, 4.0]]


def emptied(unet: Any) -> None:
    unet.to("meta")
    unet.to_empty(device="cpu")


@pytest.mark.parametrize(
    ("leave", "assign"),
    [(lambda unet: unet.to("meta"), True), (emptied, False)],
    ids=["assigned", "to_empty"],
)
def test_model_comes_back_from_the_meta_device(
    quantized: Any, leave: Callable[[Any], Any], assign: bool
) -> None:
    wanted, state = predict(quantized), copy.deepcopy(quantized.state_dict())
    leave(quantized)
    quantized.load_state_dict(state, assign=assign)
    assert same(predict(quantized), wanted)


def test_current_step_is_the_first_row_of_groups_until_the_first_call() -> None:
    state = StepState(2, 3)
    state.table += torch.tensor([[4, 5], [6, 7], [8, 9]], dtype=torch.int32)
    state.set_step(1)
    state.to("meta")
    state.to_empty(device="cpu")
    assert (state.group_index.tolist(), state.step_index.tolist()) == ([0, 0], [0])
    assert state.group_index.dtype == state.step_index.dtype == torch.int32


# ---- five dimensions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("kernel", [1, 3])
def test_kernels_of_images_are_in_channels_last(channels: int, kernel: int) -> None:
    module = nn.Sequential(nn.Conv2d(channels, 2, kernel), nn.Conv3d(4, 2, kernel))
    wanted = copy.deepcopy(module[0]).to(memory_format=torch.channels_last).weight
    volume = module[1].weight.stride()
    to_channels_last(module)
    assert module[0].weight.stride() == wanted.stride()
    assert torch.equal(module[0].weight, wanted)
    assert module[1].weight.stride() == volume


def test_model_with_kernels_of_five_dimensions_is_loaded(quantized_once: Any) -> None:
    config = quantized_once.config.quantization_config
    unet = tiny_unet(**ONE_BLOCK)
    build_frozen(unet, config)
    unet.load_state_dict(copy.deepcopy(quantized_once.state_dict()), assign=True)
    unet.volume = nn.Conv3d(4, 2, 3)
    start_calibrated(unet, config)
    assert same(predict(unet), predict(quantized_once))
