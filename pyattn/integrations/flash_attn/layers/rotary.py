"""Rotary position embedding with flash-attn's arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from pyattn.integrations.flash_attn import _calls
from pyattn.projection import Rotary


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Turns the first R elements of each head by its position. Differentiable in x.

    Args:
        x: ``[B, L, H, D]``, or with ``cu_seqlens`` ``[total, H, D]``.
        cos: ``[positions, R / 2]``.
        sin: the same.
        interleaved: whether a pair is ``(2 i, 2 i + 1)``, or ``(i, i + R / 2)``.
        inplace: write into x.
        seqlen_offsets: the position of the first token, an int, or an int tensor ``[B]``.
        cu_seqlens: int32 ``[B + 1]``, where each sequence begins.
        max_seqlen: has no effect.

    Example:
        >>> import torch
        >>> from pyattn.integrations.flash_attn.layers.rotary import apply_rotary_emb
        >>> angles = torch.outer(torch.arange(100), 1e4 ** -torch.linspace(0, 1, 17)[:16])
        >>> x = torch.randn(2, 10, 8, 64)
        >>> apply_rotary_emb(x, angles.cos(), angles.sin(), seqlen_offsets=5).shape
        torch.Size([2, 10, 8, 64])
    """
    rotary = Rotary(cos, sin, interleaved)
    offsets = torch.as_tensor(seqlen_offsets, device=x.device)
    if cu_seqlens is None:
        _calls.check_rank(4, "[B, L, H, D]", x=x)
        positions = (torch.arange(x.shape[1], device=x.device) + offsets.view(-1, 1)).expand(x.shape[0], -1)
        turned = _calls.turn(x, rotary, positions)
    else:
        _calls.check_rank(3, "[total, H, D]", x=x)
        shifts = (offsets - cu_seqlens[:-1]).repeat_interleave(cu_seqlens.diff(), output_size=x.shape[0])
        positions = torch.arange(x.shape[0], device=x.device) + shifts
        turned = _calls.turn(x[None], rotary, positions[None])[0]
    return x.copy_(turned) if inplace else turned


apply_rotary_emb_func = apply_rotary_emb
