"""The stages of `make gpu`: what only a GPU can tell, each in under ten minutes, with no network.

    make gpu STAGE=check BACKEND=triton
    make gpu STAGE=forward

``check`` runs compute-sanitizer over a few tests and then every test of the backend. ``forward``, ``backward`` and
``decode`` measure: pyattn's backends and their peers take turns with a large matrix product and a copy, whose rates are
the machine's limits; ``projection`` is ``gpu_projection.py``. Each row is saved as soon as it is measured, in
``results/<device>/``; a rerun goes on where it was, and rows that tell most come first.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peers
import store
import torch
from suite import significant
from torch import Tensor

import pyattn
from pyattn import compare, dispatch, measure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TESTS = {"triton": ["tests/test_triton.py", "tests/test_triton_projection.py"], "cuda": ["tests/test_cuda.py"]}
# Their names say of which backend they are.
SHARED_TESTS = ("tests/test_gpu_backends.py", "tests/test_kv_cache_gpu.py")
SANITIZERS = {"triton": ("memcheck",), "cuda": ("memcheck", "racecheck")}
# A test of every kernel, with masks, pages, packed sequences and sizes that fill no tile.
SMOKE = "(test_small or test_case) and (gqa or everything or family)"
TOKENS, WIDTH = 16384, 2048  # B * L and Hq * D
OURS = ("pyattn, cuda", "pyattn, triton")
TOLERANCE = 0.02  # of bfloat16 results: tells a wrong kernel from a rounding one


class Cell(NamedTuple):
    stage: str
    head_dim: int
    length: int  # of the keys
    causal: bool = False
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    num_queries: int | None = None  # None: as many as keys

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value and the gradient of the output."""
        query = (self.batch, self.heads, self.num_queries or self.length, self.head_dim)
        key = (self.batch, self.kv_heads, self.length, self.head_dim)
        q, k, v, grad = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in (query, key, key, query))
        for x in (q, k, v):
            x.requires_grad_(self.stage == "backward")
        return q, k, v, grad


