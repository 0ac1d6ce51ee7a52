"""The clock: timesteps in every form the samplers use, and the hook that reads them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adpdm import ops, reference
from adpdm.config import TimestepPolicy
from adpdm.step import StepState, attach_step_hook, detach_step_hook

CALIBRATED = [900.0, 600.0, 300.0, 0.0]


def make_state(policy: TimestepPolicy = "nearest", timesteps: list[float] = CALIBRATED) -> StepState:
    """Two slots: the first has the group k at step k, the second 3 - k."""
    steps = len(timesteps)
    state = StepState(2, steps, policy)
    state.set_timesteps(torch.tensor(timesteps))
    k = torch.arange(steps, dtype=torch.int32)
    state.table.copy_(torch.stack([k, steps - 1 - k], 1))
    return state


@pytest.mark.parametrize(
    "timestep",
    [
        600,
        600.0,
        torch.tensor(600),
        torch.tensor(600.0),
        torch.tensor([600]),
        torch.full((3,), 600),
        torch.full((2,), 600.0, dtype=torch.float64),
        torch.tensor([600], dtype=torch.int32),
    ],
)
def test_set_timestep_takes_every_form(timestep: Tensor | float) -> None:
    state = make_state()
    state.set_timestep(timestep)
    assert state.step_index.tolist() == [1]
    assert state.group_index.tolist() == [1, 2]
    assert state.group_index.dtype == torch.int32


def test_set_timestep_refuses_a_batch_of_mixed_timesteps() -> None:
    state = make_state()
    state.set_timestep(300)
    with pytest.raises(ValueError, match=r"call the denoiser once per timestep: \[300.0, 900.0\]"):
        state.set_timestep(torch.tensor([300, 900, 300]))
    assert state.group_index.tolist() == [2, 1]  # untouched


def test_set_timestep_refuses_an_empty_tensor() -> None:
    with pytest.raises(ValueError, match="at least one value, got an empty tensor"):
        make_state().set_timestep(torch.zeros(0))


@pytest.mark.parametrize("steps", [3, 7, 10, 50, 999])
def test_nearest_policy_serves_other_step_counts(steps: int) -> None:
    state = make_state()
    for timestep in torch.linspace(999, 0, steps).tolist():
        state.set_timestep(timestep)
        step = int(state.step_index)
        distances = [abs(timestep - c) for c in CALIBRATED]
        assert distances[step] == min(distances)
        assert state.group_index.tolist() == [step, 3 - step]


def test_nearest_policy_serves_timesteps_beyond_the_calibrated_ones() -> None:
    state = make_state()
    for timestep, step in ((5000, 0), (-3, 3), (torch.tensor(1e6), 0), (torch.tensor([-1, -1]), 3)):
        state.set_timestep(timestep)
        assert int(state.step_index) == step


@pytest.mark.parametrize("unit", [1e-3, 1.0, 37.5])
def test_timesteps_may_have_any_unit(unit: float) -> None:
    # Transformers under flow matching are given noise levels in [0, 1]; EDM gives logarithms, also below 0.
    levels = [unit * (c - 450.0) for c in CALIBRATED]
    state = make_state(timesteps=levels)
    for step, level in enumerate(levels):
        for near in (level - 0.4 * 300 * unit, level, level + 0.4 * 300 * unit):
            state.set_timestep(torch.full((2,), near))
            assert int(state.step_index) == step


def test_error_policy_names_timestep_and_calibrated_ones() -> None:
    state = make_state("error")
    state.set_timestep(torch.tensor(300))
    assert int(state.step_index) == 2
    message = r"not calibrated and .* 'error': got 450, calibrated are \[900.0, 600.0, 300.0, 0.0\]"
    with pytest.raises(ValueError, match=message):
        state.set_timestep(450)
    assert state.group_index.tolist() == [2, 1]  # untouched


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_error_policy_allows_for_the_rounding_of_the_samples_dtype(dtype: torch.dtype) -> None:
    levels = [0.9876, 0.7512, 0.5033, 0.2517]
    state = make_state("error", levels)
    for step, level in enumerate(levels):
        # What a pipeline of flow matching does: the timestep in the dtype of the samples, then divided.
        state.set_timestep(torch.tensor(1000 * level).to(dtype) / 1000)
        assert int(state.step_index) == step
    with pytest.raises(ValueError, match="not calibrated .* got 0.7[34].*, calibrated are"):
        state.set_timestep(torch.tensor(0.74, dtype=dtype))


def test_timesteps_stay_float32_when_the_model_is_cast() -> None:
    state = make_state(timesteps=[990.7, 988.2, 3.1, 0.0]).to(torch.bfloat16)
    assert state.timesteps.dtype == torch.float32
    for step, timestep in enumerate((990.7, 988.2, 3.1, 0.0)):
        state.set_timestep(timestep)
        assert int(state.step_index) == step


def test_error_policy_accepts_fractional_timesteps_of_the_scheduler() -> None:
    timesteps = [999.0, 749.25, 499.5, 249.75, 0.0]
    state = make_state("error", timesteps)
    for step, timestep in enumerate(timesteps):
        state.set_timestep(torch.tensor(timestep))
        assert int(state.step_index) == step


def test_steps_may_come_in_any_order_and_twice() -> None:
    # Guidance calls twice per step, img2img starts late: the clock is the timestep, not a counter.
    state = make_state()
    seen = []
    for timestep in (300, 300, 0, 0, 900):
        state.set_timestep(timestep)
        seen.append(int(state.step_index))
    assert seen == [2, 2, 3, 3, 0]


def test_writing_keeps_the_tensors_that_kernels_hold() -> None:
    state = make_state()
    view = state.group_index.narrow(0, 1, 1)
    state.set_timestep(0)
    assert view.tolist() == [0]
    state.set_step(1)
    assert view.tolist() == [2]


def test_state_dict_holds_the_tables_only() -> None:
    assert sorted(make_state().state_dict()) == ["table", "timesteps"]


class Denoiser(nn.Module):
    """Returns the step it believes to be in."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("adpdm_step", make_state())

    def forward(self, sample: Tensor, timestep: object = None, scale: float = 1.0) -> int:
        return int(self.get_submodule("adpdm_step").step_index)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_tables_are_those_that_steps_read(assign: bool) -> None:
    state, other = make_state(), make_state()
    other.table.copy_(1 - other.table.clamp(max=1))
    state.load_state_dict(other.state_dict(), assign=assign)
    state.set_timestep(900)
    assert state.group_index.tolist() == other.table[0].tolist() == [1, 0]


