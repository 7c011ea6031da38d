"""Speech: recordings with transcripts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pyattn.models.data.sets import files, read_file


class Recording(NamedTuple):
    path: Path  # of a WAV file
    text: str
    speaker: str


def recordings(root: Path | str | None = None) -> list[Recording]:
    """Strings of English digits that espeak-ng has said.

    Raises:
        MissingData: neither in ``root`` nor in ``folder()``.
    """
    return read_recordings(files("speech", root, "transcripts.tsv")[0].parent)


def read_recordings(path: Path | str) -> list[Recording]:
    """A folder of WAV files with ``transcripts.tsv``: ``file<TAB>text`` or ``file<TAB>text<TAB>speaker`` a line.

    Without speakers each file has one of its own.

    Raises:
        OSError: a file that is named is not there.
        ValueError: the table is not UTF-8, it is empty, or a line has another form.
    """
    table = Path(path) / "transcripts.tsv"
    found = []
    for number, line in enumerate(read_file(table).removesuffix("\n").split("\n"), 1):
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) not in (2, 3) or not all(fields):
            raise ValueError(
                f"{table}, line {number}: must be file<TAB>text or file<TAB>text<TAB>speaker, got {line!r}"
            )
        file = table.parent / fields[0]
        if not file.exists():
            raise FileNotFoundError(f"{table}, line {number}: {file} is not there")
        found.append(Recording(file, fields[1], fields[-1] if len(fields) == 3 else fields[0]))
    return found
