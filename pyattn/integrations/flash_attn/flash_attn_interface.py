"""The functions of flash-attn 2, under their names, with their arguments in their order.

Dao 2023, arXiv:2307.08691. They run wherever pyattn runs, in every dtype and head dim that it has.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyattn.integrations.flash_attn import _calls
from pyattn.integrations.flash_attn._calls import Options

Window = Any  # a pair, or a tensor of two


def _options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
) -> Options:
    window, softcap = _calls.window(window_size), _calls.softcap(softcap)
    return Options(causal, window, softcap, softmax_scale, alibi_slopes, None, dropout_p, deterministic)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of tensors ``[B, L, H, D]``.

    Args:
        q: ``[B, Lq, Hq, D]``.
        k: ``[B, Lk, Hkv, D]``; ``Hq`` is a multiple of ``Hkv``.
        v: ``[B, Lk, Hkv, Dv]``.
        dropout_p: probability of dropping a weight.
        softmax_scale: defaults to ``1 / sqrt(D)``.
        causal: the last query sees the last key (bottom-right), and each one before it a key less.
        window_size: ``(left, right)``, a pair or a tensor: row i sees keys
            ``[i + Lk - Lq - left, i + Lk - Lq + right]``; -1 is unlimited.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 or less for none.
        alibi_slopes: float32 ``[Hq]`` or ``[B, Hq]``: adds ``-slope * |i + Lk - Lq - j|``.
        deterministic: equal inputs give equal gradients.
        return_attn_probs: return ``(out, softmax_lse, None)``; the lse is ``[B, Hq, Lq]``, of a row without keys -inf.
            The third has weights in flash-attn, with dropout, for its tests. There are none here.

    Returns:
        ``[B, Lq, Hq, Dv]``.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import torch
        >>> from pyattn.integrations.flash_attn import flash_attn_func
        >>> q, k = torch.randn(2, 100, 8, 64), torch.randn(2, 120, 2, 64)
        >>> flash_attn_func(q, k, k, causal=True, window_size=(16, 0)).shape
        torch.Size([2, 100, 8, 64])
    """
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    out, lse = _calls.dense(q, k, v, options)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``flash_attn_func`` of key and value in one tensor ``[B, Lk, 2, Hkv, D]``.

    Example:
        >>> import torch
        >>> from pyattn.integrations.flash_attn import flash_attn_kvpacked_func
        >>> flash_attn_kvpacked_func(torch.randn(2, 10, 8, 64), torch.randn(2, 12, 2, 4, 64), causal=True).shape
        torch.Size([2, 10, 8, 64])
    """
    return flash_attn_func(q, *_calls.unpack("kv", kv, 2, varlen=False), *args, **kwargs)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``flash_attn_func`` of query, key and value in one tensor ``[B, L, 3, H, D]``.

    Example:
        >>> import torch
        >>> from pyattn.integrations.flash_attn import flash_attn_qkvpacked_func
        >>> flash_attn_qkvpacked_func(torch.randn(2, 10, 3, 8, 64)).shape
        torch.Size([2, 10, 8, 64])
    """
    return flash_attn_func(*_calls.unpack("qkv", qkv, 3, varlen=False), *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention of sequences one after the other in ``[total, H, D]``, none of which sees another.

    Args:
        q: ``[total_q, Hq, D]``.
        k: ``[total_k, Hkv, D]``, or with ``block_table`` pages ``[num_pages, page_size, Hkv, D]`` of any size.
        v: as k, with ``Dv``.
        cu_seqlens_q: int32 ``[B + 1]``, where each sequence begins; from 0 to ``total_q``.
        cu_seqlens_k: the same for the keys.
        max_seqlen_q: at least the longest sequence.
        max_seqlen_k: the same for the keys.
        block_table: int32 ``[B, max_pages]``; no gradient.

    The other arguments are those of ``flash_attn_func``.

    Returns:
        ``[total_q, Hq, Dv]``; with ``return_attn_probs`` ``(out, softmax_lse, None)``, the lse ``[Hq, total_q]``.

    Example:
        >>> import torch
        >>> from pyattn.integrations.flash_attn import flash_attn_varlen_func
        >>> q, begins = torch.randn(10, 8, 64), torch.tensor([0, 3, 10], dtype=torch.int32)
        >>> flash_attn_varlen_func(q, q, q, begins, begins, 7, 7, causal=True).shape
        torch.Size([10, 8, 64])
    """
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    out, lse = _calls.packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options, block_table=block_table
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``flash_attn_varlen_func`` of key and value in one tensor ``[total_k, 2, Hkv, D]``."""
    return flash_attn_varlen_func(q, *_calls.unpack("kv", kv, 2, varlen=True), *args, **kwargs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, *args: Any, **kwargs: Any
) -> Any:
    """``flash_attn_varlen_func`` of query, key and value in one tensor ``[total, 3, H, D]``."""
    q, k, v = _calls.unpack("qkv", qkv, 3, varlen=True)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Writes new keys and values into a cache, in place, then attends over all that is in it. No gradient.

    Args:
        q: ``[B, Lq, Hq, D]``.
        k_cache: ``[B', size, Hkv, D]``, or with ``block_table`` pages ``[num_pages, page_size, Hkv, D]`` of any size.
        v_cache: the same, with ``Dv``.
        k: ``[B, L, Hkv, D]``, written at ``cache_seqlens``, ``cache_seqlens + 1`` and so on; None to write nothing.
        v: ``[B, L, Hkv, Dv]``.
        rotary_cos: ``[positions, R / 2]``: k is turned by its place in the cache; q by ``cache_seqlens + i`` if causal
            or with a window, else every row by ``cache_seqlens``.
        rotary_sin: the same.
        cache_seqlens: an int, or int32 ``[B]``, what each sample holds before; None for all of the cache.
        cache_batch_idx: int32 ``[B]``, the sample of the cache that each one of q has.
        cache_leftpad: int32 ``[B]``, where the keys of each sample begin.
        block_table: int32 ``[B, max_pages]``.
        rotary_interleaved: whether a pair is ``(2 i, 2 i + 1)``, or ``(i, i + R / 2)``.
        num_splits: has no effect: pyattn splits as it sees fit.
        return_softmax_lse: return ``(out, softmax_lse)``.

    The other arguments are those of ``flash_attn_func``, with the keys in the cache after writing.

    Returns:
        ``[B, Lq, Hq, Dv]``.

    Raises:
        TypeError, ValueError: naming the argument; the new keys do not fit.

    Example:
        >>> import torch
        >>> from pyattn.integrations.flash_attn import flash_attn_with_kvcache
        >>> cache, new = torch.zeros(2, 128, 4, 64), torch.randn(2, 1, 4, 64)
        >>> out = flash_attn_with_kvcache(torch.randn(2, 1, 8, 64), cache, cache.clone(), new, new, cache_seqlens=5)
        >>> torch.equal(cache[:, 5:6], new)
        True
    """
    options = _options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, True)
    out, lse = _calls.with_cache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        options,
        rotary=_calls.rotary(rotary_cos, rotary_sin, rotary_interleaved),
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
    )
    return (out, lse) if return_softmax_lse else out
