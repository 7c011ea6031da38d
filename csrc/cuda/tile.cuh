// The pieces that the attention kernels share: where a block works, tiles in shared memory, what a score is.
//
// Fixed when a kernel is compiled, all of them macros:
//
//   BLOCK_M, BLOCK_N      rows and keys of a tile
//   BLOCK_D, BLOCK_DV     columns of a tile: 64, 96, 128, 192 or 256, at least D and Dv; what is beyond them is 0
//   WARPS_M, WARPS_N      warps along the rows and along the keys of a tile
//   BF16                  1: bfloat16, 0: float16
//   ALIGNED               1: D and Dv are multiples of 8 and all addresses of 16 bytes, so rows are copied by 16 bytes
//   ROWS                  query heads that are rows of one tile (GQA packing): row r is query r / ROWS; 1: none
//   PAGE_SIZE             keys of a page; 0: no pages
//   MASK                  0: none, 1: bool, 2: of the query's type, 3: float32
//   ALIBI SOFTCAP DROPOUT whether there is one
//   NEGATIVE              1: the scale is not positive
//   GRADIENTS, UNORDERED  of attention_bwd_dkdv.cuh
//
// What costs nothing in the inner loops is decided at run time: causal masks and windows, lengths, starts, offsets,
// packed sequences, sinks. Rows are int, and offsets in memory int64_t.
#pragma once
#include "params.cuh"

constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float MIN_BIAS = -2.3e38f;       // finite biases are clamped here: times log2(e) it is still finite
constexpr int EDGE = 1 << 30;              // edges are clamped here: beyond every length, and sums with a row fit
constexpr int64_t FAR = int64_t(1) << 60;  // offsets are clamped here and windows at twice this: sums fit

// ---- small things -----------------------------------------------------------------------------------------

template <class T>
DEV T smaller(T x, T y) {
  return x < y ? x : y;
}
template <class T>
DEV T larger(T x, T y) {
  return x > y ? x : y;
}
template <class T>
DEV T clamp(T x, T low, T high) {
  return smaller(larger(x, low), high);
}

DEV int lane() { return prim::thread() % 32; }
DEV int warp_m() { return prim::thread() / 32 % WARPS_M; }
DEV int warp_n() { return prim::thread() / 32 / WARPS_M; }

DEV int64_t load_index(const void* values, int64_t i, bool are_64) {
  return are_64 ? static_cast<const int64_t*>(values)[i] : static_cast<const int32_t*>(values)[i];
}

DEV float load_float(const void* values, int64_t i, int type) {
  if (type == 2) return static_cast<const float*>(values)[i];
  return prim::to_float(static_cast<const uint16_t*>(values)[i], type == 0);
}

// ---- where a block works ----------------------------------------------------------------------------------

struct Place {
  int b, tile;
};

DEV int64_t first_slot(const int32_t* cu_seqlens, int b, int total, int rows, int block) {
  return int64_t(clamp(cu_seqlens[b], 0, total)) * rows / block + b;
}

// The sample of a slot, and the tile in it; tiles have `block` rows, of which each token of the sample has `rows`.
// A sample has p.tiles slots. In a packed batch sequence b has those from cu_seqlens[b] * rows / block + b on, at least
// as many as its tiles, so that a block finds its own without anyone having looked at the lengths.
DEV Place tile_of(const Params& p, int slot, const int32_t* cu_seqlens, int total, int rows, int block) {
  if (!cu_seqlens) return {slot / p.tiles, slot % p.tiles};
  int low = 0, high = p.B;  // the last sequence that begins no later than the slot lies in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first_slot(cu_seqlens, middle, total, rows, block) > slot ? high : low) = middle;
  }
  return {low, int(larger<int64_t>(slot - first_slot(cu_seqlens, low, total, rows, block), 0))};
}

struct Range {
  int lo, hi;
};

// What the scores of one sample depend on. Values out of range are clamped: none leads outside the keys there are.
struct Sample {
  int b, first_q, Lq, first_k, Lk;
  int start, length;  // keys in use: [start, length)
  int64_t offset;     // pos(i) = i + offset; by default the last row meets the last key
  int first, last;    // row i sees keys from i + first to i + last, as far as they are in use

