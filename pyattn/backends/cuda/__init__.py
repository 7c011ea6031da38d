"""The CUDA C++ kernels of ``csrc/cuda``, compiled by NVRTC when they are first needed, on NVIDIA GPUs.

Nothing is compiled at installation. A call's specialisation follows from its dtype, head dims and features; the machine
code is kept on disk (``pyattn.jit``), and ``python -m pyattn precompile`` makes it beforehand.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyattn.backends.cuda import launch
from pyattn.backends.cuda.kernels import (
    Kernel,
    columns_of,
    combine_kernel,
    hopper_kernel,
    kernel_of,
    preprocess_kernel,
    unordered,
)
from pyattn.backends.cuda.launch import Addresses, Launch, Map, Target, pack_numbers, run, target_of, unavailable
from pyattn.spec import AttentionSpec, AttentionTensors, Problem, TensorMeta, empty_output, lse_shape, sink_gradient

__all__ = [
    "backward",
    "backward_plan",
    "describe",
    "forward",
    "forward_plan",
    "slower_than_triton",
    "unavailable",
    "why_not",
]

MAX_HEAD_DIM = 256
MAX_LENGTH = 2**30  # rows and keys are counted in 32 bits, with room for an offset
DECODE_ROWS = 64  # query heads times queries of a key head, up to which keys are split
SPLIT = 512  # keys of a part: bits depend neither on the batch nor on the GPU
HOPPER_ROWS = 512  # the same of the kernels for sm_90a, whose tiles are larger
HOPPER_SPLIT = 2048  # about, in whole tiles
L2_BYTES = 32 * 2**20  # of the cache of a Hopper GPU, what keys and values may take
LONG_ITEM = 1024  # rows that see a tile of keys, from where on blocks do not stay
_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_LOG2E = math.log2(math.e)
_UNLIMITED = 2**62
_FARTHEST = 2**61  # of a window that has a side


# ---- what a call takes ---------------------------------------------------------------------------------------


def _strides(name: str, stride: Sequence[int]) -> dict[str, int]:
    """Of batch, head and row of ``[B, H, L, D]``, or of packed ``[total, H, D]``."""
    b, h, row = stride[:3] if len(stride) == 4 else (0, stride[1], stride[0])
    return {f"{name}_b": b, f"{name}_h": h, f"{name}_l": row}


def _steps(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """The strides that lead anywhere, but the last one."""
    return [step for size, step in zip(shape[:-1], stride[:-1], strict=True) if size != 1]


def _common(problem: Problem, aligned: bool) -> tuple[dict[str, int], dict[str, Any]]:
    """The macros, and the numbers by their names in params.cuh, that every kernel takes.

    ``aligned``: whether query, key and value begin at multiples of 16 bytes.
    """
    spec, (query, key, value) = problem.spec, (problem.query, problem.key, problem.value)
    mask, slopes, table = (problem.meta(name) for name in ("attn_mask", "alibi_slopes", "block_table"))
    mask_type = 0 if mask is None else {torch.bool: 1, query.dtype: 2, torch.float32: 3}[mask.dtype]
    sizes = [x for meta in (query, key, value) for x in (meta.shape[-1], *_steps(meta.shape, meta.stride))]
    macros = {
        "BF16": int(query.dtype == torch.bfloat16),
        "ALIGNED": int(aligned and not any(x % 8 for x in sizes)),
        "PAGE_SIZE": 0 if table is None else key.shape[2],
        "MASK": mask_type,
        "ALIBI": int(slopes is not None),
        "SOFTCAP": int(spec.softcap > 0),
        "DROPOUT": int(problem.has("dropout_seed")),
        "NEGATIVE": int(spec.scale <= 0),
    }
    cu_seqlens = problem.meta("cu_seqlens_q")
    packed = cu_seqlens is not None
    numbers: dict[str, Any] = {
        **_strides("query", query.stride),
        **_strides("key", key.stride),
        **_strides("value", value.stride),
        "B": query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        "Hq": query.shape[1],
        "Hkv": key.shape[1],
        "Lq": 0 if packed else query.shape[2],
        "Lk": 0 if packed else problem.key_length,
        "D": query.shape[-1],
        "Dv": value.shape[-1],
        "total_q": query.shape[0] if packed else 0,
        "total_k": key.shape[0] if packed else 0,
        "num_pages": 0 if table is None else key.shape[0],
        "bottom_right": int(spec.q_offset is None),
        "q_offset": 0 if spec.q_offset is None else max(-_UNLIMITED, min(spec.q_offset, _UNLIMITED)),
        "window_left": _UNLIMITED if spec.window_left is None else min(spec.window_left, _FARTHEST),
        "window_right": _UNLIMITED if spec.window_right is None else min(spec.window_right, _FARTHEST),
        "threshold": spec.dropout_threshold,
        "scale": spec.scale / spec.softcap if spec.softcap else spec.scale * _LOG2E,
        "softcap": spec.softcap * _LOG2E,
        "keep_scale": 65536 / (65536 - spec.dropout_threshold) if spec.dropout_threshold < 65536 else 0.0,
        "grad_scale": spec.scale,
    }
    shape = lse_shape(query)
    numbers |= {"lse_b": 0 if packed else shape[1] * shape[2], "lse_h": shape[-1], "num_rows": math.prod(shape)}
    if mask is not None:
        broadcast = torch.empty_strided(mask.shape, mask.stride, device="meta").expand(*shape, problem.key_length)
        numbers |= dict(zip(("mask_b", "mask_h", "mask_q", "mask_k"), broadcast.stride(), strict=True))
    if table is not None:
        numbers |= {"table_b": table.stride[0], "table_p": table.stride[1]}
    if slopes is not None and len(slopes.shape) == 2:
        numbers["alibi_b"] = slopes.shape[1]
    if (sinks := problem.meta("sinks")) is not None:
        numbers["sinks_type"] = _TYPES[sinks.dtype]
    for name, field in (("q_offset", "q_offsets"), ("kv_lengths", "kv_lengths"), ("kv_starts", "kv_starts")):
        meta = problem.meta(name)
        numbers[f"{field}_are_64"] = int(meta is not None and meta.dtype == torch.int64)
    return macros, numbers


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _addresses(t: AttentionTensors, out: Tensor, lse: Tensor) -> Addresses:
    return Addresses(
        query=t.query.data_ptr(),
        key=t.key.data_ptr(),
        value=t.value.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        mask=_address(t.attn_mask),
        alibi_slopes=_address(t.alibi_slopes),
        sinks=_address(t.sinks),
        q_offsets=_address(t.q_offset),
        kv_lengths=_address(t.kv_lengths),
        kv_starts=_address(t.kv_starts),
        block_table=_address(t.block_table),
        cu_seqlens_q=_address(t.cu_seqlens_q),
        cu_seqlens_k=_address(t.cu_seqlens_k),
        seed=_address(t.dropout_seed),
    )


_DENSE = ("alibi_slopes", "sinks", "q_offset", "kv_lengths", "kv_starts", "cu_seqlens_q", "cu_seqlens_k")


def _with_dense_vectors(t: AttentionTensors) -> AttentionTensors:
    """Small tensors without gaps: kernels know no strides of theirs."""
    if t[4:] == (None,) * (len(t) - 4):
        return t
    return t._replace(**{name: x.contiguous() for name in _DENSE if (x := getattr(t, name)) is not None})


def why_not(problem: Problem) -> list[str]:
    reasons = []
    query = problem.query
    if query.device.type != launch.gpu.device_type:
        reasons.append(f"runs on GPU tensors, these are on {query.device.type}")
    elif int(re.sub(r"\D", "", arch := target_of(query.device).arch)) < 80:
        reasons.append(f"needs compute capability 8.0, this GPU is {arch}")
    if query.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"multiplies bfloat16 and float16, the input is {str(query.dtype).removeprefix('torch.')}")
    for name, meta in (("D", query), ("Dv", problem.value)):
        if not 1 <= meta.shape[-1] <= MAX_HEAD_DIM:
            reasons.append(f"{name} must lie in [1, {MAX_HEAD_DIM}], it is {meta.shape[-1]}")
    if max(problem.query_length, problem.key_length) >= MAX_LENGTH:
        reasons.append(f"takes at most {MAX_LENGTH - 1} rows and keys")
    if problem.op == "backward" and problem.has("block_table"):
        reasons.append("has no gradient of paged keys")
    return reasons


def _rows(problem: Problem) -> int | None:
    """All queries of a key head; None where nobody has said how many there are, and to look would be to wait."""
    queries = problem.spec.max_seqlen_q if problem.packed else problem.query_length
    return None if queries is None else queries * (problem.query.shape[1] // max(problem.key.shape[1], 1))


def _few_queries(problem: Problem) -> bool:
    """Whether one tile of decode holds all queries of a key head."""
    rows = _rows(problem)
    return rows is not None and rows <= DECODE_ROWS


def _num_splits(problem: Problem, split: int) -> int:
    """Parts of so many keys."""
    most = problem.spec.max_seqlen_k if problem.packed else None
    return max(-(-(problem.key_length if most is None else most) // split), 1)


def slower_than_triton(problem: Problem) -> bool:
    """As measured on Hopper: where the kernels for sm_80 compute more than a few queries.

    See ``benchmarks/results/nvidia-h100-80gb-hbm3`` and ``nvidia-h200``.
    """
    if unavailable() or (arch := target_of(problem.device).arch) != "sm_90a":
        return False
    if problem.op == "forward" and _few_queries(problem):
        return False
    macros, _ = _common(problem, True)
    return bool(not_for_hopper(problem, macros, arch))


def _slots(x: TensorMeta, cu_seqlens: TensorMeta | None, rows: int, block: int) -> dict[str, int]:
    """How many tiles of ``block`` rows a sample of ``x`` has, and how many slots for tiles the batch: see ``tile_of``.

    ``rows`` is the number of rows of each token.
    """
    if cu_seqlens is not None:
        return {"tiles": 0, "slots": x.shape[0] * rows // block + cu_seqlens.shape[0] - 1}
    tiles = -(-x.shape[2] * rows // block)
    return {"tiles": tiles, "slots": tiles * x.shape[0]}


def _aligned(*addresses: int) -> bool:
    return not any(address % 16 for address in addresses)


# ---- forward -------------------------------------------------------------------------------------------------


def not_for_hopper(problem: Problem, macros: dict[str, int], arch: str) -> list[str]:
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
    if any(step == 0 for meta in tensors for step in _steps(meta.shape, meta.stride)):
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


def _hopper_kernel(op: str, problem: Problem, macros: dict[str, int]) -> Kernel:
    """For sm_90a. Of the forward's, few queries of heads that share their keys are rows of one tile."""
    cu_seqlens, rows = problem.meta("cu_seqlens_k"), _rows(problem)
    length = problem.key_length / (1 if cu_seqlens is None else max(cu_seqlens.shape[0] - 1, 1))
    keys = length / 2 if _is_triangle(problem.spec) else length  # that a row sees on average
    if rows is not None and rows <= HOPPER_ROWS:
        keys = min(keys, HOPPER_SPLIT)
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


