// The forward for sm_80 and later: online softmax over tiles of keys (FlashAttention-2, Dao 2023, arXiv:2307.08691).
//
// A block owns BLOCK_M rows of one sample and head, and goes over the keys they see. With ROWS the query heads of a key
// head are rows of one tile, and with `split` a block sees a part of the keys and leaves a partial result
// (attention_decode.cuh adds them up): so few queries against many keys still fill a GPU.
//
//   tiles and warps (pyattn/backends/cuda/kernels.py)            registers of a thread for out and scores
//     D    64   128 x 128, 4 x 1 warps of 32 rows                 64 + 128
//     D    96   128 x  48, 4 x 1 warps of 32 rows                 96 +  48
//     D   128   128 x  64, 4 x 1 warps of 32 rows                128 +  64
//     D   192   128 x  64, 8 x 1 warps of 16 rows                 96 +  32
//     D   256    64 x  64, 4 x 1 warps of 16 rows                128 +  32
//     decode     16 x  64, 1 x 4 warps of 16 rows, 16 keys each  D/2 +   8
//
//   shared memory: query [BLOCK_M, D], key [BLOCK_N, D], value [BLOCK_N, Dv], one of each
//
//   time      copies of K and V arrive               all warps
//    |        query, key 0
//    |        value 0                                S = Q K^T
//    |        key 1                                  softmax, O = O alpha + P V
//    |        value 1                                S = Q K^T
//    v        key 2                                  ...
//
// Each warp has its own rows from the products to the end: scores never leave registers, and one `sync` before each
// product is all that warps know of each other. Warps along the keys (WARPS_N) have their own keys of each tile, and
// merge once, at the end.
#include "softmax.cuh"

constexpr int MT = BLOCK_M / WARPS_M / 16;    // pieces of 16 rows of a warp
constexpr int WARP_KEYS = BLOCK_N / WARPS_N;  // keys of a tile that a warp has
constexpr int NT = WARP_KEYS / 8, DT = BLOCK_DV / 8;
using QueryTile = SharedTile<BLOCK_M, BLOCK_D>;
using KeyTile = SharedTile<BLOCK_N, BLOCK_D>;
using ValueTile = SharedTile<BLOCK_N, BLOCK_DV>;
static_assert(MT * 16 * WARPS_M == BLOCK_M && NT * 8 * WARPS_N == BLOCK_N && NT % 2 == 0, "tiles and warps");

// Each of the four threads that share a row asks for one of four blocks of 8 keys, and tells the others.
DEV void drop(Fragment<MT, NT>& weights, const Rows<MT>& rows, const Dropout& dropout, int b, int first_key) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < NT; n += 4) {
        const int block = first_key / 8 + n + lane() % 4;
        const uint32_t kept = dropout.kept(b, rows.head[m][half], rows.row[m][half], block);
#pragma unroll
        for (int i = 0; i < 4 && n + i < NT; ++i) {
          const uint32_t bits = prim::shuffle(kept, lane() / 4 * 4 + i) >> lane() % 4 * 2;
          if (!(bits & 1)) weights.x[m][n + i][2 * half] = 0;
          if (!(bits & 2)) weights.x[m][n + i][2 * half + 1] = 0;
        }
      }
}

// Brings what the warps along the keys found together in the first of them, one after the other.
DEV void merge_warps(Fragment<MT, DT>& out, Rows<MT>& rows, uint32_t shared) {
  constexpr int VALUES = MT * (DT * 4 + 4);  // of a thread
  const int slot = ((warp_n() - 1) * WARPS_M + warp_m()) * VALUES;
  prim::sync();  // the tiles are no longer needed
  if (warp_n() > 0) {
    uint32_t to = shared + slot * 128 + lane() * 4;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        prim::store_shared(to, rows.max[m][half]);
        prim::store_shared(to + 128, rows.sum[m][half]);
        to += 256;
      }
#pragma unroll
      for (int d = 0; d < DT; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i, to += 128) prim::store_shared(to, out.x[m][d][i]);
    }
  }
  prim::sync();
  if (warp_n() > 0) return;
  for (int other = 0; other < WARPS_N - 1; ++other) {
    uint32_t from = shared + (other * WARPS_M + warp_m()) * VALUES * 128 + lane() * 4;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      float mine[2], theirs[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float max = prim::load_shared(from), sum = prim::load_shared(from + 128);
        const float new_max = fmaxf(rows.max[m][half], max), base = new_max == -INFINITY ? 0 : new_max;
        mine[half] = prim::exp2(rows.max[m][half] - base), theirs[half] = prim::exp2(max - base);
        rows.max[m][half] = new_max;
        rows.sum[m][half] = rows.sum[m][half] * mine[half] + sum * theirs[half];
        from += 256;
      }
#pragma unroll
      for (int d = 0; d < DT; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i, from += 128)
          out.x[m][d][i] = out.x[m][d][i] * mine[i / 2] + prim::load_shared(from) * theirs[i / 2];
    }
  }
}

