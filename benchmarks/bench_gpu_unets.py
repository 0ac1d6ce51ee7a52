"""Times whole denoisers on a GPU in one process: ours and torch in bfloat16, eager and as CUDA graphs.

python benchmarks/bench_gpu_unets.py --models sdxl sd15 cifar10 --batch 2 --json unets.json

Ranges are made up and weights random but for shipped models; nothing is calibrated and all is made on the
GPU, so that SDXL takes seconds to prepare. Times are those of a quantized model; bench_unet.py tells what its
outputs are worth. Here they are checked for being finite, and ours for being the same bits twice and in a
graph. Times are medians of --rounds samples, ratios (to torch's graph) medians of the ratios of a round.

The JSON file is written after every model and batch. A contestant that raises is named, there as well, and
the others are timed; the exit code is then 1, as it is when a check fails.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import results_file
import torch
import unets
from engines import Denoiser, cuda_graph, to_tensors
from gpu_timing import Call, Called, Failed, race, reason_of
from torch import Tensor, nn

from adpdm import QuantConfig
from adpdm.graph import capture
from adpdm.nn import describe_layers, quant_layers, swap_layers
from adpdm.pipeline import freeze
from adpdm.step import StepState, attach_step_hook

DEVICE = "cuda"
BF16 = torch.bfloat16
MIN_ROUNDS = 20
TIMESTEP = 500
NUM_STEPS, NUM_GROUPS = 4, 4
RANGE = 4.0  # of every activation: random weights keep their variance near 1


@dataclass
class Row:
    """One contestant on one model at one batch size.

    Args:
        ratio, ratio_quartiles: its time divided by torch-bf16-graph's in the same round.
        weight_bytes: of all parameters and buffers; as the next one, in rows of eager forwards only.
        forward_bytes: the most that one forward allocates at a time.
        checks: what has to be true of its outputs.
        failed: the reason why there are no times.
    """

    model: str
    batch: int
    contestant: str
    milliseconds: float | None = None
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    weight_bytes: int | None = None
    forward_bytes: int | None = None
    checks: dict[str, bool] = field(default_factory=dict)
    failed: str | None = None

    def __str__(self) -> str:
        time = f"failed: {self.failed}" if self.milliseconds is None else f"{self.milliseconds:9.3f} ms"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        checks = ", ".join(f"{name}: {'yes' if holds else 'NO'}" for name, holds in self.checks.items())
        return f"{self.model:10} {self.batch:3} {self.contestant:20} {time} {ratio:>7}  {checks}".rstrip()

    @property
    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = ["failed"] if self.failed else []
        if self.contestant.startswith("ours"):  # what torch does differently under capture is its own affair
            found += [f"not {name}" for name, holds in self.checks.items() if not holds]
        return [f"{self.contestant} of {self.model} at batch {self.batch} {fault}" for fault in found]


class Torch:
    """A denoiser in bfloat16 with its inputs, to be run eagerly or as a CUDA graph."""

    def __init__(self, name: str, batch: int) -> None:
        self.inputs = example(name, batch)
        self.model: nn.Module = unets.build(name, BF16, DEVICE).to(memory_format=torch.channels_last)
        self._denoiser = Denoiser(self.model, unets.find(name).conditioning)

    def run(self) -> Tensor:
        """One forward."""
        output: Tensor = self._denoiser(*self.inputs)
        return output

    def eager(self, row: Row) -> Call:
        """The forward as Python runs it; notes what it takes, and checks it."""
        row.checks = {"finite": bool(self.run().isfinite().all())}
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        row.weight_bytes = sum(x.numel() * x.element_size() for x in tensors)
        row.forward_bytes = allocated_bytes(self.run)
        return self.run

    def graph(self, row: Row) -> Call:
        """The forward as a CUDA graph, its inputs copied in; whether it agrees is a control of ours."""
        expected = self.run()
        call = partial(cuda_graph(self._denoiser, [x.clone() for x in self.inputs]), *self.inputs)
        row.checks = {"the same as eager": torch.equal(call(), expected)}
        return call


class Ours(Torch):
    """The same model in integers; eager and captured forwards share the model and take turns in it."""

    def __init__(self, name: str, batch: int, weight_bits: int) -> None:
        super().__init__(name, batch)
        quantize(self.model, weight_bits, self.run)
        self._eager_forward = self.model.forward

    def eager(self, row: Row) -> Call:
        super().eager(row)
        row.checks["the same twice"] = torch.equal(self.run(), self.run())
        return partial(self._run_with, self._eager_forward)

    def graph(self, row: Row) -> Call:
        """The forward as `adpdm.graph.capture` has it, checked against the eager one."""
        expected = self._run_with(self._eager_forward)
        call = partial(self._run_with, capture(self.model))
        row.checks = {"the same as eager": torch.equal(call(), expected)}
        return call

    def _run_with(self, forward: Callable[..., Any]) -> Tensor:
        self.model.forward = forward  # not around the hook that sets the step, which runs before either
        return self.run()


def quantize(model: nn.Module, weight_bits: int, run: Call) -> None:
    """Turn a denoiser into integers in place, with groups that change from step to step but ranges alike."""
    config = QuantConfig(
        weight_bits=weight_bits, num_groups=NUM_GROUPS, num_inference_steps=NUM_STEPS, grouping="dp"
    )

    def make_step(num_slots: int) -> StepState:
        step = StepState(num_slots, NUM_STEPS, device=torch.device(DEVICE))
        step.set_timesteps(torch.linspace(unets.NUM_TRAIN_TIMESTEPS - 1, 0, NUM_STEPS, device=DEVICE))
        return step

    swap_layers(model, describe_layers(model, config, run), NUM_GROUPS, make_step)
    attach_step_hook(model)
    high = torch.full((NUM_GROUPS,), RANGE, device=DEVICE)
    table = torch.arange(NUM_STEPS, dtype=torch.int32, device=DEVICE) % NUM_GROUPS
    for layer in quant_layers(model).values():
        for quantizer in layer.quantizers:
            quantizer.set_ranges(-high, high, table)
    freeze(model)


def example(name: str, batch: int) -> list[Tensor]:
    """Random inputs of one call: sample, timestep, conditioning."""
    shape = (batch, *unets.find(name).sample_shape)
    generator = torch.Generator().manual_seed(unets.PROBE_SEED)
    inputs = {
        "sample": torch.randn(shape, generator=generator),
        "timestep": torch.full((batch,), TIMESTEP),
        **unets.conditioning(name, batch, unets.PROBE_SEED),
    }
    return to_tensors({key: value.numpy() for key, value in inputs.items()}, BF16, DEVICE)


def allocated_bytes(call: Call) -> int:
    """The most that a call allocates at a time, beyond what there was before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def contestants(name: str, batch: int) -> dict[str, Callable[[Row], Call]]:
    """What is timed, by the names of bench_unet.py; ratios are to the first. Models are made when wanted."""
    plain = cache(partial(Torch, name, batch))
    found = {"torch-bf16-graph": maker(plain, is_graph=True), "torch-bf16": maker(plain, is_graph=False)}
    for bits in (8, 4):
        ours = cache(partial(Ours, name, batch, bits))
        found[f"ours-w{bits}a8-bf16"] = maker(ours, is_graph=False)
        found[f"ours-w{bits}a8-bf16-graph"] = maker(ours, is_graph=True)
    return found


