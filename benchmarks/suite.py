"""What the suites share: the cells of their grids, and how a cell is measured with all peers in turns."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import peers
import torch
from torch import Tensor

import pyattn
from pyattn import dispatch, measure

HEADS = 8  # of the query, in a batch of 1
CORES = measure.physical_cores()
THREADS = sorted({1, min(2, CORES), CORES})
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # tells a wrong peer from a rounding one


class Cell(NamedTuple):
    """One problem with one number of threads."""

    threads: int
    dtype: torch.dtype
    head_dim: int
    length: int  # of the keys
    causal: bool = False
    op: Literal["forward", "backward", "forward and backward"] = "forward"
    num_queries: int | None = None  # None: as many as keys
    kv_heads: int = HEADS

    def __str__(self) -> str:
        parts = [self.op, self.dtype_name, f"d{self.head_dim}", f"L{self.length}"]
        parts += [] if self.num_queries is None else [f"q{self.num_queries}", f"kv{self.kv_heads}"]
        return "-".join([*parts, "causal" if self.causal else "full", f"{self.threads}t"]).replace(" ", "_")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value and the gradient of the output."""
        query = (1, HEADS, self.num_queries or self.length, self.head_dim)
        key = (1, self.kv_heads, self.length, self.head_dim)
        q, k, v, grad = (torch.randn(shape).to(self.dtype) for shape in (query, key, key, query))
        for x in (q, k, v):
            x.requires_grad_(self.op != "forward")
        return q, k, v, grad


def cpu() -> Any:
    return dispatch.load("cpu")


@functools.cache
def peak_gflops(dtype: torch.dtype, threads: int) -> float:
    return cpu().peak_gflops(dtype, threads)


def measure_cell(
    cell: Cell,
    benchmark: Any,
    names: Iterable[str],
    *,
    skip: Callable[[str], str | None] = lambda name: None,
    beside: dict[str, Callable[[], Any]] | None = None,
    min_time: float = 1.0,
) -> dict[str, Any]:
    """What the results keep of a cell; ``beside`` are calls that take their turns with the peers'.

    ``skip`` says why a peer that could is left out. What pytest-benchmark prints is pyattn alone.
    """
    torch.manual_seed(0)
    query, key, value, grad = cell.inputs()
    truth = measure.Truth(query, key, value, grad, causal=cell.causal)
    runs, absent, errors, gradient_errors = {}, {}, {}, {}
    for name in names:
        forward = skip(name) or peers.prepare(name, query, key, value, cell.causal)
        if isinstance(forward, str):
            absent[name] = forward
            continue
        inputs = (query, key, value)
        results = measure.forward_backward(forward, inputs, truth.grad)() if query.requires_grad else (forward(),)
        errors[name], of_gradients = truth.errors(*results)
        assert errors[name] < TOLERANCE[cell.dtype], f"{name} computes something else"
        if of_gradients is not None:
            gradient_errors[name] = of_gradients
            largest = max(gradient.abs().max().item() for gradient in truth.gradients)
            assert of_gradients < TOLERANCE[cell.dtype] * max(1, largest), f"{name} has other gradients"
        if cell.op == "backward":
            runs[name] = measure.backward_alone(forward, inputs, grad)
        elif cell.op == "forward and backward":
            runs[name] = measure.forward_backward(forward, inputs, grad)
        else:
            runs[name] = forward

    times = measure.alternate(runs | (beside or {}), rounds=3, min_time=min_time)
    repeats = max(1, int(measure.SAMPLE_SECONDS / times.median("pyattn")))
    benchmark.pedantic(runs["pyattn"], rounds=3, iterations=repeats)
    flops = {
        "forward": measure.attention_flops(query, key, value, causal=cell.causal),
        "forward and backward": measure.attention_flops(query, key, value, causal=cell.causal, backward=True),
    }
    flops["backward"] = flops["forward and backward"] - flops["forward"]
    gflops = {name: flops[cell.op] / times.median(name) / 1e9 for name in runs}
    peak = peak_gflops(cell.dtype, cell.threads)
    backends = pyattn.explain(query, key, value, causal=cell.causal).chosen
    return (
        cell._asdict()
        | {"dtype": cell.dtype_name, "batch_heads": HEADS, "isa": cpu().isa(), "backends": backends}
        | {"peak_gflops": round(peak, 1), "percent_of_peak": round(100 * gflops["pyattn"] / peak, 1)}
        | {"microseconds": {name: significant(times.median(name) * 1e6) for name in times.samples}}
        | {"gflops": {name: significant(value) for name, value in gflops.items()}}
        | {"speedup": {name: significant(times.ratio(name, "pyattn")) for name in times.samples if name != "pyattn"}}
        | {"max_error": {name: significant(error, 2) for name, error in errors.items()}}
        | {"max_gradient_error": {name: significant(error, 2) for name, error in gradient_errors.items()}}
        | {"rounds": len(times.samples["pyattn"]), "absent": absent}
    )


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")
