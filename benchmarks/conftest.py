"""What runs the suites: their options, grids and threads, and the files that their results go to.

    make bench
    python -m pytest benchmarks/bench_attention_decode.py --benchmark-only --quick

In a cell all peers take turns in one process (``pyattn.measure.alternate``); its ratios are medians of paired ratios.
A suite ``bench_NAME.py`` has a GRID of cells and a QUICK part of it; it writes ``results/<device>/NAME.json``.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `import suite`: importlib mode does not add it

import store

RESULTS = Path(__file__).parent / "results"
_SAVED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyattn")
    group.addoption("--quick", action="store_true", help="a small grid, to see that the benchmarks work")
    group.addoption("--results", type=Path, metavar="DIR", help=f"also for parts of a grid; default {RESULTS}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    metafunc.parametrize("cell", metafunc.module.QUICK if quick else metafunc.module.GRID, ids=str)


@pytest.fixture(autouse=True)
def threads(cell: Any) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cells(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Where a suite leaves what it measured; saved after its last test."""
    cells: list[dict[str, Any]] = []
    yield cells
    suite, directory = request.path.stem.removeprefix("bench_"), request.config.getoption("--results")
    if directory is None and len(cells) < len(request.module.GRID):
        message = f"{suite}: only a part of the grid, not saved (--results DIR saves it)"
    else:
        message = f"{suite}: {save(suite, cells, directory or RESULTS)}"
    request.config.stash.setdefault(_SAVED, []).append(message)


def save(suite: str, cells: list[dict[str, Any]], directory: Path) -> Path:
    environment = store.environment(shlex.join(["python", "-m", "pytest", *sys.argv[1:]]))
    forced = os.environ.get("PYATTN_CPU_ISA")
    path = directory / environment["device"] / (f"{suite}_{forced}.json" if forced else f"{suite}.json")
    store.save(path, environment, cells)
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for message in config.stash.get(_SAVED, []):
        terminalreporter.write_line(message)
