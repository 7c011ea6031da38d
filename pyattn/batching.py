"""``torch.vmap`` over the ops: the vmapped dimension is folded into one that attention has anyway.

It joins the batch. With packed input, which has no batch dimension, and with sinks, which belong to heads, it joins
the heads instead: example v's query head h becomes head ``v * Hq + h`` and reads key head ``v * Hkv + h // group``, so
grouped heads stay grouped. What can be folded neither way is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from pyattn.spec import AttentionSpec, AttentionTensors

_NUM_TENSORS = len(AttentionTensors._fields)
_NUM_ARGS = _NUM_TENSORS + len(AttentionSpec._fields)
_PER_SAMPLE = ("q_offset", "kv_lengths", "kv_starts", "block_table")
_UNFOLDABLE = ("cu_seqlens_q", "cu_seqlens_k")

Op = Callable[..., tuple[Tensor, ...]]
InDims = dict[str, int | None]


def _front(x: Tensor, in_dim: int | None, size: int) -> Tensor:
    """The vmapped dimension first; a tensor without one is the same for every example."""
    return x.expand(size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)


def _fold(x: Tensor, dim: int) -> Tensor:
    """The first dimension joins what was dimension ``dim`` without it, as the slower of the two."""
    return x.movedim(0, dim).flatten(dim, dim + 1)


def _unfold(x: Tensor, dim: int, size: int) -> Tensor:
    return x.unflatten(dim, (size, x.shape[dim] // size)).movedim(dim, 0)


class _Plan(NamedTuple):
    """How one call is folded."""

    size: int  # of the vmapped dimension
    packed: bool
    in_heads: bool

    @property
    def dim(self) -> int:
        """Where out and what has its layout is folded: the batch or the heads of ``[B, H, ...]``, ``[total, H, D]``."""
        return 1 if self.in_heads else 0

    @property
    def lse_dim(self) -> int:
        return 0 if self.packed else self.dim

    def rows(self, x: Tensor, in_dim: int | None) -> Tensor:
        return _fold(_front(x, in_dim, self.size), self.dim)

    def lse(self, x: Tensor, in_dim: int | None) -> Tensor:
        return _fold(_front(x, in_dim, self.size), self.lse_dim)


def _plan(size: int, dims: InDims, t: AttentionTensors, spec: AttentionSpec) -> _Plan:
    packed, paged = t.cu_seqlens_q is not None, t.block_table is not None
    plan = _Plan(size, packed, packed or t.sinks is not None)
    if paged and plan.in_heads:
        raise NotImplementedError("block_table under torch.vmap does not go together with sinks or packed input")
    refused = [*_UNFOLDABLE, *(_PER_SAMPLE if plan.in_heads else ()), *(("key", "value") if paged else ())]
    for name in refused:
        if dims[name] is not None:
            what = "packed input" if packed else "paged keys" if paged else "sinks"
            raise NotImplementedError(f"{name} must be the same for every example of torch.vmap with {what}")
    if spec.dropout_p and dims["dropout_seed"] is None:
        raise NotImplementedError(
            "dropout_p must be 0 under torch.vmap with randomness='same', and for a Jacobian: what is dropped depends "
            "on sample and head, so examples cannot drop the same entries; use randomness='different'"
        )
    return plan


def _fold_mask(plan: _Plan, mask: Tensor, dim: int | None, full: int, every: bool) -> Tensor:
    """``every``: also a mask that is the same for all becomes one for each. ``full``: the size that is folded."""
    if dim is None and not every and (mask.dim() < 4 - plan.dim or mask.shape[plan.dim - 4] == 1):
        return mask  # broadcasts over what is folded
    mask = _front(mask, dim, plan.size)
    mask = mask.reshape(plan.size, *(1,) * (5 - mask.dim()), *mask.shape[1:])
    return _fold(mask.expand(*(full if i == 1 + plan.dim else -1 for i in range(5))), plan.dim)


def _fold_slopes(plan: _Plan, slopes: Tensor, dim: int | None, batch: int) -> Tensor:
    per_sample = slopes.dim() - (dim is not None) == 2
    if dim is None and not plan.in_heads and not per_sample:
        return slopes
    slopes = _front(slopes, dim, plan.size)
    if plan.in_heads:
        return _fold(slopes, slopes.dim() - 2)
    return _fold(slopes if per_sample else slopes[:, None].expand(-1, batch, -1), 0)


def _fold_tensors(plan: _Plan, dims: InDims, t: AttentionTensors, every_mask: bool) -> AttentionTensors:
    """The tensors of one call for all examples."""
    query = plan.rows(t.query, dims["query"])
    fields: dict[str, Tensor] = {}
    if t.block_table is None:
        fields |= {"key": plan.rows(t.key, dims["key"]), "value": plan.rows(t.value, dims["value"])}
    size = query.shape[plan.dim] // plan.size  # of one example, where a tensor may leave it to broadcasting
    if t.attn_mask is not None:
        fields["attn_mask"] = _fold_mask(plan, t.attn_mask, dims["attn_mask"], size, every_mask)
    if t.alibi_slopes is not None:
        fields["alibi_slopes"] = _fold_slopes(plan, t.alibi_slopes, dims["alibi_slopes"], size)
    for name in ("sinks",) if plan.in_heads else _PER_SAMPLE:
        if (x := getattr(t, name)) is not None:
            fields[name] = _fold(_front(x, dims[name], plan.size), 0)
    if t.dropout_seed is not None and (dim := dims["dropout_seed"]) is not None:
        # One seed serves: the examples are different samples or heads of the folded call.
        fields["dropout_seed"] = t.dropout_seed.select(dim, 0)
    return t._replace(query=query, **fields)


def forward(op: Op, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """``attention_forward`` on every example at once; the vmapped dimension of both results is the first."""
    t, spec, dims = _split(args, in_dims)
    plan = _plan(size, dims, t, spec)
    out, lse = op(*_fold_tensors(plan, dims, t, False), *spec, args[-1])
    return _unfold(out, plan.dim, size), _unfold(lse, plan.lse_dim, size)


def backward(op: Op, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """``attention_backward`` on every example at once; the vmapped dimension of all results is the first."""
    t, spec, dims = _split(args, in_dims)
    plan = _plan(size, dims, t, spec)
    out, lse, grad_out, grad_lse, needs_mask_grad, backend = args[_NUM_ARGS:]
    out_dim, lse_dim, grad_out_dim, grad_lse_dim = in_dims[_NUM_ARGS : _NUM_ARGS + 4]
    dq, dk, dv, dmask, dsinks = op(
        *_fold_tensors(plan, dims, t, needs_mask_grad),
        *spec,
        plan.rows(out, out_dim),
        plan.lse(lse, lse_dim),
        plan.rows(grad_out, grad_out_dim),
        None if grad_lse is None else plan.lse(grad_lse, grad_lse_dim),
        needs_mask_grad,
        backend,
    )
    # The op's empty tensors for "no gradient" stay empty, one for each example.
    dsinks = dsinks.new_empty(size, 0) if t.sinks is None else _unfold(dsinks, 0, size)
    if not needs_mask_grad:
        dmask = dmask.new_empty(size, 0)
    else:
        assert t.attn_mask is not None
        shape = _front(t.attn_mask, dims["attn_mask"], size).shape[1:]
        dmask = _unfold(dmask, plan.dim, size).sum_to_size(size, *(1,) * (4 - len(shape)), *shape)
        dmask = dmask.reshape(size, *shape)
    return *(_unfold(x, plan.dim, size) for x in (dq, dk, dv)), dmask, dsinks


def _split(args: tuple[Any, ...], in_dims: tuple[int | None, ...]) -> tuple[AttentionTensors, AttentionSpec, InDims]:
    """The tensors and the numbers of an op's arguments, and which dimension of each tensor is vmapped."""
    dims = dict(zip(AttentionTensors._fields, in_dims[:_NUM_TENSORS], strict=True))
    return AttentionTensors._make(args[:_NUM_TENSORS]), AttentionSpec._make(args[_NUM_TENSORS:_NUM_ARGS]), dims
