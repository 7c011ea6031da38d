"""README's table and the plot beside it, from the results of ``bench_attention.py``.

    make report
    python benchmarks/report.py --device amd-epyc-zen-4-2c

The table goes between the lines ``<!-- report:begin attention_forward -->`` and, with ``end``, its like.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from pyattn import compare

compare.require_extra("matplotlib")

import matplotlib  # noqa: E402

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SUITE = "attention_forward"
PEERS = ("torch SDPA", "naive", "FlexAttention", "ONNX Runtime", "OpenVINO")
COLORS = compare.COLORS | {"FlexAttention": "#8b5fbf", "ONNX Runtime": "#2a9d6f", "OpenVINO": "#c23b5a"}
TABLE_FROM = 128  # shorter lengths are in the plot
VARIANTS = [(dtype, causal) for dtype in ("float32", "bfloat16") for causal in (False, True)]

Cell = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help=f"a folder of {RESULTS.relative_to(ROOT)}; default: the newest results")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="DIR", help="for the plot")
    parser.add_argument("--threads", type=int, help="default: the most that were measured")
    parser.add_argument("--head-dim", type=int, default=64)
    args = parser.parse_args()
    try:
        environment, cells = load(args.results, args.device)
        threads = args.threads or max(cell["threads"] for cell in cells)
        cells = [c for c in cells if c["threads"] == threads and c["head_dim"] == args.head_dim]
        if not cells:
            raise ValueError(f"nothing was measured with {threads} threads and head dim {args.head_dim}")
        insert(args.readme, SUITE, table(environment, cells))
    except (OSError, ValueError) as error:
        sys.exit(f"report: {error}")
    args.docs.mkdir(parents=True, exist_ok=True)
    plot(environment, cells, args.docs / f"{SUITE}.png")
    print(f"{args.readme} and {args.docs / SUITE}.png: {environment['device']}, measured {environment['date']}")


def load(results: Path, device: str | None) -> tuple[dict[str, Any], list[Cell]]:
    files = sorted(results.glob(f"{device or '*'}/{SUITE}.json"))
    if not files:
        raise ValueError(f"no {SUITE}.json for {device or 'any device'} in {results}: run `make bench` first")
    found = [json.loads(path.read_text()) for path in files]
    newest = max(found, key=lambda result: result["environment"]["date"])
    return newest["environment"], newest["cells"]


def insert(path: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of ``name``."""
    begin, end = f"<!-- report:begin {name} -->", f"<!-- report:end {name} -->"
    old = path.read_text()
    if not re.search(f"{re.escape(begin)}.*{re.escape(end)}", old, re.DOTALL):
        raise ValueError(f"{path} needs the lines {begin} and {end}, in this order")
    head, rest = old.split(begin, 1)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")


def conditions(environment: dict[str, Any], cells: list[Cell]) -> str:
    one = cells[0]
    machine = compare.describe(environment | {"threads": one["threads"]})
    return f"batch x heads {one['batch_heads']}, head dim {one['head_dim']}; {machine}"


# ---- the table ---------------------------------------------------------------------------------------------


def table(environment: dict[str, Any], cells: list[Cell]) -> str:
    measured = [peer for peer in PEERS if any(peer in cell["speedup"] for cell in cells)]
    head = ["", "length", "pyattn GFLOP/s", "of peak", *(f"over {peer}" for peer in measured)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for dtype, causal in VARIANTS:
        for cell in select(cells, dtype, causal):
            if cell["length"] < TABLE_FROM:
                continue
            ratios = [f"{cell['speedup'][peer]:.2f}x" if peer in cell["speedup"] else "" for peer in measured]
            percent = f"{cell['percent_of_peak']:.0f}%"
            label = f"{dtype}, causal" if causal else dtype
            lines.append([label, str(cell["length"]), f"{cell['gflops']['pyattn']:.0f}", percent, *ratios])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{rows}\n\n{conditions(environment, cells)}, {environment['date'][:10]}. Ratios are medians of "
        "paired ratios of alternating runs; causal counts half the operations; the peak is that of the CPU's "
        f"multiply-add instruction, measured. Made by `{environment['command']}`."
    )


def select(cells: list[Cell], dtype: str, causal: bool) -> list[Cell]:
    chosen = [cell for cell in cells if cell["dtype"] == dtype and cell["causal"] == causal]
    return sorted(chosen, key=lambda cell: cell["length"])


# ---- the plot ----------------------------------------------------------------------------------------------


def plot(environment: dict[str, Any], cells: list[Cell], path: Path) -> None:
    figure, grid = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained", sharex=True, sharey="row")
    for axes, (dtype, causal) in zip(grid.flat, VARIANTS, strict=True):
        panel(axes, select(cells, dtype, causal))
        axes.set_title(f"{dtype}, {'causal' if causal else 'full'}", fontsize=11)
    for axes in grid[:, 0]:
        axes.set_ylabel("GFLOP/s")
    for axes in grid[1]:
        axes.set_xlabel("sequence length")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title="Attention forward: higher is faster",
        title_fontproperties={"weight": "bold", "size": 13},
        loc="outside upper center",
        ncols=len(labels),
        frameon=False,
    )
    note = f"{conditions(environment, cells)}\ncausal counts half the operations"
    figure.supxlabel(note, fontsize=9, color="#555555")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def panel(axes: Axes, cells: list[Cell]) -> None:
    for name in ("pyattn", *PEERS):
        points = [(cell["length"], cell["gflops"][name]) for cell in cells if name in cell["gflops"]]
        if points:
            width = 2.8 if name == "pyattn" else 1.6
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o-", color=COLORS[name], lw=width, ms=4, label=name, zorder=3 if width > 2 else 2)
    if cells:
        axes.axhline(cells[0]["peak_gflops"], color="#333333", ls=":", lw=1.2, label="measured peak")
    axes.set_xscale("log")
    lengths = [cell["length"] for cell in cells]
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
