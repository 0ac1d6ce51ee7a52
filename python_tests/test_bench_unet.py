"""benchmarks/bench_unet.py: worker processes end to end on a tiny model, statistics, Ctrl-C, results."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import adpdm

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_unet  # noqa: E402
import peer_worker  # noqa: E402
import unet_results  # noqa: E402
import unets  # noqa: E402
import workers  # noqa: E402
from contestants import REGISTRY, Contestant  # noqa: E402
from job import Job  # noqa: E402
from unet_results import Case, Row  # noqa: E402
from workers import WorkerError, WorkerMissing  # noqa: E402

# A contestant that goes wrong, without a model, as diffusers takes seconds to import; a worker that knows it.
FAKES = f"""
import os, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import torch
from contestants import REGISTRY, Contestant
from engines import TorchEngine
from peer_worker import PROBES

class DiesWhenTimed(TorchEngine):
    fetched = 0

    def fetch(self, output):
        self.fetched += 1
        if self.fetched == PROBES:
            self.call = lambda *inputs: os.abort()
        return super().fetch(output)

def dies(job):
    return DiesWhenTimed(lambda sample, timestep: sample, torch.float32, "cpu")

REGISTRY["dies"] = Contestant(dies)
"""
FAKE_WORKER = """
import os, sys
sys.path.insert(0, os.path.dirname(__file__))
import fakes
import peer_worker
peer_worker.main()
"""
CONTESTANTS = ["torch-fp32", "dies", "ours-w8a8", "torch-fp16"]


def build_here(what: str, job: Job) -> dict[str, Any]:
    """What a worker process does when it is asked to build something, in this one."""
    done: dict[str, Any] = peer_worker.Server().answer({"do": what, "job": asdict(job)})["done"]
    return done


def start_worker(python: str, threads: int | None, log: Path, extra: Mapping[str, str]) -> Any:
    """A process, but for the reference: it is made of diffusers, which this process has imported already."""
    if log.stem == "reference":
        return nullcontext(SimpleNamespace(build=build_here))
    return workers.Worker(python, threads, log, extra)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, dict[str, Any]]]:
    """Exit code and JSON of a run of good and bad contestants."""
    folder = tmp_path_factory.mktemp("bench_unet")
    (folder / "fakes.py").write_text(FAKES)
    (folder / "worker.py").write_text(FAKE_WORKER)
    known = dict(REGISTRY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(workers, "SCRIPT", folder / "worker.py")
        patch.setattr(bench_unet, "Worker", start_worker)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        __import__("fakes")
        output = folder / "result.json"
        options = ["--models", "tiny", "--quick", "--rounds", "2", "--output", str(output)]
        code = bench_unet.main([*options, "--contestants", *CONTESTANTS])
        yield code, json.loads(output.read_text())
    sys.modules.pop("fakes")
    REGISTRY.clear()
    REGISTRY.update(known)


def row_of(finished: tuple[int, dict[str, Any]], name: str) -> dict[str, Any]:
    """One contestant of the run."""
    rows: dict[str, dict[str, Any]] = {row["contestant"]: row for row in finished[1]["cases"][0]["rows"]}
    return rows[name]


def test_bench_unet_times_every_good_contestant_in_every_round(finished: Any) -> None:
    for name in ("torch-fp32", "ours-w8a8"):
        row = row_of(finished, name)
        assert (row["state"], row["reason"]) == ("ok", "")
        assert len(row["wall"]) == len(row["cpu"]) == finished[1]["cases"][0]["rounds"] == 2
        assert 0 < row["summary"]["p10"] <= row["summary"]["median"] < 60


def test_bench_unet_divides_by_ours_within_a_round(finished: Any) -> None:
    theirs, ours = row_of(finished, "torch-fp32"), row_of(finished, "ours-w8a8")
    assert finished[1]["cases"][0]["baseline"] == "ours-w8a8"
    assert ours["summary"]["ratio"] == 1
    ratios = [t / o for t, o in zip(theirs["cpu"], ours["cpu"], strict=True)]
    assert theirs["summary"]["ratio"] == pytest.approx(sum(ratios) / 2)


def test_bench_unet_compares_outputs_with_full_precision(finished: Any) -> None:
    exact, ours = row_of(finished, "torch-fp32"), row_of(finished, "ours-w8a8")
    # Other thread counts of reference and contestant may sum in another order: float32 noise at most.
    assert exact["sqnr_db"] is None or exact["sqnr_db"] > 100
    assert 8 < ours["sqnr_db"] < 60  # int8 on random weights: neither float nor noise
    assert len(ours["sqnr_db_per_probe"]) == peer_worker.PROBES


def test_bench_unet_measures_memory_of_the_process(finished: Any) -> None:
    memory = row_of(finished, "ours-w8a8")["memory"]
    assert memory["run_peak"] > memory["base"] > 10e6
    assert memory["load_peak"] > memory["base"]


def test_bench_unet_reports_a_contestant_that_dies_and_goes_on(finished: Any) -> None:
    row = row_of(finished, "dies")
    assert row["state"] == "failed"
    assert row["reason"].startswith("in round 1: the process died with signal SIGABRT during 'run'")
    assert row["summary"] is None


def test_bench_unet_says_which_contestants_the_device_does_not_run(finished: Any) -> None:
    row = row_of(finished, "torch-fp16")
    assert (row["state"], row["reason"]) == ("missing", "runs on cuda only")


def test_bench_unet_exits_with_1_after_a_failure(finished: Any) -> None:
    assert finished[0] == 1


def test_bench_unet_records_machine_and_settings(finished: Any) -> None:
    code, result = finished
    assert result["partial"] is False
    assert result["settings"]["rounds"] == 2
    assert {"date", "commit", "cpu", "cpu_features", "logical_cpus"} <= set(result["machine"])
    assert row_of(finished, "ours-w8a8")["versions"]["torch"] == torch.__version__
    assert len(result["cases"][0]["load_average"]) == 2


def answer_to_load(contestant: Contestant, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a worker says that is asked to load a contestant."""
    patch.setitem(REGISTRY, "fake", contestant)
    job = Job("fake", "tiny", 1, "cpu", 1, "absent")
    return peer_worker.Server().answer({"do": "load", "job": asdict(job)})


