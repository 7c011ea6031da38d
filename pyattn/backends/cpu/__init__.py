"""The C++ kernels of ``pyattn._native``: one source, compiled for several instruction sets.

``PYATTN_CPU_ISA`` (avx512_amx, avx512_bf16, avx512, avx2 or portable) forces one; without it the best that the
processor runs is taken. avx512_amx has bfloat16 products of projections and of the
forward by AMX, and the backward of avx512. torch's thread count is obeyed.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyattn.spec import AttentionSpec, AttentionTensors, Problem, TensorMeta, absent, empty_output, lse_shape

try:
    from pyattn import _native
except ImportError as error:  # reported by `unavailable`, never at import
    _native = None  # type: ignore[assignment]
    _import_error = str(error)

MAX_HEAD_DIM = 512
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}  # the codes of csrc/params.h
_UNLIMITED = -1
_NO_SIZES = (0, 0, 0, 0)
_NO_ADDRESSES = (0,) * 9
_SMALL_DTYPES = (*(torch.float32,) * 2, *(torch.int64,) * 3, *(torch.int32,) * 3)  # of alibi_slopes to cu_seqlens_k


def available_isas() -> list[str]:
    """The instruction sets compiled in that this processor runs, best first."""
    return _native.available_isas() if _native else []


def _choose_isa() -> str:
    isas, forced = available_isas(), os.environ.get("PYATTN_CPU_ISA")
    if forced and isas and forced not in isas:
        raise ValueError(f"PYATTN_CPU_ISA must be one of {', '.join(isas)} on this processor, got {forced!r}")
    return forced or (isas[0] if isas else "none")


_isa = _choose_isa()
_isa_index = available_isas().index(_isa) if _native else 0


def isa() -> str:
    """The instruction set in use."""
    return _isa


def engine() -> tuple[int, int]:
    """What every kernel is called with: the number of the instruction set, and torch's number of threads."""
    return _isa_index, torch.get_num_threads()


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the kernels of another instruction set within a ``with`` block, for tests and benchmarks."""
    global _isa, _isa_index
    isas = available_isas()
    if name not in isas:
        raise ValueError(f"name must be one of {', '.join(isas)} on this processor, got {name!r}")
    before = _isa, _isa_index
    _isa, _isa_index = name, isas.index(name)
    try:
        yield
    finally:
        _isa, _isa_index = before


def peak_gflops(dtype: torch.dtype, threads: int = 1) -> float:
    """The measured rate at which ``threads`` cores multiply and add in registers, in GFLOP/s.

    For bfloat16 that of the dot-product instruction where the instruction set in use has it; a core's rate times
    ``threads``.
    """
    return threads * _native.peak_gflops(_isa_index, DTYPES[dtype])


def scratch_peak_bytes(reset: bool = False) -> int:
    """The most scratch memory that all threads together have asked for since the last reset."""
    return _native.scratch_peak_bytes(reset)


def unavailable() -> list[str]:
    return [] if _native else [f"the extension pyattn._native is missing ({_import_error})"]


def why_not_operand(meta: TensorMeta) -> list[str]:
    """Reasons against the device and the dtype of an operand."""
    reasons = []
    if meta.device.type != "cpu":
        reasons.append(f"runs on CPU tensors, these are on {meta.device.type}")
    if meta.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"computes in float32, the input is {str(meta.dtype).removeprefix('torch.')}")
    return reasons


def why_not(problem: Problem) -> list[str]:
    reasons = why_not_operand(problem.query)
    for name, meta in (("D", problem.query), ("Dv", problem.value)):
        if not 1 <= meta.shape[-1] <= MAX_HEAD_DIM:
            reasons.append(f"{name} must lie in [1, {MAX_HEAD_DIM}], it is {meta.shape[-1]}")
    if problem.key_length >= 2**31:
        reasons.append("counts keys in 32 bits")
    if problem.op == "backward" and problem.has("block_table"):
        reasons.append("has no gradient of paged keys")
    return reasons


def describe(problem: Problem) -> str:
    paged = problem.has("block_table")
    few_queries = problem.query_length <= _native.DECODE_QUERIES and not problem.spec.dropout_p
    if problem.op == "backward":
        how = f"blocks of {_native.BLOCK_M} queries"
    elif problem.packed:
        how = "each sequence by its own length, the longest first"
    elif few_queries and (paged or problem.key_length > _native.DECODE_KEYS):
        how = "keys split into chunks"
    else:
        how = f"tiles of {_native.BLOCK_M} queries x {_native.BLOCK_N} keys"
    return f"{_isa}, {how}, {torch.get_num_threads()} threads"


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of batch, head, row and element; a packed batch has rows only."""
    stride = x.stride()
    return stride if len(stride) == 4 else (0, stride[1], stride[0], stride[2])


