"""Disassembled object files, for checks of what the compiler made of a kernel; needs objdump of binutils."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SKIPPED = 77  # exit status of a check without objdump


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    opcode: str
    operands: str
    encoding: str = ""  # vex, where objdump says so


def parse_objdump(text: str) -> list[Instruction]:
    """Instructions in the output of objdump -d --no-show-raw-insn, prefixes such as `cs` left out."""
    prefixes = r"(?:(?:cs|ds|data16|bnd|notrack|rep|repz|lock)\s+)*"
    line = re.compile(rf"^\s*([0-9a-f]+):\s+(?:\{{(\w+)\}}\s+)?{prefixes}([a-z]\w*)\s*(.*)$")
    found = (line.match(text_line) for text_line in text.splitlines())
    return [
        Instruction(int(m.group(1), 16), m.group(3), m.group(4).strip(), m.group(2) or "") for m in found if m
    ]


def innermost_loops(code: list[Instruction], opcode: str) -> list[list[Instruction]]:
    """The innermost loops with that instruction: from the target of a jump backwards to the jump."""
    spans = []
    for jump in code:
        target = re.match(r"([0-9a-f]+)\b", jump.operands) if jump.opcode.startswith("j") else None
        if target is None or int(target.group(1), 16) >= jump.address:
            continue
        span = (int(target.group(1), 16), jump.address)
        if any(span[0] <= i.address <= span[1] and i.opcode == opcode for i in code):
            spans.append(span)
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[i for i in code if first <= i.address <= last] for first, last in inner]


def stack_faults(loop: list[Instruction]) -> list[str]:
    """Sentences on what a loop reads or writes on the stack."""
    at = f"loop at {loop[0].address:x}: "
    return [
        f"{at}wanted nothing on the stack, found {i.opcode} {i.operands}"
        for i in loop
        if "(%rsp" in i.operands
    ]


def disassemble(path: Path) -> list[Instruction] | None:
    """The instructions of an object file; None without objdump."""
    objdump = shutil.which("objdump")
    if objdump is None:
        return None
    command = [objdump, "-d", "--no-show-raw-insn", str(path)]
    return parse_objdump(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
