"""The operations of pyattn's ops for ``torch.utils.flop_counter``, counted as torch counts those of its own SDPA.

That is the matrix products in full: of attention two in the forward and five in the backward, whatever a mask leaves
out, of projections one, and one for each gradient of what was multiplied.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyattn.spec import AttentionTensors, ProjectionTensors

_COUNTER = "torch.utils.flop_counter"


def _lengths(cu_seqlens: Tensor, longest: int | None, total: int) -> list[int]:
    """Of each sequence; where they cannot be read, the most that they can be."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    if cu_seqlens.device.type == "meta" or isinstance(cu_seqlens, FakeTensor | FunctionalTensor):
        return [total if longest is None else longest] * (cu_seqlens.shape[0] - 1)
    return cu_seqlens.diff().tolist()


def _pairs(t: AttentionTensors, max_seqlen_q: int | None, max_seqlen_k: int | None) -> int:
    """Query-key pairs of one head over all samples."""
    paged_length = None if t.block_table is None else t.block_table.shape[1] * t.key.shape[2]
    if t.cu_seqlens_q is None:
        return t.query.shape[0] * t.query.shape[2] * (paged_length or t.key.shape[2])
    rows = _lengths(t.cu_seqlens_q, max_seqlen_q, t.query.shape[0])
    if t.cu_seqlens_k is None:
        return sum(rows) * (paged_length or 0)
    keys = _lengths(t.cu_seqlens_k, max_seqlen_k, t.key.shape[0])
    return sum(n * m for n, m in zip(rows, keys, strict=True))


def _formula(products_d: int, products_dv: int) -> Any:
    """Counts ``products_d`` matrix products with the head dim D and ``products_dv`` with Dv."""

    def count(*args: Any, **_: Any) -> int:
        t = AttentionTensors._make(args[: len(AttentionTensors._fields)])
        longest = args[len(AttentionTensors._fields) + 6 : len(AttentionTensors._fields) + 8]
        sizes = products_d * t.query.shape[-1] + products_dv * t.value.shape[-1]
        return 2 * t.query.shape[1] * _pairs(t, *longest) * sizes

    return count


def _projection(*args: Any, **_: Any) -> int:
    t = ProjectionTensors._make(args[: len(ProjectionTensors._fields)])
    return 2 * t.x.shape[0] * t.x.shape[2] * t.weight.numel()  # type: ignore[union-attr]


def _projection_backward(*args: Any, **_: Any) -> int:
    needs = args[-2]
    return _projection(*args) * sum(needs[:2])  # one product for the gradient of x, one for that of the weight


def _register(counter: ModuleType) -> None:
    register = counter.register_flop_formula
    register(torch.ops.pyattn.attention_forward, get_raw=True)(_formula(1, 1))
    register(torch.ops.pyattn.attention_backward, get_raw=True)(_formula(3, 2))
    register(torch.ops.pyattn.projection, get_raw=True)(_projection)
    register(torch.ops.pyattn.projection_backward, get_raw=True)(_projection_backward)


class _WhenImported:
    """Registers the formulas once torch's counter is imported: importing it here would import Triton with it."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == _COUNTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Makes the ops' formulas known to torch's counter, now or when it is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported)
