"""The pieces that the attention kernels share: where a program works, what a score is, one step of the softmax.

Prefixes: ``i_`` an index of the program, ``o_`` offsets, ``p_`` pointers, ``b_`` block values, ``m_`` masks. A comment
on a block value is its shape. Row offsets ``o_m`` are [M, 1] and key offsets ``o_n`` [1, N]; where a kernel transposes
its tiles they are [1, M] and [N, 1], and everything below broadcasts.

An optional argument of a kernel is None when it is not used, which Triton knows when it compiles: a feature that is
not used costs nothing. (A function of Triton 3.6 cannot return None, so the tuples below are made in the kernels.)
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MIN_BIAS = tl.constexpr(-2.3e38)  # finite biases are clamped here: times log2(e) it is still finite in float32
EDGE = tl.constexpr(2**30)  # edges are clamped here: beyond every length, and sums with a row stay in 32 bits
FAR = tl.constexpr(2**60)  # offsets are clamped here and windows at twice this: sums stay in 64 bits


class Sample(NamedTuple):
    """What the scores of one sample depend on."""

    i_b: tl.tensor
    Lq: tl.tensor
    start: tl.tensor  # keys in use: [start, length)
    length: tl.tensor
    offset: tl.tensor  # int64: pos(i) = i + offset
    first: tl.tensor  # of row i's keys: i + first, if there is a left window
    last: tl.tensor  # one past row i's keys: i + last, if there is a right window
    scale: tl.tensor  # positive: the sign is that of the query, see ``load_query``; see also ``scores``
    softcap: tl.tensor  # times log2(e), or None
    window_left: tl.tensor  # None: unlimited
    window_right: tl.tensor
    KV_STARTS: tl.tensor  # None: start is 0
    MASK: tl.tensor  # or None
    stride_mb: tl.tensor
    stride_mh: tl.tensor
    stride_mm: tl.tensor
    stride_mn: tl.tensor
    SEED: tl.tensor  # of dropout, or None
    threshold: tl.tensor


class Keys(NamedTuple):
    """Where the keys and values of one sample and head lie."""

    p_k: tl.tensor
    p_v: tl.tensor
    stride_kn: tl.tensor
    stride_vn: tl.tensor
    p_table: tl.tensor  # the pages of this sample, or None
    stride_tn: tl.tensor
    stride_kp: tl.tensor  # from page to page
    stride_vp: tl.tensor
    num_pages: tl.tensor


# ---- where a program works ----------------------------------------------------------------------------------


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def first_slot(CU_SEQLENS, i_b, total, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    return clamp(tl.load(CU_SEQLENS + i_b), 0, total) * ROWS // BLOCK + i_b


@triton.jit
def tile_of(slot, CU_SEQLENS, B, total, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sample of a slot, and the tile in it; tiles have BLOCK rows, of which each token of the sample has ROWS.

    A sample has ``tiles`` slots. In a packed batch sequence b has those from ``cu_seqlens[b] * ROWS // BLOCK + b`` on,
    at least as many as its tiles, so that a program finds its own without anyone having looked at the lengths.
    """
    if CU_SEQLENS is None:
        return slot // tiles, slot % tiles
    else:
        low = slot * 0  # the last sequence that begins no later than the slot lies in [low, high)
        high = low + B
        while high - low > 1:
            middle = (low + high) // 2
            after = first_slot(CU_SEQLENS, middle, total, ROWS, BLOCK) > slot
            low = tl.where(after, low, middle)
            high = tl.where(after, middle, high)
        return low, tl.maximum(slot - first_slot(CU_SEQLENS, low, total, ROWS, BLOCK), 0)


@triton.jit
def span(CU_SEQLENS, i_b, L, total):
    """The first row of a sample, and its length."""
    if CU_SEQLENS is None:
        return L * 0, L
    else:
        first = clamp(tl.load(CU_SEQLENS + i_b), 0, total)
        return first, tl.maximum(clamp(tl.load(CU_SEQLENS + i_b + 1), 0, total) - first, 0)


@triton.jit
def positions(i_b, Lq, Lk, KV_STARTS, KV_LENGTHS, Q_OFFSETS, q_offset, window_left, window_right):
    """``start, length, offset, first, last`` of ``Sample``, clamped: no value leads outside the keys there are.

    By default the last row meets the last key. ``first`` and ``last`` mean nothing where a window is unlimited.
    """
    start = Lk * 0
    length = Lk
    if KV_STARTS is not None:
        start = clamp(tl.load(KV_STARTS + i_b), 0, Lk).to(tl.int32)
    if KV_LENGTHS is not None:
        length = clamp(tl.load(KV_LENGTHS + i_b), 0, Lk).to(tl.int32)
    if Q_OFFSETS is not None:
        offset = tl.load(Q_OFFSETS + i_b).to(tl.int64)
    elif q_offset is not None:
        offset = q_offset.to(tl.int64)
    else:
        offset = (length - Lq).to(tl.int64)
    offset = clamp(offset, -FAR, FAR)
    first = offset
    last = offset
    if window_left is not None:
        first = offset - tl.minimum(window_left.to(tl.int64), 2 * FAR)
    if window_right is not None:
        last = offset + tl.minimum(window_right.to(tl.int64), 2 * FAR) + 1
    return start, length, offset, clamp(first, -EDGE, EDGE).to(tl.int32), clamp(last, -EDGE, EDGE).to(tl.int32)


