"""The projections around attention against what model code writes, and against the matrix product alone.

"eager" is F.linear, then rotary on views of its output, as in the models of Hugging Face transformers: the heads of q
and k are turned, v stays a view. "linear" is F.linear alone, for the plain projection the whole of the work.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from suite import DTYPES, THREADS, TOLERANCE, cpu, peak_gflops, significant
from torch import Tensor

import pyattn
from pyattn import measure


class Cell(NamedTuple):
    """A projection of 8 heads (or to E features) from E = 8 head_dim features, with one number of threads."""

    threads: int
    dtype: torch.dtype
    op: str  # "qkv, rotary", "output" (with bias) or "qkv, rotary, both": with its backward
    head_dim: int
    length: int  # of one sample

    def __str__(self) -> str:
        name = f"{self.op}-{self.dtype_name}-d{self.head_dim}-L{self.length}-{self.threads}t"
        return name.replace(", ", "_")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


HEADS = 8
OPS = ("qkv, rotary", "qkv, rotary, both", "output")
GRID = [
    Cell(threads, dtype, op, head_dim, length)
    for threads, dtype, op, head_dim, length in itertools.product(THREADS, DTYPES, OPS, (64, 128), (1, 16, 512, 2048))
    if length > 1 or "both" not in op
]
QUICK = [cell for cell in GRID if (cell.length, cell.head_dim) == (512, 64)]


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def calls(cell: Cell) -> tuple[dict[str, Callable[[], Any]], list[Tensor]]:
    """What competes, by name, and the outputs in float64."""
    E, D = HEADS * cell.head_dim, cell.head_dim
    grad = "both" in cell.op
    rows = E if cell.op == "output" else 3 * E
    x = torch.randn(1, cell.length, E).to(cell.dtype).requires_grad_(grad)
    weight = (torch.randn(rows, E) * E**-0.5).to(cell.dtype).requires_grad_(grad)
    bias = torch.randn(rows).to(cell.dtype).requires_grad_(grad)
    linear = {"linear": lambda: F.linear(x, weight, bias)}
    if cell.op == "output":
        heads = x.unflatten(-1, (HEADS, D)).transpose(1, 2)  # as attention returns them for such inputs
        runs = {"pyattn": lambda: pyattn.output_projection(heads, weight, bias), **linear}
        return runs, [F.linear(x.double(), weight.double(), bias.double())]

    angles = torch.outer(torch.arange(cell.length), 1e4 ** -torch.linspace(0, 1, D // 2 + 1)[:-1])
    rotary = pyattn.Rotary(angles.cos(), angles.sin())
    cos, sin = (torch.cat((table, table), -1).to(cell.dtype) for table in rotary[:2])

    def eager() -> tuple[Tensor, ...]:
        q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, HEADS, D)).permute(2, 0, 3, 1, 4)
        return rotate_half(q, cos, sin), rotate_half(k, cos, sin), v

    def fused() -> tuple[Tensor, ...]:
        return pyattn.qkv_projection(x, weight, bias, num_heads=HEADS, rotary=rotary)

    wide = (t.detach().double() for t in (x, weight, bias))
    truth = list(pyattn.qkv_projection(*wide, num_heads=HEADS, rotary=rotary))
    if not grad:
        return {"pyattn": fused, "eager": eager, **linear}, truth
    grads = [torch.randn_like(out) for out in truth]

    def both(call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], Any]:
        given = [g.to(cell.dtype) for g in grads]

        def run() -> tuple[Tensor, ...]:
            outputs = call()
            return *(out.detach() for out in outputs), *torch.autograd.grad(outputs, (x, weight, bias), given)

        return run

    wide_leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    outputs = pyattn.qkv_projection(*wide_leaves, num_heads=HEADS, rotary=rotary)
    truth += torch.autograd.grad(outputs, wide_leaves, grads)
    return {"pyattn": both(fused), "eager": both(eager)}, truth


def test_projection(cell: Cell, cells: list[dict[str, Any]], benchmark: Any) -> None:
    torch.manual_seed(0)
    runs, truth = calls(cell)
    for name in ("pyattn", "eager"):
        if name in runs:
            results = runs[name]()
            for out, true in zip([results] if isinstance(results, Tensor) else results, truth, strict=True):
                error = measure.max_error(out.detach(), true) / true.abs().max().item()
                assert error < TOLERANCE[cell.dtype], f"{name} computes something else: {error:.2g}"
    times = measure.alternate(runs, rounds=5, min_time=1.0)
    benchmark.pedantic(runs["pyattn"], rounds=3)
    E = HEADS * cell.head_dim
    flops = 2 * cell.length * E * E * {"output": 1, "qkv, rotary": 3, "qkv, rotary, both": 9}[cell.op]
    gflops = {name: flops / times.median(name) / 1e9 for name in runs}
    peak = peak_gflops(cell.dtype, cell.threads)
    cells.append(
        cell._asdict()
        | {"dtype": cell.dtype_name, "batch_heads": HEADS, "isa": cpu().isa(), "peak_gflops": round(peak, 1)}
        | {"percent_of_peak": round(100 * gflops["pyattn"] / peak, 1)}
        | {"microseconds": {name: significant(times.median(name) * 1e6) for name in runs}}
        | {"gflops": {name: significant(rate) for name, rate in gflops.items()}}
        | {"speedup": {name: significant(times.ratio(name, "pyattn")) for name in runs if name != "pyattn"}}
        | {"rounds": len(times.samples["pyattn"])}
    )
