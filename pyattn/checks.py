"""Is this a legal call? Each refusal names the argument, what was needed and what came.

``functional`` checks the metadata once; the op checks the values (lengths, offsets, page numbers) of CPU tensors,
and of device tensors when ``PYATTN_CHECK=1`` asks for the synchronisation.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyattn.spec import AttentionTensors, absent

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
_LARGEST_NUMBER = torch.finfo(torch.float32).max  # kernels compute in float32
CHECK_DEVICE_VALUES = os.environ.get("PYATTN_CHECK") == "1"


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes))


def autocasts(x: Tensor) -> bool:
    """Whether ops on ``x`` choose its dtype."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_tensor(
    name: str, x: Any, dtypes: Sequence[torch.dtype], like: Tensor | None = None, like_name: str = "query"
) -> None:
    """``x`` is a dense tensor of one of ``dtypes``, on the device of ``like``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {x.layout}{', nested' * x.is_nested}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {str(x.dtype).removeprefix('torch.')}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name} ({like.device}), got {x.device}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {meaning} = {list(shape)}, got {list(x.shape)}")


def check_qkv(query: Tensor, key: Tensor, value: Tensor, *, packed: bool, paged: bool) -> None:
    """Ranks, dtypes, devices and the sizes that query, key and value must agree on."""
    layout = "[total, H, D]" if packed else "[B, H, L, D]"
    key_layout = "[num_pages, H, page_size, D]" if paged else layout
    check_tensor("query", query, FLOAT_DTYPES)
    if query.dim() != (3 if packed else 4):
        raise ValueError(f"query must have shape {layout}, got {list(query.shape)}")
    key_rank = 3 if packed and not paged else 4
    for name, x in (("key", key), ("value", value)):
        check_tensor(name, x, FLOAT_DTYPES, query)
        if x.dim() != key_rank:
            raise ValueError(f"{name} must have shape {key_layout}, got {list(x.shape)}")
        if x.dtype != query.dtype and not autocasts(query):
            raise TypeError(f"{name} must have the dtype of query ({query.dtype}), got {x.dtype}")
    q_shape, k_shape, v_shape = query.shape, key.shape, value.shape
    if k_shape[:-1] != v_shape[:-1]:
        raise ValueError(f"value must have the shape of key {list(k_shape)} up to its last size, got {list(v_shape)}")
    if q_shape[-1] != k_shape[-1]:
        raise ValueError(f"key must have the head dim of query ({q_shape[-1]}), got {k_shape[-1]}")
    if not packed and not paged and q_shape[0] != k_shape[0]:
        raise ValueError(f"key must have the batch size of query ({q_shape[0]}), got {k_shape[0]}")
    if paged and k_shape[2] < 1:
        raise ValueError("key must have pages of at least one token, got page_size 0")
    if q_shape[1] != k_shape[1]:
        check_heads(q_shape[1], k_shape[1])


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    if num_heads != num_kv_heads and (num_kv_heads == 0 or num_heads % num_kv_heads):
        raise ValueError(f"query must have a multiple of key's {num_kv_heads} heads, got {num_heads}")


def check_number(name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if isinstance(x, (int, float)) and not abs(x) <= _LARGEST_NUMBER:
        raise ValueError(f"{name} must be finite, got {x} (float32 ends at {_LARGEST_NUMBER:.2g})")
    return x  # type: ignore[return-value]


def check_int(name: str, x: Any) -> int:
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(x).__name__}")
    if isinstance(x, int) and not -(2**63) <= x < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {x}")
    return x  # type: ignore[return-value]


def check_bool(name: str, x: Any) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be a bool, got {type(x).__name__}")


def check_window(causal: bool, window: Any) -> tuple[int | None, int | None]:
    """The window's two sides; ``causal`` sets the right one to 0."""
    check_bool("causal", causal)
    left = right = None
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"window must be a pair (left, right), got {window!r}")
        left, right = (None if side is None else check_int("window", side) for side in window)
        if any(side is not None and side < 0 for side in (left, right)):
            raise ValueError(f"window must hold sizes of at least 0, or None for unlimited, got {tuple(window)}")
    return left, 0 if causal else right


