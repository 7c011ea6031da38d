// Online softmax over tiles of scores (Milakov and Gimelshein 2018, arXiv:1805.02867), which never leave registers:
// what the forward kernels share.
#pragma once
#include "tile.cuh"

// A thread's two rows of each piece of 16, and what is known of them.
template <int MT>
struct Rows {
  int row[MT][2], head[MT][2];
  float slope[MT][2];
  float max[MT][2];  // of scores times log2(e)
  float sum[MT][2];  // this thread's part

  // A sink is a key that takes weight and gives no value; of partial results exactly one may count it.
  DEV void begin(const Params& p, const Sample& s, int m, int half, int row_, int head_, bool counts_sink) {
    row[m][half] = row_, head[m][half] = head_;
    slope[m][half] = slope_of(p, s.b, head_);
    max[m][half] = -INFINITY, sum[m][half] = 0;
    if (p.sinks && counts_sink) {
      max[m][half] = load_float(p.sinks, head_, p.sinks_type) * LOG2E;
      sum[m][half] = lane() % 4 == 0;
    }
  }

  // The sum over the whole row, of which four threads have a part; 0 where a row has no keys.
  DEV float total(int m, int half) const {
    float all = sum[m][half];
    all += prim::shuffle_xor(all, 1);
    return all + prim::shuffle_xor(all, 2);
  }
};

// Products of queries and the keys from `warp_key` on, of the tile at `first_key`, become scores: -inf where a row does
// not see a key.
template <int MT, int NT>
DEV void finish_scores(Fragment<MT, NT>& scores, const Params& p, const Sample& s, const Tiles& tiles,
                       const Rows<MT>& rows, int first_key, int warp_key) {
  if (!folds() || MASK) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          scores.x[m][n][i] = score_of(p, s, scores.x[m][n][i], rows.row[m][i / 2], warp_key + fragment_col(n, i),
                                       first_key, rows.head[m][i / 2], rows.slope[m][i / 2])
                                  .value;
  }
  if (!tiles.needs_mask(first_key, BLOCK_N)) return;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Range range = s.key_range(rows.row[m][half]);
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const int k = warp_key + fragment_col(n, i);
          if (k < range.lo || k >= range.hi) scores.x[m][n][i] = -INFINITY;
        }
    }
}

// Weights of one more tile, in place of scores; `shrink` is what earlier sums are to be multiplied by. A row that has
// seen no live key yet has a maximum of -inf, and sums of 0.
template <int MT, int NT>
DEV void online_softmax_step(Fragment<MT, NT>& s, Rows<MT>& rows, float unit, float (&shrink)[MT][2]) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < NT; ++n) top = fmaxf(top, fmaxf(s.x[m][n][2 * half], s.x[m][n][2 * half + 1]));
      top = fmaxf(top, prim::shuffle_xor(top, 1));
      top = fmaxf(top, prim::shuffle_xor(top, 2));
      const float old_max = rows.max[m][half], new_max = fmaxf(old_max, top * unit);
      const float base = new_max == -INFINITY ? 0 : new_max, alpha = prim::exp2(old_max - base);
      float sum = 0;
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s.x[m][n][i] = prim::exp2(s.x[m][n][i] * unit - base);
          sum += s.x[m][n][i];
        }
      rows.max[m][half] = new_max;
      rows.sum[m][half] = rows.sum[m][half] * alpha + sum;
      shrink[m][half] = alpha;
    }
}

template <int MT, int DT>
DEV void rescale(Fragment<MT, DT>& out, const float (&shrink)[MT][2]) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int d = 0; d < DT; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) out.x[m][d][i] *= shrink[m][i / 2];
}
