"""The drop-in for torch's function: what that takes, brought to what ``attention`` takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyattn import checks, functional, nested


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, to be put in its place.

    Accepts what torch's function accepts: two or more dimensions, leading dimensions that broadcast, ``is_causal``
    aligned top-left, ``attn_mask`` bool (True: attend) or float of at least two dimensions. It refuses what torch's
    refuses, and two things more on which torch computes nonsense: key and value of different lengths, and a scale
    that is not finite.

    Args:
        query: ``[..., Hq, Lq, D]``.
        key: ``[..., H, Lk, D]``.
        value: ``[..., H, Lk, Dv]``.
        attn_mask: broadcastable to ``[..., Hq, Lq, Lk]``.
        dropout_p: applied whenever it is above 0, as in torch, in evaluation too.
        is_causal: row i sees keys 0 to i, also where ``Lq != Lk``.
        scale: defaults to ``1 / sqrt(D)``.
        enable_gqa: key and value may have fewer heads than query, a divisor of its number.

    Returns:
        ``[..., Hq, Lq, Dv]`` in the query's dtype.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import torch, pyattn
        >>> q = torch.randn(2, 8, 64, 32)
        >>> ours = pyattn.scaled_dot_product_attention(q, q, q, is_causal=True)
        >>> torch.testing.assert_close(ours, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    """
    checks.check_bool("is_causal", is_causal)
    checks.check_bool("enable_gqa", enable_gqa)
    if (
        isinstance(scale, Tensor)
        and scale.dim() == 0
        and not scale.requires_grad
        and not scale.is_meta
        and not _has_tangent(scale)
    ):
        scale = scale.item()
    q_offset = 0 if is_causal else None
    if attn_mask is not None:
        checks.check_tensor("attn_mask", attn_mask, (torch.bool, *checks.FLOAT_DTYPES))
        if attn_mask.dim() < 2:
            raise ValueError(f"attn_mask must have at least two dimensions [..., Lq, Lk], got {list(attn_mask.shape)}")
    lead = None
    if isinstance(query, Tensor) and query.is_nested:
        nested.check(query, key, value)
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise ValueError(
                f"key must have the {query.shape[1]} heads of query without enable_gqa, got {key.shape[1]}"
            )
    elif not _is_plain(query, key, value):
        lead, (query, key, value, attn_mask) = _to_four_dimensions(query, key, value, attn_mask, enable_gqa)
    out = functional.attention(
        query, key, value, causal=is_causal, q_offset=q_offset, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale
    )
    return out if lead is None else out.reshape(*lead, *out.shape[-2:])


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def _is_plain(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Four dimensions, and nothing to broadcast: what ``attention`` takes as it is."""
    tensors = all(isinstance(x, Tensor) and x.dim() == 4 and not x.is_nested for x in (query, key, value))
    return tensors and query.shape[:2] == key.shape[:2] == value.shape[:2]


def _to_four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[torch.Size, tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Broadcasts leading dimensions as torch does and folds them into ``[B, H]``; also returns the output's."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(name, x, checks.FLOAT_DTYPES)
        if x.dim() < 2:
            raise ValueError(f"{name} must have at least two dimensions [..., L, D], got {list(x.shape)}")
    if enable_gqa:
        if min(query.dim(), key.dim(), value.dim()) < 3:
            raise ValueError("enable_gqa must come with at least three dimensions [..., H, L, D]")
        for x in (key, value):
            checks.check_heads(query.shape[-3], x.shape[-3])
        if key.shape[-3] != value.shape[-3]:
            groups = [query.shape[-3] // max(x.shape[-3], 1) for x in (key, value)]
            key, value = (x.repeat_interleave(n, dim=-3) for x, n in zip((key, value), groups, strict=True))
    drop = 3 if enable_gqa else 2  # dimensions that do not broadcast between query and key
    try:
        lead = torch.broadcast_shapes(*(x.shape[:-drop] for x in (query, key, value)))
    except RuntimeError:
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value must have leading sizes that broadcast, got {shapes}") from None

    def fold(x: Tensor) -> Tensor:
        x = x.expand(*lead, *x.shape[-drop:])
        x = x[None] if x.dim() == 3 else x[None, None] if x.dim() == 2 else x
        return x.flatten(0, -4)

    query, key, value = fold(query), fold(key), fold(value)
    lead = torch.Size((*lead, query.shape[1])) if enable_gqa else lead
    if attn_mask is not None:
        sizes = (*lead, query.shape[2], key.shape[2])
        surplus = len(sizes) - attn_mask.dim()
        aligned = (1,) * max(surplus, 0) + tuple(attn_mask.shape)
        if surplus < 0 or any(m not in (1, n) for m, n in zip(aligned, sizes, strict=True)):
            raise ValueError(f"attn_mask must be broadcastable to {list(sizes)}, got {list(attn_mask.shape)}")
        if len(lead) > 2:
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-2:]).flatten(0, -4)
    return lead, (query, key, value, attn_mask)
