"""The public functions of multi-head projections: check the call, build the spec, call the op."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyattn import checks, dispatch, projection_ops
from pyattn.explanation import Explanation
from pyattn.spec import ProjectionProblem, ProjectionSpec, ProjectionTensors


class Rotary(NamedTuple):
    """Angles of rotary position embedding, by position (Su et al. 2021, arXiv:2104.09864).

    Of the first R elements of each head, R even, pairs are turned: ``(i, i + R / 2)`` as in Llama and GPT-NeoX, or
    ``(2 i, 2 i + 1)`` as in the paper and GPT-J, by the angle whose cosine and sine stand in column i.
    ``pyattn.nn.RotaryEmbedding`` makes them.

    Attributes:
        cos: ``[max_pos, R / 2]``, any floating dtype; no gradient.
        sin: the same.
        interleaved: which elements are a pair.

    Example:
        >>> import torch, pyattn
        >>> angles = torch.outer(torch.arange(100), 1e4 ** -torch.linspace(0, 1, 17)[:16])
        >>> rotary = pyattn.Rotary(angles.cos(), angles.sin())
        >>> rotary.cos.shape
        torch.Size([100, 16])
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


def _like(x: Tensor) -> tuple[torch.dtype, ...]:
    """Dtypes that an operand of a product with ``x`` may have: under autocast all, since they will be cast."""
    return checks.FLOAT_DTYPES if checks.autocasts(x) else (x.dtype,)


def _check_linear(name: str, x: Any, rank: int, layout: str, weight: Any, bias: Any, weight_layout: str) -> None:
    checks.check_tensor(name, x, checks.FLOAT_DTYPES)
    if x.dim() != rank:
        raise ValueError(f"{name} must have shape {layout}, got {list(x.shape)}")
    checks.check_tensor("weight", weight, _like(x), x, name)
    columns = x.shape[-1] if rank == 3 else x.shape[1] * x.shape[3]
    if weight.dim() != 2 or weight.shape[1] != columns:
        raise ValueError(f"weight must have shape {weight_layout} with {columns} columns, got {list(weight.shape)}")
    if bias is not None:
        checks.check_tensor("bias", bias, _like(x), x, name)
        checks.check_shape("bias", bias, (weight.shape[0],), "[rows of weight]")


def _check_heads(name: str, n: Any, least: int = 1) -> int:
    if checks.check_int(name, n) < least:
        raise ValueError(f"{name} must be at least {least}, got {n}")
    return n


def _check_rotary(rotary: Any, positions: Any, x: Tensor, name: str, B: int, L: int, D: int) -> ProjectionTensors:
    """cos, sin and positions, these as ``[B or 1, L]``, beside ``x``."""
    t = ProjectionTensors(x)
    if rotary is None:
        if positions is not None:
            raise ValueError("positions must come with rotary, got no rotary")
        return t
    if not isinstance(rotary, Rotary):
        raise TypeError(f"rotary must be a pyattn.Rotary, got {type(rotary).__name__}")
    checks.check_bool("rotary.interleaved", rotary.interleaved)
    for part, table in (("rotary.cos", rotary.cos), ("rotary.sin", rotary.sin)):
        checks.check_tensor(part, table, checks.FLOAT_DTYPES, x, name)
        if table.dim() != 2 or 2 * table.shape[1] > D or table.shape != rotary.cos.shape:
            raise ValueError(
                f"{part} must have shape [max_pos, R / 2] with R at most the head dim {D}, as the other, "
                f"got {list(table.shape)}"
            )
        if table.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{part} must not require a gradient: it has none")
    if positions is None:
        if rotary.cos.shape[0] < L:
            raise ValueError(f"rotary must have at least the {L} positions of {name}, got {rotary.cos.shape[0]}")
    else:
        checks.check_tensor("positions", positions, checks.INDEX_DTYPES, x, name)
        if tuple(positions.shape) not in ((L,), (1, L), (B, L)):
            raise ValueError(
                f"positions must have shape [L] = [{L}] or [B, L] = [{B}, {L}], got {list(positions.shape)}"
            )
        positions = positions.view(-1, L) if positions.dim() == 1 else positions
    return t._replace(cos=rotary.cos, sin=rotary.sin, positions=positions)


def _qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    rotary: Rotary | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    positions: Tensor | None = None,
) -> tuple[ProjectionSpec, ProjectionTensors]:
    Hq = _check_heads("num_heads", num_heads)
    Hkv = Hq if num_kv_heads is None else _check_heads("num_kv_heads", num_kv_heads)
    if Hq % Hkv:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads = {Hkv}, got {Hq}")
    return heads(x, weight, bias, (Hq, Hkv, Hkv), rotary, q_norm, k_norm, eps, positions)


