"""``KVCache`` and ``attention_with_kv_cache`` against attention over the tokens that a plain Python model keeps."""

from __future__ import annotations

import functools
from typing import NamedTuple

import cache_model
import pytest
import torch
from cache_model import Results
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import pyattn
from pyattn import KVCache

HQ, HKV, D, DV = 4, 2, 8, 12
by_pages = pytest.mark.parametrize("page_size", [None, 1, 4, 16], ids=lambda n: f"pages of {n}" if n else "dense")
by_layout = pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "paged"])


def cache_of(batch=2, max_length=40, dtype=torch.float32, **arguments):
    """With NaN in it, which nobody may see."""
    cache = KVCache(batch, HKV, D, max_length, **{"v_head_dim": DV, "dtype": dtype} | arguments)
    for x in (cache.key, cache.value):
        x.fill_(torch.nan)
    return cache


def tokens(batch, length, dtype=torch.float32):
    shapes = ((HQ, D), (HKV, D), (HKV, DV))
    return [torch.randn(batch, heads, length, size).to(dtype) for heads, size in shapes]


def part(x, low, high):
    return [y[:, :, low:high] for y in x]


@functools.cache
def angles(positions=200):
    return pyattn.nn.RotaryEmbedding(D, positions)()


# ---- any interleaving --------------------------------------------------------------------------------------


class World(NamedTuple):
    cache: KVCache
    model: cache_model.Model
    turns: bool
    backend: str
    results: Results


@st.composite
def worlds(draw, dtype, backend, results):
    B, page_size = draw(st.integers(1, 3)), draw(st.sampled_from([None, 1, 3, 4, 16]))
    num_pages = None if page_size is None else draw(st.sampled_from([None, None, 3, 7]))
    cache = cache_of(B, draw(st.integers(4, 20)), dtype, page_size=page_size, num_pages=num_pages)
    return World(cache, cache_model.Model(B), draw(st.booleans()), backend, results)


def attend(world, draw):
    """Appends a few tokens, or none, and attends: compared row by row with attention over the model's tokens."""
    cache, model = world.cache, world.model
    B, L, dtype = cache.batch, draw(st.integers(0, 6)), cache.dtype
    counts = draw(st.one_of(st.none(), st.lists(st.integers(0, L), min_size=B, max_size=B)))
    q, k, v = tokens(B, L, dtype)
    arguments = {
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, (3, 0), (2, 1)])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "alibi_slopes": draw(st.sampled_from([None, torch.tensor([0.5, 0.25, 1.0, 0.1])])),
        "sinks": draw(st.sampled_from([None, torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=dtype)])),
    }
    kind = draw(st.sampled_from([None, "bool", "float"]))
    given_counts, counts = counts, [L] * B if counts is None else counts
    mask = None
    before = cache_model.snapshot(cache)
    try:
        if kind:
            cache.make_room(L)
            width = max(n + c for n, c in zip(cache.lengths.tolist(), counts, strict=True))
            shape = [draw(st.sampled_from([size, 1])) for size in (B, HQ, L)]
            mask = torch.rand(*shape, width) < 0.7 if kind == "bool" else torch.randn(*shape, width, dtype=dtype)
            before = cache_model.snapshot(cache)
        out, lse = pyattn.attention_with_kv_cache(
            q, cache, k, v, lengths=given_counts, rotary=angles() if world.turns else None, attn_mask=mask,
            return_lse=True, backend=world.backend, **arguments,
        )  # fmt: skip
    except ValueError as error:
        overfull = any(len(t) + c > cache.max_length for t, c in zip(model.tokens, counts, strict=True))
        overfull = overfull or (kind and any(len(t) + L > cache.max_length for t in model.tokens))  # of make_room
        few = cache.page_size and cache.key.shape[0] in (3, 7) and "pages that are free" in str(error)
        assert few or (overfull and "key must fit into max_length" in str(error))
        assert cache_model.snapshot(cache) == before
        return
    if world.turns:
        q, k = (cache_model.turned(x, angles(), model.seen, counts) for x in (q, k))
    model.append(k, v, counts)
    cache_model.poison(cache)
    cache_model.check(cache, model)
    for b, count in enumerate(counts):
        kv = model.kv(b)
        if count == 0 or kv is None:
            continue
        sample = {"query": q[b : b + 1, :, :count], "key": kv[0], "value": kv[1]} | arguments
        if mask is not None:
            rows = mask.expand(B, HQ, L, mask.shape[-1])[b : b + 1, :, :count]
            sample["attn_mask"] = rows[..., int(cache.starts[b]) : int(cache.lengths[b])]
        world.results.add(out[b : b + 1, :, :count], lse[b : b + 1, :, :count], sample)


