"""Masks of ``torch.nn.MultiheadAttention``, in which True is masked out, as ``pyattn.attention`` takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyattn import checks
from pyattn.kv_cache import Ints
from pyattn.library import unobserved

_DTYPES = (torch.bool, *checks.FLOAT_DTYPES)


class Masks(NamedTuple):
    """Arguments of ``pyattn.attention``."""

    attn_mask: Tensor | None = None  # broadcastable to [B, H, Lq, Lk]
    kv_starts: Tensor | None = None  # [B]
    kv_lengths: Tensor | None = None  # [B]

    @property
    def given(self) -> dict[str, Tensor]:
        return {name: x for name, x in self._asdict().items() if x is not None}


def check(attn_mask: Any, key_padding_mask: Any, like: Tensor, B: int | None, H: int, Lq: int, Lk: int) -> None:
    """Dtypes and shapes; B is None for input without a batch."""
    if attn_mask is not None:
        checks.check_tensor("attn_mask", attn_mask, _DTYPES, like)
        shapes = [(Lq, Lk), ((1 if B is None else B) * H, Lq, Lk)]
        if tuple(attn_mask.shape) not in shapes:
            batched = "[num_heads, L, S]" if B is None else "[N * num_heads, L, S]"
            raise ValueError(
                f"attn_mask must have shape [L, S] = {list(shapes[0])} or {batched} = {list(shapes[1])}, "
                f"got {list(attn_mask.shape)}"
            )
    if key_padding_mask is not None:
        checks.check_tensor("key_padding_mask", key_padding_mask, _DTYPES, like)
        shape, meaning = ((Lk,), "[S]") if B is None else ((B, Lk), "[N, S]")
        checks.check_shape("key_padding_mask", key_padding_mask, shape, meaning)


def _runs(padding: Tensor) -> tuple[Tensor, Tensor] | None:
    """``kv_starts`` and ``kv_lengths``, if the keys that are no padding are one run in each sample.

    None also where the values cannot be looked at, and where they are more than a choice of keys.
    """
    if padding.requires_grad or not padding.is_cpu or not unobserved((padding,)):
        return None
    live = ~padding if padding.dtype == torch.bool else padding == 0
    if padding.dtype != torch.bool and not (live | (padding == -torch.inf)).all():
        return None
    if not live.shape[1]:
        return None
    starts = live.to(torch.uint8).argmax(1)
    lengths = starts + live.sum(1)
    keys = torch.arange(live.shape[1])
    in_runs = (keys >= starts[:, None]) & (keys < lengths[:, None])
    return (starts, lengths) if torch.equal(in_runs, live) else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf) if mask.dtype == torch.bool else mask


def convert(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, H: int, more_keys: int, dtype: torch.dtype
) -> Masks:
    """The masks of a batch, ``[Lq, Lk]`` or ``[B * H, Lq, Lk]`` and ``[B, Lk]``; ``more_keys`` follow, seen by all.

    Padding at the ends becomes lengths, so that a mask for all samples stays one for all, and kernels skip it.
    """
    if more_keys:
        attn_mask, key_padding_mask = (
            None if mask is None else F.pad(mask, (0, more_keys)) for mask in (attn_mask, key_padding_mask)
        )
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (-1, H))
    runs = None
    if key_padding_mask is not None and (runs := _runs(key_padding_mask)) is None:
        padding = key_padding_mask[:, None, None]
        if attn_mask is None:
            attn_mask = padding
        elif attn_mask.dtype == padding.dtype == torch.bool:
            attn_mask = attn_mask | padding
        else:
            attn_mask = _added(attn_mask, dtype) + _added(padding, dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = ~attn_mask
    return Masks(attn_mask, *(runs or ()))


def live_keys(lengths: Ints | None, keys: Tensor) -> dict[str, Any]:
    """Arguments of ``pyattn.attention`` with which of ``keys`` ``[B, L, ...]`` only the first ``lengths`` are seen.

    Rows keep their numbers: of a causal mask row i sees keys up to i.
    """
    if lengths is None:
        return {}
    B, L = keys.shape[:2]
    if isinstance(lengths, Tensor):
        checks.check_tensor("lengths", lengths, checks.INDEX_DTYPES, keys, "x")
        checks.check_shape("lengths", lengths, (B,), "[B]")
    else:
        numbers = checks.check_numbers("lengths", lengths, B)
        if any(not 0 <= n <= L for n in numbers):
            raise ValueError(f"lengths must lie in [0, {L}], got {numbers}")
        lengths = torch.tensor(numbers, dtype=torch.int32, device="cpu").to(keys.device, non_blocking=True)
    return {"kv_lengths": lengths, "q_offset": 0}
