"""Projections among ``torch.ops.pyattn``: schemas, kernels, fakes, autograd, autocast, vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyattn import dispatch, log
from pyattn.checks import check_positions
from pyattn.library import below_autograd, differentiable, library, register, unobserved
from pyattn.spec import Op, ProjectionProblem, ProjectionSpec, ProjectionTensors, empty_heads

_TENSORS = "Tensor x, Tensor weight, " + ", ".join(f"Tensor? {name}" for name in ProjectionTensors._fields[2:])
_SPEC = "int num_q, int num_k, int num_v, float eps, bool interleaved"
_NUM_TENSORS = len(ProjectionTensors._fields)
_NUM_ARGS = _NUM_TENSORS + len(ProjectionSpec._fields)
_LINEAR_FIELDS = ("x", "weight", "bias", "residual")  # whose dtype autocast chooses
_NO_SPEC = ProjectionSpec(0)

library.define(f"projection({_TENSORS}, {_SPEC}, bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor)")
library.define(
    f"projection_backward({_TENSORS}, {_SPEC}, Tensor saved, Tensor grad_q, Tensor grad_k, Tensor grad_v, "
    "bool[3] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse, str backend) -> Tensor"
)
_projection_op = torch.ops.pyattn.projection.default
_backward_op = torch.ops.pyattn.projection_backward.default
_rotary_op = torch.ops.pyattn.rotary.default


def _unpack(args: tuple[Any, ...]) -> tuple[ProjectionSpec, ProjectionTensors]:
    return ProjectionSpec._make(args[_NUM_TENSORS:_NUM_ARGS]), ProjectionTensors._make(args[:_NUM_TENSORS])


def _dense(x: Tensor) -> Tensor:
    """With a last stride of 1: kernels take any other stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _compute(op: Op, spec: ProjectionSpec, t: ProjectionTensors, backend: str, call: Any) -> Any:
    if t.positions is not None and t.cos is not None:
        check_positions(t.positions, t.cos.shape[0])
    problem = ProjectionProblem.of(op, spec, t)
    chosen = dispatch.select(problem, backend)
    if log.depth:
        return log.timed(problem, backend, lambda: call(chosen))
    return call(chosen)


# ---- projection ---------------------------------------------------------------------------------------------


