"""The stages of `make gpu`: what is run, how long it may take, what it needs. gpu_run.py runs them."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / "build" / "gpu"
GOOGLETEST = STATE / "googletest"  # its sources, where the machine has no package of it
PREBUILT = STATE / "prebuilt"  # both programs, where they were built elsewhere
GPU_PROGRAMS = ("adpdm_gpu_tests", "adpdm_gpu_peaks")
INCLUDES = tuple(Path(prefix, "include") for prefix in ("/usr", "/usr/local", sys.prefix))
BUILD = "build/core"  # in which setup.py builds as well: CUDA is compiled once


@dataclass(frozen=True)
class Stage:
    """One part of the run.

    Args:
        commands: run in order from the root; the first that fails ends the stage, unless they run `together`.
        estimate: seconds on an H100 with 16 cores; a stage that no longer fits is left for the next call.
        needs: stages that must have passed.
        result: JSON file, relative to the state folder, that the commands write; kept if they fail later on.
        limit: seconds after which it is stopped: a kernel that hangs must not take the time of all others.
        together: start all commands at once, and wait for all.
        beside: run beside the stages after it, until one of them needs it.
    """

    commands: tuple[tuple[str, ...], ...]
    estimate: float
    needs: tuple[str, ...] = ()
    result: str | None = None
    limit: float = math.inf
    together: bool = False
    beside: bool = False


# Tests that launch kernels of every kind, for compute-sanitizer, under which all would take too long.
SANITIZED = (
    "CudaConv2d.MatchesDefinitionForEveryModeAndTile",
    "CudaConv2d.GathersChannelsThatAreNoWholeChunks",
    "CudaConv2d.SplitReductionsGiveTheSameBits",
    "CudaConv2dWgmma.MatchesDefinitionOnEverySchedule",
    "CudaConv2dWgmma.ReductionMayBeShorterThanThePipeline",
    "CudaConv2dWgmma.SplitsTwoSegments",
    "CudaDepthwise.MatchesDefinitionForEveryNumberOfChannels",
    "CudaDepthwise.MatchesDefinitionForOddGeometry",
    "CudaLinear.TwoSegmentsAndSplitReductions",
    "CudaIgemmEpilogue.UnalignedOperandsGoOneByOne",
    "CudaGroupNormQuantize.ConstantsGiveTheBias",
    "CudaLayerNormQuantize.LargeMeansDoNotCancel",
    "CudaQuantize.ExtremeZeroPointsAndScales",
    "CudaQuantizeChannelsLast.CodesAreThoseOfTheCpuTransposed",
    "CudaPackInt4.BytesAndCodesEqualTheCpus",
    "CudaFakeQuantizeBackward.SumsAreAddedInTheOrderOfTheCpu",
    "CudaFakeQuantizeMixtureBackward.GradientsEqualTheCpusBitForBit",
    "CudaObserve.BlocksTakeSeveralShares",
    "CudaHadamard.BitsOfAllShapesEqualTheCpus",
    "CudaPackWeight.GroupsFollowOneAnother",
)

# Files with tests that launch kernels; all of python_tests would be collected for minutes.
PYTHON_TESTS = (
    "python_tests/test_build.py",
    "python_tests/test_graph.py",
    "python_tests/test_ops_fake_quantize.py",
    "python_tests/test_ops_hadamard.py",
    "python_tests/test_ops_observe.py",
    "python_tests/test_ops_on_cuda.py",
    "python_tests/test_ops_quantize.py",
)


def prebuilt_programs() -> tuple[Path, ...]:
    """Where programs that were built elsewhere would lie."""
    return tuple(PREBUILT / name for name in GPU_PROGRAMS)


def is_prebuilt() -> bool:
    """Whether both programs were built elsewhere; one alone does not spare the build."""
    return all(path.is_file() for path in prebuilt_programs())


def has_googletest() -> bool:
    """Whether googletest is there, as sources or as a package."""
    return GOOGLETEST.is_dir() or any((folder / "gtest" / "gtest.h").is_file() for folder in INCLUDES)


def make_stages(python: str, arch: str, jobs: int) -> dict[str, Stage]:
    """All stages in order, for a card of compute capability `arch`, e.g. "90a".

    They need nothing but what was built: what a failing test leaves in doubt is still worth measuring.
    Programs of the tests and the package are apart, so that a package that does not import stops no program.
    """
    programs = str(PREBUILT) if is_prebuilt() else BUILD
    programs_need = () if is_prebuilt() else ("build",) if has_googletest() else ("googletest",)
    return {
        "build": _build(python, arch, jobs),
        **_tests(python, f"{programs}/adpdm_gpu_tests", programs_need),
        "peaks": _measure(
            python, 15, 60, "peaks", "gpu_peaks.py", f"{programs}/adpdm_gpu_peaks", needs=programs_need
        ),
        "kernels": _measure(python, 45, 120, "kernels", "bench_gpu_kernels.py"),
        "unets": _measure(
            python,
            60,
            180,
            "unets",
            "bench_gpu_unets.py",
            *("--models", "sdxl", "sd15", "cifar10", "dit", "--batch", "2"),
        ),
        "sweep": _measure(python, 60, 180, "sweep", "sweep_tiles.py"),
    }


def _build(python: str, arch: str, jobs: int) -> Stage:
    extension_only = is_prebuilt() or not has_googletest()
    configure = (
        *(
            "cmake",
            "-G",
            "Ninja",
            "-S",
            ".",
            "-B",
            BUILD,
            "-DADPDM_CUDA=1",
            f"-DADPDM_CUDA_ARCHS={arch}-real",
        ),
        "-DADPDM_WERROR=0",  # as the environment tells setup.py: other flags would compile all a second time
        f"-DADPDM_TESTS={'OFF' if extension_only else 'ON'}",  # which want googletest; the extension does not
        *([f"-DADPDM_GOOGLETEST={GOOGLETEST}"] if GOOGLETEST.is_dir() else []),
    )
    beside = ("nice",) if extension_only else ()  # tests with time limits run meanwhile
    targets = () if extension_only else GPU_PROGRAMS
    return Stage(
        (
            configure,
            (*beside, "cmake", "--build", BUILD, "-j", str(jobs), "--target", "adpdm_libraries", *targets),
            (*beside, python, "setup.py", "-q", "build_ext", "--inplace"),
        ),
        estimate=90,
        limit=240,
        beside=extension_only,
    )


def _tests(python: str, program: str, needs: tuple[str, ...]) -> dict[str, Stage]:
    def sanitizer(tool: str) -> tuple[str, ...]:
        chosen = f"--gtest_filter={':'.join(SANITIZED)}"
        return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", program, chosen)

    # initcheck would find nothing: the tests fill all memory before a kernel sees it.
    sanitizers = (sanitizer("memcheck"), sanitizer("racecheck"), sanitizer("synccheck"))
    suites = (python, "tools/gpu_cpp_tests.py", program, "--json", "build/gpu/cpp.json")
    pytest = (python, "-m", "pytest", "-q", "-n", "4", "--dist", "loadfile", "--tb=short")
    chosen = ("--continue-on-collection-errors", "-k", "cuda or every_operator_has_a_kernel")
    return {
        "test-cpp": Stage((suites,), 25, needs, "cpp.json", limit=120),
        "sanitize": Stage(sanitizers, 45, needs, limit=120, together=True),
        "import": Stage(((python, "-c", "import adpdm"),), 10, ("build",), limit=60),
        "test-python": Stage(((*pytest, *chosen, *PYTHON_TESTS),), 60, ("import",), limit=100),
    }


def _measure(
    python: str,
    estimate: float,
    limit: float,
    name: str,
    script: str,
    *options: str,
    needs: tuple[str, ...] = ("import",),
) -> Stage:
    command = (python, "-u", f"benchmarks/{script}", *options, "--json", f"build/gpu/{name}.json")
    return Stage((command,), estimate, needs, f"{name}.json", limit)
