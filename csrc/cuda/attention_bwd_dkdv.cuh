// The gradients of keys and values for sm_80 and later. A block owns BLOCK_N keys of one sample and key head and goes
// over the rows that see them, in each query head of the group: every gradient has one owner, so there are no atomics.
//
//   tiles and warps (pyattn/backends/cuda/kernels.py)        registers of a thread for dK, dV, S, dP
//     D    64   128 keys x 64 rows, 8 warps of 16 keys        32 +  32 + 32 + 32
//     D    96   128 keys x 64 rows, 8 warps of 16 keys        48 +  48 + 32 + 32
//     D   128   128 keys x 32 rows, 8 warps of 16 keys        64 +  64 + 16 + 16
//     D   192    64 keys x 16 rows, 4 warps of 16 keys        96 +  96 +  8 +  8
//     D   256    64 keys x 16 rows, 4 warps of 16 keys       128 or 128 + 8 + 8: in two passes, see GRADIENTS
//
//   shared memory: key [BLOCK_N, D], value [BLOCK_N, Dv]; two of each: query [BLOCK_M, D], grad_out [BLOCK_M, Dv], lse
//                  and delta; with UNORDERED dS^T [BLOCK_N, BLOCK_M]
//
// Tiles are transposed: a warp has its own keys as the rows of S^T = K Q^T and dP^T = V dO^T, and so P^T and dS^T are
// left operands of dV += P^T dO and dK += dS^T Q as they are, in registers. While a tile of rows is worked on the next
// one is copied; one `sync` a tile says that it is there, and that the one before is no longer needed.
// With UNORDERED the gradient of the query is summed here as well, in float and by atomics, in whatever order blocks
// come: five products instead of seven, and results whose last bits vary. dS^T goes through shared memory, since dQ =
// dS K sums over the keys of all warps; a warp then has 16 rows of dQ, and some of its columns.
#include "gradient.cuh"

// GRADIENTS: 1 of values, 2 of keys, 3 of both.
constexpr int WARP_KEYS = BLOCK_N / WARPS_N, MT = WARP_KEYS / 16;  // keys of a warp, and pieces of 16 of them
constexpr int NT = BLOCK_M / 8, DT = BLOCK_D / 8, DVT = BLOCK_DV / 8;
static_assert(MT * 16 * WARPS_N == BLOCK_N && WARPS_M == 1 && NT % 2 == 0, "tiles and warps");

using KeyTile = SharedTile<BLOCK_N, BLOCK_D>;
using GradTile = SharedTile<BLOCK_N, (BLOCK_M < 32 ? 32 : BLOCK_M)>;  // dS^T; a panel has no fewer columns

// A tile of rows: one of two.
struct Stage {
  SharedTile<BLOCK_M, BLOCK_D> query;
  SharedTile<BLOCK_M, BLOCK_DV> grad_out;
  RowTerms terms;
  static constexpr int BYTES = BLOCK_M * (BLOCK_D + BLOCK_DV) * 2 + RowTerms::BYTES;

  DEV explicit Stage(uint32_t base)
      : query{base}, grad_out{query.base + query.BYTES}, terms{grad_out.base + grad_out.BYTES} {}

  DEV void load(const Params& p, const Sample& s, int i_h, int first_row) const {
    const QueryRows query_row(s, i_h, p.query_b, p.query_h, p.query_l);
    const QueryRows grad_row(s, i_h, p.grad_out_b, p.grad_out_h, p.grad_out_l);
    load_tile(query, p.query, p.D, [&](int r) { return query_row(first_row + r); });
    load_tile(grad_out, p.grad_out, p.Dv, [&](int r) { return grad_row(first_row + r); });
    terms.load(p, s, i_h, first_row);
  }
};

// Which weights of a piece of 16 keys x 16 rows dropout keeps: each thread asks for 8 keys of one row, and tells the
// others.
struct Kept {
  uint32_t bits = 0;