def test_worker_tells_what_a_contestant_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(job: Job) -> Any:
        raise ValueError("wanted weights, got none\nand more lines")

    answer = answer_to_load(Contestant(raises), monkeypatch)
    assert answer == {"failed": "ValueError: wanted weights, got none"}


def test_worker_names_the_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(job: Job) -> Any:
        raise AssertionError("what it needs is not there")

    answer = answer_to_load(Contestant(loads, needs=("no_such_package", "torch", "nor_this")), monkeypatch)
    install = "pip install -r benchmarks/requirements-peers.txt"
    assert answer == {"missing": f"needs no_such_package, nor_this in this Python: {install}"}


@pytest.mark.parametrize(
    ("answer", "state"),
    [({"missing": "needs openvino"}, "missing"), ({"failed": "ValueError: no weights"}, "failed")],
)
def test_bench_unet_sets_aside_who_answers_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: dict[str, str], state: str
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(f"input()\nprint({json.dumps(answer)!r}, flush=True)\ninput()\n")
    monkeypatch.setattr(workers, "SCRIPT", script)
    row, job = Row("torch-fp32"), Job("torch-fp32", "tiny", 1, "cpu", 1, str(tmp_path))
    with ExitStack() as stack, pytest.raises(WorkerError) as caught:
        bench_unet.load(bench_unet.Session(tmp_path, 1, sys.executable), job, row, stack)
    bench_unet.set_aside(row, caught.value)
    assert (row.state, row.reason) == (state, next(iter(answer.values())))


