"""The CUDA backend's usual kernels, compiled before they are needed, on any machine: no GPU takes part."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch
from torch import Tensor

from pyattn import jit
from pyattn.backends import cuda
from pyattn.backends.cuda import call, hopper, launch
from pyattn.backends.cuda.kernels import FEW_KEYS, Kernel
from pyattn.backends.cuda.launch import Target
from pyattn.spec import AttentionSpec, AttentionTensors, Problem, empty_output

GROUPS = (1, 4, 8)  # query heads to a key head: kernels of few queries are made for one number, others take any
CONTENTS = (
    f"Forward and backward; few queries, with the sum of parts, for {', '.join(map(str, GROUPS))} query heads to a key "
    "head. Causal masks, windows, lengths, offsets, packed sequences and sinks need no kernels of their own."
)
REST = (
    "Other calls compile at first use: other head dims, page sizes or numbers of heads; masks, ALiBi, softcap, dropout "
    "and scales that are not positive; deterministic=False; rows that cannot be copied by 16 bytes."
)


def archs() -> list[str]:
    """What can be compiled for, by the names of ``launch.arch_name``."""
    return [launch.arch_name(*divmod(x, 10)) for x in jit.nvrtc_archs() if x >= 80]


def kernels(
    arch: str, dtypes: Iterable[torch.dtype], head_dims: Iterable[tuple[int, int]], page_sizes: Iterable[int] = ()
) -> list[Kernel]:
    """Those of ``CONTENTS``, for each dtype and each (D, Dv); those of the forward for each page size, too."""
    found: dict[Kernel, None] = {}
    for dtype, (D, Dv), page_size, group in product(dtypes, head_dims, (0, *page_sizes), GROUPS):
        few = (1, call.DECODE_ROWS // group)  # decode, tall decode
        for queries in (*few, call.DECODE_ROWS + 1, hopper.MAX_ROWS // group + 1):
            for keys in (cuda.SPLIT + 1, FEW_KEYS):  # of more than one part: decode has results to add up
                found |= dict.fromkeys(_kernels(arch, dtype, D, Dv, group, queries, keys, page_size))
    return list(found)


def _kernels(
    arch: str, dtype: torch.dtype, D: int, Dv: int, group: int, queries: int, keys: int, page_size: int
) -> list[Kernel]:
    """Of one call with dense tensors."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    target, query = Target(arch), empty(1, group, queries, D)
    pages = {"block_table": empty(1, keys, dtype=torch.int32), "kv_lengths": empty(1, dtype=torch.int32)}
    key, value = (empty(1, 1, page_size or keys, columns) for columns in (D, Dv))
    spec, tensors = AttentionSpec(scale=1), AttentionTensors(query, key, value, **(pages if page_size else {}))
    out_stride = empty_output(query, Dv).stride()
    launches = list(cuda.forward_plan(Problem.of("forward", spec, tensors), target, out_stride, True).launches)
    if not page_size:
        strides = (out_stride, out_stride, query.stride(), key.stride(), value.stride())
        launches += cuda.backward_plan(Problem.of("backward", spec, tensors), target, strides, None, True)
    return [launch.kernel for launch in launches]


def describe(kernel: Kernel) -> str:
    """Its name, and the macros that are not as they usually are."""
    usual = Kernel._field_defaults
    return " ".join([kernel.name, *(f"{name}={x}" for name, x in kernel.defines.items() if x != usual.get(name))])


def fill(work: Iterable[tuple[Kernel, str]], jobs: int) -> Iterator[tuple[Kernel, str, float]]:
    """Compiles kernels for architectures into the cache; yields each, in order, with the seconds that it took."""

    def compile_one(item: tuple[Kernel, str]) -> tuple[Kernel, str, float]:
        kernel, arch = item
        start = time.perf_counter()
        jit.cubin(kernel.file, kernel.defines, arch)
        return kernel, arch, time.perf_counter() - start

    with ThreadPoolExecutor(jobs) as pool:  # while NVRTC compiles, it holds no lock of Python's nor of its own
        yield from pool.map(compile_one, work)
