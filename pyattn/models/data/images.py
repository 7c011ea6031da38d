"""Images with a class or a caption: handwritten digits, emoji, and files of one's own."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyattn import checks
from pyattn.models.data.sets import files
from pyattn.models.data.texts import pairs_of

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


class Image(NamedTuple):
    pixels: Tensor  # float32 [channels, height, width] in [0, 1]
    text: str  # its class, or what it shows


# ---- handwritten digits ------------------------------------------------------------------------------------


def digits() -> list[Image]:
    """1797 digits of 8 x 8, which scikit-learn ships."""
    checks.require_extra("models", "sklearn")
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images).float()[:, None] / 16
    return [Image(x, str(label)) for x, label in zip(pixels, found.target.tolist(), strict=True)]


def mnist(root: Path | str | None = None) -> list[Image]:
    """5000 digits of 28 x 28, of MNIST (LeCun et al. 1998).

    Raises:
        MissingData: neither in ``root`` nor in ``folder()``.
    """
    with gzip.open(files("mnist", root, "**/mnist_5k.csv.gz")[0], "rt") as file:
        rows = [[int(float(x)) for x in row] for row in csv.reader(file)]
    pixels = torch.tensor([row[:-1] for row in rows]).view(-1, 1, 28, 28) / 255
    return [Image(x, str(row[-1])) for x, row in zip(pixels, rows, strict=True)]


# ---- emoji -------------------------------------------------------------------------------------------------


def emoji(size: int = 32, root: Path | str | None = None) -> list[Image]:
    """The emoji of Google's Noto on white, ``[3, size, size]``, with their English names: "waving hand dark skin tone".

    Raises:
        MissingData: neither in ``root`` nor in ``folder()``.
    """
    checks.require_extra("models", "emoji", "fontTools", "PIL")
    from emoji import EMOJI_DATA
    from fontTools.ttLib import TTFont

    font = TTFont(files("emoji", root, "**/NotoColorEmoji.ttf")[0], lazy=True)
    glyphs = font["CBDT"].strikeData[0]
    pictures = {name: glyph.imageData for name, glyph in glyphs.items() if hasattr(glyph, "imageData")}
    shape = _ligatures(font)
    found = []
    for characters, about in EMOJI_DATA.items():
        name = shape(characters)
        if name in pictures and about["status"] == 2:  # fully qualified: the others are spellings of these
            found.append(Image(_pixels(io.BytesIO(pictures[name]), size), about["en"].strip(":").replace("_", " ")))
    return found


def _ligatures(font: Any) -> Any:
    """What makes of a sequence of characters the name of the one glyph that shows it, or None."""
    glyphs = font.getBestCmap()
    rules: dict[str, list[tuple[list[str], str]]] = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, ligatures in getattr(table, "ligatures", {}).items():
                rules.setdefault(first, []).extend((rule.Component, rule.LigGlyph) for rule in ligatures)

    def shape(characters: str) -> str | None:
        names = [glyphs.get(ord(c)) for c in characters if ord(c) != 0xFE0F]  # which only asks for colours
        if None in names:
            return None
        for rest, ligature in rules.get(names[0], ()):
            if rest == names[1:]:
                return ligature
        return names[0] if len(names) == 1 else None

    return shape


# ---- files of one's own ------------------------------------------------------------------------------------


def read_images(path: Path | str, size: int) -> list[Image]:
    """The images of a folder that has a folder for each class, ``[3, size, size]``.

    Raises:
        OSError: the folder cannot be read, or holds no images in folders.
        ValueError: a file is not an image.
    """
    path = Path(path)
    found = [file for file in sorted(path.glob("*/*")) if file.suffix.lower() in ENDINGS]
    if not found:
        raise FileNotFoundError(f"{path} must have a folder of images for each class, has none")
    return [Image(_pixels(file, size), file.parent.name) for file in found]


def read_captions(path: Path | str, size: int) -> list[Image]:
    """The images that ``captions.tsv`` in a folder names, ``file<TAB>caption`` a line, ``[3, size, size]``.

    Raises:
        OSError: a file cannot be read.
        ValueError: the table is not UTF-8, it is empty, a line has another form, or a file is not an image.
    """
    path = Path(path)
    named = pairs_of(path / "captions.tsv", "file<TAB>caption")
    return [Image(_pixels(path / file, size), caption) for file, caption in named]


def _pixels(file: Any, size: int) -> Tensor:
    """``[3, size, size]`` of an image, which is made as large as fits, on white."""
    checks.require_extra("models", "PIL")
    from PIL import Image as Pillow
    from PIL import ImageOps

    try:
        with Pillow.open(file) as opened:
            if opened.mode.startswith("I"):
                raise ValueError(f"{file} must be an image with 8 bits a channel, it has more")
            upright = ImageOps.exif_transpose(opened).convert("RGBA")
    except FileNotFoundError:
        raise
    except OSError as error:  # of Pillow
        raise ValueError(f"{file} must be an image, but {error}") from error
    image = ImageOps.pad(upright, (size, size), color=(255, 255, 255, 0))
    white = Pillow.new("RGBA", image.size, "white")
    flat = Pillow.alpha_composite(white, image).convert("RGB")
    return torch.frombuffer(bytearray(flat.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1) / 255


def stacked(images: Iterable[Image]) -> Tensor:
    """``[N, channels, height, width]``."""
    return torch.stack([image.pixels for image in images])
