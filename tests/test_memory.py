"""Memory beyond the outputs does not grow with Lq * Lk."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import pyattn
from pyattn import measure
from pyattn.backends import cpu
from pyattn.testing import DTYPES, Case, check_case, make_inputs, to_pages

L, H, D = 16384, 8, 64
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


def scratch_mb(engine, dtype, num_queries=L, backward=False, **arguments):
    """The peak of the forward, or of the backward alone."""
    shapes = ((1, H, num_queries, D), (1, H, L, D), (1, H, L, D))
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_(backward) for shape in shapes)
    with engine.at_work():
        cpu.scratch_peak_bytes(reset=True)
        out = pyattn.attention(q, k, v, backend=engine.backend, **arguments)
        if backward:
            cpu.scratch_peak_bytes(reset=True)
            out.sum().backward()
    peak = cpu.scratch_peak_bytes() / 2**20
    assert peak > 0, "the kernels must ask the one allocator that counts"
    return peak


@by_dtype
@pytest.mark.parametrize("arguments", [{"window": (256, 0)}, {"num_queries": 128}], ids=["window", "few queries"])
def test_scratch(engine, dtype, arguments):
    assert scratch_mb(engine, dtype, **arguments) <= 16


@by_dtype
def test_scratch_of_the_forward_does_not_grow_with_the_keys(engine, dtype):
    """A cache of a million keys takes no more than one of some hundred thousand, whatever is prepared for products."""
    peaks = []
    for Lk in (2**17 + 64, 2**19):
        q, kv = torch.randn(1, 1, 64, 16).to(dtype), torch.randn(1, 1, Lk, 16).to(dtype)
        with engine.at_work():
            cpu.scratch_peak_bytes(reset=True)
            pyattn.attention(q, kv, kv, backend=engine.backend, window=(4096, 0))
        peaks.append(cpu.scratch_peak_bytes())
    assert peaks[0] == peaks[1] <= 2**21


@by_dtype
def test_values_beyond_what_the_forward_prepares_at_once(engine, dtype):
    """In odd numbers, of which some are hidden, for several blocks of queries."""
    case = Case("long", B=1, Hq=2, Hkv=1, Lq=130, Lk=4301, D=8, Dv=512, causal=True)
    kwargs = make_inputs(case, dtype)
    check_case(engine.results(kwargs), case, dtype)
    paged = engine.results(to_pages(kwargs, 16))
    for name, x in engine.results(kwargs).items():
        assert torch.equal(x, paged[name]), name


@by_dtype
def test_scratch_of_the_backward(engine, dtype):
    assert scratch_mb(engine, dtype, backward=True, window=(128, 0)) <= 32


@pytest.mark.exhaustive
@by_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("backward", "most"), [(False, 16), (True, 32)], ids=["forward", "backward"])
def test_scratch_of_all_keys(engine, dtype, causal, backward, most):
    if engine.isa != cpu.available_isas()[0]:
        pytest.skip("minutes without the widest vectors: test_scratch and test_scratch_of_the_backward hold these")
    assert scratch_mb(engine, dtype, backward=backward, causal=causal) <= most


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


@pytest.mark.parametrize(("rows", "num_heads"), [(1, 64), (2048, 32)], ids=["111K", "11QK"])
def test_the_gradient_of_a_broadcast_mask_is_not_materialised(engine, rows, num_heads):
    """Nor a copy of the mask for each head: in full either takes 1 GB or 0.5 GB."""
    q = torch.randn(1, num_heads, 2048, 8, requires_grad=True)
    mask = torch.zeros(1, 1, rows, 2048, requires_grad=True)

    def train():
        with engine.at_work():
            out = pyattn.attention(q, q, q, attn_mask=mask, window=(64, 0), backend=engine.backend)
            out.sum().backward()

    train()
    assert measure.peak_extra_memory(train) <= 100 * 2**20  # the output and the gradients are 38


def test_pages_are_not_copied(engine):
    """All keys and values in one place would take 64 MB."""
    case = Case("pages", B=1, Hq=H, Hkv=H, Lq=1, Lk=2 * L, D=32)
    kwargs = to_pages(make_inputs(case, torch.float32), 64)
    engine.run(kwargs)
    assert measure.peak_extra_memory(lambda: engine.run(kwargs)) <= 8 * 2**20
