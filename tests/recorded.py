"""What compilers make of the kernels, held to what ``benchmarks/results/compiled`` says they made of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
GROWTH = 1.05

Cell = dict[str, Any]


def run_script(*arguments: object) -> None:
    """In a process of its own: in this one kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, *map(str, arguments)], check=True, env=environment)


def growth(cell: Cell, recorded: Cell | None, *more: str) -> Iterator[str]:
    for name in ("registers", "spills", "shared", *more):
        if recorded is not None and cell[name] > GROWTH * recorded[name]:
            yield f"{name} grew from {recorded[name]} to {cell[name]}"


class Record:
    """The results of ``script``, whose cells differ in ``names``, and what is wrong with one of them."""

    def __init__(
        self,
        script: str,
        results: str,
        names: tuple[str, ...],
        complaints: Callable[[Cell, Cell | None], Iterator[str]],
    ) -> None:
        self.script = BENCHMARKS / script
        self.names = names
        self.complaints = complaints
        self.recorded = json.loads((BENCHMARKS / "results" / "compiled" / results).read_text())

    def key(self, cell: Cell) -> tuple[Any, ...]:
        return tuple(cell[name] for name in self.names)

    def find(self, *key: Any) -> Cell:
        (cell,) = (cell for cell in self.recorded["cells"] if self.key(cell) == key)
        return cell

    def make(self, folder: Path, *arguments: str) -> dict[str, Any]:
        path = folder / "results.json"
        run_script(self.script, *arguments, "--out", path)
        return json.loads(path.read_text())

    def check(self, results: dict[str, Any], arch: str) -> None:
        """Against the record, if it was made by the same release of the compiler: another differs."""
        releases = [
            {name: version.split(".")[:2] for name, version in x["environment"].items()}
            for x in (results, self.recorded)
        ]
        recorded = {self.key(cell): cell for cell in self.recorded["cells"]} if releases[0] == releases[1] else {}
        cells = [cell for cell in results["cells"] if cell["arch"] == arch]
        assert cells
        assert not recorded or all(self.key(cell) in recorded for cell in cells)
        found = {
            " ".join(map(str, self.key(cell))): list(self.complaints(cell, recorded.get(self.key(cell))))
            for cell in cells
        }
        assert not {name: wrong for name, wrong in found.items() if wrong}
