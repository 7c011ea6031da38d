"""Attention in eager PyTorch: the oracle, the fused emulation, the naive way, and the backend of last resort.

One implementation serves three purposes. On float64 input it is the truth. On float32, bfloat16 and float16 it
emulates a fused kernel: scores and sums in float32, P (and dS in the gradient) rounded to the input dtype before
their products, one rounding of each output. As a backend it computes whatever no kernel can.
Memory is O(Lq * Lk).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyattn.spec import AttentionSpec, AttentionTensors, Problem, empty_output, lse_dtype

FAR = 2**60  # positions are clamped here and windows at twice this: beyond every length, and sums stay in 64 bits
MIN_BIAS = -2.3e38  # finite biases are clamped here: times log2(e) it is still finite in float32
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # of query, key, value, attn_mask, sinks
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


# ---- the pieces of the definition ----------------------------------------------------------------------------


def key_range(
    spec: AttentionSpec, rows: Tensor, q_offset: Tensor, start: Tensor, length: Tensor
) -> tuple[Tensor, Tensor]:
    """The half-open interval ``[lo, hi)`` of keys that each query row may see.

    ``pos(i) = i + q_offset``, ``lo = max(start, pos - left)``, ``hi = min(length, pos + right + 1)``.
    """
    pos = rows + q_offset
    lo = start if spec.window_left is None else torch.maximum(start, pos - min(spec.window_left, 2 * FAR))
    hi = length if spec.window_right is None else torch.minimum(length, pos + min(spec.window_right, 2 * FAR) + 1)
    return lo, hi


def _positions(spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-sample ``q_offset, start, length`` and the query rows, shaped to broadcast to ``[B, 1, Lq, Lk]``."""
    device, Lq, Lk = t.query.device, t.query.shape[2], t.key.shape[2]

    def per_sample(x: Tensor | None, default: int) -> Tensor:
        if x is None:
            return torch.full((1, 1, 1, 1), default, dtype=torch.int64, device=device)
        return x.to(torch.int64).view(-1, 1, 1, 1)

    length = per_sample(t.kv_lengths, Lk)
    start = per_sample(t.kv_starts, 0)
    bottom_right = t.q_offset is None and spec.q_offset is None
    offset = length - Lq if bottom_right else per_sample(t.q_offset, spec.q_offset or 0).clamp(-FAR, FAR)
    return offset, start, length, torch.arange(Lq, device=device).view(1, 1, Lq, 1)


def structured_mask(spec: AttentionSpec, t: AttentionTensors) -> Tensor | None:
    """Bool ``[B or 1, 1, Lq, Lk]``, True where a key is inside its row's interval; None if every key is."""
    unlimited = spec.window_left is None and spec.window_right is None
    if unlimited and t.kv_lengths is None and t.kv_starts is None:
        return None
    offset, start, length, rows = _positions(spec, t)
    lo, hi = key_range(spec, rows, offset, start, length)
    keys = torch.arange(t.key.shape[2], device=t.query.device)
    return (keys >= lo) & (keys < hi)


