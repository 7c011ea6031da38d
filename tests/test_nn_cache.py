"""``GroupedQueryAttention`` with a ``KVCache``: step by step what it gives at once."""

from __future__ import annotations

import itertools

import cache_model
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import pyattn
from pyattn.nn import GroupedQueryAttention, RotaryEmbedding

E, D, HKV = 24, 8, 2
by_attention = pytest.mark.parametrize("attention", ["pyattn", "naive", "torch"])


def module_of(dtype=torch.float64, **arguments):
    arguments = {"rotary": RotaryEmbedding(D, 60), "qk_norm": True} | arguments
    module = GroupedQueryAttention(E, 4, HKV, head_dim=D, **arguments).to(dtype)
    with torch.no_grad():
        for norm in (module.q_norm, module.k_norm):
            if norm is not None:
                norm.weight.add_(torch.randn_like(norm.weight) * 0.3)
    return module.eval()


def cache_of(batch=2, max_length=40, dtype=torch.float64, **arguments):
    return pyattn.KVCache(batch, HKV, D, max_length, dtype=dtype, **arguments)


@settings(max_examples=40, phases=[Phase.generate])
@given(data=st.data())
def test_prefill_and_steps_are_the_whole_pass(data):
    attention = data.draw(st.sampled_from(["pyattn", "naive", "torch"]))
    page_size = data.draw(st.sampled_from([None, 4])) if attention == "pyattn" else None
    rotary = data.draw(st.sampled_from([None, 8, 4]))
    module = module_of(
        attention=attention,
        rotary=None if rotary is None else RotaryEmbedding(rotary, 60),
        qk_norm=data.draw(st.booleans()),
        window=data.draw(st.sampled_from([None, (6, 0)])),
        softcap=data.draw(st.sampled_from([None, 2.0])) if attention != "torch" else None,
        scale=data.draw(st.sampled_from([None, 0.5])),
    )
    L = data.draw(st.integers(1, 30))
    x, residual = torch.randn(2, L, E).double(), torch.randn(2, L, E).double()
    edges = sorted({0, L, *data.draw(st.lists(st.integers(0, L), max_size=6))})
    cache, outs = cache_of(page_size=page_size), []
    with torch.no_grad():
        for low, high in itertools.pairwise(edges):
            outs.append(module(x[:, low:high], residual=residual[:, low:high], cache=cache))
        torch.testing.assert_close(torch.cat(outs, 1), module(x, residual=residual))


@pytest.mark.parametrize(
    ("attention", "page_size"), [("pyattn", None), ("pyattn", 4), ("naive", None), ("torch", None)]
)
def test_prompts_of_different_lengths(attention, page_size):
    """The longest one uses up the rotary tables, so what is beside the shorter ones has no position."""
    module = module_of(rotary=RotaryEmbedding(D, 12), attention=attention)
    x, steps = torch.randn(2, 9, E).double(), torch.randn(2, 4, E).double()
    cache = cache_of(page_size=page_size)
    with torch.no_grad():
        prompts = module(x, cache=cache, lengths=[9, 5])
        outs = [module(steps[:, i : i + 1], cache=cache) for i in range(3)]
        last = module(steps, cache=cache, lengths=torch.tensor([0, 4]))
        texts = [torch.cat((x[0, :9], steps[0, :3])), torch.cat((x[1, :5], steps[1, :3], steps[1]))]
        for b, n in enumerate((9, 5)):
            whole = module(texts[b][None])[0]
            torch.testing.assert_close(prompts[b, :n], whole[:n])
            torch.testing.assert_close(torch.cat(outs, 1)[b], whole[n : n + 3])
        torch.testing.assert_close(last[1], whole[8:])


@by_attention
def test_a_mask_over_a_cache(attention):
    """Of a draft that is a tree: two tokens that do not see each other follow the prompt."""
    module, x = module_of(attention=attention, rotary=None), torch.randn(2, 7, E).double()
    tree = torch.ones(2, 7, dtype=torch.bool)
    tree[1, 5] = False
    with torch.no_grad():
        cache = cache_of()
        module(x[:, :5], cache=cache)
        draft = module(x[:, 5:], tree, cache=cache)
        torch.testing.assert_close(draft[:, :1], module(x[:, :6])[:, 5:])
        torch.testing.assert_close(draft[:, 1:], module(x[:, [0, 1, 2, 3, 4, 6]])[:, 5:])


