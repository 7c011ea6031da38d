"""Few queries against many keys: the keys are split over programs, and the parts combined (Dao et al. 2023,
"Flash-Decoding for long-context inference").

The split is the forward kernel's, with the heads of a group as rows of one tile. Each part has a fixed number of
keys, counted from key 0, so a sample's bits depend neither on its batch nor on the size of the GPU.
"""

import torch
import triton
import triton.language as tl

from pyattn.kernels import attention_fwd
from pyattn.kernels.launch import NOT_SPECIALIZED, Launch, Tiles, block_dim, cdiv, strides
from pyattn.kernels.tile import LN2, LOG2E

COMBINE_TILES = Tiles(BLOCK_M=1, BLOCK_N=16, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _attention_combine_kernel(
    PARTIAL_OUT, PARTIAL_LSE, SINKS, OUT, LSE,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_om: tl.int64, Hq, Lq, num_rows: tl.int64, num_splits,
    Dv: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row: ``out = sum_s exp(lse_s - lse) out_s``, BLOCK_N parts at once. Here the sink comes in, once."""
    i_row = tl.program_id(0)
    i_m, i_head = i_row % Lq, i_row // Lq
    i_b, i_h = i_head // Hq, i_head % Hq
    b_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for first in range(0, num_splits, BLOCK_N):
        o_s = first + tl.arange(0, BLOCK_N)
        p_lse = PARTIAL_LSE + o_s * num_rows + i_row
        b_max = tl.maximum(b_max, tl.load(p_lse, mask=o_s < num_splits, other=float("-inf")))
    top = tl.max(b_max, 0)
    if SINKS is not None:
        sink = tl.load(SINKS + i_h).to(tl.float32)
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)

    o_d = tl.arange(0, BLOCK_DV)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    b_acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(0, num_splits, BLOCK_N):
        o_s = first + tl.arange(0, BLOCK_N)
        b_lse = tl.load(PARTIAL_LSE + o_s * num_rows + i_row, mask=o_s < num_splits, other=float("-inf"))
        b_weight = tl.exp2((b_lse - base) * LOG2E)
        b_sum += b_weight
        p_out = PARTIAL_OUT + ((o_s * num_rows + i_row) * Dv)[:, None] + o_d[None, :]
        m_out = (b_lse > float("-inf"))[:, None] & (o_d < Dv)[None, :]  # a part without keys has written no out
        b_acc += tl.sum(b_weight[:, None] * tl.load(p_out, mask=m_out, other=0.0), 0)
    total = tl.sum(b_sum, 0)
    if SINKS is not None:
        total += tl.exp2((sink - base) * LOG2E)
    tl.store(LSE + i_row, base + tl.log2(total) * LN2)
    p_out = OUT + i_b * stride_ob + i_h * stride_oh + i_m * stride_om + o_d
    b_out = b_acc / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out, b_out.to(OUT.dtype.element_ty), mask=o_d < Dv)


def decode(spec, t, out, lse, max_keys, tiles, precision):
    """The launches that fill ``out`` and ``lse``; no sample has more than ``max_keys`` keys."""
    num_splits = cdiv(max_keys, tiles.SPLIT)
    if num_splits <= 1:
        return [attention_fwd.forward(spec, t, out, lse, tiles, precision, pack_gqa=True)]
    partial_lse = torch.empty((num_splits, *lse.shape), dtype=torch.float32, device=lse.device)
    partial_out = torch.empty((*partial_lse.shape, out.shape[-1]), dtype=torch.float32, device=lse.device)
    partial = (partial_out, partial_lse, tiles.SPLIT)
    arguments = {
        **strides("o", out, "bhm"),
        "PARTIAL_OUT": partial_out,
        "PARTIAL_LSE": partial_lse,
        "SINKS": t.sinks,
        "OUT": out,
        "LSE": lse,
        "Hq": out.shape[1],
        "Lq": lse.shape[-1],
        "num_rows": lse.numel(),
        "num_splits": num_splits,
        "Dv": out.shape[-1],
        "BLOCK_DV": block_dim(out.shape[-1]),
    }
    return [
        attention_fwd.forward(spec, t, out, lse, tiles, precision, pack_gqa=True, partial=partial),
        Launch(_attention_combine_kernel, lse.numel(), arguments, COMBINE_TILES),
    ]
