"""The kernels of ``csrc/cuda``: which specialisation computes what, with which tiles."""

from __future__ import annotations

from typing import NamedTuple

_COLUMNS = (64, 96, 128, 192, 256)  # of tiles; the head dim is padded with zeros in shared memory


class Tiles(NamedTuple):
    """The shape of a kernel's tiles, and its warps along rows and keys."""

    BLOCK_M: int
    BLOCK_N: int
    WARPS_M: int
    WARPS_N: int = 1

    def __str__(self) -> str:
        return f"tiles of {self.BLOCK_M} rows x {self.BLOCK_N} keys, {self.WARPS_M} x {self.WARPS_N} warps"


class Kernel(NamedTuple):
    """A specialisation: what ``jit`` compiles, and how it is started. Fields in capitals are macros of tile.cuh."""

    file: str
    name: str
    shared_bytes: int
    tiles: Tiles
    BLOCK_D: int
    BLOCK_DV: int
    BF16: int
    ALIGNED: int = 1
    ROWS: int = 1
    PAGE_SIZE: int = 0
    MASK: int = 0
    ALIBI: int = 0
    SOFTCAP: int = 0
    DROPOUT: int = 0
    NEGATIVE: int = 0
    GRADIENTS: int = 3  # 1 of values, 2 of keys
    UNORDERED: int = 0

    @property
    def defines(self) -> dict[str, int]:
        return {**self.tiles._asdict(), **{name: x for name, x in self._asdict().items() if name.isupper()}}

    @property
    def threads(self) -> int:
        return 32 * self.tiles.WARPS_M * self.tiles.WARPS_N


# By kernel: for tiles of 64, 96, 128, 192 and 256 columns, the larger of D and Dv. A thread holds its part of the
# scores and of the sums in at most 255 registers; "other" are calls that do more with a score than to scale it, or that
# look up pages.
TILES = {
    "forward": (Tiles(128, 128, 4), Tiles(128, 48, 4), Tiles(128, 64, 4), Tiles(128, 64, 8), Tiles(64, 64, 4)),
    "forward, other": (Tiles(64, 64, 4), Tiles(64, 64, 4), Tiles(64, 64, 4), Tiles(64, 32, 4), Tiles(64, 32, 4)),
    "decode": (Tiles(16, 64, 1, 4),) * 5,
    "decode, other": (Tiles(16, 64, 1, 4),) * 5,
    "tall decode": (Tiles(64, 64, 4), Tiles(64, 64, 4), Tiles(64, 64, 4), Tiles(64, 32, 4), Tiles(64, 32, 4)),
    "tall decode, other": (Tiles(64, 64, 4), Tiles(64, 64, 4), Tiles(64, 64, 4), Tiles(64, 32, 4), Tiles(64, 32, 4)),
    "dkdv": (
        Tiles(64, 128, 1, 8),
        Tiles(64, 128, 1, 8),
        Tiles(32, 128, 1, 8),
        Tiles(16, 64, 1, 4),
        Tiles(16, 64, 1, 4),
    ),
    "dkdv, other": (
        Tiles(32, 64, 1, 4),
        Tiles(32, 64, 1, 4),
        Tiles(32, 64, 1, 4),
        Tiles(16, 64, 1, 4),
        Tiles(16, 64, 1, 4),
    ),
    "dq": (Tiles(128, 32, 4), Tiles(128, 32, 4), Tiles(128, 32, 8), Tiles(64, 32, 4), Tiles(64, 16, 4)),
    "dq, other": (Tiles(64, 64, 4), Tiles(64, 32, 4), Tiles(64, 32, 4), Tiles(64, 32, 4), Tiles(64, 16, 4)),
    "dmask, other": (Tiles(64, 32, 4), Tiles(64, 32, 4), Tiles(64, 32, 4), Tiles(64, 16, 4), Tiles(64, 16, 4)),
}
# The same on Hopper, for the kernels of hopper.cuh: a consumer of four warps has 64 rows, or keys, and there are four
# warps more. "short" is where a row sees few keys: there is room for a second query. Measured, see benchmarks/results.
HOPPER_TILES = {
    "forward": (Tiles(192, 128, 16), Tiles(192, 96, 16), Tiles(128, 176, 12), Tiles(128, 112, 12), Tiles(128, 80, 12)),
    "short forward": (
        Tiles(192, 128, 16),
        Tiles(192, 96, 16),
        Tiles(128, 128, 12),
        Tiles(128, 112, 12),
        Tiles(128, 80, 12),
    ),
    "forward, other": (Tiles(128, 128, 12),) * 3 + (Tiles(128, 64, 12),) * 2,
    "dkdv": (Tiles(96, 128, 12), Tiles(64, 128, 12), Tiles(64, 128, 12), Tiles(64, 128, 12), Tiles(32, 128, 12)),
    "dkdv, other": (Tiles(32, 128, 12),) * 5,
    "unordered dkdv": (Tiles(64, 128, 12),) * 4,
    "dq": (Tiles(128, 128, 12), Tiles(128, 128, 12), Tiles(128, 96, 12), Tiles(128, 64, 12), Tiles(128, 32, 12)),
    "dq, other": (Tiles(128, 64, 12),) * 4 + (Tiles(128, 32, 12),),
}
FEW_KEYS = 3000
# Shared memory of a block, in bytes; every kernel fits the least but those that are UNORDERED.
LEAST_SHARED_BYTES = 99 * 1024
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_87": 163 * 1024} | dict.fromkeys(("sm_90a", "sm_100a", "sm_103a"), 227 * 1024)
_BY_ROW = Tiles(1, 1, 4)  # four warps, and no tiles


