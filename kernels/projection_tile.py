"""The pieces that the projection kernels share: which elements are a pair, loads, stores, norm, rotary.

A tile is [M, HEADS, D], tokens by heads, and is held as two halves ``b_a`` and ``b_b`` of [M, HEADS, D / 2]: of the
pairs that rotary turns one element is in each, so that turning them moves nothing.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from pyattn.kernels.tile import clamp


class Heads(NamedTuple):
    """``[B, H, L, D]`` in memory, with a last stride of 1."""

    p: tl.tensor  # or None
    stride_b: tl.tensor
    stride_h: tl.tensor
    stride_l: tl.tensor


class Tokens(NamedTuple):
    """The tokens of a tile, [M] each."""

    o_b: tl.tensor
    o_l: tl.tensor
    mask: tl.tensor


class Tables(NamedTuple):
    """Of rotary: cos and sin ``[max_pos, R / 2]``, or None, and positions ``[B or 1, L]``, or None."""

    COS: tl.tensor
    SIN: tl.tensor
    POSITIONS: tl.tensor
    stride_pb: tl.tensor
    max_pos: tl.tensor


@triton.jit
def tokens_of(i_m, rows, L, BLOCK_M: tl.constexpr):
    """``o_b, o_l, mask`` of the i-th tile of tokens; tiles go over the borders of samples."""
    o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    return o_r // L, o_r % L, o_r < rows


@triton.jit
def pair_columns(o_j, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The columns of a head that the j-th pair is made of, and whether they are there.

    The first R / 2 pairs are those of rotary: neighbours, or R / 2 apart. The rest is cut in two in the same manner.
    """
    HALF: tl.constexpr = R // 2
    REST: tl.constexpr = (D - R + 1) // 2
    if INTERLEAVED:
        return 2 * o_j, 2 * o_j + 1, 2 * o_j < D, 2 * o_j + 1 < D
    elif REST == 0:
        return o_j, o_j + HALF, o_j < HALF, o_j < HALF
    else:
        o_a = o_j + tl.where(o_j < HALF, 0, HALF)
        o_b = o_a + tl.where(o_j < HALF, HALF, REST)
        return o_a, o_b, o_j < HALF + REST, o_b < D


