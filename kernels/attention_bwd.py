"""The backward: every gradient has one owner, so there are no atomics and the bits are reproducible.

First the row term; then keys and values (a program owns a tile of keys and goes over the queries), the query (a
program owns a tile of queries and goes over the keys) and, if asked for, a float mask (a program owns a tile of it).
Each recomputes the weights from lse: ``p = exp(s - lse)``, ``ds = p * (dp - delta)`` (Dao 2023, arXiv:2307.08691).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from pyattn.kernels.launch import (
    NOT_SPECIALIZED,
    Launch,
    Tiles,
    block_dim,
    cdiv,
    common_arguments,
    lse_strides,
    slots_of,
    strides,
)
from pyattn.kernels.tile import (
    LOG2E,
    Keys,
    Sample,
    count_tiles,
    key_offsets,
    key_tiles,
    load_query,
    load_rows,
    philox_kept,
    positions,
    query_tiles,
    scores,
    span,
    tile_of,
    tile_start,
)

PREPROCESS_TILES = Tiles(BLOCK_M=32, BLOCK_N=1, num_warps=4, num_stages=1)


class Rows(NamedTuple):
    """Where what belongs to the rows of one sample and query head lies, or to those of the first head of a group."""

    p_q: tl.tensor
    p_do: tl.tensor
    p_lse: tl.tensor
    p_delta: tl.tensor
    stride_qm: tl.tensor
    stride_dom: tl.tensor
    stride_qh: tl.tensor
    stride_doh: tl.tensor
    stride_lh: tl.tensor
    p_slopes: tl.tensor  # of this sample, or None


# ---- the row term -------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _attention_bwd_preprocess_kernel(
    OUT, DO, DLSE, DELTA,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_om: tl.int64,
    stride_dob: tl.int64, stride_doh: tl.int64, stride_dom: tl.int64, stride_lb: tl.int64, stride_lh: tl.int64,
    Hq, Lq, Dv: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``delta = rowsum(out * d out) - d lse``: a row's lse shifts all of its scores' gradients alike."""
    num_tiles = tl.cdiv(Lq, BLOCK_M)
    i_m, i_head = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    i_b, i_h = i_head // Hq, i_head % Hq
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < Lq
    o_out = i_b * stride_ob + i_h * stride_oh + o_m * stride_om
    o_do = i_b * stride_dob + i_h * stride_doh + o_m * stride_dom
    b_out = load_rows(OUT, o_out, m_m, Dv, BLOCK_DV, True).to(tl.float32)  # [M, Dv]
    b_do = load_rows(DO, o_do, m_m, Dv, BLOCK_DV, True).to(tl.float32)
    b_delta = tl.sum(b_out * b_do, 1)
    o_row = i_b * stride_lb + i_h * stride_lh + o_m
    if DLSE is not None:
        b_delta -= tl.load(DLSE + o_row, mask=m_m, other=0.0)
    tl.store(DELTA + o_row, b_delta, mask=m_m)


# ---- weights, and the gradients of scores -------------------------------------------------------------------


