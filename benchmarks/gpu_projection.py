"""Projections on a GPU: the Triton backend's two ways beside what model code does, and beside the product alone.

    python benchmarks/gpu_projection.py --seconds 90          # to results/<device>/gpu_triton_projection.json
    python benchmarks/gpu_projection.py --seconds 60 --tiles  # the fused product in several tiles, to ..._tiles.json

Each row is checked against float64 on some tokens, measured in turns, and saved at once. "eager" is F.linear, RMSNorm
and rotary in torch on views of its output; without these two it is F.linear and copies to the layout that the others
write. "linear" is F.linear alone, which is a floor for "split" and no floor for "fused".
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import gpu
import store
import torch
import torch.nn.functional as F
from suite import significant
from torch import Tensor

import pyattn
from pyattn import compare, measure
from pyattn.backends.triton import projection as backend

TOKENS_A_SAMPLE = 2048
SAMPLED = 24  # tokens that are checked
TOLERANCE = 0.02  # of bfloat16 results, relative to the largest: tells a wrong kernel from a rounding one
WAYS = ("fused", "split")


class Row(NamedTuple):
    op: str  # "forward", "both" (with its backward) or "rotary"
    tokens: int
    width: int  # E
    heads: int
    kv_heads: int
    head_dim: int
    epilogue: bool  # RMSNorm of q and k, and rotary
    interleaved: bool = False


def grid() -> list[Row]:
    """What matters most comes first: time may run out."""
    rows = [Row("forward", tokens, E, E // 128, E // 128, 128, True) for E in (2048, 4096, 1024)
            for tokens in (4096, 16384, 512)]  # fmt: skip
    rows += [
        Row("forward", 4096, 4096, 32, 8, 128, True),
        Row("forward", 4096, 2048, 32, 32, 64, True),
        Row("both", 4096, 2048, 16, 16, 128, True),
        Row("both", 16384, 2048, 16, 16, 128, True),
        Row("rotary", 16384, 2048, 16, 16, 128, True),
        Row("rotary", 16384, 2048, 16, 16, 128, True, True),
        Row("forward", 16, 2048, 16, 16, 128, True),
        Row("forward", 4096, 2048, 16, 16, 128, True, True),
    ]
    rows += [row._replace(epilogue=False) for row in rows[:9]]
    return rows


class Inputs:
    """The tensors of a row, and the calls that compete."""

    def __init__(self, row: Row) -> None:
        torch.manual_seed(0)
        self.row = row
        self.B = max(1, row.tokens // TOKENS_A_SAMPLE)
        self.L = row.tokens // self.B
        D, H = row.head_dim, row.heads + 2 * row.kv_heads

        def tensor(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        self.x = tensor(self.B, self.L, row.width)
        self.weight = tensor(H * D, row.width) * row.width**-0.5
        self.norms = [1 + 0.1 * tensor(D) for _ in range(2)] if row.epilogue else []
        angles = torch.outer(torch.arange(self.L), 1e4 ** -torch.linspace(0, 1, D // 2 + 1)[:-1]).cuda()
        self.rotary = pyattn.Rotary(angles.cos(), angles.sin(), row.interleaved)
        repeat = torch.repeat_interleave if row.interleaved else lambda x, n, dim: torch.cat([x] * n, dim)
        self.tables = [repeat(table, 2, -1).bfloat16() for table in self.rotary[:2]]  # as model code keeps them
        self.heads = [tensor(self.B, n, self.L, D) for n in (row.heads, row.kv_heads, row.kv_heads)]  # or gradients
        for x in self.leaves:
            x.requires_grad_(row.op == "both")

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.weight, *self.norms]

    def fused(self, x: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
        """Through pyattn, also in float64."""
        x = self.x if x is None else x
        weight, *norms = (leaf.to(x.dtype) for leaf in self.leaves[1:])
        if norms:
            options |= {"rotary": self.rotary, "q_norm": norms[0], "k_norm": norms[1]}
        return pyattn.qkv_projection(x, weight, num_heads=self.row.heads, num_kv_heads=self.row.kv_heads, **options)

    def eager(self) -> tuple[Tensor, ...]:
        row = self.row
        y = F.linear(self.x, self.weight).view(self.B, self.L, -1, row.head_dim).transpose(1, 2)
        q, k, v = y.split([row.heads, row.kv_heads, row.kv_heads], 1)
        if not self.norms:
            return q.contiguous(), k.contiguous(), v.contiguous()
        q, k = (F.rms_norm(x, (row.head_dim,), norm, 1e-6) for x, norm in zip((q, k), self.norms, strict=True))
        return self.turned(q), self.turned(k), v

    def turned(self, x: Tensor) -> Tensor:
        cos, sin = self.tables
        if self.row.interleaved:
            other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        else:
            a, b = x.chunk(2, -1)
            other = torch.cat((-b, a), -1)
        return x * cos + other * sin

    def runs(self) -> dict[str, Callable[[], Any]]:
        q, k, _ = self.heads
        if self.row.op == "rotary":
            copies = [torch.empty_like(x) for x in (q, k)]
            return {
                "fused": lambda: pyattn.apply_rotary(q, k, self.rotary, backend="triton"),
                "eager": lambda: (self.turned(q), self.turned(k)),
                "copy": lambda: (copies[0].copy_(q), copies[1].copy_(k)),
            }

        def forced(way: str) -> Callable[[], Any]:
            def run() -> tuple[Tensor, ...]:
                with backend.use(way):
                    return self.fused(backend="triton")

            return run

        calls = {**{way: forced(way) for way in WAYS}, "eager": self.eager}
        grad = torch.empty(self.B, self.L, self.weight.shape[0], device="cuda", dtype=torch.bfloat16)
        linear = lambda: (F.linear(self.x, self.weight),)  # noqa: E731
        if self.row.op == "forward":
            return {**calls, "linear": linear}

        def both(call: Callable[[], Any], leaves: list[Tensor], grads: list[Tensor]) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(call(), leaves, grads)

        timed = {name: both(call, self.leaves, self.heads) for name, call in calls.items()}
        return {**timed, "linear": both(linear, self.leaves[:2], [grad])}


def error(inputs: Inputs, name: str) -> float:
    """The largest error of the run ``name`` on some tokens, relative to the largest value there, against float64."""
    row = inputs.row
    tokens = torch.linspace(0, inputs.L - 1, min(SAMPLED, inputs.L)).long().cuda()
    sampled = {"positions": tokens} if row.epilogue else {}
    if row.op == "rotary":
        q, k, _ = (x[:, :, tokens].double() for x in inputs.heads)
        truth = pyattn.apply_rotary(q, k, inputs.rotary, tokens)
        return max(relative(out[:, :, tokens], true) for out, true in zip(inputs.runs()[name](), truth, strict=True))
    x = inputs.x.detach()[-1:, tokens].double().requires_grad_(row.op == "both")
    truth = inputs.fused(x, **sampled, backend="reference")
    if row.op == "forward":
        return max(relative(out[-1:, :, tokens], true) for out, true in zip(inputs.runs()[name](), truth, strict=True))
    # Gradients of a loss that reads those tokens only.
    given = inputs.heads
    inputs.heads = [torch.zeros_like(grad) for grad in given]
    for some, grad in zip(inputs.heads, given, strict=True):
        some[-1:, :, tokens] = grad[-1:, :, tokens]
    true = torch.autograd.grad(truth, [x, *inputs.leaves[1:]], [grad[-1:, :, tokens].double() for grad in given])
    found = inputs.runs()[name]()
    inputs.heads = given
    return max(relative(a, b) for a, b in zip((found[0][-1:, tokens], *found[1:]), true, strict=True))


def relative(found: Tensor, truth: Tensor) -> float:
    return measure.max_error(found, truth) / truth.abs().max().item()


def measure_row(row: Row) -> dict[str, Any]:
    inputs = Inputs(row)
    runs = inputs.runs()
    ours = [name for name in WAYS if name in runs]
    errors = {}
    for name in ours:
        errors[name] = error(inputs, name)
        assert errors[name] < TOLERANCE, f"{row}, {name}: relative error {errors[name]:.2g}"
    times = measure.alternate(runs, rounds=5, min_time=0.0, cuda=True)
    best = min(ours, key=times.median)
    moved = 2 * sum(x.nbytes for x in inputs.heads[:2])
    flops = 2.0 * row.tokens * inputs.weight.numel() * (3 if row.op == "both" else 1)
    rate = (
        {"gb_per_second": {name: significant(moved / times.median(name) / 1e9) for name in runs}}
        if row.op == "rotary"
        else {"tflops": {name: significant(flops / times.median(name) / 1e12) for name in runs}}
    )
    floor = "copy" if row.op == "rotary" else "linear"
    return (
        row._asdict()
        | {"dtype": "bfloat16", "backend": "triton", "best": best, "rounds": len(times.samples[best])}
        | {"microseconds": {name: significant(times.median(name) * 1e6) for name in runs}}
        | rate
        | {"speedup": {f"{name} over eager": significant(times.ratio("eager", name)) for name in ours}}
        | {f"percent_of_{floor}": {name: round(100 * times.ratio(floor, name), 1) for name in ours}}
        | {"max_error": {name: significant(value, 2) for name, value in errors.items()}}
    )


# ---- tiles of the fused product ----------------------------------------------------------------------------

TILES = [
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (128, 128, 128, 8, 2),
    (256, 128, 64, 8, 3), (64, 256, 64, 8, 4), (64, 128, 64, 4, 4), (64, 128, 128, 4, 3), (64, 64, 64, 4, 5),
]  # fmt: skip
SHAPES = [(4096, 2048), (16384, 2048), (16384, 4096), (512, 2048), (512, 4096)]


def measure_tiles(size: tuple[int, ...]) -> Iterable[dict[str, Any]]:
    """The fused product in these tiles beside torch's product, for each of ``SHAPES``."""
    tiles = backend.kernels.ProjectionTiles(*size)
    for tokens, E in SHAPES:
        inputs = Inputs(Row("forward", tokens, E, E // 128, E // 128, 128, True))
        with backend.use("fused", tiles):
            runs = {name: inputs.runs()[name] for name in ("fused", "linear")}
            times = measure.alternate(runs, rounds=5, min_time=0.0, cuda=True)
        flops = 2.0 * tokens * inputs.weight.numel()
        yield tiles._asdict() | {
            "tokens": tokens,
            "width": E,
            "microseconds": {name: significant(times.median(name) * 1e6) for name in runs},
            "tflops": {name: significant(flops / times.median(name) / 1e12) for name in runs},
            "percent_of_linear": round(100 * times.ratio("linear", "fused"), 1),
        }


# ---- the stage ---------------------------------------------------------------------------------------------


def environment(command: str) -> dict[str, Any]:
    import triton

    found = compare.environment() | {"command": command, "triton": triton.__version__}
    return found | {"device": re.sub(r"\W+", "-", str(found["gpu"]).lower())}


def save(path: Path, about: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    about["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    store.save(path, about, cells)


def run(folder: Path, budget_seconds: float) -> Path:
    """Measures rows until the time is over; a rerun goes on where it was. Returns where they are."""
    start = time.monotonic()
    about = environment(f"python benchmarks/gpu_projection.py --seconds {budget_seconds:g}")
    path = folder / about["device"] / "gpu_triton_projection.json"
    cells = gpu.finished(path, about)
    known = {Row(**{name: cell[name] for name in Row._fields}) for cell in cells}
    for row in grid():
        if row in known:
            continue
        if time.monotonic() - start > budget_seconds:
            print(
                f"gpu: the {budget_seconds:g} s are over, {len(cells)} of {len(grid())} rows are measured", flush=True
            )
            break
        cells.append(measure_row(row))
        save(path, about, cells)
        print(f"{time.monotonic() - start:5.1f} s  {' '.join(map(str, row))}: {cells[-1]['microseconds']}", flush=True)
    return path


def run_tiles(folder: Path, budget_seconds: float) -> Path:
    """The same for tiles of the fused product."""
    start = time.monotonic()
    about = environment(f"python benchmarks/gpu_projection.py --tiles --seconds {budget_seconds:g}")
    path = folder / about["device"] / "gpu_triton_projection_tiles.json"
    cells: list[dict[str, Any]] = []
    for size in TILES:
        if time.monotonic() - start > budget_seconds:
            print(f"gpu: the {budget_seconds:g} s are over before tiles of {size}", flush=True)
            break
        for cell in measure_tiles(size):
            cells.append(cell)
            save(path, about, cells)
            print(f"{time.monotonic() - start:5.1f} s  {size} {cell['tokens']} x {cell['width']}: {cell['tflops']}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=gpu.RESULTS, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=90.0, help="no row starts after so many")
    parser.add_argument("--tiles", action="store_true", help="measure tiles of the fused product instead")
    arguments = parser.parse_args()
    if arguments.seconds <= 0:
        parser.error(f"--seconds must be positive, got {arguments.seconds}")
    if not torch.cuda.is_available():
        sys.exit("gpu: torch finds no GPU (torch.cuda.is_available() is False); nothing was run")
    if reasons := backend.unavailable():
        sys.exit(f"gpu: backend triton: {'; '.join(reasons)}")
    print(f"gpu: {(run_tiles if arguments.tiles else run)(arguments.results, arguments.seconds)}")


if __name__ == "__main__":
    main()