def change(world, draw):
    cache, model, B = world.cache, world.model, world.cache.batch
    kind = draw(st.sampled_from(["reorder", "fork", "evict", "truncate", "make_room", "reset", "load"]))
    if kind == "reorder":
        indices = draw(st.lists(st.integers(0, B - 1), min_size=B, max_size=B))
        cache.reorder(draw(st.sampled_from([list, torch.tensor]))(indices))
        model.reorder(indices)
    elif kind == "fork":
        source = draw(st.integers(0, B - 1))
        targets = draw(st.one_of(st.none(), st.lists(st.integers(0, B - 1))))
        free = cache.num_free_pages
        cache.fork(source, targets)
        assert cache.num_free_pages >= free, "pages are shared"
        model.reorder([source if targets is None or b in targets else b for b in range(B)])
    elif kind == "evict":
        window = draw(st.integers(0, 10))
        cache.evict(window)
        model.evict(window)
    elif kind == "truncate":
        counts = [draw(st.integers(0, len(held))) for held in model.tokens]
        cache.truncate(cache.lengths - torch.tensor(counts, dtype=torch.int32))
        model.drop_last(counts)
    elif kind == "make_room":
        room = min(cache.max_length - len(held) for held in model.tokens)
        cache.make_room(room)
        indices = cache.starts.tolist()
        columns = cache.max_length if cache.block_table is None else cache.block_table.shape[1] * cache.page_size
        assert all(int(end) + room <= columns for end in cache.lengths)
        cache.make_room(room)
        assert cache.starts.tolist() == indices
    elif kind == "reset":
        samples = draw(st.one_of(st.none(), st.lists(st.integers(0, B - 1))))
        cache.reset(samples)
        model.reset(range(B) if samples is None else samples)
    else:
        state = cache.state_dict()
        before = cache_model.snapshot(cache)
        cache.reset()
        cache.load_state_dict(state)
        assert cache_model.snapshot(cache)[3] == before[3]
    cache_model.poison(cache)
    cache_model.check(cache, model)


def interleave(data, dtype, backend, results):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    world = data.draw(worlds(dtype, backend, results))
    for _ in range(data.draw(st.integers(1, 12))):
        data.draw(st.sampled_from([attend, change]))(world, data.draw)
    attend(world, data.draw)


# A failure is shown as it was found: to shrink it takes minutes.
@settings(max_examples=150, phases=[Phase.generate])
@given(data=st.data())
def test_any_interleaving_is_attention_over_the_tokens_that_are_left(data):
    interleave(data, torch.float64, "reference", Results())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_interleaving_on_kernels(dtype, engine):
    """What is held is compared at once, bit for bit; outputs of all examples together."""
    results = Results()

    @settings(max_examples=20, phases=[Phase.generate])
    @given(data=st.data())
    def examples(data):
        interleave(data, dtype, engine.backend, results)

    with engine.at_work(1):
        examples()
    results.check()


# ---- the ways of decoding ----------------------------------------------------------------------------------


@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [(70,), (1,) * 20 + (50,), (33, 1, 1, 30, 5), (64, 0, 6)], ids=str)
def test_chunks_give_the_whole_prefill(chunks, dtype, page_size, any_engine):
    q, k, v = tokens(2, 70, dtype)
    cache = cache_of(max_length=70, dtype=dtype, page_size=page_size)
    first, outs, lses = 0, [], []
    with any_engine.at_work():
        for n in chunks:
            q_part, *kv = part((q, k, v), first, first + n)
            arguments = {"window": (40, 0), "return_lse": True, "backend": any_engine.backend}
            out, lse = pyattn.attention_with_kv_cache(q_part, cache, *kv, **arguments)
            first, outs, lses = first + n, [*outs, out], [*lses, lse]
    results = Results()
    whole = {"query": q, "key": k, "value": v, "causal": True, "window": (40, 0)}
    results.add(torch.cat(outs, 2), torch.cat(lses, 2), whole)
    results.check()


