"""Calibration shared by processes: the bytes of one process, whatever their number and however they end."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from process_groups import Ended, run_group
from torch import Tensor, nn

import adpdm
from adpdm import QuantConfig, SearchConfig, cli
from adpdm.processes import ALONE, OtherProcessFailed, Processes, joined, owners
from adpdm.testing import ONE_BLOCK, ddim_scheduler, tiny_conditional_unet, tiny_pipeline, tiny_unet

STEPS = 4


def config(**changes: Any) -> QuantConfig:
    """Three units of images in the histograms, two in a round of the search."""
    values: dict[str, Any] = {
        "weight_bits": 4,
        "activation_bits": 6,
        "num_groups": 2,
        "num_inference_steps": STEPS,
        "histogram_images": 18,
        "calibration_images": 20,
        "round_size": 10,
        "raised_layers": 0.2,
        "search": SearchConfig(num_steps=4, refit_steps=1, batch_size=2, parts=2),
    }
    return QuantConfig(**{**values, **changes})


class Stop:
    """A progress callback that raises at a given point."""

    def __init__(self, phase: str, done: int, error: type[BaseException]) -> None:
        self.phase, self.done, self.error = phase, done, error

    def __call__(self, phase: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if phase == self.phase and done >= self.done:
            raise self.error(f"stopped at {phase} {done}")


def quantized(settings: QuantConfig, **options: Any) -> tuple[bytes, str]:
    """State and report of a small denoiser, without seconds."""
    unet = tiny_unet(**ONE_BLOCK)
    report = adpdm.quantize(unet, settings, scheduler=ddim_scheduler(), **options).to_dict()
    report["trace"].pop("seconds")
    state = {k: v.contiguous() for k, v in unet.state_dict().items()}
    return safetensors.torch.save(state), json.dumps(report)


@functools.cache
def alone(settings: QuantConfig) -> tuple[bytes, str]:
    return quantized(settings)


def quantize_on(rank: int, settings: QuantConfig, state: Path | None = None) -> tuple[bytes, str]:
    return quantized(settings, state_file=state)


def results(group: list[Ended]) -> list[Any]:
    for rank, ended in enumerate(group):
        assert ended.error is None, f"process {rank}: {ended.trace}"
        assert not ended.is_dead
    return [ended.result for ended in group]


# ---- the same bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (2, config(grouping="dp")),
        (3, config(grouping="dp", shared_groups=True, weight_rounding="nearest")),
        (2, config()),
        (3, config(search=SearchConfig(4, 1, batch_size=9, objective="noise", parts=3))),
    ],
)
def test_any_number_of_processes_gives_the_bytes_of_one(size: int, settings: QuantConfig) -> None:
    wanted = alone(settings)
    for rank, (state, report) in enumerate(results(run_group(size, quantize_on, settings))):
        assert report == wanted[1], f"process {rank} reports something else"
        assert state == wanted[0], f"process {rank} has another model"


def interrupted_on(rank: int, settings: QuantConfig, state: Path) -> None:
    # All of them are asked to stop, as Ctrl-C in a terminal does.
    with pytest.raises(KeyboardInterrupt):
        quantized(settings, state_file=state, progress=Stop("search", 3, KeyboardInterrupt))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_search_resumes_with_another_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    settings, state = config(), tmp_path / "state.safetensors"
    results(run_group(before, interrupted_on, settings, state))
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
    for found in results(run_group(after, quantize_on, settings, state)):
        assert found == alone(settings)


# ---- errors ------------------------------------------------------------------------------------------------


def is_float(unet: nn.Module) -> bool:
    original = tiny_unet(**ONE_BLOCK).state_dict()
    state = unet.state_dict()
    return state.keys() == original.keys() and all(torch.equal(state[k], original[k]) for k in original)


def fail_on_second(rank: int, phase: str, error: type[BaseException]) -> tuple[type, str, bool]:
    """What a process gets to know of an error on process 1, and whether its model is as it was."""
    unet = tiny_unet(**ONE_BLOCK)
    progress = Stop(phase, 1, error) if rank == 1 else lambda phase, done, total: None
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        adpdm.quantize(unet, config(), scheduler=ddim_scheduler(), progress=progress)
    return caught.type, str(caught.value), is_float(unet)


@pytest.mark.parametrize("phase", ["trajectories", "weights", "search"])
def test_an_error_on_one_process_ends_all(phase: str) -> None:
    first, second, third = results(run_group(3, fail_on_second, phase, ValueError))
    assert second[0] is ValueError
    assert second[1].startswith(f"stopped at {phase}")
    assert first == third == (OtherProcessFailed, f"process 1: {second[1]}", True)
    assert second[2]


def test_an_interrupt_of_one_process_interrupts_all() -> None:
    group = results(run_group(2, fail_on_second, "bias correction", KeyboardInterrupt))
    assert [ended[0] for ended in group] == [KeyboardInterrupt, KeyboardInterrupt]
    assert all(ended[2] for ended in group)


def test_an_error_without_a_sentence_is_named() -> None:
    first, _ = results(run_group(2, fail_on_second, "partition", ZeroDivisionError))
    assert first[1].startswith("process 1: ZeroDivisionError: stopped at partition")


def die_on_second(rank: int) -> None:
    def progress(phase: str, done: int, total: int) -> None:
        if rank == 1 and phase == "partition":
            os._exit(3)

    adpdm.quantize(tiny_unet(**ONE_BLOCK), config(), scheduler=ddim_scheduler(), progress=progress)


def test_a_process_that_dies_ends_all() -> None:
    first, second = run_group(2, die_on_second)
    assert second.is_dead
    assert first.error is OtherProcessFailed
    assert first.message.startswith("another process ended without a word (")


def leave_in_the_midst(rank: int) -> None:
    """Process 1 leaves while the others wait for its part of a gather."""
    with joined() as processes:
        if rank == 1:
            with processes._talking():
                raise ValueError("out of memory")
        processes.map(range(2), lambda i: [torch.zeros(1)])


def test_a_process_that_leaves_a_meeting_ends_all() -> None:
    first, second = run_group(2, leave_in_the_midst)
    assert (second.error, second.message) == (ValueError, "out of memory")
    assert first.error is OtherProcessFailed
    assert first.message.startswith("another process ended without a word (")


def interrupted_in_the_midst(rank: int) -> None:
    """Ctrl-C reaches process 1 while it gathers; it must finish that before it leaves."""
    broadcast = dist.broadcast

    def interrupting(*args: Any) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        broadcast(*args)

    dist.broadcast = interrupting
    with joined() as processes:
        while True:
            processes.map(range(2), lambda i: [torch.full((3,), i)])


def test_an_interrupt_waits_for_the_end_of_a_gather() -> None:
    group = run_group(2, interrupted_in_the_midst)
    assert [ended.error for ended in group] == [KeyboardInterrupt, KeyboardInterrupt]


def not_finite(rank: int) -> str:
    """Image 8, the first of the second unit, has a condition that is not a number."""
    texts = torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(0))
    texts[8] = float("nan")
    settings = config(grouping="dp", histogram_images=9)
    with pytest.raises((ValueError, OtherProcessFailed)) as caught:
        adpdm.quantize(
            tiny_conditional_unet(),
            settings,
            scheduler=ddim_scheduler(),
            conditioning={"encoder_hidden_states": texts},
        )
    return str(caught.value)


def test_an_activation_that_is_not_finite_is_told_by_all() -> None:
    first, second = results(run_group(2, not_finite))
    assert "must be finite, got range [nan, nan]" in second
    assert first == f"process 1: {second}"


# ---- what must be equal ------------------------------------------------------------------------------------


def with_other_input(rank: int, kind: str) -> str:
    texts = torch.zeros(2, 3, 8)
    unet, settings, scheduler = tiny_conditional_unet(), config(grouping="dp"), ddim_scheduler()
    if rank == 1:
        if kind == "setting":
            settings = settings.replace(seed=1)
        elif kind == "weights":
            unet = tiny_conditional_unet(1)
        elif kind == "conditioning":
            texts = texts + 1
        elif kind == "scheduler":
            scheduler.register_to_config(clip_sample=False)
        elif kind == "threads":
            torch.set_num_threads(2)
    started: list[str] = []
    with pytest.raises(ValueError, match="all processes must have the same") as caught:
        adpdm.quantize(
            unet,
            settings,
            scheduler=scheduler,
            conditioning={"encoder_hidden_states": texts},
            progress=lambda phase, done, total: started.append(phase),
        )
    assert started == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("setting", "the same setting seed; process 1 has 1, process 0 has 0"),
        ("weights", "the same weights; process 1 and process 0 differ in it"),
        ("conditioning", "the same conditioning; process 1 and process 0 differ in it"),
        ("scheduler", "the same scheduler; process 1 and process 0 differ in it"),
        ("threads", "the same number of threads; process 1 has 2, process 0 has 1"),
    ],
)
def test_different_inputs_are_refused_before_work_starts(kind: str, sentence: str) -> None:
    wanted = f"quantize: all processes must have {sentence}"
    assert results(run_group(2, with_other_input, kind)) == [wanted, wanted]


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(**ONE_BLOCK).save_pretrained(folder)
    return folder


QUICK = ["--steps", "4", "--groups", "2", "--bits", "w4a8", "--images", "20", "--search-steps", "4", "--json"]


def run_command(rank: int, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a process."""
    out, err = io.StringIO(), io.StringIO()
    cli.console.file = err
    with contextlib.redirect_stdout(out):
        code = cli.main(list(words))
    return code, out.getvalue(), " ".join(err.getvalue().split())


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if name != cli.REPORT_NAME}


