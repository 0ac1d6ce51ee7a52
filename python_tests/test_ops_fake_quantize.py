"""fake_quantize and its mixture against the plain-torch reference, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_counts import threads
from torch import Tensor

from adpdm import ops, reference
from adpdm.quantizers.activation import Importance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANT_MIN, QUANT_MAX = -8, 7
# A lane adds 64 rounded products in float32, all else is double: 65 roundings and the final one, 2^-24 each.
SUM_ERROR = 66 * 2.0**-24

shapes = st.lists(st.integers(0, 9), min_size=4, max_size=4)


def draw(shape: list[int], seed: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Normal values of which about a third lie outside the narrowest range."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def parameters(num_groups: int, seed: int, channels: int | None = None) -> tuple[Tensor, Tensor]:
    """scale and zero_point, [G] or [G, C] f32; zero-points are fractional and partly out of range."""
    generator = torch.Generator().manual_seed(seed)
    shape = [num_groups] if channels is None else [num_groups, channels]
    return torch.rand(shape, generator=generator) * 0.4 + 0.05, torch.randn(shape, generator=generator) * 5


def gradient_terms(x: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """|d/dscale| and |d/dzero_point| per element of a per-tensor quantizer, float64."""
    _, _, d_scale, d_zero_point = reference._fake_quantize_parts(x, scale, zero_point, QUANT_MIN, QUANT_MAX)
    return d_scale.double().abs(), d_zero_point.double().abs()


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """|actual - expected| <= bound element-wise, NaN never passes."""
    assert ((actual.double() - expected.double()).abs() <= bound).all(), (actual, expected, bound)


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=shapes, axis=st.integers(-1, 3), channels_last=st.booleans(), seed=st.integers(0, 99))
def test_fake_quantize_equals_reference(
    dtype: torch.dtype, shape: list[int], axis: int, channels_last: bool, seed: int
) -> None:
    x = draw(shape, seed, dtype, channels_last)
    index = torch.tensor([seed % 3], dtype=torch.int32)
    arguments = (*parameters(3, seed, None if axis < 0 else shape[axis]), index, QUANT_MIN, QUANT_MAX, axis)
    assert torch.equal(ops.fake_quantize(x, *arguments), reference.fake_quantize(x, *arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=shapes, axis=st.integers(-1, 3), channels_last=st.booleans(), seed=st.integers(0, 99))
def test_fake_quantize_backward_equals_reference(
    dtype: torch.dtype, shape: list[int], axis: int, channels_last: bool, seed: int
) -> None:
    x, grad = draw(shape, seed, dtype, channels_last), draw(shape, seed + 100, dtype, not channels_last)
    scale, zero_point = parameters(3, seed, None if axis < 0 else shape[axis])
    group = seed % 3
    arguments = (
        grad,
        x,
        scale,
        zero_point,
        torch.tensor([group], dtype=torch.int32),
        QUANT_MIN,
        QUANT_MAX,
        axis,
    )
    actual = torch.ops.adpdm.fake_quantize_backward(*arguments)
    expected = reference.fake_quantize_backward(*arguments)
    assert torch.equal(actual[0], expected[0])
    s, z = (reference._expand(p[group], x, axis) for p in (scale, zero_point))
    dims = [d for d in range(4) if d != axis]
    for i, derivative in enumerate(gradient_terms(x, s, z)):
        bound = torch.zeros_like(scale, dtype=torch.float64)
        bound[group] = SUM_ERROR * (grad.double().abs() * derivative).sum(dims if axis >= 0 else [0, 1, 2, 3])
        assert_within(actual[i + 1], expected[i + 1], bound)


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=shapes, groups=st.integers(1, 9), channels_last=st.booleans(), seed=st.integers(0, 99))
def test_mixture_equals_reference(
    dtype: torch.dtype, shape: list[int], groups: int, channels_last: bool, seed: int
) -> None:
    x = draw(shape, seed, dtype, channels_last)
    importance = torch.softmax(torch.randn(groups, generator=torch.Generator().manual_seed(seed)), 0)
    arguments = (*parameters(groups, seed), importance, QUANT_MIN, QUANT_MAX)
    assert torch.equal(
        ops.fake_quantize_mixture(x, *arguments), reference.fake_quantize_mixture(x, *arguments)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 17, 1025, 40000])
def test_mixture_backward_equals_reference(dtype: torch.dtype, size: int) -> None:
    x, grad = draw([size], 1, dtype, False), draw([size], 2, dtype, False)
    scale, zero_point = parameters(4, 3)
    importance = torch.tensor([0.4, 0.3, 0.2, 0.1])
    arguments = (grad, x, scale, zero_point, importance, QUANT_MIN, QUANT_MAX)
    actual = torch.ops.adpdm.fake_quantize_mixture_backward(*arguments)
    expected = reference.fake_quantize_mixture_backward(*arguments)
    assert torch.equal(actual[0], expected[0])
    weight = grad.double().abs()
    for group in range(4):
        d_scale, d_zero_point = gradient_terms(x, scale[group], zero_point[group])
        value = reference._fake_quantize_parts(x, scale[group], zero_point[group], QUANT_MIN, QUANT_MAX)[0]
        terms = (importance[group] * d_scale, importance[group] * d_zero_point, value.double().abs())
        for i, term in enumerate(terms):
            # The reference rounds value = steps * scale, the kernel sums steps: one rounding more.
            bound = (SUM_ERROR + 2.0**-24) * (weight * term).sum()
            assert_within(actual[i + 1][group], expected[i + 1][group], bound)


@pytest.mark.parametrize("function", ["fake_quantize", "fake_quantize_mixture"])
def test_autograd_calls_the_backward_operator(function: str, device: torch.device) -> None:
    x = draw([3, 50], 5, torch.float32, False).to(device).requires_grad_()
    scale, zero_point = (p.to(device).requires_grad_() for p in parameters(2, 6))
    third = (
        torch.tensor([1], dtype=torch.int32, device=device)
        if function == "fake_quantize"
        else torch.tensor([0.7, 0.3], device=device, requires_grad=True)
    )
    y = getattr(ops, function)(x, scale, zero_point, third, QUANT_MIN, QUANT_MAX)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(device)
    wanted = [t for t in (x, scale, zero_point, third) if t.requires_grad]
    actual = torch.autograd.grad(y, wanted, grad)
    extra = (-1,) if function == "fake_quantize" else ()
    backward = getattr(torch.ops.adpdm, f"{function}_backward")
    expected = backward(
        grad, x.detach(), scale.detach(), zero_point.detach(), third.detach(), QUANT_MIN, QUANT_MAX, *extra
    )
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_gradients_are_of_the_group_that_was_current() -> None:
    x = draw([4, 8, 2, 2], 0, torch.float32, False)
    scale, zero_point = parameters(2, 0)
    scale.requires_grad_()
    index = torch.zeros(1, dtype=torch.int32)
    total = torch.zeros(())
    for group in range(2):
        index.data.fill_(group)  # as the operators of the steps do, without telling autograd
        total = total + ops.fake_quantize(x, scale, zero_point, index, QUANT_MIN, QUANT_MAX).square().sum()
    (together,) = torch.autograd.grad(total, scale)
    apart = torch.zeros(2)
    for group in range(2):
        index.data.fill_(group)
        y = ops.fake_quantize(x, scale, zero_point, index, QUANT_MIN, QUANT_MAX)
        apart += torch.autograd.grad(y.square().sum(), scale)[0]
    assert (apart != 0).all()
    torch.testing.assert_close(together, apart)


def test_importance_has_the_gradient_of_its_step() -> None:
    importance = Importance(torch.tensor([0, 1], dtype=torch.int32), 2, 3.0)
    step = torch.zeros(1, dtype=torch.int32)
    weight = importance.weights(step)[0]
    step.data.fill_(1)
    weight.backward()
    assert importance.logits.grad is not None
    assert importance.logits.grad[0].ne(0).all()
    assert importance.logits.grad[1].eq(0).all()


@pytest.mark.parametrize("function", ["fake_quantize", "fake_quantize_mixture"])
def test_second_derivatives_are_refused(function: str) -> None:
    x = draw([2, 3], 0, torch.float32, False).requires_grad_()
    chosen = torch.tensor([0], dtype=torch.int32) if function == "fake_quantize" else torch.ones(3) / 3
    y = getattr(ops, function)(x, *parameters(3, 0), chosen, QUANT_MIN, QUANT_MAX)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="wanted first derivatives of fake_quantize"):
        grad.square().sum().backward()


def test_mixture_gradient_of_importance_is_a_finite_difference() -> None:
    x, grad = draw([2000], 8, torch.float32, False), draw([2000], 9, torch.float32, False)
    scale, zero_point = parameters(3, 10)
    importance = torch.tensor([0.5, 0.25, 0.25])
    actual = torch.ops.adpdm.fake_quantize_mixture_backward(
        grad, x, scale, zero_point, importance, QUANT_MIN, QUANT_MAX
    )[3]
    for group in range(3):
        only = torch.zeros(3)
        only[group] = 1.0  # linear in importance: the value for a unit vector is the derivative
        value = ops.fake_quantize_mixture(x, scale, zero_point, only, QUANT_MIN, QUANT_MAX).double()
        bound = (SUM_ERROR + 2.0**-24) * (grad.double() * value).abs().sum()
        assert_within(actual[group], (grad.double() * value).sum(), bound)


def with_threads(call: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Results of the call with one and with two threads."""
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(call())
    return results


