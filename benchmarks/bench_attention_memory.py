"""The peak of memory above inputs and results, each cell in a process of its own: nothing is left from another."""

import concurrent.futures
import dataclasses
import multiprocessing
from typing import Any

import torch
from suite import HEADS, THREADS, Cell, cpu

from pyattn import compare

GRID = [
    Cell(THREADS[-1], torch.float32, 64, length, causal=True, op=op)
    for op in ("forward", "forward and backward")
    for length in (1024, 2048, 4096, 8192, 16384)
]
QUICK = [cell for cell in GRID if cell.length == 1024]


def memory(cell: Cell) -> list[compare.Cell]:
    torch.set_num_threads(cell.threads)
    backward = cell.op != "forward"
    workload = compare.Workload(cell.dtype, (cell.length,), 1, HEADS, cell.head_dim, cell.causal, backward)
    compare.warm_up(workload)
    return compare.memory_and_error(workload, cell.length)


def test_attention_memory(cell: Cell, cells: list[dict[str, Any]], benchmark: Any) -> None:
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as pool:
        measured = benchmark.pedantic(lambda: pool.submit(memory, cell).result(), rounds=1)
    results = {result.implementation: dataclasses.asdict(result) for result in measured}
    columns = {
        field: {name: result[field] for name, result in results.items() if result[field] is not None}
        for field in ("backend", "skipped", "peak_extra_bytes", "max_error", "max_gradient_error")
    }
    cells.append(cell._asdict() | {"dtype": cell.dtype_name, "batch_heads": HEADS, "isa": cpu().isa()} | columns)
