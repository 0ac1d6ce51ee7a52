"""Checks the machine code of the CUDA kernels: the instructions promised are there, spills and traps are not.

    python tools/check_sass.py build/core/libadpdm_cuda.a --archs 80-real,90a-real,80-virtual

Needs cuobjdump and nvdisasm, from the CUDA toolkit on PATH or from PyPI (nvidia-cuda-cuobjdump,
nvidia-cuda-nvdisasm). Exit status: 0 all is well, 1 with a table of faults, 77 the tools are missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import site
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

SKIPPED = 77


@dataclass
class Kernel:
    """One kernel of one architecture."""

    name: str  # demangled
    arch: str  # sm_80, sm_90a
    opcodes: Counter[str] = field(default_factory=Counter)  # with modifiers: IMMA.16832.S8.S8
    registers: int | None = None  # per thread
    stack: int | None = None  # bytes per thread


@dataclass(frozen=True)
class Rule:
    """What holds for kernels with a name like this; each of its architectures must have at least one."""

    kernels: str  # pattern of names
    archs: tuple[str, ...] = ("sm_80", "sm_90a")
    wanted: tuple[str, ...] = ()  # patterns of opcodes, each of which must occur
    refused: tuple[str, ...] = ()  # patterns of opcodes, none of which may occur
    limited: tuple[tuple[str, int], ...] = ()  # patterns of opcodes, and how many may occur
    max_registers: int = 255  # per thread: 65536 / (threads of a block * blocks that share a multiprocessor)


# cp.async of 16 bytes, vectors, ldmatrix, the matrix products and their barriers.
COPY_ASYNC = r"LDGSTS\.E\.BYPASS(\.LTC128B)?\.128"
LOAD_64 = r"LDG\.E\.64"
LOAD_128 = r"LDG\.E\.128"
STORE_128 = r"STG\.E\.128"
LOAD_MATRIX = r"LDSM\.16\.M88\.4"
DOT_4 = r"IDP\.4A\.S8\.S8"
PERMUTE = r"PRMT"
MMA = r"IMMA\."
MMA_S8 = r"IMMA\.16832\.S8\.S8"
MMA_S4 = r"IMMA\.16864\.S4\.S4"
WGMMA_S8 = r"IGMMA\.64x\d+x32\.S8\.S8"
WGMMA_FENCE = r"WARPGROUP\.ARRIVE"
WGMMA_WAIT = r"WARPGROUP\.DEPBAR"
PROXY_FENCE = r"FENCE\.VIEW\.ASYNC"
VECTORS = (LOAD_128, STORE_128)
SPILLS = (r"LDL\b", r"STL\b")
# What ptxas calls instead of mma.m16n8k64 from sm_90 on.
S4_HELPER = re.compile(r"mma_sub_byte")

ELEMENTWISE_RULES = (
    Rule(r"\b(fake_)?quantize(_int4|_channels_last)?_kernel<", wanted=VECTORS, max_registers=64),
    Rule(r"\bmixture(_grad_x)?_kernel<", wanted=VECTORS, max_registers=64),
    # Codes are read 4 or 8 at a time, which is 16 bytes of values.
    Rule(r"\bdequantize(_int4)?_kernel<", wanted=(STORE_128,), max_registers=64),
    Rule(r"\b(un)?pack_int4_kernel\b", wanted=VECTORS, max_registers=64),
    Rule(r"\bobserve_kernel<", wanted=(LOAD_128,), max_registers=64),
    # A block in registers; a thread reads one channel of 64 of them, neighbours the next.
    Rule(r"\bhadamard(_quantize)?_kernel<", max_registers=128),
    Rule(r"\b(group|layer)_norm_rotate_kernel<", max_registers=128),
    Rule(r"\bchunk_sums_kernel<", max_registers=128),
    # With 1 as the last argument they read elements, where there are no vectors.
    Rule(r"\bgroup_norm_(sums|apply)_kernel<.*\D[48]>", wanted=(LOAD_128,), max_registers=128),
    Rule(r"\blayer_norm_kernel<.*\D[48]>", wanted=(LOAD_128,), max_registers=128),
)

# MmaConfig<mode, tile rows, tile outputs, warp rows, gather>.
A8W8, A8W4, A4W4, A4W4_UNPACKED = (rf"igemm_mma<.*IgemmMode\){mode}, " for mode in range(4))
MMA_KERNEL = (*VECTORS, COPY_ASYNC, LOAD_MATRIX)

IGEMM_RULES = (
    Rule(A8W8, wanted=(*MMA_KERNEL, MMA_S8), refused=(MMA_S4,)),
    Rule(A8W4, wanted=(*MMA_KERNEL, MMA_S8), refused=(MMA_S4,)),
    Rule(A4W4, ("sm_80",), wanted=(*MMA_KERNEL, MMA_S4), refused=(MMA_S8,)),
    Rule(A4W4, ("sm_90a",), refused=(MMA,)),  # the planner never takes it there
    Rule(A4W4_UNPACKED, wanted=(*MMA_KERNEL, MMA_S8), refused=(MMA_S4,)),
    Rule(r"igemm_mma<.*, 64, 64, 32, ", max_registers=168),
    # One fence, and waits in the loop and behind it: more, and ptxas has serialized the products (C7510).
    Rule(
        r"igemm_wgmma<",
        ("sm_90a",),
        wanted=(*VECTORS, COPY_ASYNC, WGMMA_S8, PROXY_FENCE),
        refused=(MMA,),
        limited=((WGMMA_FENCE, 1), (WGMMA_WAIT, 2)),
    ),
    Rule(r"igemm_finish\(", wanted=VECTORS),
    # Bits of the weights, form: bytes, vectors, 3x3, of which 3 blocks of 128 threads share a multiprocessor.
    Rule(r"depthwise_kernel<", wanted=(*VECTORS, DOT_4, PERMUTE), refused=(MMA,)),
    Rule(r"depthwise_kernel<.*Form\)1>", wanted=(LOAD_64,)),
    Rule(r"depthwise_kernel<.*Form\)2>", wanted=(LOAD_64,), max_registers=168),
    Rule(r"pack_weight_chunks\(", wanted=(STORE_128,)),
)

RULES = (*ELEMENTWISE_RULES, *IGEMM_RULES)


# ---- reading what cuobjdump prints ----


def parse_sass(text: str) -> list[Kernel]:
    """Kernels in the output of cuobjdump -sass."""
    kernels: list[Kernel] = []
    arch = ""
    instruction = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("code for "):
            arch = line.split()[-1]
        elif line.startswith("Function : "):
            kernels.append(Kernel(line.removeprefix("Function : "), arch))
        elif found := instruction.match(line):
            kernels[-1].opcodes[found.group(1)] += 1
    return kernels


def parse_usage(text: str) -> dict[tuple[str, str], tuple[int, int]]:
    """Registers and bytes of stack by (architecture, mangled name), from cuobjdump -res-usage."""
    usage = {}
    arch = name = ""
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("arch = "):
            arch = line.split()[-1]
        elif line.startswith("Function "):
            name = line.removeprefix("Function ").rstrip(":")
        elif found := re.match(r"REG:(\d+) STACK:(\d+)", line):
            usage[arch, name] = (int(found.group(1)), int(found.group(2)))
    return usage


def parse_helpers(text: str) -> list[tuple[str, str]]:
    """(architecture, name) of the routines that ptxas has added, from cuobjdump -symbols."""
    helpers = []
    arch = ""
    for line in text.splitlines():
        if line.startswith("arch = "):
            arch = line.split()[-1]
        elif found := re.search(r"\$__internal_\d+_\$(\S+)", line):
            helpers.append((arch, found.group(1)))
    return helpers


# ---- judging it ----


def count(kernel: Kernel, pattern: str) -> int:
    """Instructions of the kernel whose opcode begins with the pattern."""
    return sum(number for opcode, number in kernel.opcodes.items() if re.match(pattern, opcode))


def kernel_faults(kernel: Kernel, rule: Rule) -> list[str]:
    """What is wrong with a kernel that the rule is about."""
    faults = [f"wanted {pattern}, found none" for pattern in rule.wanted if count(kernel, pattern) == 0]
    faults += [
        f"wanted no {pattern}, found {number}"
        for pattern in rule.refused
        if (number := count(kernel, pattern)) > 0
    ]
    faults += [
        f"wanted at most {most} of {pattern}, found {number}"
        for pattern, most in rule.limited
        if (number := count(kernel, pattern)) > most
    ]
    if kernel.registers is None:
        faults.append("its registers are not listed")
    elif kernel.registers > rule.max_registers:
        faults.append(f"wanted at most {rule.max_registers} registers, got {kernel.registers}")
    return faults


def machine_archs(configured: str) -> set[str]:
    """Architectures, as sm_80, of which ADPDM_CUDA_ARCHS with commas asks machine code."""
    return {
        f"sm_{arch.removesuffix('-real')}" for arch in configured.split(",") if not arch.endswith("-virtual")
    }


def arch_faults(archs: set[str], rules: Iterable[Rule], configured: set[str]) -> list[tuple[str, str, str]]:
    """What leaves an architecture unchecked: it is not in the library, or no rule is about it."""
    ruled = {arch for rule in rules for arch in rule.archs}
    faults = [(arch, "", "wanted kernels, as it is configured, found none") for arch in configured - archs]
    return faults + [(arch, "", "no rule is about this architecture") for arch in archs - ruled]


def find_faults(
    kernels: list[Kernel], helpers: Iterable[tuple[str, str]], rules: Sequence[Rule], configured: set[str]
) -> list[tuple[str, str, str]]:
    """(architecture, kernel, sentence) of everything that is wrong."""
    archs = {kernel.arch for kernel in kernels}
    faults = arch_faults(archs, rules, configured)
    faults += [
        (arch, name, "is called instead of an instruction: s4 products are not native here")
        for arch, name in helpers
        if S4_HELPER.search(name)
    ]
    if not kernels:
        faults.append(("", "", "wanted kernels, found none"))
    for kernel in kernels:
        everywhere = Rule(kernels="", refused=SPILLS)
        faults += [(kernel.arch, kernel.name, fault) for fault in kernel_faults(kernel, everywhere)]
        if kernel.stack:
            faults.append((kernel.arch, kernel.name, f"wanted no stack, got {kernel.stack} bytes"))
    for rule in rules:
        for arch in archs.intersection(rule.archs):
            found = [k for k in kernels if k.arch == arch and re.search(rule.kernels, k.name)]
            if not found:
                faults.append((arch, rule.kernels, "no kernel has a name like this"))
            faults += [(arch, k.name, fault) for k in found for fault in kernel_faults(k, rule)]
    return sorted(set(faults))


def table(faults: list[tuple[str, str, str]]) -> str:
    """One line per fault, in columns."""
    widths = [max(len(fault[column]) for fault in faults) for column in range(2)]
    return "\n".join(f"{arch:{widths[0]}}  {name:{widths[1]}}  {fault}" for arch, name, fault in faults)


# ---- the tools ----


def find_tools() -> dict[str, str] | None:
    """The environment in which cuobjdump finds nvdisasm; None where one of them is missing."""
    # The wheels put them beside the site packages of NVIDIA, not on PATH.
    folders = [str(path) for root in site.getsitepackages() for path in Path(root).glob("nvidia/*/bin")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    if not all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm")):
        return None
    return {**os.environ, "PATH": path}


def output_of(command: list[str], environment: dict[str, str], stdin: str | None = None) -> str:
    """What a command prints; it must not fail."""
    command[0] = shutil.which(command[0], path=environment["PATH"]) or command[0]
    done = subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def read_library(library: str, environment: dict[str, str]) -> tuple[list[Kernel], list[tuple[str, str]]]:
    """The kernels of a library or object file and the helpers of ptxas in it."""
    usage_text = output_of(["cuobjdump", "-res-usage", library], environment)
    archs = sorted(set(re.findall(r"^arch = (\S+)", usage_text, re.MULTILINE)))
    # Nearly all the time goes into this: a process per architecture.
    with ThreadPoolExecutor() as pool:
        texts = pool.map(
            lambda arch: output_of(["cuobjdump", "-sass", "-arch", arch, library], environment), archs
        )
        kernels = [kernel for text in texts for kernel in parse_sass(text)]
    usage = parse_usage(usage_text)
    names = "\n".join(kernel.name for kernel in kernels)
    for kernel, name in zip(kernels, output_of(["c++filt"], environment, names).splitlines(), strict=True):
        kernel.registers, kernel.stack = usage.get((kernel.arch, kernel.name), (None, None))
        kernel.name = name
    return kernels, parse_helpers(output_of(["cuobjdump", "-symbols", library], environment))


def main() -> int:
    """Check one library."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", help="libadpdm_cuda.a or an object file")
    parser.add_argument("--archs", required=True, help="ADPDM_CUDA_ARCHS of its build, with commas")
    args = parser.parse_args()
    environment = find_tools()
    if environment is None:
        print("check_sass: wanted cuobjdump and nvdisasm on PATH or from PyPI, found none: run")
        print("`pip install -c constraints.txt nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`")
        return SKIPPED
    kernels, helpers = read_library(args.library, environment)
    faults = find_faults(kernels, helpers, RULES, machine_archs(args.archs))
    if faults:
        print(table(faults))
    archs = ", ".join(sorted({kernel.arch for kernel in kernels}))
    print(f"check_sass: {len(kernels)} kernels for {archs}, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
