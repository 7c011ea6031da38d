"""The interpreter that Triton kernels are tested in: bfloat16 as torch has it, or refused."""

from __future__ import annotations

import pytest
import torch

interpreter = pytest.importorskip("interpreter", exc_type=ImportError)
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

if not triton.knobs.runtime.interpret:
    pytest.skip("on a GPU kernels are compiled", allow_module_level=True)


@triton.jit
def convert(X, Y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(Y + o, tl.load(X + o).to(Y.dtype.element_ty))


@triton.jit
def multiply(A, B, C, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(C + o, tl.dot(tl.load(A + o), tl.load(B + o)))


@triton.jit
def add(X, Y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(Y + o, tl.load(X + o) + tl.load(Y + o))


@triton.jit
def total(X, Y, N: tl.constexpr):
    tl.store(Y, tl.sum(tl.load(X + tl.arange(0, N)), 0))


def floats():
    """Normal numbers of all sizes, ties, subnormals, zeros, infinities, NaN and what rounds to infinity."""
    x = torch.randn(4096) * 2.0 ** torch.randint(-126, 120, (4096,))
    ties = (torch.arange(1024, dtype=torch.int32) * 0x8000 + 0x3F800000).view(torch.float32)
    subnormal = torch.arange(1000, dtype=torch.int32).mul(8191).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45])
    x = torch.cat([x, ties, subnormal, special, -ties])
    return torch.cat([x, x.new_ones(8192 - x.numel())])


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_round_as_torch_does(source, target):
    x = floats().to(source)
    y = torch.empty(x.shape, dtype=target)
    convert[(1,)](x, y, N=x.numel())
    torch.testing.assert_close(y, x.to(target), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products(dtype):
    a, b, c = torch.randn(64, 64).to(dtype), torch.randn(64, 64).to(dtype), torch.empty(64, 64)
    multiply[(1,)](a, b, c, N=64)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kernel", [add, total])
def test_bfloat16_arithmetic_is_refused(kernel):
    x, y = torch.ones(16), torch.ones(16)
    kernel[(1,)](x, y, N=16)
    with pytest.raises(Exception, match="bfloat16 arithmetic is wrong"):
        kernel[(1,)](x.bfloat16(), y.bfloat16(), N=16)
