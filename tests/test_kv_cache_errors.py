"""What a KV cache refuses, by name and with nothing done; what it is for torch; saving and loading."""

from __future__ import annotations

import copy
import io
import re

import cache_model
import pytest
import torch
from cache_model import refuses

import pyattn
from pyattn import KVCache

HQ, HKV, D, DV = 4, 2, 8, 12
by_layout = pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "paged"])


def z(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


def filled(page_size=None, lengths=(5, 3), **arguments):
    """``[2, HKV, 10, D]``, in which samples 0 and 1 hold a few tokens."""
    torch.manual_seed(1)
    cache = KVCache(2, HKV, D, 10, v_head_dim=DV, page_size=page_size, **arguments)
    cache.append(*(torch.randn(2, HKV, 5, n).to(cache.dtype) for n in (D, DV)), lengths=list(lengths))
    return cache


# ---- arguments ---------------------------------------------------------------------------------------------


SIZES = {"batch": 2, "num_kv_heads": 2, "head_dim": 8, "max_length": 10}


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "batch must be at least 0, got -1", {"batch": -1}),
        (TypeError, "batch must be an int, got float", {"batch": 2.0}),
        (ValueError, "num_kv_heads must be at least 1, got 0", {"num_kv_heads": 0}),
        (ValueError, "head_dim must be at least 1, got 0", {"head_dim": 0}),
        (ValueError, "v_head_dim must be at least 1, got 0", {"v_head_dim": 0}),
        (ValueError, "max_length must be at least 1, got -3", {"max_length": -3}),
        (TypeError, "max_length must be an int, got bool", {"max_length": True}),
        (ValueError, "page_size must be at least 1, got 0", {"page_size": 0}),
        (TypeError, "page_size must be an int, got str", {"page_size": "16"}),
        (ValueError, "num_pages must be at least 0, got -1", {"page_size": 4, "num_pages": -1}),
        (ValueError, "num_pages must come with page_size", {"num_pages": 4}),
        (TypeError, "dtype must be float32, .*, got torch.int32", {"dtype": torch.int32}),
    ],
)
def test_sizes(error, message, arguments):
    with pytest.raises(error, match=message):
        KVCache(**SIZES | arguments)


K, V = z(2, HKV, 4, D), z(2, HKV, 4, DV)
BAD_APPENDS = [
    (TypeError, "key must be a tensor, got list", {"key": [1.0]}),
    (TypeError, "key must be float32, got float16", {"key": K.half()}),
    (TypeError, "value must be float32, got bfloat16", {"value": V.bfloat16()}),
    (ValueError, r"key must be on the device of the cache \(cpu\), got meta", {"key": K.to("meta")}),
    (ValueError, r"value must be on the device of the cache \(cpu\), got meta", {"value": V.to("meta")}),
    (ValueError, r"key must have shape \[B, Hkv, L, D\] = \[2, 2, 4, 8\], got \[2, 2, 4, 9\]", {"key": z(2, 2, 4, 9)}),
    (ValueError, r"key must have shape .*got \[2, 1, 4, 8\]", {"key": K[:, :1]}),
    (ValueError, r"key must have shape .*got \[1, 2, 4, 8\]", {"key": K[:1]}),
    (ValueError, r"key must have shape .*got \[2, 4, 8\]", {"key": K[0]}),
    (ValueError, r"value must have shape \[B, Hkv, L, Dv\] .*got \[2, 2, 4, 8\]", {"value": K}),
    (
        ValueError,
        r"value must have shape .* with key's L = \[2, 2, 4, 12\], got \[2, 2, 3, 12\]",
        {"value": V[:, :, :3]},
    ),
    (ValueError, r"lengths must lie in \[0, 4\] .*got \[5, 0\]", {"lengths": [5, 0]}),
    (ValueError, r"lengths must lie in \[0, 4\] .*got \[0, -1\]", {"lengths": torch.tensor([0, -1])}),
    (ValueError, "lengths must hold one number for each of the 2 samples, got 3", {"lengths": [1, 1, 1]}),
    (ValueError, r"lengths must have shape \[B\] = \[2\], got \[1\]", {"lengths": torch.tensor([1])}),
    (TypeError, "lengths must be int32 or int64, got float32", {"lengths": z(2)}),
    (TypeError, "lengths must be an int, got float", {"lengths": [1.0, 1]}),
    (TypeError, "lengths must be a tensor, list or tuple of ints, got int", {"lengths": 2}),
    (NotImplementedError, "key must not require a gradient", {"key": K.clone().requires_grad_()}),
    (NotImplementedError, "value must not require a gradient", {"value": V.clone().requires_grad_()}),
]


