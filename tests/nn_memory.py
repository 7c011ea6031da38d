"""Peaks of memory of ``pyattn.nn.MultiheadAttention``, in multiples of one head's weights in float32, as JSON.

A process of its own: in one that has run other tests, what was freed before hides what is taken.
"""

import ctypes
import json

import torch

from pyattn import measure
from pyattn.nn import MultiheadAttention

LONG = 1200
SQUARE = 4 * LONG * LONG  # bytes: 6 MB


def peak(heads=16, grad=False, **arguments):
    module = MultiheadAttention(64, heads, batch_first=True)

    def run(x):
        with torch.set_grad_enabled(grad):
            out, weights = module(x, x, x, **arguments)
            if grad:
                (out.sum() + (0 if weights is None else weights.square().sum())).backward()
        return out, weights

    x = torch.randn(1, LONG, 64)
    run(x)
    return measure.peak_extra_memory(lambda: run(x)) / SQUARE


def peak_of_both_masks(N=16):
    module = MultiheadAttention(8, 1, batch_first=True)
    x, mask = torch.randn(N, LONG, 8), torch.randn(LONG, LONG)
    padding = torch.arange(LONG) >= torch.randint(1, LONG, (N, 1))

    def run():
        with torch.no_grad():
            return module(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]

    run()
    return measure.peak_extra_memory(run) / SQUARE


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mmap_threshold = -3  # large blocks come from the system, one by one, so that glibc's heap keeps none that are free
    ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)
    run_of_keys, spread = torch.arange(LONG)[None] >= 900, torch.rand(1, LONG) < 0.3
    found = {
        "no weights": peak(need_weights=False),
        "no weights, gradients": peak(need_weights=False, grad=True),
        "no weights, padding": peak(need_weights=False, key_padding_mask=run_of_keys),
        "no weights, mask": peak(need_weights=False, key_padding_mask=spread),
        "both masks": peak_of_both_masks(),
        "mean": peak(average_attn_weights=True),
        "mean, gradients": peak(average_attn_weights=True, grad=True),
        "each": peak(average_attn_weights=False),
    }
    print(json.dumps(found))
