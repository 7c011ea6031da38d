"""``pyattn.integrations.flash_attn`` against flash-attn's documented formulas, written out sample by sample."""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys

import pytest
import torch

from pyattn.integrations import flash_attn
from pyattn.integrations.flash_attn import bert_padding, cute, v3
from pyattn.integrations.flash_attn.layers.rotary import apply_rotary_emb


def randn(*shape, requires_grad=False):
    return torch.randn(shape, requires_grad=requires_grad)


def formula(q, k, v, causal=False, window=(-1, -1), softcap=0.0, slopes=None, scale=None, sinks=None):
    """One sample ``[L, H, D]`` in float64; row i stands at ``i + Lk - Lq``."""
    dtype, groups = q.dtype, q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(k)) - (torch.arange(len(q)) + len(k) - len(q))[:, None]
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distance.abs()
    left, right = (None if side is None or side < 0 else side for side in window)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        seen &= distance >= -left
    if causal or right is not None:
        seen &= distance <= (0 if causal else right)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, len(q), 1)), dim=2)
    weights = scores.softmax(-1).nan_to_num()[..., : len(k)]
    lse = torch.where(torch.isneginf(scores).all(-1), -torch.inf, scores.logsumexp(-1))
    return torch.einsum("hij,jhd->ihd", weights, v).to(dtype), lse.float()


def batched(q, k, v, slopes=None, **kwargs):
    each = [None] * len(q) if slopes is None else slopes.expand(len(q), -1)
    parts = [formula(*x, slopes=s, **kwargs) for *x, s in zip(q, k, v, each, strict=True)]
    return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])


def check_gradients(out, expected, *leaves):
    """Of the same leaves, by way of either."""
    weights = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), leaves) for x in (out, expected))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


WINDOWS = [(-1, -1), (3, -1), (-1, 2), (2, 1), (0, 0), (3, 0)]
LENGTHS = [(7, 7), (5, 9), (9, 5), (1, 6)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_masks(causal, window, lengths):
    q, k, v = (
        randn(2, n, h, 16, requires_grad=True) for n, h in zip((lengths[0], *lengths[1:] * 2), (4, 2, 2), strict=True)
    )
    out, lse, weights = flash_attn.flash_attn_func(q, k, v, 0.0, None, causal, window, return_attn_probs=True)
    expected, expected_lse = batched(q, k, v, causal=causal, window=window)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert weights is None and lse.shape == (2, 4, lengths[0])
    check_gradients(out, expected, q, k, v)


@pytest.mark.parametrize("slopes_shape", [(4,), (2, 4)], ids=str)
def test_softcap_slopes_and_scale(slopes_shape):
    q, k, v = (randn(2, n, 4, 16, requires_grad=True) for n in (5, 9, 9))
    slopes = torch.rand(slopes_shape)
    kwargs = {"softcap": 2.0, "causal": True}
    out = flash_attn.flash_attn_func(q, k, v, softmax_scale=0.7, alibi_slopes=slopes, **kwargs)
    expected = batched(q, k, v, slopes=slopes, scale=0.7, **kwargs)[0]
    torch.testing.assert_close(out, expected)
    check_gradients(out, expected, q, k, v)


def test_softcap_of_zero_or_less_is_none():
    q = randn(2, 5, 4, 16)
    expected = flash_attn.flash_attn_func(q, q, q)
    for softcap in (0.0, -1.0):
        assert torch.equal(flash_attn.flash_attn_func(q, q, q, softcap=softcap), expected)


def test_ways_to_write_a_window():
    q = randn(2, 9, 4, 16)
    expected = flash_attn.flash_attn_func(q, q, q, window_size=(2, -1))
    for window in ([2, -1], (2, None), torch.tensor([2, -1]), torch.Size([2]) + torch.Size([9])):
        assert torch.equal(flash_attn.flash_attn_func(q, q, q, window_size=window), expected)
    for window in (3, (1, 2, 3), None):
        with pytest.raises(TypeError, match="window_size must be a pair"):
            flash_attn.flash_attn_func(q, q, q, window_size=window)


def test_dropout_is_drawn_from_the_generator():
    q, v = randn(1, 64, 2, 16), torch.ones(1, 64, 2, 16)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(flash_attn.flash_attn_func(q, q, v, 0.25))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert abs(outs[0].mean() - 1) < 0.1


def test_dense_in_one_tensor():
    qkv, kv = randn(2, 7, 3, 4, 16, requires_grad=True), randn(2, 9, 2, 2, 16, requires_grad=True)
    q = qkv[:, :, 0]
    out = flash_attn.flash_attn_qkvpacked_func(qkv, 0.0, 0.7, True)
    expected = batched(*qkv.unbind(2), causal=True, scale=0.7)[0]
    torch.testing.assert_close(out, expected)
    check_gradients(out, expected, qkv)
    out = flash_attn.flash_attn_kvpacked_func(q, kv, causal=True)
    expected = batched(q, *kv.unbind(2), causal=True)[0]
    torch.testing.assert_close(out, expected)
    check_gradients(out, expected, qkv, kv)


def begins(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed(q, k, v, cu_q, cu_k, **kwargs):
    parts = [
        formula(q[a:b], k[c:d], v[c:d], **kwargs)
        for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (2, 1)], ids=str)
def test_varlen(window, causal):
    cu_q, cu_k = begins(3, 0, 6, 1), begins(5, 2, 4, 7)
    q, k, v = (randn(n, h, 16, requires_grad=True) for n, h in ((10, 4), (18, 2), (18, 2)))
    arguments = (cu_q, cu_k, 6, 7, 0.0, None, causal, window)
    out, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, *arguments, return_attn_probs=True)
    expected, expected_lse = packed(q, k, v, cu_q, cu_k, causal=causal, window=window)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    check_gradients(out, expected, q, k, v)
    kv = torch.stack((k, v), 1)
    assert torch.equal(flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *arguments), out)


