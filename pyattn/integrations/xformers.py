"""xformers' ``memory_efficient_attention`` and its common biases, computed by pyattn.

from pyattn.integrations.xformers import BlockDiagonalMask, LowerTriangularMask, memory_efficient_attention
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pyattn import checks, functional


class AttentionBias:
    """Which keys each query sees. One bias is made once and given to every layer."""

    causal = False
    from_bottom_right = False  # whether the last query meets the last key, or the first the first

    @property
    def window(self) -> tuple[int | None, int | None]:
        return None, 0 if self.causal else None

    def arguments(self) -> dict[str, Any]:
        return {"window": self.window, "q_offset": None if self.from_bottom_right else 0}


class LowerTriangularMask(AttentionBias):
    """Causal, from the top left."""

    causal = True

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(bias)


@dataclass
class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Causal, from the top left, with a bias broadcastable to ``[B, H, Lq, Lk]``, added to the scores."""

    bias: Tensor

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"attn_mask": self.bias}


class LowerTriangularFromBottomRightMask(LowerTriangularMask):
    """Causal, from the bottom right."""

    from_bottom_right = True

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Causal, from the bottom right; each query sees ``window_size`` keys, its own among them."""

    window_size: int

    @property
    def window(self) -> tuple[int | None, int | None]:
        return self.window_size - 1, 0


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """From the bottom right, each query sees so many keys before and after its own."""

    window_left: int
    window_right: int
    from_bottom_right = True

    @property
    def window(self) -> tuple[int | None, int | None]:
        return self.window_left, self.window_right


@dataclass
class BlockDiagonalMask(AttentionBias):
    """Sequences of different lengths in one, none of which sees another: tensors ``[1, total, H, D]``.

    Make one with ``from_seqlens`` or ``from_tensor_list``.

    Example:
        >>> import torch
        >>> from pyattn.integrations.xformers import BlockDiagonalMask, memory_efficient_attention
        >>> bias, x = BlockDiagonalMask.from_tensor_list([torch.randn(1, n, 4, 64) for n in (3, 6, 2)])
        >>> out = memory_efficient_attention(x, x, x, bias.make_causal())
        >>> [y.shape[1] for y in bias.split(out)]
        [3, 6, 2]
    """

    q_seqlen: Sequence[int]
    kv_seqlen: Sequence[int]
    batch_sizes: Sequence[int] | None = None  # of the tensors that were put together
    kv_padding: int | None = None  # the places for keys that each sequence has
    window_size: int | None = None

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None) -> BlockDiagonalMask:
        kv_seqlen = list(q_seqlen if kv_seqlen is None else kv_seqlen)
        if len(kv_seqlen) != len(q_seqlen):
            raise ValueError(f"kv_seqlen must hold a length for each of the {len(q_seqlen)}, got {len(kv_seqlen)}")
        return cls(list(q_seqlen), kv_seqlen)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """Of tensors ``[B_i, L_i, ...]``, and these as one ``[1, sum of B_i L_i, ...]``."""
        bias, packed, *_ = cls.from_tensor_lists_qkv(tensors, tensors)
        return bias, packed

    @classmethod
    def from_tensor_lists_qkv(
        cls, tensors_q: Sequence[Tensor], tensors_k: Sequence[Tensor], tensors_v: Sequence[Tensor] | None = None
    ) -> tuple[BlockDiagonalMask, Tensor, Tensor, Tensor | None]:
        q_seqlen, kv_seqlen = ([x.shape[1] for x in xs for _ in range(len(x))] for xs in (tensors_q, tensors_k))
        bias = replace(cls.from_seqlens(q_seqlen, kv_seqlen), batch_sizes=[len(x) for x in tensors_q])
        q, k, v = (
            None if xs is None else torch.cat([x.flatten(0, 1) for x in xs])[None]
            for xs in (tensors_q, tensors_k, tensors_v)
        )
        return bias, q, k, v  # type: ignore[return-value]

    def split_queries(self, x: Tensor) -> list[Tensor]:
        return self._split(x, self.q_seqlen)

    def split_kv(self, x: Tensor) -> list[Tensor]:
        return self._split(x, self.kv_seqlen)

    def split(self, x: Tensor) -> list[Tensor]:
        """The tensors that ``from_tensor_list`` was given, of ``x``, ``[1, total, ...]``."""
        if self.q_seqlen != self.kv_seqlen:
            raise ValueError("kv_seqlen must be q_seqlen, or split_queries or split_kv must be called")
        return self.split_queries(x)

    def _split(self, x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        sizes = self.batch_sizes or [1] * len(lengths)
        firsts = accumulate(sizes, initial=0)
        shapes = [(size, lengths[first] if size else 0) for size, first in zip(sizes, firsts, strict=False)]
        parts = x[0].split([size * length for size, length in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    def make_causal(self) -> BlockDiagonalCausalMask:
        return self._become(BlockDiagonalCausalMask)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        return self._become(BlockDiagonalCausalFromBottomRightMask)

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        return self._become(BlockDiagonalCausalLocalAttentionMask, window_size=window_size)

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        return self._become(BlockDiagonalCausalLocalAttentionFromBottomRightMask, window_size=window_size)

    def _become(self, kind: Any, **changes: Any) -> Any:
        return kind(**vars(self) | changes)

    @property
    def window(self) -> tuple[int | None, int | None]:
        return None if self.window_size is None else self.window_size - 1, 0 if self.causal else None

    def packed(self, device: torch.device) -> dict[str, Any]:
        """Arguments of ``attention_varlen``."""
        places = self.kv_seqlen if self.kv_padding is None else [self.kv_padding] * len(self.kv_seqlen)
        cu_q, cu_k = (
            torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
            for lengths in (self.q_seqlen, places)
        )
        used = None if self.kv_padding is None else torch.tensor(self.kv_seqlen, dtype=torch.int32, device=device)
        longest = max(self.q_seqlen, default=0), max(places, default=0)
        return dict(zip(_PACKED, (cu_q, cu_k, *longest), strict=True)) | {"kv_lengths": used}


_PACKED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Each block is causal, from its top left."""

    causal = True


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalCausalMask):
    """Each block is causal, from its bottom right."""

    from_bottom_right = True


