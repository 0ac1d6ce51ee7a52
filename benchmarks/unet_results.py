"""Results of bench_unet.py: statistics of interleaved samples, state of the machine, JSON, table and plot."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FORMAT_VERSION = 1
CPU_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
ENVIRONMENT = (
    "ADPDM_CPU",
    "ADPDM_CUDA_TILE",
    "ADPDM_FORCE_MMA_SYNC",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "KMP_BLOCKTIME",
    "GOMP_SPINCOUNT",
)


@dataclass(frozen=True)
class Summary:
    """Times of one contestant over the rounds, in seconds per forward.

    Args:
        median, p10: of its times.
        ratio, ratio_low, ratio_high: its time divided by the baseline's in the same round: median, quartiles.
    """

    median: float
    p10: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None


def summarize(samples: dict[str, list[float]], baseline: str | None) -> dict[str, Summary]:
    """Summaries by contestant; sample r of every contestant was taken in round r.

    Raises:
        ValueError: where a contestant has another number of samples than the others, or none.
    """
    counts = {name: len(times) for name, times in samples.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(f"summarize: wanted equally many samples of every contestant, got {counts}")
    summaries = {}
    for name, times in samples.items():
        ratios: list[float | None] = [None] * 3
        if baseline is not None:
            quotients = np.divide(times, samples[baseline])
            ratios = [float(v) for v in np.quantile(quotients, (0.5, 0.25, 0.75))]
        summaries[name] = Summary(float(np.median(times)), float(np.quantile(times, 0.1)), *ratios)
    return summaries


def sqnr_db(
    reference: np.ndarray,  # f32
    output: np.ndarray,  # f32, same shape
) -> float | None:
    """Signal to quantization noise in dB over all values; None where the two are equal.

    Raises:
        ValueError: for another shape, or values that are not finite.
    """
    if output.shape != reference.shape:
        raise ValueError(f"output must have shape {reference.shape}, got {output.shape}")
    strange = int((~np.isfinite(output)).sum())
    if strange:
        raise ValueError(f"output must be finite, got {strange} of {output.size} values that are not")
    exact = reference.astype(np.float64)
    error = np.square(output - exact).sum()
    return float(10 * np.log10(np.square(exact).sum() / error)) if error else None


@dataclass
class Row:
    """One contestant in one case.

    Args:
        state: "ok", "missing" (a package or device) or "failed"; of the last two only `reason` is set.
        sqnr_db, sqnr_db_per_probe: against torch float32 on inputs that nobody calibrated on; None is exact.
        wall, cpu: seconds per forward of every round, on the wall and of all threads.
        memory: bytes: base, load_peak, run_peak, device_peak.
        seconds: of prepare and load.
    """

    contestant: str
    state: str = "ok"
    reason: str = ""
    summary: Summary | None = None
    sqnr_db: float | None = None
    sqnr_db_per_probe: list[float | None] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: dict[str, int | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def busy_threads(self) -> float:
        """CPU time per wall time: above the threads asked for, a contestant ignores them; below, it waits."""
        return float(np.median(np.divide(self.cpu, self.wall)))

    @property
    def model_megabytes(self) -> float | None:
        """Peak while running less what the libraries alone take."""
        peak, base = self.memory.get("run_peak"), self.memory.get("base")
        return None if peak is None or base is None else (peak - base) / 1e6


@dataclass
class Case:
    """All contestants on one model at one batch size and number of threads."""

    model: str
    batch: int
    threads: int
    device: str
    clock: str  # "cpu" or "wall"
    random_weights: bool
    baseline: str | None = None
    rounds: int = 0
    probe_timesteps: list[int] = field(default_factory=list)
    load_average: list[float] = field(default_factory=list)  # of one minute, before and after
    rows: list[Row] = field(default_factory=list)

    @property
    def title(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        weights = ", random weights" if self.random_weights else ""
        return f"{self.model}{weights}, batch {self.batch}, {threads}, {self.device}"

    def finish(self) -> None:
        """Fill the summaries from the rounds that all contestants still running have done."""
        rows = [row for row in self.rows if row.state == "ok"]
        self.rounds = min((len(row.wall) for row in rows), default=0)
        for row in rows:
            del row.wall[self.rounds :], row.cpu[self.rounds :]
        ours = [row.contestant for row in rows if row.contestant.startswith("ours-")]
        self.baseline = ours[0] if ours else None
        samples = {row.contestant: row.cpu if self.clock == "cpu" else row.wall for row in rows}
        summaries = summarize(samples, self.baseline) if self.rounds else {}
        for row in rows:
            row.summary = summaries.get(row.contestant)


# ---- machine ----


def _output_of(*command: str) -> str | None:
    """What a command prints, or None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpuinfo() -> tuple[str, list[str]]:
    """Marketing name of the CPU and which of CPU_FLAGS it has."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor(), []
    pairs = [line.partition(":") for line in path.read_text().splitlines()]
    values = {key.strip(): value.strip() for key, _, value in pairs}
    flags = set(values.get("flags", "").split())
    return values.get("model name", platform.machine()), [flag for flag in CPU_FLAGS if flag in flags]


def machine_state(device: str) -> dict[str, Any]:
    """What a reader needs to place the times."""
    name, flags = _cpuinfo()
    status = _output_of("git", "status", "--porcelain", "--untracked-files=no")
    state = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _output_of("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "cpu": name,
        "cpu_features": flags,
        "logical_cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "environment": {key: os.environ[key] for key in ENVIRONMENT if key in os.environ},
    }
    if device == "cuda":
        query = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
        state["gpu"] = _output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv")
    return state


# ---- writing and reading ----


def write_json(path: Path, result: dict[str, Any], cases: list[Case], is_partial: bool) -> None:
    """Write all cases."""
    content = {"format": FORMAT_VERSION, "partial": is_partial, **result, "cases": [asdict(c) for c in cases]}
    write_whole(path, content)


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file at once or not at all; a reader never sees half a file.

    Not by `adpdm.files`: gpu_peaks.py runs while the extension that adpdm needs is still being compiled.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> tuple[dict[str, Any], list[Case]]:
    """What `write_json` wrote: everything but the cases, and the cases.

    Raises:
        ValueError: for another format.
    """
    content = json.loads(path.read_text())
    if content.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path} must have format {FORMAT_VERSION}, got {content.get('format')}")
    cases = []
    for values in content.pop("cases"):
        rows = [
            Row(**{**row, "summary": Summary(**row["summary"]) if row["summary"] else None})
            for row in values.pop("rows")
        ]
        cases.append(Case(**values, rows=rows))
    return content, cases


def _number(value: float | None, digits: int, absent: str = "-") -> str:
    return absent if value is None else f"{value:.{digits}f}"


def _table_row(row: Row) -> str:
    s = row.summary
    assert s is not None, "only contestants with samples have a line"
    spread = "" if s.ratio is None else f"{s.ratio:.2f} [{s.ratio_low:.2f}, {s.ratio_high:.2f}]"
    return (
        f"{row.contestant:22} {s.median * 1e3:10.2f} {s.p10 * 1e3:10.2f} {spread:>20} "
        f"{_number(row.sqnr_db, 1, 'exact'):>8} {_number(row.model_megabytes, 0):>9} "
        f"{row.seconds.get('prepare', 0):9.0f} {row.seconds.get('load', 0):7.1f} {row.busy_threads:6.2f}"
    )


def render(case: Case) -> str:
    """A case as text: one line per contestant, then who is missing or failed and why, then notes."""
    clock = "CPU time" if case.clock == "cpu" else "wall time"
    ratio = f"/ {case.baseline}" if case.baseline else ""
    lines = [
        f"{case.title}: {clock} per forward, {case.rounds} interleaved rounds",
        f"{'contestant':22} {'median ms':>10} {'p10 ms':>10} {ratio:>20} {'SQNR dB':>8} {'model MB':>9} "
        f"{'prepare s':>9} {'load s':>7} {'busy':>6}",
    ]
    timed = [row for row in case.rows if row.summary is not None]
    lines += [_table_row(row) for row in timed]
    lines += [f"{row.contestant}: {row.state}: {row.reason}" for row in case.rows if row.state != "ok"]
    for row in timed:
        if row.notes:
            notes = ", ".join(f"{key} {text}" for key, text in row.notes.items())
            lines.append(f"{row.contestant}: {notes}")
    return "\n".join(lines)


def plot(path: Path, result: dict[str, Any], cases: list[Case]) -> None:
    """Bars of the median time per forward, a tick at p10; ours in colour. The suffix picks SVG or PNG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "adpdm"  # equal results give equal files
    from matplotlib import pyplot

    shown = [case for case in cases if any(row.summary for row in case.rows)]
    if not shown:
        raise ValueError("plot: no case holds a time")
    heights = [0.9 + 0.3 * sum(row.summary is not None for row in case.rows) for case in shown]
    figure, axes = pyplot.subplots(
        len(shown),
        squeeze=False,
        figsize=(8, sum(heights) + 0.5),
        height_ratios=heights,
        layout="constrained",
    )
    for case, axis in zip(shown, axes[:, 0], strict=True):
        rows = [(row.contestant, row.summary) for row in case.rows if row.summary is not None]
        names, summaries = [name for name, _ in rows], [summary for _, summary in rows]
        medians = [s.median * 1e3 for s in summaries]
        colours = ["#c8553d" if name.startswith("ours-") else "#8d99ae" for name in names]
        bars = axis.barh(names, medians, color=colours)
        axis.bar_label(bars, [f" {m:.3g} ms" for m in medians])
        axis.plot([s.p10 * 1e3 for s in summaries], names, "|", color="black", markersize=12)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlim(left=0)
        axis.set_title(case.title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("ms per forward: median (bar), 10th percentile (tick); shorter is better")
    machine = result["machine"]
    figure.suptitle(f"{machine['cpu']}  {machine.get('gpu') or ''}  commit {(machine['commit'] or '?')[:10]}")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
