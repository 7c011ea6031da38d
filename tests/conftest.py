"""Fixtures: engines (a backend on one instruction set), seeds, threads, and poisoned memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # for `import interpreter`: importlib mode does not add it
if not torch.cuda.is_available():
    with contextlib.suppress(ImportError):  # without triton there is nothing to interpret
        import interpreter  # noqa: F401  before anything imports triton

from pyattn.backends import cpu
from pyattn.testing import Case, forward_and_gradients, run


class Engine(NamedTuple):
    """A backend, on one instruction set where it has several."""

    backend: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.isa or self.backend

    @contextlib.contextmanager
    def at_work(self, threads: int = 2) -> Iterator[None]:
        """So many threads of kernels; skips the test if ``why_not`` has a reason against what is computed inside."""
        before = torch.get_num_threads()
        if self.backend != "reference":
            torch.set_num_threads(threads)
        try:
            yield
        except NotImplementedError as error:
            if f"backend {self.backend!r} cannot compute this" not in str(error):
                raise
            pytest.skip(str(error))
        finally:
            torch.set_num_threads(before)

    def run(self, kwargs: dict[str, Any], threads: int = 2, **overrides: Any) -> Any:
        """``testing.run`` on this backend."""
        with self.at_work(threads):
            return run(kwargs, **{"backend": self.backend, **overrides})

    def results(
        self,
        kwargs: dict[str, Any],
        through: tuple[str, ...] = (),
        grads: dict[str, torch.Tensor] | None = None,
        threads: int = 2,
    ) -> dict[str, torch.Tensor]:
        """``testing.forward_and_gradients`` on this backend."""
        with self.at_work(threads):
            return forward_and_gradients(
                kwargs, lambda k: run(k, backend=self.backend, return_lse=True), through, grads
            )


def _engines() -> list[Engine]:
    isas: list[str | None] = [None] if cpu.unavailable() else list(cpu.available_isas())
    return [Engine("cpu", isa) for isa in isas]


def pytest_configure(config: pytest.Config) -> None:
    # derandomize: the same examples on every run, so that a failure is not a matter of luck.
    common = {
        "derandomize": True,
        "database": None,
        "deadline": None,
        # An engine and a seed stay the same for all examples of a test, and that is meant.
        "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    }
    settings.register_profile("default-run", max_examples=25, **common)
    settings.register_profile("exhaustive", max_examples=400, **common)
    everything = "not exhaustive" not in config.getoption("markexpr")
    settings.load_profile("exhaustive" if everything else "default-run")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, others in (("engine", []), ("any_engine", [Engine("reference")])):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, _engines() + others, indirect=True, ids=str)


def pytest_make_parametrize_id(val: object) -> str | None:
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    return val.name if isinstance(val, Case) else None


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Any:
    """Each native backend on each instruction set that this machine has."""
    yield from _at_hand(request.param)


@pytest.fixture
def any_engine(request: pytest.FixtureRequest) -> Any:
    """``engine``, and the reference: for what every backend promises."""
    yield from _at_hand(request.param)


def _at_hand(chosen: Engine) -> Iterator[Engine]:
    if chosen.backend == "cpu" and cpu.unavailable():
        pytest.skip("; ".join(cpu.unavailable()))
    with cpu.use_isa(chosen.isa) if chosen.isa else contextlib.nullcontext():
        yield chosen


@pytest.fixture(autouse=True)
def _fixed_seed_and_threads() -> Any:
    torch.manual_seed(0)
    # For the reference on small inputs: on a busy machine two threads mostly wait for each other.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Any:
    """``torch.empty`` gives NaN, so an output element that nobody writes does not pass for a right one."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
