// Adds up what attention_fwd.cuh found in each part of the keys (Dao et al. 2023, "Flash-Decoding for long-context
// inference"): out = sum_s exp(lse_s - lse) out_s. Here the sink comes in, once.
//
// A block has one row, each of its 4 warps every fourth part, each thread every 32nd column; BLOCK_DV columns in all.
// Four parts of a warp are loaded before the first is added: one after the other they would take a trip to memory each.
// Shared memory: [4 warps] of [BLOCK_DV] columns and a sum.
#include "tile.cuh"

constexpr int COLS = BLOCK_DV / 32, WARPS = THREADS / 32, AT_ONCE = 4;

KERNEL(attention_combine) {
  const int i_row = prim::block(), i_head = i_row / p.Lq;
  const int warp = prim::thread() / 32;
  const int i_b = i_head / p.Hq, i_h = i_head % p.Hq, i_m = i_row % p.Lq;
  float top = p.sinks ? load_float(p.sinks, i_h, p.sinks_type) : -INFINITY;
  const float sink = top;
  for (int split = lane(); split < p.num_splits; split += 32)
    top = fmaxf(top, p.partial_lse[split * p.num_rows + i_row]);
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) top = fmaxf(top, prim::shuffle_xor(top, mask));
  const float base = top == -INFINITY ? 0 : top;

  float out[COLS] = {}, sum = 0;
  for (int first = warp; first < p.num_splits; first += WARPS * AT_ONCE) {
    float weights[AT_ONCE], parts[AT_ONCE][COLS];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int split = first + j * WARPS;
      const float lse = split < p.num_splits ? p.partial_lse[split * p.num_rows + i_row] : -INFINITY;
      weights[j] = lse == -INFINITY ? 0 : prim::exp2((lse - base) * LOG2E);
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const float* part = p.partial_out + ((first + j * WARPS) * p.num_rows + i_row) * p.Dv;
#pragma unroll
      for (int i = 0; i < COLS; ++i) {  // a part without keys has written no out
        const int column = i * 32 + lane();
        parts[j][i] = weights[j] != 0 && column < p.Dv ? part[column] : 0;
      }
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      sum += weights[j];
#pragma unroll
      for (int i = 0; i < COLS; ++i) out[i] += weights[j] * parts[j][i];
    }
  }
  const uint32_t shared = prim::shared_base(), mine = shared + warp * (BLOCK_DV + 1) * 4;
#pragma unroll
  for (int i = 0; i < COLS; ++i) prim::store_shared(mine + (i * 32 + lane()) * 4, out[i]);
  if (lane() == 0) prim::store_shared(mine + BLOCK_DV * 4, sum);
  prim::sync();
  if (warp > 0) return;

  sum = p.sinks ? prim::exp2((sink - base) * LOG2E) : 0;
#pragma unroll
  for (int i = 0; i < COLS; ++i) out[i] = 0;
  for (int other = 0; other < WARPS; ++other) {
    const uint32_t theirs = shared + other * (BLOCK_DV + 1) * 4;
    sum += prim::load_shared(theirs + BLOCK_DV * 4);
#pragma unroll
    for (int i = 0; i < COLS; ++i) out[i] += prim::load_shared(theirs + (i * 32 + lane()) * 4);
  }
  if (lane() == 0) p.lse[i_row] = base + prim::log2(sum) * LN2;
  uint16_t* to = p.out + i_b * p.out_b + i_h * p.out_h + i_m * p.out_l;
#pragma unroll
  for (int i = 0; i < COLS; ++i)
    if (i * 32 + lane() < p.Dv) to[i * 32 + lane()] = uint16_t(prim::pack(sum == 0 ? 0 : out[i] / sum, 0, BF16));
}