@triton.jit
def key_range(o_m, sample):
    """The half-open interval ``[lo, hi)`` of keys that a row may see: the twin of ``reference.key_range``."""
    lo = sample.start
    hi = sample.length
    if sample.window_left is not None:
        lo = tl.maximum(lo, o_m + sample.first)
    if sample.window_right is not None:
        hi = tl.minimum(hi, o_m + sample.last)
    return lo, hi


@triton.jit
def key_tiles(first_row, last_row, sample, BLOCK_N: tl.constexpr):
    """``begin, full_begin, full_end, end``: the tiles of keys that rows ``first_row`` to ``last_row`` see.

    All but ``end`` are multiples of BLOCK_N. Keys in ``[full_begin, full_end)`` are seen by every row.
    """
    begin, full_end = key_range(first_row, sample)
    full_begin, end = key_range(last_row, sample)
    full_begin = tl.cdiv(tl.maximum(full_begin, 0), BLOCK_N) * BLOCK_N
    full_end = tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N
    return tl.maximum(begin, 0) // BLOCK_N * BLOCK_N, full_begin, full_end, end


@triton.jit
def query_tiles(first_key, sample, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``begin, full_begin, full_end, end``: the tiles of rows that see some of BLOCK_N keys from ``first_key`` on.

    The inverse of ``key_tiles``. Rows in ``[full_begin, full_end)`` see every one of the keys.
    """
    after = first_key + BLOCK_N
    begin = first_key * 0
    full_begin = begin
    end = sample.Lq
    full_end = end
    if sample.window_right is not None:
        begin = clamp(first_key + 1 - sample.last, 0, sample.Lq)
        full_begin = clamp(after - sample.last, 0, sample.Lq)
    if sample.window_left is not None:
        end = clamp(tl.minimum(after, sample.length) - sample.first, 0, sample.Lq)
        full_end = clamp(first_key + 1 - sample.first, 0, sample.Lq)
    if (first_key >= sample.length) | (after <= sample.start):
        end = begin * 0
    if (first_key < sample.start) | (after > sample.length):
        full_end = begin * 0
    full_begin = tl.cdiv(full_begin, BLOCK_M) * BLOCK_M
    return begin // BLOCK_M * BLOCK_M, full_begin, full_end // BLOCK_M * BLOCK_M, end


@triton.jit
def count_tiles(begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    """``n_full, n_left, n_masked``: of the tiles in ``[begin, end)`` so many need no mask, and so many need one.

    Those lie on the left of ``[full_begin, full_end)``, ``n_left`` of them, and on its right.
    """
    n_full = tl.maximum(full_end - full_begin, 0) // BLOCK
    n_left = tl.cdiv(tl.maximum(tl.minimum(full_begin, end) - begin, 0), BLOCK)
    n_right = tl.cdiv(tl.maximum(end - tl.maximum(full_begin, full_end), 0), BLOCK)
    return n_full, n_left, n_left + n_right


@triton.jit
def tile_start(i, begin, full_begin, full_end, n_left, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Where the i-th tile that needs a mask begins, or the i-th of those that need none."""
    if MASKED:
        right = tl.maximum(full_begin, full_end) + (i - n_left) * BLOCK
        return tl.where(i < n_left, begin + i * BLOCK, right)
    else:
        return full_begin + i * BLOCK


# ---- loads --------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(p, o_rows, m_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows at ``p + o_rows``, [R, BLOCK_D]: 0 from D on and, if MASKED, in rows outside ``m_rows``."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p + (o_rows[:, None] + o_d[None, :])
    if MASKED and D == BLOCK_D:
        return tl.load(p_rows, mask=m_rows[:, None], other=0.0)
    elif MASKED:
        return tl.load(p_rows, mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(p_rows)
    else:
        return tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def load_query(p, o_rows, m_rows, sign, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """A tile of the query, [M, D], times the sign of the scale: -1, 0, or None for 1. So scales are positive."""
    b_q = load_rows(p, o_rows, m_rows, D, BLOCK_D, MASKED)
    if sign is not None:
        b_q = (b_q.to(tl.float32) * sign).to(b_q.dtype)
    return b_q


@triton.jit
def key_offsets(o_n, m_n, keys, PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Where the rows of keys and those of values begin, [N] each in int64, from ``keys.p_k`` and ``keys.p_v``."""
    if keys.p_table is None:
        o_row = o_n.to(tl.int64)
        return o_row * keys.stride_kn, o_row * keys.stride_vn
    else:
        p_page = keys.p_table + (o_n // PAGE_SIZE) * keys.stride_tn
        page = tl.load(p_page, mask=m_n, other=0) if MASKED else tl.load(p_page)
        page = clamp(page, 0, keys.num_pages - 1).to(tl.int64)
        o_row = (o_n % PAGE_SIZE).to(tl.int64)
        return page * keys.stride_kp + o_row * keys.stride_kn, page * keys.stride_vp + o_row * keys.stride_vn


# ---- scores -------------------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """To about an ulp of float32: the polynomial and the bound 0.625 are those of Cephes' tanhf."""
    z = x * x
    y = -5.70498872745e-3 * z + 2.06390887954e-2
    y = y * z - 5.37397155531e-2
    y = y * z + 1.33314422036e-1
    y = y * z - 3.33332819422e-1
    small = y * z * x + x
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp2(size * (2 * LOG2E)) + 1.0)
    return tl.where(size < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def scores(b_s, o_m, o_n, start_n, o_h, slope, sample, MASKED: tl.constexpr):
    """From products of queries and keys: ``b_s, unit, b_slope``, where ``b_s * unit`` are scores times log2(e).

    Masked ones are -inf; those outside the key range only if MASKED, otherwise there are none in this tile. Without
    bias, ALiBi and softcap ``b_s`` are the products themselves and ``unit`` is the scale, so that both fold into the
    argument of exp2. ``b_slope`` is the derivative of the softcap. ``sample.scale`` is the scale times log2(e), with
    a softcap it is over the softcap. ``slope`` is ALiBi's times log2(e), or None; ``o_h`` the head, or [M, 1].
    """
    unit = sample.scale
    b_slope = 1.0
    if sample.softcap is not None:
        b_tanh = tanh(b_s * unit)
        b_slope = 1.0 - b_tanh * b_tanh
        b_s = b_tanh * sample.softcap
        unit = 1.0
    if slope is not None:
        # From the first key of the tile on: beyond 2^24 a position is no float32, a distance hardly ever so large.
        o_first = (sample.offset + o_m - start_n).to(tl.float32)
        b_s = b_s * unit - slope * tl.abs(o_first - (o_n - start_n).to(tl.float32))
        unit = 1.0
    if sample.MASK is not None:
        o_mask = (
            sample.i_b * sample.stride_mb + o_h * sample.stride_mh + o_m * sample.stride_mm + o_n * sample.stride_mn
        )
        b_mask = tl.load(sample.MASK + o_mask, mask=(o_m < sample.Lq) & (o_n < sample.length), other=0)
        if sample.MASK.dtype.element_ty == tl.int1:
            b_s = tl.where(b_mask, b_s, float("-inf"))
        else:
            b_bias = b_mask.to(tl.float32)
            b_bias = tl.where((b_bias < MIN_BIAS) & (b_bias > float("-inf")), MIN_BIAS, b_bias)
            b_s = tl.where(b_bias == float("-inf"), float("-inf"), b_s * unit + b_bias * LOG2E)
            unit = 1.0
    if MASKED:
        lo, hi = key_range(o_m, sample)
        m_live = o_n < hi
        if sample.window_left is not None or sample.KV_STARTS is not None:
            m_live = m_live & (o_n >= lo)
        b_s = tl.where(m_live, b_s, float("-inf"))
    return b_s, unit, b_slope


@triton.jit
def online_softmax_step(b_s, unit, b_max, b_sum, MAY_BE_EMPTY: tl.constexpr):
    """Weights of one more tile of keys, and what becomes of the rows so far (Milakov and Gimelshein 2018).

    Returns ``b_p`` [M, N], the factor ``b_alpha`` [M] by which earlier sums shrink, and the new ``b_max`` (in log2
    units) and ``b_sum``. If MAY_BE_EMPTY a row may have no live key yet: its maximum stays -inf, its sums 0.
    """
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * unit)
    b_base = b_new_max
    if MAY_BE_EMPTY:
        b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_p = tl.exp2(b_s * unit - b_base[:, None])
    b_alpha = tl.exp2(b_max - b_base)
    return b_p, b_alpha, b_new_max, b_sum * b_alpha + tl.sum(b_p, 1)


@triton.jit
def philox_kept(o_m, o_h, start_n, sample, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of a tile dropout keeps, [M, N]; ``o_m`` is [M, 1], ``o_h`` the head or [M, 1].

    The twin of ``reference.dropout_factor``: key j takes half ``(j >> 2) & 1`` of word ``j & 3`` of the Philox 4x32-10
    block with counter ``(j // 8, i, h, b)``. ``start_n`` is a multiple of 8.
    """
    o_block = (start_n // 8 + tl.arange(0, BLOCK_N // 8))[None, :]
    zero = (o_m + o_block) * 0  # [M, N / 8]
    w0, w1, w2, w3 = tl.philox(tl.load(sample.SEED), o_block + zero, o_m + zero, o_h + zero, sample.i_b + zero)
    w0 = tl.join(w0 & 0xFFFF, w0 >> 16)  # [M, N / 8, half]
    w1 = tl.join(w1 & 0xFFFF, w1 >> 16)
    w2 = tl.join(w2 & 0xFFFF, w2 >> 16)
    w3 = tl.join(w3 & 0xFFFF, w3 >> 16)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [M, N / 8, half, word's high bit, word's low bit]
    return tl.reshape(words, (BLOCK_M, BLOCK_N)).to(tl.int32) >= sample.threshold
