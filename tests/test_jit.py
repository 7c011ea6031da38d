"""Run-time compilation and its cache, with a small kernel in place of the package's."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import warnings

import pytest

from pyattn import jit

KERNEL = """
#include "scale.cuh"
int scaled(int x) { return x * SCALE * N; }
extern "C" __global__ void NAME(int* x) { x[threadIdx.x] = scaled(x[threadIdx.x]); }
"""
DEFINES = {"N": 2, "NAME": "kernel"}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder with the kernel, in the place of the package's sources; the cache is in ``tmp_path / "cache"``."""
    if jit.unavailable():
        pytest.skip("; ".join(jit.unavailable()))
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "kernel.cuh").write_text(KERNEL)
    (folder / "scale.cuh").write_text("constexpr int SCALE = 3;\n")
    monkeypatch.setattr(jit, "SOURCES", folder)
    monkeypatch.setenv("PYATTN_CACHE_DIR", str(tmp_path / "cache"))
    jit._sources.cache_clear()
    return folder


@pytest.fixture
def compiled(monkeypatch):
    """The architectures that NVRTC was asked for, call by call."""
    calls = []
    real = jit.compile

    def counted(file, defines, arch):
        calls.append(arch)
        return real(file, defines, arch)

    monkeypatch.setattr(jit, "compile", counted)
    return calls


def cubin(file="kernel.cuh", defines=DEFINES, arch="sm_80"):
    return jit.cubin(file, defines, arch)


def entries(tmp_path):
    return sorted((tmp_path / "cache" / "cuda").iterdir())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_compiles(sources, arch):
    code, log = jit.compile_with_log("kernel.cuh", {"N": 2, "NAME": "twice"}, arch)
    assert code == jit.compile("kernel.cuh", {"N": 2, "NAME": "twice"}, arch)
    assert code.startswith(b"\x7fELF") and b"twice" in code
    assert f"'twice' for '{arch}'" in log and "registers" in log and "0 bytes spill stores" in log


def test_macros_reach_the_kernel(sources):
    assert cubin(defines={"N": 2, "NAME": "f"}) != cubin(defines={"N": 5, "NAME": "f"})
    assert cubin(defines={"N": True, "NAME": "f"}) == cubin(defines={"NAME": "f", "N": 1})


def test_the_sources_win_over_the_working_directory(sources, tmp_path, monkeypatch):
    (tmp_path / "scale.cuh").write_text("#error from the working directory\n")
    monkeypatch.chdir(tmp_path)
    cubin()


def test_an_error_tells_what_was_compiled_and_why_it_failed(sources):
    with pytest.raises(jit.CompileError) as error:
        cubin(defines={"N": "nonsense", "NAME": "f"}, arch="sm_90a")
    for part in ("kernel.cuh", "-DN=nonsense", "sm_90a", 'identifier "nonsense" is undefined', "kernel.cuh(3)"):
        assert part in str(error.value)
    with pytest.raises(jit.CompileError, match="invalid value for --gpu-architecture"):
        cubin(arch="sm_1")
    with pytest.raises(ValueError, match=r"file must be one of kernel\.cuh, scale\.cuh"):
        cubin("missing.cuh")


def test_compiles_once(sources, compiled, tmp_path, monkeypatch):
    assert cubin() == cubin()
    monkeypatch.setattr(jit, "SOURCES", shutil.copytree(sources, tmp_path / "elsewhere"))
    assert cubin() == cubin(defines=dict(reversed(DEFINES.items())))
    assert compiled == ["sm_80"]


@pytest.mark.parametrize("what", ["source", "include", "file", "defines", "arch", "nvrtc"])
def test_a_key_has_all_that_code_depends_on(sources, compiled, tmp_path, monkeypatch, what):
    cubin()
    asked = {}
    if what in ("source", "include"):
        file = sources / {"source": "kernel.cuh", "include": "scale.cuh"}[what]
        file.write_text(file.read_text() + "// edited\n")
    elif what == "file":
        asked["file"] = "copy.cuh"
        shutil.copy(sources / "kernel.cuh", sources / "copy.cuh")
    elif what == "defines":
        asked["defines"] = DEFINES | {"N": 3}
    elif what == "arch":
        asked["arch"] = "sm_90a"
    else:
        monkeypatch.setattr(jit, "nvrtc_version", lambda: (99, 0))
    jit._sources.cache_clear()
    cubin(**asked)
    assert len(compiled) == len(entries(tmp_path)) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[:20],
        lambda content: content + b"\0",
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
    ids=["empty", "truncated", "without code", "longer", "one bit of the code", "one bit of the checksum"],
)
def test_a_damaged_entry_is_replaced(sources, compiled, tmp_path, damage):
    code = cubin()
    (entry,) = entries(tmp_path)
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    assert cubin() == code
    assert entries(tmp_path) == [entry] and entry.read_bytes() == good
    assert len(compiled) == 2