KERNEL(attention_fwd) {
  // The block: a tile of rows of one sample and head, and a part of the keys.
  const int rest = prim::block() / p.slots;
  const int heads = p.Hq / ROWS, i_head = rest % heads, i_split = rest / heads;
  const Place place = tile_of(p, prim::block() % p.slots, p.cu_seqlens_q, p.total_q, ROWS, BLOCK_M);
  const Sample s(p, place.b);
  const int num_tiles = (s.Lq * ROWS + BLOCK_M - 1) / BLOCK_M;
  if (place.tile >= num_tiles) return;
  // Under a causal mask the last rows see most: they start first.
  const int first_row = (num_tiles - 1 - place.tile) * BLOCK_M;
  const int i_kh = i_head * ROWS / (p.Hq / p.Hkv);

  const QueryTile query{prim::shared_base()};
  const KeyTile key{query.base + QueryTile::BYTES};
  const ValueTile value{key.base + KeyTile::BYTES};
  const KeyRows key_row(p, s, i_kh, p.key_b, p.key_h, p.key_l), value_row(p, s, i_kh, p.value_b, p.value_h, p.value_l);
  Tiles tiles = key_tiles(s, first_row / ROWS, smaller((first_row + BLOCK_M - 1) / ROWS, s.Lq - 1));
  if (p.partial_out) {
    tiles.begin = larger(tiles.begin, i_split * p.split);
    tiles.end = smaller(tiles.end, (i_split + 1) * p.split);
  }

  load_tile(query, p.query, p.D, [&](int r) -> int64_t {
    const int row = (first_row + r) / ROWS, head = i_head * ROWS + (first_row + r) % ROWS;
    return row < s.Lq ? s.b * p.query_b + head * p.query_h + (s.first_q + row) * p.query_l : -1;
  });
  if (tiles.begin < tiles.end) load_tile(key, p.key, p.D, [&](int n) { return key_row(tiles.begin + n); });
  prim::copy_commit();

  Rows<MT> rows;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = first_row + warp_m() * MT * 16 + fragment_row(m, 2 * half);
      rows.begin(p, s, m, half, r / ROWS, i_head * ROWS + r % ROWS, !p.partial_out && warp_n() == 0);
    }
  Fragment<MT, DT> out;
  out.fill(0);
  const Dropout dropout(p);
  const float unit = unit_of(p);

  for (int first_key = tiles.begin; first_key < tiles.end; first_key += BLOCK_N) {
    prim::copy_wait<0>();
    prim::sync();  // the keys are there, and nobody needs the last values any more
    load_tile(value, p.value, p.Dv, [&](int n) { return value_row(first_key + n); });
    prim::copy_commit();

    Fragment<MT, NT> scores;
    multiply_rows(scores, query, warp_m() * MT * 16, key, warp_n() * WARP_KEYS);

    prim::copy_wait<0>();
    prim::sync();  // the values are there, and nobody needs the keys any more
    if (first_key + BLOCK_N < tiles.end)
      load_tile(key, p.key, p.D, [&](int n) { return key_row(first_key + BLOCK_N + n); });
    prim::copy_commit();

    const int warp_key = first_key + warp_n() * WARP_KEYS;
    finish_scores(scores, p, s, tiles, rows, first_key, warp_key);
    float shrink[MT][2];
    online_softmax_step(scores, rows, unit, shrink);
    rescale(out, shrink);
    if (DROPOUT) drop(scores, rows, dropout, s.b, warp_key);
    multiply_add(out, scores, value, warp_n() * WARP_KEYS);
  }
  prim::copy_wait<0>();
  if (WARPS_N > 1) {
    merge_warps(out, rows, key.base);
    if (warp_n() > 0) return;
  }

  const int again = prim::fresh(first_row);
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = rows.total(m, half);
      const int r = again + warp_m() * MT * 16 + fragment_row(m, 2 * half);
      const int row = r / ROWS, head = i_head * ROWS + r % ROWS;
      if (row >= s.Lq) continue;
      const int64_t i_row = s.b * p.lse_b + head * p.lse_h + s.first_q + row;
      const int64_t partial_row = i_split * p.num_rows + i_row;
      if (lane() % 4 == 0)
        (p.partial_out ? p.partial_lse[partial_row] : p.lse[i_row]) = (rows.max[m][half] + prim::log2(sum)) * LN2;
      const float norm = (sum == 0 ? 1 : prim::reciprocal(sum)) * (DROPOUT ? p.keep_scale : 1);
      uint16_t* to = p.out + s.b * p.out_b + head * p.out_h + (s.first_q + row) * p.out_l;
#pragma unroll
      for (int d = 0; d < DT; ++d) {
        const int col = fragment_col(d, 0);
        const float x = out.x[m][d][2 * half] * norm, y = out.x[m][d][2 * half + 1] * norm;
        if (p.partial_out) {
          float* partial = p.partial_out + partial_row * p.Dv + col;
          if (col < p.Dv) partial[0] = x;
          if (col + 1 < p.Dv) partial[1] = y;
        } else {
          store_pair(to, col, p.Dv, x, y);
        }
      }
    }
}
