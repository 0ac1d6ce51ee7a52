"""The tape of the CPU (csrc/bindings/tape.h): what it repeats, simplifies and refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from adpdm import _native, graph


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
    with pytest.raises(RuntimeError, match=r"reads a value of a tensor \(`aten::equal`\)"):
        Taped(lambda x: x if torch.equal(x, x.abs()) else -x, torch.ones(4))


@torch.no_grad()
def test_tape_casts_weights_under_autocast_anew() -> None:
    layer = nn.Linear(4, 4, bias=False)
    x = torch.ones(2, 4)
    layer.weight.fill_(1)
    with torch.autocast("cpu", torch.bfloat16):
        taped = Taped(layer, x)  # which runs it once before, so that autocast has the weight already
    assert torch.equal(taped(x), torch.full((2, 4), 4.0, dtype=torch.bfloat16))
    layer.weight.fill_(2)
    assert torch.equal(taped(x), torch.full((2, 4), 8.0, dtype=torch.bfloat16))
    assert torch.is_autocast_cache_enabled()


@torch.no_grad()
def test_tape_makes_random_numbers_as_often_as_the_forward() -> None:
    # Equal calls are made once, but for these; alone they are refused, whatever is made of them.
    with pytest.raises(RuntimeError, match="not repeatable"):
        Taped(lambda x: x + (torch.rand(4) != torch.rand(4)) * torch.rand(4), torch.ones(4))
    taped = Taped(lambda x: x + (torch.rand(4) == torch.rand(4)).float(), torch.ones(4))
    assert torch.equal(taped(torch.zeros(4)), torch.zeros(4))


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


@torch.no_grad()
def test_tape_refuses_results_that_repeat_elements() -> None:
    with pytest.raises(ValueError, match=r"of shape \[4, 2\] repeats its elements"):
        Taped(lambda x: (x * 2)[:, None].expand(4, 2), torch.ones(4))


@torch.no_grad()
def test_tape_refuses_changes_of_shape_in_place() -> None:
    """The changed tensor was taken for one from outside, and kept its values for ever."""
    with pytest.raises(RuntimeError, match=r"calls aten::squeeze_.dim, which changes the shape of a tensor"):
        Taped(lambda x: (x * 2).squeeze_(1) + 1, torch.ones(4, 1))


@torch.library.custom_op("adpdm_test::count", mutates_args=("calls",))
def count(x: Tensor, calls: Tensor) -> Tensor:
    calls += 1
    return x * 2


@torch.no_grad()
def test_tape_refuses_new_tensors_of_calls_that_write() -> None:
    with pytest.raises(
        RuntimeError, match="calls adpdm_test::count, which writes into an argument and returns"
    ):
        Taped(lambda x: count(x, torch.zeros(1)) + 1, torch.ones(4))


@torch.no_grad()
def test_tape_returns_one_tensor_twice() -> None:
    taped = Taped(lambda x: (x * 2, x * 2, x + 1), torch.ones(4))
    double, again, more = taped(torch.full((4,), 5.0))
    assert double.tolist() == again.tolist() == [10.0] * 4
    assert more.tolist() == [6.0] * 4


@torch.no_grad()
def test_tape_tells_conjugates_and_negatives_apart() -> None:
    def function(x: Tensor) -> Tensor:
        made = torch.complex(x, 2 * x)
        return torch.view_as_real(made.conj() * made + made.conj().imag)

    x = torch.arange(4.0)
    assert torch.equal(Taped(function, torch.ones(4))(x), function(x))


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
