"""Measures what the planner of the CUDA integer layers assumes: the costs of tiles, and how well it chooses.

python benchmarks/sweep_tiles.py --json tiles.json --table tools/tile_table.json

Costs are in the units of tools/tile_table.json (csrc/cuda/planner.cpp explains them). --table replaces the
measured architecture's rows there; tools/make_tile_table.py then makes the planner's table of them. The
second part times every tile and number of splits on real layers and reports what the planner's choice costs
over the best one, and whose results are not bit for bit the planner's; the exit code then is 1. --json is
written after every piece.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_gpu_kernels import conv_calls, linear_calls, packed, random_codes, segment
from gpu_layers import LAYERS, Conv, Layer
from gpu_timing import Call, Clock, Timed, reason_of
from unet_results import write_whole

from adpdm import ops
from adpdm.files import replacing
from adpdm.ops import Epilogue

TABLE = Path(__file__).resolve().parents[1] / "tools" / "tile_table.json"
ROUNDS = 20
CHECKS = 3  # results of every choice that are compared: a race need not show at the first call
SPLITS = (1, 2, 4, 8)
SHORT, LONG = 16, 80  # k tiles of the two reductions between which a slope is taken
WAVES = 4  # of a full device
OUTPUT_TILES = 16  # of the full device's matrix, so that it is not bound by memory
CORES = ("mma", "wgmma")
WGMMA_ARCH = 90  # the only one that has it, whatever later ones find in the table (csrc/cuda/planner.cpp)
PLANNED = "planned"  # what the planner chooses by itself
CONTESTANTS = {"a8w8": "W8A8", "a8w4": "W4A8", "a4w4": "W4A4", "a4w4-unpacked": "W4A4"}


@dataclass(frozen=True)
class Tile:
    """A tile of one core and mode, with the number of blocks a multiprocessor holds at once."""

    core: str  # mma or wgmma
    mode: str
    rows: int
    outputs: int
    blocks_per_sm: int

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.rows}x{self.outputs}"

    @property
    def choice(self) -> str:
        """As ADPDM_CUDA_TILE takes it, without splits."""
        return f"{self.core}:{self.name}"

    @property
    def codes_per_k_tile(self) -> int:
        return 128 if self.core == "wgmma" or self.mode.startswith("a4") else 64


@contextmanager
def chosen(tile: str) -> Iterator[None]:
    """Let the planner use this tile; the kernels read the variable at every call."""
    before = os.environ.get("ADPDM_CUDA_TILE")
    os.environ["ADPDM_CUDA_TILE"] = tile
    try:
        yield
    finally:
        if before is None:
            del os.environ["ADPDM_CUDA_TILE"]
        else:
            os.environ["ADPDM_CUDA_TILE"] = before


def median_microseconds(call: Call) -> float:
    """Of one call."""
    timed = Timed(call)
    return statistics.median(timed.microseconds() for _ in range(ROUNDS))


def matrix_call(tile: Tile, rows: int, outputs: int, k_tiles: int) -> Call:
    """A linear layer of that size in the tile's mode."""
    channels = k_tiles * tile.codes_per_k_tile
    weight_bits = 8 if tile.mode == "a8w8" else 4
    codes = random_codes((rows, channels), 4 if tile.mode.startswith("a4") else 8)
    s = segment(packed(codes) if tile.mode.startswith("a4") else codes, (outputs, channels), weight_bits)
    return lambda: ops.linear([s], Epilogue(), outputs, weight_bits, torch.bfloat16)


def time_matrix(tile: Tile, rows: int, outputs: int, k_tiles: int) -> float:
    """Microseconds of a linear layer of that size on the tile, not split."""
    with chosen(f"{tile.choice}/1"):
        return median_microseconds(matrix_call(tile, rows, outputs, k_tiles))


MatrixTimer = Callable[[Tile, int, int, int], float]  # as time_matrix


