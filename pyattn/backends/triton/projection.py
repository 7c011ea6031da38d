"""Multi-head projections by the Triton kernels of ``pyattn.kernels.projection``.

There are two ways to a forward. "fused" multiplies in Triton and finishes the tiles while they are in registers;
"split" leaves the product to torch (cuBLAS, hipBLASLt), which rounds it to the input dtype, and finishes it in one more
pass over memory. ``way`` says which is taken; the products of the backward are torch's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pyattn.backends import triton
from pyattn.spec import ProjectionProblem, ProjectionSpec, ProjectionTensors, empty_heads, head_dim

with contextlib.suppress(ImportError):  # reported by `unavailable`
    from pyattn.kernels import projection as kernels

Way = Literal["fused", "split"]
MAX_FUSED_HEAD_DIM = 256  # of heads with an epilogue: a tile holds whole ones
MAX_HEAD_DIM = 1024
MAX_ROWS = 2**30  # tokens are counted in 32 bits
# Where the fused way is the faster one, as measured on an H100 (``benchmarks/gpu_projection.py``): its product is
# slower than torch's, and what it saves is one pass over the product, and for few tokens a second kernel's start.
FEW_ROWS = 1024
FUSED_DEPTH = 2048  # columns of x
FUSED_ELEMENTS = 2**24  # of x

_forced: list[Way] = []
_tiles: list[Any] = []  # kernels.ProjectionTiles


@contextlib.contextmanager
def use(way: Way | None = None, tiles: Any = None) -> Iterator[None]:
    """That way, where it can be gone, and these tiles of the fused product, within a ``with`` block: for tests."""
    before = _forced[:], _tiles[:]
    _forced[:], _tiles[:] = [way] if way else _forced, [tiles] if tiles else _tiles
    try:
        yield
    finally:
        _forced[:], _tiles[:] = before


def way(dtype: torch.dtype, rows: int, depth: int, D: int, plain: bool) -> Way:
    """How a forward goes: see above. ``plain`` is ``kernels.is_plain``, D the head dim of the outputs."""
    if D > MAX_FUSED_HEAD_DIM and not plain:
        return "split"
    if _forced:
        return _forced[0]
    few = rows <= FEW_ROWS or (depth <= FUSED_DEPTH and rows * depth <= FUSED_ELEMENTS)
    return "fused" if few and dtype != torch.float32 else "split"


# ---- what it can, and how ------------------------------------------------------------------------------------


def unavailable() -> list[str]:
    return triton.unavailable()


def why_not(problem: ProjectionProblem) -> list[str]:
    reasons = triton.why_not_operand(problem.x)
    D = problem.head_dim
    if problem.op == "rotary" or not _is_plain(problem):
        if not 1 <= D <= MAX_HEAD_DIM:
            reasons.append(f"D must lie in [1, {MAX_HEAD_DIM}], it is {D}")
    elif not D:
        reasons.append("D must be at least 1, it is 0")
    if problem.rows >= MAX_ROWS:
        reasons.append(f"takes at most {MAX_ROWS - 1} tokens")
    return reasons


def _is_plain(problem: ProjectionProblem) -> bool:
    return problem.spec.num_heads == 1 and not any(map(problem.has, ("q_norm", "k_norm", "cos")))


def describe(problem: ProjectionProblem) -> str:
    tiles = kernels.rows_tiles(problem.head_dim)
    if problem.op == "rotary":
        return f"rotary alone, {tiles}"
    if problem.op == "backward":
        return f"epilogue in {tiles}; products by torch"
    spec, x, plain = problem.spec, problem.x, _is_plain(problem)
    columns, depth = problem.weight_shape
    if way(x.dtype, problem.rows, depth, problem.head_dim, plain) == "fused":
        tiles = _product_tiles(x.device, x.dtype, problem.rows, columns, spec, plain, problem.has("residual"))
        return f"product and epilogue in {tiles}"
    return "product by torch" if plain else f"product by torch, epilogue in {tiles}"


def _product_tiles(
    device: torch.device, dtype: torch.dtype, rows: int, columns: int, spec: ProjectionSpec, plain: bool, residual: bool
) -> Any:
    if _tiles:
        return _tiles[0]
    return kernels.product_tiles(triton.arch(device), dtype, rows, columns, spec, plain, residual)


# ---- the backend ---------------------------------------------------------------------------------------------


def _ready(t: ProjectionTensors) -> ProjectionTensors:
    """As kernels read them: vectors and tables contiguous, rows of the residual dense."""

    def contiguous(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    return t._replace(
        bias=contiguous(t.bias),
        residual=t.residual if t.residual is None or t.residual.stride(-1) == 1 else t.residual.contiguous(),
        q_norm=contiguous(t.q_norm),
        k_norm=contiguous(t.k_norm),
        cos=contiguous(t.cos),
        sin=contiguous(t.sin),
        positions=contiguous(t.positions),
    )


def _start(kind: tuple[Any, ...], t: ProjectionTensors, launch: Callable[[], Any], **others: Tensor | None) -> None:
    """``triton.start`` of one launch, whose arguments are ``t`` and ``others``."""
    tensors = {
        "X": t.x,
        "W": t.weight,
        "BIAS": t.bias,
        "RESIDUAL": t.residual,
        "Q_NORM": t.q_norm,
        "K_NORM": t.k_norm,
        "COS": t.cos,
        "SIN": t.sin,
        "POSITIONS": t.positions,
    }
    precision = triton.precision(t.x.dtype)
    triton.start((*kind, precision, *_forced, *_tiles), lambda: [launch()], tensors | others, t.x.device)


def _rows(x: Tensor) -> Tensor:
    """``[B, H, L, D]`` as ``[B * L, H * D]``: a copy only where the heads do not lie side by side."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def projection(spec: ProjectionSpec, t: ProjectionTensors, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert t.weight is not None
    plain, D, (columns, depth) = kernels.is_plain(spec, t), head_dim(spec, t), t.weight.shape
    rows = t.x.shape[0] * t.x.shape[2]
    if way(t.x.dtype, rows, depth, D, plain) == "split":
        return _split(spec, t, save, plain)
    problem, t = ProjectionProblem.of("forward", spec, t), _ready(t)
    outputs, saved = empty_heads(spec, t), _empty_saved(spec, t, save)
    kept = saved if save else None
    residual = t.residual is not None

    def launch() -> Any:
        tiles = _product_tiles(t.x.device, t.x.dtype, rows, columns, spec, plain, residual)
        return kernels.forward(spec, t, outputs, kept, tiles, triton.precision(t.x.dtype))

    q, k, v = outputs
    _start((problem, save), t, launch, Q=q, K=k, V=v, SAVED=kept)
    return *outputs, saved


