"""The backward alone, on a graph that one forward left, and forward and backward together."""

import itertools
from typing import Any

from suite import DTYPES, THREADS, Cell, measure_cell

GRID = [
    Cell(threads, dtype, head_dim, length, causal, op)
    for threads, dtype, head_dim, length, causal, op in itertools.product(
        THREADS, DTYPES, (64, 128), (128, 512, 2048, 4096), (False, True), ("backward", "forward and backward")
    )
    if threads == THREADS[-1] or length < 4096  # a minute a cell with one thread
    if op == "backward" or head_dim == 64  # little else than the sum of what two other cells say
]
QUICK = [cell for cell in GRID if (cell.length, cell.head_dim) == (512, 64)]
PEERS = ("pyattn", "torch SDPA", "naive", "FlexAttention", "ONNX Runtime", "OpenVINO")


def test_attention_backward(cell: Cell, cells: list[dict[str, Any]], benchmark: Any) -> None:
    def skip(peer: str) -> str | None:
        slow = peer == "naive" and cell.length * cell.head_dim > 2048 * 64
        return "seconds a call: measured to L 2048 with D 64, 512 with D 128" if slow else None

    cells.append(measure_cell(cell, benchmark, PEERS, skip=skip))
