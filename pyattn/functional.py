"""The public functions: check the call, build the spec, call the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyattn import checks, dispatch, nested, ops, reference
from pyattn.explanation import Explanation
from pyattn.spec import AttentionSpec, AttentionTensors, Problem, absent

Window = tuple[int | None, int | None]
_MOST_PREPARED = 4096
_prepared: dict[tuple[Any, ...], ops.Call] = {}  # the kinds of calls that have passed the checks


def _spec(
    tensors: AttentionTensors,
    batch: int,
    *,
    causal: bool,
    window: Window | None,
    q_offset: int | Tensor | None,
    softcap: float | None,
    dropout_p: float,
    scale: float | None,
    deterministic: bool,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[AttentionSpec, AttentionTensors]:
    """Checks what ``attention`` and ``attention_varlen`` share, and draws the dropout seed."""
    if isinstance(q_offset, Tensor):
        tensors, q_offset = tensors._replace(q_offset=q_offset), None
    elif q_offset is not None:
        q_offset = checks.check_int("q_offset", q_offset)
    left, right = checks.check_window(causal, window)
    checks.check_family(tensors, batch)
    softcap = 0.0 if softcap is None else checks.check_number("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be positive, or 0 or None for none, got {softcap}")
    if scale is None:
        head_dim = tensors.query.shape[-1]
        scale = head_dim**-0.5 if head_dim else 1.0
    else:
        scale = checks.check_number("scale", scale)
    if dropout_p is not False and not 0.0 <= checks.check_number("dropout_p", dropout_p) <= 1.0:  # torch takes False
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    if dropout_p != 0.0:
        info = torch.iinfo(torch.int64)
        device = tensors.query.device
        tensors = tensors._replace(dropout_seed=torch.randint(info.min, info.max, (), dtype=torch.int64, device=device))
    checks.check_bool("deterministic", deterministic)
    numbers = (scale, left, right, q_offset, softcap, dropout_p, max_seqlen_q, max_seqlen_k, deterministic)
    return AttentionSpec._make(numbers), tensors


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    q_offset: int | Tensor | None = None,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
    block_table: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    deterministic: bool = True,
) -> tuple[AttentionSpec, AttentionTensors]:
    """The checked spec and tensors of ``attention``, with the dropout seed that it draws."""
    checks.check_qkv(query, key, value, packed=False, paged=block_table is not None)
    tensors = AttentionTensors(
        query,
        key,
        value,
        attn_mask,
        alibi_slopes,
        sinks,
        kv_lengths=kv_lengths,
        kv_starts=kv_starts,
        block_table=block_table,
    )
    batch, num_heads, length = query.shape[:3]
    result = _spec(
        tensors,
        batch,
        causal=causal,
        window=window,
        q_offset=q_offset,
        softcap=softcap,
        dropout_p=dropout_p,
        scale=scale,
        deterministic=deterministic,
    )
    if attn_mask is not None:
        key_length = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]
        checks.check_mask(attn_mask, query, (batch, num_heads, length, key_length))
    return result


def _kind(t: AttentionTensors, dropout_p: float, numbers: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that the checks of a call look at, but the values in its tensors, hashable.

    None for what is seldom called again and again, or observed: masks, slopes, sinks and dropout are.
    """
    window = numbers[1]
    if (
        type(dropout_p) is not float
        or dropout_p
        or not (t.attn_mask is t.alibi_slopes is t.sinks is None)
        or not (window is None or (type(window) is tuple and all(side is None or type(side) is int for side in window)))
    ):
        return None
    given = t[:3] if absent(t[6:10]) else [x for x in t if x is not None]
    if not ops.unobserved(given):
        return None
    if t.block_table is not None and torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return None  # which is refused
    try:
        hash(numbers)
    except TypeError:
        return None
    metas = [(x.shape, x.stride(), x.dtype, x.device) for x in given]
    return numbers, *map(type, numbers), *map(type, t[6:10]), *metas  # True and 1.0 equal 1


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    q_offset: int | Tensor | None = None,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
    block_table: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    backend: str | None = None,
) -> tuple[ops.Call, AttentionTensors]:
    """What ``ops.attention`` computes of the arguments of ``attention``; of a kind of call the checks are made once."""
    offset, offsets = (None, q_offset) if isinstance(q_offset, Tensor) else (q_offset, None)
    tensors = AttentionTensors(
        query, key, value, attn_mask, alibi_slopes, sinks, offsets, kv_lengths, kv_starts, block_table
    )
    kind = _kind(tensors, dropout_p, (causal, window, offset, softcap, scale, deterministic, return_lse, backend))
    if kind is not None and (call := _prepared.get(kind)) is not None:
        return call, tensors
    name = dispatch.check_backend(backend)
    checks.check_bool("return_lse", return_lse)
    spec, tensors = dense(
        query,
        key,
        value,
        causal=causal,
        window=window,
        q_offset=q_offset,
        attn_mask=attn_mask,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        kv_lengths=kv_lengths,
        kv_starts=kv_starts,
        block_table=block_table,
        dropout_p=dropout_p,
        scale=scale,
        deterministic=deterministic,
    )
    call = ops.prepare(spec, tensors, name, return_lse)
    if kind is not None:
        if len(_prepared) >= _MOST_PREPARED:
            _prepared.clear()
        _prepared[kind] = call
    return call, tensors


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    q_offset: int | Tensor | None = None,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
    block_table: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Exact softmax attention that never materialises the score matrix.

    Computes ``softmax(scale * query @ key^T + bias, masked) @ value`` in this order: scale, softcap, bias or ALiBi,
    mask, softmax (with sinks), dropout, value. A row that may see no key gives 0, never NaN.

    Query, key and value may be nested tensors ``[B, H, j, D]`` of layout ``torch.jagged``, where lengths differ by
    sample; then this is ``attention_varlen`` on their values, and out and lse are nested with the query's offsets.

    Args:
        query: ``[B, Hq, Lq, D]``, float32, bfloat16, float16 or float64, any strides (a last stride other than 1
            costs a copy).
        key: ``[B, Hkv, Lk, D]``; ``Hq`` is a multiple of ``Hkv`` and query head h reads key head
            ``h // (Hq // Hkv)``. With ``block_table``: pages ``[num_pages, Hkv, page_size, D]``.
        value: as ``key``, with its own head dim ``Dv``.
        causal: row i sees keys up to its own position; ``window=(None, 0)``.
        window: ``(left, right)``: row i sees keys ``[pos(i) - left, pos(i) + right]``; None is unlimited.
        q_offset: ``pos(i) = i + q_offset``. None is ``kv_len - Lq``, sample by sample, so the last query meets the
            last key (bottom-right); 0 is top-left; an int32 or int64 tensor ``[B]`` gives each sample its own.
        attn_mask: bool (True: attend) or float (added; differentiable) of the query's dtype or float32,
            broadcastable to ``[B, Hq, Lq, Lk]``; combines with ``causal`` and ``window``. -inf is masked.
        alibi_slopes: float32 ``[Hq]`` or ``[B, Hq]``: adds ``-slope * |pos(i) - j|``; no gradient.
        softcap: scores become ``softcap * tanh(score / softcap)``; None or 0 for none.
        sinks: ``[Hq]``, one more logit a head that takes weight and gives no value; differentiable.
        kv_lengths: int32 or int64 ``[B]``, the keys in use; required with ``block_table``.
        kv_starts: int32 or int64 ``[B]``, the first key in use (left padding).
        block_table: int32 ``[B, max_pages]``, the pages of each sample in order.
        dropout_p: probability of dropping a weight, drawn from torch's generator; the same entries on every backend.
        scale: defaults to ``1 / sqrt(D)``.
        deterministic: equal inputs give equal bits. False lets a backend add up gradients in whatever order its threads
            come, where that is faster; ``torch.use_deterministic_algorithms(True)`` overrides it.
        return_lse: also return the log-sum-exp of the scores.
        backend: None for the best that can, or the name of one, which then raises if it cannot.

    Returns:
        ``out`` ``[B, Hq, Lq, Dv]`` in the query's dtype and dimension order; with ``return_lse`` the pair
        ``(out, lse)``, ``lse`` float32 (float64 for float64 input) ``[B, Hq, Lq]``, natural log, differentiable.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or value.
        NotImplementedError: the named backend cannot compute this; a gradient through paged keys.

    Example:
        >>> import torch, pyattn
        >>> q, k, v = torch.randn(2, 8, 100, 64), torch.randn(2, 2, 120, 64), torch.randn(2, 2, 120, 64)
        >>> out, lse = pyattn.attention(q, k, v, causal=True, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 8, 100, 64]), torch.Size([2, 8, 100]))
    """
    if isinstance(query, Tensor) and query.is_nested:
        checks.check_bool("return_lse", return_lse)
        nested.check(query, key, value, attn_mask=attn_mask, block_table=block_table)
        out, lse = attention_varlen(
            *nested.to_packed(query, key, value),
            causal=causal,
            window=window,
            q_offset=q_offset,
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            sinks=sinks,
            kv_lengths=kv_lengths,
            kv_starts=kv_starts,
            dropout_p=dropout_p,
            scale=scale,
            deterministic=deterministic,
            return_lse=True,
            backend=backend,
        )
        out = nested.to_jagged(out, query)
        return (out, nested.to_jagged(lse.mT, query)) if return_lse else out
    call, tensors = prepare(
        query, key, value, causal=causal, window=window, q_offset=q_offset, attn_mask=attn_mask,
        alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, kv_lengths=kv_lengths, kv_starts=kv_starts,
        block_table=block_table, dropout_p=dropout_p, scale=scale, deterministic=deterministic, return_lse=return_lse,
        backend=backend,
    )  # fmt: skip
    return ops.attention(call, tensors)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window: Window | None = None,
    q_offset: int | Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
    block_table: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    deterministic: bool = True,
) -> tuple[AttentionSpec, AttentionTensors]:
    """The checked spec and tensors of a packed call."""
    paged = block_table is not None
    checks.check_qkv(query, key, value, packed=True, paged=paged)
    checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query, None)
    batch = cu_seqlens_q.shape[0] - 1
    if paged:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k must be None with block_table: kv_lengths gives the keys in use")
    else:
        checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, query, batch)
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest is not None and checks.check_int(name, longest) < 0:
            raise ValueError(f"{name} must be at least 0, got {longest}")
    tensors = AttentionTensors(
        query,
        key,
        value,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        kv_lengths=kv_lengths,
        kv_starts=kv_starts,
        block_table=block_table,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    return _spec(
        tensors,
        batch,
        causal=causal,
        window=window,
        q_offset=q_offset,
        softcap=softcap,
        dropout_p=dropout_p,
        scale=scale,
        deterministic=deterministic,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window: Window | None = None,
    q_offset: int | Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    kv_starts: Tensor | None = None,
    block_table: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention over a packed batch of sequences of different lengths, none of which sees another.

    Args:
        query: ``[total_q, Hq, D]``: the sequences one after the other.
        key: ``[total_k, Hkv, D]``; with ``block_table`` pages ``[num_pages, Hkv, page_size, D]``.
        value: as ``key``, with its own head dim ``Dv``.
        cu_seqlens_q: int32 ``[B + 1]``, where each sequence begins; from 0 to ``total_q``.
        cu_seqlens_k: the same for the keys; None with ``block_table``.
        max_seqlen_q: at least the longest sequence; None to leave it to the backend.
        max_seqlen_k: the same for the keys.
        kv_lengths: int32 or int64 ``[B]``, the keys in use of each sequence.
        kv_starts: int32 or int64 ``[B]``, the first key in use, counted within each sequence.
        q_offset: as in ``attention``, within each sequence.

    The other arguments, and the errors, are those of ``attention``. Dropout counts sequences, rows and keys from 0.

    Returns:
        ``out`` ``[total_q, Hq, Dv]``; with ``return_lse`` also ``lse`` ``[Hq, total_q]``.

    Example:
        >>> import torch, pyattn
        >>> lengths = torch.tensor([0, 3, 10], dtype=torch.int32)
        >>> q = k = v = torch.randn(10, 4, 32)
        >>> pyattn.attention_varlen(q, k, v, lengths, lengths, causal=True).shape
        torch.Size([10, 4, 32])
    """
    backend = dispatch.check_backend(backend)
    checks.check_bool("return_lse", return_lse)
    spec, tensors = _packed(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        window=window,
        q_offset=q_offset,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        kv_lengths=kv_lengths,
        kv_starts=kv_starts,
        block_table=block_table,
        dropout_p=dropout_p,
        scale=scale,
        deterministic=deterministic,
    )
    return ops.attention(ops.prepare(spec, tensors, backend, return_lse), tensors)


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: bool = False,
    backend: None = None,
    **arguments: Any,
) -> Any:
    """Matmul, mask, softmax, matmul in the inputs' dtype: what everybody writes first, to compare against.

    Takes the arguments of ``attention`` (``backend`` must be None) and uses O(Lq * Lk) memory. Rounding happens
    wherever the dtype says, and a row without keys gives NaN: this is the textbook, not the reference.

    Example:
        >>> import torch, pyattn
        >>> q = torch.randn(1, 2, 5, 8)
        >>> ours = pyattn.attention(q, q, q, causal=True)
        >>> torch.testing.assert_close(pyattn.naive_attention(q, q, q, causal=True), ours)
    """
    if backend is not None:
        raise ValueError(f"backend must be None for naive_attention, got {backend!r}")
    checks.check_bool("return_lse", return_lse)
    spec, tensors = dense(query, key, value, **arguments)
    checks.check_values(tensors, None, None)
    out, lse = reference.naive_attention(spec, tensors, return_lse)
    return (out, lse) if return_lse else out


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: bool = False,
    backend: str | None = None,
    **arguments: Any,
) -> Explanation:
    """Which backend computes this call, and every reason why the others do not. Nothing is computed.

    Takes the arguments of ``attention``, or those of ``attention_varlen``. Print the result; its ``chosen`` names the
    backend of each op, ``rows`` holds the table, ``flops`` and ``bytes`` the work of the forward.

    Example:
        >>> import torch, pyattn
        >>> q = torch.randn(1, 2, 5, 8, dtype=torch.float64)
        >>> pyattn.explain(q, q, q).chosen["forward"]
        'reference'
    """
    name = dispatch.check_backend(backend)
    checks.check_bool("return_lse", return_lse)
    prepare = _packed if "cu_seqlens_q" in arguments else dense
    spec, tensors = prepare(query, key, value, **arguments)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    problems = [Problem.of("forward", spec, tensors)]
    if needs_grad:
        problems.append(Problem.of("backward", spec, tensors))
    return Explanation(problems, name)
