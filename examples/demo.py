"""A byte-level GPT trained with naive and with pyattn attention: the same losses, a cheaper evaluation.

    python examples/demo.py --out build/demo

The text is the help that CPython ships (``pydoc_data.topics``); its last tenth is held out. Both trainings
start from one seed, see the same batches and take the same number of steps, so they share their losses. What
evaluation costs differs, and is measured at the end.
"""

import argparse
import math
import pydoc_data.topics
import time
import zlib
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from pyattn import compare, measure
from pyattn.models.gpt import ATTENTION, GPT

compare.require_extra("rich", "matplotlib")

import matplotlib  # noqa: E402

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from rich import box, progress  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

CONTEXT, BATCH, LEARNING_RATE, WARM_UP_STEPS = 256, 4, 4e-3, 20
SIZE = {"dim": 96, "depth": 3, "heads": 3}
COMPARED = ("naive", "pyattn")
EVALUATION_CONTEXTS = (512, 2048, 8192)
console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="training steps of each model; default: what --seconds allow")
    parser.add_argument("--seconds", type=float, default=60, help="for both trainings together, default 60")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR", help="for the plot")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    cut = len(text) * 9 // 10
    train, held_out = bytes_tensor(text[:cut]), bytes_tensor(text[cut:])
    steps = args.steps or affordable_steps(train, args.seconds)

    console.print(f"[bold]A small GPT on {len(text) / 1e3:.0f} kB of Python's own help, trained twice[/]")
    console.print(compare.describe(compare.environment()))
    models, losses = {}, {}
    for name in COMPARED:
        models[name], losses[name] = train_gpt(name, train, steps)
    print_quality(models, held_out, text[cut:])
    difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    console.print(f"Largest difference between the two losses in {steps} steps: {difference:.1e} bits per byte.")
    console.print(f"plot: {save_plot(losses, args.out)}\n")
    print_evaluation_cost()


def bytes_tensor(text: bytes) -> Tensor:
    return torch.tensor(list(text))


# ---- training ----------------------------------------------------------------------------------------------


def train_gpt(attention: str, text: Tensor, steps: int, *, quiet: bool = False) -> tuple[GPT, list[float]]:
    """The trained model, and the loss of every step in bits per byte. The seed decides everything else."""
    torch.manual_seed(0)
    model = GPT(**SIZE, max_length=CONTEXT, attention=attention)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step in progress.track(range(steps), f"training with {attention} attention", disable=quiet):
        decay = 0.55 + 0.45 * math.cos(math.pi * step / steps)  # to a tenth
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP_STEPS) * decay
        starts = torch.randint(len(text) - CONTEXT, (BATCH,))
        tokens = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / math.log(2))
    return model, losses


def affordable_steps(text: Tensor, seconds: float) -> int:
    """The equal number of steps that both trainings can take in ``seconds`` together."""
    trial = 5
    for name in COMPARED:
        train_gpt(name, text, 1, quiet=True)
    start = time.perf_counter()
    for name in COMPARED:
        train_gpt(name, text, trial, quiet=True)
    return max(1, int(seconds / (time.perf_counter() - start) * trial))


@torch.no_grad()
def bits_per_byte(model: GPT, text: Tensor) -> float:
    """Over consecutive windows, each byte predicted from those before it in its window."""
    count = (len(text) - 1) // CONTEXT
    tokens, targets = (text[i : i + count * CONTEXT].view(count, CONTEXT) for i in (0, 1))
    total = sum(model(x, targets=y).item() * len(x) for x, y in zip(tokens.split(32), targets.split(32), strict=True))
    return total / count / math.log(2)


def print_quality(models: dict[str, GPT], held_out: Tensor, raw: bytes) -> None:
    frequencies = [count / len(raw) for count in Counter(raw).values()]
    table = Table("held-out text", "bits per byte", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, model in models.items():
        table.add_row(f"GPT, {name} attention", f"{bits_per_byte(model, held_out):.4f}", style="bold")
    table.add_row("its own byte frequencies", f"{-sum(p * math.log2(p) for p in frequencies):.4f}")
    table.add_row("zlib, level 9", f"{8 * len(zlib.compress(raw, 9)) / len(raw):.4f}")
    console.print(table)
    console.print("(Too short a training to reach zlib: what matters here is that the two agree.)")


def save_plot(losses: dict[str, list[float]], directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.plot(losses["naive"], color="#c4c4c4", lw=6, label="naive attention")
    axes.plot(losses["pyattn"], color=compare.COLORS["pyattn"], lw=1.3, label="pyattn attention")
    axes.set(xlabel="step", ylabel="training loss (bits per byte)", title="One seed, two ways to compute attention")
    axes.grid(color="#dddddd", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = directory / "demo_loss.png"
    figure.savefig(path, dpi=150)
    return path


# ---- evaluation --------------------------------------------------------------------------------------------


@torch.no_grad()
def print_evaluation_cost() -> None:
    """Time and memory of the forward pass over one sequence, with fresh weights: they do not matter."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("context", justify="right")
    table.add_column("attention")
    for column in ("time", "pyattn is", "extra memory"):
        table.add_column(column, justify="right")
    models = {name: GPT(**SIZE, max_length=max(EVALUATION_CONTEXTS), attention=name) for name in ATTENTION}
    for context in progress.track(EVALUATION_CONTEXTS, "evaluating", auto_refresh=False):
        tokens = torch.randint(256, (1, context))
        runs = {name: lambda model=model, x=tokens: model(x) for name, model in models.items()}
        if context == EVALUATION_CONTEXTS[0]:  # warm-up
            for run in runs.values():
                run()
        memory = {name: measure.peak_extra_memory(run) for name, run in runs.items()}
        times = measure.alternate(runs, rounds=3)
        for name in ATTENTION:
            table.add_row(
                str(context) if name == "naive" else "",
                name,
                compare.format_time(times.median(name)),
                "" if name == "pyattn" else compare.format_speedup(times.ratio(name, "pyattn")),
                compare.format_bytes(memory[name]),
                style="bold" if name == "pyattn" else None,
            )
        table.add_section()
    console.print("[bold]What evaluation costs[/]: a forward pass of the whole model over one sequence")
    console.print(table)
    console.print("Times and ratios are medians over alternating runs; memory is the peak above the start.")


if __name__ == "__main__":
    main()
