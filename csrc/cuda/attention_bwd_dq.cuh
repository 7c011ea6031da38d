// The gradient of the query for sm_80 and later. A block owns BLOCK_M rows of one sample and head and goes over the
// keys that they see, as in the forward.
//
//   tiles and warps (pyattn/backends/cuda/kernels.py)        registers of a thread for dQ, S, dP
//     D    64   128 rows x 64 keys, 4 warps of 32 rows        64 + 64 + 64
//     D    96   128 rows x 32 keys, 4 warps of 32 rows        96 + 32 + 32
//     D   128   128 rows x 32 keys, 8 warps of 16 rows        64 + 16 + 16
//     D   192    64 rows x 32 keys, 4 warps of 16 rows        96 + 16 + 16
//     D   256    64 rows x 16 keys, 4 warps of 16 rows       128 +  8 +  8
//
//   shared memory: query [BLOCK_M, D], grad_out [BLOCK_M, Dv], lse, delta; two of key [BLOCK_N, D], value [BLOCK_N, Dv]
//
// S = Q K^T, dP = dO V^T, dQ += dS K: a warp has its own rows, and dS never leaves its registers. While a tile of keys
// is worked on the next one is copied.
#include "gradient.cuh"

constexpr int MT = BLOCK_M / WARPS_M / 16, NT = BLOCK_N / 8, DT = BLOCK_D / 8;
static_assert(MT * 16 * WARPS_M == BLOCK_M && WARPS_N == 1 && NT % 2 == 0, "tiles and warps");

// A tile of keys and values: one of two.
struct Stage {
  SharedTile<BLOCK_N, BLOCK_D> key;
  SharedTile<BLOCK_N, BLOCK_DV> value;
  static constexpr int BYTES = BLOCK_N * (BLOCK_D + BLOCK_DV) * 2;

  DEV explicit Stage(uint32_t base) : key{base}, value{key.base + key.BYTES} {}

  DEV void load(const Params& p, const KeyRows& key_row, const KeyRows& value_row, int first_key) const {
    load_tile(key, p.key, p.D, [&](int n) { return key_row(first_key + n); });
    load_tile(value, p.value, p.Dv, [&](int n) { return value_row(first_key + n); });
  }
};

KERNEL(attention_bwd_dq) {
  // The block: a tile of rows of one sample and head.
  const int i_h = prim::block() / p.slots, i_kh = i_h / (p.Hq / p.Hkv);
  const Place place = tile_of(p, prim::block() % p.slots, p.cu_seqlens_q, p.total_q, 1, BLOCK_M);
  const Sample s(p, place.b);
  const int num_tiles = (s.Lq + BLOCK_M - 1) / BLOCK_M;
  if (place.tile >= num_tiles) return;
  const int first_row = (num_tiles - 1 - place.tile) * BLOCK_M, warp_row = warp_m() * MT * 16;  // as in the forward

  const SharedTile<BLOCK_M, BLOCK_D> query{prim::shared_base()};
  const SharedTile<BLOCK_M, BLOCK_DV> grad_out{query.base + query.BYTES};
  const RowTerms terms{grad_out.base + grad_out.BYTES};
  const uint32_t stages = terms.base + terms.BYTES;
  const QueryRows query_row(s, i_h, p.query_b, p.query_h, p.query_l);
  const QueryRows grad_row(s, i_h, p.grad_out_b, p.grad_out_h, p.grad_out_l);
  const KeyRows key_row(p, s, i_kh, p.key_b, p.key_h, p.key_l), value_row(p, s, i_kh, p.value_b, p.value_h, p.value_l);
  const Tiles tiles = key_tiles(s, first_row, smaller(first_row + BLOCK_M, s.Lq) - 1);

  load_tile(query, p.query, p.D, [&](int r) { return query_row(first_row + r); });
  load_tile(grad_out, p.grad_out, p.Dv, [&](int r) { return grad_row(first_row + r); });
  terms.load(p, s, i_h, first_row);
  if (tiles.begin < tiles.end) Stage(stages).load(p, key_row, value_row, tiles.begin);
  prim::copy_commit();

  Fragment<MT, DT> grad_query;
  grad_query.fill(0);
  const Dropout dropout(p);
  const float unit = unit_of(p), slope = slope_of(p, s.b, i_h);
  float lse[MT][2], delta[MT][2];

  for (int first_key = tiles.begin, i = 0; first_key < tiles.end; first_key += BLOCK_N, ++i) {
    prim::copy_wait<0>();
    prim::sync();  // this tile is there, and nobody needs the one before
    if (first_key + BLOCK_N < tiles.end)
      Stage(stages + (i + 1) % 2 * Stage::BYTES).load(p, key_row, value_row, first_key + BLOCK_N);
    prim::copy_commit();
    const Stage stage(stages + i % 2 * Stage::BYTES);
    if (i == 0) {
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          lse[m][half] = terms.lse(warp_row + fragment_row(m, 2 * half));
          delta[m][half] = terms.delta(warp_row + fragment_row(m, 2 * half));
        }
    }

    Fragment<MT, NT> scores, grad;
    multiply_rows(scores, query, warp_row, stage.key, 0);
    multiply_rows(grad, grad_out, warp_row, stage.value, 0);
    const bool needs_mask = tiles.needs_mask(first_key, BLOCK_N);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + warp_row + fragment_row(m, 2 * half);
        const Range range = s.key_range(row);
        uint32_t kept = 0;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          // Each of the four threads that share a row asks for one of four blocks of 8 keys, and tells the others.
          if (DROPOUT && n % 4 == 0) kept = dropout.kept(s.b, i_h, row, first_key / 8 + n + lane() % 4);
          const uint32_t bits = DROPOUT ? prim::shuffle(kept, lane() / 4 * 4 + n % 4) >> lane() % 4 * 2 : 3;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int k = first_key + fragment_col(n, e);
            Score score = score_of(p, s, scores.x[m][n][2 * half + e], row, k, first_key, i_h, slope);
            if (needs_mask && (k < range.lo || k >= range.hi)) score.value = -INFINITY;
            float& x = grad.x[m][n][2 * half + e];
            x = gradient_of(p, score, unit, x, lse[m][half], delta[m][half], bits >> e & 1).product;
          }
        }
      }
    multiply_add(grad_query, grad, stage.key, 0);
  }
  prim::copy_wait<0>();

  uint16_t* to = p.grad_query + s.b * p.grad_query_b + i_h * p.grad_query_h + s.first_q * p.grad_query_l;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + warp_row + fragment_row(m, 2 * half);
      if (row >= s.Lq) continue;
#pragma unroll
      for (int d = 0; d < DT; ++d)
        store_pair(to + row * p.grad_query_l, fragment_col(d, 0), p.D, grad_query.x[m][d][2 * half] * p.grad_scale,
                   grad_query.x[m][d][2 * half + 1] * p.grad_scale);
    }
}
