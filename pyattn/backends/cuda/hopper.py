"""Which calls the kernels for sm_90a compute, in which tiles, and how blocks share them."""

from __future__ import annotations

import math
from typing import Any

import torch

from pyattn.backends.cuda import call
from pyattn.backends.cuda.kernels import Kernel, hopper_kernel
from pyattn.backends.cuda.launch import Launch, Map, Target, pack_numbers
from pyattn.spec import AttentionSpec, Problem, TensorMeta

MAX_ROWS = 512  # query heads times queries of a key head, up to which keys are split
SPLIT = 2048  # keys of a part, about, in whole tiles
L2_BYTES = 32 * 2**20  # of the cache of a Hopper GPU, what keys and values may take
LONG_ITEM = 1024  # rows that see a tile of keys, from where on blocks do not stay


def why_not(problem: Problem, macros: dict[str, int], arch: str) -> list[str]:
    """Why the kernels for sm_90a do not compute a call; then those for sm_80 do, as with few queries."""
    reasons = []
    if arch != "sm_90a":
        reasons.append(f"needs sm_90a, this GPU is {arch}")
    if not macros["ALIGNED"]:
        reasons.append("needs rows that begin at multiples of 16 bytes")
    if macros["PAGE_SIZE"]:
        reasons.append("knows no pages")
    if macros["DROPOUT"]:
        reasons.append("knows no dropout")
    if not math.prod(problem.key.shape):
        reasons.append("needs at least one key")
    tensors = (problem.query, problem.key, problem.value)
    if any(step == 0 for meta in tensors for step in call.steps(meta.shape, meta.stride)):
        reasons.append("needs tensors that are not expanded")  # TMA knows no stride of 0
    return reasons


def _map(name: str, meta: TensorMeta, *box: int) -> Map:
    """Of ``[B, H, L, D]``, or of packed ``[total, H, D]``: boxes of so many rows, or of so many rows of several heads.

    With heads a box has those of the first row, then those of the second: as a map of ``[B, L, H, D]``.
    """
    (b, h, row), (D, H, L) = meta.stride[:3], (meta.shape[-1], meta.shape[1], meta.shape[-2])
    sizes, strides = (meta.shape[0], H, L, D), (b, h, row, 1)
    if len(meta.shape) == 3:
        sizes, strides = (1, H, meta.shape[0], D), (0, h, b, 1)
    # Where a size is 1 a stride leads nowhere, and may be anything.
    steps = (*(2 * step if size > 1 else 16 for size, step in zip(sizes[:-1], strides[:-1], strict=True)), 2)
    order = (0, 1, 2, 3) if len(box) == 1 else (0, 2, 1, 3)
    dtype = 1 if meta.dtype == torch.bfloat16 else 2
    shape, steps = tuple(sizes[i] for i in order), tuple(steps[i] for i in order)
    return Map(name, dtype, shape, steps, (*(1, 1, *box)[-3:], 64))


def kernel_for(op: str, problem: Problem, macros: dict[str, int]) -> Kernel:
    """For sm_90a. Of the forward's, few queries of heads that share their keys are rows of one tile."""
    cu_seqlens, rows = problem.meta("cu_seqlens_k"), call.rows(problem)
    length = problem.key_length / (1 if cu_seqlens is None else max(cu_seqlens.shape[0] - 1, 1))
    keys = length / 2 if _is_triangle(problem.spec) else length  # that a row sees on average
    if rows is not None and rows <= MAX_ROWS:
        keys = min(keys, SPLIT)
    kernel = hopper_kernel(op, (problem.query.shape[-1], problem.value.shape[-1]), macros, keys)
    if op != "forward" or rows is None:
        return kernel
    block, group = kernel.tiles.BLOCK_M, problem.query.shape[1] // problem.key.shape[1]
    heads = math.gcd(block, group)
    queries = rows // group
    together, apart = -(-queries * heads // block), heads * -(-queries // block)  # tiles
    return kernel._replace(ROWS=heads if 4 * together <= 3 * apart else 1)


def _is_triangle(spec: AttentionSpec) -> bool:
    """Whether the last rows see most keys."""
    return spec.window_left is None and spec.window_right is not None


def start(
    kernel: Kernel,
    problem: Problem,
    target: Target,
    numbers: dict[str, Any],
    of_keys: bool = False,
    grad_out: TensorMeta | None = None,
    num_splits: int = 1,
) -> Launch:
    """A kernel of hopper.cuh; ``numbers`` less what depends on its tiles; these are of keys or of queries."""
    query, key, value = problem.query, problem.key, problem.value
    rows, keys = kernel.tiles.BLOCK_M // kernel.ROWS, kernel.tiles.BLOCK_N
    tiled, other = (key, query) if of_keys else (query, key)  # of which blocks have tiles, and over which they go
    cu_seqlens = problem.meta("cu_seqlens_k" if of_keys else "cu_seqlens_q")
    slots = call.slots(tiled, cu_seqlens, 1, keys if of_keys else rows)
    # So many heads as share what fits the L2 cache.
    heads, num_other = tiled.shape[1] // kernel.ROWS, other.shape[0] if problem.packed else other.shape[2]
    shared = 2 * num_other * (query.shape[-1] + value.shape[-1]) * other.shape[1] / heads
    together = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * shared <= L2_BYTES))
    # A block for each multiprocessor begins the next tile while it ends the last. Tiles under a causal mask take
    # equally long in pairs, the longest with the shortest. Others that differ, or take very long, the GPU hands out.
    chunk = 2 if _is_triangle(problem.spec) else 1
    alike = not (problem.packed or problem.has("kv_lengths") or problem.has("kv_starts"))
    alike = alike and (not of_keys or num_other * query.shape[1] <= LONG_ITEM * heads)
    items = -(-slots["slots"] // chunk) * chunk * heads * num_splits
    blocks = min(items // chunk, target.multiprocessors) if alike else items // chunk
    numbers = numbers | slots | {"items": items, "heads_together": together, "chunk": chunk}
    boxes = (rows, kernel.ROWS) if kernel.name == "attention_fwd_hopper" else (rows,)
    maps = [_map("query", query, *boxes), _map("key", key, keys), _map("value", value, keys)]
    if grad_out is not None:
        maps.append(_map("grad_out", grad_out, rows))
    return Launch(kernel, blocks, pack_numbers(numbers), tuple(maps))
