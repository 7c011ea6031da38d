"""What ``pyattn.explain`` returns: the dispatch table of a call, printable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pyattn import dispatch
from pyattn.dispatch import AnyProblem
from pyattn.spec import Op


class Row(NamedTuple):
    op: Op
    backend: str
    chosen: bool
    reasons: tuple[str, ...]  # why not; empty for a backend that can
    plan: str  # tiles and instruction set of a backend that can


class Explanation:
    """Rows of backends for each op, the backend chosen, and the size of the work."""

    def __init__(self, problems: Sequence[AnyProblem], requested: str) -> None:
        self.problem = problems[0]
        self.requested = requested
        self.rows: list[Row] = []
        self.chosen: dict[Op, str | None] = {}
        for problem in problems:
            table = dispatch.table(problem, requested)
            able = [name for name, reasons in table if not reasons and requested in ("auto", name)]
            self.chosen[problem.op] = able[0] if able else None
            for name, reasons in table:
                plan = "" if reasons else dispatch.load_for(problem, name).describe(problem)
                self.rows.append(Row(problem.op, name, name == self.chosen[problem.op], reasons, plan))

    @property
    def flops(self) -> int:
        """Multiplications and additions of the forward's matrix products."""
        return self.problem.flops

    @property
    def bytes(self) -> int:
        """What the forward must move at the least: its operands and its outputs."""
        return self.problem.bytes

    def __str__(self) -> str:
        lines = [
            f"{self.problem.family} {self.problem.operands}",
            f"{self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB"
            + ("" if self.requested == "auto" else f", backend {self.requested!r} requested"),
        ]
        for row in self.rows:
            verdict = "chosen" if row.chosen else "able" if not row.reasons else "no"
            lines.append(f"  {row.op:9}{row.backend:11}{verdict:8}{'; '.join(row.reasons) or row.plan}")
        return "\n".join(lines)

    __repr__ = __str__
