"""Weights packed once for the CPU's kernels, instead of on every call."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyattn.nn.implementations import Implementation


class _State(NamedTuple):
    """What a change of a weight changes, where torch can see it."""

    version: int
    address: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(weight: Tensor) -> _State:
        return _State(weight._version, weight.data_ptr(), weight.dtype, weight.shape, weight.stride())


class PackedWeight:
    """A weight, packed in the parts that calls use, each when it is first used."""

    def __init__(self, weight: Tensor) -> None:
        from pyattn.backends import cpu  # backends load lazily

        self._held = weight.detach()  # while this memory is held, no other weight can be at its address
        self._state, self._isa = _State.of(weight), cpu.isa()
        self._parts: dict[tuple[int, int], Tensor] = {}

    def is_of(self, weight: Tensor) -> bool:
        return _State.of(weight) == self._state

    def rows(self, name: str, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)``, packed. Raises ValueError if they are no longer those that were to be packed."""
        from pyattn.backends import cpu
        from pyattn.backends.cpu import projection

        if not self.is_of(weight):
            raise ValueError(f"weights changed since prepack: {name}; call pyattn.nn.prepack or pyattn.nn.unpack")
        if cpu.isa() != self._isa:
            raise ValueError(
                f"weights changed since prepack: {name} is packed for {self._isa}, but {cpu.isa()} is in use; "
                "call pyattn.nn.prepack or pyattn.nn.unpack"
            )
        if (start, stop) not in self._parts:
            self._parts[start, stop] = projection.pack_weight(self._held[start:stop].contiguous())
        return self._parts[start, stop]


class Prepackable(nn.Module):
    """A module whose products can take their weights packed. They are in no copy, file or state dict."""

    attention: Implementation
    _packed_weights: dict[str, PackedWeight] | None = None

    def _weights_to_pack(self) -> tuple[str, ...]:
        """Names of parameters."""
        raise NotImplementedError

    def _packed(self, name: str, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor | None:
        """Rows of a weight, packed, for as many products as ``x``, ``[B, L, E]``, has rows; None to do without."""
        if self._packed_weights is None or self.attention != "pyattn" or not _takes_packed(x):
            return None
        weight = attrgetter(name)(self)
        return self._packed_weights[name].rows(name, weight, start, weight.shape[0] if stop is None else stop)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_packed_weights", None)
        return state

    def _apply(self, fn: Any, recurse: bool = True) -> Prepackable:
        super()._apply(fn, recurse)
        if self._packed_weights is not None and not all(
            packed.is_of(attrgetter(name)(self)) for name, packed in self._packed_weights.items()
        ):
            self._packed_weights = None
        return self


def _takes_packed(x: Tensor) -> bool:
    """Whether a product with ``x`` reads a packed weight: not in a graph, nor where autocast makes another weight."""
    from pyattn import _native

    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and x.shape[0] * x.shape[1] > _native.FEW_ROWS
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _why_not(weight: Any) -> str | None:
    from pyattn.backends import cpu

    if reasons := cpu.unavailable():
        return "; ".join(reasons)
    if type(weight) is not nn.Parameter:
        return f"it is a {type(weight).__name__}, which something else may make anew"
    if weight.device.type != "cpu":
        return f"it is on {weight.device}, and packing is for the CPU's kernels"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the CPU's kernels do not compute in {weight.dtype}"
    if weight.is_inference():
        return "it was made in inference mode, where torch does not see changes"
    return None


def _prepackable(module: Any) -> list[tuple[str, Prepackable]]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    return [(name, part) for name, part in module.named_modules() if isinstance(part, Prepackable)]


def prepack(module: nn.Module) -> None:
    """Packs the weights of pyattn's modules once, instead of on every call with many rows. Results are the same bits.

    The weights are then frozen. A call after a change that torch sees, as by an optimizer, ``load_state_dict`` or
    ``copy_``, raises an error; call ``prepack`` again, or ``unpack``. A change through ``.data`` in place,
    ``weight.data.mul_(2)``, is not seen: calls go on with the old weights.

    A weight is packed when a call first needs it, and takes its size again, or twice that in float16 and, without
    AVX-512-BF16, in bfloat16. Copies and files of the module are not packed, nor is it itself once ``to`` has moved or
    cast its weights. Calls under autocast, in ``torch.func`` and compiled ones do not use packed weights.

    Args:
        module: any module; each ``MultiheadAttention``, ``GroupedQueryAttention`` and ``CrossAttention`` in it is
            packed, if its ``attention`` is "pyattn".

    Raises:
        TypeError: ``module`` is no module.
        ValueError: there is nothing to pack in it.
        NotImplementedError: a weight cannot be packed, as on a GPU. Nothing is packed then.

    Example:
        >>> import torch, pyattn
        >>> module = pyattn.nn.MultiheadAttention(64, 4, batch_first=True).eval()
        >>> x = torch.randn(2, 100, 64)
        >>> expected, _ = module(x, x, x)
        >>> pyattn.nn.prepack(module)
        >>> torch.equal(module(x, x, x)[0], expected)
        True
    """
    parts = [(name, part) for name, part in _prepackable(module) if part.attention == "pyattn"]
    if not parts:
        raise ValueError('module must hold a module of pyattn.nn with attention="pyattn", got none')
    for name, part in parts:
        for weight in part._weights_to_pack():
            if (reason := _why_not(attrgetter(weight)(part))) is not None:
                where = f"{name}.{weight}" if name else weight
                raise NotImplementedError(f"{where} cannot be packed: {reason}")
    for _, part in parts:
        part._packed_weights = {name: PackedWeight(attrgetter(name)(part)) for name in part._weights_to_pack()}


def unpack(module: nn.Module) -> None:
    """Undoes ``prepack``: weights may change again.

    Args:
        module: any module.

    Raises:
        TypeError: ``module`` is no module.

    Example:
        >>> import torch, pyattn
        >>> module = pyattn.nn.MultiheadAttention(64, 4)
        >>> pyattn.nn.prepack(module)
        >>> pyattn.nn.unpack(module)
        >>> _ = module.load_state_dict(module.state_dict())
    """
    for _, part in _prepackable(module):
        part._packed_weights = None