def test_bench_unet_keeps_complete_rounds_on_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stub:
        """A worker that Ctrl-C strikes in the third round."""

        calls = 0

        def ask(self, what: str, **arguments: Any) -> dict[str, float]:
            Stub.calls += 1
            if Stub.calls == 6:
                raise KeyboardInterrupt
            return {"wall": 0.5, "cpu": 0.25}

    def load(session: Any, job: Job, row: Row, stack: Any) -> Any:
        return bench_unet.Runner(row, Stub(), 1, True, 1.0)

    monkeypatch.setattr(bench_unet, "make_reference", lambda session, job: [])
    monkeypatch.setattr(bench_unet, "load", load)
    monkeypatch.setattr(bench_unet, "judge", lambda job, runner: None)
    output = tmp_path / "result.json"
    names = ["--contestants", "torch-fp32", "ours-w8a8"]
    code = bench_unet.main(["--models", "tiny", "--output", str(output), *names])
    result = json.loads(output.read_text())
    assert code == 130
    assert result["partial"] is True
    assert result["cases"][0]["rounds"] == 2
    assert [len(row["cpu"]) for row in result["cases"][0]["rows"]] == [2, 2]


class Process:
    """A worker without a process, which answers or raises what it was made with."""

    def __init__(self, answer: dict[str, Any] | WorkerError) -> None:
        self.answer, self.is_closed = answer, False

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        if isinstance(self.answer, WorkerError):
            raise self.answer
        return self.answer

    def build(self, what: str, job: Job) -> dict[str, Any]:
        return self.ask(what)

    def close(self) -> None:
        self.is_closed = True

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def test_bench_unet_ends_the_process_of_who_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = WorkerError("no answer to 'run' within 900 s")
    processes: dict[str, Any] = {when: Process(slow) for when in ("load", "judge", "run")}
    job = Job("torch-fp32", "tiny", 1, "cpu", 1, str(tmp_path))
    monkeypatch.setattr(bench_unet, "Worker", lambda *arguments: processes["load"])
    with ExitStack() as stack:
        with pytest.raises(WorkerError, match="no answer"):
            bench_unet.load(bench_unet.Session(tmp_path, 1, "python"), job, Row("torch-fp32"), stack)
        assert processes["load"].is_closed, "before the others are timed"
    runners = {
        when: bench_unet.Runner(Row("torch-fp32"), process, 1, True, 1.0)
        for when, process in processes.items()
    }
    bench_unet.judge(job, runners["judge"])
    assert processes["judge"].is_closed
    bench_unet.run_rounds([runners["run"]], 2)
    assert processes["run"].is_closed
    assert runners["run"].row.reason == f"in round 1: {slow}"


def test_worker_is_closed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text("input()\n")
    monkeypatch.setattr(workers, "SCRIPT", tmp_path / "worker.py")
    ended: list[int] = []
    kill = os.killpg
    monkeypatch.setattr(os, "killpg", lambda group, how: (ended.append(group), kill(group, how)))
    with workers.Worker(sys.executable, 1, tmp_path / "log", {}) as worker:
        worker.close()
    assert len(ended) == 1, "the number may be another process's by then"


def test_bench_unet_goes_on_with_the_next_model_without_a_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_reference(session: Any, job: Job) -> list[int]:
        if job.model == "sdxl":
            raise WorkerMissing("the process died with signal SIGKILL during 'reference'")
        return [999]

    def load(session: Any, job: Job, row: Row, stack: Any) -> Any:
        process: Any = Process({"wall": 0.5, "cpu": 0.25})
        return bench_unet.Runner(row, process, 1, True, 1.0)

    monkeypatch.setattr(bench_unet, "make_reference", make_reference)
    monkeypatch.setattr(bench_unet, "load", load)
    monkeypatch.setattr(bench_unet, "judge", lambda job, runner: None)
    output = tmp_path / "result.json"
    names = ["--quick", "--rounds", "1", "--contestants", "ours-w8a8"]
    assert bench_unet.main(["--models", "sdxl", "tiny", "--output", str(output), *names]) == 1
    sdxl, tiny = json.loads(output.read_text())["cases"]
    (row,) = sdxl["rows"]
    assert (row["contestant"], row["state"]) == ("reference", "failed")
    assert [r["wall"] for r in tiny["rows"]] == [[0.5]]
    assert "reference: failed: the process died with signal SIGKILL" in capsys.readouterr().out