def _empty_saved(spec: ProjectionSpec, t: ProjectionTensors, save: bool) -> Tensor:
    B, _, L, _ = t.x.shape
    return t.x.new_empty((B, spec.num_q + spec.num_k, L, head_dim(spec, t)) if save else 0)


def _split(
    spec: ProjectionSpec, t: ProjectionTensors, save: bool, plain: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The other way: torch multiplies and adds, then q, k and v are made of it."""
    assert t.weight is not None
    B, _, L, _ = t.x.shape
    D = head_dim(spec, t)
    y = F.linear(_rows(t.x), t.weight, t.bias).view(B, L, spec.num_heads, D).transpose(1, 2)
    if t.residual is not None:
        y.add_(t.residual)
    if plain:
        y = y.view(B, 1, L, D)  # the same, as an output is laid out
        saved = y[:, : spec.num_q + spec.num_k].clone() if save else y.new_empty(0)
        q, k, v = (y if n else y.new_empty((B, 0, L, D)) for n in spec[:3])
        return q, k, v, saved
    problem, t = ProjectionProblem.of("forward", spec, t), _ready(t)
    q, k, v = outputs = empty_heads(spec, t)
    saved = _empty_saved(spec, t, save)
    kept = saved if save else None
    launch = functools.partial(kernels.epilogue, spec, t, y, outputs, kept)
    _start((problem, save, "split"), t, launch, Y=y, Q=q, K=k, V=v, SAVED=kept)
    return *outputs, saved


def projection_backward(
    spec: ProjectionSpec,
    t: ProjectionTensors,
    saved: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradient of the product by a kernel, those of what was multiplied by torch."""
    assert t.weight is not None
    dtype, D, rows = t.x.dtype, head_dim(spec, t), t.x.shape[0] * t.x.shape[2]
    partials = None
    if kernels.is_plain(spec, t):
        (grad,) = (_rows(grad) for grad, n in zip(grads, spec[:3], strict=True) if n)
    else:
        grad = t.x.new_empty((rows, spec.num_heads * D))
        if t.q_norm is not None or t.k_norm is not None:
            partials = t.x.new_empty(kernels.partials_shape(spec, rows, D), dtype=torch.float32)
        normed = None if partials is None else saved.contiguous()
        kind = ProjectionProblem.of("backward", spec, t), *(x.stride() for x in grads)
        ready = _ready(t)
        launch = functools.partial(kernels.backward, spec, ready, normed, grads, grad, partials)
        named = dict(zip(("DQ", "DK", "DV"), grads, strict=True)) | {"SAVED": normed, "DY": grad, "PARTIALS": partials}
        _start(kind, ready, launch, **named)
    grad_norms: list[Tensor | None] = [None, None]
    for i, (norm, first, n) in enumerate(((t.q_norm, 0, spec.num_q), (t.k_norm, spec.num_q, spec.num_k))):
        if norm is not None:
            assert partials is not None
            grad_norms[i] = partials[:, first : first + n].sum((0, 1)).to(norm.dtype)
    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        grad_x = _multiplied(grad, t.weight, t.x)
    if needs[1]:
        grad_weight = torch.mm(grad.T, _rows(t.x), out=torch.empty(t.weight.shape, dtype=dtype, device=grad.device))
    if needs[2]:
        grad_bias = grad.sum(0, dtype=torch.float32).to(dtype)
    return grad_x, grad_weight, grad_bias, *grad_norms


def _multiplied(grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """``grad @ weight`` with the shape and the layout of x."""
    B, H, L, D = x.shape
    out = torch.empty_like(x)
    if out.transpose(1, 2).is_contiguous():
        torch.mm(grad, weight, out=out.transpose(1, 2).view(B * L, H * D))
        return out
    return out.copy_(torch.mm(grad, weight).view(B, L, H, D).transpose(1, 2))


def rotary(spec: ProjectionSpec, t: ProjectionTensors, inverse: bool) -> Tensor:
    out = torch.empty_like(t.x)
    spec = ProjectionSpec(t.x.shape[1], interleaved=spec.interleaved)
    problem, t = ProjectionProblem.of("rotary", spec, t), _ready(t)
    launch = functools.partial(kernels.epilogue, spec, t, t.x, (out, out, out), None, inverse)
    _start((problem, inverse), t, launch, Y=t.x, Q=out, K=out, V=out)
    return out
