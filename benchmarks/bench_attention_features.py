"""What the features of the attention family cost: a causal problem with each of them and without, taken in turns.

Every feature is given so that the work stays that of the plain call: all keys are in use, offsets are where they are
anyway. A packed batch is compared to a dense one of as many sequences.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from suite import DTYPES, HEADS, THREADS, Cell, cpu, significant

import pyattn
from pyattn import measure

LENGTH, SEQUENCES, PAGE_SIZE = 2048, 4, 64
GRID = [
    Cell(threads, dtype, head_dim, LENGTH, causal=True, op=op)
    for threads, dtype, head_dim, op in itertools.product(
        THREADS, DTYPES, (64, 128), ("forward", "forward and backward")
    )
]
QUICK = [cell for cell in GRID if (cell.head_dim, cell.threads) == (64, THREADS[-1])]
BASELINES = {"packed": "batch"}  # of every other feature: "plain"


def calls(cell: Cell) -> dict[str, Callable[[], Any]]:
    """By name, on the CPU kernels or not at all: the baselines, and the calls with one feature."""
    query, key, value, grad = cell.inputs()
    dense = {"query": query, "key": key, "value": value}
    row = torch.tensor([LENGTH], dtype=torch.int32)
    sinks = torch.randn(HEADS).requires_grad_(query.requires_grad)
    features = {
        "plain": {},
        "ALiBi": {"alibi_slopes": torch.rand(HEADS)},
        "softcap": {"softcap": 30.0},
        "sinks": {"sinks": sinks},
        "dropout 0.1": {"dropout_p": 0.1},
        "kv_lengths": {"kv_lengths": row},
        "kv_starts": {"kv_starts": row - LENGTH},
        "q_offset a sample": {"q_offset": row - LENGTH},
    }
    problems = {name: (pyattn.attention, dense | feature, grad) for name, feature in features.items()}

    def laid_out(x: torch.Tensor, *, packed: bool) -> torch.Tensor:
        """``[1, H, L, D]`` as ``[L, H, D]`` or as a batch of shorter sequences."""
        x = x[0].transpose(0, 1) if packed else x[0].unflatten(1, (SEQUENCES, -1)).transpose(0, 1)
        return x.detach().contiguous().requires_grad_(x.requires_grad)

    cu_seqlens = torch.arange(0, LENGTH + 1, LENGTH // SEQUENCES, dtype=torch.int32)
    bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    for name, function, extra in (("batch", pyattn.attention, {}), ("packed", pyattn.attention_varlen, bounds)):
        inputs = {n: laid_out(x, packed=name == "packed") for n, x in dense.items()}
        problems[name] = function, inputs | extra, laid_out(grad, packed=name == "packed")
    if cell.op == "forward":  # paged keys have no gradient
        num_pages = LENGTH // PAGE_SIZE
        pages = {n: dense[n][0].unflatten(1, (num_pages, -1)).transpose(0, 1).contiguous() for n in ("key", "value")}
        table = torch.randperm(num_pages).to(torch.int32).view(1, -1)
        problems["paged"] = pyattn.attention, dense | pages | {"block_table": table, "kv_lengths": row}, grad

    def prepared(function: Callable[..., Any], arguments: dict[str, Any], grad: torch.Tensor) -> Callable[[], Any]:
        def forward() -> Any:
            return function(**arguments, causal=True, backend="cpu")

        inputs = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        return measure.forward_backward(forward, inputs, grad) if inputs else forward

    return {name: prepared(*problem) for name, problem in problems.items()}


def test_attention_features(cell: Cell, cells: list[dict[str, Any]], benchmark: Any) -> None:
    torch.manual_seed(0)
    runs = calls(cell)
    times = measure.alternate(runs, rounds=5, min_time=2.0)
    benchmark.pedantic(runs["plain"], rounds=3)
    compared = [name for name in runs if name not in ("plain", "batch")]
    cells.append(
        cell._asdict()
        | {"dtype": cell.dtype_name, "batch_heads": HEADS, "isa": cpu().isa()}
        | {"microseconds": {name: significant(times.median(name) * 1e6) for name in runs}}
        | {"relative_time": {n: significant(times.ratio(n, BASELINES.get(n, "plain"))) for n in compared}}
        | {"rounds": len(times.samples["plain"])}
    )
