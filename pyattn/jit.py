"""CUDA device code, compiled by NVRTC when a specialisation is first asked for, and kept on disk.

The sources include no header but each other, so neither a CUDA toolkit nor a GPU is needed to compile them. A
specialisation is a file, its macros and an architecture; what comes out is a cubin, machine code for that
architecture. The cache is ``$PYATTN_CACHE_DIR/cuda``, by default ``~/.cache/pyattn/cuda``; it may be deleted at
any time.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "_cuda"

Defines = Mapping[str, int | str]


class CompileError(RuntimeError):
    """NVRTC refused a specialisation; the message has its log."""


class CacheWarning(RuntimeWarning):
    """What is compiled cannot be kept."""


@functools.cache
def unavailable() -> list[str]:
    """Reasons why nothing can be compiled here."""
    try:
        nvrtc_version()
    except Exception as error:  # a missing package, or whatever the search for the library and its loader raise
        return [f'NVRTC cannot be loaded ({" ".join(str(error).split())}): pip install "pyattn[cuda]"']
    return []


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of the library that is loaded; it does not tell its patch level."""
    major, minor = _call("nvrtcVersion")
    return major, minor


def nvrtc_archs() -> list[int]:
    """The compute capabilities that it makes code for, such as 80 and 90."""
    (archs,) = _call("nvrtcGetSupportedArchs")
    return list(archs)


def compile(file: str, defines: Defines, arch: str) -> bytes:
    """The cubin of ``file`` with macros ``defines`` for ``arch``, such as "sm_90a"; the cache is not looked at."""
    return compile_with_log(file, defines, arch)[0]


def compile_with_log(file: str, defines: Defines, arch: str) -> tuple[bytes, str]:
    """As ``compile``, with the compiler's log: warnings, and each kernel's registers, shared memory and spills."""
    sources = _sources(SOURCES)
    if file not in sources:
        raise ValueError(f"file must be one of {', '.join(sources) or 'none'} in {SOURCES}, it is {file!r}")
    options = _options(defines, arch)
    names = [name.encode() for name in sources]
    (program,) = _call("nvrtcCreateProgram", sources[file], file.encode(), len(names), list(sources.values()), names)
    try:
        try:
            _call("nvrtcCompileProgram", program, len(options), options)
        except RuntimeError as error:
            asked = b" ".join(options).decode()
            raise CompileError(f"{file} does not compile with {asked}: {error}\n{_log(program)}") from None
        return _fetch("nvrtcGetCUBIN", program), _log(program)
    finally:
        _call("nvrtcDestroyProgram", program)


def kept(file: str, defines: Defines, arch: str) -> bool:
    """Whether ``cubin`` finds it in the cache."""
    folder = _folder()
    return folder is not None and _read(folder / _key(file, defines, arch)) is not None


def cubin(file: str, defines: Defines, arch: str) -> bytes:
    """As ``compile``, from the cache if it is there; otherwise it is put there."""
    folder = _folder()
    if folder is None:
        return compile(file, defines, arch)
    entry = folder / _key(file, defines, arch)
    kept = _read(entry)
    if kept is not None:
        return kept
    code = compile(file, defines, arch)
    try:
        _write(entry, code)
    except OSError as error:
        _warn(f"{folder} cannot be written ({error.strerror})")
    return code


def _call(name: str, *args: Any) -> Any:
    """The results of an NVRTC function, without the status."""
    from cuda.bindings import nvrtc  # here, since it is optional and takes a while

    status, *results = getattr(nvrtc, name)(*args)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"{name} returned {status.name}")
    return results


def _fetch(name: str, program: Any) -> bytes:
    """What an NVRTC function writes to memory of the size that its counterpart tells."""
    buffer = bytearray(*_call(f"{name}Size", program))
    _call(name, program, buffer)
    return bytes(buffer)


def _log(program: Any) -> str:
    return _fetch("nvrtcGetProgramLog", program).decode(errors="replace").strip("\0\n")


@functools.cache
def _sources(folder: Path) -> dict[str, bytes]:
    """Read once and compiled from memory: what a key is made of is what is compiled."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.cuh"))}


def _options(defines: Defines, arch: str) -> list[bytes]:
    options = [f"--gpu-architecture={arch}", "-std=c++17", "-default-device", "--ptxas-options=-v"]
    for name, value in sorted(defines.items()):
        options.append(f"-D{name}={int(value) if isinstance(value, bool) else value}")  # C++ knows no "True"
    return [option.encode() for option in options]


def _key(file: str, defines: Defines, arch: str) -> str:
    """All that the machine code depends on."""
    parts = (file, _options(defines, arch), nvrtc_version(), _sources(SOURCES))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache  # once for each reason
def _warn(reason: str) -> None:
    warnings.warn(f"CUDA kernels are compiled anew in every process: {reason}", CacheWarning, stacklevel=3)


def cache_folder() -> Path:
    """Where the cache is; "~" stands for a home."""
    root = os.environ.get("PYATTN_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "pyattn")
    return Path(root, "cuda")


def _folder() -> Path | None:
    """The folder of the cache, made if it is missing; ``None`` where code from it could be somebody else's."""
    folder = cache_folder()
    try:
        folder = folder.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError) as error:  # the latter where nobody knows a home
        _warn(f"{folder} cannot be made ({error}); PYATTN_CACHE_DIR names another place")
        return None
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        _warn(f"{folder} belongs to another user, or others may write to it; delete it, or set PYATTN_CACHE_DIR")
        return None
    return folder


def _checksum(code: bytes) -> bytes:
    return hashlib.sha256(code).digest()


def _read(entry: Path) -> bytes | None:
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    return content[size:] if content[:size] == _checksum(content[size:]) else None


def _write(entry: Path, code: bytes) -> None:
    """In one step, so that no other process sees half of an entry."""
    descriptor, partial = tempfile.mkstemp(dir=entry.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(_checksum(code) + code)
        os.replace(partial, entry)
    except BaseException:
        os.unlink(partial)
        raise
