"""One plot per model: PSNR of every method and number of bits, and its error along the trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

BITS_OF_TRAJECTORY = "w6a6"  # where methods differ most


class Measured(Protocol):
    """What a row of `accuracy_tables` has."""

    @property
    def model(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def bits(self) -> str: ...
    @property
    def psnr_db(self) -> tuple[float, float, float]: ...
    @property
    def noise_sqnr_db(self) -> list[float]: ...


def draw(path: Path, rows: Sequence[Measured]) -> None:
    """Write an SVG file; equal rows give equal files."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "adpdm"
    from matplotlib import pyplot

    methods = list(dict.fromkeys(r.method for r in rows))
    bits = list(dict.fromkeys(r.bits for r in rows))
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 0.36 * len(methods) + 1.4), width_ratios=(3, 2), layout="constrained"
    )
    for number, name in enumerate(bits):
        mine = [r for r in rows if r.bits == name]
        heights = [-methods.index(r.method) - 0.16 * (number - (len(bits) - 1) / 2) for r in mine]
        means = [r.psnr_db[0] for r in mine]
        spread = [[r.psnr_db[0] - r.psnr_db[1] for r in mine], [r.psnr_db[2] - r.psnr_db[0] for r in mine]]
        left.errorbar(means, heights, xerr=spread, fmt="o", markersize=4, label=name.upper())
    left.set_yticks([-i for i in range(len(methods))], methods)
    left.set_xlabel("PSNR to full precision in dB, mean and range over calibration seeds")
    left.grid(axis="x", alpha=0.3)
    left.legend(frameon=False, ncols=len(bits), loc="upper center", bbox_to_anchor=(0.5, 1.14), fontsize=8)
    right.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)  # more lines than the usual ten colours
    shown = [r for r in rows if r.bits == BITS_OF_TRAJECTORY]
    for row in shown:
        right.plot(row.noise_sqnr_db, label=row.method, linewidth=1)
    right.set_xlabel(f"sampler step, noisy to clean ({BITS_OF_TRAJECTORY.upper()})")
    right.set_ylabel("SQNR of the noise prediction in dB")
    right.grid(alpha=0.3)
    if shown:
        right.legend(frameon=False, fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
