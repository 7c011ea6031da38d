"""The forward: online softmax over tiles of keys (FlashAttention-2, Dao 2023, arXiv:2307.08691).

One kernel serves everything. With PACK_GQA the query heads that share a key head are rows of one tile, and with SPLIT
a program sees only SPLIT of the keys and leaves a partial result: so few queries against many keys still fill a GPU
(``attention_decode``).
"""

import triton
import triton.language as tl

from pyattn.kernels.launch import NOT_SPECIALIZED, Launch, common_arguments, paged_arguments, slots_of, strides
from pyattn.kernels.tile import (
    LN2,
    LOG2E,
    Keys,
    Sample,
    count_tiles,
    key_offsets,
    key_tiles,
    load_query,
    load_rows,
    online_softmax_step,
    philox_kept,
    positions,
    scores,
    span,
    tile_of,
    tile_start,
)


@triton.jit
def _attend(
    b_acc, b_max, b_sum, b_q, n, begin, full_begin, full_end, n_left, o_m, o_h, slope, keys, sample,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The softmax goes on over ``n`` tiles of keys: those that need a mask, or those that need none."""
    for i in range(n):
        start_n = tile_start(i, begin, full_begin, full_end, n_left, BLOCK_N, MASKED)
        o_n = start_n + tl.arange(0, BLOCK_N)
        m_n = (o_n >= sample.start) & (o_n < sample.length)
        o_k, o_v = key_offsets(o_n, m_n, keys, PAGE_SIZE, MASKED)
        b_k = load_rows(keys.p_k, o_k, m_n, D, BLOCK_D, MASKED)  # [N, D]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, N]
        b_s, unit, b_slope = scores(b_s, o_m[:, None], o_n[None, :], start_n, o_h, slope, sample, MASKED)
        b_p, b_alpha, b_max, b_sum = online_softmax_step(b_s, unit, b_max, b_sum, MASKED or sample.MASK is not None)
        if sample.SEED is not None:
            b_p = tl.where(philox_kept(o_m[:, None], o_h, start_n, sample, BLOCK_M, BLOCK_N), b_p, 0.0)
        b_v = load_rows(keys.p_v, o_v, m_n, Dv, BLOCK_DV, MASKED)  # [N, Dv]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _attention_fwd_kernel(
    Q, K, V, OUT, LSE, PARTIAL_OUT, PARTIAL_LSE,
    MASK, ALIBI_SLOPES, SINKS, Q_OFFSETS, KV_LENGTHS, KV_STARTS, BLOCK_TABLE, CU_SEQLENS_Q, CU_SEQLENS_K, SEED,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qm: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_om: tl.int64,
    stride_mb: tl.int64, stride_mh: tl.int64, stride_mm: tl.int64, stride_mn: tl.int64,
    stride_tb: tl.int64, stride_tn: tl.int64, stride_ab: tl.int64, stride_lb: tl.int64, stride_lh: tl.int64,
    B, Hq, Lq, Lk, total_q, total_k, tiles, slots, num_rows: tl.int64,
    scale, sign, softcap, window_left, window_right, q_offset, num_pages, threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, PAGE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PACK_GQA: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    # The program: a tile of rows of one sample and head, and a part of the keys.
    i_slot, i_rest = tl.program_id(0) % slots, tl.program_id(0) // slots
    ROWS: tl.constexpr = GROUP if PACK_GQA else 1  # of each query
    heads = Hq // ROWS
    i_head, i_split = i_rest % heads, i_rest // heads
    i_b, i_tile = tile_of(i_slot, CU_SEQLENS_Q, B, total_q, tiles, ROWS, BLOCK_M)
    first_q, Lq = span(CU_SEQLENS_Q, i_b, Lq, total_q)
    num_tiles = tl.cdiv(Lq * ROWS, BLOCK_M)
    if i_tile >= num_tiles:
        return
    i_m = num_tiles - 1 - i_tile  # under a causal mask the last rows see most: they start first

    # Its sample.
    first_k, Lk = span(CU_SEQLENS_K, i_b, Lk, total_k)
    start, length, offset, first, last = positions(
        i_b, Lq, Lk, KV_STARTS, KV_LENGTHS, Q_OFFSETS, q_offset, window_left, window_right
    )
    sample = Sample(
        i_b, Lq, start, length, offset, first, last, scale, softcap, window_left, window_right, KV_STARTS,
        MASK, stride_mb, stride_mh, stride_mm, stride_mn, SEED, threshold,
    )  # fmt: skip

    # Its rows.
    o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_m = o_r // ROWS  # [M]
    if PACK_GQA:
        i_kh = i_head
        o_head = i_head * GROUP + o_r % GROUP  # [M]
        o_h = o_head[:, None]
    else:
        i_kh = i_head // GROUP
        o_head = i_head
        o_h = i_head
    first_row = i_m * BLOCK_M // ROWS
    last_row = tl.minimum((i_m * BLOCK_M + BLOCK_M - 1) // ROWS, Lq - 1)
    m_m = o_m < Lq
    o_q = o_head * stride_qh + (first_q + o_m) * stride_qm
    b_q = load_query(Q + i_b * stride_qb, o_q, m_m, sign, D, BLOCK_D, True)  # [M, D]
    slope = ALIBI_SLOPES
    if ALIBI_SLOPES is not None:
        slope = tl.load(ALIBI_SLOPES + i_b * stride_ab + o_h).to(tl.float32) * LOG2E

    # Its keys.
    p_table = BLOCK_TABLE
    p_k, p_v = K + i_kh * stride_kh + first_k * stride_kn, V + i_kh * stride_vh + first_k * stride_vn
    if BLOCK_TABLE is not None:
        p_table = BLOCK_TABLE + i_b * stride_tb
    else:
        p_k += i_b * stride_kb
        p_v += i_b * stride_vb
    keys = Keys(p_k, p_v, stride_kn, stride_vn, p_table, stride_tn, stride_kb, stride_vb, num_pages)
    begin, full_begin, full_end, end = key_tiles(first_row, last_row, sample, BLOCK_N)
    if SPLIT:
        lowest, highest = i_split * SPLIT, i_split * SPLIT + SPLIT
        begin, full_begin = tl.maximum(begin, lowest), tl.maximum(full_begin, lowest)
        full_end, end = tl.minimum(full_end, highest), tl.minimum(end, highest)

    # A sink is a key that takes weight and gives no value; of partial results exactly one may count it.
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    if SINKS is not None and PARTIAL_OUT is None:
        b_max = tl.load(SINKS + o_head).to(tl.float32) * LOG2E + tl.zeros([BLOCK_M], tl.float32)
        b_sum += 1.0
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    n_full, n_left, n_masked = count_tiles(begin, full_begin, full_end, end, BLOCK_N)
    b_acc, b_max, b_sum = _attend(
        b_acc, b_max, b_sum, b_q, n_full, begin, full_begin, full_end, n_left, o_m, o_h, slope, keys, sample,
        D, Dv, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PAGE_SIZE, PRECISION, False,
    )  # fmt: skip
    b_acc, b_max, b_sum = _attend(
        b_acc, b_max, b_sum, b_q, n_masked, begin, full_begin, full_end, n_left, o_m, o_h, slope, keys, sample,
        D, Dv, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PAGE_SIZE, PRECISION, True,
    )  # fmt: skip

    # What it found. A row without keys has a sum of 0.
    b_lse = (b_max + tl.log2(b_sum)) * LN2
    b_norm = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)  # one division a row, not one an element
    if SEED is not None:
        b_norm *= keep_scale
    b_acc *= b_norm[:, None]
    o_d = tl.arange(0, BLOCK_DV)
    m_out = m_m[:, None] & (o_d < Dv)[None, :]
    o_row = i_b * stride_lb + o_head * stride_lh + first_q + o_m  # [M] in int64
    if PARTIAL_OUT is None:
        tl.store(LSE + o_row, b_lse, mask=m_m)
        p_out = OUT + i_b * stride_ob + (o_head * stride_oh + (first_q + o_m) * stride_om)[:, None] + o_d[None, :]
        tl.store(p_out, b_acc.to(OUT.dtype.element_ty), mask=m_out)
    else:
        o_row += i_split * num_rows
        tl.store(PARTIAL_LSE + o_row, b_lse, mask=m_m)
        tl.store(PARTIAL_OUT + o_row[:, None] * Dv + o_d[None, :], b_acc, mask=m_out)


def forward(spec, t, out, lse, tiles, precision, pack_gqa=False, partial=None):
    """The launch that fills ``out`` and ``lse``, or ``partial``: see ``attention_decode``.

    Args:
        spec, t: the ``AttentionSpec`` and the ``AttentionTensors`` of the call; last strides are 1.
        out, lse: as the op ``pyattn::attention_forward`` returns them; lse is contiguous.
        tiles: the ``Tiles`` to use.
        precision: of float32 products, "ieee" or "tf32".
        pack_gqa: whether the heads of a group are rows of one tile.
        partial: ``(out, lse, split)``: float32 ``[splits, *lse.shape, Dv]``, ``[splits, *lse.shape]``, and how many
            keys each split has.
    """
    arguments = common_arguments(spec, t, lse)
    partial_out, partial_lse, split = partial or (None, None, 0)
    splits = 1 if partial_lse is None else partial_lse.shape[0]
    rows = arguments["GROUP"] if pack_gqa else 1
    tiles_per_sample, slots = slots_of(t.query, t.cu_seqlens_q, rows, tiles.BLOCK_M)
    programs = slots * (arguments["Hq"] // rows) * splits
    arguments |= {
        **strides("o", out, "bhm"),
        "OUT": out,
        "LSE": lse,
        "PARTIAL_OUT": partial_out,
        "PARTIAL_LSE": partial_lse,
        "tiles": tiles_per_sample,
        "slots": slots,
        "num_rows": lse.numel(),
        "PRECISION": precision,
        "PACK_GQA": pack_gqa,
        "SPLIT": split,
        **paged_arguments(t),
    }
    return Launch(_attention_fwd_kernel, programs, arguments, tiles)
