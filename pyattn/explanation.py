"""What ``pyattn.explain`` returns: the dispatch table of a call, printable."""

from __future__ import annotations

import math
from typing import NamedTuple

from pyattn import dispatch
from pyattn.spec import Op, Problem


class Row(NamedTuple):
    op: Op
    backend: str
    chosen: bool
    reasons: tuple[str, ...]  # why not; empty for a backend that can
    plan: str  # tiles and instruction set of a backend that can


class Explanation:
    """Rows of backends for each op, the backend chosen, and the size of the work."""

    def __init__(self, problems: list[Problem], requested: str) -> None:
        self.problem = problems[0]
        self.requested = requested
        self.rows: list[Row] = []
        self.chosen: dict[Op, str | None] = {}
        for problem in problems:
            table = dispatch.table(problem, requested)
            able = [name for name, reasons in table if not reasons and requested in ("auto", name)]
            self.chosen[problem.op] = able[0] if able else None
            for name, reasons in table:
                plan = "" if reasons else dispatch.load(name).describe(problem)
                self.rows.append(Row(problem.op, name, name == self.chosen[problem.op], reasons, plan))

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head of one sample that the spec's integers leave; tensors are not read.

        A packed batch counts as if each query saw all keys: what its sequences are stands in tensors.
        """
        spec, problem = self.problem.spec, self.problem
        Lq, Lk = problem.query_length, problem.key_length
        if problem.packed or problem.has("q_offset") or (spec.window_left is None and spec.window_right is None):
            return Lq * Lk
        offset = Lk - Lq if spec.q_offset is None else spec.q_offset
        total = 0
        for pos in range(offset, offset + Lq):
            lo = 0 if spec.window_left is None else max(0, pos - spec.window_left)
            hi = Lk if spec.window_right is None else min(Lk, pos + spec.window_right + 1)
            total += max(0, hi - lo)
        return total

    @property
    def flops(self) -> int:
        """Multiplications and additions of the forward's two matrix products."""
        B, Hq = (1, self.problem.query.shape[1]) if self.problem.packed else self.problem.query.shape[:2]
        return 2 * B * Hq * self.pairs * (self.problem.query.shape[-1] + self.problem.value.shape[-1])

    @property
    def bytes(self) -> int:
        """Bytes of query, key, value and out: what the forward must move at the least."""
        problem = self.problem
        metas = (problem.query, problem.key, problem.value)
        elements = sum(math.prod(meta.shape) for meta in metas)
        elements += math.prod(problem.query.shape[:-1]) * problem.value.shape[-1]
        return elements * problem.query.dtype.itemsize

    def __str__(self) -> str:
        q = self.problem.query
        sizes = " ".join(str(list(m.shape)) for m in (q, self.problem.key, self.problem.value))
        lines = [
            f"attention {str(q.dtype).removeprefix('torch.')} on {q.device}: query, key, value {sizes}",
            f"{self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB"
            + ("" if self.requested == "auto" else f", backend {self.requested!r} requested"),
        ]
        for row in self.rows:
            verdict = "chosen" if row.chosen else "able" if not row.reasons else "no"
            lines.append(f"  {row.op:9}{row.backend:11}{verdict:8}{'; '.join(row.reasons) or row.plan}")
        return "\n".join(lines)

    __repr__ = __str__
