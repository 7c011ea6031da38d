"""Decode steps and prefill chunks against a long cache: what the process takes beyond the cache itself, as JSON.

    python tests/kv_cache_memory.py 1000000

bfloat16, 8 query heads on 1 key head. A process of its own: in one that has run other tests, what was freed before
hides what is taken.
"""

import json
import sys
import time

import torch

import pyattn
from pyattn import measure

HEADS, D, CHUNK, STEPS, PIECE = 8, 64, 512, 4, 4096


def tokens(heads: int, length: int) -> torch.Tensor:
    return torch.randn(1, heads, length, D, dtype=torch.bfloat16)


def attend(cache: pyattn.KVCache, length: int) -> float:
    """Seconds of an append of ``length`` tokens and their attention."""
    query, key, value = tokens(HEADS, length), tokens(1, length), tokens(1, length)
    start = time.perf_counter()
    out = pyattn.attention_with_kv_cache(query, cache, key, value, backend="cpu")
    assert out.isfinite().all()
    return time.perf_counter() - start


def cache_of(length: int, page_size: int | None) -> pyattn.KVCache:
    cache = pyattn.KVCache(1, 1, D, length + CHUNK + STEPS, dtype=torch.bfloat16, page_size=page_size)
    for first in range(0, length, PIECE):
        n = min(PIECE, length - first)
        cache.append(tokens(1, n), tokens(1, n))
    return cache


def main(length: int, page_size: int | None) -> None:
    seconds = {}

    def work(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        cache = cache_of(length, page_size)
        seconds["step"] = min(attend(cache, 1) for _ in range(STEPS))
        seconds["chunk"] = attend(cache, CHUNK)
        return cache.key, cache.value

    work(PIECE)  # code and stacks of threads that are touched for the first time count, too
    cache, beyond = measure.call_and_peak(lambda: work(length))
    found = {
        "keys": length,
        "cache_mb": sum(x.nbytes for x in cache) / 1e6,
        "beyond_the_cache_mb": None if beyond is None else beyond / 1e6,
        "decode_step_ms": 1e3 * seconds["step"],
        "chunk_of_512_s": seconds["chunk"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
