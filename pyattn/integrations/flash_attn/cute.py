"""The functions of flash-attn 4, whose package is named ``flash_attn.cute``, with their arguments in their order.

They return a pair, the second None unless ``return_lse``. What steers its kernels (``num_splits``, ``pack_gqa``,
``scheduler_metadata``, ...) has no effect; functions of scores, block-sparse masks, gathered keys and ``qv`` raise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyattn.integrations.flash_attn import _calls
from pyattn.integrations.flash_attn._calls import Options
from pyattn.integrations.flash_attn.flash_attn_interface import Window


def _options(
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    sinks: Tensor | None,
    softcap: float,
    deterministic: bool,
) -> Options:
    window, softcap = _calls.window(window_size), _calls.softcap(softcap)
    return Options(causal, window, softcap, softmax_scale, sinks=sinks, deterministic=deterministic)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: None = None,
    gather_kv_indices: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: None = None,
    score_mod_bwd: None = None,
    mask_mod: None = None,
    aux_tensors: None = None,
    aux_scalars: None = None,
    block_sparse_tensors: None = None,
    block_sparse_tensors_bwd: None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As flash-attn 2's, with ``learnable_sink`` ``[Hq]``, one more logit a head that takes weight and gives no value.

    Example:
        >>> import torch
        >>> from pyattn.integrations.flash_attn.cute import flash_attn_func
        >>> q = torch.randn(2, 100, 8, 64)
        >>> out, lse = flash_attn_func(q, q, q, causal=True, learnable_sink=torch.zeros(8))
        >>> out.shape, lse
        (torch.Size([2, 100, 8, 64]), None)
    """
    _calls.refuse(
        qv=qv,
        gather_kv_indices=gather_kv_indices,
        score_mod=score_mod,
        score_mod_bwd=score_mod_bwd,
        mask_mod=mask_mod,
        aux_tensors=aux_tensors,
        aux_scalars=aux_scalars,
        block_sparse_tensors=block_sparse_tensors,
        block_sparse_tensors_bwd=block_sparse_tensors_bwd,
    )
    options = _options(softmax_scale, causal, window_size, learnable_sink, softcap, deterministic)
    out, lse = _calls.dense(q, k, v, options)
    return out, lse if return_lse else None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: None = None,
    score_mod_bwd: None = None,
    mask_mod: None = None,
    block_sparse_tensors: None = None,
    aux_tensors: None = None,
    aux_scalars: None = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Sequences in ``[total, H, D]`` with ``cu_seqlens``, or in ``[B, L, H, D]`` of which ``seqused`` count.

    Queries and keys are both packed, or neither is; packed queries may have pages of keys, with ``page_table`` and
    ``seqused_k``. What the output holds beyond ``seqused_q`` means nothing.
    """
    _calls.refuse(
        qv=qv,
        gather_kv_indices=gather_kv_indices,
        score_mod=score_mod,
        score_mod_bwd=score_mod_bwd,
        mask_mod=mask_mod,
        block_sparse_tensors=block_sparse_tensors,
        aux_tensors=aux_tensors,
        aux_scalars=aux_scalars,
    )
    options = _options(softmax_scale, causal, window_size, learnable_sink, softcap, deterministic)
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None or page_table is not None:
            raise NotImplementedError("cu_seqlens_q must be given with cu_seqlens_k or page_table, got None")
        out, lse = _calls.dense(q, k, v, options, used_q=seqused_q, used_k=seqused_k)
    else:
        if cu_seqlens_k is None and page_table is None:
            raise NotImplementedError("cu_seqlens_k or page_table must be given with cu_seqlens_q, got neither")
        out, lse = _calls.packed(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options,
            block_table=page_table, used_q=seqused_q, used_k=seqused_k,
        )  # fmt: skip
    return out, lse if return_lse else None