def test_the_command_shares_the_work_and_writes_once(model: Path, tmp_path: Path) -> None:
    words = ["quantize", str(model), *QUICK]
    assert cli.main([*words, "--out", str(tmp_path / "one")]) == 0
    found = results(run_group(2, run_command, *words, "--out", str(tmp_path / "two"), initialise=False))
    assert [code for code, _, _ in found] == [0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    assert json.loads(found[0][1])["config"]["weight_bits"] == 4
    assert "quantized into" in found[0][2]
    assert found[1][1:] == ("", "")  # the first process speaks for both


def test_errors_of_the_command_end_both_with_one_sentence(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    out.mkdir()
    (out / "file").touch()
    cases = [
        (["--out", str(out)], f"--out {out} must be a new or empty folder"),
        (
            ["--out", str(tmp_path / "r"), "--budget", "9s"],
            "--budget estimates what one process takes, got 2",
        ),
        (["--out", str(out / "file" / "r")], "[Errno 20] Not a directory"),
    ]
    for words, sentence in cases:
        found = results(run_group(2, run_command, "quantize", str(model), *QUICK, *words, initialise=False))
        assert [code for code, _, _ in found] == [1, 1]
        assert f"error: {sentence}" in found[0][2]
        assert found[1][1:] == ("", "")
    assert {path.name for path in tmp_path.iterdir()} == {"q"}


def without_model_on_second(rank: int, model: Path, out: Path) -> tuple[int, str, str]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    words = [str(model) if rank == 0 else str(model) + "-absent", "--out", str(out), *QUICK]
    return run_command(rank, "quantize", *words)


def test_a_model_that_one_process_cannot_load_ends_both(model: Path, tmp_path: Path) -> None:
    found = results(run_group(2, without_model_on_second, model, tmp_path / "q", initialise=False))
    assert [code for code, _, _ in found] == [1, 1]
    assert found[0][2].startswith("error: process 1:")
    assert "absent" in found[0][2]
    assert list(tmp_path.iterdir()) == []


# ---- sharing and gathering ---------------------------------------------------------------------------------


def test_owners_balance_costs_and_the_first_process_starts() -> None:
    assert owners([1.0] * 5, 2) == [0, 1, 0, 1, 0]
    assert owners([1.0, 8.0, 3.0, 3.0, 2.0], 2) == [0, 0, 1, 1, 1]
    assert owners([1.0], 3) == [0]
    assert owners([], 2) == []


def exchange(rank: int) -> list[Any]:
    with joined() as processes:
        items = processes.map(range(5), tensors_of, [1, 9, 1, 1, 1])
        counts = [torch.arange(4) + rank, torch.tensor(2**60 + rank)]
        processes.add_up(counts)
        extrema = torch.tensor([[0.5, 1.5], [-0.0, 0.0]]) + (rank - 1) * torch.tensor([[1.0, 1.0], [0, 0]])
        processes.widen([extrema])
        first = processes.first(lambda: f"from {rank}")
        return [items, counts, extrema, first, processes.meet(rank)]


def tensors_of(item: int) -> list[Tensor]:
    """Results of several dtypes and layouts."""
    generator = torch.Generator().manual_seed(item)
    image = torch.randn(2, 3, 4, 5, generator=generator).contiguous(memory_format=torch.channels_last)
    odd = torch.randint(0, 2, (item,), generator=generator) > 0
    return [odd, image, torch.tensor(float(item), dtype=torch.float64), torch.zeros(0, item), image.half()]


def test_results_of_all_come_in_one_order_with_their_bits() -> None:
    wanted = ALONE.map(range(5), tensors_of)
    assert all(x.is_contiguous() for tensors in wanted for x in tensors)
    for items, counts, extrema, first, ranks in results(run_group(3, exchange)):
        for tensors, expected in zip(items, wanted, strict=True):
            for x, y in zip(tensors, expected, strict=True):
                assert x.dtype == y.dtype
                assert x.shape == y.shape
                assert x.is_contiguous()
                assert torch.equal(x, y)
        assert counts[0].tolist() == [3, 6, 9, 12]
        assert int(counts[1]) == 3 * 2**60 + 3
        assert extrema.tolist() == [[-0.5, 2.5], [0.0, 0.0]]
        assert not bool(torch.signbit(extrema[1]).any())
        assert (first, ranks) == ("from 0", [0, 1, 2])


def test_real_numbers_are_not_added_up() -> None:
    with pytest.raises(AssertionError, match="depend on their order"):
        Processes().add_up([torch.zeros(1)])
