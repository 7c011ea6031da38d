"""What machine code for NVIDIA GPUs consists of, by the tools that Triton's wheel has: neither CUDA nor a GPU."""

from __future__ import annotations

import collections
import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

TOOLS = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"  # type: ignore


class Code(NamedTuple):
    """The only kernel of a cubin."""

    registers: int  # of a thread
    stack: int  # bytes of a thread
    instructions: collections.Counter[str]  # by their whole name, such as "LDGSTS.E.BYPASS.LTC128B.128"

    def count(self, *names: str, part: str | None = None) -> int:
        """How many instructions have one of the names, and ``part`` behind it."""
        total = 0
        for instruction, n in self.instructions.items():
            name, *parts = instruction.split(".")
            total += n * (name in names and (part is None or part in parts))
        return total

    @property
    def spills(self) -> int:
        """Loads and stores of what did not fit the registers."""
        return self.count("LDL", "STL")


def disassemble(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", assembly, re.MULTILINE)
    return Code(registers, stack, collections.Counter(names))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout
