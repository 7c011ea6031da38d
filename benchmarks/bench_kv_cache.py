"""A step of generation: new tokens join a cache of keys and values, then attend to all of it.

Beside pyattn's caches stands what is written with torch: a buffer that new tokens are copied into, of whose filled part
SDPA takes a view, and SDPA on a concatenation, which copies all that there is. After each call the new tokens are taken
back, so that the context keeps its length.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peers import PAGE_SIZE
from suite import DTYPES, HEADS, THREADS, TOLERANCE, cpu, significant
from torch import Tensor

import pyattn
from pyattn import measure


class Cell(NamedTuple):
    """One sample with 8 query heads."""

    threads: int
    dtype: torch.dtype
    head_dim: int
    kv_heads: int
    length: int  # of the context, before the step
    tokens: int  # new ones

    def __str__(self) -> str:
        return f"{self.dtype_name}-d{self.head_dim}-kv{self.kv_heads}-L{self.length}-n{self.tokens}-{self.threads}t"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


GRID = [
    Cell(threads, dtype, 64, kv_heads, length, tokens)
    for threads, dtype, kv_heads, (length, tokens) in itertools.product(
        THREADS, DTYPES, (HEADS, 2), ((256, 1), (1024, 1), (8192, 1), (65536, 1), (8192, 8), (8192, 512))
    )
]
QUICK = [cell for cell in GRID if (cell.length, cell.kv_heads) == (1024, 2)]

Step = Callable[[], Any]


def ours(key: Tensor, value: Tensor, new: tuple[Tensor, Tensor, Tensor], page_size: int | None) -> tuple[Step, Step]:
    """A step, and its append alone."""
    query, new_key, new_value = new
    length, tokens = key.shape[2], query.shape[2]
    cache = pyattn.KVCache(1, key.shape[1], key.shape[3], length + tokens, dtype=key.dtype, page_size=page_size)
    cache.append(key, value)

    def step() -> Tensor:
        out = pyattn.attention_with_kv_cache(query, cache, new_key, new_value)
        cache.truncate([length])
        return out

    def append() -> None:
        cache.append(new_key, new_value)
        cache.truncate([length])

    return step, append


def with_torch(key: Tensor, value: Tensor, new: tuple[Tensor, Tensor, Tensor]) -> dict[str, Step]:
    query, new_key, new_value = new
    length, tokens, grouped = key.shape[2], query.shape[2], query.shape[1] != key.shape[1]
    mask = None
    if tokens > 1:  # SDPA's is_causal puts the first query at the first key
        mask = torch.ones(tokens, length + tokens, dtype=torch.bool).tril(length)
    buffers = [torch.cat((x, torch.zeros_like(y)), 2) for x, y in ((key, new_key), (value, new_value))]

    def in_place() -> Tensor:
        for buffer, x in zip(buffers, (new_key, new_value), strict=True):
            buffer[:, :, length : length + tokens] = x
        filled = [buffer[:, :, : length + tokens] for buffer in buffers]
        return F.scaled_dot_product_attention(query, *filled, attn_mask=mask, enable_gqa=grouped)

    def concatenated() -> Tensor:
        parts = [torch.cat((x, y), 2) for x, y in ((key, new_key), (value, new_value))]
        return F.scaled_dot_product_attention(query, *parts, attn_mask=mask, enable_gqa=grouped)

    return {"SDPA, buffer": in_place, "SDPA, torch.cat": concatenated}


def test_kv_cache(cell: Cell, cells: list[dict[str, Any]], benchmark: Any) -> None:
    torch.manual_seed(0)

    def random(heads: int, length: int) -> Tensor:
        return torch.randn(1, heads, length, cell.head_dim).to(cell.dtype)

    key, value = random(cell.kv_heads, cell.length), random(cell.kv_heads, cell.length)
    new = random(HEADS, cell.tokens), random(cell.kv_heads, cell.tokens), random(cell.kv_heads, cell.tokens)
    steps, appends = {}, {}
    for name, page_size in (("pyattn", None), ("pyattn, pages", PAGE_SIZE)):
        steps[name], appends[name] = ours(key, value, new, page_size)
    steps |= with_torch(key, value, new)
    whole = [torch.cat((x, y), 2).double() for x, y in ((key, new[1]), (value, new[2]))]
    expected = pyattn.attention(new[0].double(), *whole, causal=True, backend="reference")
    for name, step in steps.items():
        error = (step().double() - expected).abs().max().item()
        assert error < TOLERANCE[cell.dtype], f"{name} computes something else: {error:.2g}"
    with torch.no_grad():
        times = measure.alternate(steps, rounds=5, min_time=1.0)
        of_appends = measure.alternate(appends, rounds=5, min_time=0.2)
        benchmark.pedantic(steps["pyattn"], rounds=3)
    cells.append(
        cell._asdict()
        | {"dtype": cell.dtype_name, "batch_heads": HEADS, "isa": cpu().isa()}
        | {"microseconds": {name: significant(times.median(name) * 1e6) for name in steps}}
        | {"append_microseconds": {name: significant(of_appends.median(name) * 1e6) for name in appends}}
        | {"speedup": {name: significant(times.ratio(name, "pyattn")) for name in steps if name != "pyattn"}}
        | {"rounds": len(times.samples["pyattn"])}
    )
