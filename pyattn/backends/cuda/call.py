"""What the CUDA kernels take of a call: macros, numbers and addresses, and how many tiles it has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyattn.backends.cuda.launch import Addresses
from pyattn.spec import AttentionTensors, Problem, TensorMeta, lse_shape

DECODE_ROWS = 64  # query heads times queries of a key head, up to which one tile of decode holds them
_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_LOG2E = math.log2(math.e)
_UNLIMITED = 2**62
_FARTHEST = 2**61  # of a window that has a side


def strides(name: str, stride: Sequence[int]) -> dict[str, int]:
    """Of batch, head and row of ``[B, H, L, D]``, or of packed ``[total, H, D]``."""
    b, h, row = stride[:3] if len(stride) == 4 else (0, stride[1], stride[0])
    return {f"{name}_b": b, f"{name}_h": h, f"{name}_l": row}


def steps(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """The strides that lead anywhere, but the last one."""
    return [step for size, step in zip(shape[:-1], stride[:-1], strict=True) if size != 1]


def common(problem: Problem, aligned: bool) -> tuple[dict[str, int], dict[str, Any]]:
    """The macros, and the numbers by their names in params.cuh, that every kernel takes.

    ``aligned``: whether query, key and value begin at multiples of 16 bytes.
    """
    spec, (query, key, value) = problem.spec, (problem.query, problem.key, problem.value)
    mask, slopes, table = (problem.meta(name) for name in ("attn_mask", "alibi_slopes", "block_table"))
    mask_type = 0 if mask is None else {torch.bool: 1, query.dtype: 2, torch.float32: 3}[mask.dtype]
    sizes = [x for meta in (query, key, value) for x in (meta.shape[-1], *steps(meta.shape, meta.stride))]
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
        **strides("query", query.stride),
        **strides("key", key.stride),
        **strides("value", value.stride),
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


def address_of(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def addresses(t: AttentionTensors, out: Tensor, lse: Tensor) -> Addresses:
    return Addresses(
        query=t.query.data_ptr(),
        key=t.key.data_ptr(),
        value=t.value.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        mask=address_of(t.attn_mask),
        alibi_slopes=address_of(t.alibi_slopes),
        sinks=address_of(t.sinks),
        q_offsets=address_of(t.q_offset),
        kv_lengths=address_of(t.kv_lengths),
        kv_starts=address_of(t.kv_starts),
        block_table=address_of(t.block_table),
        cu_seqlens_q=address_of(t.cu_seqlens_q),
        cu_seqlens_k=address_of(t.cu_seqlens_k),
        seed=address_of(t.dropout_seed),
    )


_DENSE = ("alibi_slopes", "sinks", "q_offset", "kv_lengths", "kv_starts", "cu_seqlens_q", "cu_seqlens_k")


def with_dense_vectors(t: AttentionTensors) -> AttentionTensors:
    """Small tensors without gaps: kernels know no strides of theirs."""
    if t[4:] == (None,) * (len(t) - 4):
        return t
    return t._replace(**{name: x.contiguous() for name in _DENSE if (x := getattr(t, name)) is not None})


def rows(problem: Problem) -> int | None:
    """All queries of a key head; None where nobody has said how many there are, and to look would be to wait."""
    queries = problem.spec.max_seqlen_q if problem.packed else problem.query_length
    return None if queries is None else queries * (problem.query.shape[1] // max(problem.key.shape[1], 1))


def few_queries(problem: Problem) -> bool:
    """Whether one tile of decode holds all queries of a key head."""
    found = rows(problem)
    return found is not None and found <= DECODE_ROWS


def num_splits(problem: Problem, split: int) -> int:
    """Parts of so many keys."""
    most = problem.spec.max_seqlen_k if problem.packed else None
    return max(-(-(problem.key_length if most is None else most) // split), 1)


def slots(x: TensorMeta, cu_seqlens: TensorMeta | None, rows: int, block: int) -> dict[str, int]:
    """How many tiles of ``block`` rows a sample of ``x`` has, and how many slots for tiles the batch: see ``tile_of``.

    ``rows`` is the number of rows of each token.
    """
    if cu_seqlens is not None:
        return {"tiles": 0, "slots": x.shape[0] * rows // block + cu_seqlens.shape[0] - 1}
    tiles = -(-x.shape[2] * rows // block)
    return {"tiles": tiles, "slots": tiles * x.shape[0]}


def aligned(*addresses: int) -> bool:
    return not any(address % 16 for address in addresses)