def maker(model: Callable[[], Torch], is_graph: bool) -> Callable[[Row], Call]:
    """Makes the call to time."""
    return lambda row: model().graph(row) if is_graph else model().eager(row)


def measure(name: str, batch: int, rounds: int) -> list[Row]:
    """Time all contestants on one model in turns."""
    makers = contestants(name, batch)
    rows = {contestant: Row(name, batch, contestant) for contestant in makers}

    def make(contestant: str) -> Called:
        return Called(makers[contestant](rows[contestant]))

    for contestant, timing in race({key: partial(make, key) for key in makers}, rounds).items():
        row = rows[contestant]
        if isinstance(timing, Failed):
            row.failed = timing.reason
        else:
            row.milliseconds = 1e-3 * timing.microseconds
            row.ratio, row.ratio_quartiles = timing.ratio, timing.quartiles
    return list(rows.values())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options, checked before anything runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = f"{', '.join(unets.UNETS)}; NAME@SIZE for another size"
    parser.add_argument("--models", nargs="+", default=["sdxl", "sd15", "cifar10"], help=models)
    parser.add_argument("--batch", nargs="+", type=int, default=[2])
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help=f"at least {MIN_ROUNDS}")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args(arguments)
    try:
        for name in args.models:
            unets.find(name)
    except ValueError as error:
        parser.error(str(error))
    if min(args.batch) < 1:
        parser.error(f"--batch must be at least 1, got {min(args.batch)}")
    if args.rounds < MIN_ROUNDS:
        parser.error(f"--rounds must be at least {MIN_ROUNDS}, got {args.rounds}")
    if not torch.cuda.is_available():
        sys.exit("bench_gpu_unets: wanted a CUDA device, found none")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table; write it as JSON where asked."""
    args = parse(arguments)
    torch.set_grad_enabled(False)
    settings = {**vars(args), "device": torch.cuda.get_device_name()}
    rows: list[Row] = []
    for name, batch in itertools.product(args.models, args.batch):
        try:
            found = measure(name, batch, args.rounds)
        except Exception as error:
            found = [Row(name, batch, "all", failed=reason_of(error))]
        rows += found
        print(*found, sep="\n", flush=True)
        if args.json:
            results_file.write(args.json, settings, map(asdict, rows), "cuda")
        gc.collect()  # a captured denoiser and its graphs hold each other
        torch.cuda.empty_cache()
    if faults := [fault for row in rows for fault in row.faults]:
        sys.exit(f"bench_gpu_unets: {'; '.join(faults)}")


if __name__ == "__main__":
    main()
