"""Checks the machine code of the AMX kernel: tiles are set up and given back, its loops load and multiply.

    python tools/check_amx.py build/core/CMakeFiles/adpdm_core.dir/csrc/cpu/igemm_amx.cpp.o

Needs objdump of binutils. Exit status: 0 all is well, 1 with a list of faults, 77 objdump is missing.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SKIPPED = 77
WANTED = ("ldtilecfg", "tdpbssd", "tilerelease", "tilestored")
# In a loop: loads of both blocks of weights and both runs of codes, and the products of each with each.
WHOLE_LOOP = {"tileloadd": 4, "tdpbssd": 4}
# What a loop of products may hold besides: stepping through addresses.
SCALAR = re.compile(r"(add|sub|lea|mov|cmp|test|cmov\w*|j\w+|nop\w*|xchg|data16)[lqw]?$")


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    opcode: str
    operands: str


def parse_objdump(text: str) -> list[Instruction]:
    """Instructions in the output of objdump -d --no-show-raw-insn, prefixes such as `cs` left out."""
    line = re.compile(
        r"^\s*([0-9a-f]+):\s+((?:(?:cs|ds|data16|bnd|notrack|rep|repz|lock)\s+)*)([a-z]\w*)\s*(.*)$"
    )
    found = (line.match(text_line) for text_line in text.splitlines())
    return [Instruction(int(m.group(1), 16), m.group(3), m.group(4).strip()) for m in found if m]


def product_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that multiply tiles: from the target of a jump backwards to the jump."""
    spans = []
    for jump in code:
        target = re.match(r"([0-9a-f]+)\b", jump.operands) if jump.opcode.startswith("j") else None
        if target is None or int(target.group(1), 16) >= jump.address:
            continue
        span = (int(target.group(1), 16), jump.address)
        if any(span[0] <= i.address <= span[1] and i.opcode == "tdpbssd" for i in code):
            spans.append(span)
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[i for i in code if first <= i.address <= last] for first, last in inner]


def loop_faults(loop: list[Instruction]) -> list[str]:
    """What does not belong into a loop of products."""
    at = f"loop at {loop[0].address:x}: "
    faults = [
        f"{at}wanted loads, products and steps only, found {i.opcode} {i.operands}"
        for i in loop
        if i.opcode not in WHOLE_LOOP and not SCALAR.match(i.opcode)
    ]
    return faults + [
        f"{at}wanted nothing on the stack, found {i.opcode} {i.operands}"
        for i in loop
        if "(%rsp" in i.operands
    ]


def find_faults(code: list[Instruction]) -> list[str]:
    """Sentences on everything that is wrong."""
    opcodes = {i.opcode for i in code}
    faults = [f"wanted {opcode}, found none" for opcode in WANTED if opcode not in opcodes]
    loops = product_loops(code)
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
    objdump = shutil.which("objdump")
    if objdump is None:
        print("check_amx: skipped, wanted objdump, found none")
        return SKIPPED
    command = [objdump, "-d", "--no-show-raw-insn", str(path)]
    code = parse_objdump(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    faults = find_faults(code)
    for fault in faults:
        print(f"check_amx: {fault}")
    if not faults:
        print(f"check_amx: {len(product_loops(code))} loops of products checked")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