  DEV Sample(const Params& p, int sample) : b(sample), first_q(0), Lq(p.Lq), first_k(0), Lk(p.Lk) {
    span(p.cu_seqlens_q, p.total_q, first_q, Lq);
    span(p.cu_seqlens_k, p.total_k, first_k, Lk);
    start = 0, length = Lk;
    if (p.kv_starts) start = int(clamp<int64_t>(load_index(p.kv_starts, b, p.kv_starts_are_64), 0, Lk));
    if (p.kv_lengths) length = int(clamp<int64_t>(load_index(p.kv_lengths, b, p.kv_lengths_are_64), 0, Lk));
    offset = p.bottom_right ? length - Lq : p.q_offset;
    if (p.q_offsets) offset = load_index(p.q_offsets, b, p.q_offsets_are_64);
    offset = clamp(offset, -FAR, FAR);
    first = int(clamp<int64_t>(offset - smaller(p.window_left, 2 * FAR), -EDGE, EDGE));
    last = int(clamp<int64_t>(offset + smaller(p.window_right, 2 * FAR) + 1, -EDGE, EDGE));
    if (p.window_left > 2 * FAR) first = -EDGE;
    if (p.window_right > 2 * FAR) last = EDGE;
  }

  DEV void span(const int32_t* cu_seqlens, int total, int& begin, int& L) const {
    if (!cu_seqlens) return;
    begin = clamp(cu_seqlens[b], 0, total);
    L = larger(clamp(cu_seqlens[b + 1], 0, total) - begin, 0);
  }

  // The half-open interval of keys that a row may see: the twin of `key_range` in pyattn/reference.py.
  DEV Range key_range(int row) const { return {larger(start, row + first), smaller(length, row + last)}; }

  // The inverse: the rows that may see a key, as far as there are any.
  DEV Range row_range(int key) const {
    if (key < start || key >= length) return {0, 0};
    return {key - last + 1, key - first + 1};
  }
};

// Tiles begin at multiples of their size: those of keys that rows `first_row` to `last_row` see begin in [begin, end).
// Every row sees all of a tile that lies within [full_begin, full_end).
struct Tiles {
  int begin, full_begin, full_end, end;

  DEV bool needs_mask(int first, int size) const { return first < full_begin || first + size > full_end; }
};

DEV Tiles key_tiles(const Sample& s, int first_row, int last_row) {
  const Range first = s.key_range(first_row), last = s.key_range(last_row);
  return {larger(first.lo, 0) / BLOCK_N * BLOCK_N, last.lo, first.hi, last.hi};
}

// The inverse: tiles of the rows that see some of BLOCK_N keys from `first_key` on.
DEV Tiles query_tiles(const Sample& s, int first_key) {
  const int after = first_key + BLOCK_N;
  Tiles t{clamp(first_key + 1 - s.last, 0, s.Lq) / BLOCK_M * BLOCK_M, clamp(after - s.last, 0, s.Lq),
          clamp(first_key + 1 - s.first, 0, s.Lq), clamp(smaller(after, s.length) - s.first, 0, s.Lq)};
  if (first_key >= s.length || after <= s.start) t.end = 0;
  if (first_key < s.start || after > s.length) t.full_end = 0;
  return t;
}

// ---- tiles in shared memory -------------------------------------------------------------------------------

// Rows of 16-bit elements in panels of 64 columns (of 32 where 64 does not divide them). The chunks of 16 bytes of a
// row are permuted by an exclusive or with the row, so that eight rows at one column lie in eight different banks.
template <int ROWS_, int COLS_>
struct SharedTile {
  static constexpr int NUM_ROWS = ROWS_, NUM_COLS = COLS_, BYTES = ROWS_ * COLS_ * 2;
  static constexpr int PANEL = COLS_ % 64 ? 32 : 64;
  uint32_t base;

  // Where a thread stands in the tile: at a row, and a column that is a multiple of 8.
  struct Cursor {
    uint32_t row, twist;

    // The address `rows` further down, a multiple of 8, and `cols` to the right, a multiple of 16 if the column is 8.
    DEV uint32_t at(uint32_t rows, uint32_t cols) const {
      return row + (cols / PANEL * NUM_ROWS + rows) * (2 * PANEL) + ((cols % PANEL * 2) ^ twist);
    }
  };

  DEV Cursor cursor(uint32_t row, uint32_t col) const {
    const uint32_t twist = PANEL == 64 ? row & 7 : row >> 1 & 3;
    return {base + (col / PANEL * NUM_ROWS + row) * (2 * PANEL), (col % PANEL / 8 ^ twist) * 16};
  }
};

