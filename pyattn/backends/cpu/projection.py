"""Multi-head projections by the C++ kernels: what ``csrc/cpu/projection_kernel.cpp`` is called with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyattn import _native
from pyattn.backends import cpu
from pyattn.spec import ProjectionProblem, ProjectionSpec, ProjectionTensors, empty_heads, head_dim

Fields = tuple[int, int, int, int, int, int]
_NONE: Fields = (0, 0, 0, 0, 0, 0)


def unavailable() -> list[str]:
    return cpu.unavailable()


def why_not(problem: ProjectionProblem) -> list[str]:
    return cpu.why_not_operand(problem.x)


def describe(problem: ProjectionProblem) -> str:
    how = "rotary alone"
    if problem.op != "rotary":
        how = "each weight read once" if problem.rows <= _native.FEW_ROWS else "blocks of packed weights"
    return f"{cpu.isa()}, {how}, {torch.get_num_threads()} threads"


def _heads(x: Tensor | None) -> Fields:
    """The matrix of ``[B, H, L, D]``: rows ``[B, L]``, columns ``[H, D]``."""
    if x is None or not x.numel():
        return _NONE
    return x.data_ptr(), *x.stride()[:3], *x.shape[2:]


def _rows(x: Tensor, D: int | None = None) -> Fields:
    """The matrix of ``[rows, columns]``, whose columns are heads of D elements, or one head."""
    return x.data_ptr(), 0, D or 0, x.stride(0), x.shape[0], D or x.shape[1]


def _float(x: Tensor | None) -> Tensor | None:
    """As kernels read tables and vectors."""
    return None if x is None else x.to(torch.float32).contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _call(
    op: str,
    spec: ProjectionSpec,
    t: ProjectionTensors,
    D: int,
    heads: Sequence[Tensor],
    saved: Tensor | None = None,
    grad_rows: Tensor | None = None,
    grad_norms: Tensor | None = None,
    inverse: bool = False,
) -> None:
    B, H, L, D_in = t.x.shape
    vectors = [_float(x) for x in (t.bias, t.q_norm, t.k_norm, t.cos, t.sin)]  # held until the kernel has run
    positions, positions_stride = None, 0
    if t.positions is not None:
        positions = t.positions.to(torch.int64).contiguous()
        positions_stride = L if positions.shape[0] > 1 else 0
    _native.projection(
        op,
        *cpu.engine(),
        cpu.DTYPES[t.x.dtype],
        (B * L, H * D_in, D, 0 if t.cos is None else 2 * t.cos.shape[1]),
        (_address(t.weight), _address(t.packed), *map(_address, vectors), _address(positions), _address(grad_norms)),
        0 if t.weight is None else t.weight.stride(0),
        positions_stride,
        (_heads(t.x), _heads(t.residual), _heads(saved), _NONE if grad_rows is None else _rows(grad_rows, D)),
        [x.shape[1] for x in heads],
        [_heads(x) for x in heads],
        spec.eps,
        (spec.interleaved, inverse),
    )


def pack_weight(weight: Tensor) -> Tensor:
    """``weight``, ``[N, E]``, packed for the instruction set in use: float32, of one dimension."""
    matrix = _rows(weight)
    arguments = (*cpu.engine(), cpu.DTYPES[weight.dtype], matrix)
    packed = torch.empty(_native.pack_weight(*arguments, 0), dtype=torch.float32)
    _native.pack_weight(*arguments, packed.data_ptr())
    return packed


def projection(spec: ProjectionSpec, t: ProjectionTensors, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = empty_heads(spec, t)
    B, _, L, D = q.shape
    saved = t.x.new_empty((B, spec.num_q + spec.num_k, L, D) if save else 0)
    _call("forward", spec, t, D, (q, k, v), saved=saved)
    return q, k, v, saved


def _product(
    sizes: tuple[int, int, int], a: Fields, transpose_a: bool, b: Fields, c: Fields, dtype: torch.dtype
) -> None:
    """c = a b; sizes are its rows, its columns and the depth."""
    _native.product(*cpu.engine(), cpu.DTYPES[dtype], sizes, a, transpose_a, b, c)


def projection_backward(
    spec: ProjectionSpec,
    t: ProjectionTensors,
    saved: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    weight, dtype = t.weight, t.x.dtype
    assert weight is not None
    (N, depth), D = weight.shape, head_dim(spec, t)
    rows = t.x.shape[0] * t.x.shape[2]
    grad_q_norm = grad_k_norm = grad_norms = None
    if t.q_norm is not None or t.k_norm is not None:
        blocks = -(-rows // _native.PROJECTION_ROWS)
        grad_norms = t.x.new_empty((blocks, 2, D), dtype=torch.float32)
    grad = t.x.new_empty((rows, N))
    _call("backward", spec, t, D, grads, saved=saved, grad_rows=grad, grad_norms=grad_norms)
    if grad_norms is not None:
        sums = grad_norms.sum(0)
        grad_q_norm = None if t.q_norm is None else sums[0].to(t.q_norm.dtype)
        grad_k_norm = None if t.k_norm is None else sums[1].to(t.k_norm.dtype)
    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        grad_x = torch.empty_like(t.x)
        _product((rows, depth, N), _rows(grad), False, _rows(weight), _heads(grad_x), dtype)
    if needs[1]:
        grad_weight = torch.empty(weight.shape, dtype=dtype)
        _product((N, depth, rows), _rows(grad), True, _heads(t.x), _rows(grad_weight), dtype)
    if needs[2]:
        grad_bias = grad.sum(0, dtype=torch.float32).to(dtype)
    return grad_x, grad_weight, grad_bias, grad_q_norm, grad_k_norm


def rotary(spec: ProjectionSpec, t: ProjectionTensors, inverse: bool) -> Tensor:
    out = torch.empty_like(t.x)
    empty = out[:, :0]
    _call("rotary", spec, t, t.x.shape[-1], (out, empty, empty), inverse=inverse)
    return out