def _hopper_launch(
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
    slots = _slots(tiled, cu_seqlens, 1, keys if of_keys else rows)
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


class ForwardPlan(NamedTuple):
    """One kind of call: all but its addresses."""

    launches: tuple[Launch, ...]
    num_splits: int  # parts of the keys, of `split` keys
    split: int


@functools.lru_cache(maxsize=4096)
def forward_plan(problem: Problem, target: Target, out_stride: tuple[int, ...], aligned: bool) -> ForwardPlan:
    query, key, rows = problem.query, problem.key, _rows(problem)
    macros, numbers = _common(problem, aligned)
    numbers |= _strides("out", out_stride)
    Dv, Hq = problem.value.shape[-1], query.shape[1]
    few, num_splits, split = _few_queries(problem), 1, SPLIT
    if not few and not not_for_hopper(problem, macros, target.arch):
        kernel = _hopper_kernel("forward", problem, macros)
        split = HOPPER_SPLIT // kernel.tiles.BLOCK_N * kernel.tiles.BLOCK_N
        if rows is not None and rows <= HOPPER_ROWS:
            num_splits = _num_splits(problem, split)
        numbers |= {"num_splits": num_splits, "split": split}
        launches = [_hopper_launch(kernel, problem, target, numbers, num_splits=num_splits)]
    else:
        kind = "forward"
        if few:
            kind = "decode" if rows is not None and rows <= 16 else "tall decode"
            macros["ROWS"] = Hq // max(key.shape[1], 1) or 1
            num_splits = _num_splits(problem, split)
        kernel = kernel_of(kind, (query.shape[-1], Dv), macros)
        numbers |= _slots(query, problem.meta("cu_seqlens_q"), kernel.ROWS, kernel.tiles.BLOCK_M)
        numbers |= {"num_splits": num_splits, "split": split}
        blocks = numbers["slots"] * (Hq // kernel.ROWS) * num_splits
        launches = [Launch(kernel, blocks, pack_numbers(numbers))]
    if num_splits > 1:
        numbers["Lq"] = lse_shape(query)[-1]
        combine = combine_kernel(Dv, macros["BF16"])
        launches.append(Launch(combine, numbers["num_rows"], pack_numbers(numbers)))
    return ForwardPlan(tuple(launches), num_splits, split)


def forward(spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    t = _with_dense_vectors(t)
    out = empty_output(t.query, t.value.shape[-1])
    lse = t.query.new_empty(lse_shape(t.query), dtype=torch.float32)
    addresses = _addresses(t, out, lse)
    problem = Problem.of("forward", spec, t)
    plan = forward_plan(problem, target_of(t.query.device), out.stride(), _aligned(*addresses[:3]))
    if plan.num_splits > 1:
        partial_lse = lse.new_empty((plan.num_splits, *lse.shape))
        partial_out = lse.new_empty((*partial_lse.shape, out.shape[-1]))
        addresses = addresses._replace(partial_out=partial_out.data_ptr(), partial_lse=partial_lse.data_ptr())
    run(plan.launches, addresses, t.query.device)
    return out, lse


# ---- backward ------------------------------------------------------------------------------------------------


def _split_launches(
    problem: Problem,
    arch: str,
    macros: dict[str, int],
    ordered: bool,
    start: Callable[[Kernel, int, dict[str, int]], Launch],
) -> list[Launch]:
    """The kernels for sm_80 that find the gradients of query, key and value."""
    query, key = problem.query, problem.key
    head_dims = (query.shape[-1], problem.value.shape[-1])
    launches = []
    dkdv = kernel_of("dkdv", head_dims, macros)
    both = None if ordered else unordered(dkdv, head_dims, macros, arch)
    dkdv = both or dkdv
    slots = _slots(key, problem.meta("cu_seqlens_k"), 1, dkdv.tiles.BLOCK_N)
    if max(dkdv.BLOCK_D, dkdv.BLOCK_DV) > 192:  # the sums of both do not fit a thread's registers
        launches.append(start(dkdv._replace(GRADIENTS=1, UNORDERED=0), slots["slots"] * key.shape[1], slots))
        dkdv = dkdv._replace(GRADIENTS=2)
    launches.append(start(dkdv, slots["slots"] * key.shape[1], slots))
    if both is None:
        dq = kernel_of("dq", head_dims, macros)
        slots = _slots(query, problem.meta("cu_seqlens_q"), 1, dq.tiles.BLOCK_M)
        launches.append(start(dq, slots["slots"] * query.shape[1], slots))
    return launches


@functools.lru_cache(maxsize=4096)
def backward_plan(
    problem: Problem,
    target: Target,
    strides: tuple[tuple[int, ...], ...],  # of out, grad_out, grad_query, grad_key, grad_value
    mask_sizes: tuple[int, int, int, int] | None,  # of the mask whose gradient is asked for
    aligned: bool,
    ordered: bool = True,
) -> tuple[Launch, ...]:
    """One kind of call: all but its addresses."""
    query = problem.query
    steps = _steps(query.shape, strides[0]) + _steps(query.shape, strides[1])
    macros, numbers = _common(problem, aligned and not any(x % 8 for x in steps))
    for name, stride in zip(("out", "grad_out", "grad_query", "grad_key", "grad_value"), strides, strict=True):
        numbers |= _strides(name, stride)
    head_dims = (query.shape[-1], problem.value.shape[-1])

    def start(kernel: Kernel, blocks: int, more: dict[str, int]) -> Launch:
        return Launch(kernel, blocks, pack_numbers(numbers | more))

    preprocess = preprocess_kernel(head_dims[1], macros["BF16"], macros["ALIGNED"])
    rows = preprocess.ROWS * preprocess.threads // 32
    launches = [start(preprocess, -(-numbers["num_rows"] // rows), {"Lq": lse_shape(query)[-1]})]
    if not not_for_hopper(problem, macros, target.arch):
        grad_out = query._replace(shape=(*query.shape[:-1], head_dims[1]), stride=strides[1])
        kinds = [("dkdv", 3), ("dq", 3)]
        if sum(columns_of(head_dims)) > 256:  # as below
            kinds[:1] = [("dkdv", 1), ("dkdv", 2)]
        for op, gradients in kinds:
            kernel = _hopper_kernel(op, problem, macros | {"GRADIENTS": gradients})
            launches.append(_hopper_launch(kernel, problem, target, numbers, op == "dkdv", grad_out))
    else:
        launches += _split_launches(problem, target.arch, macros, ordered, start)
    if mask_sizes is not None:
        dmask = kernel_of("dmask", head_dims, macros)
        B, H, Lq, Lk = mask_sizes
        blocks = B * H * -(-Lq // dmask.tiles.BLOCK_M) * -(-Lk // dmask.tiles.BLOCK_N)
        launches.append(start(dmask, blocks, {"mask_B": B, "mask_H": H, "mask_Lq": Lq, "mask_Lk": Lk}))
    return tuple(launches)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # of query, key, value, attn_mask, sinks


def _dense_rows(x: Tensor) -> Tensor:
    """With elements of a row side by side, and not expanded."""
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


def backward(
    spec: AttentionSpec,
    t: AttentionTensors,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs_mask_grad: bool,
) -> Gradients:
    t = _with_dense_vectors(t)
    out, grad_out, lse = _dense_rows(out), _dense_rows(grad_out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty_like(lse)
    grads = torch.empty_like(t.query), torch.empty_like(t.key), torch.empty_like(t.value)
    grad_mask, mask_sizes = None, None
    if needs_mask_grad:
        assert t.attn_mask is not None
        grad_mask = t.attn_mask.new_empty(t.attn_mask.shape)
        mask_sizes = ((1,) * (4 - grad_mask.dim()) + tuple(grad_mask.shape))[:4]
    addresses = _addresses(t, out, lse)._replace(
        grad_out=grad_out.data_ptr(),
        grad_lse=_address(grad_lse),
        delta=delta.data_ptr(),
        grad_query=grads[0].data_ptr(),
        grad_key=grads[1].data_ptr(),
        grad_value=grads[2].data_ptr(),
        grad_mask=_address(grad_mask),
    )
    problem = Problem.of("backward", spec, t)
    strides = tuple(x.stride() for x in (out, grad_out, *grads))
    aligned = _aligned(*addresses[:4], addresses.grad_out)
    ordered = spec.deterministic or torch.are_deterministic_algorithms_enabled()
    launches = backward_plan(problem, target_of(t.query.device), strides, mask_sizes, aligned, ordered)
    query_sums = None
    if any(launch.kernel.UNORDERED for launch in launches):
        query_sums = lse.new_zeros((*lse.shape, t.query.shape[-1]))
        addresses = addresses._replace(query_sums=query_sums.data_ptr())
    run(launches, addresses, t.query.device)
    if query_sums is not None:
        grads[0].copy_(query_sums.transpose(0, 1) if problem.packed else query_sums)
    return *grads, grad_mask, None if t.sinks is None else sink_gradient(t.sinks, lse, delta)


# ---- explain -------------------------------------------------------------------------------------------------


def describe(problem: Problem) -> str:
    macros, _ = _common(problem, True)
    target = target_of(problem.query.device)
    arch, missing = target.arch, not_for_hopper(problem, macros, target.arch)
    older = f" (sm_80's kernels: {'; '.join(missing)})" if arch == "sm_90a" and missing else ""
    if problem.op == "backward":
        strides = (problem.query.stride,) * 3 + (problem.key.stride, problem.value.stride)
        launches = backward_plan(problem, target, strides, None, True, problem.spec.deterministic)[1:]
        tiles = {launch.kernel.name: launch.kernel.tiles for launch in launches}
        both = any(launch.kernel.UNORDERED for launch in launches)
        roles = ["keys, and queries in any order"] if both else ["keys", "queries"]
        return f"{arch}, {'; '.join(f'{role}: {t}' for role, t in zip(roles, tiles.values(), strict=True))}{older}"
    plan = forward_plan(problem, target, problem.query.stride, True)
    older = "" if _few_queries(problem) else older
    parts = "" if plan.num_splits == 1 else f"{plan.num_splits} parts of {plan.split} keys, "
    return f"{arch}, {parts}{plan.launches[0].kernel.tiles}{older}"