def columns_of(head_dims: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the tiles."""
    return tuple(next(columns for columns in _COLUMNS if columns >= head_dim) for head_dim in head_dims)


def _table(op: str, macros: dict[str, int]) -> str:
    other = any(macros[name] for name in ("MASK", "ALIBI", "SOFTCAP", "DROPOUT", "NEGATIVE", "PAGE_SIZE"))
    return f"{op}, other" if other else op


def kernel_of(op: str, head_dims: tuple[int, int], macros: dict[str, int]) -> Kernel:
    """The kernel of ``op``, for D and Dv."""
    return _kernel_with(_table(op, macros), op, head_dims, macros)


def _kernel_with(tiles_of: str, op: str, head_dims: tuple[int, int], macros: dict[str, int]) -> Kernel:
    D, Dv = columns_of(head_dims)
    tiles = TILES[tiles_of][_COLUMNS.index(max(D, Dv))]
    rows, keys = (2 * block * (D + Dv) for block in tiles[:2])  # bytes of query and grad_out, and of key and value
    terms = 8 * tiles.BLOCK_M  # of lse and delta
    # What warps along the keys tell the first of them: 4 bytes a lane for each value of a fragment.
    merged = 128 * (tiles.WARPS_N - 1) * (tiles.BLOCK_M // 16) * (Dv // 2 + 4)
    name, shared = {
        "dkdv": ("attention_bwd_dkdv", keys + 2 * (rows + terms)),
        "dq": ("attention_bwd_dq", rows + terms + 2 * keys),
        "dmask": ("attention_bwd_dmask", rows + terms + keys),
    }.get(op, ("attention_fwd", 2 * tiles.BLOCK_M * D + max(keys, merged)))
    return Kernel(f"{name}.cuh", name, shared, tiles, D, Dv, **macros)


def hopper_kernel(op: str, head_dims: tuple[int, int], macros: dict[str, int], keys: float) -> Kernel:
    """The kernel of ``op`` for sm_90a, for D and Dv; a row sees ``keys`` keys on average."""
    D, Dv = columns_of(head_dims)
    table = _table(op, macros)
    if table == "forward" and keys < FEW_KEYS:
        table = "short forward"
    tiles = HOPPER_TILES[table][_COLUMNS.index(max(D, Dv))]
    # Bytes of a tile of so many rows, in panels of 64 columns.
    query, grad_out = (128 * tiles.BLOCK_M * -(-columns // 64) for columns in (D, Dv))
    key, value = (128 * tiles.BLOCK_N * -(-columns // 64) for columns in (D, Dv))
    barriers, limit = 256, SHARED_BYTES["sm_90a"]
    if op == "forward":
        name, least, more = "attention_fwd_hopper", max(query, grad_out) + 2 * (key + value), max(query, grad_out)
    elif op == "dq":
        name, least, more = "attention_bwd_dq_hopper", query + grad_out + 2 * (key + value), key
    else:
        rows = query + grad_out + 8 * tiles.BLOCK_M
        name, least, more = "attention_bwd_dkdv_hopper", key + value + 2 * rows, rows
        if op == "unordered dkdv":
            macros = macros | {"UNORDERED": 1}
            least += 2 * 128 * tiles.BLOCK_N  # for dS^T, twice
    shared = least + more + barriers if least + more + barriers <= limit else least + barriers
    return Kernel(f"{name}.cuh", name, shared, tiles, D, Dv, **macros)


def has_unordered_hopper_kernel(head_dims: tuple[int, int], macros: dict[str, int]) -> bool:
    """Whether the kernel for sm_90a of keys and values can find the query's gradient, too."""
    tiles = HOPPER_TILES.get(_table("unordered dkdv", macros), ())
    return _COLUMNS.index(max(columns_of(head_dims))) < len(tiles)


def unordered(kernel: Kernel, head_dims: tuple[int, int], macros: dict[str, int], arch: str) -> Kernel | None:
    """The kernel of keys and values that finds the query's gradient, too, if the GPU has the shared memory for it."""
    for candidate in (kernel, _kernel_with("dkdv, other", "dkdv", head_dims, macros)):
        shared = candidate.shared_bytes + 2 * candidate.tiles.BLOCK_N * max(candidate.tiles.BLOCK_M, 32)
        if shared <= SHARED_BYTES.get(arch, LEAST_SHARED_BYTES):
            return candidate._replace(shared_bytes=shared, UNORDERED=1)
    return None


def combine_kernel(v_head_dim: int, BF16: int) -> Kernel:
    """What adds up the parts of decode."""
    (columns,) = columns_of((v_head_dim,))
    return Kernel("attention_decode.cuh", "attention_combine", 16 * (columns + 1), _BY_ROW, 64, columns, BF16)


def preprocess_kernel(v_head_dim: int, BF16: int, ALIGNED: int) -> Kernel:
    """What makes delta: a warp has ROWS rows, a thread of it eight columns."""
    name, lanes = "attention_bwd_preprocess", 1 << (-(-v_head_dim // 8) - 1).bit_length()
    return Kernel(f"{name}.cuh", name, 0, _BY_ROW, 64, 64, BF16, ALIGNED, ROWS=max(32 // lanes, 1))
