"""``python -m pyattn info | compare``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import pyattn
from pyattn import compare, dispatch, measure

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyattn", description="pyattn on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, CPU, GPU, and which backends can run here")
    _add_compare(commands.add_parser("compare", help="pyattn, naive attention and torch SDPA side by side"))
    args = parser.parse_args(argv)
    if args.command == "info":
        print(info())
        return 0
    try:
        return _compare(args)
    except (ModuleNotFoundError, ValueError) as error:
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


# ---- compare -----------------------------------------------------------------------------------------------


def _add_compare(parser: argparse.ArgumentParser) -> None:
    default = compare.Workload()
    lengths = "default " + ",".join(map(str, default.lengths))
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype_name)
    parser.add_argument("--lengths", type=_lengths, default=default.lengths, metavar="N,N", help=lengths)
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
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def _compare(args: argparse.Namespace) -> int:
    compare.require_extra("rich", *(["matplotlib"] if args.out else []))
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