@triton.jit
def tile_columns(D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr):
    """``pair_columns`` of all pairs, [1, 1, D / 2], with what the compiler does not find: where runs of them begin."""
    o_a, o_b, m_a, m_b = pair_columns(tl.arange(0, BLOCK_D // 2)[None, None, :], D, R, INTERLEAVED)
    RUNS: tl.constexpr = (R // 2) | ((D - R + 1) // 2) | 16
    RUN: tl.constexpr = RUNS & -RUNS  # the largest power of two that divides both parts' lengths
    o_a = tl.max_contiguous(tl.multiple_of(o_a, (1, 1, RUN)), (1, 1, RUN))
    o_b = tl.max_contiguous(tl.multiple_of(o_b, (1, 1, RUN)), (1, 1, RUN))
    return o_a, o_b, m_a, m_b


@triton.jit
def head_rows(heads, tokens, o_h):
    """Where the rows of a tile begin, [M, HEADS, 1] in int64; ``o_h`` is [HEADS]."""
    o_token = tokens.o_b * heads.stride_b + tokens.o_l * heads.stride_l
    return o_token[:, None, None] + (o_h * heads.stride_h)[None, :, None]


@triton.jit
def load_pairs(
    p, o_rows, m_rows, limit, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The rows at ``p + o_rows`` as pairs in float32, 0 outside of ``m_rows``, and from column ``limit`` on."""
    if INTERLEAVED:  # one load of neighbours, not two of every other element
        o_d = tl.arange(0, BLOCK_D)[None, None, :]
        b_x = tl.load(p + o_rows + o_d, mask=m_rows & (o_d < limit), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(b_x, (b_x.shape[0], b_x.shape[1], BLOCK_D // 2, 2)))
    else:
        o_a, o_b, m_a, m_b = tile_columns(D, R, INTERLEAVED, BLOCK_D)
        b_a = tl.load(p + o_rows + o_a, mask=m_rows & m_a, other=0.0)
        b_b = tl.load(p + o_rows + o_b, mask=m_rows & m_b, other=0.0)
        return b_a.to(tl.float32), b_b.to(tl.float32)


@triton.jit
def store_pairs(
    p, o_rows, m_rows, b_a, b_b, limit, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The inverse of ``load_pairs``: rounds, and writes what is in ``m_rows`` and before ``limit``."""
    b_a, b_b = b_a.to(p.dtype.element_ty), b_b.to(p.dtype.element_ty)
    if INTERLEAVED:
        o_d = tl.arange(0, BLOCK_D)[None, None, :]
        b_x = tl.reshape(tl.join(b_a, b_b), (b_a.shape[0], b_a.shape[1], BLOCK_D))
        tl.store(p + o_rows + o_d, b_x, mask=m_rows & (o_d < limit))
    else:
        o_a, o_b, m_a, m_b = tile_columns(D, R, INTERLEAVED, BLOCK_D)
        tl.store(p + o_rows + o_a, b_a, mask=m_rows & m_a)
        tl.store(p + o_rows + o_b, b_b, mask=m_rows & m_b)


@triton.jit
def load_vector(p, o_h, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr):
    """A row of D elements for every head, as pairs of [1, HEADS, D / 2]."""
    o_rows = (o_h * D)[None, :, None]
    return load_pairs(p, o_rows, o_rows >= 0, D, D, R, INTERLEAVED, BLOCK_D)


@triton.jit
def reciprocal_rms(b_a, b_b, eps, D: tl.constexpr):
    """[M, HEADS, 1]; padding is 0."""
    return tl.rsqrt(tl.sum(b_a * b_a + b_b * b_b, 2) / D + eps)[:, :, None]


@triton.jit
def normalise(
    b_a, b_b, NORM, o_h, eps, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr
):
    """RMSNorm over D."""
    b_rstd = reciprocal_rms(b_a, b_b, eps, D)
    b_wa, b_wb = load_vector(NORM, o_h * 0, D, R, INTERLEAVED, BLOCK_D)
    return b_a * b_rstd * b_wa, b_b * b_rstd * b_wb


@triton.jit
def turn(b_a, b_b, tables, tokens, R: tl.constexpr, INVERSE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rotary: turns each pair by the angle of its token's position. Pairs from R / 2 on stay as they are."""
    o_pos = tokens.o_l
    if tables.POSITIONS is not None:
        o_pos = tl.load(tables.POSITIONS + tokens.o_b * tables.stride_pb + o_pos, mask=tokens.mask, other=0)
    o_pos = clamp(o_pos.to(tl.int64), 0, tables.max_pos - 1)
    o_j = tl.arange(0, BLOCK_D // 2)[None, None, :]
    o_angle = o_pos[:, None, None] * (R // 2) + o_j
    m_angle = tokens.mask[:, None, None] & (o_j < R // 2)
    b_cos = tl.load(tables.COS + o_angle, mask=m_angle, other=1.0).to(tl.float32)  # [M, 1, D / 2]
    b_sin = tl.load(tables.SIN + o_angle, mask=m_angle, other=0.0).to(tl.float32)
    if INVERSE:
        b_sin = -b_sin
    return b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin


@triton.jit
def finish(
    b_a, b_b, tokens, i_head, q, k, v, saved, q_norm, k_norm, tables, eps, limit,
    num_q, num_k, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Norm and rotary of HEADS heads from ``i_head`` on, which are all of q, of k or of v, and where they go."""
    o_h = i_head + tl.arange(0, HEADS)
    m_rows = tokens.mask[:, None, None]
    if saved.p is not None:
        if i_head < num_q + num_k:
            store_pairs(saved.p, head_rows(saved, tokens, o_h), m_rows, b_a, b_b, limit, D, R, INTERLEAVED, BLOCK_D)
    if q_norm is not None:
        if i_head < num_q:
            b_a, b_b = normalise(b_a, b_b, q_norm, o_h, eps, D, R, INTERLEAVED, BLOCK_D)
    if k_norm is not None:
        if (i_head >= num_q) & (i_head < num_q + num_k):
            b_a, b_b = normalise(b_a, b_b, k_norm, o_h, eps, D, R, INTERLEAVED, BLOCK_D)
    if tables.COS is not None:
        if i_head < num_q + num_k:
            b_a, b_b = turn(b_a, b_b, tables, tokens, R, INVERSE, BLOCK_D)
    if i_head < num_q:
        store_pairs(q.p, head_rows(q, tokens, o_h), m_rows, b_a, b_b, limit, D, R, INTERLEAVED, BLOCK_D)
    elif i_head < num_q + num_k:
        o_rows = head_rows(k, tokens, o_h - num_q)
        store_pairs(k.p, o_rows, m_rows, b_a, b_b, limit, D, R, INTERLEAVED, BLOCK_D)
    else:
        o_rows = head_rows(v, tokens, o_h - num_q - num_k)
        store_pairs(v.p, o_rows, m_rows, b_a, b_b, limit, D, R, INTERLEAVED, BLOCK_D)
