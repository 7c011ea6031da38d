// What the kernels of the backward share: rows, their terms, and the gradient of a score.
#pragma once
#include "tile.cuh"

// Where the rows of one sample and query head lie.
struct QueryRows {
  const Sample& s;
  int64_t begin, stride;

  DEV QueryRows(const Sample& s, int i_h, int64_t stride_b, int64_t stride_h, int64_t stride_l)
      : s(s), begin(s.b * stride_b + i_h * stride_h + s.first_q * stride_l), stride(stride_l) {}

  // Of row i, or -1 if there is none.
  DEV int64_t operator()(int i) const { return i < s.Lq ? begin + i * stride : -1; }
};

// lse times log2(e); that of a row without keys is inf, so its weights are 0.
DEV float lse_term(float lse) { return lse == -INFINITY ? INFINITY : lse * LOG2E; }

// lse and delta of BLOCK_M rows in shared memory; 0 past the last row, where query and grad_out are 0, too.
struct RowTerms {
  static constexpr int BYTES = 2 * BLOCK_M * 4;
  uint32_t base;

  DEV void load(const Params& p, const Sample& s, int i_h, int first_row) const {
    const int64_t begin = s.b * p.lse_b + i_h * p.lse_h + s.first_q;
    for (int i = prim::thread(); i < 2 * BLOCK_M; i += THREADS) {
      const int row = first_row + i % BLOCK_M;
      const float* terms = i < BLOCK_M ? p.lse : p.delta;
      prim::copy_async_word(base + i * 4, row < s.Lq ? terms + begin + row : terms, row < s.Lq ? 4 : 0);
    }
  }

  DEV float lse(int i) const { return lse_term(prim::load_shared(base + i * 4)); }
  DEV float delta(int i) const { return prim::load_shared(base + (BLOCK_M + i) * 4); }
};

struct Gradient {
  float weight;   // as dropout leaves it, but for keep_scale
  float biased;   // of the score with its bias
  float product;  // of the product of query and key, but for the scale
};

// exp2(x) of a score less its row's lse. Where that is so large that its rounding counts, a weight must not come out
// beyond 1; NaN stays.
DEV float weight_of(float x) { return prim::exp2(x > 0 ? 0 : x); }

// p = exp(s - lse), ds = p (dp - delta), from the products query * key and grad_out * value.
DEV Gradient gradient_of(const Params& p, const Score& score, float unit, float grad, float lse, float delta,
                         bool kept) {
  const float weight = weight_of(score.value * unit - lse);
  if (DROPOUT) grad = kept ? grad * p.keep_scale : 0;
  const float biased = weight * (grad - delta);
  return {DROPOUT && !kept ? 0 : weight, biased, biased * score.derivative};
}
