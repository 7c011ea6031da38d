"""Time series: electricity, the temperature of a sea, and files of one's own."""

from __future__ import annotations

import ast
import csv
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyattn.models.data.sets import files, read_file


class Series(NamedTuple):
    name: str
    values: Tensor  # float32 [N], one after the other in time
    season: int  # after how many values it is about the same again


def taylor(root: Path | str | None = None) -> Series:
    """Demand for electricity in England and Wales, every half hour of twelve weeks, in gigawatts (Taylor 2003).

    Raises:
        MissingData: neither in ``root`` nor in ``folder()``.
    """
    source = ast.parse(files("taylor", root, "**/taylor.py")[0].read_text(encoding="utf-8"))
    megawatts = next(ast.literal_eval(node) for node in ast.walk(source) if isinstance(node, ast.List))
    return Series("taylor", torch.tensor(megawatts, dtype=torch.float32) / 1000, 7 * 48)


def elnino(root: Path | str | None = None) -> Series:
    """Temperature of the surface of the Pacific off Peru, a mean a month from 1950 to 2010, in degrees Celsius.

    Raises:
        MissingData: neither in ``root`` nor in ``folder()``.
    """
    _, *years = csv.reader(read_file(files("elnino", root, "**/elnino.csv")[0]).splitlines())
    return Series("elnino", torch.tensor([float(month) for year in years for month in year[1:]]), 12)


def read_series(path: Path | str, season: int) -> list[Series]:
    """The columns of a CSV file that hold numbers alone, each a series; a first line of names is read as such.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, it is empty, lines differ in length, or no column holds numbers alone.
    """
    rows = [row for row in csv.reader(read_file(Path(path)).splitlines()) if row]
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise ValueError(f"{path}, row {number}: must have {len(rows[0])} fields as the first, got {len(row)}")
    names = [f"column {i}" for i in range(1, len(rows[0]) + 1)]
    if not any(map(_is_number, rows[0])):
        names, rows = rows[0], rows[1:]
    columns = {name: column for name, column in zip(names, zip(*rows, strict=True), strict=False)}
    found = [
        Series(name, torch.tensor([float(x) for x in column]), season)
        for name, column in columns.items()
        if all(map(_is_number, column))
    ]
    if not found:
        raise ValueError(f"{path} must have a column of numbers, got {', '.join(names)}")
    return found


def _is_number(field: str) -> bool:
    try:
        return bool(torch.tensor(float(field)).isfinite())
    except ValueError:
        return False
