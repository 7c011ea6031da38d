// delta = rowsum(out * grad_out) - grad_lse: a row's lse shifts all of its scores' gradients alike (Dao 2023).
//
// A warp has ROWS rows, of [*lse.shape]; a thread eight columns of one, and those 8 * 32 / ROWS further on.
#include "tile.cuh"

DEV int lanes() { return 32 / ROWS; }  // of a row

// Eight elements of a row of D from `col` on; zeros past the last one.
DEV void load_eight(float (&x)[8], const uint16_t* row, int col, int D) {
  uint16_t bits[8] = {};
  if (ALIGNED) {
    const prim::Words words = prim::load_global(row + col);
#pragma unroll
    for (int i = 0; i < 8; ++i) bits[i] = uint16_t(words.w[i / 2] >> 16 * (i % 2));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (col + i < D) bits[i] = row[col + i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = prim::to_float(bits[i], BF16);
}

KERNEL(attention_bwd_preprocess) {
  const int warp = prim::block() * (THREADS / 32) + prim::thread() / 32;
  const int64_t i_row = int64_t(warp) * ROWS + lane() / lanes(), i_head = i_row / p.Lq;
  float sum = 0;
  if (i_row < p.num_rows) {
    const int64_t i_b = i_head / p.Hq, i_h = i_head % p.Hq, i_m = i_row % p.Lq;
    const uint16_t* out = p.out + i_b * p.out_b + i_h * p.out_h + i_m * p.out_l;
    const uint16_t* grad_out = p.grad_out + i_b * p.grad_out_b + i_h * p.grad_out_h + i_m * p.grad_out_l;
    for (int col = lane() % lanes() * 8; col < p.Dv; col += lanes() * 8) {
      float x[8], y[8];
      load_eight(x, out, col, p.Dv), load_eight(y, grad_out, col, p.Dv);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += x[i] * y[i];
    }
  }
#pragma unroll
  for (int mask = 1; mask < lanes(); mask *= 2) sum += prim::shuffle_xor(sum, mask);
  if (i_row < p.num_rows && lane() % lanes() == 0) p.delta[i_row] = sum - (p.grad_lse ? p.grad_lse[i_row] : 0);
}