def alibi_bias(spec: AttentionSpec, t: AttentionTensors, dtype: torch.dtype) -> Tensor:
    """``-slope * |pos(i) - j|``, ``[B or 1, Hq, Lq, Lk]`` (Press et al. 2022, arXiv:2108.12409)."""
    assert t.alibi_slopes is not None
    offset, _, _, rows = _positions(spec, t)
    keys = torch.arange(t.key.shape[2], device=t.query.device)
    slopes = t.alibi_slopes.to(dtype)
    slopes = slopes.view(1, -1, 1, 1) if slopes.dim() == 1 else slopes[:, :, None, None]
    return -slopes * (rows + offset - keys).abs().to(dtype)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), words in int64."""

    def mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        low, high = a * (b & 0xFFFF), a * (b >> 16)  # each below 2^48: exact in int64
        return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & 0xFFFFFFFF

    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        hi0, lo0 = mulhilo(_PHILOX_MULTIPLIERS[0], c0)
        hi1, lo1 = mulhilo(_PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & 0xFFFFFFFF, (k1 + _PHILOX_WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def dropout_factor(
    spec: AttentionSpec, t: AttentionTensors, dtype: torch.dtype, first_batch: int, first_head: int = 0
) -> Tensor:
    """``[B, Hq, Lq, Lk]``: 0 where dropped, the inverse keep probability where kept.

    Samples and query heads are counted from ``first_batch`` and ``first_head``.

    Key j of row i, query head h, sample b takes half ``(j >> 2) & 1`` of word ``j & 3`` of the block with counter
    ``(j // 8, i, h, b)``, and is kept if that half is at least ``round(p * 65536)``.
    """
    assert t.dropout_seed is not None
    (B, Hq, Lq), Lk, device = t.query.shape[:3], t.key.shape[2], t.query.device
    threshold = spec.dropout_threshold
    if threshold == 65536:
        return torch.zeros((B, Hq, Lq, Lk), dtype=dtype, device=device)

    def axis(n: int, dim: int, first: int = 0) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[dim] = n
        return torch.arange(first, first + n, device=device).view(shape)

    blocks = torch.broadcast_tensors(
        axis((Lk + 7) // 8, 3), axis(Lq, 2), axis(Hq, 1, first_head), axis(B, 0, first_batch)
    )
    words = philox(blocks, t.dropout_seed)
    halves = torch.stack([w & 0xFFFF for w in words] + [w >> 16 for w in words], dim=-1)
    kept = halves.flatten(-2)[..., :Lk] >= threshold
    return kept.to(dtype) * (65536 / (65536 - threshold))


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, Hkv, L, D]`` to ``[B, num_heads, L, D]``: query head h reads kv head ``h // (Hq // Hkv)``."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def gather_pages(pages: Tensor, block_table: Tensor) -> Tensor:
    """``[num_pages, Hkv, page_size, D]`` through ``[B, max_pages]`` to ``[B, Hkv, max_pages * page_size, D]``."""
    if pages.shape[0] == 0:  # no page to read: every length is 0
        pages = pages.new_zeros((1, *pages.shape[1:]))
    table = block_table.to(torch.int64).clamp(0, pages.shape[0] - 1)  # entries past the length may be anything
    return pages[table].transpose(1, 2).flatten(2, 3)


def _dense_keys(t: AttentionTensors) -> AttentionTensors:
    if t.block_table is None:
        return t
    return t._replace(
        key=gather_pages(t.key, t.block_table), value=gather_pages(t.value, t.block_table), block_table=None
    )


def _scores(spec: AttentionSpec, t: AttentionTensors, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scores ``[B, Hq, Lq, Lk]`` with -inf where masked, and the derivative of the softcap (None without one)."""
    s = t.query.to(dtype) @ repeat_heads(t.key, t.query.shape[1]).to(dtype).mT * spec.scale
    slope = None
    if spec.softcap:
        tanh = torch.tanh(s / spec.softcap)
        s, slope = spec.softcap * tanh, 1 - tanh * tanh
    if t.alibi_slopes is not None:
        s = s + alibi_bias(spec, t, dtype)
    live = structured_mask(spec, t)
    if t.attn_mask is not None:
        if t.attn_mask.dtype == torch.bool:
            live = t.attn_mask if live is None else live & t.attn_mask
        else:
            bias = t.attn_mask.to(dtype)
            s = s + bias.clamp(min=MIN_BIAS)
            unmasked = bias != -torch.inf
            live = unmasked if live is None else live & unmasked
    if live is not None:
        s = torch.where(live, s, -torch.inf)
    return s, slope


def attention_weights(spec: AttentionSpec, t: AttentionTensors, first_head: int = 0) -> Tensor:
    """What values are multiplied by in a call without sinks, dropout included: ``[B, Hq, Lq, Lk]``, as lse's dtype.

    Made of differentiable operations; the rows and gradients of a query without keys are 0. With ``first_head`` the
    query heads are some of a call's, counted from there.
    """
    compute = lse_dtype(t.query.dtype)
    s, _ = _scores(spec, t, compute)
    blind = (s == -torch.inf).all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(blind, 0), -1).masked_fill(blind, 0)
    return p * dropout_factor(spec, t, compute, 0, first_head) if spec.dropout_p else p


def _masked_matmul(weights: Tensor, x: Tensor, live: Tensor) -> Tensor:
    """``weights @ x`` in which a pair that is not live contributes nothing, even where x is NaN or inf."""
    finite = x.isfinite().all(-1, keepdim=True)  # [B, H, N, 1]
    if finite.all():
        return weights @ x
    y = weights @ torch.where(finite, x, 0)
    for j in (~finite).any(dim=(0, 1)).flatten().nonzero().flatten().tolist():
        row = slice(j, j + 1)
        touched = live[..., row] & ~finite[..., row, :]
        y = y + torch.where(touched, weights[..., row] * x[..., row, :], 0)
    return y


