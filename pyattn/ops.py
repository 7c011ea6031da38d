"""Attention among ``torch.ops.pyattn``: schemas, kernels, fakes, autograd, autocast, vmap.

An op chooses its backend inside, when it runs, so an exported graph holds no machine's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyattn import batching, dispatch, log
from pyattn.checks import check_gradients, check_values
from pyattn.library import below_autograd, differentiable, library, register, unobserved
from pyattn.spec import AttentionSpec, AttentionTensors, Op, Problem, absent, empty_output, lse_dtype, lse_shape

_TENSORS = "Tensor query, Tensor key, Tensor value, " + ", ".join(
    f"Tensor? {name}" for name in AttentionTensors._fields[3:]
).replace("Tensor? q_offset", "Tensor? q_offsets")
_SPEC = (
    "float scale, SymInt? window_left, SymInt? window_right, SymInt? q_offset, float softcap, float dropout_p, "
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, bool deterministic"
)
_NUM_TENSORS = len(AttentionTensors._fields)
_ATTN_MASK, _ALIBI_SLOPES, _BLOCK_TABLE = map(
    AttentionTensors._fields.index, ("attn_mask", "alibi_slopes", "block_table")
)
_PLAIN_FIELDS = (0, 1, 2)  # query, key, value, and no more
_NO_OPTIONS = (None,) * (_NUM_TENSORS - len(_PLAIN_FIELDS))
_NUM_ARGS = _NUM_TENSORS + len(AttentionSpec._fields)

library.define(f"attention_forward({_TENSORS}, {_SPEC}, str backend) -> (Tensor, Tensor)")
library.define(
    f"attention_backward({_TENSORS}, {_SPEC}, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, "
    "bool needs_mask_grad, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_forward_op = torch.ops.pyattn.attention_forward.default
_backward_op = torch.ops.pyattn.attention_backward.default


def _unpack(args: tuple[Any, ...]) -> tuple[AttentionSpec, AttentionTensors]:
    return AttentionSpec._make(args[_NUM_TENSORS:_NUM_ARGS]), AttentionTensors._make(args[:_NUM_TENSORS])


def _with_dense_rows(t: AttentionTensors) -> AttentionTensors:
    """Query, key and value with last strides of 1: kernels take any other stride."""
    query, key, value = t[:3]
    if query.stride(-1) == 1 and key.stride(-1) == 1 and value.stride(-1) == 1:
        return t
    return AttentionTensors._make((*(x if x.stride(-1) == 1 else x.contiguous() for x in t[:3]), *t[3:]))


class Call:
    """One kind of call: all but its tensors. Backends that have been chosen for it stay chosen."""

    __slots__ = ("_backends", "direct", "fields", "requested", "returns_lse", "spec")

    def __init__(
        self, spec: AttentionSpec, requested: str, fields: tuple[int, ...], direct: bool, returns_lse: bool = True
    ) -> None:
        self.spec = spec
        self.requested = requested  # the backend's name, or "auto"
        self.fields = fields  # of AttentionTensors, that are given
        self.direct = direct  # whether it may go past torch's dispatcher
        self.returns_lse = returns_lse  # an output that nobody asked for costs time, too
        self._backends: dict[Op, dispatch.Backend] = {}

    def backend(self, op: Op, t: AttentionTensors) -> dispatch.Backend:
        found = self._backends.get(op)
        if found is None:
            found = self._backends[op] = dispatch.select(Problem.of(op, self.spec, t), self.requested)
        return found


# ---- forward ------------------------------------------------------------------------------------------------


def _compute_forward(call: Call, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    spec, backend = call.spec, call.backend("forward", t)
    if log.depth:
        problem = Problem.of("forward", spec, t)
        return log.timed(problem, call.requested, lambda: backend.forward(spec, t))
    return backend.forward(spec, t)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    spec, t = _unpack(args)
    t = _with_dense_rows(t)
    check_values(t, spec.max_seqlen_q, spec.max_seqlen_k)
    return _compute_forward(Call(spec, args[-1], (), False), t)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    _, t = _unpack(args)
    return (
        empty_output(t.query, t.value.shape[-1]),
        t.query.new_empty(lse_shape(t.query), dtype=lse_dtype(t.query.dtype)),
    )


# ---- backward -----------------------------------------------------------------------------------------------


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _compute_backward(call: Call, t: AttentionTensors, *incoming: Any) -> Gradients:
    """``incoming``: out, lse, their gradients, and whether the mask's gradient is needed."""
    spec, backend = call.spec, call.backend("backward", t)
    if log.depth:
        problem = Problem.of("backward", spec, t)
        return log.timed(problem, call.requested, lambda: backend.backward(spec, t, *incoming))
    return backend.backward(spec, t, *incoming)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec, t = _unpack(args)
    t = _with_dense_rows(t)
    dq, dk, dv, dmask, dsinks = _compute_backward(Call(spec, args[-1], (), False), t, *args[_NUM_ARGS:-1])
    # An op cannot return an optional tensor: an empty one stands for "no gradient".
    nothing = [t.query.new_empty(0) for _ in range(2)]
    return dq, dk, dv, nothing[0] if dmask is None else dmask, nothing[1] if dsinks is None else dsinks


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, t = _unpack(args)
    dq, dk, dv = (torch.empty_like(x) for x in (t.query, t.key, t.value))
    needs_mask_grad = args[-2]
    dmask = t.attn_mask.new_empty(t.attn_mask.shape) if needs_mask_grad else t.query.new_empty(0)  # type: ignore[union-attr]
    dsinks = t.query.new_empty(0) if t.sinks is None else torch.empty_like(t.sinks)
    return dq, dk, dv, dmask, dsinks