def check_mask(attn_mask: Any, query: Tensor, shape: tuple[int, ...]) -> None:
    """Bool, or a float that the scores can hold, broadcastable to ``shape = [B, Hq, Lq, Lk]``."""
    wide = (torch.float64,) if query.dtype == torch.float64 else ()
    autocast = FLOAT_DTYPES if autocasts(query) else ()
    check_tensor("attn_mask", attn_mask, (torch.bool, query.dtype, torch.float32, *wide, *autocast), query)
    sizes = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(sizes) != 4 or any(m not in (1, n) for m, n in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"attn_mask must be broadcastable to [B, Hq, Lq, Lk] = {list(shape)}, got {list(attn_mask.shape)}"
        )


def check_per_sample(name: str, x: Any, query: Tensor, batch: int) -> None:
    check_tensor(name, x, INDEX_DTYPES, query)
    check_shape(name, x, (batch,), "[B]")


def check_numbers(name: str, x: Any, batch: int) -> list[int]:
    """One int for each sample, wherever they come from; waits for a device that holds them."""
    if isinstance(x, Tensor):
        check_tensor(name, x, INDEX_DTYPES)
        check_shape(name, x, (batch,), "[B]")
        return x.tolist()
    if not isinstance(x, (list, tuple)):
        raise TypeError(f"{name} must be a tensor, list or tuple of ints, got {type(x).__name__}")
    if len(x) != batch:
        raise ValueError(f"{name} must hold one number for each of the {batch} samples, got {len(x)}")
    return [check_int(name, n) for n in x]


def check_cu_seqlens(name: str, x: Any, query: Tensor, batch: int | None) -> None:
    check_tensor(name, x, (torch.int32,), query)
    if x.dim() != 1 or x.shape[0] < 1 or (batch is not None and x.shape[0] != batch + 1):
        size = "[B + 1]" if batch is None else f"[B + 1] = [{batch + 1}]"
        raise ValueError(f"{name} must have shape {size}, got {list(x.shape)}")


def check_family(t: AttentionTensors, batch: int) -> None:
    """The optional tensors that both ``attention`` and ``attention_varlen`` take."""
    if absent(t[4:10]):  # alibi_slopes to block_table
        return
    query = t.query
    num_heads = query.shape[1]
    if t.alibi_slopes is not None:
        check_tensor("alibi_slopes", t.alibi_slopes, (torch.float32,), query)
        if tuple(t.alibi_slopes.shape) not in ((num_heads,), (batch, num_heads)):
            raise ValueError(
                f"alibi_slopes must have shape [Hq] = [{num_heads}] or [B, Hq] = [{batch}, {num_heads}], "
                f"got {list(t.alibi_slopes.shape)}"
            )
        if t.alibi_slopes.requires_grad:
            check_gradients(["alibi_slopes"], paged=False)
    if t.sinks is not None:
        check_tensor("sinks", t.sinks, FLOAT_DTYPES, query)
        check_shape("sinks", t.sinks, (num_heads,), "[Hq]")
    for name in ("q_offset", "kv_lengths", "kv_starts"):
        if getattr(t, name) is not None:
            check_per_sample(name, getattr(t, name), query, batch)
    if t.block_table is not None:
        check_tensor("block_table", t.block_table, (torch.int32,), query)
        if t.block_table.dim() != 2 or t.block_table.shape[0] != batch:
            raise ValueError(
                f"block_table must have shape [B, max_pages] with B = {batch}, got {list(t.block_table.shape)}"
            )
        if t.kv_lengths is None:
            raise ValueError("kv_lengths must be given with block_table, got None")
        if torch.is_grad_enabled():
            differentiable = ("query", "key", "value", "attn_mask", "sinks")
            check_gradients(
                [n for n in differentiable if isinstance(x := getattr(t, n), Tensor) and x.requires_grad], paged=True
            )


def check_gradients(names: Sequence[str], *, paged: bool) -> None:
    """``names`` are the tensors that require a gradient: each must have one."""
    if "alibi_slopes" in names:
        raise ValueError("alibi_slopes must not require a gradient: it has none; use a float attn_mask")
    if paged and names:
        raise NotImplementedError(f"block_table: paged keys have no gradient, but {names[0]} requires one")


