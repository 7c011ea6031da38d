"""LibreOffice's help, in two languages."""

from __future__ import annotations

from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

from pyattn.models.data.sets import files
from pyattn.models.data.texts import Pair

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
    translations = set(files("help", root, f"{GERMAN}/**/*.html"))
    for path in files("help", root, f"{ENGLISH}/**/*.html"):
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
    for path in files("help", root, f"{ENGLISH}/**/*.html"):
        new = [text for text in dict.fromkeys(text for _, text in _blocks(path)) if text not in seen]
        seen.update(new)
        if new:
            pages.append("\n".join(new) + "\n")
    return "\n".join(pages)
