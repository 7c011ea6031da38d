"""What machine code for NVIDIA GPUs consists of, by the tools that Triton's wheel has: neither CUDA nor a GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

TOOLS = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"  # type: ignore
MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA")


class Code(NamedTuple):
    """The only kernel of a cubin. Instructions are whole names, such as "LDGSTS.E.BYPASS.LTC128B.128"."""

    registers: int  # of a thread
    stack: int  # bytes of a thread
    instructions: list[str]
    loop: list[str]  # those of the innermost loop around all that multiply matrices


def disassemble(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []  # a branch back, and where to
    for line in assembly.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)(.*)", line):
            target = re.search(r"`\((\.L\w+)\)", found[2])
            if found[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(instructions) + 1))
            instructions.append(found[1])
    products = [i for i, name in enumerate(instructions) if count([name], *MATRIX_INSTRUCTIONS)]
    around = [loop for loop in loops if products and loop[0] <= products[0] and products[-1] < loop[1]]
    begin, end = min(around, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return Code(registers, stack, instructions, instructions[begin:end])


def count(instructions: list[str], *names: str, part: str | None = None) -> int:
    """How many have one of the names, and ``part`` behind it."""
    parts = (instruction.split(".") for instruction in instructions)
    return sum(name in names and (part is None or part in rest) for name, *rest in parts)


def spills(instructions: list[str]) -> int:
    """Loads and stores of what did not fit the registers."""
    return count(instructions, "LDL", "STL")


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout
