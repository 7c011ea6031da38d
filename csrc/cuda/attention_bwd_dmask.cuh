// The gradient of a float mask for sm_80 and later. A block owns BLOCK_M x BLOCK_N elements of the mask and sums over
// all that they are broadcast to, in one order: samples, heads, tiles of rows, tiles of keys.
//
//   tiles and warps: 64 rows x 32 keys, 4 warps of 16 rows; 16 keys for more than 128 columns
//
//   shared memory: query [BLOCK_M, D], grad_out [BLOCK_M, Dv], lse, delta, key [BLOCK_N, D], value [BLOCK_N, Dv]; in
//   the end sums [BLOCK_M, BLOCK_N] in float
//
// It is two products a tile and no sum of products: time goes to memory, and copies are waited for at once.
#include "gradient.cuh"

constexpr int MT = BLOCK_M / WARPS_M / 16, NT = BLOCK_N / 8;
static_assert(MT * 16 * WARPS_M == BLOCK_M && WARPS_N == 1 && NT % 2 == 0, "tiles and warps");

// Of one dimension: [begin, end) of what a block goes over, all of it where the mask has one element.
struct Span {
  int begin, end;

  DEV Span(int mask_size, int size, int i, int block) : begin(i * block), end((i + 1) * block) {
    if (mask_size != size) begin = 0, end = size;
  }
};

KERNEL(attention_bwd_dmask) {
  const int tiles_n = (p.mask_Lk + BLOCK_N - 1) / BLOCK_N, tiles_m = (p.mask_Lq + BLOCK_M - 1) / BLOCK_M;
  const int i_n = prim::block() % tiles_n, i_m = prim::block() / tiles_n % tiles_m;
  const int64_t i_head = prim::block() / tiles_n / tiles_m;
  const Span samples(p.mask_B, p.B, int(i_head / p.mask_H), 1), heads(p.mask_H, p.Hq, int(i_head % p.mask_H), 1);
  const Span rows(p.mask_Lq, p.Lq, i_m, BLOCK_M), keys(p.mask_Lk, p.Lk, i_n, BLOCK_N);

  const SharedTile<BLOCK_M, BLOCK_D> query{prim::shared_base()};
  const SharedTile<BLOCK_M, BLOCK_DV> grad_out{query.base + query.BYTES};
  const RowTerms terms{grad_out.base + grad_out.BYTES};
  const SharedTile<BLOCK_N, BLOCK_D> key{terms.base + terms.BYTES};
  const SharedTile<BLOCK_N, BLOCK_DV> value{key.base + key.BYTES};
  const Dropout dropout(p);
  const float unit = unit_of(p);
  const int warp_row = warp_m() * MT * 16;
  Fragment<MT, NT> sum;
  sum.fill(0);

  for (int b = samples.begin; b < samples.end; ++b) {
    const Sample s(p, b);
    for (int i_h = heads.begin; i_h < heads.end; ++i_h) {
      const int i_kh = i_h / (p.Hq / p.Hkv);
      const float slope = slope_of(p, b, i_h);
      const QueryRows query_row(s, i_h, p.query_b, p.query_h, p.query_l);
      const QueryRows grad_row(s, i_h, p.grad_out_b, p.grad_out_h, p.grad_out_l);
      const KeyRows key_row(p, s, i_kh, p.key_b, p.key_h, p.key_l);
      const KeyRows value_row(p, s, i_kh, p.value_b, p.value_h, p.value_l);
      for (int first_row = rows.begin; first_row < rows.end; first_row += BLOCK_M) {
        const Tiles tiles = key_tiles(s, first_row, smaller(first_row + BLOCK_M, s.Lq) - 1);
        const int begin = larger(tiles.begin, keys.begin), end = smaller(tiles.end, keys.end);
        for (int first_key = begin; first_key < end; first_key += BLOCK_N) {
          prim::sync();  // nobody needs the tiles before
          if (first_key == begin) {
            load_tile(query, p.query, p.D, [&](int r) { return query_row(first_row + r); });
            load_tile(grad_out, p.grad_out, p.Dv, [&](int r) { return grad_row(first_row + r); });
            terms.load(p, s, i_h, first_row);
          }
          load_tile(key, p.key, p.D, [&](int n) { return key_row(first_key + n); });
          load_tile(value, p.value, p.Dv, [&](int n) { return value_row(first_key + n); });
          prim::copy_commit();
          prim::copy_wait<0>();
          prim::sync();

          Fragment<MT, NT> scores, grad;
          multiply_rows(scores, query, warp_row, key, 0);
          multiply_rows(grad, grad_out, warp_row, value, 0);
#pragma unroll
          for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int r = warp_row + fragment_row(m, 2 * half), row = first_row + r;
              const Range range = s.key_range(row);
              const float lse = terms.lse(r), delta = terms.delta(r);
              uint32_t kept = 0;
#pragma unroll
              for (int n = 0; n < NT; ++n) {
                if (DROPOUT && n % 4 == 0) kept = dropout.kept(b, i_h, row, first_key / 8 + n + lane() % 4);
                const uint32_t bits = DROPOUT ? prim::shuffle(kept, lane() / 4 * 4 + n % 4) >> lane() % 4 * 2 : 3;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                  const int i = 2 * half + e, k = first_key + fragment_col(n, e);
                  Score score = score_of(p, s, scores.x[m][n][i], row, k, first_key, i_h, slope);
                  if (k < range.lo || k >= range.hi) score.value = -INFINITY;
                  sum.x[m][n][i] += gradient_of(p, score, unit, grad.x[m][n][i], lse, delta, bits >> e & 1).biased;
                }
              }
            }
        }
      }
    }
  }

  // Where the mask has one row or one key, a thread sums over the tile's.
  const uint32_t sums = query.base;
  prim::sync();
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        prim::store_shared(sums + ((warp_row + fragment_row(m, i)) * BLOCK_N + fragment_col(n, i)) * 4, sum.x[m][n][i]);
  prim::sync();
  const int num_rows = p.mask_Lq == p.Lq ? BLOCK_M : 1, num_keys = p.mask_Lk == p.Lk ? BLOCK_N : 1;
  for (int i = prim::thread(); i < num_rows * num_keys; i += THREADS) {
    const int row = i / num_keys, k = i % num_keys, mask_row = i_m * BLOCK_M + row, mask_key = i_n * BLOCK_N + k;
    if (mask_row >= p.mask_Lq || mask_key >= p.mask_Lk) continue;
    float x = 0;
    for (int r = row; r < BLOCK_M; r += num_rows)
      for (int n = k; n < BLOCK_N; n += num_keys) x += prim::load_shared(sums + (r * BLOCK_N + n) * 4);
    const int64_t to = (i_head * p.mask_Lq + mask_row) * p.mask_Lk + mask_key;
    if (MASK == 3)
      static_cast<float*>(p.grad_mask)[to] = x;
    else
      static_cast<uint16_t*>(p.grad_mask)[to] = uint16_t(prim::pack(x, 0, BF16));
  }
}