# ---- values -------------------------------------------------------------------------------------------------------


def _is_small(x: Tensor) -> bool:
    """Whether Python is through its numbers before torch has begun."""
    return x.is_cpu and x.numel() <= 256


def _within(name: str, x: Tensor | list[int], low: int, high: int, meaning: str) -> None:
    numbers = x.flatten().tolist() if isinstance(x, Tensor) and _is_small(x) else x
    if isinstance(numbers, Tensor):
        within = numbers.numel() == 0 or (low <= int(numbers.min()) and int(numbers.max()) <= high)
    else:
        within = not numbers or (low <= min(numbers) and max(numbers) <= high)
    if not within:
        raise ValueError(
            f"{name} must lie in [{low}, {high}] ({meaning}), got {x.tolist() if isinstance(x, Tensor) else x}"
        )


def _pages_in_use(block_table: Tensor, kv_lengths: Tensor, page_size: int) -> Tensor | list[int]:
    if _is_small(block_table):
        rows = zip(block_table.tolist(), kv_lengths.tolist(), strict=True)
        return [page for row, length in rows for page in row[: -(-length // page_size)]]
    pages = -(-kv_lengths // page_size)
    return block_table[torch.arange(block_table.shape[1], device=pages.device) < pages[:, None]]


def _check_rises(name: str, x: Tensor, total: int, longest: int | None) -> None:
    steps = x.to(torch.int64).diff()  # of int32, large steps would wrap and look small
    if int(x[0]) != 0 or int(x[-1]) != total or (steps < 0).any():
        raise ValueError(f"{name} must rise from 0 to the total of {total}, got {x.tolist()}")
    if longest is not None and steps.numel() and int(steps.max()) > longest:
        raise ValueError(
            f"max_seqlen_{name[-1]} must be at least the longest sequence ({int(steps.max())}), got {longest}"
        )


def check_values(t: AttentionTensors, max_seqlen_q: int | None, max_seqlen_k: int | None) -> None:
    """Lengths, starts, cumulative lengths and page numbers, where they can be read without synchronising."""
    if absent(t[7:12]):  # kv_lengths to cu_seqlens_k
        return
    if t.query.device.type != "cpu" and not CHECK_DEVICE_VALUES:
        return
    if t.cu_seqlens_q is not None:
        _check_rises("cu_seqlens_q", t.cu_seqlens_q, t.query.shape[0], max_seqlen_q)
    available: Tensor | int
    if t.block_table is not None:
        available = t.block_table.shape[1] * t.key.shape[2]
    elif t.cu_seqlens_k is not None:
        _check_rises("cu_seqlens_k", t.cu_seqlens_k, t.key.shape[0], max_seqlen_k)
        available = t.cu_seqlens_k.diff()
    else:
        available = t.key.shape[2]
    for name in ("kv_lengths", "kv_starts"):
        x = getattr(t, name)
        if x is None:
            continue
        if isinstance(available, int):
            _within(name, x, 0, available, "the keys there are")
        elif (x < 0).any() or (x > available).any():
            raise ValueError(
                f"{name} must lie between 0 and the keys of each sequence {available.tolist()}, got {x.tolist()}"
            )
    if t.block_table is not None and t.kv_lengths is not None:
        used = _pages_in_use(t.block_table, t.kv_lengths, t.key.shape[2])
        _within("block_table", used, 0, t.key.shape[0] - 1, "the pages of key, for every page in use")


def check_positions(positions: Tensor, max_pos: int) -> None:
    """Rows of the rotary tables, where they can be read without synchronising."""
    if positions.device.type == "cpu" or CHECK_DEVICE_VALUES:
        _within("positions", positions, 0, max_pos - 1, "the rows of the rotary tables")


def check_slots(name: str, slots: Tensor, total: int) -> None:
    """Places in a cache or among new tokens, where they can be read without synchronising."""
    if slots.device.type == "cpu" or CHECK_DEVICE_VALUES:
        _within(name, slots, 0, total - 1, "the places there are")


def require_extra(extra: str, *modules: str) -> None:
    """Says that an optional package is missing before the work starts, not after it."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"this needs {module}: pip install 'pyattn[{extra}]'")
