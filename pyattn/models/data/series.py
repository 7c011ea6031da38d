"""Time series: electricity, the temperature of a sea, and files of one's own."""

from __future__ import annotations

import ast
import csv
import math
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
    """The columns of a CSV file that hold numbers, each a series; columns of words are left out.

    The first line is one of names if none of its fields is a number.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, it is empty, lines differ in length, names are the same, no column holds numbers,
            or one holds numbers but for some fields.
    """
    rows = [row for row in csv.reader(read_file(Path(path)).splitlines()) if row]
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise ValueError(f"{path}, row {number}: must have {len(rows[0])} fields as the first, got {len(row)}")
    names, first = [f"column {i}" for i in range(1, len(rows[0]) + 1)], 1
    if not any(map(_is_number, rows[0])):
        names, rows, first = rows[0], rows[1:], 2
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: columns must have different names, got {', '.join(names)}")
    found = []
    for name, column in zip(names, zip(*rows, strict=True), strict=False):
        wrong = [i for i, field in enumerate(column) if not _is_number(field)]
        if not wrong:
            found.append(Series(name, torch.tensor([float(x) for x in column]), season))
        elif 2 * len(wrong) < len(column):
            raise ValueError(f"{path}, row {first + wrong[0]}: {name} must be a number, got {column[wrong[0]]!r}")
    if not found:
        raise ValueError(f"{path} must have a column of numbers, got {', '.join(names)}")
    return found


def _is_number(field: str) -> bool:
    try:
        return math.isfinite(float(field))
    except ValueError:
        return False
