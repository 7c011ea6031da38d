"""Attention over a KV cache: append, then attend."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from pyattn import checks, functional, ops, projection
from pyattn.functional import Window
from pyattn.kv_cache import Append, Ints, KVCache
from pyattn.kv_cache_state import Span
from pyattn.merging import merge_attention
from pyattn.projection import Rotary


def _check(query: Any, cache: Any, key: Any, value: Any, lengths: Any) -> None:
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a pyattn.KVCache, got {type(cache).__name__}")
    checks.check_tensor("query", query, (cache.dtype,), cache.key, "the cache")
    if query.dim() != 4 or query.shape[0] != cache.batch or query.shape[3] != cache.head_dim:
        raise ValueError(
            f"query must have shape [B, Hq, Lq, D] with the cache's B = {cache.batch} and D = {cache.head_dim}, "
            f"got {list(query.shape)}"
        )
    checks.check_heads(query.shape[1], cache.num_kv_heads)
    if (key is None) != (value is None):
        raise ValueError(f"{'key' if key is None else 'value'} must come with the other of key and value, got None")
    if key is None and lengths is not None:
        raise ValueError("lengths must come with key and value, got neither")


def _check_prefix(prefix: Any, cache: KVCache, window: Any, alibi_slopes: Any) -> None:
    if not isinstance(prefix, KVCache):
        raise TypeError(f"prefix must be a pyattn.KVCache, got {type(prefix).__name__}")
    if prefix.batch != 1:
        raise ValueError(f"prefix must hold one sample, got {prefix.batch}")
    if prefix is cache:
        raise ValueError("prefix must be another cache than cache, got the same")
    for name in ("num_kv_heads", "head_dim", "v_head_dim", "dtype", "device"):
        if getattr(prefix, name) != getattr(cache, name):
            raise ValueError(
                f"prefix must have the cache's {name} ({getattr(cache, name)}), got {getattr(prefix, name)}"
            )
    for name, x in (("window", window), ("alibi_slopes", alibi_slopes)):
        if x is not None:
            raise ValueError(f"{name} must not come with prefix: it counts in buffer indices of one cache")


def _turn(
    query: Tensor,
    key: Tensor | None,
    cache: KVCache,
    append: Append | None,
    rotary: Any,
    positions: Any,
    before: int,
) -> tuple[Tensor, Tensor | None]:
    """Query and key, turned by their positions; ``before`` is that of the cache's first token."""
    if rotary is None:
        if positions is not None:
            raise ValueError("positions must come with rotary, got no rotary")
        return query, key
    L = query.shape[2]
    if positions is None:
        if append is None:
            if any(n < L for n in cache.span.seen):
                raise ValueError(f"query must have at most the tokens that the cache has seen, got {L} without a key")
            positions = cache.positions(L) + (before - L)
        else:
            positions = cache.positions(L, append.counts) + before
        needed = before + max(cache.span.seen if append is None else append.span.seen, default=0)
        if isinstance(rotary, Rotary) and isinstance(rotary.cos, Tensor) and rotary.cos.shape[:1] < (needed,):
            raise ValueError(f"rotary must have at least {needed} positions, got {rotary.cos.shape[0]}")
    if key is None:
        return projection.apply_rotary(query, query[:, :0], rotary, positions)[0], None
    return projection.apply_rotary(query, key, rotary, positions)


