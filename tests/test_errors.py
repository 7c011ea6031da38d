"""Bad input is refused with the name of the argument, what was needed and what came."""

from __future__ import annotations

import pytest
import torch

import pyattn
from pyattn import dispatch

B, HQ, HKV, LQ, LK, D = 2, 4, 2, 6, 9, 8


def dense(**overrides):
    """Arguments of a legal call, with some replaced."""
    arguments = {
        "query": torch.randn(B, HQ, LQ, D),
        "key": torch.randn(B, HKV, LK, D),
        "value": torch.randn(B, HKV, LK, D),
    }
    return arguments | overrides


def packed(**overrides):
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    arguments = {name: torch.randn(10, 4, D) for name in ("query", "key", "value")}
    return arguments | {"cu_seqlens_q": cu, "cu_seqlens_k": cu} | overrides


def paged(**overrides):
    arguments = {
        "query": torch.randn(B, HQ, 1, D),
        "key": torch.randn(5, HKV, 4, D),
        "value": torch.randn(5, HKV, 4, D),
    }
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    return arguments | {"block_table": table, "kv_lengths": ints(8, 3)} | overrides


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def z(*shape, dtype=torch.float32, device=None, **kwargs):
    return torch.zeros(shape, dtype=dtype, device=device, **kwargs)


def keys(*shape):
    return {"key": z(*shape), "value": z(*shape)}


def test_the_calls_below_are_legal_but_for_the_argument():
    assert pyattn.attention(**dense()).shape == (B, HQ, LQ, D)
    assert pyattn.attention(**paged()).shape == (B, HQ, 1, D)
    assert pyattn.attention_varlen(**packed()).shape == (10, 4, D)


