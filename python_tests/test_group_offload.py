"""Group offloading of diffusers: outputs, adapters, torch.compile, and what stays on the device in between.

Onto the CPU from the CPU, or from disk: that the hooks find and exchange every tensor. With a disk they do it
as with a stream on a GPU, behind the back of the modules.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from loaded_models import random, run
from lora_models import SMALL, adapt, quantized
from torch import Tensor

from adpdm.nn import CodedLayer, QuantLinear, load_layer, unfused
from adpdm.step import StepState

KINDS = ["w4", "w4a8", "calibrated w8a8"]  # without a packed copy, with one per layer, and in fused blocks
with_packed_layers = pytest.mark.parametrize("make", KINDS[1:], indirect=True, scope="module")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Equal models of one kind, to leave hooks in."""
    folder = tmp_path_factory.mktemp("models")
    quantized(request.param, folder / "float", **SMALL).save_pretrained(folder / "quantized")

    def make() -> Any:
        model: Any = UNet2DConditionModel.from_pretrained(folder / "quantized")
        return model.to(memory_format=torch.contiguous_format)  # diffusers writes no other layout to disk

    return make


@pytest.fixture(params=["leaf_level", "block_level"])
def level(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Arguments that say what a group is."""
    blocks = {"num_blocks_per_group": 1} if request.param == "block_level" else {}
    return {"offload_type": request.param, **blocks}


@pytest.fixture(params=["memory", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Arguments that say where groups wait."""
    return {"offload_to_disk_path": str(tmp_path / "groups")} if request.param == "disk" else {}


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def offload(model: Any, **settings: Any) -> None:
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **settings)


def coded(model: Any) -> list[CodedLayer]:
    return [m for m in model.modules() if isinstance(m, CodedLayer)]


def aside(model: Any, level: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Fused blocks step aside for hooks on their layers, one by one; last bits of their floats are others."""
    return unfused(model) if level["offload_type"] == "leaf_level" else contextlib.nullcontext()


def test_outputs_stay(make: Any, level: dict[str, Any], place: dict[str, Any]) -> None:
    model = make()
    with aside(model, level):
        wanted = {t: run(model, timestep=torch.tensor(t)) for t in (750, 0)}
    offload(model, **level, **place)
    for t in (0, 750, 0):  # each in its own group of timesteps
        assert torch.equal(run(model, timestep=torch.tensor(t)), wanted[t])


def test_packed_weights_go_with_the_codes(make: Any, level: dict[str, Any], tmp_path: Path) -> None:
    """To the disk; groups that wait in memory move nowhere where there is but one device."""
    model, place = make(), {"offload_to_disk_path": str(tmp_path)}
    run(model)
    has_packed = any(layer._packed is not None for layer in coded(model))
    assert has_packed == (model.config.quantization_config.activation_bits is not None)
    offload(model, **level, **place)
    run(model)
    assert [layer for layer in coded(model) if layer._packed is not None] == []
    assert [layer for layer in coded(model) if layer.plan.value is not None] == []


def test_adapters_run_beside_offloaded_layers(
    make: Any, level: dict[str, Any], place: dict[str, Any]
) -> None:
    model, other = make(), make()
    with aside(model, level):
        before = run(model)
        adapt(model)
        wanted = run(model)
    assert not torch.equal(wanted, before)
    adapt(other)
    offload(other, **level, **place)
    assert torch.equal(run(other), wanted)
    other.disable_adapters()
    assert torch.equal(run(other), before)
    other.enable_adapters()
    assert torch.equal(run(other), wanted)


def test_adapters_are_fused_into_layers_that_wait_in_memory(make: Any, level: dict[str, Any]) -> None:
    model, other = make(), make()
    adapt(model)
    adapt(other)
    offload(other, **level)
    with aside(model, level):
        beside = run(model)
        model.fuse_lora()
        fused = run(model)
    run(other)
    other.fuse_lora()
    assert torch.equal(run(other), fused)
    other.unfuse_lora()
    assert torch.equal(run(other), beside)


class TwoLayers(torch.nn.Module):
    """A layer of either kind: dynamo takes 20 s for the hooks of a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = torch.nn.Conv2d(4, 8, 3), torch.nn.Linear(8, 8)
        for name in ("conv", "linear"):
            weight = self.get_submodule(name).weight
            load_layer(self, name, (4, 8)).fill(weight.detach(), CPU)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(self.conv(x).movedim(1, -1))
        return output


@torch.no_grad()
def test_compiled_layers_can_be_offloaded(fresh_dynamo: None, tmp_path: Path) -> None:
    model, inputs = TwoLayers(), [random(2, 4, 8, 8, seed=seed) for seed in (0, 1)]
    wanted = [model(x) for x in inputs]
    apply_group_offloading(
        model,
        onload_device=CPU,
        offload_device=CPU,
        offload_type="leaf_level",
        offload_to_disk_path=str(tmp_path),
    )
    operators: list[str] = []

    def eager(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        operators.extend(target for target in targets if target.startswith("adpdm."))
        return graph.forward

    compiled = torch.compile(model, backend=eager)
    for x, expected in zip(inputs, wanted, strict=True):
        assert torch.equal(compiled(x), expected)
        # The packed weights leave with their codes, although the graphs have read them.
        assert [layer for layer in coded(model) if layer._packed is not None] == []
    # The layers are in the graphs between the hooks, and the work of packing is not.
    assert set(operators) == {"adpdm.quantize.default", "adpdm.conv2d.default", "adpdm.linear.default"}


def packed_layer(make: Any) -> Any:
    """A layer that has packed its weight."""
    model = make()
    run(model)
    return next(layer for layer in coded(model) if layer._packed is not None)


@with_packed_layers
def test_packed_weight_dies_with_the_memory_of_the_codes(make: Any) -> None:
    layer = packed_layer(make)
    packed = weakref.ref(layer._packed.weights[0][0])
    kept, layer.weight.data = layer.weight.data, layer.weight.data.clone()
    assert packed() is not None  # as the codes of a group that is on the device in another tensor, too
    del kept
    gc.collect()
    assert packed() is None
    assert layer._packed is None


@with_packed_layers
def test_packing_again_forgets_older_codes(make: Any) -> None:
    layer = packed_layer(make)
    older, layer.weight.data = layer.weight.data, layer.weight.data.clone()
    layer.drop_packed()
    newer: Tensor = layer.packed(CPU).weights[0][0]
    del older
    assert layer.packed(CPU).weights[0][0] is newer


def test_group_on_another_device_is_copied_and_nothing_is_kept_with_it() -> None:
    # With leaf_level on a GPU the step stays on the CPU, where nobody brings it from.
    step = StepState(2, 3)
    layer = QuantLinear.of(torch.nn.Linear(8, 4), (8, 8), 2, 1, step, None)
    layer.freeze()
    (quantizer,) = layer.quantizers
    assert quantizer.is_beside_its_step
    assert layer.packed(CPU) is layer.packed(CPU)
    quantizer.to("meta")
    step.table[2, 1] = 1
    step.set_step(2)
    assert step.group_index.tolist() == [0, 1]
    assert not quantizer.is_beside_its_step
    assert quantizer.group_index.device.type == "meta"
    layer.drop_packed()
    assert layer.packed(CPU) is not layer.packed(CPU)