# ---- autograd -----------------------------------------------------------------------------------------------


# A kernel of the Autograd key runs once for each level of torch.func, with that level's tensors. So it needs the
# Function of one level; torch.autograd.Function would start over at the top of the levels.


def _given(t: AttentionTensors) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """The tensors that are not None, and which fields they are."""
    if absent(t[3:]):
        return _PLAIN_FIELDS, t[:3]
    fields = tuple([i for i, x in enumerate(t) if x is not None])
    return fields, tuple([t[i] for i in fields])  # type: ignore[misc]


def _spread(given: Sequence[Tensor], fields: tuple[int, ...]) -> AttentionTensors:
    if fields == _PLAIN_FIELDS:
        return AttentionTensors._make((*given, *_NO_OPTIONS))
    tensors: list[Tensor | None] = [None] * _NUM_TENSORS
    for field, x in zip(fields, given, strict=True):
        tensors[field] = x
    return AttentionTensors._make(tensors)


class _Attention(torch.autograd.function._SingleLevelFunction):
    """Takes only the tensors that are given: each argument costs time."""

    @staticmethod
    def forward(ctx: Any, call: Call, *given: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        t = _spread(given, call.fields)
        if call.fields != _PLAIN_FIELDS and (_BLOCK_TABLE in call.fields or _ALIBI_SLOPES in call.fields):
            # Those of a call inside vmap show only here: there no tensor says that it requires a gradient.
            needs = zip(call.fields, ctx.needs_input_grad[1:], strict=True)
            names = [AttentionTensors._fields[field] for field, need in needs if need]
            check_gradients(names, paged=_BLOCK_TABLE in call.fields)
        if call.direct:
            out, lse = _compute_forward(call, t)
        else:
            out, lse = below_autograd(_forward_op, (*t, *call.spec, call.requested))
        ctx.save_for_backward(*given, out, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return (out, lse) if call.returns_lse else out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Any, ...]:
        *given, out, lse = ctx.saved_tensors
        call, needs = ctx.call, ctx.needs_input_grad  # the first one is that of `call`
        t, fields = _spread(given, call.fields), call.fields
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        needs_mask_grad = _ATTN_MASK in fields and needs[1 + fields.index(_ATTN_MASK)]
        incoming = (out, lse, grad_out, grad_lse, needs_mask_grad)
        direct = call.direct and not torch.is_grad_enabled()
        grads: Gradients
        if direct and unobserved((grad_out,) if grad_lse is None else (grad_out, grad_lse)):
            grads = _compute_backward(call, t, *incoming)
        else:
            grads = _backward_op(*t, *call.spec, *incoming, call.requested)
        dq, dk, dv, dmask, dsinks = grads
        if fields == _PLAIN_FIELDS:
            return None, dq if needs[1] else None, dk if needs[2] else None, dv if needs[3] else None
        by_field = (dq, dk, dv, dmask, None, dsinks, *_NO_OPTIONS)
        return None, *[by_field[field] if need else None for field, need in zip(fields, needs[1:], strict=True)]


class _AttentionBackward(torch.autograd.function._SingleLevelFunction):
    """The gradients, which remember that they depend on their inputs, and say so when that is needed."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        return below_autograd(_backward_op, args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise NotImplementedError("pyattn::attention_backward has no derivative: second derivatives are not supported")


def _apply_forward(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    spec, t = _unpack(args)
    fields, given = _given(t)
    return _Attention.apply(Call(spec, args[-1], fields, False), *given)  # type: ignore[attr-defined]


def _apply_backward(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return _AttentionBackward.apply(*args)  # type: ignore[attr-defined]


# ---- autocast -----------------------------------------------------------------------------------------------


def _forward_autocast(device_type: str) -> Any:
    key = torch._C.DispatchKey.AutocastCPU if device_type == "cpu" else torch._C.DispatchKey.AutocastCUDA
    keys = torch._C.DispatchKeySet(key)

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        """Query, key and value in the autocast dtype; masks, slopes and sinks keep theirs."""
        dtype = torch.get_autocast_dtype(device_type)
        qkv = [x if x.dtype == torch.float64 else x.to(dtype) for x in args[:3]]
        mask = args[3]
        if mask is not None and mask.dtype not in (torch.bool, torch.float32, qkv[0].dtype):
            mask = mask.to(qkv[0].dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _forward_op(*qkv, mask, *args[4:])

    return forward


register(
    "attention_forward",
    _forward_op,
    compute=_forward,
    fake=_forward_fake,
    differentiable=differentiable(_forward_op, _apply_forward),
    vmap=batching.forward,
)
register(
    "attention_backward",
    _backward_op,
    compute=_backward,
    fake=_backward_fake,
    differentiable=differentiable(_backward_op, _apply_backward),
    vmap=batching.backward,
)
library.impl("attention_forward", _forward_autocast("cpu"), "AutocastCPU")
library.impl("attention_forward", _forward_autocast("cuda"), "AutocastCUDA")


def prepare(spec: AttentionSpec, t: AttentionTensors, backend: str, returns_lse: bool) -> Call:
    """For ``attention``, again and again, with tensors of the same metadata, as ``unobserved`` as these."""
    fields, given = _given(t)
    return Call(spec, backend, fields, unobserved(given), returns_lse)


def attention(call: Call, t: AttentionTensors, *, trusted: bool = False) -> Any:
    """``torch.ops.pyattn.attention_forward``, differentiable: out and, if the call returns it, lse.

    The values of ``trusted`` lengths, offsets and page numbers need no check.
    """
    spec = call.spec
    if not call.direct:
        out, lse = _forward_op(*t, *spec, call.requested)
        return (out, lse) if call.returns_lse else out
    t = _with_dense_rows(t)
    if not (trusted or call.fields == _PLAIN_FIELDS):
        check_values(t, spec.max_seqlen_q, spec.max_seqlen_k)
    if torch.is_grad_enabled():
        given = t[:3] if call.fields == _PLAIN_FIELDS else [t[field] for field in call.fields]
        for x in given:
            if x.requires_grad:  # type: ignore[union-attr]
                return _Attention.apply(call, *given)  # type: ignore[attr-defined]
    out, lse = _compute_forward(call, t)
    return (out, lse) if call.returns_lse else out