def cut(cache: KVCache, append: Append | None, attn_mask: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Key, value, block table and mask, cut to the columns that the mask has."""
    key, value, table = cache.key, cache.value, cache.block_table
    if attn_mask is None:
        return key, value, table, None
    checks.check_tensor("attn_mask", attn_mask, (torch.bool, *checks.FLOAT_DTYPES), cache.key, "the cache")
    longest = max((cache.span if append is None else append.span).lengths, default=0)
    if attn_mask.dim() and attn_mask.shape[-1] not in (1, longest):
        raise ValueError(
            f"attn_mask must have 1 column, or one for each of the {longest} buffer indices up to the largest of the "
            f"cache's lengths, got {list(attn_mask.shape)}"
        )
    if append is not None and any(append.shifts) and attn_mask.dim() and attn_mask.shape[-1] > 1:
        raise ValueError(
            "attn_mask must have the buffer indices after the append, which would move some: call cache.make_room first"
        )
    if table is None or cache.page_size is None:
        return key[:, :, :longest], value[:, :, :longest], None, attn_mask
    columns = -(-longest // cache.page_size)
    if attn_mask.dim() and attn_mask.shape[-1] > 1:  # up to the end of the last page; no sample's length is as large
        attn_mask = torch.nn.functional.pad(attn_mask, (0, columns * cache.page_size - longest))
    return key, value, table[:, :columns], attn_mask


def _starts(span: Span) -> Tensor | None:
    return span.tensor("starts") if any(span.starts) else None


def attention_with_kv_cache(
    query: Tensor,
    cache: KVCache,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    lengths: Ints | None = None,
    prefix: KVCache | None = None,
    rotary: Rotary | None = None,
    positions: Tensor | None = None,
    attn_mask: Tensor | None = None,
    causal: bool = True,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Appends new keys and values to a cache, then attends over all that is live in it.

    One function for prefill (many tokens into an empty cache), chunked prefill, decode (one token) and speculative
    decode (several, under a tree mask). With a key, row i of the query is the i-th new token, and its ``pos`` the
    buffer index of that; without, the last row is the last token of the cache. A call that is refused leaves the cache
    as it was.

    Args:
        query: ``[B, Hq, Lq, D]``, of the cache's dtype; ``Hq`` is a multiple of its ``Hkv``.
        cache: a ``pyattn.KVCache``, changed in place.
        key: ``[B, Hkv, Lq, D]``, the new keys; None to append nothing.
        value: ``[B, Hkv, Lq, Dv]``.
        lengths: how many of the new tokens each sample gets, the first ones: a list, or int32 or int64 ``[B]``; None
            for all. The other rows of the output mean nothing.
        prefix: a cache of one sample, whose tokens come before those of every sample of ``cache``, such as a prompt
            that all share: it is read once for all of them. It does not change. Not with ``window`` or
            ``alibi_slopes``.
        rotary: the angles by which query and key are turned before; the cache holds turned keys.
        positions: int32 or int64 ``[Lq]`` or ``[B, Lq]``, rows of the rotary tables; None for those that follow the
            tokens that the cache, and the prefix, have ``seen``. In a draft that is a tree it is the depth that counts.
        attn_mask: bool (True: attend) or float (added) of the query's dtype or float32, broadcastable to
            ``[B, Hq, Lq, max(lengths)]``, the cache's lengths after the append; columns are buffer indices. Combines
            with ``causal`` and ``window``; the prefix is seen whole.
        causal: a row sees keys up to its own; in a tree a parent must come before its children.
        window: ``(left, right)``: a row sees keys at ``[pos - left, pos + right]``.
        alibi_slopes: float32 ``[Hq]`` or ``[B, Hq]``: adds ``-slope * |pos - j|``.
        softcap: scores become ``softcap * tanh(score / softcap)``; None or 0 for none.
        sinks: ``[Hq]``, one more logit a head that takes weight and gives no value.
        scale: defaults to ``1 / sqrt(D)``.
        return_lse: also return the log-sum-exp of the scores.
        backend: None for the best that can, or the name of one, which then raises if it cannot.

    Returns:
        ``out`` ``[B, Hq, Lq, Dv]``, with ``return_lse`` the pair ``(out, lse)``, as of ``pyattn.attention``. Computed
        in the cache's dtype, under autocast, too. Differentiable in the query if the cache is dense and does not
        change before the backward.

    Raises:
        TypeError, ValueError: naming the argument; a sample would exceed the cache's ``max_length``, or its pages are
            not enough.
        NotImplementedError: the named backend cannot compute this; key or value requires a gradient.

    Example:
        >>> import torch, pyattn
        >>> cache = pyattn.KVCache(2, 4, 64, max_length=100)
        >>> q, k, v = torch.randn(2, 8, 30, 64), torch.randn(2, 4, 30, 64), torch.randn(2, 4, 30, 64)
        >>> first = pyattn.attention_with_kv_cache(q[:, :, :29], cache, k[:, :, :29], v[:, :, :29])
        >>> last = pyattn.attention_with_kv_cache(q[:, :, 29:], cache, k[:, :, 29:], v[:, :, 29:])
        >>> torch.testing.assert_close(torch.cat((first, last), 2), pyattn.attention(q, k, v, causal=True))
    """
    _check(query, cache, key, value, lengths)
    if prefix is not None:
        checks.check_bool("return_lse", return_lse)
        _check_prefix(prefix, cache, window, alibi_slopes)
    query = query if query.stride(-1) == 1 else query.contiguous()
    append = None
    q_offset = None
    if key is not None and value is not None:
        append = cache.prepare(key, value, lengths)
        if key.shape[2] != query.shape[2]:
            raise ValueError(f"key must have the length of query ({query.shape[2]}), got {key.shape[2]}")
        if any(count != query.shape[2] for count in append.counts):  # else rows and keys end together
            q_offset = torch.tensor(append.firsts, device="cpu").to(query.device, non_blocking=True)
    before = 0 if prefix is None else prefix.span.seen[0]
    query, key = _turn(query, key, cache, append, rotary, positions, before)
    buffers = cut(cache, append, attn_mask)
    span = cache.span if append is None else append.span
    autocasts = checks.autocasts(query)  # else it would cast the cache, anew in each call
    with torch.autocast(query.device.type, enabled=False) if autocasts else contextlib.nullcontext():
        call, tensors = functional.prepare(
            query,
            *buffers[:2],
            causal=causal,
            window=window,
            q_offset=q_offset,
            attn_mask=buffers[3],
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            sinks=sinks,
            kv_lengths=span.tensor("lengths"),
            kv_starts=_starts(span),
            block_table=buffers[2],
            scale=scale,
            return_lse=return_lse or prefix is not None,
            backend=backend,
        )
        calls = [(call, tensors)]
        if prefix is not None:  # the samples' queries are queries of its one sample
            calls += [
                functional.prepare(
                    query.transpose(0, 1).flatten(1, 2)[None],
                    prefix.key,
                    prefix.value,
                    softcap=softcap,
                    kv_lengths=prefix.span.tensor("lengths"),
                    kv_starts=_starts(prefix.span),
                    block_table=prefix.block_table,
                    scale=scale,
                    return_lse=True,
                    backend=backend,
                )
            ]
        for call, tensors in calls:
            call.backend("forward", tensors)  # a refusal comes before the cache changes
        if append is not None and key is not None and value is not None:
            cache.commit(append, key, value)
        results = [ops.attention(*each, trusted=True) for each in calls]  # the caches' own numbers are right
    if prefix is None:
        return results[0]
    (out, lse), of_prefix = results
    prefix_out, prefix_lse = (x[0].unflatten(1, query.shape[:3:2]).transpose(0, 1) for x in of_prefix)
    merged = merge_attention((out, prefix_out), (lse, prefix_lse))
    return merged if return_lse else merged[0]