def test_hook_reads_positional_and_keyword_timesteps() -> None:
    denoiser = Denoiser()
    attach_step_hook(denoiser)
    sample = torch.zeros(1)
    assert denoiser(sample, 600) == 1
    assert denoiser(sample, timestep=torch.tensor([300])) == 2
    assert denoiser(sample=sample, timestep=900.0) == 0


class LateTimestep(Denoiser):
    """As in transformers for text and image: the timestep is the third argument."""

    def forward(self, sample: Tensor, context: object = None, timestep: object = None) -> int:  # type: ignore[override]
        return int(self.get_submodule("adpdm_step").step_index)


def test_hook_finds_the_timestep_where_the_denoiser_takes_it() -> None:
    denoiser = LateTimestep()
    attach_step_hook(denoiser)
    assert denoiser(torch.zeros(1), 900.0, 600) == 1
    assert denoiser(torch.zeros(1), 900.0, timestep=300) == 2
    with pytest.raises(ValueError, match="as positional argument 2 or as keyword"):
        denoiser(torch.zeros(1), 900.0)


def test_denoiser_without_timestep_is_refused() -> None:
    message = r"Linear.forward must have an argument `timestep` .*, got \['input'\]"
    with pytest.raises(TypeError, match=message):
        attach_step_hook(nn.Linear(1, 1))


def test_hook_refuses_a_call_without_timestep() -> None:
    denoiser = Denoiser()
    attach_step_hook(denoiser)
    with pytest.raises(ValueError, match="Denoiser: adpdm needs the timestep.*got neither"):
        denoiser(torch.zeros(1), scale=2.0)


def test_hook_can_be_removed() -> None:
    denoiser = Denoiser()
    attach_step_hook(denoiser)
    detach_step_hook(denoiser)
    assert denoiser(torch.zeros(1), 600) == 0
    assert not denoiser._forward_hooks
    assert not denoiser._forward_hooks_always_called


@given(
    timesteps=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    timestep=st.one_of(st.floats(-2e4, 2e4, width=32), st.just(math.nan), st.integers(-5, 2000)),
    slots=st.integers(0, 3),
    corrects=st.booleans(),
)
def test_set_step_matches_reference(
    timesteps: list[float], timestep: float, slots: int, corrects: bool
) -> None:
    table = torch.arange(len(timesteps) * slots, dtype=torch.int32).view(len(timesteps), slots)
    correction = torch.arange(2.0 * len(timesteps)).view(-1, 2) if corrects else None
    results = []
    for set_step in (ops.set_step, reference.set_step):
        current = [torch.full((1,), -1).int(), torch.full((slots,), -1).int(), torch.full((2,), -1.0)]
        set_step(torch.tensor([timestep]), torch.tensor(timesteps), table, correction, *current)
        results.append([x.tolist() for x in current])
    assert results[0] == results[1]


def step_arguments() -> dict[str, Tensor]:
    return {
        "timestep": torch.tensor([3]),
        "timesteps": torch.tensor([9.0, 2.0]),
        "table": torch.tensor([[1, 2, 3], [4, 5, 6]]).int(),
        "correction": torch.tensor([[1.0, 0.0], [0.5, 0.25]]),
        "step_index": torch.zeros(1).int(),
        "group_index": torch.zeros(3).int(),
        "current_correction": torch.zeros(2),
    }


def test_set_step_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.adpdm.set_step.default, tuple(step_arguments().values()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"timestep": torch.zeros(2)}, ValueError, "timestep must hold 1 value, got 2"),
        ({"timesteps": torch.zeros(0)}, ValueError, "timesteps must have at least 1 element, got 0"),
        ({"timesteps": torch.zeros(2).int()}, TypeError, "timesteps must be"),
        ({"table": torch.zeros(2, 2).int()}, ValueError, r"table must have shape \[2, 3\], got \[2, 2\]"),
        ({"table": torch.zeros(3, 2).int().t()}, ValueError, "table must be contiguous"),
        ({"table": torch.zeros(2, 3)}, TypeError, "table must be"),
        ({"step_index": torch.zeros(2).int()}, ValueError, r"step_index must have shape \[1\], got \[2\]"),
        ({"group_index": torch.zeros(3)}, TypeError, "group_index must be"),
        ({"correction": torch.zeros(2, 3)}, ValueError, r"correction must have shape \[2, 2\], got \[2, 3\]"),
        ({"correction": torch.zeros(2, 2).int()}, TypeError, "correction must be"),
        ({"current_correction": torch.zeros(3)}, ValueError, r"current_correction must have shape \[2\]"),
    ],
)
def test_set_step_refuses(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"set_step: {message}"):
        torch.ops.adpdm.set_step(**{**step_arguments(), **change})
