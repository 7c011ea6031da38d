"""Writing to a KV cache among ``torch.ops.pyattn``: it changes its arguments, and has no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from pyattn.checks import check_slots
from pyattn.library import differentiable, library, register, unobserved

library.define(
    "kv_cache_append(Tensor(a!) key_buffer, Tensor(b!) value_buffer, Tensor key, Tensor value, Tensor tokens, "
    "Tensor slots) -> ()"
)
_FEW_RUNS = 2  # up to which slices take less time than an index
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


class Run(NamedTuple):
    """Tokens that lie side by side, and will."""

    sample: int
    token: int  # the first
    outer: int  # where it goes
    inner: int
    length: int


def _spread(firsts: list[int], lengths: list[int], device: torch.device) -> Tensor:
    """Numbers from each first on, so many, all in one tensor."""
    x = torch.tensor(firsts, dtype=torch.int64, device="cpu")
    total = sum(lengths)
    if total > len(lengths):
        counts = torch.tensor(lengths, device="cpu")
        x = (x - counts.cumsum(0) + counts).repeat_interleave(counts) + torch.arange(total, device="cpu")
    return x.to(device, non_blocking=True)


def append(key_buffer: Tensor, value_buffer: Tensor, key: Tensor, value: Tensor, runs: Sequence[Run]) -> None:
    """Writes tokens of ``key`` and ``value`` into contiguous buffers, in place.

    Args:
        key_buffer: ``[N, Hkv, size, D]``: samples, or pages.
        value_buffer: the same, with ``Dv``.
        key: ``[B, Hkv, L, D]``, of the buffer's dtype.
        value: ``[B, Hkv, L, Dv]``.
        runs: which tokens, in order, and where they go, no two to the same place. Nobody checks them.
    """
    B, H, L, _ = key.shape
    size, device = key_buffer.shape[2], key.device
    both = (key_buffer, key), (value_buffer, value)
    if not unobserved((key_buffer, value_buffer, key, value)):
        lengths = [run.length for run in runs]
        tokens = _spread([run.sample * L + run.token for run in runs], lengths, device)
        slots = _spread([run.outer * size + run.inner for run in runs], lengths, device)
        _append_op(key_buffer, value_buffer, key, value, tokens, slots)
    elif len(runs) <= _FEW_RUNS:
        for sample, token, outer, inner, length in runs:
            for buffer, new in both:
                rows = new[sample] if length == L else new[sample, :, token : token + length]
                buffer[outer, :, inner : inner + length] = rows
    else:  # by rows, of one head and token each: all of the new ones, in their order, or some
        lengths = [run.length for run in runs for _ in range(H)]
        target = _spread([(run.outer * H + h) * size + run.inner for run in runs for h in range(H)], lengths, device)
        source = None
        if len(runs) != B or sum(lengths) != B * H * L:
            source = _spread([(run.sample * H + h) * L + run.token for run in runs for h in range(H)], lengths, device)
        for buffer, new in both:
            rows = new.reshape(B * H * L, new.shape[3])
            buffer.view(-1, buffer.shape[3]).index_copy_(0, target, rows if source is None else rows[source])