def line(tile: Tile, rows: int, outputs: int, time: MatrixTimer) -> tuple[float, float]:
    """(slope per k tile, time without any), from two lengths of the reduction."""
    short, long = (time(tile, rows, outputs, k) for k in (SHORT, LONG))
    slope = (long - short) / (LONG - SHORT)
    return slope, short - SHORT * slope


def measure_costs(tile: Tile, num_sms: int, megahertz: float, time: MatrixTimer = time_matrix) -> list[int]:
    """The tile's row of the table: [blocks_per_sm, tile_cycles, lone_cycles, block_cycles]."""
    lone, start = line(tile, tile.rows * num_sms, tile.outputs, time)
    row_tiles = max(1, num_sms * tile.blocks_per_sm * WAVES // OUTPUT_TILES)  # down: no wave of a few blocks
    full, _ = line(tile, tile.rows * row_tiles, tile.outputs * OUTPUT_TILES, time)
    # of one block, of a multiprocessor that is full of them
    share = full / -(-row_tiles * OUTPUT_TILES // num_sms)
    return [tile.blocks_per_sm, *(max(1, round(megahertz * us)) for us in (share, lone, start))]


def tiles_of(table: dict[str, Any], arch: int) -> list[Tile]:
    """All tiles of all cores that a device has."""
    architecture = architecture_of(table, arch)
    return [
        Tile(core, mode, rows, outputs, costs[0])
        for core in CORES
        if core != "wgmma" or arch == WGMMA_ARCH
        for mode, tiles in architecture.get(core, {}).items()
        for name, costs in tiles.items()
        for rows, outputs in [map(int, name.split("x"))]
    ]


def architecture_of(table: dict[str, Any], arch: int) -> dict[str, Any]:
    """The entry that serves a device: the last one not above it."""
    fitting = [entry for entry in table["architectures"] if entry["arch"] <= arch]
    if not fitting:
        lowest = min(entry["arch"] for entry in table["architectures"])
        raise SystemExit(f"sweep_tiles: wanted a device of architecture {lowest} or later, got {arch}")
    found: dict[str, Any] = max(fitting, key=lambda entry: entry["arch"])
    return found


@dataclass(frozen=True)
class Choice:
    """The planner's choice on a layer against the best of all."""

    layer: str
    mode: str
    microseconds: float  # as planned
    best: float
    best_choice: str
    wrong: list[str]  # choices with other results than the planner's

    @property
    def loss(self) -> float:
        return self.microseconds / self.best - 1

    def __str__(self) -> str:
        wrong = f", other results than planned: {', '.join(self.wrong)}" if self.wrong else ""
        return (
            f"{self.layer:34} {self.mode:14} planned {self.microseconds:8.2f} us, best {self.best:8.2f} us "
            f"({self.best_choice}), loss {self.loss:6.1%}{wrong}"
        )


def judge_planner(
    layer: Layer, mode: str, tiles: list[Tile], clock: Callable[[Call], Clock] = Timed
) -> Choice:
    """Time every tile and number of splits on a layer, and what the planner makes of it, in turns.

    All of them add the same integers, so their results are the same bits.

    Args: clock: of a call that keeps the choice it was made with, as a CUDA graph does.
    """
    calls = conv_calls(layer) if isinstance(layer, Conv) else linear_calls(layer)
    call = calls[CONTESTANTS[mode]]
    clocks, wrong, expected = {PLANNED: clock(call)}, [], call()
    for tile, splits in itertools.product([t for t in tiles if t.mode == mode], SPLITS):
        name = f"{tile.choice}/{splits}"
        with chosen(name):
            if not all(torch.equal(call(), expected) for _ in range(CHECKS)):
                wrong.append(name)
            clocks[name] = clock(call)
    rounds = [{name: each.microseconds() for name, each in clocks.items()} for _ in range(ROUNDS)]
    times = {name: statistics.median(taken[name] for taken in rounds) for name in clocks}
    planned = times.pop(PLANNED)
    best = min(times, key=lambda name: times[name])
    return Choice(layer.name, mode, planned, times[best], best, wrong)


def replace_rows(table: dict[str, Any], arch: int, rows: dict[str, Any], origin: str) -> dict[str, Any]:
    """The table with measured rows, and no others, for exactly this architecture."""
    base = {key: value for key, value in architecture_of(table, arch).items() if key not in CORES}
    entry = {**base, "arch": arch, "origin": origin, **rows}
    others = [e for e in table["architectures"] if e["arch"] != arch]
    return {**table, "architectures": sorted([*others, entry], key=lambda e: int(e["arch"]))}


def clock_megahertz() -> float:
    """The highest clock of the multiprocessors; costs only have to agree with each other."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    text = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return float(text.splitlines()[0])


@dataclass
class Sweep:
    """What has been measured on one card, saved after every piece: one that is stopped loses no other."""

    arch: int
    origin: str
    path: Path | None  # of the JSON file
    rows: dict[str, dict[str, dict[str, list[int]]]] = field(default_factory=dict)  # by core, mode and tile
    choices: list[Choice] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # reasons, by tile, or by layer and mode

    def measure_tiles(self, tiles: list[Tile], num_sms: int, megahertz: float) -> None:
        """Fill the rows."""
        for tile in tiles:
            try:
                costs = measure_costs(tile, num_sms, megahertz)
            except Exception as error:
                self.fail(f"{tile.core} {tile.mode} {tile.name}", error)
                continue
            self.rows.setdefault(tile.core, {}).setdefault(tile.mode, {})[tile.name] = costs
            print(f"{tile.core:5} {tile.mode:14} {tile.name:8} {costs}", flush=True)
            self.save()

    def judge_layers(self, layers: list[Layer], tiles: list[Tile]) -> None:
        """Fill the choices."""
        for layer, mode in itertools.product(layers, self.rows.get("mma", {})):
            try:
                choice = judge_planner(layer, mode, tiles)
            except Exception as error:
                self.fail(f"{layer.name} {mode}", error)
                continue
            self.choices.append(choice)
            print(choice, flush=True)
            self.save()

    def fail(self, work: str, error: Exception) -> None:
        """Note what could not be measured."""
        self.failed[work] = reason_of(error)
        print(f"{work} failed: {self.failed[work]}", flush=True)
        self.save()

    def save(self) -> None:
        """Write the JSON file, where there is to be one."""
        if self.path is not None:
            choices = [asdict(choice) for choice in self.choices]
            content = {"arch": self.arch, "origin": self.origin, **self.rows, "choices": choices}
            if self.failed:
                content["failed"] = self.failed
            write_whole(self.path, content)


SWEPT = [name for name, layers in LAYERS.items() if all(getattr(x, "groups", 1) == 1 for x in layers)]


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SWEPT, default=["cifar10", "sd15"])
    parser.add_argument("--json", type=Path, help="file for costs and choices")
    parser.add_argument("--table", type=Path, help="tile table to replace this architecture's rows in")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("sweep_tiles: wanted a CUDA device, found none")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    properties = torch.cuda.get_device_properties(0)
    tiles = tiles_of(json.loads(TABLE.read_text()), arch)
    megahertz = clock_megahertz()
    sweep = Sweep(arch, f"measured on {properties.name} at up to {megahertz:.0f} MHz", args.json)
    sweep.measure_tiles(tiles, properties.multi_processor_count, megahertz)
    sweep.judge_layers([layer for model in args.models for layer in LAYERS[model]], tiles)
    if sweep.choices:
        print(f"median loss of the planner {statistics.median(c.loss for c in sweep.choices):.1%}")
    if sweep.failed:  # before a table is written that would lack them
        sys.exit(f"sweep_tiles: failed: {'; '.join(sweep.failed)}")
    if args.table:
        new = replace_rows(json.loads(args.table.read_text()), arch, sweep.rows, sweep.origin)
        with replacing(args.table) as temporary:
            temporary.write_text(json.dumps(new, indent=2) + "\n")
    if wrong := [f"{c.layer} {c.mode} {', '.join(c.wrong)}" for c in sweep.choices if c.wrong]:
        sys.exit(f"sweep_tiles: other results than planned: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
