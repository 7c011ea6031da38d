"""The CUDA C++ kernels of ``csrc/cuda``, compiled by NVRTC when they are first needed, on NVIDIA GPUs.

Nothing is compiled at installation. A call's specialisation follows from its dtype, head dims and features; the machine
code is kept on disk (``pyattn.jit``), and ``python -m pyattn precompile`` makes it beforehand.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyattn.backends.cuda import call, hopper, launch
from pyattn.backends.cuda.kernels import (
    Kernel,
    columns_of,
    combine_kernel,
    has_unordered_hopper_kernel,
    kernel_of,
    preprocess_kernel,
    unordered,
)
from pyattn.backends.cuda.launch import Launch, Target, pack_numbers, run, target_of, unavailable
from pyattn.spec import AttentionSpec, AttentionTensors, Problem, empty_output, lse_shape, sink_gradient

__all__ = [
    "backward",
    "backward_plan",
    "describe",
    "forward",
    "forward_plan",
    "slower_than_triton",
    "unavailable",
    "why_not",
]

MAX_HEAD_DIM = 256
MAX_LENGTH = 2**30  # rows and keys are counted in 32 bits, with room for an offset
SPLIT = 512  # keys of a part: bits depend neither on the batch nor on the GPU


def why_not(problem: Problem) -> list[str]:
    reasons = []
    query = problem.query
    if query.device.type != launch.gpu.device_type:
        reasons.append(f"runs on GPU tensors, these are on {query.device.type}")
    elif int(re.sub(r"\D", "", arch := target_of(query.device).arch)) < 80:
        reasons.append(f"needs compute capability 8.0, this GPU is {arch}")
    if query.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"multiplies bfloat16 and float16, the input is {str(query.dtype).removeprefix('torch.')}")
    for name, meta in (("D", query), ("Dv", problem.value)):
        if not 1 <= meta.shape[-1] <= MAX_HEAD_DIM:
            reasons.append(f"{name} must lie in [1, {MAX_HEAD_DIM}], it is {meta.shape[-1]}")
    if max(problem.query_length, problem.key_length) >= MAX_LENGTH:
        reasons.append(f"takes at most {MAX_LENGTH - 1} rows and keys")
    if problem.op == "backward" and problem.has("block_table"):
        reasons.append("has no gradient of paged keys")
    return reasons


def slower_than_triton(problem: Problem) -> bool:
    """As measured on Hopper: where the kernels for sm_80 compute more than a few queries.

    See ``benchmarks/results/nvidia-h100-80gb-hbm3`` and ``nvidia-h200``.
    """
    if unavailable() or (arch := target_of(problem.device).arch) != "sm_90a":
        return False
    if problem.op == "forward" and call.few_queries(problem):
        return False
    macros, _ = call.common(problem, True)
    return bool(hopper.why_not(problem, macros, arch))


# ---- forward -------------------------------------------------------------------------------------------------


class ForwardPlan(NamedTuple):
    """One kind of call: all but its addresses."""

    launches: tuple[Launch, ...]
    num_splits: int  # parts of the keys, of `split` keys
    split: int


@functools.lru_cache(maxsize=4096)
def forward_plan(problem: Problem, target: Target, out_stride: tuple[int, ...], aligned: bool) -> ForwardPlan:
    query, key, rows = problem.query, problem.key, call.rows(problem)
    macros, numbers = call.common(problem, aligned)
    numbers |= call.strides("out", out_stride)
    Dv, Hq = problem.value.shape[-1], query.shape[1]
    few, num_splits, split = call.few_queries(problem), 1, SPLIT
    if not few and not hopper.why_not(problem, macros, target.arch):
        kernel = hopper.kernel_for("forward", problem, macros)
        split = hopper.SPLIT // kernel.tiles.BLOCK_N * kernel.tiles.BLOCK_N
        if rows is not None and rows <= hopper.MAX_ROWS:
            num_splits = call.num_splits(problem, split)
        numbers |= {"num_splits": num_splits, "split": split}
        launches = [hopper.start(kernel, problem, target, numbers, num_splits=num_splits)]
    else:
        kind = "forward"
        if few:
            kind = "decode" if rows is not None and rows <= 16 else "tall decode"
            macros["ROWS"] = Hq // max(key.shape[1], 1) or 1
            num_splits = call.num_splits(problem, split)
        kernel = kernel_of(kind, (query.shape[-1], Dv), macros)
        numbers |= call.slots(query, problem.meta("cu_seqlens_q"), kernel.ROWS, kernel.tiles.BLOCK_M)
        numbers |= {"num_splits": num_splits, "split": split}
        blocks = numbers["slots"] * (Hq // kernel.ROWS) * num_splits
        launches = [Launch(kernel, blocks, pack_numbers(numbers))]
    if num_splits > 1:
        numbers["Lq"] = lse_shape(query)[-1]
        combine = combine_kernel(Dv, macros["BF16"])
        launches.append(Launch(combine, numbers["num_rows"], pack_numbers(numbers)))
    return ForwardPlan(tuple(launches), num_splits, split)


def forward(spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    t = call.with_dense_vectors(t)
    out = empty_output(t.query, t.value.shape[-1])
    lse = t.query.new_empty(lse_shape(t.query), dtype=torch.float32)
    addresses = call.addresses(t, out, lse)
    problem = Problem.of("forward", spec, t)
    plan = forward_plan(problem, target_of(t.query.device), out.stride(), call.aligned(*addresses[:3]))
    if plan.num_splits > 1:
        partial_lse = lse.new_empty((plan.num_splits, *lse.shape))
        partial_out = lse.new_empty((*partial_lse.shape, out.shape[-1]))
        addresses = addresses._replace(partial_out=partial_out.data_ptr(), partial_lse=partial_lse.data_ptr())
    run(plan.launches, addresses, t.query.device)
    return out, lse


# ---- backward ------------------------------------------------------------------------------------------------


def _split_launches(
    problem: Problem,
    arch: str,
    macros: dict[str, int],
    ordered: bool,
    start: Callable[[Kernel, int, dict[str, int]], Launch],
) -> list[Launch]:
    """The kernels for sm_80 that find the gradients of query, key and value."""
    query, key = problem.query, problem.key
    head_dims = (query.shape[-1], problem.value.shape[-1])
    launches = []
    dkdv = kernel_of("dkdv", head_dims, macros)
    both = None if ordered else unordered(dkdv, head_dims, macros, arch)
    dkdv = both or dkdv
    slots = call.slots(key, problem.meta("cu_seqlens_k"), 1, dkdv.tiles.BLOCK_N)
    if max(dkdv.BLOCK_D, dkdv.BLOCK_DV) > 192:  # the sums of both do not fit a thread's registers
        launches.append(start(dkdv._replace(GRADIENTS=1, UNORDERED=0), slots["slots"] * key.shape[1], slots))
        dkdv = dkdv._replace(GRADIENTS=2)
    launches.append(start(dkdv, slots["slots"] * key.shape[1], slots))
    if both is None:
        dq = kernel_of("dq", head_dims, macros)
        slots = call.slots(query, problem.meta("cu_seqlens_q"), 1, dq.tiles.BLOCK_M)
        launches.append(start(dq, slots["slots"] * query.shape[1], slots))
    return launches


@functools.lru_cache(maxsize=4096)
def backward_plan(
    problem: Problem,
    target: Target,
    strides: tuple[tuple[int, ...], ...],  # of out, grad_out, grad_query, grad_key, grad_value
    mask_sizes: tuple[int, int, int, int] | None,  # of the mask whose gradient is asked for
    aligned: bool,
    ordered: bool = True,
) -> tuple[Launch, ...]:
    """One kind of call: all but its addresses."""
    query = problem.query
    steps = call.steps(query.shape, strides[0]) + call.steps(query.shape, strides[1])
    macros, numbers = call.common(problem, aligned and not any(x % 8 for x in steps))
    for name, stride in zip(("out", "grad_out", "grad_query", "grad_key", "grad_value"), strides, strict=True):
        numbers |= call.strides(name, stride)
    head_dims = (query.shape[-1], problem.value.shape[-1])

    def start(kernel: Kernel, blocks: int, more: dict[str, int]) -> Launch:
        return Launch(kernel, blocks, pack_numbers(numbers | more))

    preprocess = preprocess_kernel(head_dims[1], macros["BF16"], macros["ALIGNED"])
    rows = preprocess.ROWS * preprocess.threads // 32
    launches = [start(preprocess, -(-numbers["num_rows"] // rows), {"Lq": lse_shape(query)[-1]})]
    if not hopper.why_not(problem, macros, target.arch):
        grad_out = query._replace(shape=(*query.shape[:-1], head_dims[1]), stride=strides[1])
        kinds = [("dkdv", 3), ("dq", 3)]
        if not ordered and has_unordered_hopper_kernel(head_dims, macros):
            kinds = [("unordered dkdv", 3)]
        if sum(columns_of(head_dims)) > 256:  # the sums of both do not fit a thread's registers
            kinds[:1] = [("dkdv", 1), (kinds[0][0], 2)]
        for op, gradients in kinds:
            kernel = hopper.kernel_for(op, problem, macros | {"GRADIENTS": gradients})
            launches.append(hopper.start(kernel, problem, target, numbers, op != "dq", grad_out))
    else:
        launches += _split_launches(problem, target.arch, macros, ordered, start)
    if mask_sizes is not None:
        dmask = kernel_of("dmask", head_dims, macros)
        B, H, Lq, Lk = mask_sizes
        blocks = B * H * -(-Lq // dmask.tiles.BLOCK_M) * -(-Lk // dmask.tiles.BLOCK_N)
        launches.append(start(dmask, blocks, {"mask_B": B, "mask_H": H, "mask_Lq": Lq, "mask_Lk": Lk}))
    return tuple(launches)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # of query, key, value, attn_mask, sinks


def _dense_rows(x: Tensor) -> Tensor:
    """With elements of a row side by side, and not expanded."""
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


def backward(
    spec: AttentionSpec,
    t: AttentionTensors,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs_mask_grad: bool,
) -> Gradients:
    t = call.with_dense_vectors(t)
    out, grad_out, lse = _dense_rows(out), _dense_rows(grad_out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty_like(lse)
    grads = torch.empty_like(t.query), torch.empty_like(t.key), torch.empty_like(t.value)
    grad_mask, mask_sizes = None, None
    if needs_mask_grad:
        assert t.attn_mask is not None
        grad_mask = t.attn_mask.new_empty(t.attn_mask.shape)
        mask_sizes = ((1,) * (4 - grad_mask.dim()) + tuple(grad_mask.shape))[:4]
    addresses = call.addresses(t, out, lse)._replace(
        grad_out=grad_out.data_ptr(),
        grad_lse=call.address_of(grad_lse),
        delta=delta.data_ptr(),
        grad_query=grads[0].data_ptr(),
        grad_key=grads[1].data_ptr(),
        grad_value=grads[2].data_ptr(),
        grad_mask=call.address_of(grad_mask),
    )
    problem = Problem.of("backward", spec, t)
    strides = tuple(x.stride() for x in (out, grad_out, *grads))
    aligned = call.aligned(*addresses[:4], addresses.grad_out)
    ordered = spec.deterministic or torch.are_deterministic_algorithms_enabled()
    launches = backward_plan(problem, target_of(t.query.device), strides, mask_sizes, aligned, ordered)
    query_sums = None
    if any(launch.kernel.UNORDERED for launch in launches):
        query_sums = lse.new_zeros((*lse.shape, t.query.shape[-1]))
        addresses = addresses._replace(query_sums=query_sums.data_ptr())
    run(launches, addresses, t.query.device)
    if query_sums is not None:
        grads[0].copy_(query_sums.transpose(0, 1) if problem.packed else query_sums)
    return *grads, grad_mask, None if t.sinks is None else sink_gradient(t.sinks, lse, delta)


# ---- explain -------------------------------------------------------------------------------------------------


def describe(problem: Problem) -> str:
    macros, _ = call.common(problem, True)
    target = target_of(problem.query.device)
    arch, missing = target.arch, hopper.why_not(problem, macros, target.arch)
    older = f" (sm_80's kernels: {'; '.join(missing)})" if arch == "sm_90a" and missing else ""
    if problem.op == "backward":
        strides = (problem.query.stride,) * 3 + (problem.key.stride, problem.value.stride)
        launches = backward_plan(problem, target, strides, None, True, problem.spec.deterministic)[1:]
        tiles = {launch.kernel.name: launch.kernel.tiles for launch in launches}
        both = any(launch.kernel.UNORDERED for launch in launches)
        roles = ["keys, and queries in any order"] if both else ["keys", "queries"]
        return f"{arch}, {'; '.join(f'{role}: {t}' for role, t in zip(roles, tiles.values(), strict=True))}{older}"
    plan = forward_plan(problem, target, problem.query.stride, True)
    older = "" if call.few_queries(problem) else older
    parts = "" if plan.num_splits == 1 else f"{plan.num_splits} parts of {plan.split} keys, "
    return f"{arch}, {parts}{plan.launches[0].kernel.tiles}{older}"
