"""Few queries on many keys: what reads the keys and values fastest wins.

The longest length of every kind makes keys and values together larger than four times the last level of cache.
There the rate is also given in percent of what torch reads from DRAM with as many threads, taken in turns.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import peers
import torch
from suite import DTYPES, HEADS, THREADS, Cell, measure_cell, significant

from pyattn import measure

BEYOND = 4 * measure.last_level_cache_bytes()
NUM_QUERIES = (1, 8)
LONG = 65536


def lengths(dtype: torch.dtype, head_dim: int, kv_heads: int) -> list[int]:
    beyond = LONG * math.ceil((BEYOND + 1) / (LONG * kv_bytes(dtype, head_dim, kv_heads)))
    return sorted({1024, 8192, LONG, beyond})


def kv_bytes(dtype: torch.dtype, head_dim: int, kv_heads: int) -> int:
    """Of one key and its value, in all heads."""
    return 2 * kv_heads * head_dim * dtype.itemsize


@functools.cache
def dram_read(threads: int) -> tuple[Callable[[], Any], int]:
    """Of torch with ``threads``: a fixture has set them."""
    return measure.dram_read()


GRID = [
    Cell(threads, dtype, head_dim, length, num_queries=num_queries, kv_heads=kv_heads)
    for threads, dtype, head_dim, num_queries, kv_heads in itertools.product(
        THREADS, DTYPES, (64, 128), NUM_QUERIES, (HEADS, 2, 1)
    )
    for length in lengths(dtype, head_dim, kv_heads)
    if (head_dim == 64 and (kv_heads != 2 or num_queries == 1)) or (num_queries, kv_heads) == (1, HEADS)
]
QUICK = [cell for cell in GRID if cell.length in (1024, LONG) and cell.head_dim == 64 and cell.num_queries == 1]


def test_attention_decode(cell: Cell, cells: list[dict[str, Any]], benchmark: Any) -> None:
    def skip(peer: str) -> str | None:
        shape = (cell.length, cell.head_dim, cell.num_queries, cell.kv_heads)
        if peer == "FlexAttention" and (cell.threads != THREADS[-1] or shape != (8192, 64, 1, 1)):
            return "seconds of compilation a shape: measured with 1 query, 1 key head, D 64, L 8192, with all cores"
        return None

    read_bytes = cell.length * kv_bytes(cell.dtype, cell.head_dim, cell.kv_heads)
    if read_bytes <= BEYOND:
        result = measure_cell(cell, benchmark, peers.PEERS, skip=skip, min_time=0.5)
    else:
        read, dram_bytes = dram_read(cell.threads)
        result = measure_cell(cell, benchmark, peers.PEERS, skip=skip, min_time=0.5, beside={"DRAM": read})
        result["percent_of_dram"] = round(100 * result["speedup"].pop("DRAM") * read_bytes / dram_bytes, 1)
        result["dram_gb_per_second"] = significant(dram_bytes / result["microseconds"].pop("DRAM") / 1e3)
    del result["percent_of_peak"], result["peak_gflops"]
    rates = {name: significant(read_bytes / time / 1e3) for name, time in result["microseconds"].items()}
    cells.append(result | {"kv_bytes": read_bytes, "gb_per_second": rates})
