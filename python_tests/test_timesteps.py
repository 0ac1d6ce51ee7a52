"""Selection of calibration timesteps: the rule of every selection, and the distance that judges it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from adpdm import QuantConfig, timesteps
from adpdm.quantizers import Importance
from adpdm.timesteps import TimestepSelector, fixed_visits, mmd_trace

STEPS, GROUPS = 12, 4


def selector(selection: Any, rounds: int = 8, steps: int = STEPS, **changes: Any) -> TimestepSelector:
    config = QuantConfig(
        selection=selection, num_inference_steps=steps, num_groups=min(GROUPS, steps), **changes
    )
    return TimestepSelector(config, rounds, steps)


def draws(selector: TimestepSelector, rounds: int) -> list[int]:
    return [selector.choose(torch.zeros(selector.num_steps)) for _ in range(rounds)]


def test_srm_maximises_entropy_plus_visit_bonus(generator: torch.Generator) -> None:
    chooser, visits = selector("srm"), [0] * STEPS
    for _ in range(40):
        entropy = torch.rand(STEPS, generator=generator)
        score = [float(e) + 1.5 / math.log(GROUPS) / (n + 1) for e, n in zip(entropy, visits, strict=True)]
        wanted = score.index(max(score))
        assert chooser.choose(entropy) == wanted
        visits[wanted] += 1
    assert chooser.visits == visits
    assert max(visits) > 1  # entropy won over the bonus at least once


def test_srm_bonus_weighs_against_entropy_as_eta_says() -> None:
    # Step 0 visited once has lost half of 1.5 / ln 4: entropy 0.55 makes up for that, 0.53 does not.
    half = 1.5 / math.log(GROUPS) / 2
    for lead, wanted in ((half - 0.01, 1), (half + 0.01, 0)):
        chooser = selector("srm")
        first = torch.zeros(STEPS)
        first[0] = 1.0
        assert chooser.choose(first) == 0
        second = torch.zeros(STEPS)
        second[0] = lead
        assert chooser.choose(second) == wanted


def test_srm_trace_tells_entropy_score_and_visits_before_the_choice() -> None:
    chooser = selector("srm")
    entropy = torch.linspace(0, 1, STEPS)
    chooser.choose(entropy)
    row = chooser.trace[0]
    assert (row["round"], row["step_index"], row["visits"]) == (0, STEPS - 1, [0] * STEPS)
    assert row["entropy"] == pytest.approx(entropy.tolist(), abs=1e-6)
    assert row["score"] == pytest.approx([e + 1.5 / math.log(GROUPS) for e in entropy.tolist()], abs=1e-6)


def test_entropy_is_zero_at_one_hot_and_one_at_uniform() -> None:
    importance = Importance(torch.zeros(3, dtype=torch.int32), 4, 0.0)
    with torch.no_grad():
        importance.logits[1, 2] = 1e4  # softmax is one-hot here, 0 * log 0 in the plain formula
        importance.logits[2] = -1e4
    assert importance.normalized_entropy().tolist() == [1.0, 0.0, 1.0]


def test_entropy_gradient_is_finite_at_one_hot() -> None:
    importance = Importance(torch.zeros(1, dtype=torch.int32), 4, 1e4)
    importance.normalized_entropy().sum().backward()
    assert importance.logits.grad is not None
    assert importance.logits.grad.tolist() == [[0.0, 0.0, 0.0, 0.0]]


def test_entropy_of_a_single_group_is_zero() -> None:
    assert Importance(torch.zeros(2, dtype=torch.int32), 1, 1.5).normalized_entropy().tolist() == [0.0, 0.0]


def test_uniform_selection_takes_every_nth_step() -> None:
    assert draws(selector("uniform", 4), 4) == [0, 3, 6, 9]


@pytest.mark.parametrize("selection", ["normal", "random"])
def test_draws_depend_on_the_seed_alone(selection: str) -> None:
    first = draws(selector(selection, seed=3, steps=50), 20)
    torch.rand(5)  # the global generator must not matter
    assert draws(selector(selection, seed=3, steps=50), 20) == first
    assert draws(selector(selection, seed=4, steps=50), 20) != first
    assert len(set(first)) > 5


@pytest.mark.parametrize("selection", ["srm", "uniform", "normal", "random"])
def test_resumed_selector_continues_the_sequence(selection: str) -> None:
    whole = selector(selection)
    wanted = draws(whole, 8)
    half = selector(selection)
    draws(half, 5)
    resumed = TimestepSelector(half.config, 8, STEPS, visits=list(half.visits), trace=list(half.trace))
    assert draws(resumed, 3) == wanted[5:]


def test_normal_selection_centres_at_two_fifths_from_the_noisy_end() -> None:
    values = torch.tensor(draws(selector("normal", 400, steps=200), 400), dtype=torch.float64)
    # The median of 400 normal draws has a standard error of 1.25 * 0.4 T / 20; five of them.
    assert float(values.median()) == pytest.approx(80, abs=5 * 1.25 * 80 / 20)
    assert int(values.min()) >= 0
    assert int(values.max()) <= 199


@pytest.mark.parametrize("selection", ["srm", "uniform", "normal", "random"])
@pytest.mark.parametrize("steps", [1, 5, 30])
def test_exclude_first_is_never_selected(selection: str, steps: int) -> None:
    chooser = selector(selection, 40, steps=steps, exclude_first=0.4)
    chosen = draws(chooser, 40)
    assert min(chosen) >= min(math.ceil(0.4 * steps), steps - 1)
    assert max(chosen) < steps
    assert steps == 1 or len(set(chosen)) > 1


@pytest.mark.parametrize("selection", ["uniform", "normal", "random"])
def test_fixed_visits_count_the_draws(selection: str) -> None:
    chooser = selector(selection, 6)
    wanted = [0] * STEPS
    for step in draws(chooser, 6):
        wanted[step] += 1
    assert fixed_visits(chooser.config, 6, STEPS) == wanted


def test_fixed_visits_of_srm_take_every_step() -> None:
    assert fixed_visits(selector("srm").config, 3, STEPS) == [1] * STEPS


@pytest.mark.parametrize(("share", "first"), [(0.14, 7), (0.28, 14), (0.15, 8), (0.0, 0)])
def test_excluded_steps_are_those_of_the_share_as_it_is_written(share: float, first: int) -> None:
    assert selector("srm", steps=50, exclude_first=share).first_allowed == first


# ---- maximum mean discrepancy ------------------------------------------------------------------------------


def samples(generator: torch.Generator, steps: int = 4) -> Tensor:
    """Noise whose mean drifts along the trajectory, [T, 3, 1, 2, 2]."""
    drift = torch.arange(steps, dtype=torch.float32).view(-1, 1, 1, 1, 1)
    return torch.randn(steps, 3, 1, 2, 2, generator=generator) + drift


def test_mmd_is_zero_when_all_steps_are_chosen_equally(generator: torch.Generator) -> None:
    trace = mmd_trace(samples(generator), [2, 0, 3, 1, 1, 0, 2, 3])
    # A square root of cancelled sums of order one in float64: sqrt(16 * 2^-53) = 4e-8.
    assert trace[3] == pytest.approx(0.0, abs=5e-8)
    assert trace[7] == pytest.approx(0.0, abs=5e-8)
    assert min(trace[:3]) > 0.05


def test_mmd_is_zero_when_the_steps_do_not_differ(generator: torch.Generator) -> None:
    same = torch.randn(1, 3, 1, 2, 2, generator=generator).expand(4, -1, -1, -1, -1)
    assert mmd_trace(same, [1, 1, 2]) == pytest.approx([0.0] * 3, abs=5e-8)


def test_mmd_of_many_points_is_of_the_first_images(generator: torch.Generator, monkeypatch: Any) -> None:
    data = samples(generator)
    whole = mmd_trace(data[:, :2], [2, 0, 2])
    monkeypatch.setattr(timesteps, "MMD_POINTS", 2 * data.shape[0] + 1)
    assert data.shape[1] > 2
    assert mmd_trace(data, [2, 0, 2]) == whole


def test_mmd_equals_its_definition(generator: torch.Generator) -> None:
    data = samples(generator, 3)
    points = data.reshape(9, -1).double()
    squares = [[float((a - b).square().sum()) for b in points] for a in points]
    positive = sorted(v for row in squares for v in row if v > 0)
    bandwidth = positive[(len(positive) - 1) // 2]  # torch takes the lower median

    def mean_kernel(a: list[int], b: list[int]) -> float:
        return sum(math.exp(-squares[i][j] / bandwidth) for i in a for j in b) / len(a) / len(b)

    every, chosen = list(range(9)), [6, 7, 8, 0, 1, 2, 6, 7, 8]  # steps 2, 0, 2
    wanted = mean_kernel(every, every) + mean_kernel(chosen, chosen) - 2 * mean_kernel(every, chosen)
    # |a|^2 + |b|^2 - 2ab cancels: 1e-6 relative is what its float64 leaves with room.
    assert mmd_trace(data, [2, 0, 2])[-1] == pytest.approx(math.sqrt(wanted), rel=1e-6)


def test_mmd_takes_columns_in_turn(generator: torch.Generator, monkeypatch: Any) -> None:
    data, widths = torch.randn(4, 3, 2, 5, 5, generator=generator), []
    wanted = mmd_trace(data, [2, 0, 2])
    monkeypatch.setattr(timesteps, "MMD_COLUMNS", 7)
    plain = Tensor.double
    monkeypatch.setattr(Tensor, "double", lambda x: widths.append(x.shape[-1]) or plain(x))
    assert mmd_trace(data, [2, 0, 2]) == pytest.approx(wanted, rel=1e-12)
    assert max(widths) <= 7, "no float64 copy of all numbers"
