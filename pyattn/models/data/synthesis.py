"""Strings of digits, spoken by espeak-ng in many voices."""

from __future__ import annotations

import random
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyattn.models.data.waves import read_wave, write_wave

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-gb", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-gb-x-rp", "en-us", "en-029")
COUNT = 6000
LENGTHS = range(2, 8)  # digits of a string
RATE = 8000  # samples a second, as of a telephone


def record_digits(place: Path, count: int = COUNT) -> None:
    """Writes ``transcripts.tsv`` and the recordings that it names; the same ones each time.

    A voice is an accent with one of espeak-ng's variants; its speed and pitch vary from string to string.
    """
    place.mkdir(parents=True)
    draw = random.Random(0)
    variants = _variants()
    rows = []
    for i in range(count):
        accent, variant = draw.choice(ACCENTS), draw.choice(variants)
        text = " ".join(draw.choices(WORDS, k=draw.choice(LENGTHS)))
        options = ["-v", f"{accent}+{variant}", "-s", str(draw.randint(130, 210)), "-p", str(draw.randint(30, 70))]
        rows.append((f"{i:05}.wav", text, f"{accent}+{variant}", options))
    with ThreadPoolExecutor() as pool:  # of programs that speak
        list(pool.map(lambda row: _speak(row[1], row[3], place / row[0]), rows))
    lines = ["\t".join(row[:3]) for row in rows]
    (place / "transcripts.tsv").write_text("\n".join(lines) + "\n")


def _variants() -> list[str]:
    """Names of espeak-ng's voice variants, which change a voice of any language."""
    table = _run(["espeak-ng", "--voices=variant"]).stdout.splitlines()[1:]
    return sorted(field[3:] for line in table for field in line.split() if field.startswith("!v/"))


def _speak(text: str, options: Sequence[str], path: Path) -> None:
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        _run(["espeak-ng", *options, "-w", file.name, text])
        write_wave(path, read_wave(file.name, RATE), RATE)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True)
