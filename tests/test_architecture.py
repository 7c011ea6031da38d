"""The house of DESIGN.md: imports go down only, and one file each knows pybind11 and OpenMP."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Lower may not import higher. ``checks`` and ``explanation`` stand between the public functions and dispatch.
LEVELS = {
    "spec": 0,
    "_native": 0,
    "kernels": 0,
    "tuning": 0,
    "jit": 0,
    "reference": 1,
    "reference_projection": 1,
    "backends": 1,
    "dispatch": 2,
    "checks": 2,
    "batching": 2,
    "nested": 2,
    "flops": 2,
    "library": 2,
    "paging": 2,
    "log": 3,
    "explanation": 3,
    "ops": 4,
    "projection_ops": 4,
    "kv_cache_ops": 4,
    "kv_cache_state": 4,
    "functional": 5,
    "projection": 5,
    "merging": 5,
    "kv_cache": 5,
    "decoding": 6,
    "sdpa": 6,
    "testing": 7,
    "nn": 7,
    "measure": 8,
    "models": 8,
    "integrations": 8,
    "compare": 9,
    "precompile": 9,
    "cli": 10,
}
REFERENCES = ("reference", "reference_projection")
STANDALONE = {"spec": {"torch"}, "kernels": {"torch", "triton", "pyattn"}} | {
    part: {"torch", "pyattn"} for part in REFERENCES
}
STANDARD = {"__future__", "collections", "dataclasses", "functools", "math", "typing"}


def imports(source):
    """Dotted names of modules that the source imports, wherever in it; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(module, source):
    """What the module, named by its path below pyattn such as ``backends.cpu``, may not import."""
    part = module.split(".")[0]
    for name in imports(source):
        top, _, below = name.partition(".")
        target = below.split(".")[0]
        if part in STANDALONE and top not in STANDALONE[part] | STANDARD:
            yield f"{module} imports {name}"
        elif top != "pyattn" or target == part == "kernels":
            continue
        elif part == "backends" and target == "backends" and below.split(".")[1:2] != [module.split(".")[1]]:
            yield f"{module} imports another backend, {name}"
        elif (part in REFERENCES and target != "spec") or part == "kernels":
            yield f"{module} imports {name}"
        elif target in LEVELS and LEVELS[target] >= LEVELS[part] and target not in (part, "spec"):
            yield f"{module} imports {name}, which stands no lower"


def modules():
    """``(dotted name below pyattn, path)``; ``__init__`` and ``__main__`` of the package may import all."""
    for path in sorted((ROOT / "pyattn").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "pyattn").with_suffix("").parts)
        if name not in ("__init__", "__main__"):
            yield name, path


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_go_down_only(module, path):
    assert module.split(".")[0] in LEVELS, f"{module} has no place in the house: give it one"
    assert list(violations(module, path.read_text())) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("spec", "from pyattn import checks"),
        ("spec", "import numpy"),
        ("reference", "from pyattn.dispatch import select"),
        ("reference", "def f():\n    import pyattn.ops"),
        ("dispatch", "from pyattn.functional import attention"),
        ("dispatch", "from pyattn import ops"),
        ("backends.cpu", "from pyattn.backends import triton"),
        ("backends.cpu", "from pyattn import dispatch"),
        ("ops", "import pyattn.functional"),
        ("functional", "from pyattn.nn import MultiheadAttention"),
        ("nn", "from pyattn import models"),
        ("kernels.tile", "from pyattn.spec import Problem"),
        ("kernels.tile", "import numpy"),
    ],
)
def test_a_planted_violation_is_found(module, source):
    assert list(violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("backends.cpu", "from pyattn import _native\nfrom pyattn.spec import Problem"),
        ("kernels.tile", "import triton.language as tl\nfrom pyattn.kernels import tile"),
        ("models.gpt", "from pyattn import functional"),
    ],
)
def test_what_goes_down_is_allowed(module, source):
    assert list(violations(module, source)) == []


OWNERS = {"pybind11": r"bindings\.cpp", "omp": r"parallel\.(h|cpp)"}


def users(word, files):
    pattern = {"pybind11": r"pybind11", "omp": r"#\s*pragma\s+omp|\bomp_\w+|<omp\.h>"}[word]
    return {path.name for path in files if re.search(pattern, path.read_text())}


@pytest.mark.parametrize("word", OWNERS)
def test_one_file_knows_the_library(word):
    paths = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cuh")]
    found = users(word, paths)
    assert found, "the owner was renamed, or the spelling changed"
    assert all(re.fullmatch(OWNERS[word], name) for name in found), found


def test_a_trespasser_is_found(tmp_path):
    (tmp_path / "kernel.cpp").write_text("#pragma omp parallel for\n")
    (tmp_path / "isa.cpp").write_text("#include <pybind11/pybind11.h>\n")
    assert users("omp", tmp_path.iterdir()) == {"kernel.cpp"}
    assert users("pybind11", tmp_path.iterdir()) == {"isa.cpp"}
