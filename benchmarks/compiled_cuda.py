"""Compiles the CUDA kernels for GPUs that are not there, and keeps what their machine code says.

    python benchmarks/compiled_cuda.py             # everything, to results/compiled/cuda.json
    python benchmarks/compiled_cuda.py --quick --out FILE

An entry is a kernel as the backend would start it: registers, spills, shared memory, and counts of instructions.
``tests/test_compiled_cuda.py`` holds new code to the file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import sass
import store
import torch

from pyattn import jit
from pyattn.backends import cuda as backend
from pyattn.backends.cuda.kernels import Kernel
from pyattn.backends.cuda.launch import Target
from pyattn.spec import AttentionSpec, AttentionTensors, Problem, empty_output

RESULTS = Path(__file__).parent / "results" / "compiled" / "cuda.json"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
HEAD_DIMS = ((128, 128), (64, 64), (96, 96), (192, 192), (256, 256), (192, 128))  # `quick` takes the first
QUERIES = {"forward": 4096, "few queries": 40, "tall decode": 20, "decode": 1}
KEYS, PAGE_SIZE = 4096, 16
INSTRUCTIONS = ("HMMA", "HGMMA", "LDSM", "MUFU", "BAR", "LDGSTS", "UTMALDG", "USETMAXREG")


class Call(NamedTuple):
    """A kind of call.

    plain       nothing is done to a score but to scale it
    masked      a mask of the query's type
    everything  softcap, ALiBi, a mask of float32, dropout
    paged       pages of 16 keys
    unordered   as plain, but the query's gradient may be summed in any order
    odd         a negative scale, a bool mask, and rows that cannot be copied by 16 bytes
    """

    kind: str
    D: int
    Dv: int
    dtype: str = "bfloat16"

    def inputs(self, queries: int) -> tuple[AttentionSpec, AttentionTensors]:
        """Tensors without data."""
        B, Hq, Hkv = 2, 8, 4
        dtype, mask_shape = getattr(torch, self.dtype), (B, Hq, queries, KEYS)

        def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        pages = (B * KEYS // PAGE_SIZE, Hkv, PAGE_SIZE) if self.kind == "paged" else (B, Hkv, KEYS)
        t = AttentionTensors(tensor(B, Hq, queries, self.D), tensor(*pages, self.D), tensor(*pages, self.Dv))
        spec = AttentionSpec(self.D**-0.5)
        if self.kind == "masked":
            t = t._replace(attn_mask=tensor(*mask_shape))
        elif self.kind == "everything":
            t = t._replace(attn_mask=tensor(*mask_shape, dtype=torch.float32))
            t = t._replace(alibi_slopes=tensor(Hq, dtype=torch.float32), dropout_seed=tensor(dtype=torch.int64))
            spec = spec._replace(softcap=30.0, dropout_p=0.1)
        elif self.kind == "paged":
            t = t._replace(block_table=tensor(B, KEYS // PAGE_SIZE, dtype=torch.int32))
        elif self.kind == "odd":
            t = t._replace(attn_mask=tensor(*mask_shape, dtype=torch.bool))
            spec = spec._replace(scale=-spec.scale)
        return spec, t

    def kernels(self, arch: str) -> dict[str, Kernel]:
        """By their names here, all that the backend starts for such calls on such a GPU."""
        target, named, aligned = Target(arch, 132), {}, self.kind != "odd"
        for name, queries in QUERIES.items():
            spec, t = self.inputs(queries)
            out = empty_output(t.query, self.Dv)
            forward = backend.forward_plan(Problem.of("forward", spec, t), target, out.stride(), aligned)
            named |= dict(zip((name, "combine"), (x.kernel for x in forward.launches), strict=False))
            if name == "forward" and t.block_table is None:
                strides = tuple(x.stride() for x in (out, out, *t[:3]))
                has_grad = t.attn_mask is not None and t.attn_mask.is_floating_point()
                mask_sizes = tuple(t.attn_mask.shape) if has_grad else None
                problem, ordered = Problem.of("backward", spec, t), self.kind != "unordered"
                backward = backend.backward_plan(problem, target, strides, mask_sizes, aligned, ordered)
                named |= {_name(x.kernel): x.kernel for x in backward}
        return named


def _name(kernel: Kernel) -> str:
    name = kernel.name.removeprefix("attention_bwd_").removesuffix("_hopper")
    return {1: "dv", 2: "dk", 3: "dkdv"}[kernel.GRADIENTS] if name == "dkdv" else name


class Entry(NamedTuple):
    name: str
    arch: str
    call: Call
    kernel: Kernel

    def __str__(self) -> str:
        return " ".join(map(str, (self.name, self.arch, *self.call)))


def grid() -> list[Entry]:
    """Each kernel for each architecture."""
    kinds = ("plain", "masked", "everything", "paged", "unordered")
    calls = [Call(kind, *dims) for kind in kinds for dims in HEAD_DIMS]
    # Their code differs in what no head dim changes, so one is enough.
    calls += [Call("odd", *HEAD_DIMS[0]), *(Call(kind, *HEAD_DIMS[0], "float16") for kind in kinds[:2])]
    entries: dict[tuple[str, Kernel], Entry] = {}
    for arch, call in itertools.product(ARCHITECTURES, calls):
        for name, kernel in call.kernels(arch).items():
            if name != "tall decode" or call.kind == "plain":  # it differs from a forward in its tiles alone
                entries.setdefault((arch, kernel), Entry(name, arch, call, kernel))
    return list(entries.values())


def quick() -> list[Entry]:
    """One of each name and architecture."""
    first: dict[tuple[str, str], Entry] = {}
    for entry in grid():
        first.setdefault((entry.name, entry.arch), entry)
    return list(first.values())


def measure(entry: Entry) -> dict[str, Any]:
    kernel = entry.kernel
    cubin, log = jit.compile_with_log(kernel.file, kernel.defines, entry.arch)
    code, losses = sass.disassemble(cubin), re.findall(r"\(C\d+\) Potential Performance Loss: .*", log)
    counts = {name: sass.count(code.instructions, name) for name in INSTRUCTIONS}
    return {
        **{"kernel": entry.name, "arch": entry.arch, **entry.call._asdict()},
        **{"registers": code.registers, "spills": sass.spills(code.instructions), "stack": code.stack},
        **{"file": kernel.file, "losses": losses},
        **{"shared": kernel.shared_bytes, "threads": kernel.threads},
        **{"instructions": len(code.instructions), "loop": len(code.loop), "loop_spills": sass.spills(code.loop)},
        **counts,
        **{"wide_copies": sass.count(code.instructions, "LDGSTS", part="128")},
        **kernel.tiles._asdict(),
        **{"BLOCK_D": kernel.BLOCK_D, "BLOCK_DV": kernel.BLOCK_DV},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one entry of each kernel and architecture")
    parser.add_argument("--only", default="", help="entries whose name matches this regular expression")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    entries = [entry for entry in (quick() if arguments.quick else grid()) if re.search(arguments.only, str(entry))]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC holds no lock of Python's
        cells = list(pool.map(measure, entries))
    store.save(arguments.out, {"nvrtc": ".".join(map(str, jit.nvrtc_version()))}, cells)
    print(f"{len(cells)} entries: {arguments.out}")


if __name__ == "__main__":
    main()
