"""A step of decoding is made short where nobody watches: the same results, the same errors."""

from __future__ import annotations

import cache_model
import pytest
import torch
from cache_model import refuses
from watcher import Watcher

import pyattn
from pyattn import KVCache

HQ, HKV, D, DV = 4, 2, 8, 12
K, V = torch.randn(2, HKV, 4, D), torch.randn(2, HKV, 4, DV)
by_layout = pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "paged"])


def filled(page_size=None):
    """Two samples of 5 and 3 tokens."""
    cache = KVCache(2, HKV, D, 10, v_head_dim=DV, page_size=page_size)
    cache.append(torch.ones(2, HKV, 5, D), torch.ones(2, HKV, 5, DV), lengths=[5, 3])
    return cache


@by_layout
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_who_watches_sees_the_ops_and_the_same_bits(batch, page_size):
    """Whether tokens are few or many, all or some: past the dispatcher they go where the op writes them."""
    torch.manual_seed(0)
    caches = [KVCache(batch, HKV, D, 20, v_head_dim=DV, page_size=page_size) for _ in range(2)]
    counts = [3, 0, 5, 1, 4][:batch]
    for length, lengths in ((1, None), (5, counts), (5, None), (2, [0] * batch), (1, None)):
        q, k, v = torch.randn(batch, HQ, length, D), *(torch.randn(batch, HKV, length, n) for n in (D, DV))
        out = pyattn.attention_with_kv_cache(q, caches[0], k, v, lengths=lengths)
        with Watcher() as watcher:
            watched = pyattn.attention_with_kv_cache(q, caches[1], k, v, lengths=lengths)
        assert {"pyattn::kv_cache_append", "pyattn::attention_forward"} <= set(watcher.seen)
        assert torch.equal(out, watched)
        assert cache_model.snapshot(caches[0]) == cache_model.snapshot(caches[1])


class Tagged(torch.Tensor):
    pass


def test_subclasses_stay_what_they_are():
    q, k, v = (x.as_subclass(Tagged) for x in (torch.randn(2, HQ, 4, D), K, V))
    cache, expected = filled(), filled()
    out = pyattn.attention_with_kv_cache(q, cache, k, v)
    assert type(out) is Tagged
    plain = pyattn.attention_with_kv_cache(q.as_subclass(torch.Tensor), expected, K, V)
    assert torch.equal(out.as_subclass(torch.Tensor), plain)
    assert cache_model.snapshot(cache) == cache_model.snapshot(expected)


@by_layout
@pytest.mark.parametrize(
    ("legal", "illegal", "error", "message"),
    [
        ({"causal": True}, {"causal": 1}, TypeError, "causal must be a bool"),
        ({"scale": 1.0}, {"scale": True}, TypeError, "scale must be a number"),
        ({"softcap": 1}, {"softcap": True}, TypeError, "softcap must be a number"),
        ({"window": (1, 0)}, {"window": (True, 0)}, TypeError, "window must be an int"),
        ({"return_lse": True}, {"return_lse": 1}, TypeError, "return_lse must be a bool"),
        ({"backend": "cpu"}, {"backend": "cuda"}, NotImplementedError, "backend 'cuda' cannot compute this"),
    ],
)
def test_what_equals_a_prepared_call_is_refused_before_the_cache_changes(legal, illegal, error, message, page_size):
    cache = filled(page_size)
    arguments = {"query": torch.randn(2, HQ, 1, D), "cache": cache, "key": K[:, :, :1], "value": V[:, :, :1]}
    for _ in range(2):
        pyattn.attention_with_kv_cache(**arguments, **legal)
        refuses(cache, error, message, lambda: pyattn.attention_with_kv_cache(**arguments, **illegal))
    if page_size is not None:
        arguments["query"].requires_grad_()
        message = "paged keys have no gradient, but query requires one"
        refuses(cache, NotImplementedError, message, lambda: pyattn.attention_with_kv_cache(**arguments, **legal))


def test_starts_are_not_forgotten():
    """A call that was prepared while every sample began at 0 is none for samples that do not."""
    q = torch.randn(2, HQ, 1, D)
    cache = filled()
    for evicted in (9, 9, 2, 1):
        cache.evict(evicted)
        out = pyattn.attention_with_kv_cache(q, cache)
        for b in range(2):
            torch.testing.assert_close(out[b : b + 1], pyattn.attention(q[b : b + 1], *cache_model.live(cache, b)))


def test_a_table_is_written_when_it_changes():
    cache = filled(4)
    written = []
    for _ in range(5):
        version = cache.block_table._version
        cache.append(K[:, :, :1], V[:, :, :1])
        written.append(cache.block_table._version > version)
    assert written == [False, True, False, True, False]  # the samples begin with 5 and 3 tokens