@by_layout
@pytest.mark.parametrize(("error", "message", "changes"), BAD_APPENDS)
def test_appends(error, message, changes, page_size):
    cache = filled(page_size)
    refuses(cache, error, message, lambda: cache.append(**{"key": K, "value": V} | changes))
    arguments = {"query": z(2, HQ, 4, D), "cache": cache, "key": K, "value": V} | changes
    refuses(cache, error, message, lambda: pyattn.attention_with_kv_cache(**arguments))


MASK = z(2, 1, 4, 9, dtype=torch.bool)
BAD_CALLS = [
    (TypeError, "query must be float32, got float64", {"query": z(2, HQ, 4, D, dtype=torch.float64)}),
    (ValueError, "query must be on the device of the cache", {"query": z(2, HQ, 4, D, device="meta")}),
    (ValueError, r"query must have shape .*B = 2 and D = 8, got \[3, 4, 4, 8\]", {"query": z(3, HQ, 4, D)}),
    (ValueError, r"query must have shape .*got \[2, 4, 4, 9\]", {"query": z(2, HQ, 4, 9)}),
    (ValueError, r"query must have shape .*got \[4, 4, 8\]", {"query": z(HQ, 4, D)}),
    (ValueError, "query must have a multiple of key's 2 heads, got 3", {"query": z(2, 3, 4, D)}),
    (ValueError, r"key must have the length of query \(3\), got 4", {"query": z(2, HQ, 3, D)}),
    (TypeError, "cache must be a pyattn.KVCache, got NoneType", {"cache": None}),
    (ValueError, "value must come with the other of key and value, got None", {"value": None}),
    (ValueError, "key must come with the other of key and value, got None", {"key": None}),
    (ValueError, "lengths must come with key and value", {"key": None, "value": None, "lengths": [1, 1]}),
    (TypeError, "rotary must be a pyattn.Rotary, got tuple", {"rotary": (z(9, 4), z(9, 4))}),
    (ValueError, "rotary must have at least 9 positions, got 8", {"rotary": pyattn.Rotary(z(8, 4), z(8, 4))}),
    (ValueError, "positions must come with rotary", {"positions": torch.arange(4)}),
    (
        ValueError,
        r"positions must lie in \[0, 8\]",
        {"rotary": pyattn.Rotary(z(9, 4), z(9, 4)), "positions": torch.arange(6, 10)},
    ),
    (
        ValueError,
        "query must have at most the tokens that the cache has seen, got 4",
        {"rotary": pyattn.Rotary(z(9, 4), z(9, 4)), "key": None, "value": None},
    ),
    (ValueError, "attn_mask must have 1 column, or one for each of the 9 .*, got .* 10", {"attn_mask": z(2, 1, 4, 10)}),
    (TypeError, "attn_mask must be bool or .*, got int64", {"attn_mask": MASK.long()}),
    (TypeError, "attn_mask must be bool or float32, got float16", {"attn_mask": MASK.half()}),
    (ValueError, "attn_mask must be broadcastable", {"attn_mask": MASK[:, :, :3]}),
    (ValueError, "attn_mask must be on the device of the cache", {"attn_mask": MASK.to("meta")}),
    (TypeError, "causal must be a bool", {"causal": 1}),
    (TypeError, "window must be a pair", {"window": 3}),
    (ValueError, r"alibi_slopes must have shape \[Hq\]", {"alibi_slopes": z(3)}),
    (ValueError, "softcap must be positive", {"softcap": -1.0}),
    (ValueError, r"sinks must have shape \[Hq\]", {"sinks": z(3)}),
    (TypeError, "scale must be a number", {"scale": "1"}),
    (TypeError, "return_lse must be a bool", {"return_lse": 1}),
    (ValueError, "backend must be None or one of", {"backend": "best"}),
    (NotImplementedError, "backend 'cuda' cannot compute this", {"backend": "cuda"}),
]


@by_layout
@pytest.mark.parametrize(("error", "message", "changes"), BAD_CALLS)
def test_calls(error, message, changes, page_size):
    cache = filled(page_size)
    arguments = {"query": z(2, HQ, 4, D), "cache": cache, "key": K, "value": V} | changes
    refuses(cache, error, message, lambda: pyattn.attention_with_kv_cache(**arguments))


