"""Compiles the Triton kernels for GPUs that are not there, and keeps what the compiler says of them.

    python benchmarks/compiled.py             # everything, to results/compiled/triton.json
    python benchmarks/compiled.py --quick --out FILE

An entry is a kernel as the backend would launch it: registers, spills, shared memory, and the instructions that
multiply matrices. ``tests/test_compiled.py`` holds new code to the file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import sass
import store
import torch
import triton
from triton.backends.compiler import GPUTarget

from pyattn import functional
from pyattn.backends import triton as backend
from pyattn.kernels import projection
from pyattn.kernels.launch import Launch
from pyattn.spec import (
    AttentionSpec,
    AttentionTensors,
    ProjectionSpec,
    ProjectionTensors,
    empty_heads,
    empty_output,
    lse_shape,
)
from pyattn.testing import CASES, Case, make_inputs

RESULTS = Path(__file__).parent / "results" / "compiled" / "triton.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
KERNELS = ("forward", "preprocess", "dkdv", "dq", "dmask", "decode", "combine")
PROJECTION_KERNELS = ("product", "epilogue", "gradient")
DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (64, 128, 256)
MASKS = ("full", "causal", "masked")
# Of a product without an epilogue "full", and of the output of attention "heads"; the others have norms besides rotary.
EPILOGUES = ("full", "heads", "rotary", "part", "interleaved")


class Entry(NamedTuple):
    kernel: str
    arch: str
    dtype: str = "bfloat16"
    head_dim: int = 128
    mask: str = "full"  # of a projection the epilogue

    def __str__(self) -> str:
        return " ".join(map(str, self))


def grid() -> list[Entry]:
    attention = itertools.product(KERNELS, TARGETS, DTYPES, HEAD_DIMS, MASKS)
    projections = itertools.product(PROJECTION_KERNELS, TARGETS, DTYPES, HEAD_DIMS, EPILOGUES)
    return [entry for entry in itertools.starmap(Entry, itertools.chain(attention, projections)) if is_distinct(entry)]


def quick() -> list[Entry]:
    """One of each kernel and architecture."""
    masks = {"dmask": "masked", "preprocess": "full", "combine": "full"} | dict.fromkeys(PROJECTION_KERNELS, "rotary")
    kernels = itertools.product(KERNELS + PROJECTION_KERNELS, TARGETS)
    return [Entry(kernel, arch, mask=masks.get(kernel, "causal")) for kernel, arch in kernels]


def has_mask(kernel: str) -> bool:
    return kernel not in ("preprocess", "combine")


def is_distinct(entry: Entry) -> bool:
    """Not every kernel knows of the mask, and only a masked call has the kernel of the mask's gradient.

    float32 has no matrix instructions: one entry says whether it fits. Nor do projections in float16 differ much.
    """
    if entry.kernel in PROJECTION_KERNELS:
        if entry.dtype != "bfloat16":
            return entry.mask == "rotary"
        return entry.kernel == "product" or entry.mask not in ("full", "heads")
    if entry.dtype == "float32" and entry.mask == "causal":
        return False
    return entry.mask == "masked" if entry.kernel == "dmask" else has_mask(entry.kernel) or entry.mask == "full"


class NoGpu:
    """What Triton asks of a driver when it compiles."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0


def launches(entry: Entry, length: int = 4096, layout: str = "BHLD") -> dict[str, Launch]:
    """By the kernel's name, what the backend launches for a call of this kind, on tensors without data."""
    if entry.kernel in PROJECTION_KERNELS:
        return projection_launches(entry, length)
    B, Hq, Hkv, Lq = 2, 8, 4, 1 if entry.kernel in ("decode", "combine") else length
    dtype = getattr(torch, entry.dtype)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def heads(H: int, L: int) -> torch.Tensor:
        if layout == "BHLD":
            return tensor(B, H, L, entry.head_dim)
        return tensor(B, L, H, entry.head_dim).transpose(1, 2)

    q, k = heads(Hq, Lq), heads(Hkv, length)
    t = AttentionTensors(q, k, torch.empty_like(k))
    if entry.mask == "masked":
        t = t._replace(attn_mask=tensor(B, Hq, Lq, length))
    spec = AttentionSpec(entry.head_dim**-0.5, window_right=0 if entry.mask == "causal" else None)
    return call_launches(spec, t, entry.arch)


def case_launches(case: Case, dtype: torch.dtype, arch: str) -> dict[str, Launch]:
    """The same for one of the cases that tests compute."""
    prepare = functional.dense if case.packed is None else functional._packed
    return call_launches(*prepare(**make_inputs(case, dtype)), arch)


def call_launches(spec: AttentionSpec, t: AttentionTensors, arch: str) -> dict[str, Launch]:
    """By the kernel's name, what the backend launches for the forward and, where there is one, the backward."""
    out, lse = empty_output(t.query, t.value.shape[-1]), t.query.new_empty(lse_shape(t.query), dtype=torch.float32)
    forward = backend.forward_launches(spec, t, out, lse, arch)
    named = dict(
        zip(("decode", "combine") if forward[0].arguments["PACK_GQA"] else ("forward",), forward, strict=False)
    )
    if t.block_table is None:
        grads = [torch.empty_like(x) for x in t[:3]]
        grad_mask = t.attn_mask if t.attn_mask is not None and t.attn_mask.is_floating_point() else None
        backward = backend.backward_launches(spec, t, out, lse, lse, out, lse, grads, grad_mask, arch)
        named |= dict(zip(("preprocess", "dkdv", "dq", "dmask"), backward, strict=False))
    return named


