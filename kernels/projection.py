"""Projections around attention: the product of tokens and weights with its epilogue, the epilogue alone, its gradient.

The epilogue is bias, residual, RMSNorm and rotary position embedding, on tiles of tokens by heads whose elements are
held as the pairs that rotary turns (``projection_tile``). The product gets both of a pair into one thread by reading
the rows of the weight in that order.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from pyattn.kernels.launch import Launch, block_dim, cdiv, strides
from pyattn.kernels.projection_tile import (
    Heads,
    Tables,
    Tokens,
    finish,
    head_rows,
    load_pairs,
    load_vector,
    pair_columns,
    reciprocal_rms,
    store_pairs,
    tokens_of,
    turn,
)

# Arguments that follow the number of tokens, or may change from call to call: nothing is compiled again for them.
NOT_SPECIALIZED = [
    "rows", "L", "tiles_m", "max_pos", "stride_pb", "eps", "columns", "num_q", "num_k", "num_heads",
]  # fmt: skip
GROUP_M = 8  # tiles of rows that share the weights in the cache: programs go down so many before they go right


class ProjectionTiles(NamedTuple):
    """The shape of a kernel's tiles, and how Triton is to compile it. The epilogue alone has no depth."""

    BLOCK_M: int  # tokens
    BLOCK_N: int  # columns: of several heads, or a part of one that has no epilogue
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        depth = f" x {self.BLOCK_K} deep" if self.BLOCK_K else ""
        stages = f", {self.num_stages} stages" if self.BLOCK_K else ""
        return f"tiles of {self.BLOCK_M} tokens x {self.BLOCK_N} columns{depth}, {self.num_warps} warps{stages}"


# By family of GPUs, for 16-bit types, the largest tiles first: (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages).
_PRODUCT: dict[str, tuple[tuple[int, ...], ...]] = {
    "sm_90": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)),
    "sm_100": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)),
    "sm": ((128, 128, 32, 8, 3), (64, 128, 32, 4, 3), (64, 64, 64, 4, 3)),
    "gfx": ((128, 128, 32, 8, 2), (64, 128, 32, 4, 2), (64, 64, 32, 4, 2)),
}
_PRODUCT_FLOAT32: tuple[tuple[int, ...], ...] = (
    (64, 64, 32, 8, 2),
    (32, 64, 32, 4, 2),
)  # no tensor cores: a thread holds whole rows of operands
# In the interpreter each operation costs the same, whatever its size.
_PRODUCT_INTERPRETER: tuple[tuple[int, ...], ...] = ((64, 64, 32, 4, 1),)
FEW_PROGRAMS = 128  # about one a multiprocessor: with fewer, smaller tiles are taken
RESIDUAL_ELEMENTS = 128 * 128  # of a tile with a residual
ROWS_ELEMENTS = 4096  # of a tile of the kernels that only read and write
MOST_ROWS = 64  # of such a tile: a sum over tokens is rounded less in parts


def product_tiles(arch, dtype, rows, columns, spec, plain, residual):
    """Tiles for the fused product: the largest of which there are enough to fill a GPU.

    ``plain`` is what ``is_plain`` says, ``residual`` whether there is one: its tile takes registers, too.
    """
    if arch == "interpreter":
        sizes = _PRODUCT_INTERPRETER
    elif dtype.itemsize == 4:
        sizes = _PRODUCT_FLOAT32
    else:
        sizes = _PRODUCT[next(name for name in (arch, arch[:3], arch[:2]) if name in _PRODUCT)]
    for size in sizes:
        tiles = ProjectionTiles(*size)
        if residual and tiles.BLOCK_M * tiles.BLOCK_N > RESIDUAL_ELEMENTS:
            continue
        padded = columns
        if not plain:
            D = columns // spec.num_heads
            tiles, padded = whole_heads(tiles, spec, D), spec.num_heads * block_dim(D)
        if cdiv(rows, tiles.BLOCK_M) * cdiv(padded, tiles.BLOCK_N) >= FEW_PROGRAMS:
            break
    return tiles