@by_layout
@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"indices must lie in \[0, 1\] .*got \[0, 2\]", lambda c: c.reorder([0, 2])),
        (ValueError, r"indices must lie in \[0, 1\] .*got \[-1, 0\]", lambda c: c.reorder(torch.tensor([-1, 0]))),
        (ValueError, "indices must hold one number for each of the 2 samples, got 1", lambda c: c.reorder([0])),
        (TypeError, "indices must be int32 or int64, got bool", lambda c: c.reorder(torch.tensor([True, False]))),
        (ValueError, r"source must lie in \[0, 1\] .*got 2", lambda c: c.fork(2)),
        (TypeError, "source must be an int", lambda c: c.fork(0.0)),
        (ValueError, r"targets must lie in \[0, 1\] .*got \[1, -1\]", lambda c: c.fork(0, [1, -1])),
        (TypeError, "targets must be a list or tuple of ints, got int", lambda c: c.fork(0, 1)),
        (ValueError, "window must be at least 0, got -1", lambda c: c.evict(-1)),
        (TypeError, "window must be an int, got tuple", lambda c: c.evict((3, 0))),
        (ValueError, r"lengths must lie between .*\[5, 3\], got \[5, 4\]", lambda c: c.truncate([5, 4])),
        (ValueError, r"lengths must lie between .*got \[5, -1\]", lambda c: c.truncate([5, -1])),
        (ValueError, r"samples must lie in \[0, 1\] .*got \[2\]", lambda c: c.reset([2])),
        (ValueError, "length must be at least 0, got -1", lambda c: c.make_room(-1)),
        (ValueError, "key must fit into max_length = 10: sample 0 has 5 .* 6 more", lambda c: c.make_room(6)),
        (ValueError, "length must be at least 0, got -1", lambda c: c.positions(-1)),
    ],
)
def test_other_methods(error, message, call, page_size):
    cache = filled(page_size)
    refuses(cache, error, message, lambda: call(cache))


@by_layout
def test_what_has_been_evicted_cannot_be_brought_back(page_size):
    cache = filled(page_size)
    cache.evict(2)
    message = re.escape("lengths must lie between the cache's starts [3, 1] and lengths [5, 3], got [2, 3]")
    refuses(cache, ValueError, message, lambda: cache.truncate([2, 3]))
    cache.evict(4)
    assert cache.starts.tolist() == [3, 1]


@by_layout
def test_what_does_not_count_needs_no_angle(page_size):
    """Nor does it look beyond the tables: samples with 5 and 3 tokens get 2 and 4 more, which makes 7."""
    angles = torch.randn(7, 4)
    rotary = pyattn.Rotary(angles.cos(), angles.sin())
    cache = filled(page_size)
    q = torch.randn(2, HQ, 4, D)
    out = pyattn.attention_with_kv_cache(q, cache, K, V, lengths=[2, 4], rotary=rotary)
    assert out.isfinite().all()
    message = "rotary must have at least 8 positions, got 7"
    one = q[:, :, :1], cache, K[:, :, :1], V[:, :, :1]
    refuses(cache, ValueError, message, lambda: pyattn.attention_with_kv_cache(*one, rotary=rotary))


def test_the_backend_that_is_named_computes(monkeypatch):
    def forward(spec, tensors):
        raise AssertionError("the reference was called")

    monkeypatch.setattr(pyattn.reference, "forward", forward)
    with pytest.raises(AssertionError, match="the reference was called"):
        pyattn.attention_with_kv_cache(z(2, HQ, 4, D), filled(), K, V, backend="reference")


# ---- full --------------------------------------------------------------------------------------------------


@by_layout
def test_a_full_buffer(page_size):
    cache = filled(page_size)
    kv = z(2, HKV, 6, D), z(2, HKV, 6, DV)
    message = "key must fit into max_length = 10: sample 0 has 5 tokens and would get 6 more"
    refuses(cache, ValueError, message, lambda: cache.append(*kv))
    cache.append(*kv, lengths=[5, 6])
    cache.evict(9)
    cache.append(*kv, lengths=[1, 1])
    assert cache.seen.tolist() == [11, 10]


