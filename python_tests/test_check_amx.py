"""Tests of tools/check_amx.py on machine code written by hand: it must find every kind of fault."""

from __future__ import annotations

import check_amx
import pytest
from machine_code import innermost_loops, parse_objdump

GOOD = """
0000000000000000 <multiply>:
   0:\tldtilecfg 0x40(%rsp)
   9:\ttilezero %tmm0
  10:\ttileloadd (%r9,%rdi,1),%tmm6
  16:\ttileloadd (%rbp,%r12,1),%tmm4
  1c:\ttdpbssd %tmm6,%tmm4,%tmm0
  21:\ttileloadd (%r11,%rdi,1),%tmm7
  27:\ttdpbssd %tmm7,%tmm4,%tmm1
  2c:\ttileloadd (%rdx,%r12,1),%tmm5
  32:\ttdpbssd %tmm6,%tmm5,%tmm2
  37:\ttdpbssd %tmm7,%tmm5,%tmm3
  3c:\tadd    $0x40,%rax
  40:\tcmovle %r10,%rax
  44:\tcs nopw 0x0(%rax,%rax,1)
  4d:\tjne    10 <multiply+0x10>
  4f:\tmov    0x8(%rsp),%rcx
  54:\tjne    9 <multiply+0x9>
  5a:\ttilestored %tmm0,(%rsi,%rax,1)
  60:\ttilerelease
  65:\tret
"""


def faults_of(text: str) -> list[str]:
    return check_amx.find_faults(parse_objdump(text))


def test_good_code_has_no_faults() -> None:
    assert faults_of(GOOD) == []


def test_only_the_innermost_loop_is_taken() -> None:
    (loop,) = innermost_loops(parse_objdump(GOOD), "tdpbssd")
    assert (loop[0].address, loop[-1].address) == (0x10, 0x4D)


@pytest.mark.parametrize("opcode", ["ldtilecfg", "tilerelease", "tilestored"])
def test_a_missing_instruction_is_found(opcode: str) -> None:
    assert faults_of(GOOD.replace(opcode, "nop")) == [f"wanted {opcode}, found none"]


@pytest.mark.parametrize(
    ("instruction", "fault"),
    [
        ("tilestored %tmm0,(%rsi,%rax,1)", "wanted loads, products and steps only, found tilestored"),
        ("vpxor  %zmm0,%zmm0,%zmm0", "wanted loads, products and steps only, found vpxor"),
        ("call   70 <copy_tap>", "wanted loads, products and steps only, found call"),
        ("mov    0x8(%rsp),%rcx", "wanted nothing on the stack, found mov"),
    ],
)
def test_what_does_not_belong_into_the_loop_is_found(instruction: str, fault: str) -> None:
    (found,) = faults_of(GOOD.replace("add    $0x40,%rax", instruction))
    assert found.startswith(f"loop at 10: {fault}")


def test_a_loop_that_is_not_whole_is_found() -> None:
    (found,) = faults_of(GOOD.replace("tdpbssd %tmm7,%tmm5,%tmm3", "nop"))
    assert found.startswith("wanted a loop of {'tileloadd': 4, 'tdpbssd': 4}, found")


def test_code_without_products_is_found() -> None:
    assert "wanted tdpbssd, found none" in faults_of("   0:\tret\n")
