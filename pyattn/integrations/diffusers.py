"""``model.set_attention_backend("pyattn")`` for Hugging Face's diffusers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyattn import sdpa

_NAME = "pyattn"


def register() -> None:
    """Makes ``set_attention_backend("pyattn")`` and ``attention_backend("pyattn")`` known to diffusers.

    The names of its backends are a closed enumeration; this adds a member to it.

    Example:
        >>> import torch
        >>> from pyattn.integrations import diffusers as integration
        >>> integration.register()
        >>> from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
        >>> q = torch.randn(2, 100, 8, 64)
        >>> with attention_backend("pyattn"):
        ...     out = dispatch_attention_fn(q, q, q)
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    if _NAME not in AttentionBackendName._value2member_map_:
        member: Any = str.__new__(AttentionBackendName, _NAME)
        member._name_, member._value_ = _NAME.upper(), _NAME
        AttentionBackendName._member_names_.append(member._name_)
        AttentionBackendName._member_map_[member._name_] = member
        AttentionBackendName._value2member_map_[_NAME] = member
    _AttentionBackendRegistry.register(AttentionBackendName(_NAME))(attention)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What diffusers calls: ``scaled_dot_product_attention`` of tensors ``[B, L, H, D]``.

    A mask ``[B, Lk]``, bool or float, is one of keys.
    """
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    out = sdpa.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return out.transpose(1, 2)
