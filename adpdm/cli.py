"""The command `adpdm`: arguments in, one call into the package, a table or JSON out."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from .budget import fit_budget
from .conditioning import (
    add_input_options,
    conditioning_of_prompts,
    decoder_of,
    guided,
    read_inputs,
    try_call,
)
from .config import QuantConfig
from .demo import build_report, run_demo, save_image_grid
from .denoisers import DENOISER_NAMES, find_denoiser, load_pipeline
from .doctor import REPORT_NAME, diagnose, render
from .evaluate import (
    EvaluationConfig,
    EvaluationResult,
    SampleSettings,
    compare,
    generate,
    rows_in_turn,
    sample_set,
    set_distance,
)
from .evaluate.layers import probe_layers
from .evaluate.words import distance_rows, evaluation_rows
from .files import filling
from .info import gather_info, render_info
from .layer_runs import read_record
from .nn import summarize_fusion
from .outputs import (
    check_file,
    check_image,
    check_new_folder,
    checked_state,
    folder_of,
    remove_state,
    state_file,
)
from .pipeline import QuantizationReport, calibration_sampler, quantize_denoiser
from .pipeline_checks import trace_forward
from .processes import ALONE, OtherProcessFailed, Processes, joined, launched
from .quantize_options import add_quantize_options, quant_config
from .trajectory import Conditioning, DenoiserCall, Sampler

EXIT_FAILURE, EXIT_INTERRUPTED = 1, 130

console = Console(stderr=True)  # standard output belongs to results


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a stated error, 2 for bad usage, 130 for Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    args = _parser().parse_args(words)
    args.command = shlex.join(["adpdm", *words])  # reports quote it
    try:
        result: dict[str, Any] = args.run(args)
    except KeyboardInterrupt:
        console.print("[bold]interrupted[/]; nothing half-written was left behind")
        return EXIT_INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, OtherProcessFailed) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return EXIT_FAILURE
    if args.json and not console.quiet:
        print(json.dumps(result, indent=2))
    return 0


# ---- commands ----------------------------------------------------------------------------------------------


def _quantize(args: argparse.Namespace) -> dict[str, Any]:
    with _shared() as processes:
        return _quantize_shared(args, processes)


@contextmanager
def _shared() -> Iterator[Processes]:
    """The processes that torchrun started, if it did; the first speaks for all that it is in touch with."""
    with launched():
        processes = ALONE
        try:
            with joined() as processes:
                console.quiet = processes.rank > 0
                yield processes
        finally:
            console.quiet = processes.rank > 0 and processes.in_touch


def _quantize_shared(args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    out, is_first = Path(args.out), processes.rank == 0
    config = quant_config(args)
    if args.budget is not None and args.resume:
        raise ValueError(
            "--budget times the machine anew, so it cannot continue a search: with --resume, give the "
            "options that the interrupted run printed"
        )
    state: Path | None = state_file(out)
    if is_first:
        check_new_folder(out)
        state = checked_state(out, config, args.resume, _warn)
    pipe = load_pipeline(args.model, local_files_only=args.offline)
    conditioning, call = read_inputs(args, find_denoiser(pipe))
    sampler = calibration_sampler(pipe, config, conditioning=conditioning, call=call, prompts=args.prompt)
    if args.budget is not None:
        config = _within_budget(args, sampler, config, processes)
    try:
        with _progress() as progress:
            report = quantize_denoiser(sampler, config, progress, state, processes)
        values = {**report.to_dict(), "command": args.command}
        if is_first:
            with filling(out, last=DENOISER_NAMES) as folder:  # without a denoiser nothing loads
                pipe.save_pretrained(folder)
                (folder / REPORT_NAME).write_text(json.dumps(values, indent=1))
    except (KeyboardInterrupt, OSError):
        if state is not None and state.exists():
            console.print(f"the search so far is in {escape(str(state))}; continue it with --resume")
        raise
    if is_first:
        remove_state(state)
        _tell_quantized(report, out)
    return values


def _tell_quantized(report: QuantizationReport, out: Path) -> None:
    trace = report.trace
    rows = {
        "covered": str(report.coverage),
        "fused": summarize_fusion(report.fusion),
        "histograms": f"{trace.histogram_bytes / 2**20:.1f} MiB, "
        f"cached inputs {trace.trajectory_bytes / 2**20:.1f} MiB",
        "seconds": ", ".join(f"{k} {v:.0f}" for k, v in trace.seconds.items()),
    }
    median, largest, limit = trace.summarize_gain()
    rows["groups"] = (
        f"input error {median:.2f} dB below one range for all steps (median), {largest:.2f} at most; "
        f"a range for every step: {limit:.2f} dB"
    )
    if trace.outcome is not None:
        o = trace.outcome
        rows["search"] = (
            f"soft/hard gap {o.gap_db:+.2f} dB, max importance {o.max_importance:.2f}, "
            f"groups moved {o.moved:.1%}, {o.sample_gain_db:+.2f} dB on held-out samples, "
            f"{'kept' if o.is_kept else 'put back'}"
        )
    left = trace.correction.get("energy_left", [])
    if min(left, default=1.0) < 1:
        rows["corrected"] = (
            f"predictions of {sum(x < 1 for x in left)} of {len(left)} steps, "
            f"squared error down to {min(left):.0%} at best"
        )
    _table(f"quantized into {out}", rows)
    for warning in trace.warnings:
        _warn(warning)


def _within_budget(
    args: argparse.Namespace, sampler: Sampler, config: QuantConfig, processes: Processes
) -> QuantConfig:
    """The settings that fit into --budget, told so that they can be asked for again."""
    if processes.size > 1:
        raise ValueError(
            f"--budget estimates what one process takes, got {processes.size} of them; run it with one, and "
            "give the options that it prints to all"
        )
    trace_forward(sampler)  # a call that fails says why
    plan = fit_budget(sampler, config, args.budget)
    rows = {
        "an image and step": f"{plan.image_seconds:.3g} s",
        "what was asked for": f"about {plan.wanted_seconds:.0f} s",
        "what fits": f"about {plan.seconds:.0f} s of {args.budget:g}",
    }
    _table("budget", rows)
    console.print(f"to get the same again: {plan.options}", highlight=False, soft_wrap=True)
    return plan.config


def _sample(args: argparse.Namespace) -> dict[str, Any]:
    out = Path(args.out)
    check_image(out)
    pipe = load_pipeline(args.model, local_files_only=True)
    asked = _asked(args, pipe)
    result = generate(
        asked.denoisers[0],
        pipe.scheduler,
        args.images,
        args.steps,
        args.seed,
        min(args.images, args.batch),
        conditioning=asked.rows(args.images),
        call=asked.call,
    )
    samples = result.samples
    out.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        save_image_grid(samples if asked.decode is None else asked.decode(samples), out)
    seconds = float(result.seconds_per_step.mean())
    values = {"out": args.out, "images": args.images, "seed": args.seed, "seconds_per_step": seconds}
    _table(f"{args.images} images in {args.out}", {"seconds per step": f"{seconds:.4f}"})
    return values


def _dataset(args: argparse.Namespace) -> dict[str, Any]:
    pipe = load_pipeline(args.model, local_files_only=True)
    asked = _asked(args, pipe)
    settings = SampleSettings(args.images, args.steps, args.seed, args.batch)
    with _progress() as progress:
        made = sample_set(
            asked.denoisers[0],
            pipe.scheduler,
            Path(args.out),
            settings,
            conditioning=asked.conditioning,
            call=asked.call,
            decode=asked.decode,
            progress=progress,
        )
    left = len(made.missing())
    _table(f"samples in {args.out}", {"images": str(args.images), "files that others still make": str(left)})
    return {"out": args.out, "images": args.images, "missing_files": left}


def _distance(args: argparse.Namespace) -> dict[str, Any]:
    with _progress() as progress:
        found = set_distance(
            Path(args.first),
            Path(args.second),
            dimensions=args.dimensions,
            inception=None if args.inception is None else Path(args.inception),
            progress=progress,
        )
    _table(f"{args.second} against {args.first}", distance_rows(found))
    return found.to_dict()


@dataclass(frozen=True)
class _Asked:
    """What the options of sampling say, tried with one call of each denoiser."""

    denoisers: list[nn.Module]  # guided where that is asked for
    bare: list[nn.Module]
    conditioning: Conditioning  # for images in turn
    call: DenoiserCall | None
    decode: Callable[[Tensor], Tensor] | None

    def rows(self, num_images: int) -> Conditioning:
        """The conditioning with one row per image."""
        return rows_in_turn(self.conditioning, 0, num_images)


def _asked(args: argparse.Namespace, pipe: Any, *others: Any) -> _Asked:
    """How the denoisers of pipelines are sampled; the first of them encodes texts and decodes latents."""
    for name, count in (("--images", args.images), ("--steps", args.steps)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {args.seed}")
    if args.guidance_scale is not None and not math.isfinite(args.guidance_scale):
        raise ValueError(f"--guidance-scale must be a finite number, got {args.guidance_scale}")
    bare = denoisers = [find_denoiser(each) for each in (pipe, *others)]
    conditions, call = read_inputs(args, denoisers[0])
    given = conditions or Conditioning()
    if args.prompt:
        given = {**given, **conditioning_of_prompts(pipe, args.prompt)}
    if args.guidance_scale is not None:
        denoisers = guided(pipe, denoisers, args.guidance_scale, given)
    shapes = [try_call(denoiser, pipe.scheduler, args.steps, given, call) for denoiser in denoisers]
    return _Asked(denoisers, bare, given, call, decoder_of(pipe, shapes[0]))


def _compare(args: argparse.Namespace) -> tuple[Any, _Asked, EvaluationResult]:
    """The original's scheduler, how both were sampled, and what that gave."""
    reference = load_pipeline(args.original, local_files_only=True)
    quantized = load_pipeline(args.quantized, local_files_only=True)
    config = EvaluationConfig(
        num_images=args.images, num_inference_steps=args.steps, seed=args.seed, batch_size=args.batch
    )
    asked = _asked(args, reference, quantized)
    with _progress() as progress:
        result = compare(
            asked.denoisers[0],
            asked.denoisers[1],
            reference.scheduler,
            config,
            conditioning=asked.rows(args.images),
            call=asked.call,
            decode=asked.decode,
            paths=(folder_of(args.original), folder_of(args.quantized)),
            progress=progress,
        )
    return reference.scheduler, asked, result


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    _, _, result = _compare(args)
    _table(f"{args.quantized} against {args.original}", evaluation_rows(result))
    return result.to_dict()


