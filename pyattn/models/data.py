"""Real data that Debian packages ship, and text of one's own.

``make data``, or ``python -m pyattn.models.data``, fetches the sets into ``$PYATTN_DATA``, by default
``~/.cache/pyattn``. It needs ``apt-get`` and ``dpkg-deb``, but not root: the packages are unpacked, not installed.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path

SETS: dict[str, tuple[str, ...]] = {  # the packages of each set
    "help": ("libreoffice-help-en-us", "libreoffice-help-de"),
}
Pair = tuple[str, str]  # source and target


class MissingData(Exception):
    """A set was to be read that has not been fetched."""


# ---- sets --------------------------------------------------------------------------------------------------


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
        progress(f"{name}: fetching {', '.join(SETS[name])} into {place}")
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder(), prefix=f".{name}-") as temporary:  # so that it can be renamed
            _run(["apt-get", "download", *SETS[name]], temporary)
            for package in sorted(Path(temporary).glob("*.deb")):
                _run(["dpkg-deb", "-x", package.name, "unpacked"], temporary)
            Path(temporary, "unpacked").rename(place)


def _run(command: Sequence[str], where: str) -> None:
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is not there: the sets are packages of Debian") from error
    if done.returncode:
        hint = "`apt-get update`, as root, must have been run before"
        raise RuntimeError(f"`{' '.join(command)}` failed ({hint}):\n{done.stderr.strip()}")


def _files(name: str, root: Path | str | None, pattern: str) -> list[Path]:
    """Files of a set, sorted; it is in ``root``, or where ``fetch`` puts it."""
    root = folder() / name if root is None else Path(root)
    files = sorted(root.glob(pattern))
    if not files:
        raise MissingData(
            f"the set {name!r} is not in {root}: `make data` or `python -m pyattn.models.data {name}` fetches it"
        )
    return files


# ---- LibreOffice's help ------------------------------------------------------------------------------------

ENGLISH, GERMAN = "usr/share/libreoffice/help/en-US/text", "usr/share/libreoffice/help/de/text"
Key = tuple[str, str | None]  # tag and id


class _Page(HTMLParser):
    """Collects the blocks of a page of the help: headings, paragraphs, items and cells that have text, in order."""

    BLOCKS = ("h1", "h2", "h3", "h4", "h5", "h6", "p", "div", "ul", "ol", "li", "table", "tr", "th", "td")
    SKIPPED = ("script", "style", "pre")  # pre holds programs

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[tuple[Key, str]] = []
        self.inside = False  # the part that is not navigation
        self.skipped, self.depth = "", 0  # the tag of an element left out, and how many of that tag are open
        self.key: Key = ("", None)
        self.pieces: list[str] = []

    def flush(self) -> None:
        text = " ".join("".join(self.pieces).split())
        self.pieces.clear()
        if text:
            self.blocks.append((self.key, text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if attributes.get("id") == "DisplayArea":
            self.inside = True
        elif tag == "footer":
            self.inside = False
        if self.depth:
            self.depth += tag == self.skipped
            return
        if tag in self.BLOCKS:
            self.flush()
            self.key = tag, attributes.get("id")
        elif tag == "br":
            self.pieces.append(" ")
        # A script shows one of several hidden elements: that of a class, such as MAC, or the default, which has none.
        if tag in self.SKIPPED or {"hidden", "class"} <= attributes.keys():
            self.skipped, self.depth = tag, 1

    def handle_endtag(self, tag: str) -> None:
        if self.depth:
            self.depth -= tag == self.skipped
        elif tag in self.BLOCKS:
            self.flush()

    def handle_data(self, data: str) -> None:
        if self.inside and not self.depth:
            self.pieces.append(data)


def _blocks(path: Path) -> list[tuple[Key, str]]:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page.blocks


def help_pairs(root: Path | str | None = None, *, longest: int = 40) -> list[Pair]:
    """Headings, sentences and paragraphs of LibreOffice's help, in English and German, each pair once.

    Left out are pairs with more than ``longest`` words on a side, and those whose sides are the same.

    Raises:
        MissingData: neither in ``root`` nor in ``folder()``.
    """
    pairs: dict[Pair, None] = {}
    translations = set(_files("help", root, f"{GERMAN}/**/*.html"))
    for path in _files("help", root, f"{ENGLISH}/**/*.html"):
        translation = Path(str(path).replace(ENGLISH, GERMAN))
        if translation not in translations:
            continue
        # By ids, since some pages are in alphabetical order, each in that of its language. A page can embed one id
        # several times, and links have none: these are in the same order, if they are as many.
        english, german = _texts(_blocks(path)), _texts(_blocks(translation))
        for key, texts in english.items():
            if len(german.get(key, ())) == len(texts):
                pairs |= dict.fromkeys(zip(texts, german[key], strict=True))
    return [pair for pair in pairs if pair[0] != pair[1] and all(len(side.split()) <= longest for side in pair)]


def _texts(blocks: Iterable[tuple[Key, str]]) -> dict[Key, list[str]]:
    texts: dict[Key, list[str]] = {}
    for key, text in blocks:
        texts.setdefault(key, []).append(text)
    return texts


def help_text(root: Path | str | None = None) -> str:
    """LibreOffice's help in English: a line a block, a blank line between pages, which are in order of file names.

    Each block stands where it first occurs and nowhere else: pages embed parts of one another, and what is held out
    of this text should not have been read before.

    Raises:
        MissingData: neither in ``root`` nor in ``folder()``.
    """
    seen: set[str] = set()
    pages = []
    for path in _files("help", root, f"{ENGLISH}/**/*.html"):
        new = [text for text in dict.fromkeys(text for _, text in _blocks(path)) if text not in seen]
        seen.update(new)
        if new:
            pages.append("\n".join(new) + "\n")
    return "\n".join(pages)


# ---- text of one's own -------------------------------------------------------------------------------------


def read_pairs(path: Path | str) -> list[Pair]:
    """The pairs of a UTF-8 file with ``source<TAB>target`` a line.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, it is empty, or a line has not two sides that are not empty.
    """
    pairs = []
    for number, line in enumerate(_read(Path(path)).removesuffix("\n").split("\n"), 1):
        source, *targets = (side.strip() for side in line.split("\t"))
        if len(targets) != 1 or not source or not targets[0]:
            raise ValueError(f"{path}, line {number}: must be source<TAB>target, got {line!r}")
        pairs.append((source, targets[0]))
    return pairs


def read_text(path: Path | str) -> str:
    """A UTF-8 file, or the files ``*.txt`` of a folder in order of their names, with blank lines between them.

    Raises:
        OSError: a file cannot be read, or the folder has none.
        ValueError: a file is not UTF-8, or empty.
    """
    path = Path(path)
    if not path.is_dir():
        return _read(path)
    files = sorted(path.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"{path} has no files *.txt")
    return "\n\n".join(map(_read, files))


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: must be UTF-8, but {error.reason}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


# ---- python -m pyattn.models.data --------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pyattn.models.data", description=f"Fetch data into {folder()}.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(SETS)}")
    names = parser.parse_args(argv).names or SETS
    try:
        fetch(names, progress=functools.partial(print, flush=True))
    except (OSError, RuntimeError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
