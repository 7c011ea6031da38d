"""What the examples reach on real data, how fast a step is, and how near the losses are to those of naive attention.

    make data
    python benchmarks/systems.py --only gpt --parts systems

"systems": several seeds with pyattn, one with naive attention, each the command that its row names. "steps": the time
of a training step with pyattn, torch's SDPA and naive attention, in runs that alternate. "losses": the first steps of a
shorter training with naive attention, against the same with pyattn, and against naive attention again, but on one
thread: sums are rounded in another order then, and training enlarges every difference.
"""

import argparse
import itertools
import json
import operator
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import store
import torch

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = {"translate": "translate.py", "seq2seq": "translate.py --model seq2seq"} | {
    name: f"{name}.py" for name in ("gpt", "vit", "speech", "caption", "forecast", "classify")
}
SEEDS = {"pyattn": (0, 1, 2), "naive": (0,)}
STEPS = (1, 10, 25, 50, 100, 200)  # up to which losses are compared
SHORT = f"--seed 0 --quick --steps {STEPS[-1]}"
TIMED, ROUNDS = 60, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    args = parser.parse_args()
    environment = store.environment("python benchmarks/systems.py")
    for part, system in itertools.product(args.parts, args.only):
        path = args.results / environment["device"] / ("losses.json" if part == "losses" else "systems.json")
        common = {"part": part, "system": system, "threads": torch.get_num_threads(), "isa": environment["isa"]}
        for row in PARTS[part](system):  # a run takes minutes: what is there is kept
            keep(path, environment, row | common)
            print(f"{system}: {path}", flush=True)


def keep(path: Path, environment: dict[str, Any], made: dict[str, Any]) -> None:
    """Writes a row among those of earlier runs, in the place of one that the same command made of the same model."""
    cells = json.loads(path.read_text())["cells"] if path.exists() else []
    rows = {tuple(map(cell.get, ("part", "system", "command", "model"))): cell for cell in [*cells, made]}
    store.save(path, environment, list(rows.values()))


def train_seeds(system: str) -> Iterator[dict[str, Any]]:
    for attention, seeds in SEEDS.items():
        for seed in seeds:
            yield without_losses(run(f"{SYSTEMS[system]} --attention {attention} --seed {seed}"))


def compare_losses(system: str) -> Iterator[dict[str, Any]]:
    """The largest difference up to each of STEPS, among all models that the example trains."""
    command = f"{SYSTEMS[system]} {SHORT} --attention"
    base = losses(run(f"{command} naive"))
    for other in ("pyattn", "naive --threads 1"):
        metrics = run(f"{command} {other}")
        pairs = [(base[name], others) for name, others in losses(metrics).items()]
        largest = {n: max(abs(a - b) for x, y in pairs for a, b in zip(x[:n], y[:n], strict=True)) for n in STEPS}
        rounded = {n: float(f"{difference:.2g}") for n, difference in largest.items()}
        yield {"attention": other, "largest difference": rounded, "command": metrics["command"]}


def time_steps(system: str) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step, of each model that the example trains; ratios of runs beside each other, the median."""
    took: dict[str, dict[str, list[float]]] = {}
    for _ in range(ROUNDS):
        for name in ("pyattn", "torch", "naive"):
            metrics = run(f"{SYSTEMS[system]} --seed 0 --quick --steps {TIMED} --attention {name}")
            for model, about in trainings(metrics).items():
                milliseconds = 1e3 * about["training seconds"] / about["steps"]
                took.setdefault(model, {}).setdefault(name, []).append(milliseconds)
    for model, times in took.items():
        ratios = {name: map(operator.truediv, times[name], times["pyattn"]) for name in ("torch", "naive")}
        yield {
            "model": model,
            "milliseconds": {name: round(statistics.median(all_), 2) for name, all_ in times.items()},
            "speedup": {name: round(statistics.median(ratio), 3) for name, ratio in ratios.items()},
            "rounds": ROUNDS,
        }


PARTS = {"systems": train_seeds, "steps": time_steps, "losses": compare_losses}


def run(arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        command = f"examples/{arguments}"
        print(f"python {command}", flush=True)
        subprocess.run([sys.executable, *shlex.split(command), "--out", out], cwd=ROOT, check=True)
        return json.loads((Path(out) / "metrics.json").read_text()) | {"command": f"python {command}"}


def without_losses(metrics: Any) -> Any:
    if isinstance(metrics, list):
        return [without_losses(part) for part in metrics]
    if not isinstance(metrics, dict):
        return metrics
    return {name: without_losses(value) for name, value in metrics.items() if name != "losses"}


def trainings(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each model that a run has trained."""
    found = {"": metrics} | {name: part for name, part in metrics.items() if isinstance(part, dict)}
    found |= metrics.get("seq2seq", {}) | {part["name"]: part for part in metrics.get("results", ())}
    return {name: part for name, part in found.items() if "training seconds" in part}


def losses(metrics: dict[str, Any]) -> dict[str, list[float]]:
    """Of the first steps, of each model that a run has trained."""
    return {name: part["losses"] for name, part in trainings(metrics).items()}


if __name__ == "__main__":
    main()