def whole_heads(tiles, spec, head_dim):
    """The tiles with as many columns as whole heads need that are all of q, all of k or all of v.

    A head that is wider has a tile with fewer rows.
    """
    width = block_dim(head_dim)
    heads = max(1, tiles.BLOCK_N // width)
    while any(n % heads for n in spec[:3]):
        heads //= 2
    rows = tiles.BLOCK_M if width <= tiles.BLOCK_N else max(16, tiles.BLOCK_M * tiles.BLOCK_N // width)
    return tiles._replace(BLOCK_M=rows, BLOCK_N=heads * width)


def rows_tiles(head_dim):
    """Tiles for the kernels that have no product: one head each."""
    width = block_dim(head_dim)
    return ProjectionTiles(max(1, min(MOST_ROWS, ROWS_ELEMENTS // width)), width, 0, num_warps=4, num_stages=1)


# ---- kernels ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _projection_fwd_kernel(
    X, W, BIAS, RESIDUAL, Q, K, V, SAVED, Q_NORM, K_NORM, COS, SIN, POSITIONS,
    stride_xb: tl.int64, stride_xh: tl.int64, stride_xl: tl.int64, stride_wn: tl.int64,
    stride_rb: tl.int64, stride_rh: tl.int64, stride_rl: tl.int64,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_ql: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kl: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vl: tl.int64,
    stride_sb: tl.int64, stride_sh: tl.int64, stride_sl: tl.int64, stride_pb,
    rows, L, tiles_m, columns, depth, max_pos, num_q, num_k, num_heads, eps,
    D: tl.constexpr, D_IN: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``x @ weight.T + bias + residual``, norm and rotary, for a tile of tokens and HEADS heads."""
    # The program: in a group of tiles of rows those go first that read the same weights.
    tiles_n = num_heads // HEADS
    i_group = tl.program_id(0) // (GROUP_M * tiles_n)
    size = tl.minimum(tiles_m - i_group * GROUP_M, GROUP_M)
    i_rest = tl.program_id(0) % (GROUP_M * tiles_n)
    i_m, i_head = i_group * GROUP_M + i_rest % size, i_rest // size * HEADS
    o_b, o_l, m_m = tokens_of(i_m, rows, L, BLOCK_M)
    tokens = Tokens(o_b, o_l, m_m)

    # The rows of the weight: as columns of the product the elements of a pair are neighbours.
    o_n = tl.arange(0, BLOCK_N)
    o_j = o_n % BLOCK_D // 2
    o_first, o_second, m_first, m_second = pair_columns(o_j, D, R, INTERLEAVED)
    is_first = o_n % 2 == 0
    o_row = (i_head + o_n // BLOCK_D) * D + tl.where(is_first, o_first, o_second)
    m_n = tl.where(is_first, m_first, m_second) & (o_row < columns)
    p_x = X + (o_b * stride_xb + o_l * stride_xl)[:, None]
    p_w = W + (o_row * stride_wn)[:, None]

    b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)[None, :]
        o_x = o_k
        if D_IN:  # heads, side by side in the product and not in memory
            o_x = o_k // D_IN * stride_xh + o_k % D_IN
        if EVEN_K:
            b_x = tl.load(p_x + o_x, mask=m_m[:, None], other=0.0)  # [M, K]
            b_w = tl.load(p_w + o_k, mask=m_n[:, None], other=0.0)  # [N, K]
        else:
            b_x = tl.load(p_x + o_x, mask=m_m[:, None] & (o_k < depth), other=0.0)
            b_w = tl.load(p_w + o_k, mask=m_n[:, None] & (o_k < depth), other=0.0)
        b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision=PRECISION)

    b_a, b_b = tl.split(tl.reshape(b_y, (BLOCK_M, HEADS, BLOCK_D // 2, 2)))
    o_h = i_head + tl.arange(0, HEADS)
    limit = D
    if RAGGED:  # of one wide head that is cut into tiles the last
        limit = tl.minimum(columns - i_head * D, D)
    if BIAS is not None:
        o_rows = (o_h * D)[None, :, None]
        b_bias_a, b_bias_b = load_pairs(BIAS, o_rows, o_rows >= 0, limit, D, R, INTERLEAVED, BLOCK_D)
        b_a, b_b = b_a + b_bias_a, b_b + b_bias_b
    if RESIDUAL is not None:
        o_rows = head_rows(Heads(RESIDUAL, stride_rb, stride_rh, stride_rl), tokens, o_h)
        b_res_a, b_res_b = load_pairs(RESIDUAL, o_rows, m_m[:, None, None], limit, D, R, INTERLEAVED, BLOCK_D)
        b_a, b_b = b_a + b_res_a, b_b + b_res_b
    finish(
        b_a, b_b, tokens, i_head,
        Heads(Q, stride_qb, stride_qh, stride_ql), Heads(K, stride_kb, stride_kh, stride_kl),
        Heads(V, stride_vb, stride_vh, stride_vl), Heads(SAVED, stride_sb, stride_sh, stride_sl),
        Q_NORM, K_NORM, Tables(COS, SIN, POSITIONS, stride_pb, max_pos), eps, limit,
        num_q, num_k, D, R, INTERLEAVED, False, HEADS, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _projection_epilogue_kernel(
    Y, Q, K, V, SAVED, Q_NORM, K_NORM, COS, SIN, POSITIONS,
    stride_yb: tl.int64, stride_yh: tl.int64, stride_yl: tl.int64,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_ql: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kl: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vl: tl.int64,
    stride_sb: tl.int64, stride_sh: tl.int64, stride_sl: tl.int64, stride_pb,
    rows, L, max_pos, num_q, num_k, num_heads, eps,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Norm and rotary of what another kernel multiplied, or of heads that are there already: one head a program."""
    i_head, i_m = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    o_b, o_l, m_m = tokens_of(i_m, rows, L, BLOCK_M)
    tokens = Tokens(o_b, o_l, m_m)
    o_rows = head_rows(Heads(Y, stride_yb, stride_yh, stride_yl), tokens, i_head + tl.arange(0, 1))
    b_a, b_b = load_pairs(Y, o_rows, m_m[:, None, None], D, D, R, INTERLEAVED, BLOCK_D)
    finish(
        b_a, b_b, tokens, i_head,
        Heads(Q, stride_qb, stride_qh, stride_ql), Heads(K, stride_kb, stride_kh, stride_kl),
        Heads(V, stride_vb, stride_vh, stride_vl), Heads(SAVED, stride_sb, stride_sh, stride_sl),
        Q_NORM, K_NORM, Tables(COS, SIN, POSITIONS, stride_pb, max_pos), eps, D,
        num_q, num_k, D, R, INTERLEAVED, INVERSE, 1, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _norm_backward(
    b_a, b_b, SAVED, NORM, PARTIALS, o_saved, m_m, i_partial, eps,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient before RMSNorm; that of its weight, summed over the tile's tokens, goes to ``PARTIALS``."""
    b_ya, b_yb = load_pairs(SAVED, o_saved, m_m[:, None, None], D, D, R, INTERLEAVED, BLOCK_D)
    b_rstd = tl.where(m_m[:, None, None], reciprocal_rms(b_ya, b_yb, eps, D), 0.0)  # eps may be 0
    b_ya, b_yb = b_ya * b_rstd, b_yb * b_rstd
    o_row = tl.full([1, 1, 1], 0, tl.int64) + i_partial * D
    b_sum_a, b_sum_b = tl.sum(b_a * b_ya, 0)[None, :, :], tl.sum(b_b * b_yb, 0)[None, :, :]  # [1, 1, D / 2]
    store_pairs(PARTIALS, o_row, o_row >= 0, b_sum_a, b_sum_b, D, D, R, INTERLEAVED, BLOCK_D)
    b_wa, b_wb = load_vector(NORM, tl.arange(0, 1), D, R, INTERLEAVED, BLOCK_D)
    b_a, b_b = b_a * b_wa, b_b * b_wb
    b_mean = (tl.sum(b_a * b_ya + b_b * b_yb, 2) / D)[:, :, None]
    return b_rstd * (b_a - b_ya * b_mean), b_rstd * (b_b - b_yb * b_mean)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _projection_bwd_kernel(
    DQ, DK, DV, SAVED, DY, PARTIALS, Q_NORM, K_NORM, COS, SIN, POSITIONS,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_ql: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kl: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vl: tl.int64,
    stride_sb: tl.int64, stride_sh: tl.int64, stride_sl: tl.int64, stride_pb,
    rows, L, max_pos, num_q, num_k, num_heads, eps,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The gradient of the product, ``DY [B * L, num_heads * D]``, from those of q, k and v: one head a program."""
    i_head, i_m = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    o_b, o_l, m_m = tokens_of(i_m, rows, L, BLOCK_M)
    tokens = Tokens(o_b, o_l, m_m)
    m_rows = m_m[:, None, None]
    o_h = i_head + tl.arange(0, 1)
    if i_head < num_q:
        o_rows = head_rows(Heads(DQ, stride_qb, stride_qh, stride_ql), tokens, o_h)
        b_a, b_b = load_pairs(DQ, o_rows, m_rows, D, D, R, INTERLEAVED, BLOCK_D)
    elif i_head < num_q + num_k:
        o_rows = head_rows(Heads(DK, stride_kb, stride_kh, stride_kl), tokens, o_h - num_q)
        b_a, b_b = load_pairs(DK, o_rows, m_rows, D, D, R, INTERLEAVED, BLOCK_D)
    else:
        o_rows = head_rows(Heads(DV, stride_vb, stride_vh, stride_vl), tokens, o_h - num_q - num_k)
        b_a, b_b = load_pairs(DV, o_rows, m_rows, D, D, R, INTERLEAVED, BLOCK_D)
    if COS is not None:
        if i_head < num_q + num_k:
            b_a, b_b = turn(b_a, b_b, Tables(COS, SIN, POSITIONS, stride_pb, max_pos), tokens, R, True, BLOCK_D)
    o_saved = head_rows(Heads(SAVED, stride_sb, stride_sh, stride_sl), tokens, o_h)
    i_partial = i_m.to(tl.int64) * (num_q + num_k) + i_head
    if Q_NORM is not None:
        if i_head < num_q:
            b_a, b_b = _norm_backward(
                b_a, b_b, SAVED, Q_NORM, PARTIALS, o_saved, m_m, i_partial, eps, D, R, INTERLEAVED, BLOCK_D
            )
    if K_NORM is not None:
        if (i_head >= num_q) & (i_head < num_q + num_k):
            b_a, b_b = _norm_backward(
                b_a, b_b, SAVED, K_NORM, PARTIALS, o_saved, m_m, i_partial, eps, D, R, INTERLEAVED, BLOCK_D
            )
    o_row = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64) * (num_heads * D)
    store_pairs(DY, (o_row + i_head * D)[:, None, None], m_rows, b_a, b_b, D, D, R, INTERLEAVED, BLOCK_D)


# ---- launchers ----------------------------------------------------------------------------------------------


def _heads(letter, x):
    """Strides of ``[B, H, L, D]``; zeros of None."""
    if x is None:
        return {f"stride_{letter}{axis}": 0 for axis in "bhl"}
    return strides(letter, x, "bhl")


def _arguments(spec, t, D):
    """What all kernels take of a ``ProjectionSpec`` and ``ProjectionTensors``; vectors and tables are contiguous."""
    turned = t.cos is not None and t.cos.shape[1] > 0
    B, _, L, _ = t.x.shape
    return {
        "Q_NORM": t.q_norm,
        "K_NORM": t.k_norm,
        "COS": t.cos if turned else None,
        "SIN": t.sin if turned else None,
        "POSITIONS": t.positions if turned else None,
        "stride_pb": t.positions.stride(0) if turned and t.positions is not None and t.positions.shape[0] > 1 else 0,
        "max_pos": t.cos.shape[0] if turned else 0,
        "rows": B * L,
        "L": L,
        "eps": spec.eps,
        "num_q": spec.num_q,
        "num_k": spec.num_k,
        "num_heads": spec.num_heads,
        "D": D,
        "R": 2 * t.cos.shape[1] if turned else 0,
        "INTERLEAVED": spec.interleaved or not turned,
        "BLOCK_D": block_dim(D),
    }


def _outputs(outputs, saved):
    q, k, v = outputs
    return {
        **{"Q": q, "K": k, "V": v, "SAVED": saved},
        **_heads("q", q),
        **_heads("k", k),
        **_heads("v", v),
        **_heads("s", saved),
    }


def forward(spec, t, outputs, saved, tiles, precision):
    """The launch that fills ``outputs``, q, k and v, and ``saved``, if it is not None, from x and the weight.

    Args:
        spec, t: the ``ProjectionSpec`` and ``ProjectionTensors`` of the call; last strides are 1.
        outputs, saved: as the op ``pyattn::projection`` returns them.
        tiles: the ``ProjectionTiles`` to use.
        precision: of float32 products, "ieee" or "tf32".
    """
    (B, H, L, D_in), columns = t.x.shape, t.weight.shape[0]
    depth = H * D_in
    head_dim = columns // spec.num_heads
    in_rows = H == 1 or t.x.stride(1) == D_in
    cut = {}
    if is_plain(spec, t):  # one head with no epilogue is cut where the tiles end
        head_dim = tiles.BLOCK_N
        cut = {f"stride_{letter}h": head_dim for letter in "qkvsr"}
        chunks = cdiv(columns, head_dim)
        spec = spec._replace(**{name: chunks for name in ("num_q", "num_k", "num_v") if getattr(spec, name)})
    tiles = whole_heads(tiles, spec, head_dim)
    heads = tiles.BLOCK_N // block_dim(head_dim)
    tiles_m = cdiv(B * L, tiles.BLOCK_M)
    arguments = {
        **_arguments(spec, t, head_dim),
        **_heads("x", t.x),
        **_heads("r", t.residual),
        **_outputs(outputs, saved),
        **cut,
        "X": t.x,
        "W": t.weight,
        "BIAS": t.bias,
        "RESIDUAL": t.residual,
        "stride_wn": t.weight.stride(0),
        "tiles_m": tiles_m,
        "columns": columns,
        "depth": depth,
        "D_IN": 0 if in_rows else D_in,
        "HEADS": heads,
        "PRECISION": precision,
        "GROUP_M": GROUP_M,
        "EVEN_K": depth % tiles.BLOCK_K == 0,
        "RAGGED": columns % head_dim != 0,
        "BLOCK_K": tiles.BLOCK_K,
    }
    return Launch(_projection_fwd_kernel, tiles_m * (spec.num_heads // heads), arguments, tiles)


def is_plain(spec, t):
    """Whether the outputs are a single head with neither norm nor rotary: a matrix, which may be cut anywhere."""
    return spec.num_heads == 1 and t.q_norm is None and t.k_norm is None and t.cos is None


def epilogue(spec, t, y, outputs, saved, inverse=False):
    """The launch that fills ``outputs`` and ``saved``, if it is not None, from the heads ``y``, with bias added.

    With ``inverse`` pairs are turned back.
    """
    D = y.shape[-1]
    tiles = rows_tiles(D)
    arguments = {
        **_arguments(spec, t, D),
        **_heads("y", y),
        **_outputs(outputs, saved),
        "Y": y,
        "INVERSE": inverse,
    }
    programs = cdiv(arguments["rows"], tiles.BLOCK_M) * spec.num_heads
    return Launch(_projection_epilogue_kernel, programs, arguments, tiles)


def backward(spec, t, saved, grads, grad_rows, partials):
    """The launch that fills ``grad_rows``, ``[B * L, num_heads * D]``, from ``grads`` of q, k and v.

    ``partials``, float32 of ``partials_shape``, gets the gradients of the norms' weights by tile and head.
    """
    D = grads[0].shape[-1]
    tiles = rows_tiles(D)
    outputs = _outputs(grads, saved)
    arguments = {
        **_arguments(spec, t, D),
        **outputs,
        **{f"D{name}": outputs[name] for name in "QKV"},
        "DY": grad_rows,
        "PARTIALS": partials,
    }
    programs = cdiv(arguments["rows"], tiles.BLOCK_M) * spec.num_heads
    return Launch(_projection_bwd_kernel, programs, arguments, tiles)


def partials_shape(spec, rows, D):
    return cdiv(rows, rows_tiles(D).BLOCK_M), spec.num_q + spec.num_k, D
