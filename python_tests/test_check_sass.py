"""Tests of tools/check_sass.py on machine code written by hand: it must find every kind of fault."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load_tool() -> ModuleType:
    """tools/ is no package."""
    path = ROOT / "tools" / "check_sass.py"
    spec = importlib.util.spec_from_file_location("check_sass", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_sass"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check_sass = load_tool()

SASS = """
Fatbin elf code:
================
arch = sm_80
	code for sm_80
		Function : _Z5igemmv
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                            /* 0x00000a0000017a02 */
                                                                                     /* 0x000fe40000000f00 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R12], [R2.64] ;              /* 0x00000000020c7fae */
        /*0020*/                   IMMA.16832.S8.S8 R8, R12.ROW, R6.COL, R8 ;        /* 0x000000060c087237 */
        /*0030*/              @UP1 STG.E.128 [R2.64], R8 ;                           /* 0x0000000802007986 */
        /*0040*/                   EXIT ;                                            /* 0x000000000000794d */
"""
USAGE = """
arch = sm_80
Resource usage:
 Common:
  GLOBAL:0
 Function _Z5igemmv:
  REG:142 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SYMBOLS = """
arch = sm_90a
FUNC          WEAK    DEFAULT    -      $__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath
FUNC          GLOBAL  DEFAULT    ENTRY  _Z5igemmv
"""
RULE = check_sass.Rule(
    "igemm",
    wanted=(check_sass.MMA_S8, check_sass.COPY_ASYNC, check_sass.STORE_128),
    refused=(check_sass.MMA_S4,),
    limited=((check_sass.STORE_128, 1),),
    max_registers=168,
)


def faults(
    sass: str = SASS, usage: str = USAGE, symbols: str = SYMBOLS, configured: set[str] | None = None
) -> list[str]:
    """The sentences about a library of one kernel."""
    kernels = check_sass.parse_sass(sass)
    listed = check_sass.parse_usage(usage)
    for kernel in kernels:
        kernel.registers, kernel.stack = listed.get((kernel.arch, kernel.name), (None, None))
    found = check_sass.find_faults(
        kernels, check_sass.parse_helpers(symbols), [RULE], configured or {"sm_80"}
    )
    return [sentence for _, _, sentence in found]


def test_a_sound_kernel_has_no_faults() -> None:
    assert faults() == []


def test_opcodes_are_counted_with_and_without_predicates() -> None:
    (kernel,) = check_sass.parse_sass(SASS)
    assert kernel.arch == "sm_80"
    assert kernel.opcodes == {
        "MOV": 1,
        "LDGSTS.E.BYPASS.128": 1,
        "IMMA.16832.S8.S8": 1,
        "STG.E.128": 1,
        "EXIT": 1,
    }


def replaced(old: str, new: str) -> Callable[[], list[str]]:
    """Faults after a change of the machine code."""
    assert old in SASS
    return lambda: faults(sass=SASS.replace(old, new))


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (replaced("MOV R1", "LDL R1"), r"wanted no LDL\b, found 1"),
        (replaced("MOV R1", "STL.64 R1"), r"wanted no STL\b, found 1"),
        (replaced("IMMA.16832.S8.S8", "IMAD"), r"wanted IMMA\.16832\.S8\.S8, found none"),
        (replaced("MOV R1", "IMMA.16864.S4.S4 R1"), r"wanted no IMMA\.16864\.S4\.S4, found 1"),
        (replaced("MOV R1", "STG.E.128 [R1]"), r"wanted at most 1 of STG\.E\.128, found 2"),
        (replaced("STG.E.128", "STG.E.64"), r"wanted STG\.E\.128, found none"),
        (replaced("BYPASS.128", "64"), r"wanted LDGSTS\.E\.BYPASS(\.LTC128B)?\.128, found none"),
        (replaced("_Z5igemmv", "_Z5othermv"), "no kernel has a name like this"),
        (lambda: faults(sass=""), "wanted kernels, found none"),
        (
            lambda: faults(sass=SASS.replace("sm_80", "sm_89"), configured={"sm_89"}),
            "no rule is about this architecture",
        ),
        (
            lambda: faults(configured={"sm_80", "sm_90a"}),
            "wanted kernels, as it is configured, found none",
        ),
        (lambda: faults(usage=USAGE.replace("REG:142", "REG:169")), "wanted at most 168 registers, got 169"),
        (lambda: faults(usage=USAGE.replace("STACK:0", "STACK:8")), "wanted no stack, got 8 bytes"),
        (lambda: faults(usage=USAGE.replace("sm_80", "sm_90a")), "its registers are not listed"),
        (
            lambda: faults(symbols=SYMBOLS.replace("sm3x_div_rn", "sm_9x_mma_sub_byte_internal_m16n8k64")),
            "is called instead of an instruction: s4 products are not native here",
        ),
    ],
)
def test_fault_is_found(run: Callable[[], list[str]], sentence: str) -> None:
    assert sentence in run()


def test_machine_code_is_wanted_of_all_but_virtual_architectures() -> None:
    assert check_sass.machine_archs("80-real,90a-real,80-virtual") == {"sm_80", "sm_90a"}
    assert check_sass.machine_archs("86,90-virtual") == {"sm_86"}


def test_default_build_leaves_no_architecture_unchecked() -> None:
    found = re.search(r'set\(ADPDM_CUDA_ARCHS "([^"]+)" CACHE', (ROOT / "CMakeLists.txt").read_text())
    assert found is not None
    configured = check_sass.machine_archs(found.group(1).replace(";", ","))
    assert check_sass.arch_faults(configured, check_sass.RULES, configured) == []


def test_table_names_architecture_and_kernel() -> None:
    assert check_sass.table([("sm_80", "igemm", "is wrong"), ("sm_90a", "gn", "too")]) == (
        "sm_80   igemm  is wrong\nsm_90a  gn     too"
    )