@by_pages
def test_append_moves_nothing_that_is_there(page_size):
    cache = cache_of(page_size=page_size)
    _, k, v = tokens(2, 9)
    cache.append(k, v)
    pointers = cache.key.data_ptr(), cache.value.data_ptr()
    before, used = (cache.key.clone(), cache.value.clone()), cache_model.used_slots(cache)
    cache.append(k, v, lengths=torch.tensor([1, 7]))
    assert pointers == (cache.key.data_ptr(), cache.value.data_ptr())
    written = int((cache_model.used_slots(cache) & ~used).sum())
    assert written == 8
    for was, now in zip(before, (cache.key, cache.value), strict=True):
        untouched = was.isnan() & now.isnan() | (was == now)
        assert int((~untouched).any(-1).any(1).sum()) == written


@by_layout
def test_beam_search(page_size):
    """Random parents; every beam is attention over its own history, and a paged cache holds each prompt once."""
    width, prompt = 4, 14
    cache, model = cache_of(width, page_size=page_size, dtype=torch.float64), cache_model.Model(width)
    q, k, v = tokens(width, prompt, torch.float64)
    pyattn.attention_with_kv_cache(q, cache, k, v, lengths=[prompt, 0, 0, 0])
    model.append(k, v, [prompt, 0, 0, 0])
    cache.fork(0)
    model.reorder([0] * width)
    if page_size is not None:
        assert cache.num_free_pages == cache.key.shape[0] - 4
    for step in range(8):
        parents = torch.randint(0, width, (width,))
        cache.reorder(parents)
        model.reorder(parents.tolist())
        q, k, v = tokens(width, 1, torch.float64)
        out = pyattn.attention_with_kv_cache(q, cache, k, v)
        model.append(k, v, [1] * width)
        cache_model.check(cache, model)
        for b in range(width):
            torch.testing.assert_close(out[b : b + 1], pyattn.attention(q[b : b + 1], *model.kv(b)))
        if page_size is not None:  # three full pages of the prompt are shared, and each beam has its own tail
            assert cache.key.shape[0] - cache.num_free_pages <= 3 + width * (1 + (step + 2) // page_size)


@by_layout
@pytest.mark.parametrize("depth_positions", [True, False])
def test_a_draft_that_is_a_tree(depth_positions, page_size, any_engine):
    """Each node is attention over the text and its own ancestors; then one path is kept, the others taken back."""
    parents = [-1, 0, 0, 1, 1, 2]  # of the nodes, in the order that they are appended
    lengths, n = [13, 6], len(parents)
    cache, model = cache_of(page_size=page_size), cache_model.Model(2)
    q, k, v = tokens(2, 13)
    arguments = {"backend": any_engine.backend, "rotary": angles() if depth_positions else None}
    results = Results()
    with any_engine.at_work():
        pyattn.attention_with_kv_cache(q, cache, k, v, lengths=lengths, **arguments)
        model.append(cache_model.turned(k, angles(), [0, 0], lengths) if depth_positions else k, v, lengths)
        paths = [[i] for i in range(n)]
        for i, parent in enumerate(parents):
            paths[i] = (paths[parent] if parent >= 0 else []) + [i]
        ancestors = torch.zeros(n, n, dtype=torch.bool)
        for i, path in enumerate(paths):
            ancestors[i, path] = True
        mask = torch.ones(2, 1, n, max(lengths) + n, dtype=torch.bool)
        for b, length in enumerate(lengths):
            mask[b, 0, :, length : length + n] = ancestors
        depth = torch.tensor([len(path) - 1 for path in paths])
        positions = cache.seen[:, None] + depth if depth_positions else None
        q, k, v = tokens(2, n)
        out, lse = pyattn.attention_with_kv_cache(
            q, cache, k, v, attn_mask=mask, positions=positions, return_lse=True, **arguments
        )
        for b, length in enumerate(lengths):
            for i, path in enumerate(paths):
                q_node, *kv = (x[b : b + 1, :, [i]] if x is q else x[b : b + 1, :, path] for x in (q, k, v))
                if depth_positions:
                    q_node = pyattn.apply_rotary(q_node, q_node, angles(), torch.tensor([length + len(path) - 1]))[0]
                    kv[0] = pyattn.apply_rotary(kv[0], kv[0], angles(), length + torch.arange(len(path)))[0]
                kv = [torch.cat(x, 2) for x in zip(model.kv(b), kv, strict=True)]
                sample = {"query": q_node, "key": kv[0], "value": kv[1]}
                results.add(out[b : b + 1, :, [i]], lse[b : b + 1, :, [i]], sample)
    results.check()
    cache.accept(n, [paths[3], paths[5][:2]])
    assert cache.seen.tolist() == [lengths[0] + 3, lengths[1] + 2]
    turned = pyattn.apply_rotary(k, k, angles(), positions)[0] if depth_positions else k
    for b, path in enumerate((paths[3], paths[5][:2])):
        for x, new in zip(cache_model.live(cache, b), (turned, v), strict=True):
            torch.testing.assert_close(x[:, :, lengths[b] :], new[b : b + 1, :, path])


@pytest.mark.parametrize("page_size", [None, 1, 4])
@pytest.mark.parametrize("max_length", [8, 9, 16])
def test_a_sliding_window_of_a_text_of_any_length(max_length, page_size):
    """Evicting what the window has left, in a buffer much shorter than the text, turned by positions in the text."""
    window, n = 7, 60
    q, k, v = tokens(2, n, torch.float64)
    cache = cache_of(2, max_length, torch.float64, page_size=page_size)
    outs = []
    for i in range(n):
        cache.evict(window)
        q_one, *kv = part((q, k, v), i, i + 1)
        outs.append(pyattn.attention_with_kv_cache(q_one, cache, *kv, rotary=angles(), window=(window, 0)))
        cache_model.poison(cache)
        if page_size is not None:
            assert cache.key.shape[0] - cache.num_free_pages <= 2 * (-(-window // page_size) + 1)
    assert cache.seen.tolist() == [n, n]
    turned_q, turned_k = pyattn.apply_rotary(q, k, angles())
    whole = pyattn.attention(turned_q, turned_k, v, causal=True, window=(window, 0))
    torch.testing.assert_close(torch.cat(outs, 2), whole)


@by_layout
@pytest.mark.parametrize("indices", [[1, 0, 2], [2, 2, 1], [1, 1, 1]], ids=str)
def test_samples_of_other_lengths_change_places(indices, page_size):
    cache, model = cache_of(3, page_size=page_size), cache_model.Model(3)
    _, k, v = tokens(3, 30)
    cache.append(k, v, lengths=[30, 4, 11])
    model.append(k, v, [30, 4, 11])
    for change in (lambda x: x.evict(6), lambda x: x.reorder(indices)):
        change(cache)
        change(model)
        cache_model.poison(cache)
        cache_model.check(cache, model)


def test_moves_of_more_than_a_piece(monkeypatch):
    monkeypatch.setattr(pyattn.kv_cache, "_MOST_MOVED", 3)
    for evicted in (1, 2, 3, 10):
        cache, model = cache_of(max_length=20), cache_model.Model(2)
        for n, window in ((20, 20 - evicted), (evicted, 20)):
            _, k, v = tokens(2, n)
            cache.append(k, v)
            model.append(k, v, [n, n])
            cache.evict(window)
            model.evict(window)
        cache_model.check(cache, model)


@by_layout
def test_queries_without_new_keys(page_size):
    """The last row is the last token; the cache does not change."""
    q, k, v = tokens(2, 11, torch.float64)
    cache = cache_of(page_size=page_size, dtype=torch.float64)
    cache.append(pyattn.apply_rotary(k, k, angles())[0], v)
    before = cache_model.snapshot(cache)
    out = pyattn.attention_with_kv_cache(q[:, :, 6:], cache, rotary=angles())
    whole = pyattn.attention(*pyattn.apply_rotary(q, k, angles()), v, causal=True)
    torch.testing.assert_close(out, whole[:, :, 6:])
    everything = pyattn.attention_with_kv_cache(q, cache, causal=False)
    torch.testing.assert_close(everything, pyattn.attention(q, pyattn.apply_rotary(k, k, angles())[0], v))
    assert cache_model.snapshot(cache) == before


@pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "paged"])
@pytest.mark.parametrize("with_key", [True, False], ids=["append", "no append"])
def test_a_prefix_that_all_samples_share(with_key, page_size, any_engine):
    """Over the prefix in a cache of its own, over the tokens of each sample, merged: as if each held the prefix."""
    B, L, n = 3, 2, 21
    shared, own, new = tokens(1, n), tokens(B, 7), tokens(B, L)
    prefix, cache = (cache_of(b, page_size=page_size) for b in (1, B))
    whole = cache_of(B, page_size=page_size)
    prefix.append(*shared[1:])
    prefix.evict(n - 3)
    whole.append(*(x[:, :, 3:].expand(B, -1, -1, -1) for x in shared[1:]))
    for each in (cache, whole):
        each.append(*own[1:], lengths=[7, 0, 4])
        if not with_key:
            each.append(*new[1:])
    before = cache_model.snapshot(prefix)
    family = {"softcap": 4.0, "sinks": torch.randn(HQ), "scale": 0.3, "return_lse": True, "backend": any_engine.backend}
    kv = new[1:] if with_key else ()
    with any_engine.at_work():
        results = pyattn.attention_with_kv_cache(new[0], cache, *kv, prefix=prefix, **family)
        expected = pyattn.attention_with_kv_cache(new[0], whole, *kv, **family)
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5)
    assert cache_model.snapshot(prefix) == before


