"""The backends for GPUs at work: on a GPU if there is one (``pytest -m gpu``), otherwise interpreted and emulated.

Triton's interpreter and the emulator take CPU tensors. There an operation takes long, and a case that is meant to be
quick has small tiles. They are not square, so that rows taken for keys show, and keys are split into several parts.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import emulator
import pytest
import torch

import pyattn
from pyattn import dispatch
from pyattn.backends import cuda, triton
from pyattn.backends.cuda import call, launch
from pyattn.backends.cuda import kernels as cuda_kernels
from pyattn.testing import CASES, OUTPUTS, Case, check_case, forward_and_gradients, make_inputs, run

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
GPU = [pytest.mark.gpu] if ON_GPU else []
MAX_HEAD_DIM = 256


def triton_tiles() -> dict[str, Any]:
    from pyattn.kernels.launch import Tiles

    return {
        "forward": Tiles(32, 16, 4, 1),
        "decode": Tiles(16, 16, 4, 1, SPLIT=32),
        "dkdv": Tiles(16, 32, 4, 1),
        "dq": Tiles(32, 16, 4, 1),
    }


CUDA_TILES = {
    "forward": cuda_kernels.Tiles(32, 16, 2),
    "decode": cuda_kernels.Tiles(16, 32, 1, 2),
    "tall decode": cuda_kernels.Tiles(32, 16, 2),
    "dkdv": cuda_kernels.Tiles(16, 32, 1, 2),
    "dq": cuda_kernels.Tiles(32, 16, 2),
    "dmask": cuda_kernels.Tiles(32, 16, 2),
}


class Kernels(NamedTuple):
    """A backend and a dtype that it computes in."""

    name: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"

    @contextlib.contextmanager
    def at_work(self, small_tiles: bool = True) -> Iterator[None]:
        """Skips the test where the backend cannot be had."""
        with contextlib.ExitStack() as stack:
            if self.name == "triton":
                if importlib.util.find_spec("triton") is None:
                    pytest.skip("triton is not installed")
                if small_tiles:
                    stack.enter_context(mock.patch.object(triton, "DECODE_ROWS", 8))
                    stack.enter_context(triton.use_tiles(**triton_tiles()))
            else:
                if not ON_GPU:
                    if not emulator.supported():
                        pytest.skip("the emulator runs on x86-64")
                    stack.enter_context(emulator.installed())
                if small_tiles:
                    stack.enter_context(mock.patch.object(call, "DECODE_ROWS", 8))
                    stack.enter_context(mock.patch.object(cuda, "SPLIT", 32))
                    tiles = {name: (CUDA_TILES[name.removesuffix(", other")],) * 5 for name in cuda_kernels.TILES}
                    stack.enter_context(mock.patch.dict(cuda_kernels.TILES, tiles))
                    stack.enter_context(emulator.cleared())
            yield

    def run(self, kwargs: dict[str, Any]) -> torch.Tensor:
        return run(kwargs, backend=self.name)

    def results(
        self, kwargs: dict[str, Any], through: Any = (), grads: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Outputs and gradients."""
        return forward_and_gradients(kwargs, lambda k: run(k, backend=self.name, return_lse=True), through, grads)

    def check(self, case: Case, backward: bool = True, **options: Any) -> None:
        """Forward and gradients, if the backend computes the case."""
        backward = backward and case.differentiable
        through = OUTPUTS if backward else ()
        kwargs = make_inputs(case, self.dtype, DEVICE, requires_grad=backward) | options
        if reasons := dispatch.why_not(pyattn.explain(**kwargs).problem, self.name):
            assert max(case.D, case.Dv or 0) > MAX_HEAD_DIM, reasons  # skips hide no hole
            pytest.skip("; ".join(reasons))
        check_case(self.results(kwargs, through), case, self.dtype, through)


def assert_modes_give_the_same_bits() -> None:
    """Of the emulator, which is at work."""
    (case,) = (case for case in CASES if case.name == "tiles, gqa")
    kwargs = make_inputs(case, torch.bfloat16, requires_grad=True)
    found = []
    for racing, seed in ((False, 0), (True, 1), (True, 2)):
        launch.gpu.configure(racing, seed)  # type: ignore[attr-defined]
        found.append(Kernels("cuda", torch.bfloat16).results(kwargs, OUTPUTS))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


TWO_TYPES = [
    Kernels("triton", torch.float32),
    Kernels("triton", torch.bfloat16),
    Kernels("cuda", torch.float16),
    Kernels("cuda", torch.bfloat16),
]
ONE_TYPE = [TWO_TYPES[0], TWO_TYPES[2]]
in_two_types = pytest.mark.parametrize("kernels", TWO_TYPES, indirect=True, ids=str)
in_one_type = pytest.mark.parametrize("kernels", ONE_TYPE, indirect=True, ids=str)


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), f"{name}: {int((x != expected[name]).sum())} elements differ"
