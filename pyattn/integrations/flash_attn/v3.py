"""The functions of flash-attn 3, whose module is named ``flash_attn_interface``, with their arguments in their order.

Shah et al. 2024, arXiv:2407.08608. Its functions have no dropout and no ALiBi. What steers its kernels (``num_splits``,
``pack_gqa``, ``sm_margin``, ``scheduler_metadata``) has no effect; scales of fp8, ``qv`` and ``attention_chunk`` raise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyattn.integrations.flash_attn import _calls
from pyattn.integrations.flash_attn._calls import Options
from pyattn.integrations.flash_attn.flash_attn_interface import Window


def _options(
    softmax_scale: float | None, causal: bool, window_size: Window, softcap: float, deterministic: bool, chunk: int
) -> Options:
    if chunk:
        raise NotImplementedError(f"attention_chunk is not supported by pyattn: it must be 0, got {chunk}")
    window, softcap = _calls.window(window_size), _calls.softcap(softcap)
    return Options(causal, window, softcap, softmax_scale, deterministic=deterministic)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """As flash-attn 2's; with ``return_attn_probs`` the pair ``(out, softmax_lse)``.

    Example:
        >>> import torch
        >>> from pyattn.integrations.flash_attn.v3 import flash_attn_func
        >>> q, k = torch.randn(2, 100, 8, 64), torch.randn(2, 120, 2, 64)
        >>> out, lse = flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 100, 8, 64]), torch.Size([2, 8, 100]))
    """
    _calls.refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    out, lse = _calls.dense(
        q, k, v, _options(softmax_scale, causal, window_size, softcap, deterministic, attention_chunk)
    )
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Of ``[B, L, 3, H, D]``, or with ``num_heads_q`` of ``[B, L, Hq + 2 Hkv, D]``: queries, then keys, then values."""
    if num_heads_q is None:
        q, k, v = _calls.unpack("qkv", qkv, 3, varlen=False)
    else:
        _calls.check_rank(4, "[B, L, Hq + 2 Hkv, D]", qkv=qkv)
        num_kv_heads, odd = divmod(qkv.shape[2] - num_heads_q, 2)
        if odd or num_kv_heads < 1:
            raise ValueError(f"qkv must have num_heads_q + 2 Hkv heads, got {qkv.shape[2]} with {num_heads_q} of q")
        q, k, v = qkv.split((num_heads_q, num_kv_heads, num_kv_heads), dim=2)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """As flash-attn 2's, of the first ``seqused_q`` queries and ``seqused_k`` keys of each sequence, int32 ``[B]``.

    What the output holds beyond ``seqused_q`` means nothing.
    """
    _calls.refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    options = _options(softmax_scale, causal, window_size, softcap, deterministic, attention_chunk)
    out, lse = _calls.packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options, used_q=seqused_q, used_k=seqused_k
    )
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: None = None,
    cu_seqlens_k_new: None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """As flash-attn 2's, with ``page_table`` for ``block_table``; packed queries and new keys are not supported."""
    _calls.refuse(
        qv=qv,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        rotary_seqlens=rotary_seqlens,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    out, lse = _calls.with_cache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        _options(softmax_scale, causal, window_size, softcap, True, attention_chunk),
        rotary=_calls.rotary(rotary_cos, rotary_sin, rotary_interleaved),
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=page_table,
    )
    return (out, lse) if return_softmax_lse else out
