"""Caches under the backends for GPUs: on one if there is one (``pytest -m gpu``), else interpreted and emulated."""

from __future__ import annotations

import cache_model
import pytest
import torch
from gpu_kernels import DEVICE, GPU, in_one_type

import pyattn

pytestmark = GPU
HQ, HKV, D = 4, 2, 16


@pytest.fixture
def kernels(request):
    with request.param.at_work():
        yield request.param


@in_one_type
@pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "paged"])
def test_the_life_of_a_cache(page_size, kernels):
    """Prompts of two lengths, beams that change places, a window, a draft under a mask, some of it taken back."""
    cache = pyattn.KVCache(2, HKV, D, 24, dtype=kernels.dtype, device=DEVICE, page_size=page_size)
    for x in (cache.key, cache.value):
        x.fill_(torch.nan)
    model, results = cache_model.Model(2), cache_model.Results()

    def step(length, counts, mask=None, **arguments):
        q, k, v = (torch.randn(2, heads, length, D).to(kernels.dtype) for heads in (HQ, HKV, HKV))
        on_device = [x.to(DEVICE) for x in (q, k, v)]
        masks = {} if mask is None else {"attn_mask": mask.to(DEVICE)}
        out, lse = pyattn.attention_with_kv_cache(
            on_device[0], cache, *on_device[1:], lengths=torch.tensor(counts), return_lse=True, backend=kernels.name,
            **masks, **arguments,
        )  # fmt: skip
        model.append(k, v, counts)
        starts, ends = cache.starts.tolist(), cache.lengths.tolist()
        for b, count in enumerate(counts):
            key, value = model.kv(b)
            kwargs = {"query": q[b : b + 1, :, :count], "key": key, "value": value, "causal": True} | arguments
            if mask is not None:
                kwargs["attn_mask"] = mask[b : b + 1, :, :count, starts[b] : ends[b]]
            results.add(out[b : b + 1, :, :count].cpu(), lse[b : b + 1, :, :count].cpu(), kwargs)

    step(18, [18, 9])
    cache.reorder([1, 1])
    model.reorder([1, 1])
    step(1, [1, 1])
    step(5, [5, 2], window=(7, 0))
    cache.evict(7)
    model.evict(7)
    cache.make_room(6)
    width = max(cache.lengths.tolist()) + 6
    step(6, [6, 6], mask=torch.rand(2, 1, 6, width) < 0.6)
    cache.truncate(cache.lengths - 4)
    model.drop_last([4, 4])
    step(9, [9, 1], softcap=3.0)
    results.check()
