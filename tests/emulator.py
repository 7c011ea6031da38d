"""A GPU that is not there: builds the kernels of csrc/cuda for csrc/emulator, and gives them to the backend.

A library holds one kernel file with one shape of tiles; whatever else is a macro on a GPU is a variable there, so a few
libraries serve every specialisation. They are kept in build/emulator, by a hash of their sources.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pyattn import dispatch, jit
from pyattn.backends import cuda
from pyattn.backends.cuda import launch

ROOT = Path(__file__).parent.parent
EMULATOR = ROOT / "csrc" / "emulator"
BUILD = ROOT / "build" / "emulator"
SHAPES = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_DV", "WARPS_M", "WARPS_N", "UNORDERED")  # of which sizes depend
FLAGS = (
    "BF16",
    "ALIGNED",
    "ROWS",
    "PAGE_SIZE",
    "MASK",
    "ALIBI",
    "SOFTCAP",
    "DROPOUT",
    "NEGATIVE",
    "GRADIENTS",
)
# Without GNU's unique symbols: each library has its own machine.
COMPILE = "-std=c++17 -O1 -shared -fPIC -fno-gnu-unique -fvisibility=hidden -fno-math-errno -Wno-unknown-pragmas"

ENTRY = """
#include "emulator/prim.h"
namespace {{ int {flags}; }}
{macros}
#include "{file}"
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT const char* emulator_kernel() {{ return "{name}"; }}
EXPORT bool emulator_set_flag(const std::string& name, int value) {{
{setters}
  return false;
}}
EXPORT const char* emulator_run(const void* params, int64_t blocks, int threads, size_t shared, bool racing,
                                uint32_t seed) {{
  static EmulatedParams aligned;
  memcpy(&aligned, params, sizeof aligned);
  return emulator::run(emulated_kernel, &aligned, blocks, threads, shared, racing, seed);
}}
"""


class BuildError(Exception):
    """The compiler refused a kernel."""


def supported() -> bool:
    return platform.machine() == "x86_64"


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _texts(folder: Path) -> list[tuple[str, str]]:
    return [(path.name, path.read_text()) for path in sorted(folder.iterdir()) if path.suffix in (".cuh", ".h", ".cpp")]


def _included(folder: Path, file: str) -> dict[str, str]:
    """A file's text, and those of the files of ``folder`` that it includes."""
    found, left = {}, [file]
    while left:
        name = left.pop()
        if name not in found and (folder / name).exists():
            found[name] = (folder / name).read_text()
            left += re.findall(r'^#include "(.+)"', found[name], re.MULTILINE)
    return dict(sorted(found.items()))


def _build(path: Path, source: str, options: str) -> Path:
    """Compiles ``source``, unless the library is there; several processes may do so at once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            text, library = Path(folder, "entry.cpp"), Path(folder, "entry.so")
            text.write_text(source)
            files = [f"-I{EMULATOR.parent}", str(text), "-o", str(library), "-ldl"]
            command = [os.environ.get("CXX", "g++"), *options.split(), *files]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise BuildError(done.stderr)
            os.replace(library, path)
    return path


def plant(folder: Path, file: str, old: str, new: str) -> Path:
    """Copies the kernels to ``folder``, which is new, with a text replaced in one file."""
    shutil.copytree(ROOT / "csrc" / "cuda", folder)
    text = (folder / file).read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
    (folder / file).write_text(text.replace(old, new))
    return folder


def driver() -> Path:
    source = '#include "emulator/driver.cpp"\n'
    return _build(BUILD / f"libcuda-{_hash(_texts(EMULATOR))}.so", source, COMPILE.replace("-fvisibility=hidden", ""))


def library(file: str, name: str, defines: jit.Defines, sources: Path) -> Path:
    """The emulated kernel of a file in ``sources``, with the tiles of ``defines``."""
    macros = [f"#define {shape} {defines[shape]}" for shape in SHAPES] + [f"#define {x} flag_{x}" for x in FLAGS]
    setters = [f'  if (name == "{x}") return flag_{x} = value, true;' for x in FLAGS]
    source = ENTRY.format(
        flags=", ".join(f"flag_{x}" for x in FLAGS),
        macros="\n".join(macros),
        file=sources / file,
        name=name,
        setters="\n".join(setters),
    )
    key = _hash(ENTRY, COMPILE, file, macros, _texts(EMULATOR), _included(sources, file))
    return _build(BUILD / f"{Path(file).stem}-{key}.so", source, COMPILE)


class Emulator(launch.Gpu):
    """The backend's GPU, on the CPU; ``sources`` are the kernels."""

    device_type = "cpu"

    def __init__(self, sources: Path = ROOT / "csrc" / "cuda", arch: str = "sm_80") -> None:
        self.sources, self._arch = sources, arch
        self._driver = ctypes.CDLL(str(driver()))
        launch._native.cuda_open(str(driver()))

    def configure(self, racing: bool, seed: int = 0) -> None:
        self._driver.emulator_configure(ctypes.c_bool(racing), ctypes.c_uint32(seed))

    def launches(self) -> int:
        """Since ``configure``."""
        return self._driver.emulator_launches()

    def tensor_maps(self) -> int:
        """Those that the driver was asked for since ``configure``."""
        return self._driver.emulator_tensor_maps()

    def unavailable(self) -> list[str]:
        return []

    def target(self, device: torch.device) -> launch.Target:
        return launch.Target(self._arch, multiprocessors=3)  # fewer than there are tiles

    def cubin(self, file: str, defines: jit.Defines, arch: str) -> bytes:
        (name,) = re.findall(r"^KERNEL(?:_ALONE)?\((\w+)", (self.sources / file).read_text(), re.MULTILINE)
        path = library(file, name, defines, self.sources)
        return "\n".join([str(path), *(f"{flag} {defines[flag]}" for flag in FLAGS)]).encode()

    def stream(self, device: torch.device) -> int:
        return 0


CACHES = (launch.target_of, launch.loaded, dispatch.why_not, dispatch.choose, dispatch.select)
PLANS = (cuda.forward_plan, cuda.backward_plan)


@contextlib.contextmanager
def cleared(caches: tuple[Any, ...] = PLANS) -> Iterator[None]:
    """What is cached outside a ``with`` block does not count inside, nor the other way round."""
    for cached in caches:
        cached.cache_clear()
    try:
        yield
    finally:
        for cached in caches:
            cached.cache_clear()


@contextlib.contextmanager
def installed(sources: Path = ROOT / "csrc" / "cuda", arch: str = "sm_80") -> Iterator[Emulator]:
    """The CUDA backend runs kernels from ``sources`` on the emulator within a ``with`` block."""
    emulator = Emulator(sources, arch)
    with cleared(CACHES + PLANS), mock.patch.object(launch, "gpu", emulator):
        yield emulator
