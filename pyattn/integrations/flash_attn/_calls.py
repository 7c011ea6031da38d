"""What the three versions of flash-attn's functions share: their layouts and conventions, brought to pyattn's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyattn import checks, functional
from pyattn.projection import Rotary, apply_rotary


class Options(NamedTuple):
    """Arguments that mean the same in all functions, under pyattn's names."""

    causal: bool
    window: tuple[int | None, int | None] | None
    softcap: float
    scale: float | None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    deterministic: bool = True


def window(window_size: Any) -> tuple[int | None, int | None] | None:
    """``(left, right)`` of a tuple, list or tensor; -1 or None is unlimited."""
    sides = window_size.tolist() if isinstance(window_size, Tensor) else window_size
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise TypeError(f"window_size must be a pair (left, right), got {window_size!r}")
    left, right = (None if n is None or checks.check_int("window_size", n) < 0 else n for n in sides)
    return None if left is right is None else (left, right)


def softcap(softcap: float | None) -> float:
    return max(softcap or 0.0, 0.0)


def rotary(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Rotary | None:
    if cos is not None and sin is not None:
        return Rotary(cos, sin, interleaved)
    if cos is not None or sin is not None:
        raise ValueError(f"rotary_{'cos' if cos is None else 'sin'} must come with the other of both, got None")
    return None


def check_rank(rank: int, layout: str, **tensors: Any) -> None:
    for name, x in tensors.items():
        checks.check_tensor(name, x, checks.FLOAT_DTYPES)
        if x.dim() != rank:
            raise ValueError(f"{name} must have shape {layout}, got {list(x.shape)}")


def unpack(name: str, packed: Tensor, parts: int, *, varlen: bool) -> Any:
    """Query, key and value, or key and value, which lie side by side in one tensor."""
    lead = "total" if varlen else "B, L"
    check_rank(4 if varlen else 5, f"[{lead}, {parts}, H, D]", **{name: packed})
    if packed.shape[-3] != parts:
        raise ValueError(f"{name} must have shape [{lead}, {parts}, H, D], got {list(packed.shape)}")
    return packed.unbind(-3)


def refuse(**arguments: Any) -> None:
    """What pyattn has no kernel for."""
    for name, x in arguments.items():
        if x is not None:
            raise NotImplementedError(f"{name} is not supported by pyattn: it must be None")


def _offset(used_q: Tensor | None, keys: Tensor) -> Tensor | None:
    """The last query that is used meets the last key."""
    return None if used_q is None else keys - used_q


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    *,
    used_q: Tensor | None = None,
    used_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Out ``[B, Lq, Hq, Dv]`` and lse ``[B, Hq, Lq]`` of tensors ``[B, L, H, D]``."""
    check_rank(4, "[B, L, H, D]", q=q, k=k, v=v)
    if used_q is not None and used_k is None:
        used_k = torch.full_like(used_q, k.shape[1])
    out, lse = functional.attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        **options._asdict(),
        q_offset=None if used_k is None else _offset(used_q, used_k),
        kv_lengths=used_k,
        return_lse=True,
    )
    return out.transpose(1, 2), lse


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    options: Options,
    *,
    block_table: Tensor | None = None,
    used_q: Tensor | None = None,
    used_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Out ``[total_q, Hq, Dv]`` and lse ``[Hq, total_q]`` of tensors ``[total, H, D]``, or of pages of keys."""
    check_rank(3, "[total, H, D]", q=q)
    if block_table is not None:
        check_rank(4, "[num_pages, page_size, H, D]", k=k, v=v)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if used_k is None:
            if cu_seqlens_k is None:
                raise ValueError("cu_seqlens_k or seqused_k must be given with pages, got neither")
            used_k = cu_seqlens_k.diff()
        cu_seqlens_k = max_seqlen_k = None
    if used_q is not None and used_k is None and cu_seqlens_k is not None:
        used_k = cu_seqlens_k.diff()
    return functional.attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        **options._asdict(),
        q_offset=None if used_k is None else _offset(used_q, used_k),
        kv_lengths=used_k,
        block_table=block_table,
        return_lse=True,
    )


