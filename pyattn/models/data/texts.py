"""Texts: WordNet's glosses, and files of one's own."""

from __future__ import annotations

import re
from pathlib import Path

from pyattn.models.data.sets import files, read_file

Pair = tuple[str, str]  # source and target


# ---- WordNet -----------------------------------------------------------------------------------------------

# The files of lexicographers 3 to 28, of lexnames(5WN).
# fmt: off
KINDS = (
    "top", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling",
    "food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process",
    "quantity", "relation", "shape", "state", "substance", "time",
)
# fmt: on


def glosses(root: Path | str | None = None) -> list[tuple[str, str]]:
    """What WordNet says of each sense of a noun, once, and what kind of thing it is: one of ``KINDS``.

    Examples of use, which come in quotation marks behind it, are left out.

    Raises:
        MissingData: neither in ``root`` nor in ``folder()``.
    """
    found: dict[str, str] = {}
    for path in files("glosses", root, "usr/share/wordnet/data.noun"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):  # the licence
                continue
            fields, _, gloss = line.partition(" | ")
            definition = re.split(r'[;:,] "', gloss)[0].strip()
            found.setdefault(definition, KINDS[int(fields.split(" ", 2)[1]) - 3])
    return list(found.items())


# ---- text of one's own -------------------------------------------------------------------------------------


def read_labels(path: Path | str) -> list[tuple[str, str]]:
    """The texts and labels of a UTF-8 file with ``text<TAB>label`` a line.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, it is empty, or a line has not two parts that are not empty.
    """
    return pairs_of(path, "text<TAB>label")


def read_pairs(path: Path | str) -> list[Pair]:
    """The pairs of a UTF-8 file with ``source<TAB>target`` a line.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, it is empty, or a line has not two sides that are not empty.
    """
    return pairs_of(path, "source<TAB>target")


def pairs_of(path: Path | str, form: str) -> list[tuple[str, str]]:
    """Both sides of each line of a file, which must have this form."""
    pairs = []
    for number, line in enumerate(read_file(Path(path)).removesuffix("\n").split("\n"), 1):
        first, *others = (side.strip() for side in line.split("\t"))
        if len(others) != 1 or not first or not others[0]:
            raise ValueError(f"{path}, line {number}: must be {form}, got {line!r}")
        pairs.append((first, others[0]))
    return pairs


def read_text(path: Path | str) -> str:
    """A UTF-8 file, or the files ``*.txt`` of a folder in order of their names, with blank lines between them.

    Raises:
        OSError: a file cannot be read, or the folder has none.
        ValueError: a file is not UTF-8, or empty.
    """
    path = Path(path)
    if not path.is_dir():
        return read_file(path)
    parts = sorted(path.glob("*.txt"))
    if not parts:
        raise FileNotFoundError(f"{path} has no files *.txt")
    return "\n\n".join(map(read_file, parts))
