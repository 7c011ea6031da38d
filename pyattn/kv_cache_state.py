"""The numbers of a KV cache: what of its buffer each sample uses, and what a saved one must be to be loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyattn import checks

NAMES = {"key", "value", "starts", "lengths", "seen", "block_table", "page_size"}
Tables = list[list[int | None]]


class Span:
    """What of its buffer each sample uses: numbers for decisions; tensors for kernels, made when they are asked for."""

    def __init__(self, starts: list[int], lengths: list[int], seen: list[int], device: torch.device) -> None:
        self.starts, self.lengths, self.seen = self.numbers = starts, lengths, seen
        self._device = device
        self._tensors: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """The numbers of that name, ``[B]``: int64, which the CPU's kernels read, or int32 for those of a device."""
        if name not in self._tensors:
            numbers: list[int] = getattr(self, name)
            dtype = torch.int64 if self._device.type == "cpu" else torch.int32
            inference = torch.is_inference_mode_enabled()
            with torch.inference_mode(False) if inference else contextlib.nullcontext():  # a backward may save them
                if len(set(numbers)) == 1:  # which takes half the time, and copies nothing to a device
                    x = torch.full((len(numbers),), numbers[0], dtype=dtype, device=self._device)
                else:
                    x = torch.tensor(numbers, dtype=dtype, device="cpu").to(self._device, non_blocking=True)
            self._tensors[name] = x
        return self._tensors[name]


def read(
    state: Any, key: Tensor, value: Tensor, batch: int, max_length: int, page_size: int | None, room: int
) -> tuple[list[int], list[int], list[int], Tables]:
    """``starts, lengths, seen`` and the page tables of a state that fits a cache of these buffers and sizes.

    ``room`` is one past the largest buffer index. A dense cache has no tables.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a dict, got {type(state).__name__}")
    if set(state) != NAMES:
        raise ValueError(f"state must have the entries {sorted(NAMES)}, got {sorted(state)}")
    if state["page_size"] != page_size:
        raise ValueError(f"state's page_size must be {page_size}, got {state['page_size']}")
    starts, lengths, seen = (
        checks.check_numbers(f"state's {n}", state[n], batch) for n in ("starts", "lengths", "seen")
    )
    for start, end, n in zip(starts, lengths, seen, strict=True):
        if not 0 <= start <= end <= min(start + max_length, room) or n < end - start:
            raise ValueError(
                f"state's starts, lengths and seen must be of texts with at most {max_length} live tokens and indices "
                f"up to {room}, got {starts}, {lengths}, {seen}"
            )
    longest = max(lengths, default=0)
    outer, inner = batch, longest
    tables: Tables = []
    if page_size is not None:
        checks.check_tensor("state's key", state["key"], (key.dtype,))
        outer, inner = state["key"].shape[0] if state["key"].dim() else 0, page_size
        if outer > key.shape[0]:
            raise ValueError(f"state's key must have at most the cache's {key.shape[0]} pages, got {outer}")
        tables = _read_tables(state["block_table"], starts, lengths, page_size, outer)
    for name, buffer in (("key", key), ("value", value)):
        checks.check_tensor(f"state's {name}", state[name], (buffer.dtype,))
        shape = (outer, buffer.shape[1], inner, buffer.shape[3])
        checks.check_shape(f"state's {name}", state[name], shape, "what it says of itself and the cache")
    return starts, lengths, seen, tables


def _read_tables(block_table: Any, starts: list[int], lengths: list[int], page_size: int, num_pages: int) -> Tables:
    checks.check_tensor("state's block_table", block_table, (torch.int32,))
    shape = (len(starts), -(-max(lengths, default=0) // page_size))
    checks.check_shape("state's block_table", block_table, shape, "[B, pages]")
    tables: Tables = []
    for row, start, end in zip(block_table.tolist(), starts, lengths, strict=True):
        freed, used = start // page_size, -(-end // page_size)
        if any(page != -1 for page in row[:freed]) or not all(0 <= page < num_pages for page in row[freed:used]):
            raise ValueError(f"state's block_table must name its {num_pages} pages, and -1 where freed, got {row}")
        tables.append([None if page == -1 else page for page in row[:used]])
    return tables