def test_varlen_in_one_tensor():
    cu, qkv = begins(3, 0, 6), randn(9, 3, 4, 16, requires_grad=True)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 6, causal=True)
    expected = packed(*qkv.unbind(1), cu, cu, causal=True)[0]
    torch.testing.assert_close(out, expected)
    check_gradients(out, expected, qkv)


def to_pages(x, page_size, order):
    """``[B, L, H, D]`` as shuffled pages and the table of them."""
    B, L = x.shape[:2]
    pages = x.reshape(B * L // page_size, page_size, *x.shape[2:])
    table = torch.argsort(order).to(torch.int32).view(B, -1)
    return pages[order].clone(), table


@pytest.mark.parametrize("page_size", [1, 4, 8])
def test_varlen_of_pages(page_size):
    q, k, v = randn(7, 4, 16), randn(2, 8, 2, 16), randn(2, 8, 2, 16)
    order = torch.randperm(16 // page_size)
    (k_pages, table), (v_pages, _) = (to_pages(x, page_size, order) for x in (k, v))
    cu_q, cu_k = begins(3, 4), begins(5, 8)
    out = flash_attn.flash_attn_varlen_func(q, k_pages, v_pages, cu_q, cu_k, 4, 8, causal=True, block_table=table)
    k, v = (torch.cat((x[0, :5], x[1])) for x in (k, v))
    torch.testing.assert_close(out, packed(q, k, v, cu_q, cu_k, causal=True)[0])


# ---- caches --------------------------------------------------------------------------------------------------


def turned(x, cos, sin, positions, interleaved):
    """``[L, H, D]``, pair by pair."""
    x, R = x.clone(), 2 * cos.shape[1]
    for i in range(R // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + R // 2)
        c, s = cos[positions, i][:, None], sin[positions, i][:, None]
        x[..., a], x[..., b] = x[..., a] * c - x[..., b] * s, x[..., a] * s + x[..., b] * c
    return x


def tables(length, pairs):
    angles = torch.outer(torch.arange(length), 1e2 ** -torch.linspace(0, 1, pairs))
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (4, 0)], ids=str)
@pytest.mark.parametrize("interleaved", [None, False, True], ids=["no rotary", "halves", "interleaved"])
@pytest.mark.parametrize("layout", ["dense", "rows", "left padding", "pages"])
@pytest.mark.parametrize("new", [0, 1, 3])
def test_cache(new, layout, interleaved, window, causal):
    if new == 0 and interleaved is not None:
        return  # which is refused, below
    B, size, Lq, lengths = 3, 16, 2, [5, 0 if new else 3, 16 - new]
    q, k, v = randn(B, Lq, 4, 16), randn(B, new, 2, 16), randn(B, new, 2, 16)
    k_cache, v_cache = (randn(B, size, 2, 16) for _ in range(2))
    pads = [2, 0, 7] if layout == "left padding" else [0] * B
    cos, sin = tables(size + Lq, 4)

    # what is expected, sample by sample
    expected_k, expected_v, outs, lses = k_cache.clone(), v_cache.clone(), [], []
    for b, n in enumerate(lengths):
        query, after = q[b], n + new
        if new:
            at, key = torch.arange(n, after), k[b]
            if interleaved is not None:
                key = turned(key, cos, sin, at, interleaved)
                rows = n + torch.arange(Lq) if causal or window != (-1, -1) else torch.full((Lq,), n)
                query = turned(query, cos, sin, rows, interleaved)
            expected_k[b, n:after], expected_v[b, n:after] = key, v[b]
        seen = slice(pads[b], after)
        out, lse = formula(query, expected_k[b, seen], expected_v[b, seen], causal=causal, window=window)
        outs.append(out)
        lses.append(lse)

    kwargs = {"causal": causal, "window_size": window, "return_softmax_lse": True}
    kwargs["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    if new:
        kwargs |= {"k": k, "v": v}
    if interleaved is not None:
        kwargs |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    order = torch.randperm(B * size // 4)
    if layout == "rows":
        rows = torch.tensor([2, 0, 3])
        spread = [torch.randn(4, size, 2, 16).index_copy(0, rows, x) for x in (k_cache, v_cache)]
        kwargs["cache_batch_idx"] = rows.int()
        back = [x[rows] for x in spread]
    elif layout == "pages":
        spread = [to_pages(x, 4, order)[0] for x in (k_cache, v_cache)]
        kwargs["block_table"] = to_pages(k_cache, 4, order)[1]
    else:
        spread = [k_cache, v_cache]
        if layout == "left padding":
            kwargs["cache_leftpad"] = torch.tensor(pads, dtype=torch.int32)
    out, lse = flash_attn.flash_attn_with_kvcache(q, *spread, **kwargs)
    torch.testing.assert_close(out, torch.stack(outs))
    torch.testing.assert_close(lse, torch.stack(lses))
    if layout == "rows":
        back = [x[rows] for x in spread]
    elif layout == "pages":
        back = [x[torch.argsort(order)].reshape(k_cache.shape) for x in spread]
    else:
        back = spread
    torch.testing.assert_close(back[0], expected_k)
    torch.testing.assert_close(back[1], expected_v)


def test_cache_lengths():
    q, cache = randn(2, 1, 4, 16), randn(2, 16, 4, 16)
    whole = flash_attn.flash_attn_with_kvcache(q, cache, cache)
    torch.testing.assert_close(whole, batched(q, cache, cache)[0])
    five = flash_attn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=5)
    torch.testing.assert_close(five, batched(q, cache[:, :5], cache[:, :5])[0])


def test_cache_refusals():
    q, cache, new = randn(2, 1, 4, 16), randn(2, 16, 4, 16), randn(2, 1, 4, 16)
    before, cos = cache.clone(), torch.ones(20, 4)
    row = torch.zeros(2, dtype=torch.int32)
    for match, arguments in {
        "k must fit in the 16 places": {"k": new, "v": new, "cache_seqlens": 16},
        "cache_seqlens must be given with k": {"k": new, "v": new},
        "v must come with the other": {"k": new, "cache_seqlens": 5},
        "k must be given with rotary_cos": {"rotary_cos": cos, "rotary_sin": cos, "cache_seqlens": 5},
        "rotary_sin must come with": {"rotary_cos": cos, "k": new, "v": new, "cache_seqlens": 5},
        "cache_batch_idx must be None": {"cache_batch_idx": row, "block_table": row[:, None], "cache_seqlens": 5},
        "cache_seqlens must be int32": {"cache_seqlens": torch.ones(2)},
    }.items():
        with pytest.raises((TypeError, ValueError), match=match):
            flash_attn.flash_attn_with_kvcache(q, cache, cache.clone(), **arguments)
        assert torch.equal(cache, before)
    with pytest.raises(ValueError, match="k_cache must have the batch size"):
        flash_attn.flash_attn_with_kvcache(q, cache[:1], cache[:1])


# ---- padding and rotary --------------------------------------------------------------------------------------


def test_unpad_and_pad():
    x = randn(3, 4, 2, 5, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    packed, indices, cu, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(packed, x[mask.bool()]) and indices.tolist() == [0, 1, 5, 6, 7]
    assert cu.tolist() == [0, 2, 5, 5] and cu.dtype == torch.int32 and longest == 3 and used.tolist() == [2, 3, 0]
    padded = bert_padding.pad_input(packed, indices, 3, 4)
    assert torch.equal(padded, x * mask[..., None, None])
    (gradient,) = torch.autograd.grad(padded.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * padded)


def test_unpad_keeps_what_is_unused():
    mask, unused = torch.tensor([[1, 0, 0], [1, 1, 0]]), torch.tensor([[0, 1, 0], [0, 0, 1]])
    _, indices, cu, longest, used = bert_padding.unpad_input(randn(2, 3, 4), mask, unused)
    assert (indices.tolist(), cu.tolist(), longest, used.tolist()) == ([0, 1, 3, 4, 5], [0, 2, 5], 3, [1, 2])


def test_unpad_of_concatenated_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = randn(3, 6, 4)
    packed, indices, cu, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert cu.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6
    assert torch.equal(packed, torch.cat((x[0, :5], x[1, :5], x[2])))
    assert torch.equal(bert_padding.pad_input(packed, indices, 3, 6)[0, :5], x[0, :5])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved):
    cos, sin = tables(20, 4)
    x = randn(2, 5, 3, 16, requires_grad=True)
    for offsets, numbers in ((0, [0, 0]), (3, [3, 3]), (torch.tensor([2, 7]), [2, 7])):
        out = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
        rows = [turned(x[b], cos, sin, torch.arange(5) + n, interleaved) for b, n in enumerate(numbers)]
        torch.testing.assert_close(out, torch.stack(rows))
        check_gradients(out, torch.stack(rows), x)
    cu = begins(2, 0, 3)
    out = apply_rotary_emb(x[0], cos, sin, interleaved, seqlen_offsets=torch.tensor([4, 0, 1]), cu_seqlens=cu)
    torch.testing.assert_close(out, turned(x[0], cos, sin, torch.tensor([4, 5, 1, 2, 3]), interleaved))
    y = x.detach().clone()
    assert apply_rotary_emb(y, cos, sin, interleaved, inplace=True) is y
    torch.testing.assert_close(y, apply_rotary_emb(x.detach(), cos, sin, interleaved))


# ---- versions 3 and 4 ----------------------------------------------------------------------------------------


def test_version_3():
    q, k = randn(2, 5, 4, 16), randn(2, 9, 2, 16)
    out, lse = v3.flash_attn_func(q, k, k, 0.7, True, window_size=(3, 0), return_attn_probs=True)
    expected, expected_lse = batched(q, k, k, scale=0.7, causal=True, window=(3, 0))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    qkv = torch.cat((q, k[:, :5], k[:, :5]), dim=2)
    out = v3.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4)
    torch.testing.assert_close(out, batched(q, k[:, :5], k[:, :5], causal=True)[0])
    same = torch.stack((q, q, q), dim=2)
    assert torch.equal(v3.flash_attn_qkvpacked_func(same), flash_attn.flash_attn_qkvpacked_func(same))
    with pytest.raises(ValueError, match="num_heads_q"):
        v3.flash_attn_qkvpacked_func(qkv, num_heads_q=5)
    cache = randn(2, 16, 2, 16)
    arguments = {"causal": True, "cache_seqlens": 7}
    assert torch.equal(
        v3.flash_attn_with_kvcache(q, cache, cache, page_table=None, **arguments),
        flash_attn.flash_attn_with_kvcache(q, cache, cache, **arguments),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("used", ["both", "queries", "keys"])
def test_sequences_used_in_part(used, causal):
    cu_q, cu_k = begins(3, 4), begins(5, 8)
    q, k = randn(7, 4, 16), randn(13, 2, 16)
    used_q, used_k = [2, 4] if used != "keys" else [3, 4], [4, 6] if used != "queries" else [5, 8]
    arguments = {
        "seqused_q": torch.tensor(used_q, dtype=torch.int32) if used != "keys" else None,
        "seqused_k": torch.tensor(used_k, dtype=torch.int32) if used != "queries" else None,
    }
    outs = v3.flash_attn_varlen_func(q, k, k, cu_q, cu_k, 4, 8, causal=causal, **arguments)
    for b, (first_q, first_k) in enumerate(((0, 0), (3, 5))):
        rows, keys = slice(first_q, first_q + used_q[b]), slice(first_k, first_k + used_k[b])
        torch.testing.assert_close(outs[rows], formula(q[rows], k[keys], k[keys], causal=causal)[0])
    if used == "both":
        q, k = randn(2, 5, 4, 16), randn(2, 9, 2, 16)
        outs, _ = cute.flash_attn_varlen_func(q, k, k, causal=causal, **arguments)
        for b in range(2):
            expected = formula(q[b, : used_q[b]], k[b, : used_k[b]], k[b, : used_k[b]], causal=causal)[0]
            torch.testing.assert_close(outs[b, : used_q[b]], expected)


def test_version_4():
    q, k, sinks = randn(2, 5, 4, 16), randn(2, 9, 2, 16), randn(4)
    out, lse = cute.flash_attn_func(q, k, k, causal=True, learnable_sink=sinks, return_lse=True)
    expected, expected_lse = batched(q, k, k, causal=True, sinks=sinks)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert cute.flash_attn_func(q, k, k)[1] is None
    cu_q, cu_k = begins(3, 4), begins(5, 8)
    q, k = randn(7, 4, 16), randn(13, 2, 16)
    out, lse = cute.flash_attn_varlen_func(q, k, k, None, cu_q, cu_k, 4, 8, causal=True, return_lse=True)
    expected, expected_lse = packed(q, k, k, cu_q, cu_k, causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (v3.flash_attn_func, ["qv", "q_descale", "k_descale", "v_descale"]),
        (cute.flash_attn_func, ["qv", "gather_kv_indices", "score_mod", "score_mod_bwd", "mask_mod", "aux_tensors",
                                "aux_scalars", "block_sparse_tensors", "block_sparse_tensors_bwd"]),
    ],
)  # fmt: skip
def test_what_is_refused(function, names):
    q = randn(1, 2, 2, 16)
    for name in names:
        with pytest.raises(NotImplementedError, match=f"{name} is not supported"):
            function(q, q, q, **{name: torch.ones(1)})
    with pytest.raises(NotImplementedError, match="attention_chunk"):
        v3.flash_attn_func(q, q, q, attention_chunk=4)


def test_ranks_are_checked():
    q = randn(2, 5, 4, 16)
    with pytest.raises(ValueError, match=r"q must have shape \[B, L, H, D\]"):
        flash_attn.flash_attn_func(q[0], q, q)
    with pytest.raises(ValueError, match=r"k must have shape \[B, L, H, D\]"):
        flash_attn.flash_attn_func(q, q[0], q)
    with pytest.raises(ValueError, match=r"qkv must have shape \[B, L, 3, H, D\]"):
        flash_attn.flash_attn_qkvpacked_func(randn(2, 5, 2, 4, 16))
    with pytest.raises(ValueError, match=r"q must have shape \[total, H, D\]"):
        flash_attn.flash_attn_varlen_func(q, q, q, begins(5), begins(5), 5, 5)


SIGNATURES = {
    flash_attn.flash_attn_func: "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
    "return_attn_probs",
    flash_attn.flash_attn_varlen_func: "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p "
    "softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs block_table",
    flash_attn.flash_attn_with_kvcache: "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx "
    "cache_leftpad block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits "
    "return_softmax_lse",
    v3.flash_attn_func: "q k v softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk "
    "softcap num_splits pack_gqa deterministic sm_margin return_attn_probs",
    cute.flash_attn_func: "q k v qv gather_kv_indices softmax_scale causal window_size learnable_sink softcap "
    "num_splits pack_gqa deterministic score_mod score_mod_bwd mask_mod aux_tensors aux_scalars block_sparse_tensors "
    "block_sparse_tensors_bwd return_lse",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_arguments_have_their_order(function):
    assert list(inspect.signature(function).parameters) == SIGNATURES[function].split()


def test_install():
    before = {name: sys.modules.get(name) for name in ("flash_attn", "flash_attn_interface")}
    flash_attn.install()
    try:
        flash_attn.install()
        module = importlib.import_module("flash_attn")
        assert module.flash_attn_func is flash_attn.flash_attn_func
        assert importlib.import_module("flash_attn.bert_padding") is bert_padding
        assert importlib.import_module("flash_attn.layers.rotary").apply_rotary_emb is apply_rotary_emb
        assert importlib.import_module("flash_attn.flash_attn_interface").flash_attn_func is module.flash_attn_func
        assert importlib.import_module("flash_attn_interface") is v3
        assert importlib.import_module("flash_attn.cute").flash_attn_func is cute.flash_attn_func
        assert importlib.util.find_spec("flash_attn") is not None
    finally:
        flash_attn.uninstall()
    assert {name: sys.modules.get(name) for name in before} == before
