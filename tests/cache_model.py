"""A KV cache as plain Python: of each sample the list of its live tokens. What ``pyattn.KVCache`` is held to."""

from __future__ import annotations

import pytest
import torch

import pyattn
from pyattn.testing import assert_close, emulations_and_truth


class Model:
    """``tokens[b]`` is a list of ``(key [Hkv, D], value [Hkv, Dv])``; ``seen[b]`` the position of the next one."""

    def __init__(self, batch):
        self.tokens = [[] for _ in range(batch)]
        self.seen = [0] * batch

    def append(self, key, value, counts):
        for b, count in enumerate(counts):
            self.tokens[b] += [(key[b, :, i], value[b, :, i]) for i in range(count)]
            self.seen[b] += count

    def reorder(self, indices):
        self.tokens = [list(self.tokens[i]) for i in indices]
        self.seen = [self.seen[i] for i in indices]

    def evict(self, window):
        self.tokens = [tokens[len(tokens) - min(window, len(tokens)) :] for tokens in self.tokens]

    def drop_last(self, counts):
        for b, count in enumerate(counts):
            del self.tokens[b][len(self.tokens[b]) - count :]
            self.seen[b] -= count

    def reset(self, samples):
        for b in samples:
            self.tokens[b], self.seen[b] = [], 0

    def kv(self, b):
        """Key and value of sample b, ``[1, Hkv, L, D]``; None if it holds nothing."""
        if not self.tokens[b]:
            return None
        return [torch.stack(x, 1)[None] for x in zip(*self.tokens[b], strict=True)]


def live(cache, b):
    """What the buffers hold of sample b, by the cache's public attributes: key and value, ``[1, Hkv, L, D]``."""
    start, end = int(cache.starts[b]), int(cache.lengths[b])
    if cache.page_size is None:
        return [x[b : b + 1, :, start:end] for x in (cache.key, cache.value)]
    pages = cache.block_table[b].long()
    return [x[pages].transpose(0, 1).flatten(1, 2)[None, :, start:end] for x in (cache.key, cache.value)]


def used_slots(cache):
    """Bool ``[outer, inner]``: the places in the buffers that the live tokens of some sample are in."""
    used = torch.zeros(cache.key.shape[0], cache.key.shape[2], dtype=torch.bool)
    for b in range(cache.batch):
        index = torch.arange(int(cache.starts[b]), int(cache.lengths[b]))
        if cache.page_size is None:
            used[b, index] = True
        else:
            used[cache.block_table[b].long()[index // cache.page_size], index % cache.page_size] = True
    return used


def poison(cache):
    """NaN wherever nothing is live."""
    for x in (cache.key, cache.value):
        x.masked_fill_(~used_slots(cache)[:, None, :, None], torch.nan)


def check(cache, model):
    """The cache holds, bit for bit, what the model does, and no page too many."""
    assert cache.seen.tolist() == model.seen
    pages = set()
    for b, tokens in enumerate(model.tokens):
        start, end = int(cache.starts[b]), int(cache.lengths[b])
        assert end - start == len(tokens)
        for x, expected in zip(live(cache, b), model.kv(b) or (), strict=False):
            assert torch.equal(x, expected)
        if cache.page_size is not None:
            pages |= set(cache.block_table[b, start // cache.page_size : -(-end // cache.page_size)].tolist())
    if cache.page_size is not None:
        assert cache.num_free_pages == cache.key.shape[0] - len(pages)


def snapshot(cache):
    """All that can be seen of a cache, to be compared."""
    state = cache.state_dict()
    free = None if cache.page_size is None else (list(cache._pages.free), list(cache._pages.references))
    table = None if cache.block_table is None else cache.block_table.tolist()
    values = {name: str(x.tolist()) for name, x in state.items() if isinstance(x, torch.Tensor)}  # nan == nan as text
    return repr(cache), free, table, values


def refuses(cache, error, message, call):
    """The call raises, and the cache is what it was."""
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        call()
    assert snapshot(cache) == before


def turned(x, rotary, seen, counts):
    """Each token of ``[B, H, L, D]`` by its own position, sample by sample and one by one."""
    x = x.clone()
    for b, count in enumerate(counts):
        for i in range(count):
            one = x[b : b + 1, :, i : i + 1]
            position = torch.tensor([seen[b] + i])
            x[b : b + 1, :, i : i + 1] = pyattn.apply_rotary(one, one, rotary, position)[0]
    return x


class Results:
    """Outputs of several calls, held to the rule of ``pyattn.testing`` together: few values are a matter of luck."""

    def __init__(self):
        self.found = []

    def add(self, out, lse, kwargs):
        if out.dtype == torch.float64:  # the reference's own dtype has no emulation
            expected = pyattn.attention(**kwargs, return_lse=True, backend="reference")
            torch.testing.assert_close((out, lse), expected)
        else:
            self.found.append(({"out": out, "lse": lse}, *emulations_and_truth(kwargs)))

    def check(self):
        for name in ("out", "lse") if self.found else ():
            actual, truth = (torch.cat([x[i][name].flatten(0, 2) for x in self.found]) for i in (0, 2))
            emulated = [torch.cat([e[i][name].flatten(0, 2) for _, e, _ in self.found]) for i in range(3)]
            assert_close(actual, emulated, truth, name)