def test_the_cache_is_for_its_owner_alone(sources, tmp_path):
    previous = os.umask(0)
    try:
        cubin()
    finally:
        os.umask(previous)
    (entry,) = entries(tmp_path)
    assert entry.parent.stat().st_mode & 0o777 == 0o700
    assert entry.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PYATTN_CACHE_DIR": "chosen", "XDG_CACHE_HOME": "xdg"}, "chosen/cuda"),
        ({"PYATTN_CACHE_DIR": "~/chosen"}, "home/chosen/cuda"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/pyattn/cuda"),
        ({"PYATTN_CACHE_DIR": "", "XDG_CACHE_HOME": ""}, "home/.cache/pyattn/cuda"),
        ({}, "home/.cache/pyattn/cuda"),
    ],
)
def test_where_the_cache_is(tmp_path, monkeypatch, variables, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("PYATTN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": str(tmp_path / "home")} | variables).items():
        monkeypatch.setenv(name, value)
    assert jit._folder().absolute() == tmp_path / expected


def compiles_without_a_cache(compiled, match):
    """Every time, and warns the first time alone."""
    compiled.clear()
    with pytest.warns(RuntimeWarning, match=match):
        code = cubin()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cubin() == code
        cubin(arch="sm_90a")
    assert compiled == ["sm_80", "sm_80", "sm_90a"]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702], ids=oct)
def test_a_folder_that_others_write_to_is_not_used(sources, compiled, tmp_path, mode):
    cubin()  # an entry that must not be read
    (entry,) = entries(tmp_path)
    entry.parent.chmod(mode)
    compiles_without_a_cache(compiled, "others may write")
    assert entries(tmp_path) == [entry]


def test_a_folder_of_another_user_is_not_used(sources, compiled, tmp_path, monkeypatch):
    cubin()
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    compiles_without_a_cache(compiled, "another user")


def test_a_folder_that_cannot_be_made(sources, compiled, tmp_path):
    (tmp_path / "cache").write_text("a file")
    compiles_without_a_cache(compiled, "cannot be made")


def test_a_folder_that_cannot_be_written(sources, compiled, tmp_path, monkeypatch):
    def refused(dir):
        raise OSError(errno.EROFS, "Read-only file system", dir)

    cubin(defines={"N": 7, "NAME": "kept"})
    monkeypatch.setattr(jit.tempfile, "mkstemp", refused)  # root may write to a folder whatever its mode
    compiles_without_a_cache(compiled, "Read-only file system")
    compiled.clear()
    cubin(defines={"N": 7, "NAME": "kept"})
    assert compiled == [], "what is there is used"


def test_a_full_disk_leaves_no_part_of_an_entry(sources, compiled, tmp_path, monkeypatch):
    def refused(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refused)
    compiles_without_a_cache(compiled, "No space left")
    assert entries(tmp_path) == []


PROCESS = """
import hashlib, importlib.util, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("jit", sys.argv[1])  # without pyattn: torch takes seconds to import
jit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jit)
jit.SOURCES = Path(sys.argv[2])
print(jit.nvrtc_version(), flush=True)
sys.stdin.readline()
print(hashlib.sha256(jit.cubin("kernel.cuh", {"N": 2, "NAME": "kernel"}, "sm_80")).hexdigest())
"""


def test_many_processes_at_once(sources, tmp_path):
    command = [sys.executable, "-W", "error", "-c", PROCESS, jit.__file__, str(sources)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(16)]
    for process in processes:
        assert process.stdout.readline(), "did not start"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = {process.communicate()[0].strip() for process in processes}
    assert results == {hashlib.sha256(jit.compile("kernel.cuh", DEFINES, "sm_80")).hexdigest()}
    (entry,) = entries(tmp_path)
    assert jit._read(entry) == cubin()


@pytest.fixture
def fresh():
    """What is remembered of NVRTC is forgotten, before the test and after it."""
    for function in (jit.unavailable, jit.nvrtc_version):
        function.cache_clear()
    yield
    for function in (jit.unavailable, jit.nvrtc_version):
        function.cache_clear()


def test_a_missing_package_is_a_reason(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    (reason,) = jit.unavailable()
    assert "cuda.bindings" in reason and 'pip install "pyattn[cuda]"' in reason


def test_a_missing_library_is_a_reason(fresh, monkeypatch):
    def missing(name):
        raise RuntimeError("no libnvrtc.so\n  anywhere\n")

    monkeypatch.setattr(jit, "_call", missing)
    (reason,) = jit.unavailable()
    assert "(no libnvrtc.so anywhere)" in reason and 'pip install "pyattn[cuda]"' in reason


def test_nvrtc_is_not_loaded_with_pyattn():
    code = "import sys, pyattn; sys.exit('cuda.bindings.nvrtc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_sources_are_there():
    assert list(jit.SOURCES.glob("*.cuh"))
