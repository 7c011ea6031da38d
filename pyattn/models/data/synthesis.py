"""Strings of digits, spoken by espeak-ng in many voices."""

from __future__ import annotations

import hashlib
import io
import random
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyattn.models.data.programs import run
from pyattn.models.data.waves import read_wave, write_wave

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# By the names of their files: variants are ignored behind some of the names by which they are known otherwise.
ACCENTS = ("en", "en-029", "en-GB-scotland", "en-GB-x-gbclan", "en-GB-x-gbcwmd", "en-GB-x-rp", "en-US")
COUNT = 6000
LENGTHS = range(2, 8)  # digits of a string
RATE = 8000  # samples a second, as of a telephone


def record_digits(place: Path, count: int = COUNT) -> None:
    """Writes ``transcripts.tsv`` and the recordings that it names; the same ones each time.

    A speaker is one of espeak-ng's voice variants, and has all accents; speed and pitch vary from string to string.

    Raises:
        RuntimeError: espeak-ng is not there, failed, or has no variants.
    """
    place.mkdir(parents=True)
    draw = random.Random(0)
    speakers = _distinct(_variants())
    rows = []
    for i in range(count):
        accent, speaker = draw.choice(ACCENTS), draw.choice(speakers)
        text = " ".join(draw.choices(WORDS, k=draw.choice(LENGTHS)))
        options = ["-v", f"gmw/{accent}+{speaker}", "-s", str(draw.randint(130, 210)), "-p", str(draw.randint(30, 70))]
        rows.append((f"{i:05}.wav", text, speaker, options))
    with ThreadPoolExecutor() as pool:  # of programs that speak
        list(pool.map(lambda row: write_wave(place / row[0], read_wave(_speak(row[1], row[3]), RATE), RATE), rows))
    lines = ["\t".join(row[:3]) for row in rows]
    (place / "transcripts.tsv").write_text("\n".join(lines) + "\n")


def _variants() -> list[str]:
    """Names of espeak-ng's voice variants, which change a voice of any language; names of several words are ignored."""
    rows = [line.partition("!v/")[2].strip() for line in run(["espeak-ng", "--voices=variant"]).splitlines()]
    names = sorted(name for name in rows if name and " " not in name)
    if not names:
        raise RuntimeError("espeak-ng names no voice variants")
    return names


def _distinct(variants: Iterable[str]) -> list[str]:
    """Those that sound like none before them."""
    heard: dict[bytes, str] = {}
    for name in variants:
        said = _speak("three five nine", ["-v", f"gmw/en+{name}"])
        heard.setdefault(hashlib.sha256(said.read()).digest(), name)
    return list(heard.values())


def _speak(text: str, options: Sequence[str]) -> io.BytesIO:
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        run(["espeak-ng", *options, "-w", file.name, text])
        return io.BytesIO(Path(file.name).read_bytes())
