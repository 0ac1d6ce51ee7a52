"""Checks the machine code of the AMX kernel: tiles are set up and given back, its loops load and multiply.

    python tools/check_amx.py build/core/CMakeFiles/adpdm_core.dir/csrc/cpu/igemm_amx.cpp.o

Needs objdump of binutils. Exit status: 0 all is well, 1 with a list of faults, 77 objdump is missing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

from machine_code import SKIPPED, Instruction, disassemble, innermost_loops, stack_faults

WANTED = ("ldtilecfg", "tdpbssd", "tilerelease", "tilestored")
# In a loop: loads of both blocks of weights and both runs of codes, and the products of each with each.
WHOLE_LOOP = {"tileloadd": 4, "tdpbssd": 4}
# What a loop of products may hold besides: stepping through addresses.
SCALAR = re.compile(r"(add|sub|lea|mov|cmp|test|cmov\w*|j\w+|nop\w*|xchg|data16)[lqw]?$")


def loop_faults(loop: list[Instruction]) -> list[str]:
    """What does not belong into a loop of products."""
    at = f"loop at {loop[0].address:x}: "
    faults = [
        f"{at}wanted loads, products and steps only, found {i.opcode} {i.operands}"
        for i in loop
        if i.opcode not in WHOLE_LOOP and not SCALAR.match(i.opcode)
    ]
    return faults + stack_faults(loop)


def find_faults(code: list[Instruction]) -> list[str]:
    """Sentences on everything that is wrong."""
    opcodes = {i.opcode for i in code}
    faults = [f"wanted {opcode}, found none" for opcode in WANTED if opcode not in opcodes]
    loops = innermost_loops(code, "tdpbssd")
    for loop in loops:
        faults += loop_faults(loop)
    counts = [Counter(i.opcode for i in loop if i.opcode in WHOLE_LOOP) for loop in loops]
    if not any(count == WHOLE_LOOP for count in counts):
        faults.append(f"wanted a loop of {WHOLE_LOOP}, found {[dict(count) for count in counts]}")
    return faults


def main() -> int:
    """Run the checks on the object file of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("object", type=Path)
    path = parser.parse_args().object
    code = disassemble(path)
    if code is None:
        print("check_amx: skipped, wanted objdump, found none")
        return SKIPPED
    faults = find_faults(code)
    for fault in faults:
        print(f"check_amx: {fault}")
    if not faults:
        print(f"check_amx: {len(innermost_loops(code, 'tdpbssd'))} loops of products checked")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
