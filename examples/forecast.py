"""Time series by a Transformer over patches: electricity for the next day, a sea's temperature for the next year.

    make data                         # once
    python examples/forecast.py       # --attention naive|torch|pyattn, --quick, --data PATH --season N

The end of each series is held out. Errors are scaled (MASE): 1 is what a forecast makes that takes the values of a
season before, on what is known. Beside the model stand this forecast on the held-out part, and ridge regression.
`--data` takes a CSV file, whose columns of numbers are series of `--season` values a season; as many are forecast.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyattn import checks
from pyattn.models import Forecaster, data, training
from pyattn.models.forecast import mase, windows

checks.require_extra("models", "matplotlib", "rich", "safetensors", "sklearn")

SIZE = {"dim": 64, "heads": 4, "layers": 2, "dropout": 0.2}
BATCH, LEARNING_RATE = 64, 1e-3
HELD_OUT, VALIDATION = 0.2, 0.1  # of a series


class Task(NamedTuple):
    series: data.Series
    past: int
    horizon: int
    patch: int
    steps: int = 1000


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.data:
        season = args.season
        tasks = [Task(s, 4 * season, season, max(1, season // 4)) for s in data.read_series(args.data, season)]
    else:
        tasks = [Task(data.taylor(), 7 * 48, 48, 24, 1500), Task(data.elnino(), 5 * 12, 12, 6, 400)]
    for task in tasks:
        check(task)
    results = [forecast(args, task) for task in tasks]
    training.print_results(results)
    return {"results": results}


def parts(values: Tensor) -> tuple[int, int]:
    """Where what is validated with begins, and what is held out."""
    return round(len(values) * (1 - HELD_OUT - VALIDATION)), round(len(values) * (1 - HELD_OUT))


def check(task: Task) -> None:
    """That each part of a series holds a window, and that there is something to be scaled by."""
    series, past, horizon, *_ = task
    first_validation, first_test = parts(series.values)
    shortest = min(first_validation - past, first_test - first_validation, len(series.values) - first_test)
    if shortest < horizon or first_validation <= series.season:
        count = len(series.values)
        raise ValueError(f"{series.name} must have more than {count} values, of which {series.season} make a season")
    known = series.values[:first_test]
    if torch.equal(known[series.season :], known[: -series.season]):
        raise ValueError(f"{series.name} must not repeat itself exactly every {series.season} values")


def forecast(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    series, past, horizon, patch, steps = task
    values, name = series.values, f"{series.name}, {horizon} ahead"
    first_validation, first_test = parts(values)
    train = windows(values[:first_validation], past, horizon)
    validation = windows(values[first_validation - past : first_test], past, horizon)
    test = windows(values[first_test - past :], past, horizon)
    known = values[:first_test]
    print(f"{name}: {len(train[0])} windows to train on, {len(test[0])} held out")

    about = SIZE | {"past": past, "horizon": horizon, "patch": patch, "attention": args.attention}
    torch.manual_seed(args.seed)
    model = make(about)
    generator = torch.Generator().manual_seed(args.seed)
    steps = args.steps or (60 if args.quick else steps)
    history = training.train(
        model,
        training.epochs(len(train[0]), BATCH, generator),
        lambda chosen: model.loss(train[0][chosen], train[1][chosen]),
        steps=steps,
        learning_rate=LEARNING_RATE,
        weight_decay=0.1,
        evaluate=lambda: mase(model(validation[0]), validation[1], known, series.season),
        every=-(-steps // 16),
        keep_best=True,
        title=f"{name}, {args.attention}",
    )
    path = args.out / f"forecast-{series.name}.safetensors"
    training.save(path, model, about)
    model = training.load(path, make)

    written = {"Forecaster": predict(model, test[0]), "ridge": ridge(train, test[0])}
    written["seasonal naive"] = seasonal(values, first_test, horizon, series.season)
    picture(args.out / f"forecast-{series.name}.png", history, name, test, written)
    errors = {name: mase(made, test[1], known, series.season) for name, made in written.items()}
    ours = errors.pop("Forecaster")
    return training.result(f"Forecaster, {name}", "MASE, lower is better", errors, ours, history, digits=3)


def make(about: dict[str, Any]) -> Forecaster:
    return Forecaster(**about)


@torch.no_grad()
def predict(model: Forecaster, past: Tensor) -> Tensor:
    return torch.cat([model(part) for part in past.split(256)])


def seasonal(values: Tensor, first: int, horizon: int, season: int) -> Tensor:
    """For each window of what is held out the last season before it, again and again."""
    starts = torch.arange(first, len(values) - horizon + 1)
    return values[starts[:, None] + torch.arange(horizon) % season - season]


def ridge(train: tuple[Tensor, Tensor], past: Tensor) -> Tensor:
    """Linear in the past, each window less its mean."""
    from sklearn.linear_model import Ridge

    mean = train[0].mean(1, keepdim=True)
    model = Ridge(alpha=1.0).fit((train[0] - mean).numpy(), (train[1] - mean).numpy())
    mean = past.mean(1, keepdim=True)
    return torch.from_numpy(model.predict((past - mean).numpy())) + mean


def picture(
    path: Path, history: training.History, name: str, test: tuple[Tensor, Tensor], written: dict[str, Tensor]
) -> None:
    """The losses, and three held-out forecasts with their past."""
    past, future = test
    figure, axes = training.figure(2, 2, (13, 8))
    training.draw_losses(axes[0][0], history, "scaled error")
    colours = {"Forecaster": "#d1495b", "ridge": "#66a182", "seasonal naive": "#edae49"}
    for place, i in zip(axes.flat[1:], (0, len(past) // 2, len(past) - 1), strict=True):
        shown = min(past.shape[1], 3 * future.shape[1])
        ahead = range(1, future.shape[1] + 1)
        place.plot(range(1 - shown, 1), past[i, -shown:], color="#c4c4c4", label="past")
        place.plot(ahead, future[i], color="black", label="what came")
        for model, made in written.items():
            place.plot(ahead, made[i], color=colours[model], lw=2 if model == "Forecaster" else 1, label=model)
        place.set(xlabel="values from now", title=f"window {i} of those held out")
    axes[0][1].legend(frameon=False)
    figure.suptitle(name, fontweight="bold")
    training.save_figure(path, figure)


if __name__ == "__main__":
    options = training.parser(__doc__.splitlines()[0], "a CSV file, whose columns of numbers are series")
    options.add_argument("--season", type=int, default=24, help="values a season, of --data")
    training.run(main, options, "forecast")
