"""Attention weights for those who look at them: one head at a time, and no head twice in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyattn import reference
from pyattn.spec import AttentionSpec, AttentionTensors


def _records() -> bool:
    """Whether eager autograd would keep what a head's weights are made of: several matrices ``[B, Lq, Lk]``."""
    functorch = torch._C._are_functorch_transforms_active()
    return torch.is_grad_enabled() and not functorch and not torch.compiler.is_compiling()


def attention_weights(spec: AttentionSpec, t: AttentionTensors, average: bool, dtype: torch.dtype) -> Tensor:
    """The weights that attention as ``(spec, t)`` applied, dropout included, as differentiable.

    Args:
        spec: of a dense call without sinks, pages and ALiBi, whose query heads have their own keys.
        t: its tensors; query ``[B, H, Lq, D]``, key ``[B, H, Lk, D]``.
        average: over heads. They are added up in one matrix.
        dtype: of the result. Softmax and sum are in float32, or float64.

    Returns:
        ``[B, Lq, Lk]`` if averaged, else ``[B, H, Lq, Lk]``. For the gradient a head is computed again.
    """
    num_heads = t.query.shape[1]

    def head(h: int, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        weights = reference.attention_weights(spec, t._replace(query=query, key=key, attn_mask=mask), h)
        return weights.squeeze(1) / num_heads if average else weights.squeeze(1).to(dtype)

    def compute(h: int) -> Tensor:
        mask = t.attn_mask
        if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
            mask = mask[:, h : h + 1]
        inputs = (h, t.query[:, h : h + 1], t.key[:, h : h + 1], mask)
        if _records():
            return checkpoint(head, *inputs, use_reentrant=False, preserve_rng_state=False)
        return head(*inputs)

    if average:
        total = compute(0)
        for h in range(1, num_heads):
            total = total.add_(compute(h))
        return total.to(dtype)
    if torch.is_grad_enabled():
        return torch.stack([compute(h) for h in range(num_heads)], 1)
    weights = compute(0)
    all_heads = weights.new_empty((weights.shape[0], num_heads, *weights.shape[1:]))
    for h in range(num_heads):
        all_heads[:, h] = weights if h == 0 else compute(h)
    return all_heads
