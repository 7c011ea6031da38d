"""pyattn, naive attention and torch's SDPA side by side: the measurement, its table and its plot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyattn
from pyattn import dispatch, functional, measure
from pyattn.integrations import sdpa as takeover

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]  # query, key, value, causal
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # query, key, value and the gradient of the output
IMPLEMENTATIONS: dict[str, Attention] = {
    "pyattn": lambda q, k, v, causal: functional.attention(q, k, v, causal=causal),
    "torch SDPA": lambda q, k, v, causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
    "naive": lambda q, k, v, causal: functional.naive_attention(q, k, v, causal=causal),
}
COLORS = {"pyattn": "#0b62c4", "torch SDPA": "#e07b00", "naive": "#7a7a7a"}
WARM_UP_LENGTH = 64


@dataclass(frozen=True)
class Workload:
    """What is compared; every tensor is [batch, heads, length, head_dim]."""

    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    causal: bool = False
    backward: bool = False
    device: str = "cpu"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        what = "forward and backward" if self.backward else "forward"
        causal = ", causal" if self.causal else ""
        shape = f"batch {self.batch}, {self.heads} heads of {self.head_dim}"
        return f"Attention {what}, {self.dtype_name}, {shape}{causal}"


@dataclass
class Cell:
    """One implementation at one length. A skipped cell says why and has no numbers."""

    length: int
    implementation: str
    backend: str | None = None  # of pyattn: who computed it
    skipped: str | None = None
    seconds: float | None = None
    gflops: float | None = None
    speedup: float | None = None  # of pyattn over this implementation: median of paired ratios
    peak_extra_bytes: int | None = None  # None, too, where the system cannot tell
    max_error: float | None = None  # of the output
    max_gradient_error: float | None = None


@dataclass
class Comparison:
    workload: Workload
    environment: dict[str, Any]
    cells: list[Cell]

    def to_json(self) -> dict[str, Any]:
        workload = asdict(self.workload) | {"dtype": self.workload.dtype_name}
        cells = [asdict(cell) for cell in self.cells]
        return {"environment": self.environment, "workload": workload, "cells": cells}

    @property
    def header(self) -> str:
        return f"{self.workload.title}\n{describe(self.environment, self.workload.device)}"


def environment() -> dict[str, Any]:
    """Of what is measured; raises RuntimeError where pyattn would be compared with itself."""
    if takeover.is_installed():
        raise RuntimeError(
            "pyattn stands in the place of torch's SDPA: unset PYATTN_INSTALL, or call pyattn.uninstall()"
        )
    cpu: Any = dispatch.load("cpu")
    isa = None if cpu.unavailable() else cpu.isa()
    return {"pyattn": pyattn.__version__, **measure.machine(), "isa": isa}


def describe(environment: dict[str, Any], device: str = "cpu") -> str:
    """The line without which no number means anything."""
    threads = environment["threads"]
    isa = environment["isa"] or "no native kernels"
    cpu = f"{environment['cpu']}, {isa}, {threads} thread{'s' if threads > 1 else ''}"
    machine = environment["gpu"] if device == "cuda" else cpu
    return f"{machine}, torch {environment['torch']}, pyattn {environment['pyattn']}"


# ---- the measurement ---------------------------------------------------------------------------------------


def steps(workload: Workload) -> int:
    """How many times ``compare`` calls ``progress``."""
    return (len(workload.lengths) + 1) * (len(IMPLEMENTATIONS) + 1) - 1


def compare(workload: Workload, progress: Callable[[str], None] = lambda step: None) -> Comparison:
    """Measure every implementation at every length; ``progress`` hears of each step as it begins."""
    torch.manual_seed(0)
    warm_up(workload, progress)
    cells = [cell for length in workload.lengths for cell in _measure(workload, length, progress)]
    return Comparison(workload, environment(), cells)


def warm_up(workload: Workload, progress: Callable[[str], None] = lambda step: None) -> None:
    """No first measurement shall pay for loading code."""
    inputs = _inputs(workload, WARM_UP_LENGTH)
    for name in IMPLEMENTATIONS:
        progress(f"warm-up: {name}")
        _run(name, inputs, workload)()


def _measure(workload: Workload, length: int, progress: Callable[[str], None]) -> list[Cell]:
    cells = memory_and_error(workload, length, progress)
    inputs = _inputs(workload, length)
    runs = {cell.implementation: _run(cell.implementation, inputs, workload) for cell in cells if not cell.skipped}
    progress(f"length {length}: time, in turns")
    times = measure.alternate(runs, rounds=3, cuda=workload.device == "cuda")
    flops = measure.attention_flops(*inputs[:3], causal=workload.causal, backward=workload.backward)
    for cell in cells:
        if cell.implementation in runs:
            cell.seconds = times.median(cell.implementation)
            cell.gflops = flops / cell.seconds / 1e9
            cell.speedup = times.ratio(cell.implementation, "pyattn") if "pyattn" in runs else None
    return cells


def memory_and_error(
    workload: Workload, length: int, progress: Callable[[str], None] = lambda step: None
) -> list[Cell]:
    """A cell of every implementation, yet without times."""
    inputs = _inputs(workload, length)
    truth = measure.Truth(*inputs, causal=workload.causal)
    sampled = (*inputs[:3], truth.grad)
    cpu: Any = dispatch.load("cpu")
    cells = []
    for name in IMPLEMENTATIONS:
        cell = Cell(length, name)
        cells.append(cell)
        progress(f"length {length}: {name}, memory and error")
        if name == "pyattn":
            chosen = functional.explain(*inputs[:3], causal=workload.causal).chosen.values()
            cell.backend = " + ".join(str(backend) for backend in dict.fromkeys(chosen))
        cell.skipped = _does_not_fit(cell, workload)
        if cell.skipped:
            continue
        run = _run(name, sampled, workload)
        results, cell.peak_extra_bytes = measure.call_and_peak(run, cuda=workload.device == "cuda")
        if cell.backend and "cpu" in cell.backend and cell.peak_extra_bytes is not None:
            # It keeps its scratch from call to call, where the system sees nothing new.
            cell.peak_extra_bytes = max(cell.peak_extra_bytes, cpu.scratch_peak_bytes())
        cell.max_error, cell.max_gradient_error = truth.errors(*results)
    return cells


def _inputs(workload: Workload, length: int) -> Inputs:
    shape = (workload.batch, workload.heads, length, workload.head_dim)
    query, key, value, grad = (torch.randn(shape, device=workload.device).to(workload.dtype) for _ in range(4))
    for x in (query, key, value):
        x.requires_grad_(workload.backward)
    return query, key, value, grad


def _run(name: str, inputs: Inputs, workload: Workload) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives the output and, with backward, the three gradients."""
    query, key, value, grad = inputs

    def forward() -> Tensor:
        return IMPLEMENTATIONS[name](query, key, value, workload.causal)

    if workload.backward:
        return measure.forward_backward(forward, inputs[:3], grad)
    return lambda: (forward(),)