@by_attention
def test_a_window_with_eviction(attention):
    module = module_of(window=(5, 0), attention=attention)
    x = torch.randn(2, 50, E).double()
    cache, outs = cache_of(max_length=8), []
    with torch.no_grad():
        for i in range(50):
            cache.evict(5)
            outs.append(module(x[:, i : i + 1], cache=cache))
        torch.testing.assert_close(torch.cat(outs, 1), module(x))


def test_masks_and_positions_are_passed_on():
    """A draft of two alternatives for the same token."""
    module, x = module_of(), torch.randn(2, 7, E).double()
    cache = cache_of()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5] = False
    with torch.no_grad():
        module(x[:, :5], cache=cache)
        out = module(x[:, 5:], mask, cache=cache, positions=torch.tensor([5, 5]))
        for i in (0, 1):
            alone = module(torch.cat((x[:, :5], x[:, 5 + i : 6 + i]), 1))[:, -1]
            torch.testing.assert_close(out[:, i], alone)


def test_a_text_that_outgrows_the_rotary_tables():
    module, cache = module_of(rotary=RotaryEmbedding(D, 5)), cache_of()
    with torch.no_grad():
        module(torch.randn(2, 4, E).double(), cache=cache)
        before = cache_model.snapshot(cache)
        with pytest.raises(ValueError, match="length must be at most max_positions = 5, got 6"):
            module(torch.randn(2, 2, E).double(), cache=cache)
        assert cache_model.snapshot(cache) == before
        module(torch.randn(2, 2, E).double(), cache=cache, lengths=[1, 0])


@pytest.mark.parametrize(
    ("error", "message", "arguments", "call"),
    [
        (TypeError, "cache must be a pyattn.KVCache, got tuple", {}, {"cache": ()}),
        (ValueError, r"lengths must lie in \[0, 3\], got \[4, 1\]", {}, {"cache": None, "lengths": [4, 1]}),
        (ValueError, "lengths must hold one number for each of the 2", {}, {"cache": None, "lengths": [1]}),
        (ValueError, r"lengths must lie in \[0, 3\] .*got \[4, 0\]", {}, {"lengths": [4, 0]}),
        (NotImplementedError, "cache must be dense with attention='naive'", {"attention": "naive"}, {"page_size": 4}),
        (NotImplementedError, "cache must be dense with attention='torch'", {"attention": "torch"}, {"page_size": 4}),
        (ValueError, "attn_mask must have 1 column", {"attention": "naive"}, {"attn_mask": torch.zeros(3, 4).double()}),
        (ValueError, "attn_mask must be", {"attention": "torch"}, {"attn_mask": torch.zeros(2, 3).double()}),
        (ValueError, "cache must have 2 samples, 2 heads and the head dim 8, got KVCache", {}, {"batch": 3}),
        (ValueError, r"residual must have shape \[B, L, E\]", {}, {"residual": torch.zeros(2, 1, E).double()}),
        (TypeError, "residual must be float64, got float32", {}, {"residual": torch.zeros(2, 3, E)}),
        (ValueError, "attn_mask must have 1 column", {}, {"attn_mask": torch.zeros(3, 4).double()}),
        (ValueError, "length must be at most max_positions = 2", {"rotary": RotaryEmbedding(D, 2)}, {}),
        (ValueError, "key must fit into max_length = 2", {}, {"max_length": 2}),
        (TypeError, "query must be float32, got float64", {}, {"dtype": torch.float32}),
    ],
)
def test_errors(error, message, arguments, call):
    module = module_of(**arguments)
    sizes = {name: call[name] for name in ("batch", "max_length", "dtype", "page_size") if name in call}
    cache = cache_of(**sizes)
    call = {"cache": cache} | {name: x for name, x in call.items() if name not in sizes}
    before = cache_model.snapshot(cache)
    with torch.no_grad(), pytest.raises(error, match=message):
        module(torch.randn(2, 3, E).double(), **call)
    assert cache_model.snapshot(cache) == before


def test_neither_gradients_nor_dropout():
    module, cache, x = module_of(dropout=0.5), cache_of(), torch.randn(2, 3, E).double()
    with pytest.raises(NotImplementedError, match=r"key must not require a gradient.*torch\.no_grad"):
        module(x, cache=cache)
    with torch.no_grad():
        with pytest.raises(NotImplementedError, match="cache must come without dropout"):
            module.train()(x, cache=cache)
        assert cache.seen.tolist() == [0, 0]
        module.eval()(x, cache=cache)
    assert cache.seen.tolist() == [3, 3]
