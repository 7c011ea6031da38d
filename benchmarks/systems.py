"""What the examples reach on real data, and how near their losses are with pyattn and with naive attention.

    make data
    python benchmarks/systems.py --only gpt --parts systems

"systems": several seeds with pyattn, one with naive attention, each the command that its row names. "losses": the first
steps of a shorter training with naive attention, against the same with pyattn, and against naive attention again, but
on one thread: sums are rounded in another order then, and training enlarges every difference.
"""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import store
import torch

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = {"translate": "translate.py", "seq2seq": "translate.py --model seq2seq", "gpt": "gpt.py"}
SEEDS = {"pyattn": (0, 1, 2), "naive": (0,)}
STEPS = (1, 10, 25, 50, 100, 200)  # up to which losses are compared
SHORT = f"--seed 0 --quick --steps {STEPS[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    args = parser.parse_args()
    environment = store.environment("python benchmarks/systems.py")
    for part, system in itertools.product(args.parts, args.only):
        path = args.results / environment["device"] / f"{part}.json"
        cells = json.loads(path.read_text())["cells"] if path.exists() else []
        common = {"system": system, "threads": torch.get_num_threads()}
        made = [row | common for row in PARTS[part](system)]
        store.save(path, environment, [cell for cell in cells if cell["system"] != system] + made)
        print(f"{system}: {path}", flush=True)  # a run takes minutes: what is there is kept


def train_seeds(system: str) -> list[dict[str, Any]]:
    runs = [(attention, seed) for attention, seeds in SEEDS.items() for seed in seeds]
    return [without_losses(run(f"{SYSTEMS[system]} --attention {name} --seed {seed}")) for name, seed in runs]


def compare_losses(system: str) -> list[dict[str, Any]]:
    """The largest difference up to each of STEPS, among all models that the example trains."""
    command = f"{SYSTEMS[system]} {SHORT} --attention"
    base = losses(run(f"{command} naive"))
    rows = []
    for other in ("pyattn", "naive --threads 1"):
        metrics = run(f"{command} {other}")
        pairs = [(base[name], others) for name, others in losses(metrics).items()]
        largest = {n: max(abs(a - b) for x, y in pairs for a, b in zip(x[:n], y[:n], strict=True)) for n in STEPS}
        rounded = {n: float(f"{difference:.2g}") for n, difference in largest.items()}
        rows.append({"attention": other, "largest difference": rounded, "command": metrics["command"]})
    return rows


PARTS = {"systems": train_seeds, "losses": compare_losses}


def run(arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        command = f"examples/{arguments}"
        print(f"python {command}", flush=True)
        subprocess.run([sys.executable, *shlex.split(command), "--out", out], cwd=ROOT, check=True)
        return json.loads((Path(out) / "metrics.json").read_text()) | {"command": f"python {command}"}


def without_losses(metrics: Any) -> Any:
    if not isinstance(metrics, dict):
        return metrics
    return {name: without_losses(value) for name, value in metrics.items() if name != "losses"}


def losses(metrics: dict[str, Any]) -> dict[str, list[float]]:
    """Of the first steps, of each model that a run has trained."""
    found = {"": metrics} | {name: part for name, part in metrics.items() if isinstance(part, dict)}
    found |= metrics.get("seq2seq", {})
    return {name: part["losses"] for name, part in found.items() if "losses" in part}


if __name__ == "__main__":
    main()
