"""Multi-head projections in eager PyTorch: the oracle, the fused emulation and the backend of last resort.

On float64 input it is the truth. Otherwise it emulates a fused kernel: products, sums, norm and rotary in float32, one
rounding of each output; in the gradient what the product is of is rounded to the input dtype first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyattn.spec import ProjectionProblem, ProjectionSpec, ProjectionTensors, head_dim


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate(x: Tensor, t: ProjectionTensors, interleaved: bool, inverse: bool = False) -> Tensor:
    """Turns pairs of elements of each row of ``x``, ``[B, H, L, D]``, by the angles of the row's position.

    A pair is ``(i, i + R / 2)``, or ``(2 i, 2 i + 1)`` interleaved, of the first R elements (Su et al. 2021,
    arXiv:2104.09864). ``inverse`` turns back.
    """
    if t.cos is None or t.sin is None:
        return x
    cos, sin = (
        table[: x.shape[2]] if t.positions is None else table[t.positions.clamp(0, table.shape[0] - 1)].unsqueeze(1)
        for table in (t.cos.to(x.dtype), t.sin.to(x.dtype))
    )  # [L, R / 2] or [B or 1, 1, L, R / 2]
    if inverse:
        sin = -sin
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).mT  # [..., R / 2, 2]
    a, b = pairs.unbind(-1)
    pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat(((pairs if interleaved else pairs.mT).flatten(-2), rest), -1)


def _rstd(y: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)


def _rows(x: Tensor) -> Tensor:
    """``[B, H, L, D]`` to ``[B * L, H * D]``."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def _heads(spec: ProjectionSpec, y: Tensor) -> tuple[Tensor, ...]:
    return y.split([spec.num_q, spec.num_k, spec.num_v], 1)


# ---- the backend ---------------------------------------------------------------------------------------------


def unavailable() -> list[str]:
    return []


def why_not(problem: ProjectionProblem) -> list[str]:
    return []


def describe(problem: ProjectionProblem) -> str:
    return "eager torch"


def projection(spec: ProjectionSpec, t: ProjectionTensors, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, and with ``save`` the heads of q and k before norm and rotary, ``[B, num_q + num_k, L, D]``."""
    assert t.weight is not None
    dtype, wide = t.x.dtype, _wide(t.x.dtype)
    B, _, L, _ = t.x.shape
    y = F.linear(_rows(t.x).to(wide), t.weight.to(wide), None if t.bias is None else t.bias.to(wide))
    y = y.view(B, L, spec.num_heads, head_dim(spec, t)).transpose(1, 2)  # [B, num_heads, L, D]
    if t.residual is not None:
        y = y + t.residual.to(wide)
    saved = y[:, : spec.num_q + spec.num_k].to(dtype).contiguous() if save else t.x.new_empty(0)
    q, k, v = _heads(spec, y)
    if t.q_norm is not None:
        q = q * _rstd(q, spec.eps) * t.q_norm.to(wide)
    if t.k_norm is not None:
        k = k * _rstd(k, spec.eps) * t.k_norm.to(wide)
    q, k = rotate(q, t, spec.interleaved), rotate(k, t, spec.interleaved)
    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    return q, k, v, saved


def _norm_backward(grad: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of ``y`` and the weight of ``y * rstd(y) * weight``."""
    rstd = _rstd(y, eps)
    normal, grad_normal = y * rstd, grad * weight.to(y.dtype)
    grad_y = rstd * (grad_normal - normal * (grad_normal * normal).mean(-1, keepdim=True))
    return grad_y, (grad * normal).sum((0, 1, 2)).to(weight.dtype)


def projection_backward(
    spec: ProjectionSpec,
    t: ProjectionTensors,
    saved: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, if ``needs`` says so, and of q_norm and k_norm, if they are given."""
    assert t.weight is not None
    dtype, wide = t.x.dtype, _wide(t.x.dtype)
    B, H, L, D_in = t.x.shape
    grad_q, grad_k, grad_v = (grad.to(wide) for grad in grads)
    grad_q, grad_k = (rotate(grad, t, spec.interleaved, inverse=True) for grad in (grad_q, grad_k))
    grad_q_norm = grad_k_norm = None
    if t.q_norm is not None:
        grad_q, grad_q_norm = _norm_backward(grad_q, saved[:, : spec.num_q].to(wide), t.q_norm, spec.eps)
    if t.k_norm is not None:
        grad_k, grad_k_norm = _norm_backward(grad_k, saved[:, spec.num_q :].to(wide), t.k_norm, spec.eps)
    grad = _rows(torch.cat((grad_q, grad_k, grad_v), 1)).to(dtype).to(wide)  # [B * L, num_heads * D]
    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        grad_x = torch.empty_like(t.x)
        grad_x.copy_((grad @ t.weight.to(wide)).view(B, L, H, D_in).transpose(1, 2))
    if needs[1]:
        grad_weight = (grad.T @ _rows(t.x).to(wide)).to(dtype)
    if needs[2]:
        grad_bias = grad.sum(0).to(dtype)
    return grad_x, grad_weight, grad_bias, grad_q_norm, grad_k_norm


def rotary(spec: ProjectionSpec, t: ProjectionTensors, inverse: bool) -> Tensor:
    """``rotate`` of x alone."""
    out = torch.empty_like(t.x)
    return out.copy_(rotate(t.x.to(_wide(t.x.dtype)), t, spec.interleaved, inverse))
