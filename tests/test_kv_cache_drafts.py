"""``KVCache.accept``: of a draft that is a tree a path stays."""

from __future__ import annotations

import cache_model
import pytest
import torch
from cache_model import live, refuses

from pyattn import KVCache

HKV, D, DV, DRAFT = 2, 8, 12, 6
LENGTHS = [9, 5, 1]
by_layout = pytest.mark.parametrize("page_size", [None, 1, 4, 16], ids=lambda n: f"pages of {n}" if n else "dense")
PATHS = [[[0, 2, 5], [1], []], [[1, 2, 3], [0, 1, 2, 3, 4, 5], [5]], [[0, 1], [0], []], [[], [], []]]


def tokens(batch, length):
    return torch.randn(batch, HKV, length, D), torch.randn(batch, HKV, length, DV)


def drafted(page_size, **arguments):
    """A cache of three texts with a draft at the end of each, and a plain model of it before the draft."""
    torch.manual_seed(0)
    cache, model = KVCache(3, HKV, D, 20, v_head_dim=DV, page_size=page_size, **arguments), cache_model.Model(3)
    for x in (cache.key, cache.value):
        x.fill_(torch.nan)
    text, draft = tokens(3, 9), tokens(3, DRAFT)
    cache.append(*text, lengths=LENGTHS)
    model.append(*text, LENGTHS)
    cache.append(*draft)
    return cache, model, draft


def check(cache, model):
    assert cache.seen.tolist() == model.seen
    for b in range(cache.batch):
        for x, expected in zip(live(cache, b), model.kv(b), strict=True):
            assert torch.equal(x, expected)


@by_layout
@pytest.mark.parametrize("paths", PATHS, ids=str)
@pytest.mark.parametrize("as_tensors", [False, True], ids=["lists", "tensors"])
def test_the_path_moves_together(as_tensors, paths, page_size):
    cache, model, (key, value) = drafted(page_size)
    cache.accept(DRAFT, [torch.tensor(path, dtype=torch.int64) for path in paths] if as_tensors else paths)
    for b, path in enumerate(paths):
        one = cache_model.Model(1)
        one.append(key[b : b + 1, :, path], value[b : b + 1, :, path], [len(path)])
        model.tokens[b] += one.tokens[0]
        model.seen[b] += len(path)
    check(cache, model)
    more = tokens(3, 2)
    cache.append(*more)
    model.append(*more, [2, 2, 2])
    check(cache, model)


@pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "paged"])
def test_samples_that_share_the_draft_part(page_size):
    """After a fork both hold the same pages; each keeps a path of its own."""
    cache, model, (key, value) = drafted(page_size)
    cache.fork(0, [2])
    paths = [[1, 4], [0], [0, 3, 5]]
    cache.accept(DRAFT, paths)
    model.reorder([0, 1, 0])
    for b, path in enumerate(paths):
        source = 0 if b == 2 else b
        model.tokens[b] += [(key[source, :, i], value[source, :, i]) for i in path]
        model.seen[b] += len(path)
    check(cache, model)


@pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "paged"])
@pytest.mark.parametrize(
    ("error", "message", "draft", "paths"),
    [
        (TypeError, "draft must be an int, got float", 2.0, [[], [], []]),
        (ValueError, "draft must lie between 0 and the live tokens of each sample, got -1", -1, [[], [], []]),
        (ValueError, "draft must lie between 0 and the live tokens of each sample, got 8", 8, [[], [], []]),
        (ValueError, "paths must be a list of 3 paths", 6, [[0], [0]]),
        (ValueError, "paths must be a list of 3 paths", 6, 1),
        (TypeError, r"paths\[1\] must be a tensor, list or tuple of ints, got int", 6, [[0], 1, [0]]),
        (TypeError, r"paths\[2\] must be an int, got str", 6, [[0], [1], ["0"]]),
        (ValueError, r"paths\[0\] must have shape", 6, [torch.tensor(0), [1], [0]]),
        (ValueError, r"paths\[0\] must rise and lie in \[0, 5\], got \[0, 6\]", 6, [[0, 6], [0], [0]]),
        (ValueError, r"paths\[1\] must rise and lie in \[0, 5\], got \[3, 3\]", 6, [[0], [3, 3], [0]]),
        (ValueError, r"paths\[1\] must rise and lie in \[0, 5\], got \[3, 1\]", 6, [[0], [3, 1], [0]]),
    ],
)
def test_refusals(error, message, draft, paths, page_size):
    cache = drafted(page_size)[0]
    refuses(cache, error, message, lambda: cache.accept(draft, paths))


def test_pages_that_are_missing_are_missed_before_anything_changes():
    """Two samples share all pages: each needs some of its own for its path."""
    cache = KVCache(2, HKV, D, 8, v_head_dim=DV, page_size=4, num_pages=2)
    cache.append(*tokens(2, 6), lengths=[6, 0])
    cache.fork(0)
    refuses(cache, ValueError, "pages that are free", lambda: cache.accept(3, [[0, 2], [0, 2]]))
