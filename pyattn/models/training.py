"""What the examples share: a training loop with progress, checkpoints, and their command line."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from pyattn.models.data import MissingData
from pyattn.nn.implementations import Implementation

POOL = 16  # batches that are sorted by length together: they have little padding, and yet vary


@dataclass
class History:
    """Of a training."""

    losses: list[float] = field(default_factory=list)  # of each step, in nats
    evaluations: list[tuple[int, float]] = field(default_factory=list)  # steps taken, and what they led to
    seconds: float = 0.0  # of all steps, without evaluations
    kept: tuple[int, float] | None = None  # the evaluation of what the model was left as


def schedule(step: int, steps: int, warm_up: int) -> float:
    """What the learning rate is multiplied by: a rise in a line, then half a cosine down to a twentieth.

    >>> [round(schedule(i, 100, 10), 2) for i in (0, 9, 55, 99)]
    [0.1, 1.0, 0.51, 0.05]
    """
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up + 1) / max(1, steps - warm_up)
    return 0.525 + 0.475 * math.cos(math.pi * done)


def train(
    model: nn.Module,
    batches: Iterator[Any],
    loss_of: Callable[[Any], Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.98),
    warm_up: int = 100,
    clip: float = 1.0,
    evaluate: Callable[[], float] | None = None,
    every: int | None = None,
    keep_best: bool = False,
    title: str = "training",
) -> History:
    """Trains a model by AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), and leaves it in evaluation mode.

    Args:
        model: whose parameters change.
        batches: at least as many as steps.
        loss_of: a batch's loss in nats, with its graph.
        steps: of the optimizer.
        learning_rate: the largest, of ``schedule``.
        weight_decay: of the matrices; not of what is a vector, such as biases and norms.
        betas: of AdamW.
        warm_up: steps up to the largest learning rate.
        clip: the largest norm of the gradient.
        evaluate: called without gradients and in evaluation mode.
        every: steps between evaluations; one more comes at the end.
        keep_best: leave the model as it was at its lowest evaluation, not as it is at the end.
        title: of the progress bar.

    Returns:
        The losses, evaluations and seconds.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    from rich import progress

    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, learning_rate, betas)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: schedule(i, steps, min(warm_up, steps)))
    history = History()
    best: dict[str, Tensor] = {}
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[loss]:.3f}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns) as bar:
        task = bar.add_task(title, total=steps, loss=math.nan)
        for step in range(1, steps + 1):
            start = time.perf_counter()
            model.train()
            loss = loss_of(next(batches))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            rates.step()
            history.losses.append(loss.item())
            history.seconds += time.perf_counter() - start
            if not math.isfinite(history.losses[-1]):
                raise FloatingPointError(f"the loss of step {step} is {history.losses[-1]}: try a lower learning rate")
            bar.update(task, advance=1, loss=sum(history.losses[-50:]) / len(history.losses[-50:]))
            if evaluate is not None and (step == steps or (every is not None and step % every == 0)):
                model.eval()
                with torch.no_grad():
                    history.evaluations.append((step, evaluate()))
                if keep_best and (history.kept is None or history.evaluations[-1][1] < history.kept[1]):
                    history.kept = history.evaluations[-1]
                    best = {name: value.clone() for name, value in model.state_dict().items()}
    if best:
        model.load_state_dict(best)
    elif history.evaluations:
        history.kept = history.evaluations[-1]
    model.eval()
    return history