def test_indices_stay_as_long_as_they_can():
    cache = filled()
    cache.evict(2)
    cache.append(z(2, HKV, 5, D), z(2, HKV, 5, DV))
    assert [cache.starts.tolist(), cache.lengths.tolist()] == [[3, 1], [10, 8]]
    cache.append(z(2, HKV, 1, D), z(2, HKV, 1, DV))
    assert [cache.starts.tolist(), cache.lengths.tolist()] == [[0, 1], [8, 9]]


def test_exhausted_pages():
    """The last sample does not fit, though the ones before it would; nothing is written until there is room again."""
    cache = filled(4, num_pages=5)
    assert cache.num_free_pages == 2
    kv = torch.randn(2, HKV, 6, D), torch.randn(2, HKV, 6, DV)
    before = cache.key.clone()
    for call in (
        lambda: cache.append(*kv, lengths=[4, 6]),
        lambda: pyattn.attention_with_kv_cache(z(2, HQ, 6, D), cache, *kv, lengths=[4, 6]),
    ):
        refuses(cache, ValueError, "key must fit into the 2 pages that are free, but needs 3", call)
        assert torch.equal(cache.key, before)
    cache.evict(1)  # frees the first page of sample 0
    cache.append(*kv, lengths=[4, 6])
    assert cache.num_free_pages == 0


def test_a_copy_needs_a_page_too():
    """Two samples share a page that is not full: the first to write copies it, the second has it for itself."""
    cache = filled(4, num_pages=4, lengths=(5, 0))
    cache.fork(0)
    assert cache.num_free_pages == 2
    kv = torch.randn(2, HKV, 5, D), torch.randn(2, HKV, 5, DV)
    refuses(cache, ValueError, "the 2 pages that are free, but needs 3", lambda: cache.append(*kv, lengths=[4, 4]))
    cache.append(*kv, lengths=[3, 4])
    assert cache.num_free_pages == 0
    first, second = (cache_model.live(cache, b)[0] for b in range(2))
    assert torch.equal(first[:, :, :5], second[:, :, :5]), "the prompt"
    assert torch.equal(first[0, :, 5:], kv[0][0, :, :3]) and torch.equal(second[0, :, 5:], kv[0][1, :, :4])


def test_a_mask_whose_columns_would_move():
    cache = filled()
    cache.append(z(2, HKV, 4, D), z(2, HKV, 4, DV))
    cache.evict(4)
    q, k, v = z(2, HQ, 2, D), z(2, HKV, 2, D), z(2, HKV, 2, DV)
    mask = torch.ones(2, 9, dtype=torch.bool)
    message = "attn_mask must have the buffer indices after the append, which would move some: call cache.make_room"
    refuses(
        cache, ValueError, message, lambda: pyattn.attention_with_kv_cache(q, cache, k, v, attn_mask=mask)
    )  # the second sample ends at 9, the first moved
    cache.make_room(2)
    assert cache.lengths.tolist() == [4, 7]
    assert pyattn.attention_with_kv_cache(q, cache, k, v, attn_mask=mask).isfinite().all()


# ---- torch -------------------------------------------------------------------------------------------------


def op_arguments():
    tokens, slots = torch.tensor([0, 1, 4]), torch.tensor([3, 4, 12])
    return z(2, HKV, 10, D), z(2, HKV, 10, DV), torch.randn(2, HKV, 4, D), torch.randn(2, HKV, 4, DV), tokens, slots


def test_the_op():
    torch.library.opcheck(torch.ops.pyattn.kv_cache_append.default, op_arguments())


def test_the_op_says_that_it_writes():
    arguments = op_arguments()
    versions = [x._version for x in arguments]
    torch.ops.pyattn.kv_cache_append(*arguments)
    written = [x._version > version for x, version in zip(arguments, versions, strict=True)]
    assert written == [True, True, False, False, False, False]


@pytest.mark.parametrize("place", [4, 5])
@pytest.mark.parametrize("bad", [-1, 20])
def test_the_op_checks_places(place, bad):
    arguments = list(op_arguments())
    arguments[place] = torch.tensor([0, 1, bad])
    with pytest.raises(ValueError, match=f"{('tokens', 'slots')[place - 4]} must lie in"):
        torch.ops.pyattn.kv_cache_append(*arguments)
    assert not arguments[0].any()


