"""Calls of projections that every backend is held to: named cases, their tensors, and what they should give."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyattn import projection, projection_ops
from pyattn.spec import ProjectionSpec, ProjectionTensors
from pyattn.testing import check_results, to_dtype

Results = dict[str, Tensor]


@dataclass(frozen=True)
class ProjectionCase:
    """A kind of call. ``heads`` are those of q, k and v; without ``D_in`` x is ``[B, L, E]``."""

    name: str
    heads: tuple[int, int, int] = (2, 2, 2)
    D: int = 16
    B: int = 2
    L: int = 20
    E: int = 24
    D_in: int | None = None  # x is the output of attention, [B, E / D_in, L, D_in], and the output [B, L, D]
    layout: str = "dense"  # "dense", "BLHD" with D_in, "rows" with more columns than E, "transposed": L before B
    bias: bool = True
    residual: bool = False
    norms: str = ""  # of "q", "k", "qk"
    R: int = 0  # elements that are turned
    interleaved: bool = False
    positions: str | None = None  # "shared" or "per token"
    eps: float = 1e-6
    scale: float = 1.0  # of x: small, and eps counts

    def __str__(self) -> str:
        return self.name


CASES = [
    ProjectionCase("plain"),
    ProjectionCase("no bias", bias=False, L=7),
    ProjectionCase("gqa", heads=(4, 2, 2), E=40),
    ProjectionCase("mqa, norms", heads=(3, 1, 1), norms="qk"),
    ProjectionCase("norms, eps", heads=(2, 1, 1), norms="qk", eps=1e-3, scale=0.02, bias=False),
    ProjectionCase("norm of k", norms="k", R=16),
    ProjectionCase("many rows", heads=(2, 1, 1), B=3, L=50, E=20, norms="q"),
    ProjectionCase("rotary", heads=(4, 2, 2), R=16),
    ProjectionCase("rotary, interleaved", heads=(4, 2, 2), R=16, interleaved=True),
    ProjectionCase("rotary, part", R=6, positions="shared"),
    ProjectionCase("rotary, part, interleaved", R=6, interleaved=True, positions="per token"),
    ProjectionCase("everything", heads=(4, 2, 2), D=64, E=48, norms="qk", R=64, positions="per token"),
    ProjectionCase("everything, interleaved", heads=(4, 2, 2), norms="qk", R=16, interleaved=True),
    ProjectionCase("small head", heads=(3, 3, 3), D=8, norms="qk", R=8),
    ProjectionCase("odd head", D=33, norms="qk", R=16),
    ProjectionCase("odd head, interleaved", D=33, norms="qk", R=32, interleaved=True),
    ProjectionCase("head of 80", D=80, heads=(2, 1, 1), norms="qk", R=80),
    ProjectionCase("head of 128", D=128, heads=(1, 1, 1), B=1, norms="qk", R=64),
    ProjectionCase("q alone", heads=(3, 0, 0), norms="qk", R=16),
    ProjectionCase("k and v", heads=(0, 2, 2), norms="qk", R=16),
    ProjectionCase("k and v, plain", heads=(0, 2, 2)),
    ProjectionCase("rows apart", layout="rows", norms="qk"),
    ProjectionCase("transposed", layout="transposed", R=16),
    ProjectionCase("output", D=40, E=48, D_in=16),
    ProjectionCase("output, BLHD", D=40, E=48, D_in=16, layout="BLHD"),
    ProjectionCase("output, residual", D=40, E=48, D_in=16, residual=True),
    ProjectionCase("output, BLHD, residual", D=300, E=66, D_in=33, layout="BLHD", residual=True, bias=False),
]


def make(
    case: ProjectionCase, dtype: torch.dtype, requires_grad: bool = False, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """The tensors of a call, by the names of ``pyattn.qkv_projection`` or ``output_projection``."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int, scale: float = 1.0, offset: float = 0.0, requires: bool = requires_grad) -> Tensor:
        x = (torch.randn(shape, generator=generator) * scale + offset).to(device, dtype)
        return x.requires_grad_(requires)

    B, L, E, D = case.B, case.L, case.E, case.D
    columns = D if case.D_in else sum(case.heads) * D
    kwargs: dict[str, Any] = {"weight": tensor(columns, E, scale=E**-0.5)}
    if case.bias:
        kwargs["bias"] = tensor(columns)
    if case.D_in:
        shape = (B, L, E // case.D_in, case.D_in) if case.layout == "BLHD" else (B, E // case.D_in, L, case.D_in)
        x = tensor(*shape, requires=False)
        kwargs["attn_out"] = (x.transpose(1, 2) if case.layout == "BLHD" else x).requires_grad_(requires_grad)
        if case.residual:
            kwargs["residual"] = tensor(B, L, D)
        return kwargs
    x = tensor(*((L, B) if case.layout == "transposed" else (B, L)), E + 8, scale=case.scale, requires=False)
    x = x[..., :E] if case.layout == "rows" else x[..., :E].contiguous()
    kwargs["x"] = (x.transpose(0, 1) if case.layout == "transposed" else x).requires_grad_(requires_grad)
    kwargs |= {f"{part}_norm": tensor(D, scale=0.3, offset=1.0) for part in case.norms}
    if case.R:
        angles = torch.outer(torch.arange(2.0 * L), 100 ** -torch.linspace(0, 1, case.R // 2))
        tables = (x.to(device, torch.float32 if case.positions else dtype) for x in (angles.cos(), angles.sin()))
        kwargs["rotary"] = projection.Rotary(*tables, case.interleaved)
    if case.positions:
        shape = (B, L) if case.positions == "per token" else (L,)
        kwargs["positions"] = torch.randint(0, 2 * L, shape, generator=generator).to(device)
    return kwargs


def prepare(case: ProjectionCase, kwargs: dict[str, Any]) -> tuple[ProjectionSpec, ProjectionTensors]:
    """What the op gets."""
    if case.D_in:
        return projection._output(**kwargs)
    return projection.heads(**{"bias": None} | kwargs, num_heads=case.heads, eps=case.eps)


def call(case: ProjectionCase, kwargs: dict[str, Any], backend: str | None = None) -> dict[str, Tensor]:
    """The outputs."""
    outputs = projection_ops.projection(*prepare(case, kwargs), backend or "auto")
    return dict(zip("q" if case.D_in else "qkv", outputs, strict=False))


def results(
    case: ProjectionCase, kwargs: dict[str, Any], dtype: torch.dtype, backend: str | None = None, seed: int = 1
) -> Results:
    """The outputs, and the gradients of whatever requires one, for random gradients of the outputs in ``dtype``."""
    outputs = call(case, kwargs, backend)
    found = {name: x.detach() for name, x in outputs.items()}
    wanted = {name: x for name, x in kwargs.items() if isinstance(x, Tensor) and x.requires_grad}
    if wanted:
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in outputs.values()]
        gradients = torch.autograd.grad(list(outputs.values()), list(wanted.values()), grads)
        found |= {f"grad of {name}": grad for name, grad in zip(wanted, gradients, strict=True)}
    return found


@functools.cache
def expected(
    case: ProjectionCase, dtype: torch.dtype, requires_grad: bool = True, draws: int = 3, device: str = "cpu"
) -> tuple[list[Results], Results]:
    """What the reference gives in ``dtype`` and in float64.

    The largest rounding error is a matter of luck, so there are several draws, which sum over E in different orders.
    They are made on the ``device``, whose float32 products may sum in longer runs than a CPU's.
    """
    kwargs = make(case, dtype, requires_grad, device)
    x = "attn_out" if case.D_in else "x"
    columns = kwargs[x].shape[-1]
    generator = torch.Generator().manual_seed(2)

    def emulate(order: Tensor) -> Results:
        def ordered(y: Tensor) -> Tensor:
            return y.detach().unflatten(-1, (-1, columns))[..., order].flatten(-2)

        changed = {name: ordered(kwargs[name]).requires_grad_(requires_grad) for name in (x, "weight")}
        found = results(case, kwargs | changed, dtype, "reference")
        back = order.argsort()
        for name in (f"grad of {x}", "grad of weight"):
            if name in found:
                found[name] = found[name].unflatten(-1, (-1, columns))[..., back].flatten(-2)
        return {name: y.cpu() for name, y in found.items()}

    orders = [torch.arange(columns), *(torch.randperm(columns, generator=generator) for _ in range(draws - 1))]
    truth = results(case, to_dtype(kwargs, torch.float64), dtype, "reference")
    return [emulate(order) for order in orders], {name: y.cpu() for name, y in truth.items()}


def check(
    case: ProjectionCase, dtype: torch.dtype, backend: str, requires_grad: bool = True, device: str = "cpu"
) -> None:
    """Holds a backend's outputs and gradients to the reference's, by ``pyattn.testing.assert_close``."""
    actual = results(case, make(case, dtype, requires_grad, device), dtype, backend)
    check_results(actual, *expected(case, dtype, requires_grad, device=device))