def heads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_heads: tuple[int, int, int],
    rotary: Rotary | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    packed: Tensor | None = None,
) -> tuple[ProjectionSpec, ProjectionTensors]:
    """The checked spec and tensors of ``qkv_projection`` with any numbers of heads of q, k and v, zeros among them.

    ``packed`` is the weight as the CPU's kernels want it, of the dtype of x. Nothing shows whether it is.
    """
    rows = "[(Hq + 2 Hkv) * D, E]"
    _check_linear("x", x, 3, "[B, L, E]", weight, bias, rows)
    total = sum(num_heads)
    if weight.shape[0] % total:
        raise ValueError(f"weight must have shape {rows}, a multiple of {total} rows, got {list(weight.shape)}")
    (B, L, _), D = x.shape, weight.shape[0] // total
    t = _check_rotary(rotary, positions, x, "x", B, L, D)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            checks.check_tensor(name, norm, checks.FLOAT_DTYPES, x, "x")
            checks.check_shape(name, norm, (D,), "[D]")
    if not checks.check_number("eps", eps) >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    spec = ProjectionSpec(*num_heads, eps=eps, interleaved=rotary is not None and rotary.interleaved)
    return spec, t._replace(x=x.unsqueeze(1), weight=weight, bias=bias, q_norm=q_norm, k_norm=k_norm, packed=packed)