def grid(stage: str) -> list[Cell]:
    if stage == "decode":
        shapes = [(1, 2048), (1, 32768), (16, 4096), (16, 32768), (64, 8192), (128, 2048)]
        one = [
            Cell(stage, head_dim, length, False, batch, group * 8, 8, 1)
            for head_dim, group, (batch, length) in itertools.product((64, 128), (1, 4, 8), shapes)
        ]
        more = itertools.product((64, 128), (1, 16), (16, 32, 128))
        return one + [Cell(stage, head_dim, 32768, True, batch, 32, 8, queries) for head_dim, batch, queries in more]
    cells = itertools.product((4096, 16384, 1024, 2048, 512, 8192), (128, 64, 256), (False, True))
    return [
        Cell(stage, head_dim, length, causal, TOKENS // length, WIDTH // head_dim, WIDTH // head_dim)
        for length, head_dim, causal in cells
    ]


def competitors(cell: Cell) -> list[str]:
    """Compiling FlexAttention takes seconds a shape: it is measured at one."""
    torchs = ["SDPA flash", "SDPA cuDNN", "SDPA efficient"]
    if cell.stage == "decode":
        return [*OURS, *(f"{name}, pages" for name in OURS), *torchs]
    any_order = ["pyattn, cuda, any order"] if cell.stage == "backward" else []
    flex = ["FlexAttention"] if (cell.length, cell.head_dim) == (8192, 128) else []
    return [*OURS, *any_order, *torchs, *flex]


# ---- one row -----------------------------------------------------------------------------------------------


def limits() -> tuple[dict[str, Callable[[], Any]], float, int]:
    """A matrix product and a copy, to take turns with, and the product's operations and the copy's bytes."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, 2.0 * n**3, 2 * source.nbytes


def measure_cell(cell: Cell) -> dict[str, Any]:
    torch.manual_seed(0)
    query, key, value, grad = cell.inputs()
    truth = measure.Truth(query, key, value, grad, causal=cell.causal)
    runs: dict[str, Callable[[], Any]] = {}
    absent, errors = {}, {}
    for name in competitors(cell):
        forward = peers.prepare(name, query, key, value, cell.causal)
        if isinstance(forward, str):
            absent[name] = forward
            continue
        try:
            errors[name] = check(cell, forward, query, key, value, truth)
        except RuntimeError as error:  # a peer that refuses a shape says so only when it is called
            if name.startswith("pyattn"):
                raise
            absent[name] = str(error).strip().splitlines()[0]
            continue
        runs[name] = forward if cell.stage != "backward" else measure.backward_alone(forward, (query, key, value), grad)
    beside, operations, copied = limits()
    times = measure.alternate(runs | beside, rounds=5, min_time=0.3, cuda=True)
    op = "backward" if cell.stage == "backward" else "forward"
    chosen = f"pyattn, {pyattn.explain(query, key, value, causal=cell.causal).chosen[op]}"
    forward_flops = measure.attention_flops(query, key, value, causal=cell.causal)
    both = measure.attention_flops(query, key, value, causal=cell.causal, backward=True)
    flops = both - forward_flops if cell.stage == "backward" else forward_flops
    read = (query.numel() + 2 * key.numel()) * query.element_size()
    matmul, bandwidth = operations / times.median("matmul"), copied / times.median("copy")
    rates = {name: flops / times.median(name) for name in runs}
    read_rates = {name: read / times.median(name) for name in runs}
    return (
        cell._asdict()
        | {"dtype": "bfloat16", "rounds": len(times.samples["matmul"])}
        | {"microseconds": {name: significant(times.median(name) * 1e6) for name in times.samples}}
        | {"tflops": {name: significant(rate / 1e12) for name, rate in rates.items()}}
        | {"gb_per_second": {name: significant(rate / 1e9) for name, rate in read_rates.items()}}
        | {"chosen": chosen}
        | {"speedup": {name: significant(times.ratio(name, chosen)) for name in runs if name not in OURS}}
        | {"percent_of_matmul": {name: round(100 * rate / matmul, 1) for name, rate in rates.items()}}
        | {"percent_of_copy": {name: round(100 * rate / bandwidth, 1) for name, rate in read_rates.items()}}
        | {"matmul_tflops": significant(matmul / 1e12), "copy_gb_per_second": significant(bandwidth / 1e9)}
        | {"max_error": {name: significant(error, 2) for name, error in errors.items()}, "absent": absent}
    )


def check(cell: Cell, forward: Any, query: Tensor, key: Tensor, value: Tensor, truth: measure.Truth) -> float:
    """The largest error, relative to the largest value, of outputs and gradients."""
    inputs = (query, key, value)
    results = measure.forward_backward(forward, inputs, truth.grad)() if query.requires_grad else (forward(),)
    of_out, of_gradients = truth.errors(*results)
    error = of_out / truth.out.abs().max().item()
    if of_gradients is not None:
        error = max(error, of_gradients / max(x.abs().max().item() for x in truth.gradients))
    assert error < TOLERANCE, f"{cell}: relative error {error:.2g}"
    return error


# ---- the stages --------------------------------------------------------------------------------------------


def run_check(backend: str) -> None:
    """compute-sanitizer on a few tests, then all tests.

    torch's caching of memory would hide what lies beyond a tensor. Triton's barriers are its compiler's: races are
    looked for in kernels that place their own.
    """
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        sys.exit("gpu: compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    smoke = [*pytest, "-x", "-k", SMOKE, TESTS[backend][0]]
    # Most of the time is the compiler's: with pytest-xdist it has every core.
    parallel = ["-n", str(measure.physical_cores())] if importlib.util.find_spec("xdist") else []
    commands = [
        *([sanitizer, "--tool", tool, "--error-exitcode", "1", *smoke] for tool in SANITIZERS[backend]),
        [*pytest, *parallel, "-k", backend, *TESTS[backend], *SHARED_TESTS],
    ]
    for command in commands:
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if command[0] == sanitizer else {}
        print("gpu:", " ".join(command), flush=True)
        if code := subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode:
            sys.exit(code)


def run_measurements(stage: str, folder: Path, seconds: float) -> None:
    start = time.monotonic()
    environment = compare.environment() | {"command": f"make gpu STAGE={stage}"}
    if importlib.util.find_spec("triton"):
        environment["triton"] = importlib.metadata.version("triton")
    environment["device"] = re.sub(r"\W+", "-", str(environment["gpu"]).lower())
    path = folder / environment["device"] / f"gpu_{stage}.json"
    rows = {Cell(**{name: row[name] for name in Cell._fields}): row for row in finished(path, environment)}
    # Rows that were measured when there were fewer competitors are measured again.
    rows = {cell: row for cell, row in rows.items() if {*competitors(cell)} <= {*row["microseconds"], *row["absent"]}}
    known, cells = set(rows), list(rows.values())
    for cell in grid(stage):
        if cell in known:
            continue
        if time.monotonic() - start > seconds:
            print(f"gpu: stopped after {seconds:g} s; the same command goes on from here")
            break
        cells.append(measure_cell(cell))
        environment["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        store.save(path, environment, cells)
        row = cells[-1]
        times = ", ".join(f"{name} {rate:.0f}" for name, rate in row["microseconds"].items())
        print(f"{' '.join(map(str, cell))}: us {times}; % of a matmul {row['percent_of_matmul']}", flush=True)
        torch.cuda.empty_cache()
    print(f"gpu: {path}")


def finished(path: Path, environment: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run on the same device with the same versions; others are measured again."""
    if not path.exists():
        return []
    old = json.loads(path.read_text())
    same = all(old["environment"].get(name) == environment[name] for name in ("gpu", "torch", "pyattn"))
    return old["cells"] if same else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, choices=("check", "forward", "backward", "decode", "projection"))
    parser.add_argument("--backend", choices=sorted(TESTS), help="of the check: default both")
    parser.add_argument("--seconds", type=float, default=540, help="start no row later than this")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu: torch finds no GPU (torch.cuda.is_available() is False); nothing was run")
    for backend in [arguments.backend] if arguments.backend else sorted(TESTS):
        if reasons := dispatch.load(backend).unavailable():
            sys.exit(f"gpu: backend {backend}: {'; '.join(reasons)}")
        if arguments.stage == "check":
            run_check(backend)
    if arguments.stage == "projection":
        import gpu_projection  # which imports this

        gpu_projection.run(arguments.results, arguments.seconds)
    elif arguments.stage != "check":
        run_measurements(arguments.stage, arguments.results, arguments.seconds)


if __name__ == "__main__":
    main()