@triton.jit
def _row_terms(p_lse, p_delta, o_m, m_m):
    """lse times log2(e) and delta of rows, [M]; the lse of a row without keys is inf, so its weights are 0."""
    b_lse = tl.load(p_lse + o_m, mask=m_m, other=float("-inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
    return b_lse, tl.load(p_delta + o_m, mask=m_m, other=0.0)


@triton.jit
def _score_gradients(b_s, unit, b_dp, b_lse, b_delta, m_kept, keep_scale, sample):
    """``b_p``, as dropout leaves them but for ``keep_scale``, and the gradients of biased scores."""
    # Where lse is so large that its rounding counts, a weight must not come out beyond 1.
    b_p = tl.exp2(tl.minimum(b_s * unit - b_lse, 0.0, propagate_nan=tl.PropagateNan.ALL))
    if sample.SEED is not None:
        b_dp = tl.where(m_kept, b_dp * keep_scale, 0.0)
    b_ds = b_p * (b_dp - b_delta)
    if sample.SEED is not None:
        b_p = tl.where(m_kept, b_p, 0.0)
    return b_p, b_ds


# ---- keys and values ----------------------------------------------------------------------------------------


@triton.jit
def _over_queries(
    b_dk, b_dv, b_k, b_v, n, begin, full_begin, full_end, n_left, start_n, o_n, first_head, sign, keep_scale,
    rows, sample,
    GROUP: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sums over ``n`` tiles of queries in each head of the group: those that need a mask, or those that need none.

    Tiles are transposed: so their weights are left operands of products.
    """
    # Loads of the first turn start before the loop, behind a test whether there is a turn: division by n = 0 would let
    # the compiler infer that there is one, and drop the test.
    divisor = tl.maximum(n, 1)
    for i in range(n * GROUP):
        i_g = i // divisor
        i_h = first_head + i_g
        start_m = tile_start(i % divisor, begin, full_begin, full_end, n_left, BLOCK_M, MASKED)
        o_m = start_m + tl.arange(0, BLOCK_M)
        m_m = o_m < sample.Lq
        p_q = rows.p_q + i_g * rows.stride_qh
        b_q = load_query(p_q, o_m * rows.stride_qm, m_m, sign, D, BLOCK_D, MASKED)  # [M, D]
        o_row = i_g * rows.stride_lh
        b_lse, b_delta = _row_terms(rows.p_lse + o_row, rows.p_delta + o_row, o_m, m_m)
        slope = rows.p_slopes
        if rows.p_slopes is not None:
            slope = tl.load(rows.p_slopes + i_h) * LOG2E
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [N, M]
        b_s, unit, b_slope = scores(b_s, o_m[None, :], o_n[:, None], start_n, i_h, slope, sample, MASKED)
        b_do = load_rows(rows.p_do + i_g * rows.stride_doh, o_m * rows.stride_dom, m_m, Dv, BLOCK_DV, MASKED)  # [M, Dv]
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [N, M]
        m_kept = True
        if sample.SEED is not None:
            m_kept = tl.trans(philox_kept(o_m[:, None], i_h, start_n, sample, BLOCK_M, BLOCK_N))
        b_p, b_ds = _score_gradients(b_s, unit, b_dp, b_lse[None, :], b_delta[None, :], m_kept, keep_scale, sample)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dk = tl.dot((b_ds * b_slope).to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _attention_bwd_dkdv_kernel(
    Q, K, V, DO, DK, DV, LSE, DELTA,
    MASK, ALIBI_SLOPES, Q_OFFSETS, KV_LENGTHS, KV_STARTS, CU_SEQLENS_Q, CU_SEQLENS_K, SEED,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qm: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_dob: tl.int64, stride_doh: tl.int64, stride_dom: tl.int64,
    stride_dkb: tl.int64, stride_dkh: tl.int64, stride_dkn: tl.int64,
    stride_dvb: tl.int64, stride_dvh: tl.int64, stride_dvn: tl.int64,
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mm: tl.int64, stride_mn: tl.int64,
    stride_ab: tl.int64, stride_lb: tl.int64, stride_lh: tl.int64,
    B, Hq, Lq, Lk, total_q, total_k, tiles, slots,
    scale, sign, softcap, window_left, window_right, q_offset, threshold, keep_scale, grad_scale,
    GROUP: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The program: a tile of keys of one sample and key head.
    i_slot, i_kh = tl.program_id(0) % slots, tl.program_id(0) // slots
    i_b, i_n = tile_of(i_slot, CU_SEQLENS_K, B, total_k, tiles, 1, BLOCK_N)
    first_k, Lk = span(CU_SEQLENS_K, i_b, Lk, total_k)
    if i_n * BLOCK_N >= Lk:
        return
    first_q, Lq = span(CU_SEQLENS_Q, i_b, Lq, total_q)
    start, length, offset, first, last = positions(
        i_b, Lq, Lk, KV_STARTS, KV_LENGTHS, Q_OFFSETS, q_offset, window_left, window_right
    )
    sample = Sample(
        i_b, Lq, start, length, offset, first, last, scale, softcap, window_left, window_right, KV_STARTS,
        MASK, stride_mb, stride_mh, stride_mm, stride_mn, SEED, threshold,
    )  # fmt: skip
    start_n = i_n * BLOCK_N
    o_n = start_n + tl.arange(0, BLOCK_N)
    m_n = (o_n >= start) & (o_n < length)
    o_k, o_v = i_b * stride_kb + i_kh * stride_kh, i_b * stride_vb + i_kh * stride_vh
    b_k = load_rows(K, o_k + (first_k + o_n) * stride_kn, m_n, D, BLOCK_D, True)  # [N, D]
    b_v = load_rows(V, o_v + (first_k + o_n) * stride_vn, m_n, Dv, BLOCK_DV, True)  # [N, Dv]

    first_head = i_kh * GROUP
    o_row = i_b * stride_lb + first_head * stride_lh + first_q
    p_slopes = ALIBI_SLOPES
    if ALIBI_SLOPES is not None:
        p_slopes = ALIBI_SLOPES + i_b * stride_ab
    rows = Rows(
        Q + i_b * stride_qb + first_head * stride_qh + first_q * stride_qm,
        DO + i_b * stride_dob + first_head * stride_doh + first_q * stride_dom,
        LSE + o_row, DELTA + o_row, stride_qm, stride_dom, stride_qh, stride_doh, stride_lh, p_slopes,
    )  # fmt: skip
    begin, full_begin, full_end, end = query_tiles(start_n, sample, BLOCK_M, BLOCK_N)

    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    n_full, n_left, n_masked = count_tiles(begin, full_begin, full_end, end, BLOCK_M)
    b_dk, b_dv = _over_queries(
        b_dk, b_dv, b_k, b_v, n_full, begin, full_begin, full_end, n_left, start_n, o_n, first_head, sign, keep_scale,
        rows, sample, GROUP, D, Dv, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    b_dk, b_dv = _over_queries(
        b_dk, b_dv, b_k, b_v, n_masked, begin, full_begin, full_end, n_left, start_n, o_n, first_head, sign, keep_scale,
        rows, sample, GROUP, D, Dv, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, True,
    )  # fmt: skip

    if SEED is not None:
        b_dv *= keep_scale
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_n = o_n < Lk
    o_dk = i_b * stride_dkb + i_kh * stride_dkh + (first_k + o_n) * stride_dkn
    o_dv_rows = i_b * stride_dvb + i_kh * stride_dvh + (first_k + o_n) * stride_dvn
    b_dk = (b_dk * grad_scale).to(DK.dtype.element_ty)
    tl.store(DK + o_dk[:, None] + o_d[None, :], b_dk, mask=m_n[:, None] & (o_d < D)[None, :])
    b_dv = b_dv.to(DV.dtype.element_ty)
    tl.store(DV + o_dv_rows[:, None] + o_dv[None, :], b_dv, mask=m_n[:, None] & (o_dv < Dv)[None, :])


# ---- the query ----------------------------------------------------------------------------------------------


@triton.jit
def _over_keys(
    b_dq, b_q, b_do, b_lse, b_delta, n, begin, full_begin, full_end, n_left, o_m, i_h, slope, keep_scale, keys, sample,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sums over ``n`` tiles of keys: those that need a mask, or those that need none."""
    for i in range(n):
        start_n = tile_start(i, begin, full_begin, full_end, n_left, BLOCK_N, MASKED)
        o_n = start_n + tl.arange(0, BLOCK_N)
        m_n = (o_n >= sample.start) & (o_n < sample.length)
        o_k, o_v = key_offsets(o_n, m_n, keys, 1, MASKED)
        b_k = load_rows(keys.p_k, o_k, m_n, D, BLOCK_D, MASKED)  # [N, D]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, N]
        b_s, unit, b_slope = scores(b_s, o_m[:, None], o_n[None, :], start_n, i_h, slope, sample, MASKED)
        b_v = load_rows(keys.p_v, o_v, m_n, Dv, BLOCK_DV, MASKED)  # [N, Dv]
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [M, N]
        m_kept = True
        if sample.SEED is not None:
            m_kept = philox_kept(o_m[:, None], i_h, start_n, sample, BLOCK_M, BLOCK_N)
        b_p, b_ds = _score_gradients(b_s, unit, b_dp, b_lse[:, None], b_delta[:, None], m_kept, keep_scale, sample)
        b_dq = tl.dot((b_ds * b_slope).to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _attention_bwd_dq_kernel(
    Q, K, V, DO, DQ, LSE, DELTA,
    MASK, ALIBI_SLOPES, Q_OFFSETS, KV_LENGTHS, KV_STARTS, CU_SEQLENS_Q, CU_SEQLENS_K, SEED,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qm: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_dob: tl.int64, stride_doh: tl.int64, stride_dom: tl.int64,
    stride_dqb: tl.int64, stride_dqh: tl.int64, stride_dqm: tl.int64,
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mm: tl.int64, stride_mn: tl.int64,
    stride_ab: tl.int64, stride_lb: tl.int64, stride_lh: tl.int64,
    B, Hq, Lq, Lk, total_q, total_k, tiles, slots,
    scale, sign, softcap, window_left, window_right, q_offset, threshold, keep_scale, grad_scale,
    GROUP: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The program: a tile of rows of one sample and head.
    i_slot, i_h = tl.program_id(0) % slots, tl.program_id(0) // slots
    i_b, i_tile = tile_of(i_slot, CU_SEQLENS_Q, B, total_q, tiles, 1, BLOCK_M)
    first_q, Lq = span(CU_SEQLENS_Q, i_b, Lq, total_q)
    num_tiles = tl.cdiv(Lq, BLOCK_M)
    if i_tile >= num_tiles:
        return
    i_m = num_tiles - 1 - i_tile  # as in the forward
    first_k, Lk = span(CU_SEQLENS_K, i_b, Lk, total_k)
    start, length, offset, first, last = positions(
        i_b, Lq, Lk, KV_STARTS, KV_LENGTHS, Q_OFFSETS, q_offset, window_left, window_right
    )
    sample = Sample(
        i_b, Lq, start, length, offset, first, last, scale, softcap, window_left, window_right, KV_STARTS,
        MASK, stride_mb, stride_mh, stride_mm, stride_mn, SEED, threshold,
    )  # fmt: skip
    keys = Keys(
        K + i_b * stride_kb + (i_h // GROUP) * stride_kh + first_k * stride_kn,
        V + i_b * stride_vb + (i_h // GROUP) * stride_vh + first_k * stride_vn,
        stride_kn, stride_vn, None, 0, 0, 0, 0,
    )  # fmt: skip
    start_m = i_m * BLOCK_M
    o_m = start_m + tl.arange(0, BLOCK_M)
    m_m = o_m < Lq
    o_q, o_do = i_b * stride_qb + i_h * stride_qh, i_b * stride_dob + i_h * stride_doh
    b_q = load_query(Q, o_q + (first_q + o_m) * stride_qm, m_m, sign, D, BLOCK_D, True)  # [M, D]
    b_do = load_rows(DO, o_do + (first_q + o_m) * stride_dom, m_m, Dv, BLOCK_DV, True)  # [M, Dv]
    o_row = i_b * stride_lb + i_h * stride_lh + first_q
    b_lse, b_delta = _row_terms(LSE + o_row, DELTA + o_row, o_m, m_m)
    slope = ALIBI_SLOPES
    if ALIBI_SLOPES is not None:
        slope = tl.load(ALIBI_SLOPES + i_b * stride_ab + i_h) * LOG2E
    begin, full_begin, full_end, end = key_tiles(start_m, tl.minimum(start_m + BLOCK_M, Lq) - 1, sample, BLOCK_N)

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n_full, n_left, n_masked = count_tiles(begin, full_begin, full_end, end, BLOCK_N)
    b_dq = _over_keys(
        b_dq, b_q, b_do, b_lse, b_delta, n_full, begin, full_begin, full_end, n_left, o_m, i_h, slope, keep_scale,
        keys, sample, D, Dv, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    b_dq = _over_keys(
        b_dq, b_q, b_do, b_lse, b_delta, n_masked, begin, full_begin, full_end, n_left, o_m, i_h, slope, keep_scale,
        keys, sample, D, Dv, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, True,
    )  # fmt: skip

    o_d = tl.arange(0, BLOCK_D)
    o_dq = i_b * stride_dqb + i_h * stride_dqh + (first_q + o_m) * stride_dqm
    b_dq = (b_dq * grad_scale).to(DQ.dtype.element_ty)
    tl.store(DQ + o_dq[:, None] + o_d[None, :], b_dq, mask=m_m[:, None] & (o_d < D)[None, :])


# ---- the mask -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _attention_bwd_dmask_kernel(
    Q, K, V, DO, DMASK, LSE, DELTA,
    MASK, ALIBI_SLOPES, Q_OFFSETS, KV_LENGTHS, KV_STARTS, SEED,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qm: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_dob: tl.int64, stride_doh: tl.int64, stride_dom: tl.int64,
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mm: tl.int64, stride_mn: tl.int64,
    stride_ab: tl.int64, stride_lb: tl.int64, stride_lh: tl.int64,
    B, Hq, Lq, Lk, mask_B, mask_H, mask_Lq, mask_Lk,
    scale, sign, softcap, window_left, window_right, q_offset, threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUM_ROWS: tl.constexpr, SUM_KEYS: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of the mask, and sums over all that the mask is broadcast to."""
    tiles_m, tiles_n = tl.cdiv(mask_Lq, BLOCK_M), tl.cdiv(mask_Lk, BLOCK_N)
    i_n, i_rest = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n
    i_m, i_rest = i_rest % tiles_m, i_rest // tiles_m
    i_h, i_b = i_rest % mask_H, i_rest // mask_H
    # What of samples, heads, rows and keys the program goes over: all, or its own.
    samples, heads = tl.where(mask_B == 1, B, 1), tl.where(mask_H == 1, Hq, 1)
    begin_m, end_m = i_m * BLOCK_M, i_m * BLOCK_M + BLOCK_M
    begin_n, end_n = i_n * BLOCK_N, i_n * BLOCK_N + BLOCK_N
    if SUM_ROWS:
        begin_m, end_m = 0, Lq
    if SUM_KEYS:
        begin_n, end_n = 0, Lk

    b_dmask = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in range(i_b, i_b + samples):
        start, length, offset, first, last = positions(
            b, Lq, Lk, KV_STARTS, KV_LENGTHS, Q_OFFSETS, q_offset, window_left, window_right
        )
        sample = Sample(
            b, Lq, start, length, offset, first, last, scale, softcap, window_left, window_right, KV_STARTS,
            MASK, stride_mb, stride_mh, stride_mm, stride_mn, SEED, threshold,
        )  # fmt: skip
        for h in range(i_h, i_h + heads):
            o_row = b * stride_lb + h * stride_lh
            o_q, o_do = b * stride_qb + h * stride_qh, b * stride_dob + h * stride_doh
            o_k, o_v = b * stride_kb + (h // GROUP) * stride_kh, b * stride_vb + (h // GROUP) * stride_vh
            slope = ALIBI_SLOPES
            if ALIBI_SLOPES is not None:
                slope = tl.load(ALIBI_SLOPES + b * stride_ab + h) * LOG2E
            for start_m in range(begin_m, end_m, BLOCK_M):
                o_m = start_m + tl.arange(0, BLOCK_M)
                m_m = o_m < Lq
                b_q = load_query(Q, o_q + o_m * stride_qm, m_m, sign, D, BLOCK_D, True)  # [M, D]
                b_do = load_rows(DO, o_do + o_m * stride_dom, m_m, Dv, BLOCK_DV, True)  # [M, Dv]
                b_lse, b_delta = _row_terms(LSE + o_row, DELTA + o_row, o_m, m_m)
                last_row = tl.minimum(start_m + BLOCK_M, Lq) - 1
                begin, full_begin, full_end, end = key_tiles(start_m, last_row, sample, BLOCK_N)
                for start_n in range(tl.maximum(begin, begin_n), tl.minimum(end, end_n), BLOCK_N):
                    o_n = start_n + tl.arange(0, BLOCK_N)
                    m_n = (o_n >= start) & (o_n < length)
                    b_k = load_rows(K, o_k + o_n * stride_kn, m_n, D, BLOCK_D, True)  # [N, D]
                    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, N]
                    b_s, unit, b_slope = scores(b_s, o_m[:, None], o_n[None, :], start_n, h, slope, sample, True)
                    b_v = load_rows(V, o_v + o_n * stride_vn, m_n, Dv, BLOCK_DV, True)  # [N, Dv]
                    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [M, N]
                    m_kept = True
                    if SEED is not None:
                        m_kept = philox_kept(o_m[:, None], h, start_n, sample, BLOCK_M, BLOCK_N)
                    b_p, b_ds = _score_gradients(
                        b_s, unit, b_dp, b_lse[:, None], b_delta[:, None], m_kept, keep_scale, sample
                    )
                    b_dmask += b_ds

    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None], i_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if SUM_ROWS:
        b_dmask, o_m = tl.sum(b_dmask, 0)[None, :], tl.arange(0, 1)[:, None]
    if SUM_KEYS:
        b_dmask, o_n = tl.sum(b_dmask, 1)[:, None], tl.arange(0, 1)[None, :]
    p_dmask = DMASK + (i_rest * mask_Lq + o_m) * mask_Lk.to(tl.int64) + o_n
    tl.store(p_dmask, b_dmask.to(DMASK.dtype.element_ty), mask=(o_m < mask_Lq) & (o_n < mask_Lk))


# ---- launchers ----------------------------------------------------------------------------------------------


def preprocess(out, lse, grad_out, grad_lse, delta):
    """The launch that fills ``delta``, of the shape and strides of ``lse``."""
    packed = out.dim() == 3
    B, Lq = (1, out.shape[0]) if packed else (out.shape[0], out.shape[2])
    Hq, v_head_dim = out.shape[1], out.shape[-1]
    arguments = {
        **strides("o", out, "bhm"),
        **strides("do", grad_out, "bhm"),
        **lse_strides(lse),
        "OUT": out,
        "DO": grad_out,
        "DLSE": grad_lse,
        "DELTA": delta,
        "Hq": Hq,
        "Lq": Lq,
        "Dv": v_head_dim,
        "BLOCK_DV": block_dim(v_head_dim),
    }
    programs = B * Hq * cdiv(Lq, PREPROCESS_TILES.BLOCK_M)
    return Launch(_attention_bwd_preprocess_kernel, programs, arguments, PREPROCESS_TILES)


def _arguments(spec, t, lse, grad_out, delta, precision):
    return {
        **common_arguments(spec, t, lse),
        **strides("do", grad_out, "bhm"),
        "DO": grad_out,
        "LSE": lse,
        "DELTA": delta,
        "PRECISION": precision,
    }


def dkdv(spec, t, lse, grad_out, delta, grad_key, grad_value, tiles, precision):
    """The launch that fills ``grad_key`` and ``grad_value``."""
    arguments = _arguments(spec, t, lse, grad_out, delta, precision)
    tiles_per_sample, slots = slots_of(t.key, t.cu_seqlens_k, 1, tiles.BLOCK_N)
    arguments |= {
        **strides("dk", grad_key, "bhn"),
        **strides("dv", grad_value, "bhn"),
        "DK": grad_key,
        "DV": grad_value,
        "tiles": tiles_per_sample,
        "slots": slots,
        "grad_scale": abs(spec.scale),  # the query has its sign
    }
    return Launch(_attention_bwd_dkdv_kernel, slots * t.key.shape[1], arguments, tiles)


def dq(spec, t, lse, grad_out, delta, grad_query, tiles, precision):
    """The launch that fills ``grad_query``."""
    arguments = _arguments(spec, t, lse, grad_out, delta, precision)
    tiles_per_sample, slots = slots_of(t.query, t.cu_seqlens_q, 1, tiles.BLOCK_M)
    arguments |= {
        **strides("dq", grad_query, "bhm"),
        "DQ": grad_query,
        "tiles": tiles_per_sample,
        "slots": slots,
        "grad_scale": spec.scale,
    }
    return Launch(_attention_bwd_dq_kernel, slots * t.query.shape[1], arguments, tiles)


def dmask(spec, t, lse, grad_out, delta, grad_mask, tiles, precision):
    """The launch that fills ``grad_mask``, contiguous and of the mask's shape."""
    sizes = (1,) * (4 - grad_mask.dim()) + tuple(grad_mask.shape)
    sum_rows, sum_keys = sizes[2] != t.query.shape[2], sizes[3] != t.key.shape[2]
    arguments = _arguments(spec, t, lse, grad_out, delta, precision)
    arguments |= dict(zip(("mask_B", "mask_H", "mask_Lq", "mask_Lk"), sizes, strict=True))
    arguments |= {"DMASK": grad_mask, "SUM_ROWS": sum_rows, "SUM_KEYS": sum_keys}
    programs = sizes[0] * sizes[1] * cdiv(sizes[2], tiles.BLOCK_M) * cdiv(sizes[3], tiles.BLOCK_N)
    return Launch(_attention_bwd_dmask_kernel, programs, arguments, tiles)
