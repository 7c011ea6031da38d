"""A byte-level GPT trained with naive and with pyattn attention: the same losses, in less time.

    python examples/demo.py --out build/demo

The text is the help that CPython ships (``pydoc_data.topics``); its last tenth is held out. At each context both
trainings start from one seed, see the same batches and take the same number of steps, so they share their losses.
What a step costs is measured at the end, with torch's attention beside them.
"""

import argparse
import math
import pydoc_data.topics
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyattn import checks, compare, measure
from pyattn.models.gpt import GPT

checks.require_extra("compare", "rich", "matplotlib")

import matplotlib  # noqa: E402

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from rich import box, progress  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

CONTEXTS, TOKENS_PER_STEP, LEARNING_RATE, WARM_UP_STEPS = (512, 2048), 2048, 1e-3, 20
SIZE = {"dim": 96, "depth": 3, "heads": 3}
ATTENTION = ("naive", "torch", "pyattn")
COMPARED = ("naive", "pyattn")
COLORS = {name: compare.COLORS["torch SDPA" if name == "torch" else name] for name in ATTENTION}
console = Console(highlight=False)


class StepCost(NamedTuple):
    times: measure.Times
    memory: dict[str, int | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="training steps of each model; default: what --seconds allow")
    parser.add_argument("--seconds", type=float, default=150, help="for all trainings together, default 150")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR", help="for the plot")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    cut = len(text) * 9 // 10
    train, held_out = (torch.tensor(list(part)) for part in (text[:cut], text[cut:]))
    console.print(f"[bold]A small GPT on {len(text) / 1e3:.0f} kB of Python's own help[/]")
    console.print(compare.describe(compare.environment()))

    losses, quality = {}, {}
    for context in CONTEXTS:
        steps = args.steps or affordable_steps(context, train, args.seconds / len(CONTEXTS))
        for name in COMPARED:
            model, losses[context, name] = train_gpt(name, context, train, steps)
            quality[context, name] = bits_per_byte(model, held_out)
    print_quality(quality, text[cut:])
    for context in CONTEXTS:
        differences = [abs(a - b) for a, b in zip(*(losses[context, name] for name in COMPARED), strict=True)]
        steps, largest = len(differences), max(differences)
        console.print(f"Context {context}, {steps} steps: the losses differ by at most {largest:.1e} bits per byte.")
    costs = {context: step_cost(context, train) for context in progress.track(CONTEXTS, "timing a step")}
    print_cost(costs)
    console.print(f"plot: {save_plot(losses, costs, args.out)}")


# ---- training ----------------------------------------------------------------------------------------------