// Fills a tile with rows of D elements: row r begins `row_of(r)` elements behind `from`; it is 0 where that is
// negative. Ordered by copy_commit and copy_wait; rows that are not ALIGNED are stored at once. A thread has one column
// of each panel, and every STEP-th row, so all its addresses are one and constants.
template <class Tile, class RowOf>
DEV void load_tile(Tile tile, const uint16_t* from, int D, RowOf row_of) {
  constexpr int CHUNKS = Tile::PANEL / 8, STEP = THREADS / CHUNKS;
  static_assert(STEP % 8 == 0, "the permutation repeats every 8 rows");
  const int first_row = prim::thread() / CHUNKS, first_col = prim::thread() % CHUNKS * 8;
  const auto cursor = tile.cursor(first_row, first_col);
#pragma unroll
  for (int step = 0; step < Tile::NUM_ROWS; step += STEP) {
    const int row = first_row + step;
    if (Tile::NUM_ROWS % STEP && row >= Tile::NUM_ROWS) break;
    const int64_t offset = row_of(row);
    const uint16_t* begin = offset < 0 ? from : from + offset + first_col;
#pragma unroll
    for (int panel = 0; panel < Tile::NUM_COLS; panel += Tile::PANEL) {
      const int there = offset < 0 ? 0 : D - (panel + first_col);  // elements, of 8 at most
      const uint32_t to = cursor.at(step, panel);
      if (ALIGNED) {
        prim::copy_async(to, there > 0 ? begin + panel : from, there > 0 ? 16 : 0);
      } else {
        prim::Words words = {};
        for (int e = 0; e < 8; ++e)
          if (e < there) words.w[e / 2] |= uint32_t(begin[panel + e]) << (16 * (e % 2));
        prim::store_shared(to, words);
      }
    }
  }
}

// Two elements of a row of D, as one word where that is aligned.
DEV void store_pair(uint16_t* row, int col, int D, float x, float y) {
  const uint32_t word = prim::pack(x, y, BF16);
  if (ALIGNED) {
    if (col < D) *reinterpret_cast<uint32_t*>(row + col) = word;
  } else {
    if (col < D) row[col] = uint16_t(word);
    if (col + 1 < D) row[col + 1] = uint16_t(word >> 16);
  }
}

// Where the keys or values of one sample and key head lie.
struct KeyRows {
  const Params& p;
  const Sample& s;
  int64_t head, stride_b, stride_l;

  DEV KeyRows(const Params& p, const Sample& s, int i_kh, int64_t stride_b, int64_t stride_h, int64_t stride_l)
      : p(p), s(s), head(i_kh * stride_h), stride_b(stride_b), stride_l(stride_l) {}

  // Of key n, or -1 if it is not in use.
  DEV int64_t operator()(int n) const {
    if (n < s.start || n >= s.length) return -1;
    if (!PAGE_SIZE) return s.b * stride_b + head + (s.first_k + n) * stride_l;
    const int size = larger(PAGE_SIZE, 1), page = p.block_table[s.b * p.table_b + n / size * p.table_p];
    return clamp(page, 0, p.num_pages - 1) * stride_b + head + n % size * stride_l;
  }
};

// ---- products ---------------------------------------------------------------------------------------------

// Accumulators of a warp: [MT, NT] pieces of 16 x 8, of which a thread holds rows lane / 4 and that + 8 (elements 0, 1
// and 2, 3) at columns 2 * (lane % 4) and the next.
template <int MT, int NT>
struct Fragment {
  float x[MT][NT][4];

  DEV void fill(float value) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[m][n][i] = value;
  }
};

DEV int fragment_row(int m, int i) { return m * 16 + lane() / 4 + i / 2 * 8; }
DEV int fragment_col(int n, int i) { return n * 8 + lane() % 4 * 2 + i % 2; }

// c = a b^T: of rows of a from `a_row` on and rows of b from `b_row` on, over all columns.
template <int MT, int NT, class A, class B>
DEV void multiply_rows(Fragment<MT, NT>& c, A a, int a_row, B b, int b_row) {
  static_assert(A::NUM_COLS == B::NUM_COLS && NT % 2 == 0, "shapes do not match");
  c.fill(0);
  const uint32_t l = lane();
  const auto from_a = a.cursor(a_row + l % 16, l / 16 * 8);
  const auto from_b = b.cursor(b_row + l % 8 + l / 16 * 8, l / 8 % 2 * 8);
#pragma unroll
  for (int k = 0; k < A::NUM_COLS; k += 16) {
    uint32_t left[MT][4], right[4];
#pragma unroll
    for (int m = 0; m < MT; ++m) prim::load_matrices(left[m], from_a.at(m * 16, k));
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      prim::load_matrices(right, from_b.at(n * 8, k));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        prim::multiply(c.x[m][n], left[m], right[0], right[1], BF16);
        prim::multiply(c.x[m][n + 1], left[m], right[2], right[3], BF16);
      }
    }
  }
}