  DEV Kept(const Dropout& dropout, int b, int i_h, int first_row, int first_key) {
    if (DROPOUT) bits = dropout.kept(b, i_h, first_row + lane() % 16, first_key / 8 + lane() / 16);
  }
  // Element i of the first or the second 8 rows.
  DEV bool operator()(int second, int i) const {
    if (!DROPOUT) return true;
    return prim::shuffle(bits, i / 2 * 16 + second * 8 + lane() % 4 * 2 + i % 2) >> lane() / 4 & 1;
  }
};

template <int N>
DEV void store(const Fragment<MT, N>& x, float factor, const Sample& s, int first_key, uint16_t* to, int64_t stride,
               int D) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = first_key + fragment_row(m, 2 * half);
      if (key >= s.Lk) continue;
#pragma unroll
      for (int d = 0; d < N; ++d)
        store_pair(to + key * stride, fragment_col(d, 0), D, x.x[m][d][2 * half] * factor,
                   x.x[m][d][2 * half + 1] * factor);
    }
}

// dQ += dS K for a tile of rows, added to those that other blocks found.
DEV void add_grad_query(const Params& p, const Sample& s, const Fragment<MT, NT>& grad, const KeyTile& key,
                        const GradTile& grads, int i_h, int first_row) {
  // Each warp has 16 rows, and so many columns; where those are more than there are, the last warps have fewer, or
  // none.
  constexpr int ROW_GROUPS = BLOCK_M / 16, COL_GROUPS = WARPS_N / ROW_GROUPS;
  constexpr int COLS = (BLOCK_D / COL_GROUPS + 15) / 16 * 16;
  static_assert(COL_GROUPS * ROW_GROUPS == WARPS_N, "rows and columns of a warp");
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        prim::store_shared(
            grads.cursor(warp_n() * WARP_KEYS + fragment_row(m, 2 * half), n * 8).at(0, 0) + lane() % 4 * 4,
            prim::pack(grad.x[m][n][2 * half], grad.x[m][n][2 * half + 1], BF16));
  prim::sync();
  const uint32_t l = lane(), row = warp_n() % ROW_GROUPS * 16, first_col = warp_n() / ROW_GROUPS * COLS;
  const auto from_grads = grads.cursor(l % 8 + l / 16 * 8, row + l / 8 % 2 * 8);
  const auto from_key = key.cursor(l % 16, l / 16 * 8);
  Fragment<1, COLS / 8> sum;
  sum.fill(0);
#pragma unroll
  for (int k = 0; k < BLOCK_N; k += 16) {
    uint32_t left[4], right[4];
    prim::load_matrices_transposed(left, from_grads.at(k, 0));
#pragma unroll
    for (int n = 0; n < COLS / 8; n += 2) {
      if (COLS * COL_GROUPS > BLOCK_D && int(first_col) + n * 8 >= BLOCK_D) break;
      prim::load_matrices_transposed(right, from_key.at(k, first_col + n * 8));
      prim::multiply(sum.x[0][n], left, right[0], right[1], BF16);
      prim::multiply(sum.x[0][n + 1], left, right[2], right[3], BF16);
    }
  }
  const int64_t begin = s.b * p.lse_b + i_h * p.lse_h + s.first_q + first_row + row;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = fragment_row(0, i);
    if (first_row + int(row) + r >= s.Lq) continue;
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n) {
      const int col = first_col + fragment_col(n, i);
      if (col < p.D) prim::atomic_add(p.query_sums + (begin + r) * p.D + col, sum.x[0][n][i] * p.grad_scale);
    }
  }
}