def trainer(attention: str, context: int, text: Tensor, steps: int) -> tuple[GPT, Callable[[], Tensor]]:
    """A fresh model and a call that takes its next training step and returns the loss. The seed decides the rest."""
    torch.manual_seed(0)
    batches = torch.Generator().manual_seed(0)
    model = GPT(**SIZE, max_length=context, attention=attention)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # warm-up, then a cosine to a tenth
        optimizer, lambda i: min(1, (i + 1) / WARM_UP_STEPS) * (0.55 + 0.45 * math.cos(math.pi * min(1, i / steps)))
    )

    def step() -> Tensor:
        starts = torch.randint(len(text) - context, (TOKENS_PER_STEP // context,), generator=batches)
        tokens = torch.stack([text[start : start + context + 1] for start in starts])
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss.detach()

    return model, step


def train_gpt(attention: str, context: int, text: Tensor, steps: int) -> tuple[GPT, list[float]]:
    """The trained model, and the loss of every step in bits per byte."""
    model, step = trainer(attention, context, text, steps)
    label = f"context {context}, {attention} attention"
    return model, [step().item() / math.log(2) for _ in progress.track(range(steps), label)]


def affordable_steps(context: int, text: Tensor, seconds: float) -> int:
    """The equal number of steps that all compared trainings of a context can take in ``seconds`` together."""
    taken = 0.0
    for name in COMPARED:
        _, step = trainer(name, context, text, 1)
        step()  # warm-up
        start = time.perf_counter()
        for _ in range(3):
            step()
        taken += (time.perf_counter() - start) / 3
    return max(1, int(seconds / taken))


@torch.no_grad()
def bits_per_byte(model: GPT, text: Tensor) -> float:
    """Over consecutive windows of the model's context, each byte predicted from those before it in its window."""
    context = model.max_length
    count = (len(text) - 1) // context
    tokens, targets = (text[i : i + count * context].view(count, context) for i in (0, 1))
    batches = (x.split(TOKENS_PER_STEP // context) for x in (tokens, targets))
    total = sum(model(x, targets=y).item() * len(x) for x, y in zip(*batches, strict=True))
    return total / count / math.log(2)


# ---- what a step costs -------------------------------------------------------------------------------------


def step_cost(context: int, text: Tensor) -> StepCost:
    """Time and memory of a training step with each attention."""
    steps = {name: trainer(name, context, text, 1)[1] for name in ATTENTION}
    for step in steps.values():
        step()  # the first one allocates the optimizer's state
    memory = {name: measure.peak_extra_memory(step) for name, step in steps.items()}
    return StepCost(measure.alternate(steps, min_time=5, rounds=5), memory)


# ---- tables and plot ---------------------------------------------------------------------------------------


def print_quality(quality: dict[tuple[int, str], float], raw: bytes) -> None:
    frequencies = [count / len(raw) for count in Counter(raw).values()]
    table = Table("held-out text", "bits per byte", box=box.SIMPLE_HEAD, pad_edge=False)
    for (context, name), bits in quality.items():
        table.add_row(f"GPT, context {context}, {name} attention", f"{bits:.4f}", style="bold")
    table.add_row("its own byte frequencies", f"{-sum(p * math.log2(p) for p in frequencies):.4f}")
    table.add_row("zlib, level 9", f"{8 * len(zlib.compress(raw, 9)) / len(raw):.4f}")
    console.print(table)
    console.print("(Too short a training to reach zlib: what matters here is that the two agree.)")


def print_cost(costs: dict[int, StepCost]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("context", "attention", "a step", "pyattn is", "memory"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for context, (times, memory) in costs.items():
        for name in ATTENTION:
            ours = name == "pyattn"
            table.add_row(
                str(context) if name == next(iter(ATTENTION)) else "",
                name,
                compare.format_time(times.median(name)),
                "" if ours else compare.format_speedup(times.ratio(name, "pyattn")),
                compare.format_bytes(memory[name]),
                style="bold" if ours else None,
            )
        table.add_section()
    console.print(f"\n[bold]What a training step costs[/]: forward, backward and update, {TOKENS_PER_STEP} tokens")
    console.print(table)
    console.print("Times and ratios are medians over alternating steps; memory is the peak above the start.")


def save_plot(losses: dict[tuple[int, str], list[float]], costs: dict[int, StepCost], directory: Path) -> Path:
    """Above, the losses of both trainings; below, the time of a step; a column a context."""
    figure, grid = plt.subplots(
        2, len(CONTEXTS), figsize=(11, 6), layout="constrained", height_ratios=(3, 1), sharey="row"
    )
    for context, loss_axes, time_axes in zip(CONTEXTS, *grid, strict=True):
        loss_axes.plot(losses[context, "naive"], color="#c4c4c4", lw=6, label="naive attention")
        loss_axes.plot(losses[context, "pyattn"], color=COLORS["pyattn"], lw=1.3, label="pyattn attention")
        loss_axes.set(xlabel="step", title=f"context {context}")
        loss_axes.grid(color="#dddddd", lw=0.7)
        times = costs[context].times
        milliseconds = [times.median(name) * 1e3 for name in ATTENTION]
        bars = time_axes.barh(list(ATTENTION), milliseconds, color=[COLORS[name] for name in ATTENTION])
        ratios = [f"{times.ratio(name, 'pyattn'):.2f}x" for name in ATTENTION]
        time_axes.bar_label(bars, [f" {ms:.0f} ms, {x}" for ms, x in zip(milliseconds, ratios, strict=True)])
        time_axes.set(xlabel="time of a training step (ms); x: over pyattn's, in alternation")
        time_axes.set_xlim(right=1.3 * max(milliseconds))  # room for the labels
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("training loss (bits per byte)")
    grid[0, 0].legend(frameon=False)
    figure.suptitle("One seed, two ways to compute attention: the same losses, in less time", fontweight="bold")
    figure.supxlabel(compare.describe(compare.environment()), fontsize=9, color="#555555")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "demo.png"
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()
