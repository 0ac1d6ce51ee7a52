"""adpdm.graph: what is captured, when it is replayed, and what it refuses.

In tests of what all recorders share one stands in that repeats the work by calling it again into the same
memory, which is the contract of a CUDA graph; the `cuda` tests use the real one. On the CPU the tape is real.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from adpdm import QuantConfig, _native, graph, quantize
from adpdm.nn import fuse_blocks
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
    children = _native.Children([first._modules, second._modules])
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


# ---- the tape of the CPU -----------------------------------------------------------------------------------


class Taped:
    """A function of tensors through a CpuRecorder, with the static inputs that a captured denoiser has."""

    def __init__(self, function: Callable[..., Any], *inputs: Tensor) -> None:
        self.function, self.inputs = function, [x.clone() for x in inputs]
        self.recorder = graph.CpuRecorder(torch.device("cpu"))
        self.result = self.recorder.record(lambda: function(*self.inputs))

    def __call__(self, *inputs: Tensor) -> Any:
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.recorder.replay()
        return self.result


def joined(x: Tensor) -> Tensor:
    return torch.cat([x + 1, x, 3 * x.exp()], 1)


def in_place(x: Tensor) -> Tensor:
    y = x * 2
    y[:, :2].add_(x[:, 1:3]).relu_()
    return y.t().reshape(-1)


def split(x: Tensor) -> Tensor:
    first, second = torch.split(torch.nn.functional.silu(x), [1, 3], 1)
    return first * second


def several_results(x: Tensor) -> Tensor:
    mean, index = x.max(1)
    return mean + index


def without_inputs(x: Tensor) -> Tensor:
    return x * torch.arange(4, dtype=torch.float32) + torch.ones(4, dtype=torch.int32)


def same_view(x: Tensor) -> Tensor:
    y = (x + 1).view(x.shape)
    return y.view(x.shape) - x


def indexed(x: Tensor) -> Tensor:
    return (x + 1)[:, None, torch.tensor([2, 0])]


@torch.no_grad()
@pytest.mark.parametrize(
    "function", [joined, in_place, split, several_results, without_inputs, same_view, indexed]
)
def test_tape_repeats_what_was_recorded(function: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, 4, generator=generator)
    taped = Taped(function, first)
    for x in (second, first, second * 3):
        assert torch.equal(taped(x), function(x))


@torch.no_grad()
def test_recording_gives_memory_back_and_mistakes_no_tensor_for_another() -> None:
    """As the forward itself does: what comes later may lie where something lay before."""
    storages = []

    def function(x: Tensor) -> Tensor:
        start = x
        for i in range(8):
            made = x * (i + 1)
            storages.append((StorageWeakRef(made.untyped_storage()), made.data_ptr()))
            x = made + start
            del made
            assert storages[-1][0].expired()
        return x

    x = torch.rand(1 << 16)
    taped = Taped(function, x)
    addresses = [address for _, address in storages]
    assert len(set(addresses)) < len(addresses)  # memory was used again, so it could be mistaken
    assert torch.equal(taped(2 * x), function(2 * x))


@torch.no_grad()
def test_tape_sees_weights_written_in_place() -> None:
    weight = torch.ones(4)
    taped = Taped(lambda x: x * weight, torch.ones(4))
    weight.fill_(5)
    assert torch.equal(taped(torch.ones(4)), torch.full((4,), 5.0))


@torch.no_grad()
def test_tape_drops_calls_that_nobody_reads() -> None:
    def wasteful(x: Tensor) -> Tensor:
        (x + 1).exp()
        return x * 2

    assert len(Taped(wasteful, torch.ones(4)).recorder._tape) == 1


@torch.no_grad()
def test_tape_makes_equal_calls_once_and_constants_never() -> None:
    weights = [torch.ones(4, 4), torch.ones(4, 4)]

    def project(x: Tensor) -> Tensor:
        scale = torch.arange(4) * 2 + 1
        return sum(x.exp() @ w.t() for w in weights) * scale

    taped = Taped(project, torch.ones(2, 4))
    # one exp, two products, two additions (the first to 0), one multiplication
    assert len(taped.recorder._tape) == 6
    weights[1].mul_(torch.arange(4.0))  # a constant view sees what is written
    assert torch.equal(taped(torch.zeros(2, 4)), project(torch.zeros(2, 4)))


@torch.no_grad()
def test_tape_makes_calls_on_equal_constants_once() -> None:
    def waves(x: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(4.0))
        return torch.cat([(x * frequencies).sin(), (x * frequencies).cos()], -1)

    def twice(x: Tensor) -> Tensor:
        return waves(x) + 2 * waves(x) + waves(x + 1) * torch.arange(8.0) + (x * torch.arange(4)).sum()

    taped = Taped(twice, torch.ones(2, 4))
    # waves: product, sine, cosine, joined; once for x, once for x + 1; then two factors, two additions, the
    # sum of a product, and another addition: constants that differ stay apart
    assert len(taped.recorder._tape) == 4 + (1 + 4) + 2 + 2 + 2 + 1
    for x in (torch.ones(2, 4), torch.rand(2, 4)):
        assert torch.equal(taped(x), twice(x))


@torch.no_grad()
def test_tape_makes_calls_with_equal_numbers_once() -> None:
    def scaled(x: Tensor) -> Tensor:
        return x * 2 + (x * 2).exp() + x * 3

    taped = Taped(scaled, torch.ones(4))
    assert len(taped.recorder._tape) == 5  # two products, exp, two additions
    assert torch.equal(taped(torch.full((4,), 2.0)), scaled(torch.full((4,), 2.0)))


@torch.no_grad()
def test_tape_keeps_equal_calls_apart_where_one_is_written() -> None:
    def written(x: Tensor) -> Tensor:
        first, second = x + 1, x + 1
        first.mul_(10)
        return first + second + torch.zeros(4).add_(x)

    taped = Taped(written, torch.ones(4))
    for value in (2.0, 3.0):
        assert torch.equal(taped(torch.full((4,), value)), written(torch.full((4,), value)))


@torch.no_grad()
def test_tape_refuses_values_read_in_python() -> None:
    with pytest.raises(RuntimeError, match="reads a value of a tensor"):
        Taped(lambda x: x if x.sum() > 0 else -x, torch.ones(4))


@torch.no_grad()
def test_tape_refuses_random_numbers() -> None:
    with pytest.raises(RuntimeError, match="not repeatable"):
        Taped(lambda x: x + torch.rand(4), torch.ones(4))
    with pytest.raises(RuntimeError, match="not repeatable"):
        Taped(lambda x: x.log() + torch.rand(2), torch.tensor([1.0, -1.0]))


@torch.no_grad()
def test_tape_takes_what_is_not_a_number() -> None:
    taped = Taped(lambda x: x.log(), torch.tensor([1.0, -1.0]))
    assert torch.equal(taped(torch.tensor([-1.0, 1.0])).nan_to_num(5), torch.tensor([5.0, 0.0]))


@torch.no_grad()
def test_tape_refuses_results_that_it_did_not_make() -> None:
    constant = torch.ones(4)
    with pytest.raises(ValueError, match="a result of shape .* was not made by a recorded call"):
        Taped(lambda x: constant, torch.ones(4))


def test_tape_refuses_calls_after_its_end() -> None:
    tape, x = _native.Tape(), torch.ones(1)
    y = x * 2
    tape.add("aten::mul", "Tensor", (x, 2), {}, y)
    tape.finish([y])
    with pytest.raises(RuntimeError, match="the recording is finished"):
        tape.add("aten::mul", "Tensor", (x, 2), {}, y)


@torch.no_grad()
def test_tape_keeps_autocast_as_recorded() -> None:
    layer = nn.Linear(4, 4).eval()
    with torch.autocast("cpu", torch.bfloat16):
        taped = Taped(layer, torch.ones(2, 4))
        wanted = layer(torch.full((2, 4), 2.0))
    assert taped.result.dtype == torch.bfloat16
    assert torch.equal(taped(torch.full((2, 4), 2.0)), wanted)
