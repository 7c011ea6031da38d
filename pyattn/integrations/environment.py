"""What the environment asks pyattn to take over, at the end of its import."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType

from pyattn.integrations import sdpa

_ATTENTION_OF_TRANSFORMERS = "transformers.modeling_utils"  # where it keeps its attention functions


def obey() -> None:
    """``PYATTN_INSTALL=1`` and ``PYATTN_TRANSFORMERS=1``. A failure is reported on stderr."""
    if os.environ.get("PYATTN_INSTALL") == "1":
        _try("PYATTN_INSTALL", sdpa.install)
    if os.environ.get("PYATTN_TRANSFORMERS") == "1":
        _after_import(_ATTENTION_OF_TRANSFORMERS, lambda: _try("PYATTN_TRANSFORMERS", _register))


def _register() -> None:
    from pyattn.integrations import transformers

    transformers.register()


def _try(variable: str, action: Callable[[], object]) -> None:
    try:
        action()
    except Exception:
        print(f"pyattn: {variable}=1 had no effect:", file=sys.stderr)
        traceback.print_exc()


def _after_import(name: str, action: Callable[[], None]) -> None:
    if _is_complete(name):
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


def _is_complete(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as the others do, once, and runs an action after it.

    If that module is just being imported, and torch by it, the next import afterwards runs the action.
    """

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            if _is_complete(self.name):
                sys.meta_path.remove(self)
                self.action()
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.action)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, action: Callable[[], None]) -> None:
        self.loader = loader
        self.action = action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader  # as if it had never been another's
        self.loader.exec_module(module)
        self.action()
