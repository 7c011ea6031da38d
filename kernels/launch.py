"""What a launcher returns, and the arguments that kernels share."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # kernels run on CPU tensors, in Python
MIN_BLOCK_D = 16  # matrix instructions take no less
_LOG2E = math.log2(math.e)

# Arguments that follow a length, or may change from call to call: nothing is compiled again for them.
NOT_SPECIALIZED = [
    "stride_mb", "stride_mh", "stride_mm", "stride_lb", "stride_lh", "stride_tb",
    "B", "Hq", "Lq", "Lk", "total_q", "total_k", "tiles", "slots", "num_rows", "num_splits", "num_pages",
    "mask_B", "mask_H", "mask_Lq", "mask_Lk", "window_left", "window_right", "q_offset", "threshold",
]  # fmt: skip


class Tiles(NamedTuple):
    """The shape of a kernel's tiles, and how Triton is to compile it."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    SPLIT: int = 0  # keys of a part; decode only

    def __str__(self) -> str:
        return f"tiles of {self.BLOCK_M} rows x {self.BLOCK_N} keys, {self.num_warps} warps, {self.num_stages} stages"


# By kernel and family of GPUs: (BLOCK_M, BLOCK_N, num_warps, num_stages) for head dims up to 64, 128 and 256. The
# compiler finds registers and shared memory for them (``benchmarks/compiled.py``). Those of sm_90 are the fastest there
# with Triton 3.6 (``benchmarks/tune.py``) of which 3.9 spills no registers; how fast the others are only a GPU tells.
_DEFAULTS = {
    "forward": {
        "sm_90": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
        "sm_100": ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2)),
        "sm": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
        "gfx": ((128, 32, 4, 2), (128, 32, 4, 2), (64, 32, 8, 2)),
    },
    "dkdv": {
        "sm_90": ((64, 128, 8, 3), (32, 128, 8, 2), (32, 64, 8, 2)),
        "sm_100": ((64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 1)),
        "sm": ((32, 128, 8, 1), (64, 64, 8, 1), (16, 64, 8, 1)),
        "gfx": ((32, 128, 8, 1), (32, 64, 4, 1), (16, 64, 8, 1)),
    },
    "dq": {
        "sm_90": ((128, 32, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3)),
        "sm_100": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        "sm": ((128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
        "gfx": ((128, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 1)),
    },
    "decode": {
        "sm": ((16, 64, 4, 3), (16, 64, 4, 2), (16, 32, 4, 2)),
        "gfx": ((16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2)),
    },
}
# A mask's loads take registers. float32 has no tensor cores, and a thread holds whole rows of its operands.
_MASKED = {
    "forward": ((64, 32, 4, 1), (64, 32, 8, 1), (64, 16, 8, 1)),
    "dkdv": ((32, 64, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1)),
    "dq": ((64, 32, 8, 1), (64, 32, 8, 1), (64, 16, 8, 1)),
    "decode": ((16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2)),
}
_FLOAT32 = {
    "forward": ((32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
    "dkdv": ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "dq": ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "decode": ((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
}
_INTERPRETER = (64, 32, 4, 1)  # each operation costs the same, whatever its size
SPLIT = 512  # keys of a part in decode


def default_tiles(op: str, arch: str, dtype: torch.dtype, head_dim: int, masked: bool) -> Tiles:
    """What no table knows: tiles that fit, with an eye to what is fast elsewhere.

    ``op`` is "forward", "decode", "dkdv" or "dq", ``head_dim`` the larger of D and Dv, ``masked`` whether there is an
    ``attn_mask``.
    """
    size = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    families = _DEFAULTS[op]
    if arch == "interpreter":
        sizes = (_INTERPRETER,) * 3
    elif dtype == torch.float32:
        sizes = _FLOAT32[op]
    elif masked:
        sizes = _MASKED[op]
    else:
        sizes = families[next(name for name in (arch, arch[:3], arch[:2]) if name in families)]
    return Tiles(*sizes[size], SPLIT=SPLIT if op == "decode" else 0)


class Launch(NamedTuple):
    """A kernel with everything that it is called with: ``run`` it, or compile it without a GPU."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    tiles: Tiles

    def run(self) -> Any:
        """Starts the kernel on the current device and stream; returns it compiled, None from the interpreter."""
        return self.kernel[(self.programs,)](**self.keywords()) if self.programs else None

    def keywords(self) -> dict[str, Any]:
        # enable_fp_fusion: Triton 3.10 will no longer do without being asked
        options = {"num_warps": self.tiles.num_warps, "num_stages": self.tiles.num_stages, "enable_fp_fusion": True}
        return self._values() | options

    def _values(self) -> dict[str, Any]:
        arguments = {**self.arguments, "BLOCK_M": self.tiles.BLOCK_M, "BLOCK_N": self.tiles.BLOCK_N}
        return {name: arguments[name] for name in self.kernel.arg_names}


class Plan:
    """Launches that have run before, for calls that differ from theirs in nothing but addresses.

    Triton looks at each argument of a call to find the kernel compiled for it, which takes longer than many a kernel
    runs. Here that is known.
    """

    def __init__(self, launches: Sequence[Launch], tensors: Iterable[str]) -> None:
        """Runs the launches. ``tensors`` are the arguments that come anew each time; others were only made for them."""
        known = set(tensors)
        self.temporaries: dict[str, Tensor] = {}
        self._steps: list[tuple[Any, list[Any], list[tuple[int, str]]]] = []
        self.complete = True  # whether it can run again
        for launch in launches:
            compiled = launch.run()
            if not launch.programs:
                continue
            values = launch._values()
            tensor_at = [(i, name) for i, (name, x) in enumerate(values.items()) if isinstance(x, Tensor)]
            for _, name in tensor_at:
                if name not in known:
                    self.temporaries[name] = values[name].to("meta")
            if compiled is None:
                self.complete = False
            else:
                arguments = [None if isinstance(x, Tensor) else x for x in values.values()]
                self._steps.append((compiled[(launch.programs, 1, 1)], arguments, tensor_at))

    def run(self, tensors: dict[str, Tensor | None], device: torch.device) -> None:
        """On the current device, which is ``device``, and the current stream."""
        made = {name: torch.empty_like(x, device=device) for name, x in self.temporaries.items()}
        addresses = {name: x.data_ptr() for name, x in (tensors | made).items() if x is not None}
        for start, values, tensor_at in self._steps:
            arguments = values.copy()
            for i, name in tensor_at:
                arguments[i] = addresses[name]
            start(*arguments)


def cdiv(a: int, b: int) -> int:
    """Upwards; Triton's own takes microseconds."""
    return -(-a // b)


def block_dim(head_dim: int) -> int:
    """The width of a tile that holds ``head_dim`` columns."""
    return max(MIN_BLOCK_D, 1 << (head_dim - 1).bit_length())


def strides(letter: str, x: Tensor, axes: str) -> dict[str, int]:
    """``stride_<letter><axis>`` of batch, head and row of ``[B, H, L, D]``, or of packed ``[total, H, D]``."""
    values = x.stride()[:3] if x.dim() == 4 else (0, x.stride(1), x.stride(0))
    return {f"stride_{letter}{axis}": value for axis, value in zip(axes, values, strict=True)}


def lse_strides(lse: Tensor) -> dict[str, int]:
    """Of ``[B, Hq, Lq]``, or packed ``[Hq, total_q]``; rows lie side by side."""
    by_sample, by_head = (0, lse.stride(0)) if lse.dim() == 2 else lse.stride()[:2]
    return {"stride_lb": by_sample, "stride_lh": by_head}


def slots_of(x: Tensor, cu_seqlens: Tensor | None, rows: int, block: int) -> tuple[int, int]:
    """How many tiles of ``block`` rows a sample has, and how many slots for tiles the batch: see ``tile.tile_of``.

    ``rows`` is the number of rows of each token of ``x``.
    """
    if cu_seqlens is not None:
        return 0, x.shape[0] * rows // block + cu_seqlens.shape[0] - 1
    tiles = cdiv(x.shape[2] * rows, block)
    return tiles, tiles * x.shape[0]


def tensor_arguments(t: Any) -> dict[str, Tensor | None]:
    """The tensors of ``AttentionTensors`` by the names of the arguments."""
    return {
        "Q": t.query,
        "K": t.key,
        "V": t.value,
        "MASK": t.attn_mask,
        "ALIBI_SLOPES": t.alibi_slopes,
        "SINKS": t.sinks,
        "Q_OFFSETS": t.q_offset,
        "KV_LENGTHS": t.kv_lengths,
        "KV_STARTS": t.kv_starts,
        "BLOCK_TABLE": t.block_table,
        "CU_SEQLENS_Q": t.cu_seqlens_q,
        "CU_SEQLENS_K": t.cu_seqlens_k,
        "SEED": t.dropout_seed,
    }


def common_arguments(spec: Any, t: Any, lse: Tensor) -> dict[str, Any]:
    """What the forward and every kernel of the backward take of an ``AttentionSpec`` and ``AttentionTensors``."""
    packed = t.cu_seqlens_q is not None
    head_dim, v_head_dim = t.query.shape[-1], t.value.shape[-1]
    # Kernels see a positive scale, so that the largest product is the largest score: the sign goes to the query.
    scale, sign = abs(spec.scale) or 1.0, None if spec.scale > 0 else -1.0 if spec.scale < 0 else 0.0
    threshold = spec.dropout_threshold
    mask = t.attn_mask
    if mask is not None:
        Lk = t.key.shape[2] * (1 if t.block_table is None else t.block_table.shape[1])
        mask_strides = mask.expand(*t.query.shape[:3], Lk).stride()
    else:
        mask_strides = (0, 0, 0, 0)
    return {
        **tensor_arguments(t),
        **strides("q", t.query, "bhm"),
        **strides("k", t.key, "bhn"),
        **strides("v", t.value, "bhn"),
        **dict(zip(("stride_mb", "stride_mh", "stride_mm", "stride_mn"), mask_strides, strict=True)),
        "stride_ab": t.alibi_slopes.stride(0) if t.alibi_slopes is not None and t.alibi_slopes.dim() == 2 else 0,
        **lse_strides(lse),
        "B": t.cu_seqlens_q.shape[0] - 1 if packed else t.query.shape[0],
        "Hq": t.query.shape[1],
        "Lq": 0 if packed else t.query.shape[2],
        "Lk": t.key.shape[2] if t.key.dim() == 4 else 0,
        "total_q": t.query.shape[0] if packed else 0,
        "total_k": t.key.shape[0] if packed else 0,
        "scale": scale / spec.softcap if spec.softcap else scale * _LOG2E,
        "sign": sign,
        "softcap": spec.softcap * _LOG2E if spec.softcap else None,
        "window_left": spec.window_left,
        "window_right": spec.window_right,
        "q_offset": spec.q_offset,
        "threshold": threshold,
        "keep_scale": 65536 / (65536 - threshold) if threshold < 65536 else 0.0,
        "GROUP": t.query.shape[1] // max(t.key.shape[1], 1) or 1,
        "D": head_dim,
        "Dv": v_head_dim,
        "BLOCK_D": block_dim(head_dim),
        "BLOCK_DV": block_dim(v_head_dim),
    }


def paged_arguments(t: Any) -> dict[str, Any]:
    """What the forward takes of pages; ``Lk`` is then what the block table can address."""
    table = t.block_table
    if table is None:
        return {"stride_tb": 0, "stride_tn": 0, "num_pages": 0, "PAGE_SIZE": 1}
    num_pages, page_size = t.key.shape[0], t.key.shape[2]
    return {
        "stride_tb": table.stride(0),
        "stride_tn": table.stride(1),
        "num_pages": num_pages,
        "PAGE_SIZE": page_size,
        "Lk": page_size * table.shape[1] if num_pages else 0,
    }


def allows_tf32() -> bool:
    """Whether torch lets float32 products run on tensor cores."""
    return torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