def projection_launches(entry: Entry, length: int) -> dict[str, Launch]:
    """The same for projections of 16 heads from 2048 columns, or back to them."""
    B, H, D, E, dtype = 2, 16, entry.head_dim, 2048, getattr(torch, entry.dtype)
    rows, columns = B * length, 3 * H * D

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    plain = entry.mask == "heads"
    if plain:
        spec, residual = ProjectionSpec(1), tensor(B, 1, length, E)
        t = ProjectionTensors(tensor(B, H, length, D), tensor(E, H * D), tensor(E), residual)
    else:
        spec = ProjectionSpec(H, H, H, interleaved=entry.mask == "interleaved")
        t = ProjectionTensors(tensor(B, 1, length, E), tensor(columns, E), tensor(columns))
    if not plain and entry.mask != "full":
        table, norm = tensor(length, D // (4 if entry.mask == "part" else 2), dtype=torch.float32), tensor(D)
        t = t._replace(cos=table, sin=table, q_norm=norm, k_norm=norm)
    outputs = empty_heads(spec, t)
    tiles = projection.product_tiles(entry.arch, dtype, rows, len(t.weight), spec, plain, plain)
    named = {"product": projection.forward(spec, t, outputs, None, tiles, "ieee")}
    if not plain:
        saved, y = tensor(B, 2 * H, length, D), tensor(B, length, 3 * H, D).transpose(1, 2)
        partials = tensor(*projection.partials_shape(spec, rows, D), dtype=torch.float32)
        named["epilogue"] = projection.epilogue(spec, t, y, outputs, saved)
        named["gradient"] = projection.backward(spec, t, saved, outputs, tensor(rows, columns), partials)
    return named


def compile_launch(launch: Launch, arch: str) -> Any:
    """The compiled kernel, by the very way that a call takes."""
    triton.runtime.driver.set_active(NoGpu(arch))
    return launch.kernel.warmup(grid=(1,), **launch.keywords())


def specialization(launch: Launch, arch: str) -> str:
    """What the kernel would be compiled for: launches that agree in it share one compiled kernel."""
    triton.runtime.driver.set_active(NoGpu(arch))
    *_, binder = launch.kernel.device_caches[arch]
    _, kinds, options = binder(**launch.keywords())
    return f"{kinds} {sorted(options.items())}"


def figures(kernel: Any, arch: str) -> dict[str, int]:
    """Registers a thread, spilled words, shared bytes a program, and counts of instructions."""
    shared = {"shared": kernel.metadata.shared, "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0}
    if TARGETS[arch].backend == "hip":
        text = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{word}:\s*(\d+)", text)[1])  # type: ignore[index]
            for word in ("vgpr_count", "vgpr_spill_count")  # scalar registers are spilled to these, not to memory
        )
        return {"registers": registers, "spills": spills, **shared, "v_mfma": text.count("v_mfma_")}
    code = sass.disassemble(kernel.asm["cubin"])
    counts = {name: sass.count(code.instructions, name) for name in sass.MATRIX_INSTRUCTIONS}
    wide = sass.count(code.instructions, "LDG", "LDGSTS", part="128")
    loads = {"wide_loads": wide, "narrow_loads": sass.count(code.instructions, "LDG", "LDGSTS") - wide}
    return {"registers": code.registers, "spills": sass.spills(code.instructions), **shared, **counts, **loads}


def measure(entry: Entry) -> dict[str, Any]:
    launch = launches(entry)[entry.kernel]
    tiles = {name: value for name, value in launch.tiles._asdict().items() if value}
    return entry._asdict() | figures(compile_launch(launch, entry.arch), entry.arch) | tiles


def compile_case(job: tuple[str, str, str]) -> list[str]:
    """Compiles all kernels of a case; returns what goes wrong."""
    name, dtype, arch = job
    (case,) = (case for case in CASES if case.name == name)
    wrong = []
    for kernel, launch in case_launches(case, getattr(torch, dtype), arch).items():
        try:
            compile_launch(launch, arch)
        except Exception as error:
            wrong.append(f"{kernel} of {name!r}, {dtype}, {arch}: {error}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one entry of each kernel and architecture")
    parser.add_argument("--only", default="", help="entries whose name matches this regular expression")
    parser.add_argument("--cases", metavar="NAMES", help="compile the cases of these names instead, separated by ';'")
    parser.add_argument("--archs", default=",".join(TARGETS), help="of the cases")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.cases:
        jobs = list(itertools.product(arguments.cases.split(";"), ("bfloat16",), arguments.archs.split(",")))
        with concurrent.futures.ProcessPoolExecutor() as pool:
            wrong = list(itertools.chain.from_iterable(pool.map(compile_case, jobs)))
        sys.exit("\n".join(wrong) or 0)
    entries = [entry for entry in (quick() if arguments.quick else grid()) if re.search(arguments.only, str(entry))]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        cells = list(pool.map(measure, entries))
    store.save(arguments.out, {"triton": triton.__version__}, cells)
    print(f"{len(cells)} entries: {arguments.out}")


if __name__ == "__main__":
    main()