class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Each block is causal, from its top left, and each query sees ``window_size`` keys."""


class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """Each block is causal, from its bottom right, and each query sees ``window_size`` keys."""


class BlockDiagonalPaddedKeysMask(BlockDiagonalMask):
    """Each sequence has ``kv_padding`` places for keys, of which the first ``kv_seqlen`` hold one."""

    @classmethod
    def from_seqlens(  # type: ignore[override]
        cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int]
    ) -> BlockDiagonalPaddedKeysMask:
        return cls(list(q_seqlen), list(kv_seqlen), kv_padding=kv_padding)


class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The same, causal: the last query of a sequence meets its last key."""

    causal = True
    from_bottom_right = True


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attention of tensors ``[B, L, H, D]``, ``[B, L, D]`` (one head) or ``[B, L, G, H, D]`` (groups of heads).

    Args:
        query: ``[B, Lq, Hq, D]``.
        key: ``[B, Lk, Hkv, D]``; ``Hq`` is a multiple of ``Hkv``.
        value: ``[B, Lk, Hkv, Dv]``.
        attn_bias: an ``AttentionBias`` of this module, or a tensor broadcastable to ``[B, H, Lq, Lk]``, added to the
            scores; differentiable.
        p: probability of dropping a weight.
        scale: defaults to ``1 / sqrt(D)``.

    Returns:
        The query's shape, with ``Dv``.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import torch
        >>> from pyattn.integrations.xformers import LowerTriangularMask, memory_efficient_attention
        >>> q = torch.randn(2, 100, 8, 64)
        >>> memory_efficient_attention(q, q, q, attn_bias=LowerTriangularMask()).shape
        torch.Size([2, 100, 8, 64])
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(name, x, checks.FLOAT_DTYPES)
        if x.dim() not in (3, 4, 5) or x.dim() != query.dim():
            raise ValueError(f"{name} must have shape [B, L, H, D], [B, L, D] or [B, L, G, H, D], got {list(x.shape)}")
    shape = (*query.shape[:-1], value.shape[-1])
    if query.dim() == 5 and key.stride(3) == value.stride(3) == 0:  # heads that one has been expanded to are one again
        key, value = key[:, :, :, :1], value[:, :, :, :1]
    q, k, v = _heads(query), _heads(key), _heads(value)
    options: dict[str, Any] = {"dropout_p": p, "scale": scale}
    if isinstance(attn_bias, AttentionBias):
        options |= attn_bias.arguments()
    elif isinstance(attn_bias, Tensor):
        options["attn_mask"] = attn_bias[:, None] if attn_bias.dim() == 3 and query.dim() == 3 else attn_bias
    elif attn_bias is not None:
        raise TypeError(f"attn_bias must be a tensor or an AttentionBias of {__name__}, got {type(attn_bias).__name__}")
    if isinstance(attn_bias, BlockDiagonalMask):
        if q.shape[0] != 1:
            raise ValueError(f"query must have a batch size of 1 with a BlockDiagonalMask, got {q.shape[0]}")
        options |= attn_bias.packed(q.device)
        return functional.attention_varlen(q[0], k[0], v[0], **options).reshape(shape)
    return functional.attention(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2).reshape(shape)


def _heads(x: Tensor) -> Tensor:
    """As ``[B, L, H, D]``."""
    return x.flatten(2, 3) if x.dim() == 5 else x[:, :, None] if x.dim() == 3 else x
