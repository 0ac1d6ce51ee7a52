"""Tests of tools/check_avx_vnni.py on machine code written by hand: it must find every kind of fault."""

from __future__ import annotations

import check_avx_vnni
import pytest
from machine_code import parse_objdump

PRODUCTS = [f"{{vex}} vpdpbusd %ymm13,%ymm15,%ymm{sums}" for sums in range(12)]
START = ["vpxor  %xmm0,%xmm0,%xmm0", "nopw   0x0(%rax,%rax,1)"]
END = ["add    $0x4,%rdx", "cmp    %rcx,%rdx", "jl     2 <f+0x2>", "lea    -0x16(%rip),%rax", "ret"]


def text_of(lines: list[str]) -> str:
    return "\n".join(f"   {address:x}:\t{line}" for address, line in enumerate(lines))


GOOD = text_of(START + PRODUCTS + END)
# Longer instructions: other padding, other distances.
EVEX = text_of([START[0], "nop", *START[1:], *PRODUCTS, *END])
EVEX = EVEX.replace("{vex} ", "").replace("jl     2 <f+0x2>", "jl     3 <f+0x3>").replace("-0x16", "-0x1a")


def faults_of(text: str, encoding: str = "vex") -> list[str]:
    return check_avx_vnni.find_faults(parse_objdump(text), encoding)


def differences(vex: str, evex: str) -> list[str]:
    return check_avx_vnni.compare(parse_objdump(vex), parse_objdump(evex))


def test_good_code_has_no_faults() -> None:
    assert faults_of(GOOD) == []
    assert faults_of(EVEX, "") == []
    assert differences(GOOD, EVEX) == []


def test_products_of_pairs_are_products() -> None:
    assert faults_of(GOOD.replace("vpdpbusd", "vpdpwssd")) == []
    faults = faults_of(EVEX.replace("vpdpbusd", "vpdpwssd"))
    assert faults[0].endswith("wanted vpdpwssd as vex, found the other encoding")


@pytest.mark.parametrize(("text", "encoding", "wanted"), [(EVEX, "vex", "vex"), (GOOD, "", "evex")])
def test_the_other_encoding_is_found(text: str, encoding: str, wanted: str) -> None:
    faults = faults_of(text, encoding)
    assert len(faults) == 12
    assert faults[0].endswith(f"wanted vpdpbusd as {wanted}, found the other encoding")


@pytest.mark.parametrize(
    "instruction",
    ["vmovdqu64 (%rsi),%zmm1", "vpaddd %ymm16,%ymm1,%ymm1", "vpxord %xmm20,%xmm1,%xmm1", "kmovw %eax,%k1"],
)
def test_registers_of_avx512_are_found(instruction: str) -> None:
    (fault,) = faults_of(GOOD.replace(START[0], instruction))
    assert fault == f"at 0: wanted registers of AVX2, found {instruction}"


def test_sums_on_the_stack_are_found() -> None:
    (fault,) = faults_of(GOOD.replace("add    $0x4,%rdx", "vmovdqa %ymm5,0x28(%rsp)"))
    assert fault == "loop at 2: wanted nothing on the stack, found vmovdqa %ymm5,0x28(%rsp)"


def test_a_loop_that_is_not_whole_is_found() -> None:
    assert faults_of(GOOD.replace(PRODUCTS[7], "nop")) == ["wanted a loop of 12 vpdpbusd, found [11]"]


def test_code_without_products_is_found() -> None:
    assert faults_of("   0:\tret\n") == ["wanted one of vpdpbusd, vpdpwssd, found neither"]
    mixed = GOOD.replace("ymm3\n", "ymm3\n   99:\t{vex} vpdpwssd %ymm13,%ymm15,%ymm3\n", 1)
    assert faults_of(mixed) == ["wanted one of vpdpbusd, vpdpwssd, found vpdpbusd and vpdpwssd"]


def test_other_instructions_in_the_other_encoding_are_found() -> None:
    (other,) = differences(GOOD, EVEX.replace("$0x4,%rdx", "$0x8,%rdx"))
    assert other == "wanted equal code in both encodings, found add $0x4,%rdx and add $0x8,%rdx"
    (shorter,) = differences(GOOD, EVEX.replace("ret", "nop"))
    assert shorter == "wanted equal code in both encodings, found 18 and 17 instructions"