@functools.lru_cache(maxsize=4096)
def _plan(
    spec: AttentionSpec,
    dtype: torch.dtype,
    query_shape: tuple[int, ...],
    query_stride: tuple[int, ...],
    key_shape: tuple[int, ...],
    key_stride: tuple[int, ...],
    value_shape: tuple[int, ...],
    value_stride: tuple[int, ...],
    mask_dtype: torch.dtype = torch.bool,
    mask_stride: tuple[int, ...] = _NO_SIZES,
    slopes_by_sample: bool = False,
    table_shape: tuple[int, ...] | None = None,
    batch: int | None = None,  # of packed queries
) -> _native.AttentionPlan:
    """All of a call but its tensors."""
    page_size = 0
    if batch is None:
        B, Hq, Lq, D = query_shape
        lse_stride = (Hq * Lq, Lq)
    else:
        B, Lq = batch, 0
        total_q, Hq, D = query_shape
        lse_stride = (0, total_q)
    Hkv, Lk = key_shape[1], key_shape[2] if len(key_shape) == 4 else 0
    if table_shape is not None:
        page_size, Lk = Lk, Lk * table_shape[1]
    return _native.AttentionPlan(
        dtype=DTYPES[dtype],
        sizes=(B, Hq, Hkv, Lq, Lk, D, value_shape[-1]),
        query_stride=query_stride,
        key_stride=key_stride,
        value_stride=value_stride,
        lse_stride=lse_stride,
        mask_dtype=DTYPES[mask_dtype],
        mask_stride=mask_stride,
        alibi_stride_b=Hq if slopes_by_sample else 0,
        page_size=page_size,
        q_offset=spec.q_offset,
        window_left=_UNLIMITED if spec.window_left is None else spec.window_left,
        window_right=_UNLIMITED if spec.window_right is None else spec.window_right,
        scale=spec.scale,
        softcap=spec.softcap,
        dropout_threshold=spec.dropout_threshold,
    )


# What both kernels take: the plan, addresses in the order of `Addresses` in csrc/bindings.cpp, the dropout seed, and
# copies that must outlive the call, since some addresses belong to them.
_Call = tuple[Any, tuple[int, ...], int, Sequence[Tensor | None]]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _call(spec: AttentionSpec, t: AttentionTensors, out: Tensor, lse: Tensor) -> _Call:
    query, key, value = t[:3]
    addresses = (query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), lse.data_ptr())
    if absent(t[3:]):
        plan = _plan(
            spec, query.dtype, query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride()
        )
        return plan, addresses + _NO_ADDRESSES, 0, ()

    mask, table = t.attn_mask, t.block_table
    mask_meta: tuple[Any, ...] = (torch.bool, _NO_SIZES)
    if mask is not None:
        Lk = key.shape[2] * (1 if table is None else table.shape[1])
        mask_meta = (mask.dtype, mask.expand(*query.shape[:3], Lk).stride())
    small = [
        x if x is None or (x.dtype == dtype and x.is_contiguous()) else x.to(dtype).contiguous()
        for x, dtype in zip(t[4:12], _SMALL_DTYPES, strict=True)
    ]
    plan = _plan(
        spec,
        query.dtype,
        query.shape,
        _strides(query),
        key.shape,
        _strides(key),
        value.shape,
        _strides(value),
        *mask_meta,
        t.alibi_slopes is not None and t.alibi_slopes.dim() == 2,
        None if table is None else table.shape,
        None if t.cu_seqlens_q is None else t.cu_seqlens_q.shape[0] - 1,
    )
    seed = 0 if t.dropout_seed is None else int(t.dropout_seed)
    return plan, (*addresses, _address(mask), *map(_address, small)), seed, small


def forward(spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    out = empty_output(t.query, t.value.shape[-1])
    lse = torch.empty(lse_shape(t.query), dtype=torch.float32)
    plan, addresses, seed, _alive = _call(spec, t, out, lse)
    plan.forward(*engine(), addresses, _strides(out), seed)
    return out, lse


def backward(
    spec: AttentionSpec,
    t: AttentionTensors,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs_mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    if out.stride(-1) != 1:
        out = out.contiguous()
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grads = torch.empty_like(t.query), torch.empty_like(t.key), torch.empty_like(t.value)
    grad_mask: Tensor | None = None
    mask_sizes: tuple[int, ...] = _NO_SIZES
    if needs_mask_grad:
        assert t.attn_mask is not None
        grad_mask = torch.empty(t.attn_mask.shape, dtype=t.attn_mask.dtype)
        mask_sizes = (1,) * (4 - grad_mask.dim()) + grad_mask.shape
    grad_sinks = None if t.sinks is None else torch.empty(t.sinks.shape, dtype=torch.float32)
    plan, addresses, seed, _alive = _call(spec, t, out, lse)
    strides = Tensor.stride if t.cu_seqlens_q is None else _strides
    plan.backward(
        *engine(),
        addresses,
        strides(out),
        seed,
        (
            grad_out.data_ptr(),
            _address(grad_lse),
            grads[0].data_ptr(),
            grads[1].data_ptr(),
            grads[2].data_ptr(),
            _address(grad_mask),
            _address(grad_sinks),
        ),
        (strides(grad_out), strides(grads[0]), strides(grads[1]), strides(grads[2])),
        mask_sizes,
    )
    return *grads, grad_mask, None if grad_sinks is None else grad_sinks.to(t.sinks.dtype)  # type: ignore[union-attr]
