"""``pyattn.nn.MultiheadAttention`` against ``torch.nn.MultiheadAttention``, with ``need_weights=False``.

A training step is forward and backward with gradients of the input and of all parameters. The forward is in evaluation
without grad, where torch's module takes its C++ fast path.
"""

import itertools
from typing import Any, NamedTuple

import torch
from suite import DTYPES, THREADS, TOLERANCE, cpu, significant
from torch import Tensor

import pyattn
from pyattn import measure

HEADS = 8


class Cell(NamedTuple):
    """Self-attention of one sample by 8 heads."""

    threads: int
    dtype: torch.dtype
    op: str  # "training step" or "forward"
    head_dim: int
    length: int

    def __str__(self) -> str:
        name = f"{self.op}-{self.dtype_name}-d{self.head_dim}-L{self.length}-{self.threads}t"
        return name.replace(" ", "_")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


GRID = [
    Cell(*cell)
    for cell in itertools.product(THREADS, DTYPES, ("training step", "forward"), (64, 128), (128, 512, 2048))
]
QUICK = [cell for cell in GRID if (cell.length, cell.head_dim) == (512, 64)]


def step(module: torch.nn.Module, x: Tensor, grad: Tensor | None) -> Any:
    if grad is None:
        with torch.no_grad():
            return (module(x, x, x, need_weights=False)[0],)
    out = module(x, x, x, need_weights=False)[0]
    return out.detach(), *torch.autograd.grad(out, (x, *module.parameters()), grad)


def test_multihead(cell: Cell, cells: list[dict[str, Any]], benchmark: Any) -> None:
    torch.manual_seed(0)
    E, training = HEADS * cell.head_dim, cell.op == "training step"
    modules = {
        "torch module": torch.nn.MultiheadAttention(E, HEADS, batch_first=True),
        "pyattn": pyattn.nn.MultiheadAttention(E, HEADS, batch_first=True),
    }
    modules["pyattn"].load_state_dict(modules["torch module"].state_dict())
    for module in modules.values():
        module.to(cell.dtype).train(training)
    x = torch.randn(1, cell.length, E).to(cell.dtype).requires_grad_(training)
    grad = torch.randn_like(x) if training else None
    runs = {name: lambda module=module: step(module, x, grad) for name, module in modules.items()}
    for ours, theirs in zip(runs["pyattn"](), runs["torch module"](), strict=True):
        error = measure.max_error(ours, theirs.double()) / theirs.abs().max().item()
        assert error < TOLERANCE[cell.dtype], f"pyattn computes something else: {error:.2g}"
    times = measure.alternate(runs, rounds=5, min_time=1.0)
    benchmark.pedantic(runs["pyattn"], rounds=3)
    cells.append(
        cell._asdict()
        | {"dtype": cell.dtype_name, "batch_heads": HEADS, "isa": cpu().isa()}
        | {"microseconds": {name: significant(times.median(name) * 1e6) for name in runs}}
        | {"speedup": {"torch module": significant(times.ratio("torch module", "pyattn"))}}
        | {"rounds": len(times.samples["pyattn"])}
    )
