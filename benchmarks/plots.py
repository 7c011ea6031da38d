"""The plots of the report: time, rate or memory over the length, a panel for each kind of problem."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pyattn import checks, compare

checks.require_extra("compare", "matplotlib")

import matplotlib  # noqa: E402

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

COLORS = {
    "pyattn": compare.COLORS["pyattn"],
    "pyattn, pages": "#5aa9e6",
    "pyattn, shuffled pages": "#a5cdf0",
    **compare.COLORS,
    "FlexAttention": "#8b5fbf",
    "ONNX Runtime": "#2a9d6f",
    "OpenVINO": "#c23b5a",
    "pyattn, triton": compare.COLORS["pyattn"],
    "pyattn, cuda": "#5aa9e6",
    "pyattn, triton, pages": "#8fb4dd",
    "pyattn, cuda, pages": "#a5cdf0",
    "SDPA flash": "#e08e1b",
    "SDPA cuDNN": "#2a9d6f",
    "SDPA efficient": "#c23b5a",
}
ON_GPUS = ("pyattn, triton", "pyattn, cuda")
OURS = ("pyattn", *ON_GPUS)

Cell = dict[str, Any]


def select(cells: list[Cell], **fields: Any) -> list[Cell]:
    """Those with these fields, short ones first."""
    chosen = [cell for cell in cells if all(cell[name] == value for name, value in fields.items())]
    return sorted(chosen, key=lambda cell: cell["length"])


class Plot(NamedTuple):
    title: str
    panels: dict[str, dict[str, Any]]  # by title: the fields of the cells in a panel
    y_label: str
    values: Callable[[Cell], dict[str, float]]  # by implementation
    limit: tuple[str, Callable[[Cell], float | None]] | None = None  # what the machine can do at most
    note: str = ""
    log: bool = False


def draw(plot: Plot, cells: list[Cell], conditions: str, path: Path) -> None:
    rows = len(plot.panels) // 2
    size = (11, 0.5 + 3.5 * rows)
    figure, grid = plt.subplots(rows, 2, figsize=size, layout="constrained", sharey="row", squeeze=False)
    for axes, (title, fields) in zip(grid.flat, plot.panels.items(), strict=True):
        panel(axes, plot, select(cells, **fields))
        axes.set_title(title, fontsize=11)
    for axes in grid[:, 0]:
        axes.set_ylabel(plot.y_label)
    for axes in grid[-1]:
        axes.set_xlabel("length")
    labelled = {artist.get_label(): artist for axes in grid.flat for artist in axes.get_lines()}
    figure.legend(
        labelled.values(),
        labelled.keys(),
        title=plot.title,
        title_fontproperties={"weight": "bold", "size": 13},
        loc="outside upper center",
        ncols=len(labelled) if len(labelled) <= 8 else -(-len(labelled) // 2),
        columnspacing=1.2,
        handlelength=1.4,
        frameon=False,
    )
    lines = [*textwrap.wrap(conditions, 150), plot.note]
    figure.supxlabel("\n".join(lines).strip(), fontsize=9, color="#555555")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def panel(axes: Any, plot: Plot, cells: list[Cell]) -> None:
    for name, color in COLORS.items():
        points = [(cell["length"], plot.values(cell)[name]) for cell in cells if name in plot.values(cell)]
        if points:
            width = 2.8 if name in OURS else 1.6
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o-", color=color, lw=width, ms=4, label=name, zorder=3 if name in OURS else 2)
    limits = [limit for cell in cells if plot.limit and (limit := plot.limit[1](cell))]
    if plot.limit and limits:
        axes.axhline(max(limits), color="#333333", ls=":", lw=1.2, label=plot.limit[0])
    axes.set_xscale("log")
    lengths = [cell["length"] for cell in cells]
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    if plot.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
