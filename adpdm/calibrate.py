"""Calibration: trajectories, histograms, partition, search, and the ranges that come out of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bias import correct_bias
from .config import QuantConfig
from .files import check_writable
from .nn import QuantLayer
from .partition import partition
from .precision import RAISED_BITS, measure_sensitivity, raise_bits
from .processes import ALONE, Processes
from .progress import Progress, silent
from .quantizers import ActivationQuantizer
from .replay import Replay
from .rounding import NEAREST_FROM_BITS, round_weights
from .search import SearchOutcome
from .search_run import SearchRun
from .search_state import SearchState
from .timesteps import fixed_visits
from .trajectory import Sampler, Trajectory, run_in_units

MIN_STEP_WEIGHT = 0.02  # of the mean


@dataclass
class CalibrationTrace:
    """What calibration found out, for the report."""

    histogram_bytes: int = 0
    trajectory_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    visits: list[int] = field(default_factory=list)
    step_weights: list[float] = field(default_factory=list)
    equalization: dict[str, float] = field(default_factory=dict)  # largest over smallest factor, by layer
    rounding: dict[str, float] = field(default_factory=dict)  # squared error over that of nearest, by layer
    sensitivity: dict[str, dict[str, float]] = field(default_factory=dict)  # by layer, see precision.py
    mmd: list[float] = field(default_factory=list)  # after every round
    losses: list[float] = field(default_factory=list)
    quantizers: list[dict[str, Any]] = field(default_factory=list)  # observed and covered ranges, groups
    group_gain: dict[str, dict[str, float]] = field(default_factory=dict)  # of the partition, by quantizer
    outcome: SearchOutcome | None = None
    correction: dict[str, list[Any]] = field(default_factory=dict)  # of predictions, by step
    warnings: list[str] = field(default_factory=list)

    def summarize_gain(self) -> tuple[float, float, float]:
        """Median and largest gain over one range for all steps, and the median limit, in dB."""
        gains = [row["gain_db"] for row in self.group_gain.values()]
        limits = [row["limit_db"] for row in self.group_gain.values()]
        return statistics.median(gains), max(gains), statistics.median(limits)

    def to_dict(self) -> dict[str, Any]:
        values = dict(self.__dict__)
        values["outcome"] = None if self.outcome is None else self.outcome.to_dict()
        return values


class Calibration:
    """One calibration of a swapped denoiser; `run` does all of it.

    Args:
        sampler: runs the denoiser whose layers are the quantized twins, still in float.
        layers: the twins by name; the table of timesteps that they refer to is filled.
        macs: multiply-accumulates of each layer, for one sample.
        state_file: where the search saves itself after every round, and resumes from; None does neither.
            The first process writes and reads it.
        processes: that share the work; all of them end with the same ranges, codes and trace.
        fingerprint: what a saved search belongs to.
    """

    replay: Replay  # of the trajectories, once they are there
    step_weights: Tensor  # [T] f64, 1 on average

    def __init__(
        self,
        sampler: Sampler,
        layers: dict[str, QuantLayer],
        macs: Mapping[str, int],
        config: QuantConfig,
        progress: Progress = silent,
        state_file: Path | None = None,
        processes: Processes = ALONE,
        fingerprint: str = "",
    ) -> None:
        self.sampler, self.layers, self.macs, self.config = sampler, layers, macs, config
        self.progress, self.state_file, self.processes = progress, state_file, processes
        self.fingerprint = fingerprint
        self.trace, self.has_failed_to_save = CalibrationTrace(), False
        self.num_steps = len(sampler.timesteps)
        self.quantizers: dict[str, ActivationQuantizer] = {
            name if len(layer.quantizers) == 1 else f"{name}[{i}]": q
            for name, layer in layers.items()
            for i, q in enumerate(layer.quantizers)
        }

    def run(self) -> CalibrationTrace:
        """Observe, partition, search; leaves every quantizer with its ranges and tables, in fake mode."""
        config, names = self.config, list(self.layers)
        # Before any work: a state that cannot be resumed, or that could never be written, is refused.
        saved = self.processes.first(self._saved) if config.searches else None
        self._weigh(self._timed("trajectories", self._observe))
        self._timed("partition", lambda: self._partition(names))
        self._timed("weights", lambda: self._round_weights(names))
        self._timed("raised layers", self._raise_bits)
        for quantizer in self.quantizers.values():
            quantizer.counts = None  # 16 KiB a step, and no range is fitted to them any more
        self._timed("bias correction", lambda: correct_bias(self.replay, config))
        if config.searches:
            self._timed("search", lambda: self._search(saved))
        elif config.grouping == "search":
            self.trace.warnings.append(
                "grouping 'search' wanted at least 2 groups, got num_groups=1: nothing was searched"
            )
        self.trace.quantizers = [_describe(name, q) for name, q in self.quantizers.items()]
        for quantizer in self.quantizers.values():
            quantizer.extrema = None
        return self.trace

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.trace.seconds[phase] = time.perf_counter() - start
        return result

    # ---- histograms ----

    def _observe(self) -> Trajectory:
        config, quantizers = self.config, list(self.quantizers.values())
        for quantizer in quantizers:
            quantizer.start_observing(self.num_steps)
        self.trace.histogram_bytes = sum(q.counts.nbytes for q in quantizers if q.counts is not None)

        def watch(calls: int, done: int, total: int) -> None:
            self._check_finite(calls - 1)
            self.progress("trajectories", done, total)

        images = range(config.histogram_images)
        trajectory = run_in_units(self.sampler, self.processes, config.seed, images, on_step=watch)
        self.processes.add_up([q.counts for q in quantizers if q.counts is not None])
        self.processes.widen([q.extrema for q in quantizers if q.extrema is not None])
        self.trace.trajectory_bytes = trajectory.samples.nbytes + trajectory.noise_preds.nbytes
        return trajectory

    def _check_finite(self, call: int) -> None:
        if call < 0:
            return
        step_index = self.sampler.step_of_call[call]
        for name, quantizer in self.quantizers.items():
            assert quantizer.extrema is not None
            low, high = quantizer.extrema[step_index].tolist()
            if not (low > -float("inf") and high < float("inf")):  # false for NaN as well
                raise ValueError(
                    f"calibration: the input of layer {name!r} at timestep "
                    f"{float(self.sampler.calls[call]):g} must be finite, got range [{low}, {high}]; "
                    "the full-precision model itself produces it"
                )

    def _weigh(self, trajectory: Trajectory) -> None:
        """Replay the trajectories from now on, calls and steps weighed by what an error does at them."""
        weights = weights_of_calls(trajectory.sensitivity)
        if not self.config.weigh_steps:
            weights = torch.ones_like(weights)
        self.replay = Replay(self.sampler, self.layers, trajectory, weights, self.progress, self.processes)
        # What depends on the timestep alone counts by all calls at it.
        steps = torch.tensor(self.sampler.step_of_call, device="cpu")
        of_steps = weights.new_zeros(self.num_steps).index_add_(0, steps, weights)
        self.step_weights = of_steps / of_steps.mean()
        self.trace.step_weights = self.step_weights.tolist()

    # ---- partition ----

    def _partition(self, names: list[str]) -> None:
        config, quantizers = self.config, [q for name in names for q in self.layers[name].quantizers]
        if config.searches:
            self.trace.visits = [1] * self.num_steps
        else:
            self.trace.visits = fixed_visits(config, config.num_rounds, self.num_steps)
        importance = self.step_weights * torch.tensor(self.trace.visits, device="cpu")
        gains = partition(
            quantizers, importance, config, self.processes, lambda *done: self.progress("partition", *done)
        )
        keys = {id(q): name for name, q in self.quantizers.items()}
        for quantizer, gain in zip(quantizers, gains, strict=True):
            self.trace.group_gain[keys[id(quantizer)]] = asdict(gain)

    # ---- weights ----

    def _round_weights(self, names: list[str]) -> None:
        learned = [name for name in names if self._learns_rounding(self.layers[name])]
        for name in names:
            if name not in learned:
                self.layers[name].quantize_weight()
                self.trace.rounding.pop(name, None)  # of the fewer bits that it had before it was raised
        if learned:
            self.trace.rounding.update(round_weights(self.replay, learned, self.config))

    def _learns_rounding(self, layer: QuantLayer) -> bool:
        return self.config.weight_rounding == "gptq" and layer.weight_quantizer.num_bits < NEAREST_FROM_BITS

    def _raise_bits(self) -> None:
        """Give 8 bits to the layers where fewer cost most, and do again for them what depends on it."""
        config = self.config
        if config.raised_layers == 0 or min(config.weight_bits, config.activation_bits) >= RAISED_BITS:
            return
        found = measure_sensitivity(self.replay, self.macs, config.seed)
        self.trace.sensitivity = {name: asdict(s) for name, s in found.items()}
        raised = raise_bits(self.layers, found, config.raised_layers)
        if not raised:  # no layer is small enough for the share
            return
        # One partition of the whole net depends on all of its layers.
        self._partition(list(self.layers) if config.shared_groups else raised)
        self._round_weights(raised)

    # ---- search ----

    def _search(self, saved: SearchState | None) -> None:
        trace, search = self.trace, SearchRun(self.replay, self.config, self._save)
        trace.outcome = search.run(saved)
        trace.warnings += trace.outcome.warnings
        trace.losses, trace.mmd = search.losses, search.mmd()
        trace.rounds, trace.visits = search.selector.trace, search.selector.visits

    def _saved(self) -> SearchState | None:
        """The search to go on with, if there is one.

        Raises:
            ValueError: it belongs to something else.
            OSError: it could not be saved again.
        """
        if self.state_file is None:
            return None
        found = self.state_file.exists()
        state = SearchState.read(self.state_file, self.fingerprint) if found else None
        check_writable(self.state_file.parent)
        return state

    def _save(self, state: SearchState) -> None:
        """Save the state on the first process; all of them warn where that failed, once."""
        failure = self.processes.first(lambda: self._failure_to_write(state))
        if failure is not None and not self.has_failed_to_save:
            self.has_failed_to_save = True
            self.trace.warnings.append(
                f"the search could not be saved, so an interrupt loses what it did since: {failure}"
            )

    def _failure_to_write(self, state: SearchState) -> str | None:
        if self.state_file is not None:
            try:
                state.save(self.state_file, self.fingerprint)
            except OSError as error:  # the search itself does not need it
                return str(error)
        return None


def weights_of_calls(sensitivity: Tensor) -> Tensor:
    """How much an error of the noise prediction counts at each call, [M] f64 with mean 1 [R].

    The floor keeps a step that hardly matters for this scheduler from being ignored altogether.
    """
    weight = sensitivity / sensitivity.mean().clamp_min(1e-30)
    weight = weight.clamp_min(MIN_STEP_WEIGHT)
    return weight / weight.mean()


def _describe(name: str, quantizer: ActivationQuantizer) -> dict[str, Any]:
    """Ranges and groups of one quantizer as plain numbers, for the report."""
    assert quantizer.extrema is not None
    low, high = quantizer.ranges()
    return {
        "name": name,
        "observed": quantizer.extrema.tolist(),  # [T][2]
        "covered": torch.stack([low, high], 1).tolist(),  # [G][2]
        "group_index": quantizer.table.tolist(),  # [T]
    }