def _report(args: argparse.Namespace) -> dict[str, Any]:
    check_file(Path(args.out))
    stored = folder_of(args.quantized) / REPORT_NAME
    if not stored.is_file():
        raise ValueError(f"{stored} is missing; `adpdm quantize` writes it beside the model")
    values = read_record(stored)
    scheduler, asked, result = _compare(args)
    rows = asked.rows(args.images)
    original, quantized = asked.bare
    probes = probe_layers(
        original, quantized, scheduler, args.steps, args.seed, conditioning=rows, call=asked.call
    )
    build_report(Path(args.out), values, probes, result, args.command)
    _table(f"report in {args.out}", evaluation_rows(result))
    return {"out": args.out, "evaluation": result.to_dict()}


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    with _progress() as progress:
        values = run_demo(Path(args.model), Path(args.out), args.seed, args.quick, progress, args.command)
    _table(f"report in {Path(args.out) / 'report.html'}", values["summary"])
    return values


def _info(args: argparse.Namespace) -> dict[str, Any]:
    info = gather_info()
    if not args.json:
        print(render_info(info))
    return dict(info)


def _doctor(args: argparse.Namespace) -> dict[str, Any]:
    diagnosis = diagnose(args.model)
    if not args.json:
        print(render(diagnosis))
    return diagnosis.to_dict()


