"""WAV files."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from pyattn import checks


def read_wave(path: Path | str | BinaryIO, rate: int) -> Tensor:
    """The mean of a WAV file's channels, float32 ``[N]`` in about [-1, 1], with so many samples a second.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not WAV in PCM of 8, 16 or 32 bits.
        ModuleNotFoundError: scipy, which changes the rate, is not installed.
    """
    try:
        with wave.open(str(path) if isinstance(path, Path) else path, "rb") as file:
            channels, width, own = file.getnchannels(), file.getsampwidth(), file.getframerate()
            samples = bytearray(file.readframes(file.getnframes()))
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path}: must be WAV in PCM, but {error or 'it ends too early'}") from error
    if width not in (1, 2, 4):
        raise ValueError(f"{path}: must have samples of 8, 16 or 32 bits, got {8 * width}")
    if len(samples) % (width * channels):
        raise ValueError(f"{path}: must be WAV in PCM, but it ends within a sample")
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[width]
    whole = torch.frombuffer(samples, dtype=dtype) if samples else torch.empty(0, dtype=dtype)
    x = (whole.double() - (128 if width == 1 else 0)) / 2 ** (8 * width - 1)
    x = x.view(-1, channels).mean(1)
    if own != rate:
        checks.require_extra("models", "scipy")
        from scipy.signal import resample_poly

        x = torch.from_numpy(resample_poly(x.numpy(), rate, own))  # which divides both by what they share
    return x.float()


def write_wave(path: Path | str, x: Tensor, rate: int) -> None:
    """Writes ``[N]`` in [-1, 1] as one channel of 16 bits; what is beyond is cut off."""
    samples = (x * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.numpy().tobytes())