@torch.no_grad()
def with_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    options: Options,
    *,
    rotary: Rotary | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Writes k and v into the caches at ``cache_seqlens``, then attends over what is in them."""
    layout = "[B, L, H, D]" if block_table is None else "[num_pages, page_size, H, D]"
    check_rank(4, "[B, L, H, D]", q=q)
    check_rank(4, layout, k_cache=k_cache, v_cache=v_cache)
    B, Lq = q.shape[:2]
    size = k_cache.shape[1] if block_table is None else block_table.shape[1] * k_cache.shape[1]
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("cache_batch_idx must be None with a block table, which says where the keys are")
        checks.check_per_sample("cache_batch_idx", cache_batch_idx, q, B)
        block_table = cache_batch_idx.to(torch.int32)[:, None]  # a whole sample is a page
    elif block_table is None and k_cache.shape[0] != B:
        raise ValueError(f"k_cache must have the batch size of q ({B}) without cache_batch_idx, got {k_cache.shape[0]}")
    lengths = _lengths(cache_seqlens, size, q)
    if (k is None) != (v is None):
        raise ValueError(f"{'k' if k is None else 'v'} must come with the other of k and v, got None")
    if rotary is not None and k is None:
        raise ValueError("k must be given with rotary_cos: what is in the cache has been turned already")
    if k is not None and v is not None:
        if cache_seqlens is None:
            raise ValueError("cache_seqlens must be given with k, got None")
        check_rank(4, "[B, L, H, D]", k=k, v=v)
        if k.shape[0] != B or k.shape[:2] != v.shape[:2]:
            raise ValueError(f"k and v must have the batch size of q ({B}), got {list(k.shape)} and {list(v.shape)}")
        positions = lengths[:, None] + torch.arange(k.shape[1], device=q.device)
        if positions.device.type == "cpu" and positions.numel() and int(positions.max()) >= size:
            raise ValueError(f"k must fit in the {size} places of the cache, got position {int(positions.max())}")
        if rotary is not None:
            k = turn(k, rotary, positions)
            each = torch.arange(Lq, device=q.device) if options.causal or options.window is not None else 0
            q = turn(q, rotary, (lengths[:, None] + each).expand(B, Lq))
        where = _places(positions, block_table, k_cache)
        k_cache[where] = k
        v_cache[where] = v
        lengths = lengths + k.shape[1]
    q, keys, values = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    out, lse = functional.attention(
        q,
        keys,
        values,
        **options._asdict(),
        kv_lengths=lengths,
        kv_starts=cache_leftpad,
        block_table=block_table,
        return_lse=True,
    )
    return out.transpose(1, 2), lse


def _lengths(cache_seqlens: int | Tensor | None, size: int, q: Tensor) -> Tensor:
    if isinstance(cache_seqlens, Tensor):
        checks.check_per_sample("cache_seqlens", cache_seqlens, q, q.shape[0])
        return cache_seqlens
    length = size if cache_seqlens is None else checks.check_int("cache_seqlens", cache_seqlens)
    return torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)


def _places(positions: Tensor, block_table: Tensor | None, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the first two dimensions of a cache the tokens at ``positions`` are."""
    if block_table is None:
        return torch.arange(len(positions), device=positions.device)[:, None], positions
    pages = block_table.gather(1, positions // cache.shape[1])
    return pages, positions % cache.shape[1]


def turn(x: Tensor, rotary: Rotary, positions: Tensor) -> Tensor:
    """``x``, ``[B, L, H, D]``, turned by its positions ``[B, L]``."""
    x = x.transpose(1, 2)
    return apply_rotary(x, x[:, :0], rotary, positions)[0].transpose(1, 2)