# ---- arguments ---------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adpdm", description="Quantize diffusion models and sample in integers."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(
        name: str, run: Callable[[argparse.Namespace], dict[str, Any]], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
        sub.set_defaults(run=run)
        return sub

    sub = command("quantize", _quantize, "Quantize a diffusers model into a new folder.")
    sub.add_argument("model", help="folder or hub name of a diffusers pipeline")
    sub.add_argument("--out", required=True, help="folder to write, must be new or empty")
    add_quantize_options(sub)
    add_input_options(sub)

    _add_sampling_commands(command)

    sub = command("demo", _demo, "Quantize the shipped model at several settings and write a report.")
    sub.add_argument("--model", default="models/ddpm-fashion-mnist-32")
    sub.add_argument("--out", default="adpdm-demo")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--quick", action="store_true", help="less of everything, for tests")

    command("info", _info, "Show version, CPU features, chosen kernels and what was built.")

    sub = command(
        "doctor", _doctor, "Say which kernels and threads run here, how a model's layers run, and why."
    )
    sub.add_argument("model", nargs="?", help="folder of a saved pipeline to look at as well")
    return parser


def _add_sampling_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command("sample", _sample, "Generate a grid of images.")
    sub.add_argument("model")
    sub.add_argument("--out", default="samples.png")
    _add_sampling_options(sub)
    _add_conditioning_options(sub)

    sub = command(
        "dataset", _dataset, "Sample a large set of images into a folder; goes on where it was interrupted."
    )
    sub.add_argument("model")
    sub.add_argument("--out", required=True, help="folder; processes of torchrun share it and the work")
    _add_sampling_options(sub, images=10_000, batch=64)
    _add_conditioning_options(sub)

    sub = command("distance", _distance, "Measure how far two sets of images are apart.")
    sub.add_argument("first", help="folder of `adpdm dataset`, or a file .npy of images [N, H, W, C] u8")
    sub.add_argument("second")
    sub.add_argument("--dimensions", type=int, default=32, help="principal components of the features")
    sub.add_argument(
        "--inception",
        metavar="FILE",
        help="inception-2015-12-05.pt (TorchScript), to measure FID and KID too",
    )

    for name, run, text in (
        ("evaluate", _evaluate, "Measure a quantized model against its original on the same seeds."),
        ("report", _report, "Evaluate and write a self-contained HTML report."),
    ):
        sub = command(name, run, text)
        sub.add_argument("original")
        sub.add_argument("quantized")
        if name == "report":
            sub.add_argument("--out", default="report.html")
        _add_sampling_options(sub)
        _add_conditioning_options(sub)


def _add_sampling_options(sub: argparse.ArgumentParser, images: int = 16, batch: int = 8) -> None:
    sub.add_argument("--images", type=int, default=images)
    sub.add_argument("--steps", type=int, default=50)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--batch", type=int, default=batch)


def _add_conditioning_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--prompt", action="append", help="text for the pipeline's encoder; several are taken in turn"
    )
    add_input_options(sub)
    sub.add_argument(
        "--guidance-scale", type=float, help="of classifier-free guidance, 1 is the condition alone"
    )


# ---- output ------------------------------------------------------------------------------------------------


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar per phase with an estimate of the time left, on standard error."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield update


def _warn(sentence: str) -> None:
    console.print(f"[yellow]warning:[/] {escape(sentence)}")


def _table(title: str, rows: dict[str, str]) -> None:
    table = Table(title=escape(title), show_header=False, title_justify="left")
    for label, text in rows.items():
        table.add_row(escape(label), escape(text))
    console.print(table)