def _projection(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec, t = _unpack(args)
    residual = None if t.residual is None else _dense(t.residual)
    t = t._replace(x=_dense(t.x), weight=_dense(args[1]), residual=residual)
    return _compute("forward", spec, t, args[-1], lambda backend: backend.projection(spec, t, args[-2]))


def _projection_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec, t = _unpack(args)
    q, k, v = empty_heads(spec, t)
    saved = t.x.new_empty((*q.shape[:1], spec.num_q + spec.num_k, *q.shape[2:]) if args[-2] else 0)
    return q, k, v, saved


def _backward(*args: Any) -> tuple[Tensor, ...]:
    spec, t = _unpack(args)
    t = t._replace(x=_dense(t.x), weight=_dense(args[1]))
    saved, *grads, needs, name = args[_NUM_ARGS:]
    incoming = (saved, tuple(_dense(grad) for grad in grads), needs)
    results = _compute("backward", spec, t, name, lambda backend: backend.projection_backward(spec, t, *incoming))
    # An op cannot return an optional tensor: an empty one stands for "no gradient".
    return tuple(t.x.new_empty(0) if grad is None else grad for grad in results)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    _, t = _unpack(args)
    needs = (*args[-2], t.q_norm is not None, t.k_norm is not None)
    likes = (t.x, t.weight, t.bias, t.q_norm, t.k_norm)
    return tuple(
        t.x.new_empty(0) if not need or like is None else torch.empty_like(like) if like is t.x
        else like.new_empty(like.shape)
        for need, like in zip(needs, likes, strict=True)
    )  # fmt: skip


class _Projection(torch.autograd.function._SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        spec, t = _unpack(args)
        save = t.q_norm is not None or t.k_norm is not None
        q, k, v, saved = below_autograd(_projection_op, (*args[:_NUM_ARGS], save, args[-1]))
        ctx.save_for_backward(*t._replace(residual=None), saved)
        ctx.spec, ctx.backend = spec, args[-1]
        ctx.has_residual = t.residual is not None
        ctx.mark_non_differentiable(saved)
        return q, k, v, saved

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, _: Any) -> tuple[Any, ...]:
        *tensors, saved = ctx.saved_tensors
        t = ProjectionTensors._make(tensors)
        by_name = dict(zip(ProjectionTensors._fields, ctx.needs_input_grad, strict=False))
        if by_name["cos"] or by_name["sin"]:
            raise NotImplementedError("rotary: cos and sin have no gradient, but one of them requires it")
        needs = [by_name[name] for name in ("x", "weight", "bias")]
        grads: dict[str, Tensor] = {}
        if any(needs) or by_name["q_norm"] or by_name["k_norm"]:
            results = _backward_op(*t, *ctx.spec, saved, grad_q, grad_k, grad_v, needs, ctx.backend)
            grads = dict(zip(("x", "weight", "bias", "q_norm", "k_norm"), results, strict=True))
        grads["residual"] = grad_q
        by_field = [grads.get(name) if by_name[name] else None for name in ProjectionTensors._fields]
        return *by_field, *(None,) * (len(ProjectionSpec._fields) + 2)


class _NoSecondDerivative(torch.autograd.function._SingleLevelFunction):
    """The gradients, which remember that they depend on their inputs, and say so when that is needed."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        return below_autograd(_backward_op, args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise NotImplementedError("pyattn::projection_backward has no derivative: second derivatives are not supported")


# ---- rotary -------------------------------------------------------------------------------------------------


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, *flags: Any) -> Tensor:
    interleaved, inverse, name = flags
    spec = _NO_SPEC._replace(interleaved=interleaved)
    t = ProjectionTensors(_dense(x), cos=cos, sin=sin, positions=positions)
    return _compute("rotary", spec, t, name, lambda backend: backend.rotary(spec, t, inverse))


def _rotary_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


class _Rotary(torch.autograd.function._SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[1:4])
        ctx.flags = args[4:]
        return below_autograd(_rotary_op, args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            raise NotImplementedError("rotary: cos and sin have no gradient, but one of them requires it")
        interleaved, inverse, backend = ctx.flags
        return _rotary_op(grad, *ctx.saved_tensors, interleaved, not inverse, backend), *(None,) * 6


# ---- registration -------------------------------------------------------------------------------------------


def _autocast(device_type: str) -> Any:
    key = torch._C.DispatchKey.AutocastCPU if device_type == "cpu" else torch._C.DispatchKey.AutocastCUDA
    keys = torch._C.DispatchKeySet(key)

    def projection(*args: Any) -> tuple[Tensor, ...]:
        """What is multiplied and added in the autocast dtype; norms and angles keep theirs."""
        dtype = torch.get_autocast_dtype(device_type)
        t = ProjectionTensors._make(args[:_NUM_TENSORS])
        cast = {n: x.to(dtype) for n in _LINEAR_FIELDS if (x := getattr(t, n)) is not None and x.dtype != torch.float64}
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _projection_op(*t._replace(**cast), *args[_NUM_TENSORS:])

    return projection


def _each(op: Any, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    """One example of ``torch.vmap`` after the other."""

    def example(i: int) -> Any:
        return op(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True)))

    results = [example(i) for i in range(size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True))


register(
    "projection",
    _projection_op,
    compute=_projection,
    fake=_projection_fake,
    differentiable=differentiable(_projection_op, lambda args: _Projection.apply(*args)),  # type: ignore[attr-defined]
    vmap=_each,
)
register(
    "projection_backward",
    _backward_op,
    compute=_backward,
    fake=_backward_fake,
    differentiable=differentiable(_backward_op, lambda args: _NoSecondDerivative.apply(*args)),  # type: ignore[attr-defined]
    vmap=_each,
)
register(
    "rotary",
    _rotary_op,
    compute=_rotary,
    fake=_rotary_fake,
    differentiable=differentiable(_rotary_op, lambda args: _Rotary.apply(*args)),  # type: ignore[attr-defined]
    vmap=_each,
)
library.impl("projection", _autocast("cpu"), "AutocastCPU")
library.impl("projection", _autocast("cuda"), "AutocastCUDA")


def projection(spec: ProjectionSpec, t: ProjectionTensors, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of ``torch.ops.pyattn.projection``, differentiable."""
    given = [x for x in t if x is not None]
    at_once = unobserved(given) and not (torch.is_grad_enabled() and any(x.requires_grad for x in given))
    q, k, v, _ = (_projection if at_once else _projection_op)(*t, *spec, False, backend)
    return q, k, v


def rotary(x: Tensor, t: ProjectionTensors, interleaved: bool, backend: str) -> Tensor:
    """``torch.ops.pyattn.rotary``, differentiable."""
    return _rotary_op(x, t.cos, t.sin, t.positions, interleaved, False, backend)