def test_the_op_refuses_derivatives_and_vmap():
    buffers, (key, value), places = op_arguments()[:2], op_arguments()[2:4], op_arguments()[4:]
    op = torch.ops.pyattn.kv_cache_append
    with pytest.raises(NotImplementedError, match="kv_cache_append has no gradient"):
        op(*buffers, key.requires_grad_(), value, *places)
    with torch.no_grad():
        op(*buffers, key, value, *places)
    key = key.detach()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        op(*buffers, torch.autograd.forward_ad.make_dual(key, key), value, *places)
    with pytest.raises(NotImplementedError, match=r"kv_cache_append cannot be computed under torch\.vmap"):
        torch.vmap(lambda k: op(*buffers, k, value, *places), out_dims=None)(key[None])


def test_gradients_of_the_query():
    """Through a dense cache; once that has changed torch says so, and through pages pyattn does."""
    cache = filled(dtype=torch.float64)
    query, kv = torch.randn(2, HQ, 1, D).double().requires_grad_(), (K[:, :, :1].double(), V[:, :, :1].double())
    (grad,) = torch.autograd.grad(pyattn.attention_with_kv_cache(query, cache, *kv).sum(), query)
    for b in range(2):
        alone = pyattn.attention(query[b : b + 1], *cache_model.live(cache, b))
        torch.testing.assert_close(grad[b : b + 1], torch.autograd.grad(alone.sum(), query)[0][b : b + 1])
    out = pyattn.attention_with_kv_cache(query, cache)
    cache.append(*kv)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    paged = filled(4, dtype=torch.float64)
    message = "paged keys have no gradient, but query requires one"
    refuses(paged, NotImplementedError, message, lambda: pyattn.attention_with_kv_cache(query, paged, *kv))


@by_layout
def test_inference_mode(page_size):
    """A cache may be made in it and used outside, or the other way round."""
    with torch.inference_mode():
        cache = filled(page_size)
        outside = pyattn.attention_with_kv_cache(z(2, HQ, 4, D), cache, K, V)
        cache.truncate([5, 3])
    assert torch.equal(pyattn.attention_with_kv_cache(z(2, HQ, 4, D), cache, K, V), outside)
    with torch.inference_mode():
        cache.truncate([5, 3])
        assert torch.equal(pyattn.attention_with_kv_cache(z(2, HQ, 4, D), cache, K, V), outside)
    if page_size is None:
        query = torch.randn(2, HQ, 4, D, requires_grad=True)
        pyattn.attention_with_kv_cache(query, cache).sum().backward()
        assert query.grad.any()


def test_autocast_leaves_the_cache_its_dtype():
    q = torch.randn(2, HQ, 4, D)
    plain = pyattn.attention_with_kv_cache(q, filled(), K, V)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pyattn.attention_with_kv_cache(q, filled(), K, V), plain)
        message = "query must be float32, got bfloat16"
        with pytest.raises(TypeError, match=message):
            pyattn.attention_with_kv_cache(q.bfloat16(), filled(), K, V)


@by_layout
def test_nothing_to_do(page_size):
    empty = KVCache(0, HKV, D, 10, page_size=page_size)
    assert pyattn.attention_with_kv_cache(z(0, HQ, 3, D), empty, z(0, HKV, 3, D), z(0, HKV, 3, D)).shape == (
        0,
        HQ,
        3,
        D,
    )
    empty.reorder([])
    empty.evict(3)
    empty.load_state_dict(empty.state_dict())
    cache = KVCache(2, HKV, D, 10, page_size=page_size)
    out, lse = pyattn.attention_with_kv_cache(z(2, HQ, 3, D), cache, return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()
    assert pyattn.attention_with_kv_cache(z(2, HQ, 0, D), cache, z(2, HKV, 0, D), z(2, HKV, 0, D)).shape[2] == 0


def test_any_strides():
    query, key, value = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (torch.randn(2, HQ, 4, D), K, V))
    assert query.stride(-1) != 1
    actual, expected = filled(4), filled(4)
    out = pyattn.attention_with_kv_cache(query, actual, key + 1, value + 1)
    torch.testing.assert_close(out, pyattn.attention_with_kv_cache(query.contiguous(), expected, K + 1, V + 1))
    assert cache_model.snapshot(actual) == cache_model.snapshot(expected)


# ---- save and load -----------------------------------------------------------------------------------------


def used(page_size, **arguments):
    """Evicted, shared, and grown again."""
    cache = filled(page_size, **arguments)
    cache.evict(1)
    cache.fork(0)
    cache.append(torch.randn(2, HKV, 2, D), torch.randn(2, HKV, 2, DV), lengths=[2, 0])
    return cache


