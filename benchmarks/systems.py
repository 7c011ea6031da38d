"""What the examples reach on real data, by several seeds with pyattn and by one with naive attention.

    make data
    python benchmarks/systems.py --only gpt

Each run is a process of its own, of the command that its row names. Where one seed was run with both, the largest
difference of their losses over the first steps stands in a row of its own.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import store

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = {"translate": "translate.py", "seq2seq": "translate.py --model seq2seq", "gpt": "gpt.py"}
SEEDS = {"pyattn": (0, 1, 2), "naive": (0,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    args = parser.parse_args()
    environment = store.environment("python benchmarks/systems.py")
    path = args.results / environment["device"] / "systems.json"
    before = json.loads(path.read_text())["cells"] if path.exists() else []
    cells = [cell for cell in before if cell["system"] not in args.only]
    for system in args.only:
        runs = [(attention, seed, run(system, attention, seed)) for attention, seeds in SEEDS.items() for seed in seeds]
        cells += [without_losses(metrics) | {"system": system} for _, _, metrics in runs]
        by_attention = {attention: losses(metrics) for attention, seed, metrics in runs if seed == 0}
        cells.append({"system": system, "largest loss difference": largest_difference(**by_attention)})
        store.save(path, environment, cells)  # a run takes minutes: keep what is there
        print(f"{system}: {path}", flush=True)


def run(system: str, attention: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        command = f"examples/{SYSTEMS[system]} --attention {attention} --seed {seed}"
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


def largest_difference(pyattn: dict[str, list[float]], naive: dict[str, list[float]]) -> float:
    return max(abs(a - b) for name in pyattn for a, b in zip(pyattn[name], naive[name], strict=True))


if __name__ == "__main__":
    main()
