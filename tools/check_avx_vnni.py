"""Checks the machine code for AVX-VNNI: its instructions, 16 registers of 256 bits, sums that stay in them.

    python tools/check_avx_vnni.py build/core/CMakeFiles/adpdm_core.dir/csrc/cpu/*_avx_vnni*.cpp.o

Objects come in pairs, foo_avx_vnni.cpp.o and foo_avx_vnni_evex.cpp.o, whose instructions must be the same but
for the encoding of products: so what is tested of the second on a CPU with AVX-512 holds for the first.
Needs objdump of binutils. Exit status: 0 all is well, 1 with a list of faults, 77 objdump is missing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

from machine_code import SKIPPED, Instruction, disassemble, innermost_loops, stack_faults

PRODUCTS = ("vpdpbusd", "vpdpwssd")  # of bytes, of 16-bit numbers; an object has one of them
WHOLE_LOOP = 12  # products of a loop that keeps the 16 registers busy: 6 pixels, queries or tiles, 16 outputs
ONLY_AVX512 = re.compile(r"%zmm|%[xy]mm(1[6-9]|[23]\d)|%k[0-7]")


def without_places(code: list[Instruction]) -> list[tuple[str, str]]:
    """Opcodes and operands, without padding and without what depends on where an instruction stands."""

    def operands(i: Instruction) -> str:
        if re.match("j|call", i.opcode):
            return ""
        return re.sub(r"-?0x[0-9a-f]+\(%rip\)", "(%rip)", re.sub(r"\s+[#<].*", "", i.operands))

    return [(i.opcode, operands(i)) for i in code if not re.match(r"nop|xchg$", i.opcode)]


def find_faults(code: list[Instruction], encoding: str) -> list[str]:
    """Sentences on what is wrong with one object.

    Args:
        code: its instructions.
        encoding: of its products as objdump marks them; it does not mark that of AVX-512.
    """
    found = {i.opcode for i in code if i.opcode in PRODUCTS}
    if len(found) != 1:
        return [f"wanted one of {', '.join(PRODUCTS)}, found {' and '.join(sorted(found)) or 'neither'}"]
    (product,) = found
    faults = []
    for i in code:
        if i.opcode in PRODUCTS and i.encoding != encoding:
            faults.append(
                f"at {i.address:x}: wanted {i.opcode} as {encoding or 'evex'}, found the other encoding"
            )
        if ONLY_AVX512.search(i.operands):
            faults.append(f"at {i.address:x}: wanted registers of AVX2, found {i.opcode} {i.operands}")
    loops = innermost_loops(code, product)
    faults += [fault for loop in loops for fault in stack_faults(loop)]
    counts = [Counter(i.opcode for i in loop)[product] for loop in loops]
    if WHOLE_LOOP not in counts:
        faults.append(f"wanted a loop of {WHOLE_LOOP} {product}, found {counts}")
    return faults


def compare(vex: list[Instruction], evex: list[Instruction]) -> list[str]:
    """A sentence on the first instruction that two objects do not share; none where they share all."""
    first, second = without_places(vex), without_places(evex)
    if first == second:
        return []
    place = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if place is None:
        return [f"wanted equal code in both encodings, found {len(first)} and {len(second)} instructions"]
    a, b = " ".join(first[place]), " ".join(second[place])
    return [f"wanted equal code in both encodings, found {a} and {b}"]


def main() -> int:
    """Run the checks on the object files of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("objects", type=Path, nargs="+")
    objects = {path.name: path for path in parser.parse_args().objects}
    checked, faults = 0, []
    for name, path in objects.items():
        if "_evex" in name:
            continue
        twin = objects[name.replace("_avx_vnni", "_avx_vnni_evex")]
        vex, evex = disassemble(path), disassemble(twin)
        if vex is None or evex is None:
            print("check_avx_vnni: skipped, wanted objdump, found none")
            return SKIPPED
        faults += [f"{name}: {fault}" for fault in find_faults(vex, "vex") + compare(vex, evex)]
        faults += [f"{twin.name}: {fault}" for fault in find_faults(evex, "")]
        checked += 1
    if checked == 0:
        faults.append("wanted objects named *_avx_vnni.cpp.o, found none")
    for fault in faults:
        print(f"check_avx_vnni: {fault}")
    if not faults:
        print(f"check_avx_vnni: {checked} pairs of objects checked")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
