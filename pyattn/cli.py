"""``python -m pyattn info | compare | precompile``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import pyattn
from pyattn import checks, compare, dispatch, jit, measure, precompile
from pyattn.backends import cuda

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyattn", description="pyattn on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, CPU, GPU, and which backends can run here")
    _add_compare(commands.add_parser("compare", help="pyattn, naive attention and torch SDPA side by side"))
    about = "compile the CUDA kernels of common calls beforehand, on any machine"
    more = (
        f"No GPU is needed. {precompile.CONTENTS} {precompile.REST} The cache serves this version of pyattn and NVRTC."
    )
    _add_precompile(commands.add_parser("precompile", help=about, description=more))
    args = parser.parse_args(argv)
    if args.command == "info":
        print(info())
        return 0
    try:
        return {"compare": _compare, "precompile": _precompile}[args.command](args)
    except (ModuleNotFoundError, ValueError, jit.CacheWarning, jit.CompileError) as error:
        parser.exit(2, f"{parser.prog} {args.command}: {error}\n")


# ---- info --------------------------------------------------------------------------------------------------


def info() -> str:
    """One line a fact."""
    machine = measure.machine()
    facts = [
        ("pyattn", pyattn.__version__),
        ("torch", machine["torch"]),
        ("triton", _installed("triton")),
        ("python", f"{machine['python']}, {machine['system']}"),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads for torch"),
        ("CPU kernels", _isa()),
        ("GPU", machine["gpu"] or "none that torch can use"),
        ("NVRTC", "; ".join(jit.unavailable()) or _nvrtc()),
        ("CUDA cache", str(jit.cache_folder())),
    ]
    for name in sorted({name for names in dispatch.ORDER.values() for name in names}):
        reasons = dispatch.load(name).unavailable()
        facts.append((f"backend {name}", f"no: {'; '.join(reasons)}" if reasons else "usable"))
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts)


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _isa() -> str:
    cpu: Any = dispatch.load("cpu")
    if reasons := cpu.unavailable():
        return f"none: {'; '.join(reasons)}"
    return f"{cpu.isa()} (this CPU can run {', '.join(cpu.available_isas())}; PYATTN_CPU_ISA forces one)"


def _nvrtc() -> str:
    return ".".join(map(str, jit.nvrtc_version()))


# ---- compare -----------------------------------------------------------------------------------------------


def _add_compare(parser: argparse.ArgumentParser) -> None:
    default = compare.Workload()
    lengths = "default " + ",".join(map(str, default.lengths))
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype_name)
    parser.add_argument("--lengths", type=_positives, default=default.lengths, metavar="N,N", help=lengths)
    for name in ("batch", "heads", "head_dim"):
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=_positive, default=getattr(default, name), help="default %(default)s")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--backward", action="store_true", help="measure forward and backward together")
    parser.add_argument("--threads", type=_positive, help="default: torch's own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default.device)
    parser.add_argument("--out", type=Path, metavar="DIR", help="save a plot there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the numbers there")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)


def _positives(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def _compare(args: argparse.Namespace) -> int:
    checks.require_extra("compare", "rich", *(["matplotlib"] if args.out else []))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no usable GPU")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if args.threads:
        torch.set_num_threads(args.threads)
    workload = compare.Workload(
        dtype=DTYPES[args.dtype],
        **{name: getattr(args, name) for name in ("lengths", "batch", "heads", "head_dim")},
        **{name: getattr(args, name) for name in ("causal", "backward", "device")},
    )
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    # A bar that redraws itself would take turns with what is being timed: it is redrawn between steps only.
    with Progress(*columns, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=compare.steps(workload), completed=-1)  # a step begun is not done

        def show(step: str) -> None:
            bar.update(task, advance=1, description=step, refresh=True)

        result = compare.compare(workload, show)
    compare.print_table(result)
    if args.out:
        print(f"plot: {compare.save_plot(result, args.out)}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result.to_json(), indent=1) + "\n")
        print(f"numbers: {args.json}")
    return 0


# ---- precompile --------------------------------------------------------------------------------------------


def _add_precompile(parser: argparse.ArgumentParser) -> None:
    archs = "of the GPUs, such as sm_80 (A100) or sm_90a (H100)"
    dims = "default %(default)s; 192:128 is a head dim of 192 with values of 128"
    parser.add_argument("--arch", type=_parts, required=True, metavar="A,A", help=archs)
    parser.add_argument("--head-dims", type=_head_dims, default="64,128", metavar="D,D", help=dims)
    parser.add_argument("--dtypes", type=_dtypes, default="bfloat16", metavar="T,T", help="default %(default)s")
    parser.add_argument("--page-sizes", type=_positives, default=(), metavar="N,N", help="in keys; default: none")
    jobs = "kernels compiled at a time, default %(default)s"
    parser.add_argument("--jobs", type=_positive, default=len(measure.usable_cpus()), help=jobs)


def _parts(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split(",")))


def _dtypes(text: str) -> tuple[torch.dtype, ...]:
    names = ("bfloat16", "float16")
    if not set(_parts(text)) <= set(names):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(names)}, got {text!r}")
    return tuple(DTYPES[name] for name in _parts(text))


def _head_dims(text: str) -> tuple[tuple[int, int], ...]:
    """Pairs of D and Dv."""
    pairs = []
    for part in _parts(text):
        D, colon, Dv = part.partition(":")
        pairs.append((_positive(D), _positive(Dv if colon else D)))
        if max(pairs[-1]) > cuda.MAX_HEAD_DIM:
            raise argparse.ArgumentTypeError(f"must be at most {cuda.MAX_HEAD_DIM}, got {part!r}")
    return tuple(pairs)


def _precompile(args: argparse.Namespace) -> int:
    if reasons := jit.unavailable():
        raise ModuleNotFoundError("; ".join(reasons))
    archs = precompile.archs()
    if unknown := [arch for arch in args.arch if arch not in archs]:
        raise ValueError(f"--arch must be of {', '.join(archs)}, got {', '.join(unknown)}")
    work = [
        (kernel, arch)
        for arch in args.arch
        for kernel in precompile.kernels(arch, args.dtypes, args.head_dims, args.page_sizes)
    ]
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error", jit.CacheWarning)  # without a cache, nothing would come of it
        missing = [(kernel, arch) for kernel, arch in work if not jit.kept(kernel.file, kernel.defines, arch)]
        total = len(missing)
        print(precompile.CONTENTS)
        print(f"{len(work)} kernels, {len(work) - total} of them compiled before", flush=True)
        for i, (kernel, arch, seconds) in enumerate(precompile.fill(missing, args.jobs), 1):
            print(f"{i:>{len(str(total))}}/{total} {arch} {precompile.describe(kernel)}: {seconds:.1f} s", flush=True)
    print(f"{total} kernels compiled by NVRTC {_nvrtc()} in {time.perf_counter() - start:.1f} s, {args.jobs} at a time")
    print(f"cache: {jit.cache_folder()}")
    print(precompile.REST)
    return 0