def epochs(
    count: int, batch: int, generator: torch.Generator | None = None, lengths: Sequence[int] | None = None
) -> Iterator[Tensor]:
    """Indices of so many examples, in batches of int64 ``[batch]`` or less, without end: each once an epoch.

    Those of one batch are drawn from all, or, with ``lengths`` of the examples, have similar ones, which saves padding.

    >>> first = next(epochs(3, 8))
    >>> sorted(first.tolist())
    [0, 1, 2]
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if lengths is not None and len(lengths) != count:
        raise ValueError(f"lengths must have count={count} numbers, got {len(lengths)}")
    while True:
        order = torch.randperm(count, generator=generator)
        if lengths is None:
            yield from order.split(batch)
            continue
        sizes = torch.tensor(lengths)
        pools = order.split(POOL * batch)
        groups = [group for pool in pools for group in pool[sizes[pool].argsort(stable=True)].split(batch)]
        yield from (groups[i] for i in torch.randperm(len(groups), generator=generator).tolist())


def summary(history: History) -> dict[str, Any]:
    """What ``metrics.json`` holds of a training."""
    about: dict[str, Any] = {"steps": len(history.losses), "training seconds": round(history.seconds, 3)}
    if history.kept is not None:
        about["validation"] = round(history.kept[1], 4)
    return about | {"losses": [round(loss, 6) for loss in history.losses[:200]]}


# ---- checkpoints -------------------------------------------------------------------------------------------


def save(path: Path, model: nn.Module, about: dict[str, Any]) -> None:
    """Writes a model's parameters and what is to be known of it, as JSON, into one safetensors file."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path, {"about": json.dumps(about)})


def load(path: Path, make: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """The model that ``save`` wrote, in evaluation mode; ``make`` makes one of what is known of it."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        model = make(json.loads((file.metadata() or {})["about"]))
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return model.eval()


# ---- pictures and tables -----------------------------------------------------------------------------------


def figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure that needs no screen, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained")


def draw_losses(axes: Any, history: History, unit: str, title: str = "losses") -> None:
    """The losses of each step, and those of the evaluations."""
    axes.plot(range(1, len(history.losses) + 1), history.losses, color="#c4c4c4", lw=0.8, label="training")
    if history.evaluations:
        axes.plot(*zip(*history.evaluations, strict=True), color="#d1495b", marker="o", label="held out")
    axes.set(xlabel="step", ylabel=unit, title=title)
    axes.legend(frameon=False)


def save_figure(path: Path, figure: Any) -> None:
    """As PNG, or what else the path's ending says."""
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"picture: {path}")


def result(
    name: str, metric: str, baselines: dict[str, float], value: float, history: History, digits: int = 1
) -> dict[str, Any]:
    """What one model reached, for ``metrics.json``, beside what simpler things reach."""
    scores = {"baselines": {k: round(v, digits) for k, v in baselines.items()}, "value": round(value, digits)}
    return {"name": name, "metric": metric, "digits": digits} | scores | summary(history)


def print_results(results: list[dict[str, Any]]) -> None:
    """A table of what ``result`` made."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "metric", "", box=None, pad_edge=False)
    for found in results:
        for name, value in [*found["baselines"].items(), (found["name"], found["value"])]:
            table.add_row(name, found["metric"], f"{value:.{found['digits']}f}")
    Console(highlight=False).print(table)


# ---- the command line --------------------------------------------------------------------------------------


def parser(description: str, data: str) -> argparse.ArgumentParser:
    """The options of every example; ``data`` says what may be trained on instead of the example's own set."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument(
        "--attention", choices=get_args(Implementation), default="pyattn", help="what computes it, default pyattn"
    )
    options.add_argument("--data", type=Path, metavar="PATH", help=data)
    options.add_argument("--quick", action="store_true", help="a minute, to see that all of it runs")
    options.add_argument("--steps", type=_at_least_1, help="of each training")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, help="default: torch's own choice")
    options.add_argument("--out", type=Path, metavar="DIR", help="for checkpoints, pictures and metrics.json")
    return options


def _at_least_1(number: str) -> int:
    if int(number) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return int(number)


def run(main: Callable[[argparse.Namespace], dict[str, Any]], options: argparse.ArgumentParser, name: str) -> None:
    """Runs an example: writes ``metrics.json``, and exits with status 2 where there is no data."""
    args = options.parse_args()
    args.out = Path("build") / name if args.out is None else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    try:
        metrics = main(args)
    except MissingData as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    settings = {"system": name, "attention": args.attention, "seed": args.seed, "quick": args.quick}
    metrics = settings | metrics | {"seconds": round(time.perf_counter() - start, 1)}
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