def qkv_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    rotary: Rotary | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of self-attention from one product: multiply, add, normalise, turn, split into heads.

    ``x @ weight.T + bias``, cut into heads; of the heads of q and k, if asked for, RMSNorm over D (Zhang & Sennrich
    2019, arXiv:1910.07467) and then rotary position embedding. One pass over memory, and the outputs lie as attention
    kernels want them. Computed in float32 (float64 for float64), rounded once.

    Args:
        x: ``[B, L, E]``, float32, bfloat16, float16 or float64.
        weight: ``[(Hq + 2 Hkv) * D, E]``, rows of q, k, v in this order, as ``in_proj_weight`` of
            ``torch.nn.MultiheadAttention``; the dtype of x.
        bias: ``[(Hq + 2 Hkv) * D]``, the dtype of x.
        num_heads: Hq.
        num_kv_heads: Hkv, a divisor of Hq; None for Hq.
        rotary: the angles, a ``pyattn.Rotary``.
        q_norm: ``[D]``, weight of the RMSNorm of q, any floating dtype.
        k_norm: the same for k.
        eps: of the norms, added to the mean square.
        positions: int32 or int64 ``[L]`` or ``[B, L]``, rows of the rotary tables; None for 0 to L - 1.
        backend: None for the best that can, or the name of one, which then raises if it cannot.

    Returns:
        ``(q, k, v)``: ``[B, Hq, L, D]``, ``[B, Hkv, L, D]``, ``[B, Hkv, L, D]`` in the dtype of x, contiguous.
        Differentiable in x, weight, bias and the norms.

    Raises:
        TypeError, ValueError: naming the argument.
        NotImplementedError: the named backend cannot compute this; second derivatives, forward mode.

    Example:
        >>> import torch, pyattn
        >>> x, weight = torch.randn(2, 100, 256), torch.randn((8 + 2 * 2) * 32, 256) / 16
        >>> q, k, v = pyattn.qkv_projection(x, weight, num_heads=8, num_kv_heads=2)
        >>> q.shape, k.shape
        (torch.Size([2, 8, 100, 32]), torch.Size([2, 2, 100, 32]))
        >>> torch.testing.assert_close(q, (x @ weight[:256].T).unflatten(-1, (8, 32)).transpose(1, 2))
    """
    name = dispatch.check_backend(backend)
    spec, tensors = _qkv(
        x,
        weight,
        bias,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        rotary=rotary,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
        positions=positions,
    )
    return projection_ops.projection(spec, tensors, name)


def _output(
    attn_out: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    packed: Tensor | None = None,
) -> tuple[ProjectionSpec, ProjectionTensors]:
    _check_linear("attn_out", attn_out, 4, "[B, H, L, D]", weight, bias, "[E, H * D]")
    if residual is not None:
        checks.check_tensor("residual", residual, _like(attn_out), attn_out, "attn_out")
        shape = (attn_out.shape[0], attn_out.shape[2], weight.shape[0])
        checks.check_shape("residual", residual, shape, "[B, L, E]")
        residual = residual.unsqueeze(1)
    return ProjectionSpec(1), ProjectionTensors(attn_out, weight, bias, residual, packed=packed)


def output(
    attn_out: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None = None,
    name: str = "auto",
) -> Tensor:
    """``output_projection`` on the backend ``name``, with ``packed`` as in ``heads``."""
    spec, t = _output(attn_out, weight, bias, residual, packed)
    if residual is not None and checks.autocasts(attn_out):  # as torch adds: in the wider dtype
        return projection_ops.projection(spec, t._replace(residual=None), name)[0].squeeze(1) + residual
    return projection_ops.projection(spec, t, name)[0].squeeze(1)


def output_projection(
    attn_out: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """What follows attention: the heads side by side, times a weight, plus bias and residual.

    ``attn_out.transpose(1, 2).flatten(2) @ weight.T + bias + residual`` without a copy of the heads. Computed in
    float32 (float64 for float64), rounded once.

    Args:
        attn_out: ``[B, H, L, D]`` in any layout, as attention returns it.
        weight: ``[E, H * D]``, as of ``torch.nn.Linear(H * D, E)``; the dtype of attn_out.
        bias: ``[E]``, the dtype of attn_out.
        residual: ``[B, L, E]``, added.
        backend: None for the best that can, or the name of one, which then raises if it cannot.

    Returns:
        ``[B, L, E]`` in the dtype of attn_out; under autocast the residual's may be wider, and is then the output's.

    Raises:
        TypeError, ValueError: naming the argument.
        NotImplementedError: the named backend cannot compute this; second derivatives, forward mode.

    Example:
        >>> import torch, pyattn
        >>> heads, weight = torch.randn(2, 8, 100, 32), torch.randn(256, 256) / 16
        >>> out = pyattn.output_projection(heads, weight)
        >>> torch.testing.assert_close(out, heads.transpose(1, 2).flatten(2) @ weight.T)
    """
    return output(attn_out, weight, bias, residual, name=dispatch.check_backend(backend))


def apply_rotary(
    q: Tensor, k: Tensor, rotary: Rotary, positions: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys that are there already.

    Args:
        q: ``[B, Hq, L, D]``, any layout.
        k: ``[B, Hkv, L, D]``.
        rotary: the angles, a ``pyattn.Rotary``.
        positions: int32 or int64 ``[L]`` or ``[B, L]``, rows of the rotary tables; None for 0 to L - 1.
        backend: None for the best that can, or the name of one, which then raises if it cannot.

    Returns:
        ``(q, k)``, turned, in the dtypes and layouts that they came in. Differentiable in q and k.

    Raises:
        TypeError, ValueError: naming the argument.
        NotImplementedError: the named backend cannot compute this.

    Example:
        >>> import torch, pyattn
        >>> angles = torch.outer(torch.arange(100), 1e4 ** -torch.linspace(0, 1, 17)[:16])
        >>> q, k = torch.randn(2, 8, 100, 32), torch.randn(2, 2, 100, 32)
        >>> turned_q, turned_k = pyattn.apply_rotary(q, k, pyattn.Rotary(angles.cos(), angles.sin()))
        >>> torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    """
    name = dispatch.check_backend(backend)
    if rotary is None:
        raise TypeError("rotary must be a pyattn.Rotary, got NoneType")
    for part, x in (("q", q), ("k", k)):
        checks.check_tensor(part, x, checks.FLOAT_DTYPES)
        if x.dim() != 4:
            raise ValueError(f"{part} must have shape [B, H, L, D], got {list(x.shape)}")
    if q.shape[::2] != k.shape[::2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"k must have the sizes of q {list(q.shape)} but for its heads, got {list(k.shape)}")
    B, _, L, D = q.shape
    t = _check_rotary(rotary, positions, q, "q", B, L, D)
    turned_q, turned_k = (projection_ops.rotary(x, t, rotary.interleaved, name) for x in (q, k))
    return turned_q, turned_k


def explain_projection(*args: Any, backend: str | None = None, **kwargs: Any) -> Explanation:
    """Which backend computes this projection, and every reason why the others do not. Nothing is computed.

    Takes the arguments of ``qkv_projection`` (with ``num_heads``), or those of ``output_projection``; returns what
    ``pyattn.explain`` returns.

    Example:
        >>> import torch, pyattn
        >>> x, weight = torch.randn(2, 100, 256).double(), torch.randn(768, 256).double()
        >>> pyattn.explain_projection(x, weight, num_heads=8).chosen["forward"]
        'reference'
    """
    name = dispatch.check_backend(backend)
    spec, t = _qkv(*args, **kwargs) if "num_heads" in kwargs else _output(*args, **kwargs)
    problems = [ProjectionProblem.of("forward", spec, t)]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in t):
        problems.append(ProjectionProblem.of("backward", spec, t))
    return Explanation(problems, name)