NAN, INF = float("nan"), float("inf")
BAD_DENSE = [
    # query, key and value
    (ValueError, r"query must have shape \[B, H, L, D\], got \[6, 8\]", {"query": z(LQ, D)}),
    (ValueError, r"key must have shape \[B, H, L, D\], got \[2, 9, 8\]", {"key": z(B, LK, D)}),
    (ValueError, r"value must have shape \[B, H, L, D\], got \[1, 2, 2", {"value": z(1, B, HKV, LK, D)}),
    (TypeError, "query must be a tensor, got list", {"query": [[1.0]]}),
    (TypeError, "key must be a tensor, got NoneType", {"key": None}),
    (TypeError, "value must be a tensor, got ndarray", {"value": z(B, HKV, LK, D).numpy()}),
    (ValueError, "query must have a multiple of key's 3 heads, got 4", keys(B, 3, LK, D)),
    (ValueError, "query must have a multiple of key's 0 heads", keys(B, 0, LK, D)),
    (ValueError, "value must have the shape of key", {"value": z(B, HQ, LK, D)}),
    (ValueError, "value must have the shape of key", {"value": z(B, HKV, LK + 1, D)}),
    (ValueError, r"key must have the batch size of query \(2\), got 3", keys(3, HKV, LK, D)),
    (ValueError, r"key must have the head dim of query \(8\), got 5", {"key": z(B, HKV, LK, 5)}),
    (ValueError, r"key must be on .* query \(cpu\), got meta", {"key": z(B, HKV, LK, D, device="meta")}),
    (ValueError, "value must be on the device of query", {"value": z(B, HKV, LK, D, device="meta")}),
    (TypeError, "query must be float32 or .*, got int64", {"query": z(B, HQ, LQ, D, dtype=torch.int64)}),
    (TypeError, "query must be .*, got complex64", {"query": z(B, HQ, LQ, D, dtype=torch.complex64)}),
    (TypeError, "query must be .*, got float8_e4m3fn", {"query": z(B, HQ, LQ, D, dtype=torch.float8_e4m3fn)}),
    (TypeError, "key must be .*, got bool", {"key": z(B, HKV, LK, D, dtype=torch.bool)}),
    (TypeError, "key must have the dtype of query", {"key": z(B, HKV, LK, D, dtype=torch.float16)}),
    (TypeError, "value must have the dtype of query", {"value": z(B, HKV, LK, D, dtype=torch.float64)}),
    (TypeError, "query must be a dense tensor, got .*sparse_coo", {"query": z(B, HQ, LQ, D).to_sparse()}),
    (TypeError, "key must be a dense tensor, got .*jagged, nested",
     {"key": torch.nested.nested_tensor([z(3, D)], layout=torch.jagged)}),
    # attn_mask
    (TypeError, "attn_mask must be bool or .*, got int64", {"attn_mask": z(LQ, LK, dtype=torch.int64)}),
    (TypeError, "attn_mask must be .*, got float64", {"attn_mask": z(LQ, LK, dtype=torch.float64)}),
    (TypeError, "attn_mask must be .*, got complex64", {"attn_mask": z(LQ, LK, dtype=torch.complex64)}),
    (TypeError, "attn_mask must be a tensor, got str", {"attn_mask": "causal"}),
    (ValueError, r"attn_mask must .* = \[2, 4, 6, 9\], got \[9, 6\]", {"attn_mask": z(LK, LQ)}),
    (ValueError, "attn_mask must be broadcastable", {"attn_mask": z(3, 1, LQ, LK)}),
    (ValueError, "attn_mask must be broadcastable", {"attn_mask": z(1, 1, 1, LQ, LK)}),
    (ValueError, "attn_mask must be on the device of query", {"attn_mask": z(LQ, LK, device="meta")}),
    # causal, window, q_offset
    (TypeError, "causal must be a bool, got int", {"causal": 1}),
    (TypeError, "causal must be a bool, got NoneType", {"causal": None}),
    (ValueError, r"window must hold sizes of at least 0.*got \(-1, 0\)", {"window": (-1, 0)}),
    (ValueError, "window must hold sizes of at least 0", {"window": (0, -3)}),
    (TypeError, "window must be a pair", {"window": 3}),
    (TypeError, "window must be a pair", {"window": (1, 2, 3)}),
    (TypeError, "window must be an int, got float", {"window": (1.0, 0)}),
    (TypeError, "window must be an int, got bool", {"window": (True, 0)}),
    (TypeError, "q_offset must be an int, got float", {"q_offset": 0.5}),
    (ValueError, "q_offset must fit in 64 bits", {"q_offset": 2**63}),
    (ValueError, "window must fit in 64 bits", {"window": (2**70, 0)}),
    (TypeError, "q_offset must be an int, got str", {"q_offset": "end"}),
    (ValueError, r"q_offset must have shape \[B\] = \[2\], got \[3\]", {"q_offset": ints(0, 0, 0)}),
    (TypeError, "q_offset must be int32 or int64, got float32", {"q_offset": z(B)}),
    # alibi_slopes, softcap, sinks
    (TypeError, "alibi_slopes must be float32, got float64", {"alibi_slopes": z(HQ, dtype=torch.float64)}),
    (ValueError, r"alibi_slopes must have shape \[Hq\] = \[4\]", {"alibi_slopes": z(HKV)}),
    (ValueError, "alibi_slopes must have shape", {"alibi_slopes": z(3, HQ)}),
    (ValueError, "alibi_slopes must not require a gradient", {"alibi_slopes": z(HQ, requires_grad=True)}),
    (ValueError, "softcap must be positive", {"softcap": -1.0}),
    (ValueError, "softcap must be finite", {"softcap": NAN}),
    (TypeError, "softcap must be a number, got str", {"softcap": "30"}),
    (ValueError, r"sinks must have shape \[Hq\] = \[4\], got \[2\]", {"sinks": z(HKV)}),
    (TypeError, "sinks must be .*, got int64", {"sinks": z(HQ, dtype=torch.int64)}),
    # lengths
    (ValueError, r"kv_lengths must lie in \[0, 9\].*got \[9, 10\]", {"kv_lengths": ints(9, 10)}),
    (ValueError, "kv_lengths must lie in", {"kv_lengths": ints(-1, 3)}),
    (ValueError, r"kv_lengths must have shape \[B\]", {"kv_lengths": ints(1)}),
    (TypeError, "kv_lengths must be int32 or int64, got int16", {"kv_lengths": z(B, dtype=torch.int16)}),
    (TypeError, "kv_lengths must be a tensor, got tuple", {"kv_lengths": (1, 2)}),
    (ValueError, "kv_starts must lie in", {"kv_starts": ints(0, 10)}),
    (ValueError, "kv_starts must be on the device", {"kv_starts": z(B, dtype=torch.int32, device="meta")}),
    # dropout_p, scale, backend
    (ValueError, r"dropout_p must lie in \[0, 1\], got -0.1", {"dropout_p": -0.1}),
    (ValueError, "dropout_p must lie in", {"dropout_p": 1.5}),
    (ValueError, "dropout_p must be finite", {"dropout_p": NAN}),
    (TypeError, "dropout_p must be a number", {"dropout_p": "0.1"}),
    (ValueError, "scale must be finite, got nan", {"scale": NAN}),
    (ValueError, "scale must be finite, got inf", {"scale": INF}),
    (ValueError, r"scale must be finite, got 1e\+39 \(float32 ends at", {"scale": 1e39}),
    (ValueError, "scale must be finite", {"scale": 10**400}),
    (TypeError, "scale must be a number, got str", {"scale": "0.1"}),
    (TypeError, "scale must be a number, got bool", {"scale": True}),
    (TypeError, "return_lse must be a bool", {"return_lse": "yes"}),
    (ValueError, "backend must be None or one of .*cpu.*reference.*, got 'cuDNN'", {"backend": "cuDNN"}),
    ((TypeError, ValueError), "backend must be", {"backend": 3}),
    ((TypeError, ValueError), "backend must be", {"backend": ["cpu"]}),
    ((TypeError, ValueError), "backend must be", {"backend": torch.ones(2).numpy()}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "overrides"), BAD_DENSE, ids=[case[1] for case in BAD_DENSE])
def test_attention(error, match, overrides):
    with pytest.raises(error, match=match):
        pyattn.attention(**dense(**overrides))


