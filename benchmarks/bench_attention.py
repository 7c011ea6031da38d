"""The attention forward, with its peers side by side.

    make bench
    python -m pytest benchmarks/bench_attention.py --benchmark-only --quick

In a cell all peers take turns in one process (``pyattn.measure.alternate``). Its ratios are medians of paired
ratios and go to ``results/<device>/attention_forward.json``. What pytest-benchmark prints is pyattn alone.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import peers
import pytest
import torch

from pyattn import dispatch, measure

SUITE = "attention_forward"
HEADS = 8
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # tells a wrong peer from a rounding one


class Cell(NamedTuple):
    threads: int
    dtype: torch.dtype
    head_dim: int
    length: int
    causal: bool

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"{str(self.dtype)[6:]}-d{self.head_dim}-L{self.length}-{mask}-{self.threads}t"

    def skips(self, peer: str) -> str | None:
        """Peers that a full grid has no time for."""
        if peer == "FlexAttention" and (self.length not in (512, 2048) or self.head_dim != 64):
            return "seconds of compilation a shape: measured at D 64, L 512 and 2048"
        return None


GRID = [
    Cell(threads, dtype, head_dim, length, causal)
    for threads in (1, 2)
    for dtype in (torch.float32, torch.bfloat16)
    for head_dim in (64, 128)
    for length in (16, 32, 64, 128, 512, 2048, 4096)
    for causal in (False, True)
]
QUICK = [cell for cell in GRID if cell.length in (64, 512) and cell.head_dim == 64]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    grid = QUICK if metafunc.config.getoption("--quick") else GRID
    metafunc.parametrize("cell", grid, ids=str)


@functools.cache
def peak_gflops(dtype: torch.dtype, threads: int) -> float:
    cpu: Any = dispatch.load("cpu")
    return cpu.peak_gflops(dtype, threads)


@pytest.fixture(autouse=True)
def threads(cell: Cell) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def test_attention_forward(cell: Cell, cells: list[dict[str, Any]], benchmark: Any) -> None:
    torch.manual_seed(0)
    shape = (1, HEADS, cell.length, cell.head_dim)
    q, k, v = (torch.randn(shape).to(cell.dtype) for _ in range(3))
    rows = measure.sample_rows(cell.length)
    truth = measure.float64_attention(q, k, v, rows, causal=cell.causal)

    runs, absent, errors = {}, {}, {}
    for name in peers.PEERS:
        run = cell.skips(name) or peers.prepare(name, q, k, v, cell.causal)
        if isinstance(run, str):
            absent[name] = run
            continue
        errors[name] = measure.max_error(run()[:, :, rows], truth)
        assert errors[name] < TOLERANCE[cell.dtype], f"{name} computes something else"
        runs[name] = run

    times = measure.alternate(runs, rounds=3)
    flops = measure.attention_flops(q, k, v, causal=cell.causal)
    gflops = {name: flops / times.median(name) / 1e9 for name in runs}
    peak = peak_gflops(cell.dtype, cell.threads)
    cells.append(
        cell._asdict()
        | {"dtype": str(cell.dtype)[6:], "batch_heads": HEADS, "peak_gflops": round(peak, 1)}
        | {"percent_of_peak": round(100 * gflops["pyattn"] / peak, 1)}
        | {"gflops": {name: round(value, 2) for name, value in gflops.items()}}
        | {"speedup": {name: round(times.ratio(name, "pyattn"), 3) for name in runs if name != "pyattn"}}
        | {"max_error": {name: float(f"{error:.2g}") for name, error in errors.items()}}
        | {"rounds": len(times.samples["pyattn"]), "absent": absent}
    )
    benchmark.extra_info.update(cells[-1])
    repeats = max(1, int(measure.SAMPLE_SECONDS / times.median("pyattn")))
    benchmark.pedantic(runs["pyattn"], rounds=3, iterations=repeats)
