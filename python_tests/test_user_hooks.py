"""Hooks on layers that users had before quantizing: they go along, and back, or the layer stays float."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import adpdm
from adpdm import QuantConfig, pipeline
from adpdm.diffusers_quantizer import build_frozen
from adpdm.nn import LoadedLinear, QuantConv2d, describe_fusion, describe_layers, load_layer
from adpdm.nn.swap import reason_to_keep
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_unet

LAYER, BLOCK = "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0"
CONFIG = QuantConfig(num_inference_steps=2, num_groups=2, histogram_images=2, grouping="uniform")
Watch = Callable[[nn.Module, list[nn.Module]], Any]  # registers a hook that notes the module; its handle

AROUND_FORWARD: dict[str, Watch] = {
    "after": lambda m, seen: m.register_forward_hook(lambda module, args, output: seen.append(module)),
    "after, named": lambda m, seen: m.register_forward_hook(
        lambda module, args, named, output: seen.append(module), with_kwargs=True
    ),
    "before": lambda m, seen: m.register_forward_pre_hook(lambda module, args: seen.append(module)),
    "before, named": lambda m, seen: m.register_forward_pre_hook(
        lambda module, args, named: seen.append(module), with_kwargs=True
    ),
}


def float_unet() -> Any:
    return tiny_unet(**ONE_BLOCK)


def quantize(unet: Any) -> None:
    adpdm.quantize(unet, CONFIG, scheduler=ddim_scheduler())


@torch.no_grad()
def run(unet: Any) -> Tensor:
    output: Tensor = unet(torch.ones(1, 1, 8, 8), 500).sample
    return output


@pytest.fixture(scope="module")
def quantized_once() -> Any:
    unet = float_unet()
    quantize(unet)
    return unet


@pytest.fixture
def quantized(quantized_once: Any) -> Any:
    """A quantized model, to change."""
    return copy.deepcopy(quantized_once)


@pytest.fixture(scope="module")
def watched() -> tuple[Any, dict[str, list[nn.Module]], dict[str, Any]]:
    """A model with every kind of hook on a layer, quantized; what they have seen, and their handles."""
    unet = float_unet()
    seen: dict[str, list[nn.Module]] = {kind: [] for kind in AROUND_FORWARD}
    handles = {k: watch(unet.get_submodule(LAYER), seen[k]) for k, watch in AROUND_FORWARD.items()}
    quantize(unet)
    return unet, seen, handles


def test_hooks_are_called_with_the_quantized_layer(watched: Any) -> None:
    unet, seen, _ = watched
    for modules in seen.values():
        modules.clear()
    run(unet)
    layer = unet.get_submodule(LAYER)
    assert isinstance(layer, QuantConv2d)
    assert seen == {kind: [layer] for kind in AROUND_FORWARD}


def test_block_around_runs_fused_once_the_hooks_are_removed(watched: Any) -> None:
    unet, _, handles = watched

    def reason() -> str:
        return next(info.reason for info in describe_fusion(unet) if info.name == BLOCK)

    assert reason() == "QuantConv2d has hooks"
    for handle in handles.values():
        handle.remove()
    assert reason() == ""


def test_hook_that_is_called_after_a_failure_goes_along() -> None:
    failures: list[nn.Module] = []
    unet = nn.Sequential(nn.Linear(4, 4))
    unet[0].register_forward_hook(lambda module, args, output: failures.append(module), always_call=True)
    layer = load_layer(unet, "0", (8, 8))
    layer.fill(torch.ones(4, 4), torch.device("cpu"))
    with pytest.raises(TypeError, match="input must be floating point"):
        unet(torch.ones(1, 4, dtype=torch.int32))
    assert failures == [layer]


def test_backward_hook_is_called() -> None:
    unet, seen = float_unet(), []
    unet.get_submodule(LAYER).register_full_backward_hook(lambda m, inner, outer: seen.append(inner[0].shape))
    quantize(unet)
    seen.clear()
    unet(torch.ones(1, 1, 8, 8, requires_grad=True), 500).sample.sum().backward()
    assert seen == [torch.Size([1, 8, 8, 8])]


def test_backward_pre_hook_goes_along() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    model[0].register_full_backward_pre_hook(lambda module, outer: seen.append(module))
    layer = load_layer(model, "0", (8, 8))
    layer.fill(torch.ones(4, 4), torch.device("cpu"))
    model(torch.ones(1, 4, requires_grad=True)).sum().backward()
    assert isinstance(layer, LoadedLinear)
    assert seen == [layer]


def test_failed_quantization_gives_the_float_layer_its_hooks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, seen = float_unet(), []
    before = unet.get_submodule(LAYER)
    handle = before.register_forward_hook(lambda module, args, output: seen.append(module))

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "mark_quantized", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(unet)
    seen.clear()
    run(unet)
    assert seen == [before]
    handle.remove()
    run(unet)
    assert seen == [before]


def test_dequantized_layer_has_the_hooks(quantized: Any) -> None:
    seen: list[nn.Module] = []
    handle = quantized.get_submodule(LAYER).register_forward_hook(lambda m, args, output: seen.append(m))
    quantized.dequantize()
    run(quantized)
    assert seen == [quantized.get_submodule(LAYER)]
    assert type(seen[0]) is nn.Conv2d
    handle.remove()
    run(quantized)
    assert len(seen) == 1


# ---- what no quantized layer could do ----------------------------------------------------------------------

OF_STATE = {
    "before saving": lambda m: m.register_state_dict_pre_hook(lambda *arguments: None),
    "after saving": lambda m: m.register_state_dict_post_hook(lambda *arguments: None),
    "before loading": lambda m: m.register_load_state_dict_pre_hook(lambda *arguments: None),
    "after loading": lambda m: m.register_load_state_dict_post_hook(lambda *arguments: None),
}


def _replace_forward(layer: Any) -> None:
    layer.forward = lambda x: x


STAYS: dict[str, tuple[Callable[[Any], Any], str]] = {
    **{kind: (watch, "hooks see its state_dict") for kind, watch in OF_STATE.items()},
    "forward": (_replace_forward, "its forward was replaced, as offloading does"),
    "pruned": (
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        "its weight is made before each call, as by torch.nn.utils.prune until prune.remove()",
    ),
}


@pytest.mark.parametrize(("change", "reason"), STAYS.values(), ids=STAYS)
def test_layer_that_its_twin_could_not_stand_for_stays_float(
    change: Callable[[Any], Any], reason: str
) -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    change(layer)
    assert reason_to_keep("mid.conv", layer, CONFIG, runs=True) == reason


def test_reasons_are_told_when_all_layers_stay_float() -> None:
    unet = float_unet()
    for layer in [m for m in unet.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        layer.forward = layer.forward
    with pytest.raises(
        ValueError, match="no layer left to quantize.*its forward was replaced, as offloading"
    ):
        describe_layers(unet, CONFIG, lambda: run(unet))


def test_layer_that_was_pruned_for_good_is_quantized() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.remove(layer, "weight")
    assert reason_to_keep("mid.conv", layer, CONFIG, runs=True) == ""


def test_checkpoint_is_not_loaded_into_a_layer_that_must_stay_float(quantized_once: Any) -> None:
    unet = float_unet()
    unet.get_submodule(LAYER).register_load_state_dict_post_hook(lambda *arguments: None)
    with pytest.raises(ValueError, match=f"layer '{LAYER}', which must stay float here: hooks see its state"):
        build_frozen(unet, quantized_once.config.quantization_config)
    assert not [m for m in unet.modules() if isinstance(m, QuantConv2d)]


def test_dequantize_refuses_hooks_that_see_codes(quantized: Any) -> None:
    handle = quantized.get_submodule(LAYER).register_state_dict_post_hook(lambda *arguments: None)
    with pytest.raises(ValueError, match=rf"hooks that see their state_dict.* got them on \['{LAYER}'\]"):
        quantized.dequantize()
    assert isinstance(quantized.get_submodule(LAYER), QuantConv2d)
    handle.remove()
    quantized.dequantize()
    assert type(quantized.get_submodule(LAYER)) is nn.Conv2d
