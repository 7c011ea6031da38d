// Matrix products C = A B with float sums, for the projections around attention.
//
// A task computes a block of C: kBlockRows rows times about kBlockColumns columns. The columns are lanes, the rows of A
// are broadcast word by word: the register tiles of attention. B is packed to panels of kTileLanes columns, kDepth deep
// at a time, by the task that needs it, since packing costs little beside kBlockRows rows of products; A is read where
// it lies, or staged if its words do not lie side by side as the tiles read them. Which task computes an element
// changes nothing in the order of its sum.
#pragma once
#include "../parallel.h"
#include "../scratch.h"
#include "operands.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int64_t kBlockRows = 384;
constexpr int64_t kLeastRows = 48;  // of a block, when there are more threads than blocks
constexpr int64_t kBlockColumns = 128;
constexpr int64_t kDepth = 512;  // a multiple of 2 kMaxSum, so that sums do not depend on where a block of it ends

// Calls f(pointer, offset, count) for the elements of columns [first, first + count) of a row, run by run.
template <class T, class F>
PYATTN_INLINE void for_runs(const Matrix& m, int64_t row, int64_t first, int64_t count, const F& f) {
  T* base = static_cast<T*>(m.data) + row / m.L * m.stride_b + row % m.L * m.stride_l;
  for (int64_t c = first; c < first + count;) {
    const int64_t e = c % m.D, run = std::min(m.D - e, first + count - c);
    f(base + c / m.D * m.stride_h + e, c - first, run);
    c += run;
  }
}

// Rows are `stride_l` apart, all of them, and a row is one run.
inline bool is_plain(const Matrix& m, int64_t rows, int64_t columns) {
  return columns <= m.D && (rows <= m.L || m.stride_b == m.L * m.stride_l);
}

template <class T>
constexpr int64_t words_of(int64_t elements) {
  return kDot<T> ? (elements + 1) / 2 : elements;
}

// `count` elements of each of `rows` rows as words side by side, `out_row` floats a row.
template <class T>
void stage_along(const Matrix& m, int64_t first_row, int64_t rows, int64_t first, int64_t count, float* out,
                 int64_t out_row) {
  for (int64_t r = 0; r < rows; ++r, out += out_row) {
    for_runs<const T>(m, first_row + r, first, count, [&](const T* run, int64_t offset, int64_t n) {
      if constexpr (kDot<T>)
        std::memcpy(reinterpret_cast<T*>(out) + offset, run, static_cast<size_t>(n) * sizeof(T));
      else
        convert_row(run, static_cast<int>(n), out + offset);
    });
    if (kDot<T> && count % 2) reinterpret_cast<uint16_t*>(out)[count] = 0;
  }
}

// Rows, or pairs of them, become rows of words that lie `out_row` floats apart.
template <class T>
void stage_across(const Matrix& m, int64_t first_row, int64_t rows, int64_t first, int64_t count, float* out,
                  int64_t out_row) {
  for (int64_t r = 0; r < rows; r += kDot<T> ? 2 : 1, out += out_row) {
    for_runs<const T>(m, first_row + r, first, count, [&](const T* run, int64_t offset, int64_t n) {
      if constexpr (kDot<T>) {
        const T* next = nullptr;
        if (r + 1 < rows)
          for_runs<const T>(m, first_row + r + 1, first + offset, n, [&](const T* p, int64_t, int64_t) { next = p; });
        interleave_pair(run, next, n, out + offset);
      } else {
        convert_row(run, static_cast<int>(n), out + offset);
      }
    });
  }
}

// What a block of A is read from.
struct LeftOperand {
  const char* data;
  int64_t row, word;  // bytes from one to the next
};

template <bool kIsDot, int kVecs, int64_t kWord>
__attribute__((noinline)) void multiply_panel(const LeftOperand& a, int rows, const float* b, int words, float* c,
                                              int64_t c_row) {
  const int64_t word = kWord ? kWord : a.word;
  for_row_tiles(rows, [&](int i, auto tile_rows) {
    add_product<kIsDot, tile_rows(), kVecs>(a.data + i * a.row, a.row, word, EvenRows{b, kTileLanes}, words,
                                            c + i * c_row, c_row);
  });
}

template <bool kIsDot, int64_t kWord, int kVecs = kTileLanes / kLanes>
void multiply_panel(const LeftOperand& a, int rows, const float* b, int words, float* c, int64_t c_row, int64_t vecs) {
  if (vecs >= kVecs)
    multiply_panel<kIsDot, kVecs, kWord>(a, rows, b, words, c, c_row);
  else if constexpr (kVecs > 1)
    multiply_panel<kIsDot, kWord, kVecs - 1>(a, rows, b, words, c, c_row, vecs);
}