def _like(x: Tensor, values: Tensor) -> Tensor:
    """``values`` rounded to the dtype and laid out in the dimension order of ``x``."""
    return torch.empty_like(x).copy_(values)


# ---- the backend --------------------------------------------------------------------------------------------


def unavailable() -> list[str]:
    """Reasons why this backend cannot be used on this machine at all."""
    return []


def why_not(problem: Problem) -> list[str]:
    """Reasons why this backend cannot compute ``problem``: none, it computes everything."""
    return []


def describe(problem: Problem) -> str:
    return "eager PyTorch, O(Lq * Lk) memory"


def _by_sequence(t: AttentionTensors) -> list[tuple[slice, slice | None, AttentionTensors]]:
    """A packed batch as dense problems of one sample each, with the rows that each came from."""
    assert t.cu_seqlens_q is not None
    starts_q = t.cu_seqlens_q.tolist()
    starts_k = None if t.cu_seqlens_k is None else t.cu_seqlens_k.tolist()
    per_sample = ("q_offset", "kv_lengths", "kv_starts", "block_table")
    sequences = []
    for b in range(len(starts_q) - 1):
        rows = slice(starts_q[b], starts_q[b + 1])
        fields = {name: x[b : b + 1] for name in per_sample if (x := getattr(t, name)) is not None}
        if t.alibi_slopes is not None and t.alibi_slopes.dim() == 2:
            fields["alibi_slopes"] = t.alibi_slopes[b]
        fields["query"] = t.query[rows].transpose(0, 1)[None]
        keys = None
        if starts_k is not None:
            keys = slice(starts_k[b], starts_k[b + 1])
            fields["key"] = t.key[keys].transpose(0, 1)[None]
            fields["value"] = t.value[keys].transpose(0, 1)[None]
        sequences.append((rows, keys, t._replace(cu_seqlens_q=None, cu_seqlens_k=None, **fields)))
    return sequences


