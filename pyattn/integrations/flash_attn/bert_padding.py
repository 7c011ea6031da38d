"""From padded batches to packed ones, and back: flash-attn's ``bert_padding``."""

from __future__ import annotations

import torch
from torch import Tensor


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``x``. Differentiable."""
    return x.index_select(0, indices)


def index_first_axis_residual(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``x``, and ``x``."""
    return index_first_axis(x, indices), x


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """``[first_axis_dim, ...]`` with ``values`` in the rows ``indices``, and zeros elsewhere. Differentiable."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, packed.

    Args:
        hidden_states: ``[B, L, ...]``.
        attention_mask: ``[B, L]``, bool or int, 1 for a token.
        unused_mask: ``[B, L]``, 1 for places that are kept too, but not counted as used.

    Returns:
        ``(packed [total, ...], indices [total], cu_seqlens int32 [B + 1], longest length, lengths used int32 [B])``.

    Example:
        >>> import torch
        >>> from pyattn.integrations.flash_attn.bert_padding import unpad_input
        >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        >>> packed, indices, cu_seqlens, longest, used = unpad_input(torch.randn(2, 3, 8), mask)
        >>> packed.shape, cu_seqlens.tolist(), longest
        (torch.Size([5, 8]), [0, 2, 5], 3)
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, _cumulative(lengths), int(lengths.max()), attention_mask.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """As ``unpad_input``, where a row holds several sequences: their lengths come first in it, then zeros."""
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths.nonzero().flatten()]
    totals, L = attention_mask_in_length.sum(-1), attention_mask_in_length.shape[-1]
    indices = (torch.arange(L, device=totals.device) < totals[:, None]).flatten().nonzero().flatten()
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, _cumulative(lengths), int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """``[batch, seqlen, ...]`` of what ``unpad_input`` returned, with zeros for padding."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