// c += p b: p, rounded to the input's type, times rows of b from `b_row` on. An accumulator's layout is that of a left
// operand, so p never leaves its registers.
template <int MT, int KT, int NT, class B>
DEV void multiply_add(Fragment<MT, NT>& c, const Fragment<MT, KT>& p, B b, int b_row) {
  static_assert(B::NUM_COLS == NT * 8 && KT % 2 == 0 && NT % 2 == 0, "shapes do not match");
  const uint32_t l = lane();
  const auto from_b = b.cursor(b_row + l % 16, l / 16 * 8);
#pragma unroll
  for (int k = 0; k < KT; k += 2) {
    uint32_t left[MT][4], right[4];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        left[m][i] = prim::pack(p.x[m][k + i / 2][i % 2 * 2], p.x[m][k + i / 2][i % 2 * 2 + 1], BF16);
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      prim::load_matrices_transposed(right, from_b.at(k * 8, n * 8));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        prim::multiply(c.x[m][n], left[m], right[0], right[1], BF16);
        prim::multiply(c.x[m][n + 1], left[m], right[2], right[3], BF16);
      }
    }
  }
}

// ---- scores -----------------------------------------------------------------------------------------------

// To about an ulp: the polynomial and the bound 0.625 are those of Cephes' tanhf.
DEV float tanh(float x) {
  const float z = x * x, size = fabsf(x);
  float y = -5.70498872745e-3f * z + 2.06390887954e-2f;
  y = y * z - 5.37397155531e-2f;
  y = y * z + 1.33314422036e-1f;
  y = y * z - 3.33332819422e-1f;
  const float large = 1 - 2 * prim::reciprocal(prim::exp2(size * (2 * LOG2E)) + 1);
  return size < 0.625f ? y * z * x + x : x < 0 ? -large : large;
}

// Whether scores are the products themselves, and the scale folds into the argument of exp2.
DEV bool folds() { return !(SOFTCAP || ALIBI || MASK > 1 || NEGATIVE); }
DEV float unit_of(const Params& p) { return folds() ? p.scale : 1; }

// ALiBi's slope of a head, times log2(e).
DEV float slope_of(const Params& p, int b, int head) {
  return ALIBI ? p.alibi_slopes[b * p.alibi_b + head] * LOG2E : 0;
}

struct Score {
  float value;       // times `unit_of` a score times log2(e); -inf where attn_mask says so
  float derivative;  // of the softcap
};

// From the product of a query and a key. `first_key` is that of the tile: beyond 2^24 a position is no float, a
// distance from there hardly ever so large.
DEV Score score_of(const Params& p, const Sample& s, float product, int row, int key, int first_key, int head,
                   float slope) {
  Score score{product, 1};
  if (folds() && !MASK) return score;
  if (SOFTCAP) {
    const float t = tanh(product * p.scale);
    score = {t * p.softcap, 1 - t * t};
  } else if (!folds()) {
    score.value *= p.scale;
  }
  if (ALIBI) score.value -= slope * fabsf(float(s.offset + row - first_key) - float(key - first_key));
  if (MASK && row < s.Lq && key < s.length) {
    const int64_t i = s.b * p.mask_b + head * p.mask_h + row * p.mask_q + key * p.mask_k;
    if (MASK == 1) {
      if (!static_cast<const uint8_t*>(p.mask)[i]) score.value = -INFINITY;
    } else {
      const float bias = load_float(p.mask, i, MASK == 3 ? 2 : BF16 ? 0 : 1);
      if (bias == -INFINITY)
        score.value = -INFINITY;
      else  // not fmaxf, which would lose NaN
        score.value += (bias < MIN_BIAS ? MIN_BIAS : bias) * LOG2E;
    }
  }
  return score;
}

// ---- dropout ----------------------------------------------------------------------------------------------

// Which weights dropout keeps: the twin of `dropout_factor` in pyattn/reference.py. Key j takes half (j >> 2) & 1 of
// word j & 3 of the Philox 4x32-10 block (Salmon et al. 2011) with counter (j // 8, i, h, b).
struct Dropout {
  uint32_t key[2] = {0, 0};
  int threshold = 0;

  DEV Dropout(const Params& p) {
    if (!DROPOUT) return;
    key[0] = uint32_t(*p.seed), key[1] = uint32_t(*p.seed >> 32);
    threshold = p.threshold;
  }

  // Of the 8 keys from 8 * block on, a bit each.
  DEV uint32_t kept(int b, int head, int row, int block) const {
    uint32_t c[4] = {uint32_t(block), uint32_t(row), uint32_t(head), uint32_t(b)}, k[2] = {key[0], key[1]};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t x = uint64_t(0xD2511F53u) * c[0], y = uint64_t(0xCD9E8D57u) * c[2];
      c[0] = uint32_t(y >> 32) ^ c[1] ^ k[0], c[1] = uint32_t(y);
      c[2] = uint32_t(x >> 32) ^ c[3] ^ k[1], c[3] = uint32_t(x);
      k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
    }
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) bits |= uint32_t(int(c[j % 4] >> (j / 4 * 16) & 0xFFFF) >= threshold) << j;
    return bits;
  }
};