def forward(spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` as the op ``pyattn::attention_forward`` defines them."""
    if t.cu_seqlens_q is None:
        out, lse = _forward_dense(spec, t, 0)
        return empty_output(t.query, t.value.shape[-1]).copy_(out), lse
    packed_out = empty_output(t.query, t.value.shape[-1])
    packed_lse = t.query.new_empty((t.query.shape[1], t.query.shape[0]), dtype=lse_dtype(t.query.dtype))
    for b, (rows, _, sample) in enumerate(_by_sequence(t)):
        out, lse = _forward_dense(spec, sample, b)
        packed_out[rows] = out[0].transpose(0, 1)
        packed_lse[:, rows] = lse[0]
    return packed_out, packed_lse


def _forward_dense(spec: AttentionSpec, t: AttentionTensors, first_batch: int) -> tuple[Tensor, Tensor]:
    t = _dense_keys(t)
    dtype = t.query.dtype
    compute = lse_dtype(dtype)
    s, _ = _scores(spec, t, compute)
    live = s > -torch.inf
    row_max = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:3], 1), -torch.inf)
    sinks = None if t.sinks is None else t.sinks.to(compute).view(1, -1, 1, 1)
    if sinks is not None:
        row_max = torch.maximum(row_max, sinks)
    row_max = torch.where(row_max == -torch.inf, 0, row_max)
    p = torch.exp(s - row_max)
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - row_max)
    if spec.dropout_p:
        p = p * dropout_factor(spec, t, compute, first_batch)
    value = repeat_heads(t.value, t.query.shape[1]).to(compute)
    out = _masked_matmul(p.to(dtype).to(compute), value, live)
    out = torch.where(total == 0, 0, out / total)
    return out.to(dtype), (row_max + torch.log(total)).squeeze(-1)


def backward(
    spec: AttentionSpec,
    t: AttentionTensors,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs_mask_grad: bool,
) -> Gradients:
    """Gradients of query, key, value, attn_mask (None unless it is needed) and sinks (None without sinks)."""
    if t.cu_seqlens_q is not None:
        *others, dsinks = _backward_packed(spec, t, out, lse, grad_out, grad_lse)
    else:
        *others, dsinks = _backward_dense(spec, t, out, lse, grad_out, grad_lse, needs_mask_grad)
    return *others, None if dsinks is None or t.sinks is None else dsinks.to(t.sinks.dtype)  # type: ignore[return-value]


def _backward_packed(
    spec: AttentionSpec,
    t: AttentionTensors,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> Gradients:
    dq, dk, dv = torch.zeros_like(t.query), torch.zeros_like(t.key), torch.zeros_like(t.value)
    sink_grads = [] if t.sinks is None else [torch.zeros_like(t.sinks, dtype=lse.dtype)]
    for b, (rows, keys, sample) in enumerate(_by_sequence(t)):
        assert keys is not None  # paged keys have no gradient
        dense = [x[rows].transpose(0, 1)[None] for x in (out, grad_out)]
        sample_dlse = None if grad_lse is None else grad_lse[None, :, rows]
        grads = _backward_dense(spec, sample, dense[0], lse[None, :, rows], dense[1], sample_dlse, False, b)
        for packed, index, grad in zip((dq, dk, dv), (rows, keys, keys), grads[:3], strict=True):
            packed[index] = grad[0].transpose(0, 1)
        if grads[4] is not None:
            sink_grads.append(grads[4])
    return dq, dk, dv, None, torch.stack(sink_grads).sum(0) if sink_grads else None


def _backward_dense(
    spec: AttentionSpec,
    t: AttentionTensors,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs_mask_grad: bool,
    first_batch: int = 0,
) -> Gradients:
    dtype, compute = t.query.dtype, lse.dtype
    num_heads, num_kv_heads = t.query.shape[1], t.key.shape[1]
    s, softcap_slope = _scores(spec, t, compute)
    live = s > -torch.inf
    safe_lse = torch.where(lse == -torch.inf, 0, lse)[..., None]
    p = torch.exp(s - safe_lse)
    value = repeat_heads(t.value, num_heads).to(compute)
    dout = grad_out.to(compute)

    dropout = dropout_factor(spec, t, compute, first_batch) if spec.dropout_p else None
    dropped_p = p if dropout is None else p * dropout
    dp = dout @ value.mT
    if dropout is not None:
        dp = dp * dropout
    # d lse / d s_j = p_j, so a gradient of lse joins the row term of the softmax.
    row_term = (dout * out.to(compute)).sum(-1, keepdim=True)
    if grad_lse is not None:
        row_term = row_term - grad_lse[..., None].to(compute)
    ds = torch.where(live, p * (dp - row_term), 0)  # gradient of the biased, masked score

    def sum_groups(grad: Tensor) -> Tensor:
        return grad.unflatten(1, (num_kv_heads, -1)).sum(2) if num_kv_heads != num_heads else grad

    dmask = None
    if needs_mask_grad:
        assert t.attn_mask is not None
        dmask = ds.sum_to_size(t.attn_mask.shape).to(t.attn_mask.dtype)
    dsinks = None
    if t.sinks is not None:
        p_sink = torch.exp(t.sinks.to(compute).view(1, -1, 1, 1) - safe_lse)
        dsinks = (-p_sink * row_term).sum((0, 2, 3))
    if softcap_slope is not None:
        ds = torch.where(live, ds * softcap_slope, 0)
    ds = ds.to(dtype).to(compute)
    key = repeat_heads(t.key, num_heads).to(compute)
    dq = _masked_matmul(ds, key, live) * spec.scale
    dk = sum_groups(ds.mT @ t.query.to(compute)) * spec.scale
    dv = sum_groups(dropped_p.to(dtype).to(compute).mT @ dout)
    return _like(t.query, dq), _like(t.key, dk), _like(t.value, dv), dmask, dsinks


# ---- what everybody writes first ------------------------------------------------------------------------------


def naive_attention(spec: AttentionSpec, t: AttentionTensors, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Matmul, mask, softmax, matmul in the inputs' dtype. A row without keys gives NaN."""
    t = _dense_keys(t)
    num_heads, dtype = t.query.shape[1], t.query.dtype
    s = t.query @ repeat_heads(t.key, num_heads).mT * spec.scale
    if spec.softcap:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    if t.alibi_slopes is not None:
        s = s + alibi_bias(spec, t, dtype)
    mask = structured_mask(spec, t)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf)
    if t.attn_mask is not None:
        s = s.masked_fill(~t.attn_mask, -torch.inf) if t.attn_mask.dtype == torch.bool else s + t.attn_mask.to(dtype)
    if t.sinks is not None:
        s = torch.cat([s, t.sinks.to(dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)], dim=-1)
    p = torch.softmax(s, dim=-1)
    lse = torch.logsumexp(s, dim=-1) if return_lse else None
    if t.sinks is not None:
        p = p[..., :-1]
    if spec.dropout_p:
        p = p * dropout_factor(spec, t, dtype, 0)
    return p @ repeat_heads(t.value, num_heads), lse