def test_reference_holds_what_adpdm_calibrates_on(tmp_path: Path) -> None:
    job = Job("reference", "tiny", 3, "cpu", 1, str(tmp_path))
    peer_worker.write_reference(job)
    unet, seen = unets.find("tiny"), []
    model = unets.build("tiny")
    handle = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    config = adpdm.QuantConfig(
        num_groups=1,
        grouping="uniform",
        num_inference_steps=unet.calibration_steps,
        histogram_images=unet.calibration_images,
        correct_bias=False,
        correct_prediction=False,
        weight_rounding="nearest",  # none of these then replays the inputs
    )
    adpdm.quantize(model, config, scheduler=unets.scheduler("tiny"))
    handle.remove()
    calibrated_on = torch.stack([x for x in seen if len(x) == unet.calibration_images])
    with np.load(job.calibration_file) as stored:
        assert torch.equal(calibrated_on, torch.from_numpy(stored["samples"]))


def test_load_batches_repeats_images_to_fill_the_last_batch(tmp_path: Path) -> None:
    samples = torch.arange(2 * 3.0).reshape(2, 3, 1, 1, 1)
    conditioning = {"text": torch.tensor([[10.0], [11.0], [12.0]])}
    unets.save_trajectory(tmp_path / "a.npz", samples, torch.tensor([900, 100]), conditioning)
    batches = unets.load_batches(tmp_path / "a.npz", 2)
    assert [b["sample"].flatten().tolist() for b in batches] == [[0, 1], [2, 0], [3, 4], [5, 3]]
    assert [b["timestep"].tolist() for b in batches] == [[900, 900]] * 2 + [[100, 100]] * 2
    assert [b["text"].flatten().tolist() for b in batches] == [[10, 11], [12, 10]] * 2


@pytest.mark.parametrize(("name", "millions"), [("cifar10", 35.7), ("sd15", 859.5), ("sdxl", 2567.5)])
def test_unets_have_the_parameters_of_their_originals(name: str, millions: float) -> None:
    unet = unets.find(name)
    with torch.device("meta"):
        model = unets.class_of(name)(**unets.settings_of(unet))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_random_weights_are_the_same_twice_and_keep_the_scale() -> None:
    first, second = unets.build("tiny"), unets.build("tiny", torch.bfloat16)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b), name
    sample = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = first(sample, torch.tensor(500)).sample
    assert 0.1 < float(output.std()) < 3


def test_find_rejects_unknown_models_and_sizes() -> None:
    assert unets.find("sd15@32").sample_shape == (4, 32, 32)
    with pytest.raises(ValueError, match="model must be one of demo, .* got 'sd3'"):
        unets.find("sd3")
    with pytest.raises(ValueError, match="positive multiple of 8, got 'sd15@20'"):
        unets.find("sd15@20")


def test_summarize_pairs_rounds() -> None:
    ours, theirs = [1.0, 2.0, 4.0], [3.0, 4.0, 4.0]  # ratios 3, 2, 1
    summary = unet_results.summarize({"ours": ours, "theirs": theirs}, "ours")["theirs"]
    assert summary.median == 4.0
    assert summary.p10 == pytest.approx(3.2)
    assert (summary.ratio, summary.ratio_low, summary.ratio_high) == (2.0, 1.5, 2.5)


def test_summarize_rejects_unequal_rounds() -> None:
    with pytest.raises(ValueError, match="equally many samples of every contestant, got .*'b': 1"):
        unet_results.summarize({"a": [1.0, 2.0], "b": [1.0]}, None)


def test_sqnr_db_of_a_tenth_is_twenty() -> None:
    reference = np.full((2, 3), 2, np.float32)
    assert unet_results.sqnr_db(reference, reference * 1.1) == pytest.approx(20, abs=1e-4)
    assert unet_results.sqnr_db(reference, reference) is None
    with pytest.raises(ValueError, match="finite, got 6 of 6"):
        unet_results.sqnr_db(reference, reference * math.nan)
    with pytest.raises(ValueError, match=r"shape \(2, 3\), got \(3,\)"):
        unet_results.sqnr_db(reference, reference[0])


