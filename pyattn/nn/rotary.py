"""Rotary position embedding: the frequencies of pairs, stretched for longer texts, and the tables made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyattn import checks
from pyattn.projection import Rotary

Scaling = Mapping[str, Any]


def _plain(dim: int, base: float) -> Tensor:
    """``base^(-2 i / dim)``, ``[dim / 2]``."""
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _linear(dim: int, base: float, s: Scaling, length: int) -> tuple[Tensor, float]:
    """Positions divided by the factor (Chen et al. 2023, arXiv:2306.15595)."""
    return _plain(dim, base) / s["factor"], 1.0


def _ntk(dim: int, base: float, s: Scaling, length: int) -> tuple[Tensor, float]:
    """A larger base, so that the slowest pair is slower by the factor and the fastest as fast."""
    return _plain(dim, base * s["factor"] ** (dim / (dim - 2))), 1.0


def _dynamic(dim: int, base: float, s: Scaling, length: int) -> tuple[Tensor, float]:
    """As "ntk", by a factor that grows with the length, from 1 at the original one."""
    original = s["original_max_position_embeddings"]
    growth = s["factor"] * max(length, original) / original - (s["factor"] - 1)
    return _plain(dim, base * growth ** (dim / (dim - 2))), 1.0


def _yarn(dim: int, base: float, s: Scaling, length: int) -> tuple[Tensor, float]:
    """Peng et al. 2023, arXiv:2309.00071: slow pairs as "linear", fast ones as they are, and a ramp between."""
    original = s["original_max_position_embeddings"]

    def pair_turning(turns: float) -> float:
        """The pair, not rounded, that turns so often within the original length."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_turning(s.get("beta_fast") or 32), pair_turning(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slow = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    frequencies = _plain(dim, base)
    return frequencies * (slow / s["factor"] + 1 - slow), _yarn_magnitude(s)


def _yarn_magnitude(s: Scaling) -> float:
    if s.get("attention_factor") is not None:
        return s["attention_factor"]

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(s["factor"]) + 1.0 if s["factor"] > 1 else 1.0

    if s.get("mscale") and s.get("mscale_all_dim"):
        return magnitude(s["mscale"]) / magnitude(s["mscale_all_dim"])
    return magnitude(1.0)


