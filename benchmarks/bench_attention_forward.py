"""The forward of self-attention against everybody who computes it."""

import itertools
from typing import Any

import peers
from suite import DTYPES, THREADS, Cell, measure_cell

GRID = [
    Cell(threads, dtype, head_dim, length, causal)
    for threads, dtype, head_dim, length, causal in itertools.product(
        THREADS, DTYPES, (64, 128), (128, 512, 2048, 4096), (False, True)
    )
]
QUICK = [cell for cell in GRID if (cell.length, cell.head_dim) == (512, 64)]
PEERS = [name for name in peers.PEERS if "pages" not in name]


def test_attention_forward(cell: Cell, cells: list[dict[str, Any]], benchmark: Any) -> None:
    def skip(peer: str) -> str | None:
        compiled = cell.length in (512, 2048) and cell.head_dim == 64 and cell.threads == THREADS[-1]
        if peer == "FlexAttention" and not compiled:
            return "seconds of compilation a shape: measured at D 64, L 512 and 2048, with all cores"
        if peer == "naive" and cell.length * cell.head_dim > 4096 * 64:
            return "seconds a call: measured at L 4096 with D 64"
        return None

    cells.append(measure_cell(cell, benchmark, PEERS, skip=skip))
