"""One search from the partition that it starts from to its outcome: what it is fed, and how it is judged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from .bias import correct_bias
from .config import QuantConfig
from .correction import corrected
from .quantizers.activation import Mode
from .replay import Replay
from .schedulers import in_channels_last, model_input
from .search import Batch, GroupSearch, SearchOutcome
from .search_state import SearchState
from .timesteps import TimestepSelector, mmd_trace
from .trajectory import Trajectory, pick, run_in_units

HOLDOUT_BATCHES = 16  # batches, spread over the steps, on which hardening is judged
REPLAYED, SELECTED, HELD_OUT = range(3)  # batches, each kind with noise of its own


class SearchRun:
    """A search in rounds, each at a timestep that is selected; `run` does them.

    Making one samples the held-out images, and judges the partition that it starts from.

    Args:
        replay: of the cached trajectories; its layers hold ranges, codes and biases, in fake mode.
        save: gets the state after every round.
    """

    def __init__(self, replay: Replay, config: QuantConfig, save: Callable[[SearchState], None]) -> None:
        self.replay, self.config, self.save = replay, config, save
        self.sampler = replay.sampler
        # Drawing by the root of the weight and weighing by the other root keeps the expectation and evens out
        # the gradients, which would otherwise come from a few steps.
        self.roots = replay.call_weights.sqrt()  # [M] f64
        self.selector = TimestepSelector(config, config.num_rounds, len(self.sampler.timesteps))
        self.pool: list[Batch] = []  # selected images, of every round
        self.losses: list[float] = []  # of every optimizer step
        replay.set_mode(Mode.FLOAT)
        self.exact = self._sample_held_out()
        replay.set_mode(Mode.FAKE)
        self.held_out = self._held_out()
        self.start_error = self._sample_error()
        quantizers = [q for layer in replay.layers.values() for q in layer.quantizers]
        self.search = GroupSearch(quantizers, config, self._predict, self.held_out, replay.processes)

    def run(self, saved: SearchState | None) -> SearchOutcome:
        """Do the rounds that a saved search has left; quantizers end with ranges and tables, in fake mode."""
        first = 0 if saved is None else self._resume(saved)
        for round_index in range(first, self.config.num_rounds):
            step_index = self.selector.choose(self.search.entropy().detach())
            self.pool.append(self._generate(step_index, round_index))
            for index in self._steps_of_round(round_index):
                self._train(index)
            trace = (self.selector.trace, self.selector.visits, self.losses, self.search.start_facts())
            self.save(SearchState(self.search.state(), round_index + 1, self.search.steps_done, *trace))
        return self._harden()

    def mmd(self) -> list[float]:
        """How far the selected timesteps are from all, after every round; see `mmd_trace`."""
        chosen = [self._call_at(row["step_index"], i) for i, row in enumerate(self.selector.trace)]
        return mmd_trace(self.replay.trajectory.samples, chosen)

    # ---- training ----

    def _steps_of_round(self, round_index: int) -> range:
        total, rounds = self.config.search.num_steps, self.config.num_rounds
        return range(total * round_index // rounds, total * (round_index + 1) // rounds)

    def _train(self, index: int) -> None:
        settings = self.config.search
        self.losses.append(self.search.train_step(self._draw(index)))
        self.replay.progress("search", index + 1, settings.num_steps + settings.refit_steps)

    def _predict(self, batch: Batch) -> Tensor:
        """As far as the target goes: noise that was added has no variances, which may be predicted, too."""
        prediction = self.sampler.predict(batch.sample, batch.timestep, batch.conditioning)
        return prediction[:, : batch.target.shape[1]]

    def _draw(self, index: int) -> Batch:
        """The batch of optimizer step `index`: a step of the cached trajectories, or selected images."""
        cached = self.replay.trajectory
        generator = torch.Generator().manual_seed(self.config.seed * 7_368_787 + index)
        size = self.config.search.batch_size
        if float(torch.rand(1, generator=generator, device="cpu")) < self.config.search.replay:
            call = int(torch.multinomial(self.roots, 1, generator=generator))
            images = _numbers(cached.samples.shape[1], size, generator)
            return self._batch(cached, call, images, (REPLAYED, index))
        chosen = self.pool[int(_numbers(len(self.pool), 1, generator))]
        images = _numbers(chosen.sample.shape[0], size, generator)
        conditioning = pick(chosen.conditioning, images)
        return replace(
            chosen, sample=chosen.sample[images], target=chosen.target[images], conditioning=conditioning
        )

    def _batch(self, trajectory: Trajectory, call: int, images: Tensor, noise: tuple[int, int]) -> Batch:
        """Images of a trajectory at one call, with the target of the objective.

        Args:
            noise: kind and number of the batch, for noise that is its own.
        """
        timestep = self.sampler.calls[call]
        sample, target = trajectory.samples[call, images], trajectory.noise_preds[call, images]
        if self.config.search.objective == "noise":
            final = trajectory.final[images]
            kind, number = noise
            generator = torch.Generator().manual_seed(self.config.seed * 15_485_863 + 3 * number + kind)
            target = torch.randn(final.shape, generator=generator, device="cpu").to(final.device)
            # A copy: schedulers over sigmas remember the first timestep that they scale for.
            scheduler = copy.deepcopy(self.sampler.scheduler)
            sample = scheduler.add_noise(final, target, timestep.expand(len(images)))
            sample = model_input(scheduler, sample, timestep)
        # p_k w_k = omega_k / M for calls that are drawn by their roots.
        weight = float(self.roots[call] * self.roots.mean())
        conditioning = pick(trajectory.conditioning, images)
        return Batch(timestep, in_channels_last(sample), target, weight, conditioning)

    # ---- images ----

    def _sample(self, first: int, count: int, stop: int | None = None) -> Trajectory:
        """Images by layers as they are now; their numbers go on where those of the histograms ended."""
        first += self.config.histogram_images
        images, processes = range(first, first + count), self.replay.processes
        return run_in_units(self.sampler, processes, self.config.seed, images, stop=stop)

    def _generate(self, step_index: int, round_index: int) -> Batch:
        """The images of a round at the step that it selected, in full precision."""
        config, call = self.config, self._call_at(step_index, round_index)
        first = round_index * config.round_size
        count = min(config.round_size, config.calibration_images - first)
        # Noise is added to whole images; otherwise those of a step are enough.
        stop = None if config.search.objective == "noise" else call
        self.search.set_mode(Mode.FLOAT)
        made = self._sample(first, count, stop)
        self.search.set_mode(Mode.MIXTURE)
        all_images = torch.arange(made.samples.shape[1], device="cpu")
        return self._batch(made, call, all_images, (SELECTED, round_index))

    def _call_at(self, step_index: int, round_index: int) -> int:
        """The call that shows a step in a round: where a scheduler comes back to a timestep, each in turn."""
        calls = [i for i, step in enumerate(self.sampler.step_of_call) if step == step_index]
        return calls[round_index % len(calls)]

    def _sample_held_out(self) -> Trajectory:
        """The images that follow all others, to which nothing is fitted."""
        return self._sample(self.config.calibration_images, self.config.search.batch_size)

    def _held_out(self) -> list[Batch]:
        """Batches of the held-out images at steps spread over the trajectory."""
        weights, last = self.replay.call_weights, len(self.sampler.calls) - 1
        calls = torch.linspace(0, last, HOLDOUT_BATCHES, device="cpu").round().long().tolist()
        images = torch.arange(self.config.search.batch_size, device="cpu")
        batches = [self._batch(self.exact, k, images, (HELD_OUT, k)) for k in calls]
        return [replace(b, weight=float(weights[k])) for b, k in zip(batches, calls, strict=True)]

    # ---- judging ----

    def _sample_error(self) -> float:
        """Squared error of the held-out final samples, as layers quantize now, corrected as in use.

        The geometric mean over images, which is their mean PSNR: in the arithmetic one the worst decides.
        """
        correct, replay = self.config.correct_prediction, self.replay
        with corrected(self.sampler, replay.trajectory, replay.processes) if correct else nullcontext():
            made = self._sample_held_out()
        errors = (made.final - self.exact.final).double().square().flatten(1).mean(1)
        return float(errors.clamp_min(1e-30).log().mean().exp())

    def _harden(self) -> SearchOutcome:
        """Fix the groups, re-fit their ranges on their own steps, and put the start back if that is better.

        A smaller loss is not enough to be kept: it judges one step at a time, at full-precision inputs.
        """
        search, settings = self.search, self.config.search
        peak, soft = search.max_importance(), search.mean_loss(self.held_out)
        moved = search.harden()
        for index in range(settings.num_steps, settings.num_steps + settings.refit_steps):
            self._train(index)
        search.finish()
        correct_bias(self.replay, self.config)
        hard = search.mean_loss(self.held_out)
        errors = (self.start_error, self._sample_error())
        found = SearchOutcome(search.start_loss, soft, hard, *errors, peak, is_kept=True, moved=moved)
        if found.is_better or settings.keep_if_worse:
            return found
        search.put_back()
        correct_bias(self.replay, self.config)
        return replace(found, is_kept=False)

    # ---- resuming ----

    def _resume(self, saved: SearchState) -> int:
        """Continue a saved search; regenerates its calibration images, which are a function of the seed.

        Returns: the rounds that are done.

        Raises:
            ValueError: it started from another partition.
        """
        saved.check_start(self.search.start_facts())
        self.selector.trace, self.selector.visits, self.losses = saved.rounds, saved.visits, saved.losses
        self.search.load_state(saved.tensors, saved.steps_done)
        for round_index, row in enumerate(saved.rounds):
            self.pool.append(self._generate(row["step_index"], round_index))
            self.replay.progress("resuming", round_index + 1, saved.rounds_done)
        return saved.rounds_done


def _numbers(below: int, count: int, generator: torch.Generator) -> Tensor:
    """Random numbers [count] i64 in [0, below), on the CPU."""
    return torch.randint(0, below, (count,), generator=generator, device="cpu")