_ORIGINAL = "original_max_position_embeddings"
_KINDS: dict[str, tuple[Callable[..., tuple[Tensor, float]], frozenset[str], frozenset[str]]] = {
    # the function, what it must be given, and what it may be
    "default": (lambda dim, base, s, length: (_plain(dim, base), 1.0), frozenset(), frozenset()),
    "linear": (_linear, frozenset({"factor"}), frozenset({_ORIGINAL})),
    "ntk": (_ntk, frozenset({"factor"}), frozenset({_ORIGINAL})),
    "dynamic": (_dynamic, frozenset({"factor", _ORIGINAL}), frozenset()),
    "yarn": (
        _yarn,
        frozenset({"factor", _ORIGINAL}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
}
_NAMES_OF_KIND = ("rope_type", "type")


def _check_scaling(scaling: Any) -> tuple[str, Scaling]:
    if scaling is None:
        return "default", {}
    if not isinstance(scaling, Mapping):
        raise TypeError(f"scaling must be a dict, got {type(scaling).__name__}")
    kind = next((scaling[name] for name in _NAMES_OF_KIND if name in scaling), None)
    if kind not in _KINDS:
        raise ValueError(f"scaling must have a rope_type, one of {', '.join(_KINDS)}, got {kind!r}")
    _, needed, optional = _KINDS[kind]
    given = {name: x for name, x in scaling.items() if name not in _NAMES_OF_KIND}
    for name in sorted(needed):
        if given.get(name) is None:
            raise ValueError(f"scaling must have {name} for rope_type {kind!r}, got {dict(scaling)}")
    for name, x in given.items():
        if name not in needed | optional:
            raise ValueError(f"scaling must not have {name} for rope_type {kind!r}: it would have no effect")
        if name == "truncate":
            checks.check_bool("scaling's truncate", x)
        elif x is not None and checks.check_number(f"scaling's {name}", x) <= 0:
            raise ValueError(f"scaling's {name} must be positive, got {x}")
    if given.get("factor", 1) < 1:
        raise ValueError(f"scaling's factor must be at least 1, got {given['factor']}")
    return kind, given


class RotaryEmbedding(nn.Module):
    """Makes a ``pyattn.Rotary``, the angles of rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Pair i of a head turns by ``position * base^(-2 i / dim)``. The tables are float32, computed in float64, and stay so
    when the module is cast; they are buffers, but not in the state dict.

    Args:
        dim: elements of a head that are turned, an even number; the head dim, or less.
        max_positions: rows of the tables.
        base: of the frequencies.
        interleaved: whether a pair is ``(2 i, 2 i + 1)``, as in GPT-J, or ``(i, i + dim / 2)``, as in Llama.
        scaling: None, or a dict with the words of ``rope_scaling`` in Hugging Face's configurations: ``rope_type``
            ("type" does as well) and, by it,

            * "linear": ``factor``; positions are divided by it.
            * "ntk": ``factor``; the base is multiplied by ``factor^(dim / (dim - 2))``.
            * "dynamic": ``factor``, ``original_max_position_embeddings``; the same, by a factor that grows with the
              length once that exceeds the original one.
            * "yarn": ``factor``, ``original_max_position_embeddings`` and perhaps ``beta_fast``, ``beta_slow``,
              ``truncate``, ``attention_factor``, ``mscale``, ``mscale_all_dim``.
            * "default": none.
        device: of the tables.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import torch, pyattn
        >>> embedding = pyattn.nn.RotaryEmbedding(32, 1000, scaling={"rope_type": "linear", "factor": 4.0})
        >>> q = torch.randn(2, 8, 100, 64)
        >>> turned, _ = pyattn.apply_rotary(q, q, embedding(100))
        >>> turned.shape
        torch.Size([2, 8, 100, 64])
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        max_positions: int,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        scaling: Scaling | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        if checks.check_int("dim", dim) < 2 or dim % 2:
            raise ValueError(f"dim must be even and at least 2, got {dim}")
        if checks.check_int("max_positions", max_positions) < 1:
            raise ValueError(f"max_positions must be at least 1, got {max_positions}")
        if not checks.check_number("base", base) > 1:
            raise ValueError(f"base must be greater than 1, got {base}")
        checks.check_bool("interleaved", interleaved)
        self.dim, self.max_positions, self.base, self.interleaved = dim, max_positions, base, interleaved
        self.kind, self.scaling = _check_scaling(scaling)
        if self.kind in ("ntk", "dynamic") and dim == 2:
            raise ValueError(f"dim must be greater than 2 for rope_type {self.kind!r}, got 2")
        cos, sin = self._tables(0, torch.get_default_device() if device is None else torch.device(device))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin for texts of a length, which only "dynamic" looks at; ``[max_positions, dim / 2]``."""
        with torch.device("cpu"):
            frequencies, magnitude = _KINDS[self.kind][0](self.dim, self.base, self.scaling, length)
            angles = torch.outer(torch.arange(self.max_positions, dtype=torch.float64), frequencies)
            cos, sin = ((table * magnitude).to(torch.float32) for table in (angles.cos(), angles.sin()))
        return cos.to(device), sin.to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        self.cos, self.sin = self._tables(0, self.cos.device)  # neither rounded nor, coming from "meta", without values
        return self

    def extra_repr(self) -> str:
        scaling = f", scaling={{'rope_type': {self.kind!r}, ...}}" if self.kind != "default" else ""
        return f"{self.dim}, {self.max_positions}, base={self.base}, interleaved={self.interleaved}{scaling}"

    def forward(self, length: int | None = None) -> Rotary:
        """The tables for texts of a length.

        Args:
            length: at most ``max_positions``; None for that. Only dynamic scaling depends on it.

        Returns:
            A ``pyattn.Rotary`` with tables ``[max_positions, dim / 2]``, float32.

        Raises:
            ValueError: the length is beyond ``max_positions``.
        """
        length = self.max_positions if length is None else checks.check_int("length", length)
        if length > self.max_positions:
            raise ValueError(f"length must be at most max_positions = {self.max_positions}, got {length}")
        if self.kind == "dynamic" and length > self.scaling[_ORIGINAL]:
            return Rotary(*self._tables(length, self.cos.device), self.interleaved)
        return Rotary(self.cos, self.sin, self.interleaved)