def example_case() -> Case:
    """A finished case with one contestant of each state."""
    ours = Row("ours-w8a8", wall=[1.0, 1.0], cpu=[1.0, 1.0], memory={"base": 10**6, "run_peak": 3 * 10**6})
    theirs = Row("torch-fp32", wall=[2.0, 4.0], cpu=[2.0, 4.0], notes={"weights": "7 bits"})
    absent = Row("openvino-fp32", "missing", "needs openvino")
    case = Case("tiny", 1, 2, "cpu", "wall", True, rows=[theirs, ours, absent])
    case.finish()
    return case


def test_results_survive_writing_and_reading(tmp_path: Path) -> None:
    case, path = example_case(), tmp_path / "new" / "result.json"
    unet_results.write_json(path, {"machine": {"cpu": "test"}}, [case], is_partial=True)
    result, cases = unet_results.read_json(path)
    assert cases == [case]
    assert (result["partial"], result["machine"]) == (True, {"cpu": "test"})
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_render_tells_times_reasons_and_notes() -> None:
    lines = unet_results.render(example_case()).splitlines()
    wanted = """\
        tiny, random weights, batch 1, 2 threads, cpu: wall time per forward, 2 interleaved rounds
        torch-fp32 3000.00 2200.00 3.00 [2.50, 3.50] exact - 0 0.0 1.00
        ours-w8a8 1000.00 1000.00 1.00 [1.00, 1.00] exact 2 0 0.0 1.00
        openvino-fp32: missing: needs openvino
        torch-fp32: weights 7 bits"""
    assert [" ".join(line.split()) for line in lines[:1] + lines[2:]] == textwrap.dedent(wanted).splitlines()


def test_plot_draws_every_timed_contestant(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in benchmarks/requirements-peers.txt")
    path = tmp_path / "plot.svg"
    result = {"machine": {"cpu": "test", "commit": None}}
    unet_results.plot(path, result, [example_case()])
    assert "torch-fp32" in path.read_text()
    assert "openvino-fp32" not in path.read_text()


def test_a_contestant_of_one_level_runs_at_that_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = []
    monkeypatch.setattr(bench_unet, "Worker", lambda *arguments: environments.append(arguments[-1]))
    session = bench_unet.Session(tmp_path, 20, "python")
    for name in ("ours-w8a8-graph-avx2", "ours-w8a8-graph", "reference"):
        session.worker(name, 1)
    assert environments == [{"ADPDM_CPU": "avx2"}, {}, {}]
    assert not any(REGISTRY[name].level for name in bench_unet.parse(["--contestants", "all"]).contestants)


def test_what_levels_share_is_prepared_at_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = []

    def start(python: str, threads: int | None, log: Path, extra: Mapping[str, str]) -> Process:
        environments.append(extra)
        return Process({"seconds": 2.0})

    monkeypatch.setattr(bench_unet, "Worker", start)
    session = bench_unet.Session(tmp_path, 20, "python")
    for level in ("amx", "avx2"):
        job = Job(f"ours-w8a8-graph-{level}", "tiny", 1, "cpu", 1, str(tmp_path))
        assert bench_unet.prepare(session, job) == 2.0
    assert environments == [{}]


def test_results_record_the_variables_that_our_kernels_read() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu", ".h", ".cuh")]
    read = {name for path in sources for name in re.findall(r'getenv\("(ADPDM_\w+)"\)', path.read_text())}
    assert "ADPDM_CPU" in read
    assert read <= set(unet_results.ENVIRONMENT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "5"], "--rounds must be at least 20, got 5"),
        (["--contestants", "tensorrt"], "--contestants must be all, or of .* got tensorrt"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--threads", "1", "1"], "--threads must name each value once"),
        (["--plot", "x.pdf"], "--plot must end in .svg or .png, got x.pdf"),
    ],
)
def test_bench_unet_rejects_bad_options(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_unet.main(options)
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