BAD_PAGED = [
    (ValueError, "kv_lengths must be given with block_table", {"kv_lengths": None}),
    (ValueError, r"block_table must lie in \[0, 4\]", {"block_table": ints(0, 5, 1, 1).view(2, 2)}),
    (ValueError, r"block_table must lie in \[0, 4\]", {"block_table": ints(-1, 0, 1, 1).view(2, 2)}),
    (ValueError, r"block_table must have shape \[B, max_pages\]", {"block_table": ints(0, 1)}),
    (ValueError, "block_table must have shape", {"block_table": ints(0, 1, 2).view(3, 1)}),
    (TypeError, "block_table must be int32, got int64", {"block_table": z(2, 2, dtype=torch.int64)}),
    (ValueError, r"kv_lengths must lie in \[0, 8\]", {"kv_lengths": ints(9, 0)}),
    (ValueError, "key must have pages of at least one token", keys(5, HKV, 0, D)),
    (NotImplementedError, "no gradient, but query", {"query": z(B, HQ, 1, D, requires_grad=True)}),
    (TypeError, "attn_mask must be a tensor, got int", {"attn_mask": 1}),
    (NotImplementedError, "no gradient, but key", {"key": z(5, HKV, 4, D, requires_grad=True)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "overrides"), BAD_PAGED, ids=[case[1] for case in BAD_PAGED])
def test_paged(error, match, overrides):
    with pytest.raises(error, match=match):
        pyattn.attention(**paged(**overrides))


def test_pages_that_are_not_in_use_may_have_any_number():
    table = ints(0, 1, 2, 999).view(2, 2)  # the second sample uses 3 keys: one page
    assert pyattn.attention(**paged(block_table=table)).isfinite().all()


BAD_PACKED = [
    (ValueError, r"query must have shape \[total, H, D\]", {"query": z(1, 10, 4, D)}),
    (ValueError, r"cu_seqlens_q must rise from 0 to the total of 10", {"cu_seqlens_q": ints(1, 4, 10)}),
    (ValueError, "cu_seqlens_q must rise", {"cu_seqlens_q": ints(0, 4, 9)}),
    (ValueError, "cu_seqlens_k must rise", {"cu_seqlens_k": ints(0, 12, 10)}),
    (ValueError, "cu_seqlens_k must rise", {"cu_seqlens_k": ints(0, -4, 10)}),
    (ValueError, "cu_seqlens_q must rise",  # steps that a sum of 32 bits would take for small ones
     {name: ints(0, 2**31 - 1, -2, 10) for name in ("cu_seqlens_q", "cu_seqlens_k")}),
    (ValueError, r"cu_seqlens_k must have shape .* = \[3\], got \[2\]", {"cu_seqlens_k": ints(0, 10)}),
    (ValueError, "cu_seqlens_q must have shape", {"cu_seqlens_q": z(0, dtype=torch.int32)}),
    (TypeError, "cu_seqlens_q must be int32, got int64", {"cu_seqlens_q": ints(0, 4, 10, dtype=torch.int64)}),
    (TypeError, "cu_seqlens_q must be a tensor, got list", {"cu_seqlens_q": [0, 4, 10]}),
    (TypeError, "cu_seqlens_k must be a tensor, got NoneType", {"cu_seqlens_k": None}),
    (ValueError, r"max_seqlen_q must be at least the longest sequence \(6\), got 5", {"max_seqlen_q": 5}),
    (ValueError, "max_seqlen_k must be at least the longest", {"max_seqlen_k": 0}),
    (ValueError, "max_seqlen_k must be at least 0", {"max_seqlen_k": -1}),
    (TypeError, "max_seqlen_q must be an int, got float", {"max_seqlen_q": 6.0}),
    (ValueError, "kv_lengths must lie between 0 and the keys of each sequence", {"kv_lengths": ints(5, 6)}),
    (ValueError, "cu_seqlens_k must be None with block_table", paged(query=z(10, 4, D))),
    (TypeError, "attn_mask", {"attn_mask": z(10, 10)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "overrides"), BAD_PACKED, ids=[case[1] for case in BAD_PACKED])
def test_attention_varlen(error, match, overrides):
    with pytest.raises(error, match=match):
        pyattn.attention_varlen(**packed(**overrides))


def test_naive_attention_takes_no_backend():
    with pytest.raises(ValueError, match="backend must be None"):
        pyattn.naive_attention(**dense(), backend="cpu")


def test_a_named_backend_that_cannot_raises_with_its_reasons():
    with pytest.raises(NotImplementedError, match=r"backend 'cpu' cannot compute this forward: .+"):
        pyattn.attention(**dense(query=z(B, HQ, LQ, 600), key=z(B, HKV, LK, 600)), backend="cpu")
    on_meta = {name: x.to("meta") for name, x in dense().items()}
    assert "runs on CPU tensors, these are on meta" in str(dispatch.why_not(pyattn.explain(**on_meta).problem, "cpu"))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_last_stride_other_than_one_is_copied_not_refused(name, engine):
    contiguous = dense()
    strided = contiguous | {name: contiguous[name].mT.contiguous().mT}
    assert strided[name].stride(-1) != 1
    assert torch.equal(engine.run(strided), engine.run(contiguous))
