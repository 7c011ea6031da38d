"""What to compute, and on what: the numbers, the tensors and their metadata.

This module imports nothing of pyattn; everything else speaks its vocabulary.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Op = Literal["forward", "backward"]


class AttentionSpec(NamedTuple):
    """The numbers of one attention call. ``None`` in a window means unlimited on that side."""

    scale: float
    window_left: int | None = None
    window_right: int | None = None
    q_offset: int | None = None  # None: kv_len - Lq, sample by sample, unless the tensor q_offset is given
    softcap: float = 0.0  # 0: none
    dropout_p: float = 0.0
    max_seqlen_q: int | None = None  # packed input only
    max_seqlen_k: int | None = None
    deterministic: bool = True

    @property
    def dropout_threshold(self) -> int:
        """A weight is dropped if its 16 random bits are less than this."""
        return round(self.dropout_p * 65536)


class AttentionTensors(NamedTuple):
    """The tensors of one attention call; shapes as in ``pyattn.attention`` and ``attention_varlen``."""

    query: Tensor  # [B, Hq, Lq, D], packed [total_q, Hq, D]
    key: Tensor  # [B, Hkv, Lk, D], packed [total_k, Hkv, D], pages [num_pages, Hkv, page_size, D]
    value: Tensor  # as key, with Dv
    attn_mask: Tensor | None = None  # broadcastable to [B, Hq, Lq, Lk], bool or float
    alibi_slopes: Tensor | None = None  # [Hq] or [B, Hq]
    sinks: Tensor | None = None  # [Hq]
    q_offset: Tensor | None = None  # [B]
    kv_lengths: Tensor | None = None  # [B]
    kv_starts: Tensor | None = None  # [B]
    block_table: Tensor | None = None  # [B, max_pages]
    cu_seqlens_q: Tensor | None = None  # [B + 1]
    cu_seqlens_k: Tensor | None = None  # [B + 1]
    dropout_seed: Tensor | None = None  # [] int64


class TensorMeta(NamedTuple):
    """A tensor without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> TensorMeta:
        return TensorMeta(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class Problem(NamedTuple):
    """What dispatch decides on: an op, its spec and the metadata of its tensors. Hashable."""

    op: Op
    spec: AttentionSpec
    tensors: tuple[TensorMeta | None, ...]  # in the order of AttentionTensors

    @staticmethod
    def of(op: Op, spec: AttentionSpec, tensors: AttentionTensors) -> Problem:
        return Problem(op, spec, tuple([None if t is None else TensorMeta.of(t) for t in tensors]))

    @property
    def query(self) -> TensorMeta:
        return self.tensors[0]  # type: ignore[return-value]

    @property
    def key(self) -> TensorMeta:
        return self.tensors[1]  # type: ignore[return-value]

    @property
    def value(self) -> TensorMeta:
        return self.tensors[2]  # type: ignore[return-value]

    def meta(self, name: str) -> TensorMeta | None:
        """Of the optional tensor ``name``, a field of AttentionTensors."""
        return self.tensors[AttentionTensors._fields.index(name)]

    def has(self, name: str) -> bool:
        """Whether the optional tensor ``name`` is given."""
        return self.meta(name) is not None

    @property
    def packed(self) -> bool:
        return self.has("cu_seqlens_q")

    @property
    def query_length(self) -> int:
        """Lq, or the total of a packed batch."""
        return self.query.shape[0 if self.packed else 2]

    @property
    def key_length(self) -> int:
        """Lk, the total of a packed batch, or what the block table can address."""
        if (table := self.meta("block_table")) is not None:
            return table.shape[1] * self.key.shape[2]
        return self.key.shape[0 if self.packed else 2]


def empty_output(query: Tensor, v_head_dim: int) -> Tensor:
    """An uninitialised output: the query's shape with ``v_head_dim``, dense, in the query's dimension order."""
    if query.shape[-1] == v_head_dim:
        return torch.empty_like(query)
    order = sorted(range(query.dim() - 1), key=torch.empty_like(query).stride().__getitem__, reverse=True)
    shape = [query.shape[d] for d in order] + [v_head_dim]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return query.new_empty(shape).permute(*inverse, query.dim() - 1)


def lse_shape(query: Tensor | TensorMeta) -> tuple[int, ...]:
    """``[B, Hq, Lq]``; packed ``[Hq, total_q]``."""
    return (query.shape[1], query.shape[0]) if len(query.shape) == 3 else query.shape[:3]


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """A sink is a key with a weight and no value: ``ds = p * (0 - delta)``, summed over all that see it."""
    by_head = sinks.float().unsqueeze(-1)  # [Hq, 1]
    weight = torch.exp(by_head - lse.masked_fill(lse == -torch.inf, 0))
    axes = (1,) if lse.dim() == 2 else (0, 2)
    return -(weight * delta).sum(axes).to(sinks.dtype)
