"""The one clock: which sampling step the denoiser is in, written by a hook and read by kernels as tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import TimestepPolicy


class StepState(nn.Module):
    """Tables from timestep to step to group, and the current row of them.

    Layers refer to this module and read `group_index` through their slot; only `set_timestep` writes.

    Args:
        num_slots: number of grouped quantizers in the denoiser.
        num_steps: T, calibrated steps.
        num_train_timesteps: length of the table that is keyed by timestep.
        policy: `nearest` calibrated timestep, or `error` for any other.
    """

    group_index: Tensor  # [num_slots] i32, groups of the current step
    step_index: Tensor  # [1] i32, current step
    timestep_to_step: Tensor  # [num_train_timesteps] i32, -1 where the policy forbids the timestep
    table: Tensor  # [T, num_slots] i32

    def __init__(
        self, num_slots: int, num_steps: int, num_train_timesteps: int, policy: TimestepPolicy = "nearest"
    ) -> None:
        super().__init__()
        self.policy = policy
        self.register_buffer("group_index", torch.zeros(num_slots, dtype=torch.int32), persistent=False)
        self.register_buffer("step_index", torch.zeros(1, dtype=torch.int32), persistent=False)
        self.register_buffer("timestep_to_step", torch.zeros(num_train_timesteps, dtype=torch.int32))
        self.register_buffer("table", torch.zeros(num_steps, num_slots, dtype=torch.int32))

    def set_timesteps(self, timesteps: Tensor) -> None:
        """Fill the timestep table for calibrated timesteps [T], noisiest first, by the policy."""
        calibrated = timesteps.detach().double().cpu()
        every = torch.arange(self.timestep_to_step.numel(), dtype=torch.float64)
        distance = (every[:, None] - calibrated[None, :]).abs()
        nearest = distance.argmin(1).to(torch.int32)
        if self.policy == "error":
            nearest[distance.amin(1) > 0.5] = -1  # schedulers may hand over fractional timesteps
        self.timestep_to_step.copy_(nearest)

    def set_timestep(self, timestep: Tensor | float | int) -> None:
        """Make the groups of one timestep current. A [B] tensor must hold one value B times.

        Raises:
            ValueError: for mixed timesteps in a batch (checked on the CPU only, where looking is free), or
                for a timestep outside the calibrated ones under the policy `error`.
        """
        index = self._table_position(timestep)
        step = self.timestep_to_step.index_select(0, index)
        if self.policy == "error" and int(step) < 0:
            raise ValueError(
                f"timestep {float(index)} was not calibrated and timestep_policy is 'error'; "
                f"calibrated are {self._calibrated()}"
            )
        self.step_index.copy_(step)
        self.group_index.copy_(self.table.index_select(0, step)[0])

    def set_step(self, step: int) -> None:
        """Make step `step` of the calibrated trajectory current (calibration only)."""
        self.step_index.fill_(step)
        self.group_index.copy_(self.table[step])

    def _table_position(self, timestep: Tensor | float | int) -> Tensor:
        last = self.timestep_to_step.numel() - 1
        if not isinstance(timestep, Tensor):
            return torch.tensor([min(max(round(timestep), 0), last)], device=self.table.device)
        flat = timestep.detach().reshape(-1)
        if flat.numel() == 0:
            raise ValueError("timestep must hold at least one value, got an empty tensor")
        if flat.numel() > 1 and flat.device.type == "cpu" and bool((flat != flat[0]).any()):
            raise ValueError(
                "adpdm quantizes one timestep per call, but the batch mixes timesteps "
                f"{sorted({float(t) for t in flat})[:8]}; call the denoiser once per timestep"
            )
        return flat[:1].to(self.table.device).round().long().clamp(0, last)

    def _calibrated(self) -> list[int]:
        steps = self.timestep_to_step
        return [int(i) for i in torch.nonzero(steps >= 0).flatten()][::-1]


def attach_step_hook(denoiser: nn.Module) -> torch.utils.hooks.RemovableHandle:
    """Let the denoiser set the step from its `timestep` argument before every forward pass."""

    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1] if len(args) > 1 else None
        if timestep is None:
            raise ValueError(
                f"{type(module).__name__}: adpdm needs the timestep, as second positional or keyword "
                "argument `timestep`; got neither"
            )
        module.get_submodule("adpdm_step").set_timestep(timestep)  # type: ignore[operator]

    return denoiser.register_forward_pre_hook(before_forward, with_kwargs=True)
