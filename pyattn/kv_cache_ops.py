"""Writing to a KV cache among ``torch.ops.pyattn``: it changes its arguments, and has no gradient."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from pyattn.checks import check_slots
from pyattn.library import differentiable, library, register

library.define(
    "kv_cache_append(Tensor(a!) key_buffer, Tensor(b!) value_buffer, Tensor key, Tensor value, Tensor tokens, "
    "Tensor slots) -> ()"
)
_append_op = torch.ops.pyattn.kv_cache_append.default


def _append(
    key_buffer: Tensor, value_buffer: Tensor, key: Tensor, value: Tensor, tokens: Tensor, slots: Tensor
) -> None:
    if tokens.numel() == 0:
        return
    size, length = key_buffer.shape[2], key.shape[2]
    check_slots("tokens", tokens, key.shape[0] * length)
    check_slots("slots", slots, key_buffer.shape[0] * size)
    outer, inner, sample, token = slots // size, slots % size, tokens // length, tokens % length
    for buffer, new in ((key_buffer, key), (value_buffer, value)):
        buffer[outer, :, inner] = new[sample, :, token]


def _append_fake(*args: Any) -> None:
    return None


def _refuse_gradient(args: tuple[Any, ...]) -> NoReturn:
    raise NotImplementedError(
        "kv_cache_append has no gradient, but key or value requires one: append under torch.no_grad(), or detach them"
    )


def _refuse_vmap(*args: Any) -> NoReturn:
    raise NotImplementedError("kv_cache_append cannot be computed under torch.vmap: its caches are not batched")


register(
    "kv_cache_append",
    _append_op,
    compute=_append,
    fake=_append_fake,
    differentiable=differentiable(_append_op, _refuse_gradient),
    vmap=_refuse_vmap,
)


def append(key_buffer: Tensor, value_buffer: Tensor, key: Tensor, value: Tensor, tokens: Tensor, slots: Tensor) -> None:
    """Writes tokens of ``key`` and ``value`` into the buffers, in place.

    Args:
        key_buffer: ``[N, Hkv, size, D]``: samples, or pages.
        value_buffer: the same, with ``Dv``.
        key: ``[B, Hkv, L, D]``, of the buffer's dtype.
        value: ``[B, Hkv, L, Dv]``.
        tokens: int64 ``[n]``, which tokens: ``b * L + i``.
        slots: int64 ``[n]``, where each goes, no two to the same place: ``outer * size + inner``.
    """
    _append_op(key_buffer, value_buffer, key, value, tokens, slots)
