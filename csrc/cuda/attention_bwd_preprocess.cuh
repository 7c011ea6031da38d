// delta = rowsum(out * grad_out) - grad_lse: a row's lse shifts all of its scores' gradients alike (Dao 2023).
//
// A warp has a row, of [*lse.shape]; a thread every 32nd column.
#include "tile.cuh"

KERNEL(attention_bwd_preprocess) {
  const int64_t i_row = prim::block() * (THREADS / 32) + prim::thread() / 32, i_head = i_row / p.Lq;
  if (i_row >= p.num_rows) return;
  const int64_t i_b = i_head / p.Hq, i_h = i_head % p.Hq, i_m = i_row % p.Lq;
  const uint16_t* out = p.out + i_b * p.out_b + i_h * p.out_h + i_m * p.out_l;
  const uint16_t* grad_out = p.grad_out + i_b * p.grad_out_b + i_h * p.grad_out_h + i_m * p.grad_out_l;
  float sum = 0;
  for (int col = lane(); col < p.Dv; col += 32)
    sum += prim::to_float(out[col], BF16) * prim::to_float(grad_out[col], BF16);
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) sum += prim::shuffle_xor(sum, mask);
  if (lane() == 0) p.delta[i_row] = sum - (p.grad_lse ? p.grad_lse[i_row] : 0);
}
