"""Calibration: trajectories, histograms, partition, search, and the ranges that come out of it."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bias import correct_bias
from .config import QuantConfig
from .correction import corrected
from .files import check_writable
from .nn import QuantLayer
from .partition import partition
from .precision import RAISED_BITS, measure_sensitivity, raise_bits
from .processes import ALONE, Processes
from .quantizers import ActivationQuantizer
from .quantizers.activation import Mode
from .replay import Progress, Replay
from .rounding import NEAREST_FROM_BITS, round_weights
from .schedulers import in_channels_last, model_input
from .search import WARN_BELOW_MAX_IMPORTANCE, Batch, GroupSearch, SearchOutcome
from .search_state import SearchState
from .step import StepState
from .timesteps import TimestepSelector, fixed_visits, mmd_trace
from .trajectory import Sampler, Trajectory, pick, run_in_units

HOLDOUT_BATCHES = 16  # batches, spread over the steps, on which hardening is judged
MIN_STEP_WEIGHT = 0.02  # of the mean


def silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


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
        layers: the twins by name.
        step: state of the denoiser, with its table of timesteps filled.
        state_file: where the search saves itself after every round, and resumes from; None does neither.
            The first process writes and reads it.
        processes: that share the work; all of them end with the same ranges, codes and trace.
    """

    def __init__(
        self,
        sampler: Sampler,
        layers: dict[str, QuantLayer],
        step: StepState,
        config: QuantConfig,
        progress: Progress = silent,
        state_file: Path | None = None,
        processes: Processes = ALONE,
        fingerprint: str = "",
    ) -> None:
        self.sampler, self.layers, self.step, self.config = sampler, layers, step, config
        self.progress, self.state_file, self.processes = progress, state_file, processes
        self.fingerprint = fingerprint
        self.trace = CalibrationTrace()
        self.num_steps, self.num_calls = len(sampler.timesteps), len(sampler.calls)
        self.quantizers: dict[str, ActivationQuantizer] = {
            name if len(layer.quantizers) == 1 else f"{name}[{i}]": q
            for name, layer in layers.items()
            for i, q in enumerate(layer.quantizers)
        }

    @property
    def num_rounds(self) -> int:
        return -(-self.config.calibration_images // self.config.round_size)

    def run(self) -> CalibrationTrace:
        """Observe, partition, search; leaves every quantizer with its ranges and tables, in fake mode."""
        if self.config.grouping == "search":
            # Before any work: a state that cannot be resumed, or that could never be written, is refused.
            self.processes.first(self._saved)
            if self.state_file is not None and self.processes.rank == 0:
                check_writable(self.state_file.parent)
        self.trajectory = trajectory = self._timed("trajectories", self._observe)
        self.call_weights = step_weights(trajectory.sensitivity)
        if not self.config.weigh_steps:
            self.call_weights = torch.ones_like(self.call_weights)
        # Drawing by the root of the weight and weighing by the other root keeps the expectation and evens out
        # the gradients, which would otherwise come from a few steps.
        self._draw_weights = self.call_weights.sqrt() / self.call_weights.sqrt().mean()
        # What depends on the timestep alone counts by all calls at it.
        steps = torch.tensor(self.sampler.step_of_call, device="cpu")
        self.step_weights = self.call_weights.new_zeros(self.num_steps)
        self.step_weights.index_add_(0, steps, self.call_weights)
        self.step_weights /= self.step_weights.mean()
        self.trace.step_weights = self.step_weights.tolist()
        names = list(self.layers)
        self._timed("partition", lambda: self._partition(names))
        replay = Replay(
            self.sampler, self.layers, trajectory, self.call_weights, self.progress, self.processes
        )
        self._timed("weights", lambda: self._round_weights(replay, names))
        self._timed("raised layers", lambda: self._raise_bits(replay))
        self._timed("bias correction", lambda: self._correct_bias_anew(replay))
        if self.config.grouping == "search" and self.config.num_groups > 1:
            self._timed("search", lambda: self._search(trajectory, replay))
        elif self.config.grouping == "search":
            self._warn("grouping 'search' wanted at least 2 groups, got num_groups=1: nothing was searched")
        self.trace.quantizers = [_describe(name, q) for name, q in self.quantizers.items()]
        for quantizer in self.quantizers.values():
            quantizer.counts = quantizer.extrema = None
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

    # ---- partition ----

    def _partition(self, names: list[str]) -> None:
        config, quantizers = self.config, [q for name in names for q in self.layers[name].quantizers]
        searched = config.grouping == "search"
        visits = fixed_visits(config, self.num_rounds, self.num_steps)
        visits = [1] * self.num_steps if searched else visits
        self.trace.visits = list(visits)
        importance = self.step_weights * torch.tensor(visits, device="cpu")
        gains = partition(
            quantizers, importance, config, self.processes, lambda *done: self.progress("partition", *done)
        )
        keys = {id(q): name for name, q in self.quantizers.items()}
        for quantizer, gain in zip(quantizers, gains, strict=True):
            self.trace.group_gain[keys[id(quantizer)]] = asdict(gain)

    def _set_mode(self, mode: Mode) -> None:
        for layer in self.layers.values():
            layer.set_mode(mode)

    # ---- weights ----

    def _round_weights(self, replay: Replay, names: list[str]) -> None:
        learned = [name for name in names if self._learns_rounding(self.layers[name])]
        for name in names:
            if name not in learned:
                self.layers[name].quantize_weight()
                self.trace.rounding.pop(name, None)  # of the fewer bits that it had before it was raised
        if learned:
            self.trace.rounding.update(round_weights(replay, learned, self.config.seed))

    def _learns_rounding(self, layer: QuantLayer) -> bool:
        return self.config.weight_rounding == "gptq" and layer.weight_quantizer.num_bits < NEAREST_FROM_BITS

    def _raise_bits(self, replay: Replay) -> None:
        """Give 8 bits to the layers where fewer cost most, and do again for them what depends on it."""
        config = self.config
        if config.raised_layers == 0 or min(config.weight_bits, config.activation_bits) >= RAISED_BITS:
            return
        found = measure_sensitivity(replay, config.seed)
        self.trace.sensitivity = {name: s.to_dict() for name, s in found.items()}
        raised = raise_bits(self.layers, found, config.raised_layers)
        if not raised:  # no layer is small enough for the share
            return
        # One partition of the whole net depends on all of its layers.
        self._partition(list(self.layers) if config.shared_groups else raised)
        self._round_weights(replay, raised)

    def _correct_bias(self, replay: Replay) -> None:
        if self.config.correct_bias:
            correct_bias(replay)

    # ---- search ----

    def _search(self, trajectory: Trajectory, replay: Replay) -> None:
        config = self.config
        held_out = self._held_out()
        start_error = self._sample_error()
        quantizers = list(self.quantizers.values())
        search = GroupSearch(quantizers, self.step, config, self._predict, held_out, self.processes)
        selector = TimestepSelector(config, self.num_rounds, self.num_steps)
        pool: list[Batch] = []
        start_round = self._resume(search, selector, pool)
        for round_index in range(start_round, self.num_rounds):
            pool.append(self._selected_batch(search, selector, round_index))
            for index in self._steps_of_round(round_index):
                batch = self._draw(trajectory, pool, index)
                self.trace.losses.append(search.train_step(batch))
                self.progress("search", index + 1, config.search.num_steps + config.search.refit_steps)
            self._save(search, selector, round_index + 1)
        self.trace.outcome = self._harden(search, trajectory, replay, pool, held_out, start_error)
        self.trace.rounds, self.trace.visits = selector.trace, selector.visits
        chosen = [self._call_at(row["step_index"], i) for i, row in enumerate(selector.trace)]
        self.trace.mmd = mmd_trace(trajectory.samples, chosen)

    def _steps_of_round(self, round_index: int) -> range:
        total = self.config.search.num_steps
        return range(total * round_index // self.num_rounds, total * (round_index + 1) // self.num_rounds)

    def _predict(self, batch: Batch) -> Tensor:
        return self.sampler.predict(batch.sample, batch.timestep, batch.conditioning)

    def _selected_batch(self, search: GroupSearch, selector: TimestepSelector, round_index: int) -> Batch:
        """Generate this round's calibration images at the step that the selector chooses."""
        step_index = selector.choose(search.entropy().detach())
        return self._generate(search, step_index, round_index)

    def _generate(self, search: GroupSearch, step_index: int, round_index: int) -> Batch:
        """Full-precision images at one step; image numbers go on where the histogram images ended."""
        mode = search.quantizers[0].mode
        search.set_mode(Mode.FLOAT)
        first = self.config.histogram_images + round_index * self.config.round_size
        count = min(
            self.config.round_size, self.config.calibration_images - round_index * self.config.round_size
        )
        call = self._call_at(step_index, round_index)
        images = range(first, first + count)
        # Noise is added to whole images; otherwise those of a step are enough.
        stop = None if self.config.search.objective == "noise" else call
        made = run_in_units(self.sampler, self.processes, self.config.seed, images, stop=stop)
        search.set_mode(mode)
        return self._batch(made, call, torch.arange(made.samples.shape[1], device="cpu"), round_index)

    def _call_at(self, step_index: int, round_index: int) -> int:
        """The call that shows a step in a round: where a scheduler comes back to a timestep, each in turn."""
        calls = [i for i, step in enumerate(self.sampler.step_of_call) if step == step_index]
        return calls[round_index % len(calls)]

    def _draw(self, trajectory: Trajectory, pool: list[Batch], index: int) -> Batch:
        """The batch of optimizer step `index`: a step of the cached trajectories, or selected images."""
        generator = torch.Generator().manual_seed(self.config.seed * 7_368_787 + index)
        size = self.config.search.batch_size
        if float(torch.rand(1, generator=generator, device="cpu")) < self.config.search.replay:
            call = int(torch.multinomial(self._draw_weights, 1, generator=generator))
            images = _numbers(trajectory.samples.shape[1], size, generator)
            return self._batch(trajectory, call, images, index)
        chosen = pool[int(_numbers(len(pool), 1, generator))]
        images = _numbers(chosen.sample.shape[0], size, generator)
        conditioning = pick(chosen.conditioning, images)
        return replace(
            chosen, sample=chosen.sample[images], target=chosen.target[images], conditioning=conditioning
        )

    def _batch(self, trajectory: Trajectory, call: int, images: Tensor, draw: int) -> Batch:
        """Images of a trajectory at one call, with the target of the objective."""
        timestep, step_index = self.sampler.calls[call], self.sampler.step_of_call[call]
        sample, target = trajectory.samples[call, images], trajectory.noise_preds[call, images]
        if self.config.search.objective == "noise":
            final = trajectory.final[images]
            generator = torch.Generator().manual_seed(self.config.seed * 15_485_863 + draw)
            target = torch.randn(final.shape, generator=generator, device="cpu").to(final.device)
            # A copy: schedulers over sigmas remember the first timestep that they scale for.
            scheduler = copy.deepcopy(self.sampler.scheduler)
            sample = scheduler.add_noise(final, target, timestep.expand(len(images)))
            sample = model_input(scheduler, sample, timestep)
        weight, conditioning = float(self._draw_weights[call]), pick(trajectory.conditioning, images)
        return Batch(step_index, timestep, in_channels_last(sample), target, weight, conditioning)

    def _sample_held_out(self) -> Trajectory:
        """The images that follow all others, as layers are now."""
        first = self.config.histogram_images + self.config.calibration_images
        images = range(first, first + self.config.search.batch_size)
        return run_in_units(self.sampler, self.processes, self.config.seed, images)

    def _held_out(self) -> list[Batch]:
        """Batches of images that nothing is fitted to, at steps spread over the trajectory."""
        self._set_mode(Mode.FLOAT)
        self._fresh = fresh = self._sample_held_out()
        self._set_mode(Mode.FAKE)
        last = self.num_calls - 1
        calls = torch.linspace(0, last, HOLDOUT_BATCHES, device="cpu").round().long().tolist()
        images = torch.arange(self.config.search.batch_size, device="cpu")
        return [replace(self._batch(fresh, k, images, k), weight=float(self.call_weights[k])) for k in calls]

    def _sample_error(self) -> float:
        """Mean squared error of the held-out final samples, as layers quantize now, corrected as in use."""
        correct = self.config.correct_prediction
        with corrected(self.sampler, self.trajectory, self.processes) if correct else nullcontext():
            made = self._sample_held_out()
        return float((made.final - self._fresh.final).double().square().mean())

    def _harden(
        self,
        search: GroupSearch,
        trajectory: Trajectory,
        replay: Replay,
        pool: list[Batch],
        held_out: list[Batch],
        start_error: float,
    ) -> SearchOutcome:
        """Fix the groups, re-fit their ranges on their own steps, and say what that cost.

        A smaller loss is not enough to be kept: it judges one step at a time, at full-precision inputs.
        """
        settings = self.config.search
        peak, soft = search.max_importance(), search.mean_loss(held_out)
        moved = search.harden()
        for index in range(settings.num_steps, settings.num_steps + settings.refit_steps):
            self.trace.losses.append(search.train_step(self._draw(trajectory, pool, index)))
            self.progress("search", index + 1, settings.num_steps + settings.refit_steps)
        search.finish()
        hard = search.mean_loss(held_out)
        self._correct_bias_anew(replay)
        hard_error = self._sample_error()
        better = hard <= search.start_loss and hard_error <= start_error
        is_kept = better or settings.keep_if_worse
        found = SearchOutcome(search.start_loss, soft, hard, start_error, hard_error, peak, is_kept, moved)
        if not better:
            self._warn(
                f"the search ended with a held-out loss of {hard:.3g}, from {search.start_loss:.3g}, and "
                f"{found.sample_gain_db:+.2f} dB on held-out samples, against the dynamic-programming "
                f"partition it started from{', and is kept all the same' if is_kept else ', which is used'}; "
                "try more search steps"
            )
        if not is_kept:
            search.put_back()
            self._correct_bias_anew(replay)
        if peak < WARN_BELOW_MAX_IMPORTANCE:
            self._warn(
                f"the search ended undecided: mean largest importance weight {peak:.2f}, wanted at least "
                f"{WARN_BELOW_MAX_IMPORTANCE}; more search steps or a larger entropy_weight harden it"
            )
        return found

    def _correct_bias_anew(self, replay: Replay) -> None:
        """Bias correction for the present ranges, in fake mode afterwards."""
        self._correct_bias(replay)
        self._set_mode(Mode.FAKE)

    def _warn(self, sentence: str) -> None:
        self.trace.warnings.append(sentence)

    # ---- resuming ----

    def _save(self, search: GroupSearch, selector: TimestepSelector, rounds_done: int) -> None:
        if self.state_file is not None and self.processes.rank == 0:
            trace = (selector.trace, selector.visits, self.trace.losses)
            state = SearchState(search.state(), rounds_done, search.steps_done, *trace)
            try:
                state.save(self.state_file, self.fingerprint)
            except OSError as error:  # the search itself does not need it
                self._warn(f"the search could not be saved, so an interrupt loses what it did since: {error}")

    def _saved(self) -> SearchState | None:
        if self.state_file is None or not self.state_file.exists():
            return None
        return SearchState.read(self.state_file, self.fingerprint)

    def _resume(self, search: GroupSearch, selector: TimestepSelector, pool: list[Batch]) -> int:
        """Continue a saved search; regenerates its calibration images, which are a function of the seed."""
        state = self.processes.first(self._saved)
        if state is None:
            return 0
        selector.trace, selector.visits, self.trace.losses = state.rounds, state.visits, state.losses
        search.load_state(state.tensors, state.steps_done)
        for round_index, row in enumerate(selector.trace):
            pool.append(self._generate(search, row["step_index"], round_index))
            self.progress("resuming", round_index + 1, state.rounds_done)
        return state.rounds_done


def step_weights(sensitivity: Tensor) -> Tensor:
    """How much an error of the noise prediction counts at each call, [M] f64 with mean 1 [R].

    The floor keeps a step that hardly matters for this scheduler from being ignored altogether.
    """
    weight = sensitivity / sensitivity.mean().clamp_min(1e-30)
    weight = weight.clamp_min(MIN_STEP_WEIGHT)
    return weight / weight.mean()


def _numbers(below: int, count: int, generator: torch.Generator) -> Tensor:
    """Random numbers [count] i64 in [0, below), on the CPU."""
    return torch.randint(0, below, (count,), generator=generator, device="cpu")


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
