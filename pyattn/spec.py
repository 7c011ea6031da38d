"""What to compute, and on what: the numbers, the tensors and their metadata.

This module imports nothing of pyattn; everything else speaks its vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Op = Literal["forward", "backward", "rotary"]


# ---- attention -----------------------------------------------------------------------------------------------


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


def absent(tensors: Sequence[Tensor | None]) -> bool:
    """Whether none is given. By identity: to compare a tensor with None takes torch as long as an op."""
    for x in tensors:  # noqa: SIM110 - a generator takes twice as long
        if x is not None:
            return False
    return True


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
    """What dispatch decides on: an op of attention, its spec and the metadata of its tensors. Hashable."""

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

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head of one sample that the spec's integers leave; tensors are not read.

        A packed batch counts as if each query saw all keys: what its sequences are stands in tensors.
        """
        spec, Lq, Lk = self.spec, self.query_length, self.key_length
        if self.packed or self.has("q_offset") or (spec.window_left is None and spec.window_right is None):
            return Lq * Lk
        offset = Lk - Lq if spec.q_offset is None else spec.q_offset
        total = 0
        for pos in range(offset, offset + Lq):
            lo = 0 if spec.window_left is None else max(0, pos - spec.window_left)
            hi = Lk if spec.window_right is None else min(Lk, pos + spec.window_right + 1)
            total += max(0, hi - lo)
        return total

    @property
    def flops(self) -> int:
        """Multiplications and additions of the forward's two matrix products."""
        B, Hq = (1, self.query.shape[1]) if self.packed else self.query.shape[:2]
        return 2 * B * Hq * self.pairs * (self.query.shape[-1] + self.value.shape[-1])

    @property
    def bytes(self) -> int:
        """Bytes of query, key, value and out: what the forward must move at the least."""
        elements = sum(math.prod(meta.shape) for meta in (self.query, self.key, self.value))
        elements += math.prod(self.query.shape[:-1]) * self.value.shape[-1]
        return elements * self.query.dtype.itemsize

    @property
    def family(self) -> str:
        return "attention"

    @property
    def operands(self) -> str:
        shapes = " ".join(str(list(meta.shape)) for meta in (self.query, self.key, self.value))
        return f"{_on(self.query)}: query, key, value {shapes}"


def _on(meta: TensorMeta) -> str:
    return f"{str(meta.dtype).removeprefix('torch.')} on {meta.device}"


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


# ---- projections ---------------------------------------------------------------------------------------------


class ProjectionSpec(NamedTuple):
    """The numbers of one projection, whose columns are the heads of q, then those of k, then those of v."""

    num_q: int
    num_k: int = 0
    num_v: int = 0
    eps: float = 1e-6
    interleaved: bool = False

    @property
    def num_heads(self) -> int:
        return self.num_q + self.num_k + self.num_v


class ProjectionTensors(NamedTuple):
    """The tensors of one projection: heads to heads, since ``[B, L, E]`` is one head of E elements.

    Rotary alone has an x and no weight.
    """

    x: Tensor  # [B, H, L, D_in]
    weight: Tensor | None = None  # [num_heads * D, H * D_in]
    bias: Tensor | None = None  # [num_heads * D]
    residual: Tensor | None = None  # [B, num_heads, L, D]
    q_norm: Tensor | None = None  # [D]
    k_norm: Tensor | None = None  # [D]
    cos: Tensor | None = None  # [max_pos, R / 2]
    sin: Tensor | None = None  # [max_pos, R / 2]
    positions: Tensor | None = None  # [B or 1, L]; None: 0 to L - 1
    packed: Tensor | None = None  # the weight as the CPU's kernels want it; other backends take `weight`


class ProjectionProblem(NamedTuple):
    """What dispatch decides on: an op of projections, its spec and the metadata of its tensors. Hashable."""

    op: Op
    spec: ProjectionSpec
    tensors: tuple[TensorMeta | None, ...]  # in the order of ProjectionTensors

    @staticmethod
    def of(op: Op, spec: ProjectionSpec, tensors: ProjectionTensors) -> ProjectionProblem:
        return ProjectionProblem(op, spec, tuple([None if t is None else TensorMeta.of(t) for t in tensors]))

    @property
    def x(self) -> TensorMeta:
        return self.tensors[0]  # type: ignore[return-value]

    def has(self, name: str) -> bool:
        """Whether the optional tensor ``name``, a field of ProjectionTensors, is given."""
        return self.tensors[ProjectionTensors._fields.index(name)] is not None

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def rows(self) -> int:
        return self.x.shape[0] * self.x.shape[2]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        weight = self.tensors[1]
        return (0, 0) if weight is None else weight.shape

    @property
    def head_dim(self) -> int:
        """Of the outputs."""
        if (weight := self.tensors[1]) is None:
            return self.x.shape[-1]
        return weight.shape[0] // max(self.spec.num_heads, 1)

    @property
    def flops(self) -> int:
        """Multiplications and additions of the forward's matrix product."""
        return 2 * self.rows * math.prod(self.weight_shape)

    @property
    def bytes(self) -> int:
        """Bytes of x, weight and the outputs: what the forward must move at the least."""
        columns = self.weight_shape[0] or self.x.shape[1] * self.x.shape[3]
        elements = math.prod(self.x.shape) + math.prod(self.weight_shape) + self.rows * columns
        return elements * self.x.dtype.itemsize

    @property
    def family(self) -> str:
        return "projection"

    @property
    def operands(self) -> str:
        return f"{_on(self.x)}: x {list(self.x.shape)}, weight {list(self.weight_shape)}"


def head_dim(spec: ProjectionSpec, t: ProjectionTensors) -> int:
    """Of the projection's outputs."""
    assert t.weight is not None
    return t.weight.shape[0] // max(spec.num_heads, 1)


def empty_heads(spec: ProjectionSpec, t: ProjectionTensors) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised q, k and v, ``[B, H, L, D]`` each, contiguous."""
    B, _, L, _ = t.x.shape
    D = head_dim(spec, t)
    q, k, v = (t.x.new_empty((B, n, L, D)) for n in (spec.num_q, spec.num_k, spec.num_v))
    return q, k, v