@pytest.mark.parametrize(
    ("error", "message", "prefix", "arguments"),
    [
        (TypeError, "prefix must be a pyattn.KVCache, got tuple", lambda cache: (), {}),
        (ValueError, "prefix must hold one sample, got 2", lambda cache: cache_of(2), {}),
        (ValueError, "prefix must be another cache than cache, got the same", lambda cache: cache, {}),
        (ValueError, "prefix must have the cache's head_dim", lambda cache: KVCache(1, HKV, 4, 9, v_head_dim=DV), {}),
        (ValueError, "prefix must have the cache's v_head_dim", lambda cache: KVCache(1, HKV, D, 9), {}),
        (ValueError, "prefix must have the cache's dtype", lambda cache: cache_of(1, dtype=torch.bfloat16), {}),
        (ValueError, "prefix must have the cache's device", lambda cache: cache_of(1, device="meta"), {}),
        (ValueError, "window must not come with prefix", lambda cache: cache_of(1), {"window": (4, 0)}),
        (ValueError, "alibi_slopes must not come with prefix", lambda cache: cache_of(1), {"alibi_slopes": 1}),
        (ValueError, "backend must be None or one of", lambda cache: cache_of(1), {"backend": "none"}),
        (TypeError, "return_lse must be a bool", lambda cache: cache_of(1), {"return_lse": 0}),
    ],
)
def test_a_prefix_that_does_not_fit(error, message, prefix, arguments):
    cache, new = cache_of(1), tokens(1, 2)
    cache.append(*tokens(1, 3)[1:])
    arguments |= {"prefix": prefix(cache)}
    cache_model.refuses(
        cache, error, message, lambda: pyattn.attention_with_kv_cache(new[0], cache, *new[1:], **arguments)
    )