@pytest.mark.parametrize("axis", [-1, 0])
def test_fake_quantize_backward_same_bits_for_any_thread_count(axis: int) -> None:
    x, grad = draw([6, 50021], 11, torch.float32, False), draw([6, 50021], 12, torch.float32, False)
    scale, zero_point = parameters(2, 13, None if axis < 0 else 6)
    index = torch.tensor([1], dtype=torch.int32)
    one, two = with_threads(
        lambda: torch.ops.adpdm.fake_quantize_backward(
            grad, x, scale, zero_point, index, QUANT_MIN, QUANT_MAX, axis
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_mixture_backward_same_bits_for_any_thread_count() -> None:
    x, grad = draw([300021], 14, torch.float32, False), draw([300021], 15, torch.float32, False)
    scale, zero_point = parameters(8, 16)
    importance = torch.full((8,), 0.125)
    one, two = with_threads(
        lambda: torch.ops.adpdm.fake_quantize_mixture_backward(
            grad, x, scale, zero_point, importance, QUANT_MIN, QUANT_MAX
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_fake_quantize_passes_opcheck(channels_last: bool, device: torch.device) -> None:
    x = draw([2, 3, 4, 5], 17, torch.float32, channels_last).to(device)
    scale, zero_point = (p.to(device) for p in parameters(2, 18))
    rows = tuple(p.to(device) for p in parameters(2, 18, channels=3))
    index = torch.tensor([1], dtype=torch.int32, device=device)
    importance = torch.tensor([0.5, 0.5], device=device)
    library = torch.ops.adpdm

    def differentiable(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_()

    learnable = [differentiable(t) for t in (x, scale, zero_point)]
    torch.library.opcheck(library.fake_quantize.default, (*learnable, index, QUANT_MIN, QUANT_MAX, -1))
    channels = [differentiable(t) for t in (x, *rows)]
    torch.library.opcheck(library.fake_quantize.default, (*channels, index, QUANT_MIN, QUANT_MAX, 1))
    mixed = (*learnable, differentiable(importance), QUANT_MIN, QUANT_MAX)
    torch.library.opcheck(library.fake_quantize_mixture.default, mixed)
    backward = (x, x, scale, zero_point, index, QUANT_MIN, QUANT_MAX, -1)
    torch.library.opcheck(library.fake_quantize_backward.default, backward)
    mixture_backward = (x, x, scale, zero_point, importance, QUANT_MIN, QUANT_MAX)
    torch.library.opcheck(library.fake_quantize_mixture_backward.default, mixture_backward)


ERRORS = [
    ({"x": torch.zeros(2, 3, dtype=torch.int8)}, TypeError, "x must be torch.float32"),
    (
        {"zero_point": torch.zeros(2, dtype=torch.int32)},
        TypeError,
        "zero_point must be torch.float32, got torch.int32",
    ),
    ({"zero_point": torch.zeros(3)}, ValueError, r"zero_point must have the shape of scale \[2\], got \[3\]"),
    ({"channel_axis": 2}, ValueError, r"channel_axis must be -1 or in \[0, 2\), got 2"),
    ({"channel_axis": -2}, ValueError, "channel_axis must be -1 or a dimension of x, got -2"),
    (
        {"channel_axis": 1},
        ValueError,
        r"scale must have shape \[num_groups, 3\] for channel_axis=1, got \[2\]",
    ),
    ({"quant_min": 7}, ValueError, "quant_min < quant_max must lie in .*, got quant_min=7 and quant_max=7"),
    ({"group_index": torch.tensor([2], dtype=torch.int32)}, IndexError, r"in \[0, num_groups=2\), got 2"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_fake_quantize_rejects(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.zeros(2, 3),
        "scale": torch.ones(2),
        "zero_point": torch.zeros(2),
        "group_index": torch.zeros(1, dtype=torch.int32),
        "quant_min": QUANT_MIN,
        "quant_max": QUANT_MAX,
    }
    with pytest.raises(error, match=f"fake_quantize: .*{message}"):
        ops.fake_quantize(**{**arguments, **change})  # type: ignore[arg-type]


def test_mixture_rejects_wrong_importance() -> None:
    with pytest.raises(
        ValueError, match=r"fake_quantize_mixture: importance must have shape \[2\], got \[3\]"
    ):
        ops.fake_quantize_mixture(torch.zeros(2), *parameters(2, 0), torch.ones(3), QUANT_MIN, QUANT_MAX)
