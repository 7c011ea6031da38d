"""Measures tiles of the Triton kernels on this GPU, and writes the fastest to ``pyattn/tuning/<arch>.json``.

    python benchmarks/tune.py
    python benchmarks/tune.py --ops forward,decode --head-dims 64,128

The only writer of these tables. An entry must beat what is there by more than the noise: by 3% in the median of paired
ratios. Candidates that do not fit the GPU drop out; a candidate that computes something else is an error. Kernels are
compiled first, by as many processes as there are cores. float16 and bfloat16 take the same instructions, registers and
memory: what is measured in bfloat16 is written for both.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import triton

import pyattn
from pyattn import measure, tuning
from pyattn.backends import triton as backend
from pyattn.kernels.launch import SPLIT, Tiles

TOKENS, WIDTH = 16384, 2048
LENGTH = 4096
GAIN = 1.03
CANDIDATES = {  # BLOCK_M, BLOCK_N, num_warps: the numbers of stages
    "forward": {
        (128, 128, 8): (2, 3), (128, 64, 8): (2, 3, 4), (128, 32, 8): (2, 4), (128, 64, 4): (2, 3), (128, 128, 4): (2,),
        (64, 128, 4): (2, 3), (64, 64, 4): (2, 3), (64, 32, 4): (2, 3),
    },
    "decode": {(16, 32, 4): (3, 4), (16, 64, 4): (2, 3, 4), (16, 128, 4): (2, 3), (16, 128, 8): (2, 3)},
    "dkdv": {
        (128, 128, 8): (1, 2), (64, 128, 8): (2, 3), (32, 128, 8): (2, 3, 4), (64, 128, 4): (1, 2),
        (32, 128, 4): (2, 3), (64, 64, 4): (2, 3), (32, 64, 4): (2, 3), (16, 64, 4): (2,),
    },
    "dq": {
        (128, 128, 8): (1, 2), (128, 64, 8): (2, 3), (128, 32, 8): (2, 3, 4), (128, 64, 4): (2,), (64, 128, 4): (1, 2),
        (64, 64, 4): (2, 3), (64, 32, 4): (2, 3),
    },
}  # fmt: skip
SPLITS = (512, 1024)


class Subject(NamedTuple):
    """What an entry of the table is for."""

    op: str
    head_dim: int
    causal: bool


def candidates(op: str) -> list[Tiles]:
    tiles = [
        Tiles(*shape, n, SPLIT if op == "decode" else 0) for shape, stages in CANDIDATES[op].items() for n in stages
    ]
    return [t._replace(SPLIT=split) for t in tiles for split in SPLITS] if op == "decode" else tiles


def workload(subject: Subject, tokens: int = TOKENS) -> Callable[[], Any]:
    """A call in which the kernel takes most of the time, or all of it."""
    op, head_dim, causal = subject
    heads, length = WIDTH // head_dim, 32768 if op == "decode" else LENGTH
    shape = (-(-tokens // LENGTH), heads, min(length, tokens), head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    if op == "decode":
        q = q[:, :, :1].contiguous()
    if op in ("forward", "decode"):
        return lambda: pyattn.attention(q, k, v, causal=causal, backend="triton")
    for x in (q, k, v):
        x.requires_grad_()
    out = pyattn.attention(q, k, v, causal=causal, backend="triton")
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)


def compile_kernel(subject: Subject, tiles: Tiles) -> None:
    """Fills Triton's cache on disk: sizes are no part of a compiled kernel."""
    with contextlib.suppress(triton.runtime.errors.OutOfResources), backend.use_tiles(**{subject.op: tiles}):
        workload(subject, tokens=2048)()


def flat(result: Any) -> torch.Tensor:
    return torch.cat([x.flatten() for x in (result if isinstance(result, tuple) else (result,))]).float()


def fastest(subject: Subject, now: Tiles) -> tuple[Tiles, float]:
    """The best candidate, and how many times as fast as ``now`` it is."""
    call = workload(subject)

    def under(tiles: Tiles) -> Callable[[], Any]:
        def run() -> Any:
            with backend.use_tiles(**{subject.op: tiles}):
                return call()

        return run

    right = flat(under(now)())
    best, gain = now, 1.0
    for tiles in candidates(subject.op):
        try:
            result = flat(under(tiles)())
            torch.cuda.synchronize()
        except triton.runtime.errors.OutOfResources:
            continue
        error = float((result - right).abs().max() / right.abs().max())
        if not error < 0.02:
            sys.exit(f"tune: {subject} with {tiles} computes something else: relative error {error:.2g}")
        ratio = measure.alternate({"best": under(best), "new": under(tiles)}, rounds=3, min_time=0, cuda=True)
        if ratio.ratio("best", "new") > GAIN:
            best = tiles
    if best != now:
        gain = measure.alternate({"now": under(now), "best": under(best)}, rounds=7, min_time=0, cuda=True)
        return best, gain.ratio("now", "best")
    return best, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(CANDIDATES))
    parser.add_argument("--head-dims", default="64,128,256")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune: torch finds no GPU; nothing was measured")
    arch = backend.arch(torch.device("cuda", torch.cuda.current_device()))
    version = ".".join(triton.__version__.split(".")[:2])
    path = tuning.FOLDER / f"{arch}.json"
    table = dict(tuning.table(arch))
    dims = map(int, arguments.head_dims.split(","))
    subjects = [Subject(*x) for x in itertools.product(arguments.ops.split(","), dims, (False, True))]
    start = time.monotonic()
    jobs = [(subject, tiles) for subject in subjects for tiles in candidates(subject.op)]
    with ProcessPoolExecutor(measure.physical_cores(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_kernel, *zip(*jobs, strict=True)))
    print(f"{len(jobs)} kernels compiled in {time.monotonic() - start:.0f} s", flush=True)
    for subject in subjects:
        op, head_dim, causal = subject
        now = backend.tiles_for(op, arch, torch.bfloat16, head_dim, causal, masked=False)
        best, gain = fastest(subject, now)
        print(f"{tuple(subject)}: {best}, {gain:.2f}x of what was", flush=True)
        if gain > GAIN:
            for dtype in ("bfloat16", "float16"):
                table[tuning.key(op, dtype, head_dim, causal, version)] = best._asdict()
            lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(table.items()))
            path.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