def test_rotary_counts_the_prefix():
    B, n = 2, 9
    shared, own = tokens(1, n), tokens(B, 3)
    prefix, cache, whole = cache_of(1), cache_of(B), cache_of(B)
    rotary = angles()
    pyattn.attention_with_kv_cache(shared[0], prefix, *shared[1:], rotary=rotary)
    expand = [x.expand(B, -1, -1, -1) for x in shared]
    pyattn.attention_with_kv_cache(expand[0], whole, *expand[1:], rotary=rotary)
    expected = pyattn.attention_with_kv_cache(own[0], whole, *own[1:], rotary=rotary)
    torch.testing.assert_close(
        pyattn.attention_with_kv_cache(own[0], cache, *own[1:], rotary=rotary, prefix=prefix), expected
    )


def test_a_prefix_that_all_samples_share_is_read_once():
    """Cascade: all rows at once over the prefix, each sample's over its own keys, merged."""
    B, L, n = 3, 2, 20
    prefix, own = tokens(1, n, torch.float64), tokens(B, L, torch.float64)
    cache = cache_of(B, dtype=torch.float64, page_size=4)
    cache.append(*(x.expand(B, -1, -1, -1) for x in prefix[1:]), lengths=[n, 0, 0])
    cache.fork(0)
    assert cache.num_free_pages == cache.key.shape[0] - n // 4
    whole = pyattn.attention_with_kv_cache(own[0], cache, *own[1:], return_lse=True)
    rows = own[0].transpose(0, 1).flatten(1, 2)[None]
    out, lse = pyattn.attention(rows, *prefix[1:], return_lse=True)
    over_prefix = out[0].unflatten(1, (B, L)).transpose(0, 1), lse[0].unflatten(1, (B, L)).transpose(0, 1)
    over_own = pyattn.attention(*own, causal=True, return_lse=True)
    torch.testing.assert_close(pyattn.merge_attention(*zip(over_prefix, over_own, strict=True)), whole)
