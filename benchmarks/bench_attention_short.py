"""The forward of short sequences, where what a call costs before it computes decides."""

import itertools
from typing import Any

from suite import DTYPES, THREADS, Cell, measure_cell

GRID = [
    Cell(threads, dtype, 64, length, causal)
    for threads, dtype, length, causal in itertools.product(
        THREADS, DTYPES, (1, 2, 4, 8, 16, 32, 64, 128), (False, True)
    )
]
QUICK = [cell for cell in GRID if cell.length in (1, 16) and not cell.causal]
PEERS = ("pyattn", "torch SDPA", "naive")


def test_attention_short(cell: Cell, cells: list[dict[str, Any]], benchmark: Any) -> None:
    cells.append(measure_cell(cell, benchmark, PEERS, min_time=0.5))
