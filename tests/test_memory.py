"""Memory beyond the outputs does not grow with Lq * Lk."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import pyattn
from pyattn.backends import cpu

L, H, D = 16384, 8, 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def scratch_mb(engine, dtype, num_queries=L, **arguments):
    q = torch.randn(1, H, num_queries, D).to(dtype)
    k, v = (torch.randn(1, H, L, D).to(dtype) for _ in range(2))
    torch.set_num_threads(2)
    cpu.scratch_peak_bytes(reset=True)
    pyattn.attention(q, k, v, backend=engine.backend, **arguments)
    peak = cpu.scratch_peak_bytes() / 2**20
    assert peak > 0, "the kernels must ask the one allocator that counts"
    return peak


@by_dtype
@pytest.mark.parametrize("arguments", [{"window": (256, 0)}, {"num_queries": 128}], ids=["window", "few queries"])
def test_scratch(engine, dtype, arguments):
    assert scratch_mb(engine, dtype, **arguments) <= 16


@pytest.mark.exhaustive
@by_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_scratch_of_all_keys(engine, dtype, causal):
    assert scratch_mb(engine, dtype, causal=causal) <= 16


@by_dtype
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_broadcast_mask_costs_no_scratch(engine, dtype, kind):
    mask = torch.zeros(1, 1, 1, L).to(dtype) if kind == "float" else torch.ones(1, 1, 1, L, dtype=torch.bool)
    arguments = {"num_queries": 128}
    assert scratch_mb(engine, dtype, **arguments, attn_mask=mask) <= scratch_mb(engine, dtype, **arguments) + 1


def test_a_broadcast_mask_is_not_materialised():
    """The process, too, stays small: the mask in full would take 8 GB as bool, 32 GB as float32."""
    code = """
import resource, torch, pyattn
q = torch.randn(1, 32, 16384, 8)
mask = torch.ones(1, 1, 1, 16384, dtype=torch.bool)
pyattn.attention(q[:, :, :8], q, q, attn_mask=mask, backend="cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pyattn.attention(q, q, q, attn_mask=mask, window=(64, 0), backend="cpu")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < 100  # MB; the output is 16