@by_layout
def test_save_and_load(page_size):
    cache = used(page_size)
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    other = KVCache(2, HKV, D, 12, v_head_dim=DV, page_size=page_size, num_pages=page_size and 3)
    other.append(K, V, lengths=[4, 2])
    other.load_state_dict(torch.load(file, weights_only=True))
    for x, y in zip((cache, other), (copy.deepcopy(cache), copy.deepcopy(other)), strict=True):
        assert cache_model.snapshot(x) == cache_model.snapshot(y)
    assert [x.tolist() for x in (other.starts, other.lengths, other.seen)] == [[4, 4], [7, 5], [7, 5]]
    for b in range(2):
        for x, y in zip(cache_model.live(other, b), cache_model.live(cache, b), strict=True):
            assert torch.equal(x, y)
    query = torch.randn(2, HQ, 1, D)
    for x in (cache, other):
        x.append(K[:, :, :1], V[:, :, :1])
    assert torch.equal(*(pyattn.attention_with_kv_cache(query, x) for x in (cache, other)))


def test_pages_that_are_shared_stay_shared():
    cache = filled(4)
    cache.fork(0)
    state = cache.state_dict()
    assert state["key"].shape[0] == 2
    other = KVCache(2, HKV, D, 10, v_head_dim=DV, page_size=4, num_pages=2)
    other.load_state_dict(state)
    assert other.num_free_pages == 0
    other.reset([0])
    assert other.num_free_pages == 0, "the other sample holds them"
    other.reset([1])
    assert other.num_free_pages == 2


def test_a_state_is_a_copy():
    cache = filled()
    state = cache.state_dict()
    cache.key.fill_(7)
    assert not (state["key"] == 7).any()
    state["lengths"].fill_(0)
    assert cache.lengths.tolist() == [5, 3]


@pytest.mark.parametrize(
    ("page_size", "message", "changes"),
    [
        (None, "state must have the entries", {"more": 1}),
        (None, "state's page_size must be None, got 4", {"page_size": 4}),
        (4, "state's page_size must be 4, got None", {"page_size": None}),
        (None, r"state's lengths must have shape \[B\] = \[2\], got \[3\]", {"lengths": torch.tensor([1, 1, 1])}),
        (None, "state's starts, lengths and seen must be", {"starts": torch.tensor([9, 0])}),
        (None, "state's starts, lengths and seen must be", {"starts": torch.tensor([-1, 0])}),
        (None, "state's starts, lengths and seen must be", {"seen": torch.tensor([4, 4])}),
        (None, "state's starts, lengths and seen must be", {"lengths": torch.tensor([11, 0]), "seen": [11, 0]}),
        (None, "state's key must be float32, got float64", {"key": z(2, HKV, 5, D, dtype=torch.float64)}),
        (None, r"state's key must have shape .* = \[2, 2, 5, 8\], got \[2, 2, 4, 8\]", {"key": z(2, HKV, 4, D)}),
        (None, r"state's value must have shape .* = \[2, 2, 5, 12\]", {"value": z(2, HKV, 5, D)}),
        (4, "state's key must have at most the cache's 8 pages, got 9", {"key": z(9, HKV, 4, D)}),
        (4, r"state's value must have shape .* = \[3, 2, 4, 12\]", {"value": z(2, HKV, 4, DV)}),
        (4, "state's block_table must name its 3 pages", {"block_table": [[0, 3], [1, -1]]}),
        (4, "state's block_table must name its 3 pages", {"block_table": [[0, -1], [1, -1]]}),
        (4, r"state's block_table must have shape \[B, pages\] = \[2, 2\]", {"block_table": [[0], [1]]}),
        (4, "state's block_table must be int32, got int64", {"block_table": torch.tensor([[0, 1], [2, -1]])}),
    ],
)
def test_a_state_that_does_not_fit(page_size, message, changes):
    cache = filled(page_size)
    state = cache.state_dict()
    changes = {n: torch.tensor(x, dtype=torch.int32) if isinstance(x, list) else x for n, x in changes.items()}
    refuses(cache, (TypeError, ValueError), message, lambda: cache.load_state_dict(state | changes))
    refuses(cache, TypeError, "state must be a dict, got list", lambda: cache.load_state_dict([]))
