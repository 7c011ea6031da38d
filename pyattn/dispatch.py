"""Who computes a problem: the first backend in order that lists no reason against it."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from pyattn.spec import (
    AttentionSpec,
    AttentionTensors,
    Op,
    Problem,
    ProjectionProblem,
    ProjectionSpec,
    ProjectionTensors,
)

AnyProblem = Problem | ProjectionProblem

_MODULES = {
    "cpu": "pyattn.backends.cpu",
    "cuda": "pyattn.backends.cuda",
    "triton": "pyattn.backends.triton",
    "reference": "pyattn.reference",
}
_PROJECTION_MODULES = {
    "cpu": "pyattn.backends.cpu.projection",
    "triton": "pyattn.backends.triton.projection",
    "reference": "pyattn.reference_projection",
}
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
SLOW_PATH_PAIRS = 2**20  # query-key pairs above which reaching the reference is worth a warning


class SlowPathWarning(UserWarning):
    """No kernel could take a large problem: the O(Lq * Lk) reference computed it."""


class Backend(Protocol):
    """What a backend's module of attention provides."""

    def unavailable(self) -> list[str]: ...
    def why_not(self, problem: Problem) -> list[str]: ...
    def describe(self, problem: Problem) -> str: ...
    def forward(self, spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]: ...
    def backward(
        self,
        spec: AttentionSpec,
        t: AttentionTensors,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        needs_mask_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]: ...


class ProjectionBackend(Protocol):
    """What a backend's module of projections provides."""

    def unavailable(self) -> list[str]: ...
    def why_not(self, problem: ProjectionProblem) -> list[str]: ...
    def describe(self, problem: ProjectionProblem) -> str: ...
    def projection(self, spec: ProjectionSpec, t: ProjectionTensors, save: bool) -> tuple[Tensor, ...]: ...
    def projection_backward(
        self,
        spec: ProjectionSpec,
        t: ProjectionTensors,
        saved: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]: ...
    def rotary(self, spec: ProjectionSpec, t: ProjectionTensors, inverse: bool) -> Tensor: ...


@functools.cache
def load(name: str) -> Backend:
    """The backend called ``name``, imported on first use."""
    return importlib.import_module(_MODULES[name])


@functools.cache
def load_projection(name: str) -> ProjectionBackend:
    """The projections of the backend called ``name``."""
    return importlib.import_module(_PROJECTION_MODULES[name])


def load_for(problem: AnyProblem, name: str) -> Any:
    """The module of the backend ``name`` that computes ``problem``."""
    return load(name) if isinstance(problem, Problem) else load_projection(name)


def order(problem: AnyProblem) -> tuple[str, ...]:
    """Names of the backends that there are for a problem, most preferred first."""
    names = ORDER.get(problem.device.type, ("reference",))
    if not isinstance(problem, Problem):
        return tuple(name for name in names if name in _PROJECTION_MODULES)
    if names[0] == "cuda" and load("cuda").slower_than_triton(problem):  # type: ignore[attr-defined]
        return names[1], names[0], *names[2:]
    return names


def check_backend(name: str | None) -> str:
    if name is None:
        return "auto"
    if not isinstance(name, str) or name not in ("auto", *_MODULES):
        raise ValueError(f"backend must be None or one of {', '.join(_MODULES)}, got {name!r}")
    return name


@functools.lru_cache(maxsize=4096)
def why_not(problem: AnyProblem, name: str) -> tuple[str, ...]:
    """Every reason why the backend ``name`` cannot compute ``problem``; empty if it can."""
    if isinstance(problem, ProjectionProblem) and name not in _PROJECTION_MODULES:
        return ("computes attention, no projections",)
    backend = load_for(problem, name)
    return tuple(backend.unavailable() or backend.why_not(problem))


@functools.lru_cache(maxsize=4096)
def choose(problem: AnyProblem) -> str:
    """The name of the backend that automatic dispatch takes."""
    return next(name for name in order(problem) if not why_not(problem, name))


@functools.lru_cache(maxsize=4096)
def select(problem: AnyProblem, name: str) -> Any:
    """The backend for ``problem``. One named by the caller never falls back: it raises with its reasons."""
    if name == "auto":
        name = choose(problem)
        if name == "reference" and isinstance(problem, Problem):
            _warn_slow_path(problem)
    elif reasons := why_not(problem, name):
        raise NotImplementedError(f"backend {name!r} cannot compute this {problem.op}: {'; '.join(reasons)}")
    return load_for(problem, name)


@functools.cache
def _warn_once(op: Op, message: str) -> None:
    warnings.warn(message, SlowPathWarning, stacklevel=2)


def _warn_slow_path(problem: Problem) -> None:
    others = [name for name in order(problem) if name != "reference"]
    if problem.query_length * problem.key_length > SLOW_PATH_PAIRS:
        reasons = "; ".join(f"{name}: {', '.join(why_not(problem, name))}" for name in others)
        _warn_once(problem.op, f"attention {problem.op} runs on the slow reference ({reasons or 'no other backend'})")


def table(problem: AnyProblem, requested: str = "auto") -> Sequence[tuple[str, tuple[str, ...]]]:
    """``(name, reasons)`` of every backend for the problem's device, in order; one requested besides comes first."""
    names = order(problem)
    if requested not in ("auto", *names):
        names = (requested, *names)
    return [(name, why_not(problem, name)) for name in names]
