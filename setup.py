"""Builds pyattn._native, the one extension, with ninja. Metadata is in pyproject.toml.

Kernels (csrc/cpu/*_kernel.cpp) are compiled once per ISA of the table below, every other file once, for the
baseline of the architecture; which ISA runs is decided at run time. It takes a C++17 compiler with OpenMP and
the Python headers. Environment:

    CXX, CXXFLAGS, LDFLAGS   as everywhere
    PYATTN_WERROR=1          warnings are errors
    PYATTN_SANITIZE=LIST     -fsanitize=LIST, for example address,undefined (see `make sanitize`)
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"

# ISA -> compiler flags, lowest first. They are linked in this order, after the baseline files: where several
# ISAs define the same inline function the linker keeps the first, and that one must run on every machine.
X86_64 = {
    "portable": "",
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "avx512_amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}
ISAS = X86_64 if sysconfig.get_platform().endswith("-x86_64") else {"portable": ""}

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp") if "emulator" not in path.parts)
KERNELS = [source for source in SOURCES if Path(source).match("csrc/cpu/*_kernel.cpp")]
NOT_OF_AMX = ("csrc/cpu/attention_backward_kernel.cpp",)  # which is that of avx512
BINDINGS = "csrc/bindings.cpp"  # the only file that sees Python

# Not -ffast-math: inf and NaN mean something here.
COMPILE = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -ffp-contract=fast -Wall -Wextra"


def flags() -> tuple[str, str]:
    """The compile and link flags that all files share."""
    compile, link = f"{COMPILE} -Icsrc", "-shared -fopenmp -ldl"
    if os.environ.get("PYATTN_WERROR") == "1":
        compile += " -Werror"
    if sanitize := os.environ.get("PYATTN_SANITIZE"):
        compile += f" -fsanitize={sanitize} -fno-omit-frame-pointer -g -O1"
        link += f" -fsanitize={sanitize}"
    else:
        compile += " -DNDEBUG"
    return f"{compile} {os.environ.get('CXXFLAGS', '')}", f"{link} {os.environ.get('LDFLAGS', '')}"


def isas() -> dict[str, str]:
    """Those whose flags the compiler knows: an old one has no AMX."""

    def known(flags: str) -> bool:
        command = [*shlex.split(os.environ.get("CXX", "g++")), *flags.split(), "-fsyntax-only", "-x", "c++", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0

    return {isa: flags for isa, flags in ISAS.items() if not flags or known(flags)}


def python_includes(build: Path) -> str:
    """Python's headers, and pybind11's, copied to a folder that stays.

    An isolated build has pybind11 in a new temporary folder each time; compiled against that one, the
    bindings would be out of date at every build.
    """
    headers = build / f"pybind11-{pybind11.__version__}"
    if not headers.exists():
        partial = build / "pybind11-partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(pybind11.get_include(), partial)
        partial.rename(headers)
    folders = [headers, sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    return " ".join(f"-isystem {shlex.quote(str(folder))}" for folder in folders)


def write_ninja(build: Path) -> Path:
    """Writes build.ninja and returns the path of the library it makes."""
    library = build / "_native.so"
    cxx = os.environ.get("CXX", "g++")
    compile, link = flags()
    objects: list[str] = []
    with open(build / "build.ninja", "w") as file:
        n = Writer(file, width=1000)
        n.variable("builddir", str(build))
        command = f"{cxx} -MD -MF $out.d {compile} $flags -c $in -o $out"
        n.rule("compile", command, description="CXX $out", depfile="$out.d", deps="gcc")
        n.rule("link", f"{cxx} $in -o $out {link}", description="LINK $out")

        def compile_file(source: str, suffix: str, flags: str) -> None:
            objects.append(str(build / f"{source}{suffix}.o"))
            n.build(objects[-1], "compile", source, variables={"flags": flags})

        found = isas()
        have = " ".join(f"-DPYATTN_HAVE_{isa.upper()}=1" for isa in found)
        for source in sorted(set(SOURCES) - set(KERNELS)):
            compile_file(source, "", f"{have} {python_includes(build)}" if source == BINDINGS else have)
        for isa, isa_flags in found.items():
            defines = f"-DPYATTN_ISA={isa} -DPYATTN_ISA_{isa.upper()}=1"
            for source in sorted(set(KERNELS) - set(NOT_OF_AMX)) if isa == "avx512_amx" else KERNELS:
                compile_file(source, f".{isa}", f"{isa_flags} {defines}")
        n.build(str(library), "link", objects)
    return library


class NinjaBuild(build_ext):
    def run(self) -> None:
        if self.editable_mode:  # setuptools takes a new temporary folder each time: nothing would be reused
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        super().run()

    def build_extension(self, ext: Extension) -> None:
        build, target = Path(self.build_temp), Path(self.get_ext_fullpath(ext.name))
        build.mkdir(parents=True, exist_ok=True)
        library = write_ninja(build)
        jobs = [f"-j{self.parallel}"] if self.parallel else []
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", f"{build}/build.ninja", *jobs]
        if subprocess.run(command).returncode:
            raise SystemExit("pyattn: building the C++ extension failed; the compiler's message is above")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(library), str(target))


# What `import torch` runs stands outside pyattn, since the inside of a package cannot be imported without the whole.
AUTOLOAD = {"pyattn_autoload": "pyattn/integrations/autoload"}

setup(
    # kernels/ has no __init__.py: with one, libraries that run in this folder would take it for PyPI's of that name
    packages=[*find_packages(include=["pyattn*"]), "pyattn.kernels", *AUTOLOAD],
    package_dir=AUTOLOAD,
    ext_modules=[Extension("pyattn._native", SOURCES)],
    cmdclass={"build_ext": NinjaBuild},
)