def _does_not_fit(cell: Cell, workload: Workload) -> str | None:
    """Why an implementation that holds whole score matrices cannot run here; None if it can."""
    scores = workload.batch * workload.heads * cell.length**2  # elements; times matrices alive at once, times bytes:
    if cell.implementation == "naive":
        need = scores * (6 if workload.backward else 3) * workload.dtype.itemsize
    elif cell.backend and "reference" in cell.backend:
        need = scores * (12 if workload.backward else 5) * 4  # it computes in float32
    else:
        return None
    free = measure.available_memory(cuda=workload.device == "cuda")
    return f"may need {format_bytes(need)}, {format_bytes(free)} are free" if need > free else None


# ---- the table ---------------------------------------------------------------------------------------------


def print_table(comparison: Comparison) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    errors = ("error", "gradients") if comparison.workload.backward else ("error",)  # seven columns fill a terminal
    for column in ("length", "", "time", "pyattn is", "memory", *errors):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for length in comparison.workload.lengths:
        for cell in (c for c in comparison.cells if c.length == length):
            ours = cell.implementation == "pyattn"
            row = (str(length) if ours else "", cell.implementation, *_columns(cell))
            table.add_row(*row, style="bold" if ours else None)
        table.add_section()
    console = Console(highlight=False)
    console.print(comparison.header, table, _notes(comparison), sep="\n")