KERNEL(attention_bwd_dkdv) {
  // The block: a tile of keys of one sample and key head.
  const int i_kh = prim::block() / p.slots, group = p.Hq / p.Hkv;
  const Place place = tile_of(p, prim::block() % p.slots, p.cu_seqlens_k, p.total_k, 1, BLOCK_N);
  const Sample s(p, place.b);
  const int first_key = place.tile * BLOCK_N, warp_key = first_key + warp_n() * WARP_KEYS;
  if (first_key >= s.Lk) return;

  const KeyTile key{prim::shared_base()};
  const SharedTile<BLOCK_N, BLOCK_DV> value{key.base + key.BYTES};
  const uint32_t stages = value.base + value.BYTES;
  const GradTile grads{stages + 2 * Stage::BYTES};
  const KeyRows key_row(p, s, i_kh, p.key_b, p.key_h, p.key_l), value_row(p, s, i_kh, p.value_b, p.value_h, p.value_l);
  const Tiles tiles = query_tiles(s, first_key);
  const int per_head = tiles.begin < tiles.end ? (tiles.end - tiles.begin + BLOCK_M - 1) / BLOCK_M : 0;
  const int num_tiles = per_head * group;

  load_tile(key, p.key, p.D, [&](int n) { return key_row(first_key + n); });
  load_tile(value, p.value, p.Dv, [&](int n) { return value_row(first_key + n); });
  if (num_tiles) Stage(stages).load(p, s, i_kh * group, tiles.begin);
  prim::copy_commit();

  Fragment<MT, DT> grad_key;
  Fragment<MT, DVT> grad_value;
  grad_key.fill(0), grad_value.fill(0);
  const Dropout dropout(p);
  const float unit = unit_of(p);

  for (int i = 0; i < num_tiles; ++i) {
    const int i_h = i_kh * group + i / per_head, first_row = tiles.begin + i % per_head * BLOCK_M;
    prim::copy_wait<0>();
    prim::sync();  // this tile is there, and nobody needs the one before
    if (i + 1 < num_tiles)
      Stage(stages + (i + 1) % 2 * Stage::BYTES)
          .load(p, s, i_kh * group + (i + 1) / per_head, tiles.begin + (i + 1) % per_head * BLOCK_M);
    prim::copy_commit();
    const Stage stage(stages + i % 2 * Stage::BYTES);
    const float slope = slope_of(p, s.b, i_h);
    const bool needs_mask = tiles.needs_mask(first_row, BLOCK_M);

    Fragment<MT, NT> weight, grad;  // [keys, rows]
    multiply_rows(weight, key, warp_n() * WARP_KEYS, stage.query, 0);
    if (GRADIENTS & 2)
      multiply_rows(grad, value, warp_n() * WARP_KEYS, stage.grad_out, 0);
    else
      grad.fill(0);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float lse[2] = {stage.terms.lse(fragment_col(n, 0)), stage.terms.lse(fragment_col(n, 1))};
      const float delta[2] = {stage.terms.delta(fragment_col(n, 0)), stage.terms.delta(fragment_col(n, 1))};
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const Kept kept(dropout, s.b, i_h, first_row + n / 2 * 16, warp_key + m * 16);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = first_row + fragment_col(n, e % 2), k = warp_key + fragment_row(m, e);
          Score score = score_of(p, s, weight.x[m][n][e], row, k, first_key, i_h, slope);
          if (needs_mask) {
            const Range range = s.key_range(row);
            if (k < range.lo || k >= range.hi) score.value = -INFINITY;
          }
          const Gradient g = gradient_of(p, score, unit, grad.x[m][n][e], lse[e % 2], delta[e % 2], kept(n % 2, e));
          weight.x[m][n][e] = g.weight, grad.x[m][n][e] = g.product;
        }
      }
    }
    if (GRADIENTS & 1) multiply_add(grad_value, weight, stage.grad_out, 0);
    if (GRADIENTS & 2) multiply_add(grad_key, grad, stage.query, 0);
    if (UNORDERED) add_grad_query(p, s, grad, key, grads, i_h, first_row);
  }
  prim::copy_wait<0>();

  if (GRADIENTS & 1)
    store(grad_value, DROPOUT ? p.keep_scale : 1, s, warp_key,
          p.grad_value + s.b * p.grad_value_b + i_kh * p.grad_value_h + s.first_k * p.grad_value_l, p.grad_value_l,
          p.Dv);
  if (GRADIENTS & 2)
    store(grad_key, p.grad_scale, s, warp_key,
          p.grad_key + s.b * p.grad_key_b + i_kh * p.grad_key_h + s.first_k * p.grad_key_l, p.grad_key_l, p.D);
}
