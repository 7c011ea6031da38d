"""Projections and attention by name: pyattn's fused ones, or what they replace, to compare against."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyattn import decoding, functional, ops, projection, projection_ops, reference, reference_projection
from pyattn.kv_cache import Ints, KVCache
from pyattn.projection import Rotary
from pyattn.spec import AttentionSpec, AttentionTensors

Implementation = Literal["pyattn", "naive", "torch"]


def check(attention: Any) -> Implementation:
    """``attention``, if it is one of the names."""
    if not isinstance(attention, str) or attention not in get_args(Implementation):
        raise ValueError(f"attention must be one of {', '.join(get_args(Implementation))}, got {attention!r}")
    return attention  # type: ignore[return-value]


def check_linear(**parts: nn.Module) -> None:
    """That the parts whose weights are read, and which are not called, would compute what is computed."""
    for name, part in parts.items():
        if type(part).forward is not nn.Linear.forward:
            raise TypeError(f"{name} must be a torch.nn.Linear: its weight is read, got {type(part).__name__}")


def project(
    implementation: Implementation,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """``pyattn.qkv_projection`` with so many heads of q, k and v, zeros among them."""
    spec, t = projection.heads(x, weight, bias, num_heads, rotary, q_norm, k_norm, eps, positions, packed)
    if implementation == "pyattn":
        return projection_ops.projection(spec, t, "auto")
    heads = F.linear(x, weight, bias).unflatten(-1, (spec.num_heads, -1)).transpose(1, 2)
    q, k, v = heads.split(num_heads, 1)
    if q_norm is not None:
        q = F.rms_norm(q, q_norm.shape, q_norm.to(q.dtype), eps)
    if k_norm is not None:
        k = F.rms_norm(k, k_norm.shape, k_norm.to(k.dtype), eps)
    return reference_projection.rotate(q, t, spec.interleaved), reference_projection.rotate(k, t, spec.interleaved), v


def attend(implementation: Implementation, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    """``pyattn.attention``."""
    if implementation == "pyattn":
        return functional.attention(query, key, value, **arguments)
    if implementation == "naive":
        return functional.naive_attention(query, key, value, **arguments)
    dropout_p = arguments.pop("dropout_p", 0.0)  # torch's own function draws it
    return _torch_attention(*functional.dense(query, key, value, **arguments), dropout_p)


def _torch_attention(spec: AttentionSpec, t: AttentionTensors, dropout_p: float = 0.0) -> Tensor:
    query, key, value = t[:3]
    if spec.softcap:
        raise NotImplementedError('attention="torch" has no softcap, got one')
    plain = t._replace(attn_mask=None)[3:] == (None,) * (len(t) - 3)
    top_left = spec.q_offset == 0 or (spec.q_offset is None and query.shape[2] == key.shape[2])
    is_causal = plain and t.attn_mask is None and top_left and spec.window_left is None and spec.window_right == 0
    mask = None if is_causal else reference.structured_mask(spec, t)
    if t.attn_mask is not None:
        if mask is None:
            mask = t.attn_mask
        elif t.attn_mask.dtype == torch.bool:
            mask = mask & t.attn_mask
        else:
            mask = torch.where(mask, t.attn_mask, -torch.inf)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal, scale=spec.scale, enable_gqa=grouped
    )


def attend_with_cache(
    implementation: Implementation,
    query: Tensor,
    cache: KVCache,
    key: Tensor,
    value: Tensor,
    lengths: Ints | None,
    **arguments: Any,
) -> Tensor:
    """``pyattn.attention_with_kv_cache``; "naive" and "torch" look at what is in use of a dense cache's buffers."""
    if implementation == "pyattn":
        return decoding.attention_with_kv_cache(query, cache, key, value, lengths=lengths, **arguments)
    if cache.page_size is not None:
        raise NotImplementedError(f"cache must be dense with attention={implementation!r}, got {cache}")
    append = cache.prepare(key, value, lengths)
    span, mask = append.span, arguments.pop("attn_mask")
    end = max(span.lengths, default=0)
    if mask is not None:
        mask = decoding.cut(cache, append, mask)[3]
    if any(span.starts) or any(first + query.shape[2] != end for first in append.firsts):
        offset = torch.tensor(append.firsts, device="cpu").to(query.device)
        arguments |= {"q_offset": offset, "kv_starts": span.tensor("starts"), "kv_lengths": span.tensor("lengths")}
    elif query.shape[2] == 1 and arguments["window"] is None:
        arguments["causal"] = False  # one token sees all: without a mask, as people call torch's function
    keys, values = cache.key[:, :, :end], cache.value[:, :, :end]
    spec, t = functional.dense(query, keys, values, attn_mask=mask, **arguments)  # refuses before the cache changes
    cache.commit(append, key, value)
    return _torch_attention(spec, t) if implementation == "torch" else reference.naive_attention(spec, t, False)[0]


def attend_as(implementation: Implementation, spec: AttentionSpec, t: AttentionTensors) -> Tensor:
    """``attend`` for a checked call, whose dropout is drawn already: torch's own function would draw another."""
    if implementation == "pyattn":
        return ops.attention(ops.prepare(spec, t, "auto", False), t)
    return reference.naive_attention(spec, t, False)[0]


def output(
    implementation: Implementation,
    attn_out: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """``pyattn.output_projection``."""
    if implementation == "pyattn":
        return projection.output(attn_out, weight, bias, residual, packed)
    out = F.linear(attn_out.transpose(1, 2).flatten(2), weight, bias)
    return out if residual is None else out + residual
