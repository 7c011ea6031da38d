"""The C++ kernels of ``pyattn._native``: one source, compiled for several instruction sets.

``PYATTN_CPU_ISA`` (avx512_bf16, avx512, avx2 or portable) forces one; without it the best that the processor runs
is taken. torch's thread count is obeyed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyattn.spec import AttentionSpec, AttentionTensors, Problem, empty_output

try:
    from pyattn import _native
except ImportError as error:  # reported by `unavailable`, never at import
    _native = None  # type: ignore[assignment]
    _import_error = str(error)

MAX_HEAD_DIM = 512
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}  # the codes of csrc/params.h
_LATER = {  # members of the spec without a kernel
    "alibi_slopes": "ALiBi",
    "sinks": "sinks",
    "cu_seqlens_q": "packed sequences",
}
_UNLIMITED = -1
_NO_SIZES: tuple[int, ...] = (0, 0, 0, 0)


def available_isas() -> list[str]:
    """The instruction sets compiled in that this processor runs, best first."""
    return _native.available_isas() if _native else []


def _choose_isa() -> str:
    isas, forced = available_isas(), os.environ.get("PYATTN_CPU_ISA")
    if forced and isas and forced not in isas:
        raise ValueError(f"PYATTN_CPU_ISA must be one of {', '.join(isas)} on this processor, got {forced!r}")
    return forced or (isas[0] if isas else "none")


_isa = _choose_isa()


def isa() -> str:
    """The instruction set in use."""
    return _isa


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the kernels of another instruction set within a ``with`` block, for tests and benchmarks."""
    global _isa
    if name not in available_isas():
        raise ValueError(f"name must be one of {', '.join(available_isas())} on this processor, got {name!r}")
    before, _isa = _isa, name
    try:
        yield
    finally:
        _isa = before


def peak_gflops(dtype: torch.dtype, threads: int = 1) -> float:
    """The measured rate at which ``threads`` cores multiply and add in registers, in GFLOP/s.

    For bfloat16 that of the dot-product instruction where the instruction set in use has it; a core's rate times
    ``threads``.
    """
    return threads * _native.peak_gflops(_isa, _DTYPES[dtype])


def scratch_peak_bytes(reset: bool = False) -> int:
    """The most scratch memory that all threads together have asked for since the last reset."""
    return _native.scratch_peak_bytes(reset)


def unavailable() -> list[str]:
    return [] if _native else [f"the extension pyattn._native is missing ({_import_error})"]


def why_not(problem: Problem) -> list[str]:
    reasons = []
    spec, dtype = problem.spec, problem.query.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"computes in float32, the input is {str(dtype).removeprefix('torch.')}")
    for name, meta in (("D", problem.query), ("Dv", problem.value)):
        if not 1 <= meta.shape[-1] <= MAX_HEAD_DIM:
            reasons.append(f"{name} must lie in [1, {MAX_HEAD_DIM}], it is {meta.shape[-1]}")
    if problem.key_length >= 2**31:
        reasons.append("counts keys in 32 bits")
    if spec.softcap:
        reasons.append("has no kernel for softcap yet")
    if spec.dropout_p:
        reasons.append("has no kernel for dropout yet")
    reasons += [f"has no kernel for {what} yet" for name, what in _LATER.items() if problem.has(name)]
    return reasons


def describe(problem: Problem) -> str:
    paged = problem.has("block_table")
    few_queries = problem.query_length <= _native.DECODE_QUERIES
    if problem.op == "backward":
        how = f"blocks of {_native.BLOCK_M} queries"
    elif few_queries and (paged or problem.key_length > _native.DECODE_KEYS):
        how = "keys split into chunks"
    else:
        how = f"tiles of {_native.BLOCK_M} queries x {_native.BLOCK_N} keys"
    return f"{_isa}, {how}, {torch.get_num_threads()} threads"


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _int64(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int64).contiguous()


def _arguments(
    spec: AttentionSpec, t: AttentionTensors, out: Tensor, lse: Tensor
) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """What both kernels take, in the order of ``attention_params`` in csrc/bindings.cpp; and what must outlive it."""
    query, key, value, mask = t.query, t.key, t.value, t.attn_mask
    B, Hq, Lq, D = query.shape
    _, Hkv, Lk, Dv = value.shape
    block_table, page_size = t.block_table, 0
    if block_table is not None:
        block_table, page_size = block_table.contiguous(), Lk
        Lk *= block_table.shape[1]
    mask_dtype, mask_stride = 0, _NO_SIZES
    if mask is not None:
        mask_dtype, mask_stride = _DTYPES[mask.dtype], mask.expand(B, Hq, Lq, Lk).stride()
    q_offsets, lengths, starts = _int64(t.q_offset), _int64(t.kv_lengths), _int64(t.kv_starts)
    arguments = (
        _DTYPES[query.dtype],
        (B, Hq, Hkv, Lq, Lk, D, Dv),
        query.data_ptr(),
        query.stride(),
        key.data_ptr(),
        key.stride(),
        value.data_ptr(),
        value.stride(),
        out.data_ptr(),
        out.stride(),
        lse.data_ptr(),
        _address(mask),
        mask_dtype,
        mask_stride,
        _address(block_table),
        page_size,
        _address(q_offsets),
        _address(lengths),
        _address(starts),
        spec.q_offset,
        _UNLIMITED if spec.window_left is None else spec.window_left,
        _UNLIMITED if spec.window_right is None else spec.window_right,
        spec.scale,
    )
    return arguments, (block_table, q_offsets, lengths, starts)


def forward(spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    out = empty_output(t.query, t.value.shape[-1])
    lse = torch.empty(t.query.shape[:3], dtype=torch.float32)
    arguments, _alive = _arguments(spec, t, out, lse)
    _native.attention_forward(_isa, torch.get_num_threads(), *arguments)
    return out, lse


def backward(
    spec: AttentionSpec,
    t: AttentionTensors,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs_mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
    out, grad_out = (x if x.stride(-1) == 1 else x.contiguous() for x in (out, grad_out))
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grads = [torch.empty_like(x) for x in (t.query, t.key, t.value)]
    grad_mask, mask_sizes = None, _NO_SIZES
    if needs_mask_grad:
        assert t.attn_mask is not None
        grad_mask = torch.empty(t.attn_mask.shape, dtype=t.attn_mask.dtype)
        mask_sizes = (1,) * (4 - grad_mask.dim()) + grad_mask.shape
    arguments, _alive = _arguments(spec, t, out, lse)
    _native.attention_backward(
        _isa,
        torch.get_num_threads(),
        grad_out.data_ptr(),
        grad_out.stride(),
        _address(grad_lse),
        grads[0].data_ptr(),
        grads[0].stride(),
        grads[1].data_ptr(),
        grads[1].stride(),
        grads[2].data_ptr(),
        grads[2].stride(),
        _address(grad_mask),
        mask_sizes,
        *arguments,
    )
    return *grads, grad_mask, None  # type: ignore[return-value]
