"""Measures tiles of the Triton kernels on this GPU, and writes the fastest to ``pyattn/tuning/<arch>.json``.

    python benchmarks/tune.py
    python benchmarks/tune.py --ops forward,decode --head-dims 64,128

The only writer of these tables. An entry must beat what is there by more than the noise: by 3% in the median of paired
ratios. Candidates that do not fit the GPU drop out; a candidate that computes something else is an error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton

import pyattn
from pyattn import measure, tuning
from pyattn.backends import triton as backend
from pyattn.kernels.launch import SPLIT, Tiles

OPS = ("forward", "decode", "dkdv", "dq")
TOKENS, WIDTH = 16384, 2048
LENGTH = 4096
GAIN = 1.03
BLOCKS = {  # BLOCK_M, BLOCK_N
    "forward": [(128, 128), (128, 64), (128, 32), (64, 128), (64, 64), (64, 32)],
    "decode": [(16, 32), (16, 64), (16, 128)],
    "dkdv": [(128, 128), (64, 128), (32, 128), (16, 128), (64, 64), (32, 64), (16, 64), (64, 32), (32, 32)],
    "dq": [(128, 128), (128, 64), (128, 32), (64, 64), (64, 32), (32, 32)],
}
SPLITS = (256, 512, 1024)


def candidates(op: str) -> list[Tiles]:
    shapes = itertools.product(BLOCKS[op], (4, 8), (1, 2, 3, 4))
    tiles = [Tiles(*blocks, warps, stages, SPLIT if op == "decode" else 0) for blocks, warps, stages in shapes]
    return [t._replace(SPLIT=split) for t in tiles for split in SPLITS] if op == "decode" else tiles


def workload(op: str, dtype: torch.dtype, head_dim: int, causal: bool) -> Callable[[], Any]:
    """A call in which the kernel takes most of the time, or all of it."""
    heads, length = WIDTH // head_dim, 32768 if op == "decode" else LENGTH
    shape = (TOKENS // LENGTH, heads, length, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    if op == "decode":
        q = q[:, :, :1].contiguous()
    if op in ("forward", "decode"):
        return lambda: pyattn.attention(q, k, v, causal=causal, backend="triton")
    for x in (q, k, v):
        x.requires_grad_()
    out = pyattn.attention(q, k, v, causal=causal, backend="triton")
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)


def flat(result: Any) -> torch.Tensor:
    return torch.cat([x.flatten() for x in (result if isinstance(result, tuple) else (result,))]).float()


def fastest(op: str, dtype: torch.dtype, head_dim: int, causal: bool, now: Tiles) -> tuple[Tiles, float]:
    """The best candidate, and how many times as fast as ``now`` it is."""
    call = workload(op, dtype, head_dim, causal)

    def under(tiles: Tiles) -> Callable[[], Any]:
        def run() -> Any:
            with backend.use_tiles(**{op: tiles}):
                return call()

        return run

    right = flat(under(now)())
    best, gain = now, 1.0
    for tiles in candidates(op):
        try:
            result = flat(under(tiles)())
            torch.cuda.synchronize()
        except triton.runtime.errors.OutOfResources:
            continue
        error = float((result - right).abs().max() / right.abs().max())
        if not error < 0.02:
            sys.exit(f"tune: {op} with {tiles} computes something else: relative error {error:.2g}")
        ratio = measure.alternate({"best": under(best), "new": under(tiles)}, rounds=3, min_time=0.1, cuda=True)
        if ratio.ratio("best", "new") > GAIN:
            best = tiles
    if best != now:
        gain = measure.alternate({"now": under(now), "best": under(best)}, rounds=7, cuda=True).ratio("now", "best")
    return best, gain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--head-dims", default="64,128,256")
    parser.add_argument("--dtypes", default="bfloat16,float16")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune: torch finds no GPU; nothing was measured")
    arch = backend.arch(torch.device("cuda", torch.cuda.current_device()))
    version = ".".join(triton.__version__.split(".")[:2])
    path = tuning.FOLDER / f"{arch}.json"
    table = dict(tuning.table(arch))
    for op, dim, name, causal in itertools.product(
        arguments.ops.split(","), map(int, arguments.head_dims.split(",")), arguments.dtypes.split(","), (False, True)
    ):
        dtype = getattr(torch, name)
        now = backend.tiles_for(op, arch, dtype, dim, causal, masked=False)
        best, gain = fastest(op, dtype, dim, causal, now)
        key = tuning.key(op, name, dim, causal, version)
        print(f"{key}: {best}, {gain:.2f}x of what was", flush=True)
        if gain > GAIN:
            table[key] = best._asdict()
            lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(table.items()))
            path.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
