"""adpdm.graph: what is captured, when it is replayed, and what it refuses.

In tests of what all recorders share one stands in that repeats the work by calling it again into the same
memory, which is the contract of a CUDA graph; the `cuda` tests use the real one. On the CPU the tape is real.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from adpdm import QuantConfig, _native, graph, quantize
from adpdm.nn import fuse_blocks
from adpdm.nn.coded import CodedLayer
from adpdm.testing import ddim_scheduler, tiny_unet

RECORDERS: list[Rerun] = []


class Rerun:
    """Repeats recorded work into the memory of its first results."""

    def __init__(self, device: torch.device) -> None:
        self.replays = 0
        RECORDERS.append(self)

    def record(self, work: Callable[[], Any]) -> Any:
        self._work = work
        self._result = work()
        return self._result

    def replay(self) -> None:
        self.replays += 1
        fresh = pytree.tree_leaves(self._work())
        for old, new in zip(pytree.tree_leaves(self._result), fresh, strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)


class Denoiser(nn.Module):
    """A stand-in with a flag and a condition, which counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(
        self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        self.calls += 1
        y = self.weight * sample + timestep.reshape(-1, 1)
        y = y if condition is None else y + condition
        return {"sample": y} if return_dict else (y,)


@pytest.fixture
def denoiser() -> Denoiser:
    RECORDERS.clear()
    return Denoiser()


@torch.no_grad()
def test_capture_serves_every_timestep_with_one_graph(denoiser: Denoiser) -> None:
    plain = copy.deepcopy(denoiser)
    graphed = graph.capture(denoiser, make_recorder=Rerun)
    sample = torch.randn(2, 3)
    for timestep in (7, 3.5, torch.tensor(1), torch.tensor([9, 9])):
        wanted = plain(sample, torch.as_tensor(timestep).reshape(-1)[:1])["sample"]
        assert torch.equal(denoiser(sample, timestep)["sample"], wanted)
        sample = sample + 1
    # ints, floats and int tensors differ in dtype, not in anything else
    assert len(graphed) == len({torch.int64, torch.float32})
    assert sum(r.replays for r in RECORDERS) == 4


@torch.no_grad()
def test_capture_returns_tensors_of_its_own(denoiser: Denoiser) -> None:
    graph.capture(denoiser, make_recorder=Rerun)
    first = denoiser(torch.ones(1, 2), 1)["sample"]
    before = first.clone()
    denoiser(torch.zeros(1, 2), 1)
    assert torch.equal(first, before)


@torch.no_grad()
@pytest.mark.parametrize(
    "call",
    [
        {"sample": torch.ones(2, 2)},
        {"condition": torch.ones(1, 2)},
        {"return_dict": False},
        {"sample": torch.ones(1, 2, dtype=torch.float64)},
    ],
)
def test_capture_records_again_for_another_signature(denoiser: Denoiser, call: dict[str, Any]) -> None:
    graphed = graph.capture(denoiser, make_recorder=Rerun)
    first = {"sample": torch.ones(1, 2), "timestep": 1}
    denoiser(**first)
    denoiser(**{**first, **call})
    denoiser(**{**first, **call})
    assert len(graphed) == 2


@torch.no_grad()
def test_capture_refuses_more_graphs_than_agreed(denoiser: Denoiser) -> None:
    graph.capture(denoiser, make_recorder=Rerun, max_graphs=1)
    denoiser(torch.ones(1, 2), 1)
    with pytest.raises(RuntimeError, match="at most max_graphs=1 different inputs"):
        denoiser(torch.ones(2, 2), 1)


@torch.no_grad()
def test_capture_takes_what_is_nested(denoiser: Denoiser) -> None:
    def forward(sample: Tensor, timestep: Tensor, given: Any, scale: float = 1.0) -> Any:
        return [sample * given["factor"] + given["others"][0], scale * timestep]

    denoiser.forward = forward  # type: ignore[method-assign]
    graphed = graph.capture(denoiser, make_recorder=Rerun)
    for factor in (2.0, 3.0):
        given = {"factor": torch.tensor(factor), "others": [torch.ones(2)]}
        result, time = denoiser(torch.ones(1, 2), 1, given, scale=0.5)
        assert result.tolist() == [[factor + 1.0] * 2]
        assert time.tolist() == [0.5]
    denoiser(torch.ones(1, 2), 1, {**given, "more": 1})
    denoiser(torch.ones(1, 2), 1, given, 0.5)  # the same by position
    assert len(graphed) == 2


@torch.no_grad()
def test_capture_takes_arguments_by_name_or_position_wherever_the_timestep_is(denoiser: Denoiser) -> None:
    """Transformers of Stable Diffusion 3 and Flux have the text before it."""

    def forward(hidden_states: Tensor, text: Tensor, timestep: Tensor, scale: float = 1.0) -> Tensor:
        return hidden_states * scale + text + timestep.reshape(-1, 1)

    denoiser.forward = forward  # type: ignore[method-assign]
    graphed = graph.capture(denoiser, make_recorder=Rerun)
    sample, text = torch.ones(2, 2), torch.full((2, 2), 3.0)
    for call in (
        lambda: denoiser(sample, text, torch.tensor([5, 5])),
        lambda: denoiser(sample, timestep=5, text=text),
        lambda: denoiser(timestep=5, hidden_states=sample, text=text),
    ):
        assert call().tolist() == [[9.0, 9.0]] * 2
    assert len(graphed) == 1


@torch.no_grad()
@pytest.mark.parametrize("args", [(1, 2, 3, 4, 5), (1,)])
def test_capture_refuses_arguments_given_twice_or_too_many(denoiser: Denoiser, args: tuple[int, ...]) -> None:
    graph.capture(denoiser, make_recorder=Rerun)
    with pytest.raises(TypeError, match="at most once, got . by position and"):
        denoiser(*args, sample=torch.ones(1, 2))


@pytest.mark.parametrize(
    "forward", [lambda *args: None, lambda sample, t: None, lambda timestep: None], ids=["*", "t", "first"]
)
def test_capture_wants_a_forward_with_names(denoiser: Denoiser, forward: Any) -> None:
    denoiser.forward = forward  # type: ignore[method-assign]
    with pytest.raises(
        TypeError, match="sample first and arguments by name, among them timestep; got Denoiser"
    ):
        graph.capture(denoiser, make_recorder=Rerun)


def test_children_notice_every_exchange() -> None:
    first, second = nn.Sequential(nn.ReLU(), nn.ReLU()), nn.Sequential(nn.SiLU())
    children = _native.Children([first._modules, second._modules], [])
    assert children.unchanged()
    kept = second[0]
    second[0] = nn.SiLU()
    assert not children.unchanged()
    second[0] = kept
    assert children.unchanged()
    first[0], first[1] = first[1], first[0]
    assert not children.unchanged()
    first[0], first[1] = first[1], first[0]
    first.append(nn.ReLU())
    assert not children.unchanged()


def test_entries_notice_other_values_and_hold_the_first() -> None:
    entry: dict[str, Any] = {"derived": torch.ones(1)}
    first = weakref.ref(entry["derived"])
    children = _native.Children([], [(entry, "derived"), (entry, "missing")])
    entry["other"] = 1
    assert children.unchanged()
    entry["derived"] = None
    assert not children.unchanged()
    assert first() is not None, "memory that a graph reads must outlive the entry"
    entry["derived"] = first()
    assert children.unchanged()
    entry["missing"] = None
    assert not children.unchanged()


def test_capture_refuses_gradients(denoiser: Denoiser) -> None:
    graph.capture(denoiser, make_recorder=Rerun)
    with pytest.raises(RuntimeError, match="no gradients"):
        denoiser(torch.ones(1, 2), 1)


@torch.no_grad()
def test_capture_refuses_arguments_it_cannot_compare(denoiser: Denoiser) -> None:
    graph.capture(denoiser, make_recorder=Rerun)
    with pytest.raises(TypeError, match="tensors or hashable values, got set"):
        denoiser(torch.ones(1, 2), 1, {1, 2})


def test_capture_wants_a_cpu_or_cuda_device(denoiser: Denoiser) -> None:
    with pytest.raises(ValueError, match="wanted a denoiser on a CPU or CUDA device, got one on meta"):
        graph.capture(denoiser.to("meta"))


def test_capture_twice_is_an_error(denoiser: Denoiser) -> None:
    graph.capture(denoiser, make_recorder=Rerun)
    with pytest.raises(ValueError, match="captured already"):
        graph.capture(denoiser, make_recorder=Rerun)


@torch.no_grad()
def test_release_gives_the_forward_back(denoiser: Denoiser) -> None:
    graph.capture(denoiser, make_recorder=Rerun)
    graph.release(denoiser)
    denoiser(torch.ones(1, 2), torch.tensor([1]))
    assert denoiser.calls == 1
    assert not RECORDERS
    with pytest.raises(ValueError, match="is not captured"):
        graph.release(denoiser)


@torch.no_grad()
def test_capture_switches_the_groups_of_a_quantized_denoiser(device: torch.device) -> None:
    unet = tiny_unet()
    config = QuantConfig(
        num_groups=2,
        num_inference_steps=4,
        grouping="uniform",
        calibration_images=2,
        round_size=2,
        histogram_images=2,
    )
    quantize(unet, config, scheduler=ddim_scheduler())
    plain = copy.deepcopy(unet).to(device)
    unet.to(device)
    graphed = graph.capture(unet)
    sample = torch.randn(2, unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    groups = set()
    for timestep in (999, 500, 1):
        assert torch.equal(unet(sample, timestep).sample, plain(sample, timestep).sample)
        groups.add(tuple(unet.adpdm_step.group_index.tolist()))
    assert len(groups) > 1, "the timesteps must differ in their groups for this test to say anything"
    assert len(graphed) == 1


@torch.no_grad()
def test_capture_records_again_when_attention_multiplies_something_else(device: torch.device) -> None:
    unet = tiny_unet()
    config = QuantConfig(num_inference_steps=8, grouping="shared", histogram_images=2, attention="float")
    quantize(unet, config, scheduler=ddim_scheduler())
    unet.to(device)
    graphed = graph.capture(unet)
    sample = torch.randn(2, unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    sample = sample.to(device)
    in_float = unet(sample, 500).sample
    fuse_blocks(unet, attention="int8")
    in_int8 = unet(sample, 500).sample
    assert len(graphed) == 1
    graph.release(unet)
    assert torch.equal(unet(sample, 500).sample, in_int8)
    assert torch.equal(in_int8, in_float) == (
        device.type != "cpu"
    )  # which multiplies floats whatever is asked


class Holding(Rerun):
    """Keeps nothing but its result alive, as a CUDA graph does, and says what is alive when it replays."""

    def record(self, work: Callable[[], Any]) -> Any:
        READ.clear()
        return work()

    def replay(self) -> None:
        assert all(reference() is not None for reference in READ), "a graph would read memory that was freed"


READ: list[weakref.ref[Any]] = []  # what the last recording derived


@torch.no_grad()
def test_capture_outlives_moves_and_what_they_derive_anew() -> None:
    unet = tiny_unet()
    quantize(unet, QuantConfig(num_inference_steps=8, histogram_images=2), scheduler=ddim_scheduler())
    layers = [m for m in unet.modules() if isinstance(m, CodedLayer)]
    RECORDERS.clear()
    graph.capture(unet, make_recorder=Holding)
    sample = torch.randn(2, unet.config.in_channels, 8, 8)

    def call(images: int, recordings: int) -> None:
        unet(sample[:images], 500)
        assert len(RECORDERS) == recordings
        derived = [entry[name] for layer in layers for entry, name in layer.derived_entries()]
        READ[:] = [weakref.ref(value) for value in derived if value is not None]

    call(2, 1)
    unet.to(sample.device)  # moves nothing
    call(2, 1)
    layers[0].drop_packed()
    call(2, 2)
    call(1, 3)
    layers[-1].drop_packed()
    call(1, 4)  # which forgets the graph of two images, too
    call(2, 5)
    for dtype in (torch.bfloat16, torch.float32):
        nn.Module.to(unet, dtype)  # diffusers' own refuses
    call(2, 6)
    call(2, 6)


@torch.no_grad()
def test_capture_replays_what_was_moved_to_another_dtype() -> None:
    unet = tiny_unet()
    quantize(unet, QuantConfig(num_inference_steps=8, histogram_images=2), scheduler=ddim_scheduler())
    plain = nn.Module.to(copy.deepcopy(unet), torch.bfloat16)
    graph.capture(unet)
    sample = torch.randn(2, unet.config.in_channels, 8, 8)
    unet(sample, 500)
    nn.Module.to(unet, torch.bfloat16)
    sample = sample.bfloat16()
    assert torch.equal(unet(sample, 500).sample, plain(sample, 500).sample)
