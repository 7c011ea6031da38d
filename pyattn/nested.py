"""Jagged nested tensors ``[B, H, j, D]`` to packed sequences and back, sharing memory and offsets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check(query: Any, key: Any, value: Any, **dense_only: Any) -> None:
    """Three jagged tensors that go together, and nothing that only dense input takes."""
    for name, x in dense_only.items():
        if x is not None:
            raise ValueError(f"{name} must be None where query is a nested tensor")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not (isinstance(x, Tensor) and x.is_nested and x.layout == torch.jagged):
            raise ValueError(f"{name} must be a nested tensor of layout torch.jagged, as query, key and value all must")
        if x.dim() != 4 or x._ragged_idx != 2:  # type: ignore[attr-defined]
            raise ValueError(
                f"{name} must have shape [B, H, j, D] with its lengths in dimension 2, "
                f"as transpose(1, 2) of [B, j, H, D] has, got {list(x.shape)}"
            )
        if x.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError(f"{name} must have no holes between its sequences: call contiguous() on [B, j, H, D]")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"key must have the batch size of query ({query.shape[0]}), got {key.shape[0]}")
    if value.offsets() is not key.offsets() and not torch.equal(value.offsets(), key.offsets()):
        raise ValueError("value must have sequences of the lengths of key's: their offsets differ")


def to_packed(query: Any, key: Any, value: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The first five arguments of ``attention_varlen``."""
    q, k, v = (x.transpose(1, 2).values() for x in (query, key, value))
    return q, k, v, query.offsets().to(torch.int32), key.offsets().to(torch.int32)


def to_jagged(x: Tensor, query: Any) -> Tensor:
    """``[total_q, H, ...]`` as ``[B, H, j, ...]`` with the query's offsets."""
    return torch.nested.nested_tensor_from_jagged(x, query.offsets()).transpose(1, 2)