def _notes(comparison: Comparison) -> str:
    notes = [f"{c.implementation} at {c.length} was skipped: it {c.skipped}." for c in comparison.cells if c.skipped]
    used = sorted({cell.backend for cell in comparison.cells if cell.backend})
    notes.append(f"pyattn's backend: {', '.join(used)}.")
    notes.append(
        "Times are medians of alternating runs; ratios are taken run by run, then their median. Memory is the peak "
        "above the start, less the results. Errors are the largest against float64, of the output"
        f"{' and of the gradients' if comparison.workload.backward else ''}, computed for at most "
        f"{measure.TRUTH_ROWS} query rows a head and all keys."
    )
    return "\n".join(notes)


def _columns(cell: Cell) -> tuple[str, ...]:
    if cell.skipped or cell.seconds is None:
        return ("skipped",)
    compared = "" if cell.implementation == "pyattn" or cell.speedup is None else format_speedup(cell.speedup)
    errors = [f"{error:.1e}" for error in (cell.max_error, cell.max_gradient_error) if error is not None]
    return format_time(cell.seconds), compared, format_bytes(cell.peak_extra_bytes), *errors


def format_speedup(speedup: float) -> str:
    return f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"


def format_time(seconds: float) -> str:
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    return f"{seconds * scale:.3g} {unit}"


def format_bytes(count: float | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# ---- the plot ----------------------------------------------------------------------------------------------


def save_plot(comparison: Comparison, directory: Path) -> Path:
    """Time and memory against length, both axes logarithmic; the file's name says what was compared."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    workload = comparison.workload
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    _panel(time_axes, comparison, "time of one call (ms)", lambda cell: cell.seconds and cell.seconds * 1e3)
    _panel(memory_axes, comparison, "peak extra memory (MB)", _megabytes)
    time_axes.legend(frameon=False, loc="upper left")
    for cell in comparison.cells:
        if cell.speedup and cell.seconds and cell.implementation != "pyattn":
            time_axes.annotate(
                f"{cell.speedup:.1f}x",
                (cell.length, cell.seconds * 1e3),
                (-2, 6),
                textcoords="offset points",
                ha="right",
                fontsize=8.5,
                color=COLORS[cell.implementation],
            )
    title, machine = comparison.header.split("\n")
    figure.suptitle(title, fontweight="bold")
    note = f"{machine}\nx: pyattn's speed-up, the median of paired ratios"
    figure.supxlabel(note, fontsize=9, color="#555555")
    parts = ["compare", workload.dtype_name, *["causal"] * workload.causal, *["backward"] * workload.backward]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ("_".join(parts) + ".png")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _panel(axes: Axes, comparison: Comparison, y_label: str, value: Callable[[Cell], float | None]) -> None:
    for name, color in COLORS.items():
        cells = [cell for cell in comparison.cells if cell.implementation == name]
        points = [(cell.length, y) for cell in cells if (y := value(cell)) is not None]
        skipped = [cell.length for cell in cells if cell.skipped]
        label = f"{name}\n(does not fit from {skipped[0]})" if skipped else name
        width = 2.6 if name == "pyattn" else 1.8
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=color, lw=width, ms=5, label=label)
    lengths = comparison.workload.lengths
    axes.set(xscale="log", yscale="log", xlabel="sequence length", ylabel=y_label)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.margins(x=0.1)  # room for what stands left of the first point
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(color="#dddddd", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _megabytes(cell: Cell) -> float | None:
    """Zero has no place on a logarithmic axis: the system counts memory in pages, so at least one."""
    return None if cell.peak_extra_bytes is None else max(cell.peak_extra_bytes, 4096) / 1e6
