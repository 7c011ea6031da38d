"""Triton kernels with a bug planted in them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import pyattn

# In an order in which each is loaded after those that it imports.
_NAMES = ["launch", "tile", "attention_fwd", "attention_decode", "attention_bwd", "projection_tile", "projection"]


def load_mutant(monkeypatch: pytest.MonkeyPatch, folder: Path, file: str, old: str, new: str) -> None:
    """Loads the kernels from ``folder``, with a text replaced in one file, and gives them to the backend."""
    from pyattn.backends import triton
    from pyattn.backends.triton import projection

    monkeypatch.setattr(triton, "_plans", {})  # of kernels without the bug
    source = Path(importlib.util.find_spec("pyattn.kernels.tile").origin).parent
    for name in _NAMES:
        text = (source / f"{name}.py").read_text()
        if file == f"{name}.py":
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
            text = text.replace(old, new)
        path = folder / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"pyattn.kernels.{name}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        monkeypatch.setattr(pyattn.kernels, name, module)
        spec.loader.exec_module(module)
        if name.startswith("attention"):
            monkeypatch.setattr(triton, name, module)
        elif name == "projection":
            monkeypatch.setattr(projection, "kernels", module)