// c[rows][c_row] += A B, with B in panels of `panel_words` rows, of which `words` count.
template <bool kIsDot>
void multiply_block(const LeftOperand& a, int64_t rows, const float* b, int64_t panel_words, int64_t words,
                    int64_t columns, float* c, int64_t c_row) {
  for (int64_t j = 0; j < columns; j += kTileLanes, b += panel_words * kTileLanes) {
    const int64_t vecs = round_up(std::min<int64_t>(columns - j, kTileLanes), kPanel) / kLanes;
    for (int64_t w = 0; w < words; w += kMaxSum) {
      const LeftOperand from{a.data + w * a.word, a.row, a.word};
      const int n = static_cast<int>(rows), count = min_int(kMaxSum, words - w);
      if (a.word == 4)
        multiply_panel<kIsDot, 4>(from, n, b + w * kTileLanes, count, c + j, c_row, vecs);
      else
        multiply_panel<kIsDot, 0>(from, n, b + w * kTileLanes, count, c + j, c_row, vecs);
    }
  }
}

// Where the operands of a product lie: A is [rows, depth] or, transposed, [depth, rows]; B is [depth, columns] or
// [columns, depth].
struct Product {
  int64_t rows, columns, depth;
  Matrix a, b;
};

// Calls done(c, c_row, first_row, rows, first_column, columns) with the sums of each block, floats that may be
// overwritten. Blocks have whole multiples of `unit` columns, at least one.
template <class T, bool kTransposeA, bool kTransposeB, class Done>
void matrix_product(const Product& p, int64_t unit, int threads, const Done& done) {
  const int64_t block_columns = std::max<int64_t>(kBlockColumns / unit, 1) * unit;
  const int64_t column_blocks = (p.columns + block_columns - 1) / block_columns;
  int64_t row_blocks = (p.rows + kBlockRows - 1) / kBlockRows;
  if (!column_blocks || !row_blocks) return;
  if (column_blocks * row_blocks < 2 * threads)
    row_blocks = std::max(row_blocks, std::min<int64_t>(2 * threads / column_blocks, p.rows / kLeastRows));
  const int64_t block_rows = round_up((p.rows + row_blocks - 1) / row_blocks, kMaxRows);
  row_blocks = (p.rows + block_rows - 1) / block_rows;
  const bool in_place =
      !kTransposeA && (kDot<T> ? p.depth % 2 == 0 : std::is_same_v<T, float>) && is_plain(p.a, p.rows, p.depth);
  const int64_t c_row = round_up(block_columns, kTileLanes), deepest = std::min(kDepth, p.depth);
  const int64_t words = round_up(words_of<T>(deepest), kLanes);
  parallel_for(row_blocks * column_blocks, threads, [&](int64_t task) {
    const int64_t i = task / column_blocks * block_rows, j = task % column_blocks * block_columns;
    const int64_t rows = std::min(block_rows, p.rows - i), columns = std::min(block_columns, p.columns - j);
    float *b = nullptr, *a = nullptr, *c = nullptr;
    const auto carve = [&](void* base) {
      Carver carver(base);
      b = carver.take<float>(words * c_row);
      a = carver.take<float>(in_place ? 0 : words * round_up(block_rows, kLanes));
      c = carver.take<float>(block_rows * c_row);
      return carver.used();
    };
    carve(thread_scratch(carve(nullptr)));
    std::memset(c, 0, static_cast<size_t>(rows * c_row) * sizeof(float));
    for (int64_t k = 0; k < p.depth; k += kDepth) {
      const int64_t depth = std::min(kDepth, p.depth - k), panel_words = round_up(words_of<T>(depth), kLanes);
      if constexpr (kTransposeB) {
        const T* weight = static_cast<const T*>(p.b.data) + j * p.b.stride_l + k;
        pack_rows<T>([=](int n) { return weight + n * p.b.stride_l; }, static_cast<int>(columns),
                     static_cast<int>(depth), b);
      } else {
        for (int64_t n = 0; n < columns; n += kTileLanes)
          stage_across<T>(p.b, k, depth, j + n, std::min<int64_t>(kTileLanes, columns - n), b + n * panel_words,
                          kTileLanes);
      }
      LeftOperand left{nullptr, 0, 4};
      if (in_place) {
        left.data = reinterpret_cast<const char*>(static_cast<const T*>(p.a.data) + i * p.a.stride_l + k);
        left.row = p.a.stride_l * static_cast<int64_t>(sizeof(T));
      } else if (kTransposeA) {
        stage_across<T>(p.a, k, depth, i, rows, a, block_rows);
        left = {reinterpret_cast<const char*>(a), 4, 4 * block_rows};
      } else {
        stage_along<T>(p.a, i, rows, k, depth, a, words);
        left = {reinterpret_cast<const char*>(a), 4 * words, 4};
      }
      multiply_block<kDot<T>>(left, rows, b, panel_words, words_of<T>(depth), columns, c, c_row);
    }
    done(c, c_row, i, rows, j, columns);
  });
}

}  // namespace
}  // namespace pyattn::PYATTN_ISA
