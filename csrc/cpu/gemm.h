// Matrix products C = A B with float sums, for the projections around attention.
//
// A task computes a block of C: about kBlockRows rows times kBlockColumns columns. The columns are lanes, the rows of A
// are broadcast word by word: the register tiles of attention. B is packed to panels of kTileLanes columns, kDepth deep
// at a time, by the task that needs it, since packing costs little beside so many rows; A is read where it lies, or
// staged if its words do not lie side by side as the tiles read them. Which block an element is in changes nothing in
// the order of its sum, so neither does the number of threads.
#pragma once
#include "../parallel.h"
#include "../scratch.h"
#include "amx.h"
#include "operands.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int64_t kBlockRows = 384, kLeastRows = 48;  // the least where there are more threads than blocks
constexpr int64_t kBlockColumns = 512, kLeastColumns = 128;
constexpr int64_t kDepth = 256;  // elements that are packed, and summed in one go: the error grows with their number

template <class T>
PYATTN_INLINE T* element(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<T*>(m.data) + row / m.L * m.stride_b + row % m.L * m.stride_l + column / m.D * m.stride_h +
         column % m.D;
}

// Calls f(pointer, offset, count) for the elements of columns [first, first + count) of a row, run by run.
template <class T, class F>
PYATTN_INLINE void for_runs(const Matrix& m, int64_t row, int64_t first, int64_t count, const F& f) {
  for (int64_t c = first; c < first + count;) {
    const int64_t run = std::min(m.D - c % m.D, first + count - c);
    f(element<T>(m, row, c), c - first, run);
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

// Rows, or pairs of them, become rows of words: columns [first, first + count) in panels of `width`, `panel` floats
// from one to the next, a row of which takes `out_row` floats.
template <class T>
void stage_across(const Matrix& m, int64_t first_row, int64_t rows, int64_t first, int64_t count, int64_t width,
                  float* out, int64_t out_row, int64_t panel) {
  for (int64_t r = 0; r < rows; r += kDot<T> ? 2 : 1, out += out_row) {
    for (int64_t c = 0; c < count; c += width) {
      float* to = out + c / width * panel;
      for_runs<const T>(
          m, first_row + r, first + c, std::min(width, count - c), [&](const T* run, int64_t offset, int64_t n) {
            if constexpr (kDot<T>) {
              const T* next = r + 1 < rows ? element<const T>(m, first_row + r + 1, first + c + offset) : nullptr;
              interleave_pair(run, next, n, to + offset);
            } else {
              convert_row(run, static_cast<int>(n), to + offset);
            }
          });
    }
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

// c[rows][c_row] += A B, with B in panels of `panel` floats.
template <bool kIsDot>
void multiply_block(const LeftOperand& a, int64_t rows, const float* b, int64_t panel, int64_t words, int64_t columns,
                    float* c, int64_t c_row) {
  for (int64_t j = 0; j < columns; j += kTileLanes, b += panel) {
    const int64_t vecs = round_up(std::min<int64_t>(columns - j, kTileLanes), kPanel) / kLanes;
    if (a.word == 4)
      multiply_panel<kIsDot, 4>(a, static_cast<int>(rows), b, static_cast<int>(words), c + j, c_row, vecs);
    else
      multiply_panel<kIsDot, 0>(a, static_cast<int>(rows), b, static_cast<int>(words), c + j, c_row, vecs);
  }
}

// Where the operands of a product lie: A is [rows, depth] or, transposed, [depth, rows]; B is [depth, columns] or
// [columns, depth], and perhaps packed already.
struct Product {
  int64_t rows, columns, depth;
  Matrix a, b;
  const float* packed = nullptr;
};

// Floats of B packed as a whole that lie before depth k, a multiple of kDepth or the end.
template <class T>
int64_t packed_floats(int64_t columns, int64_t k) {
  return query_words<kDot<T>>(k) * round_up(columns, kTileLanes);
}

// Packs columns of B, [columns, depth], from depth k on.
template <class T>
void pack_columns(const Matrix& b, int64_t column, int64_t columns, int64_t k, int64_t depth, float* out) {
  const T* first = static_cast<const T*>(b.data) + column * b.stride_l + k;
  pack_rows<T>([=](int n) { return first + n * b.stride_l; }, static_cast<int>(columns), static_cast<int>(depth), out);
}

// Calls done(c, c_row, first_row, rows, first_column, columns) with the sums of each block, floats that may be
// overwritten. Blocks have whole multiples of `unit` columns, at least one.
template <class T, bool kTransposeA, bool kTransposeB, class Done>
void matrix_product(const Product& p, int64_t unit, int threads, const Done& done) {
  constexpr bool kAmx = kHasAmx && kDot<T>, kAcross = kTransposeA && !kAmx;  // the words of a row lie a row apart
  if (!p.rows || !p.columns) return;
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  int64_t block_rows = kBlockRows, block_columns = kBlockColumns;
  const auto too_few = [&] { return blocks(p.rows, block_rows) * blocks(p.columns, block_columns) < 2 * threads; };
  while (too_few() && block_columns > kLeastColumns) block_columns /= 2;
  while (too_few() && block_rows > kLeastRows) block_rows /= 2;
  block_columns = std::max<int64_t>(block_columns / unit, 1) * unit;
  block_rows = round_up(blocks(p.rows, blocks(p.rows, block_rows)), kMaxRows);  // as even as they can be
  const int64_t row_blocks = blocks(p.rows, block_rows), column_blocks = blocks(p.columns, block_columns);
  const bool in_place =
      !kTransposeA && (kDot<T> ? p.depth % 2 == 0 : std::is_same_v<T, float>) && is_plain(p.a, p.rows, p.depth);
  const int64_t c_row = round_up(block_columns, kTileLanes);
  const int64_t words = round_up(words_of<T>(std::min(kDepth, p.depth)), 16);
  // An odd number of cache lines, lest the rows of a tile compete for the same lines of the cache.
  const int64_t across_row = round_up(block_rows, 16) | 16, a_row = kAcross ? across_row : words | 16;
  parallel_for(row_blocks * column_blocks, threads, [&](int64_t task) {
    const int64_t i = task / column_blocks * block_rows, j = task % column_blocks * block_columns;
    const int64_t rows = std::min(block_rows, p.rows - i), columns = std::min(block_columns, p.columns - j);
    float *b = nullptr, *a = nullptr, *c = nullptr, *across = nullptr;
    const auto carve = [&](void* base) {
      Carver carver(base);
      b = carver.take<float>(p.packed ? 0 : words * c_row);
      a = carver.take<float>(in_place ? 0 : (kAcross ? words : block_rows) * a_row);
      across = carver.take<float>(kTransposeA && !kAcross ? words * across_row : 0);
      c = carver.take<float>(block_rows * c_row);
      return carver.used();
    };
    carve(thread_scratch(carve(nullptr)));
    std::memset(c, 0, static_cast<size_t>(rows * c_row) * sizeof(float));
    for (int64_t k = 0; k < p.depth; k += kDepth) {
      const int64_t depth = std::min(kDepth, p.depth - k), panel = query_words<kDot<T>>(depth) * kTileLanes;
      if constexpr (kTransposeB) {
        if (!p.packed) pack_columns<T>(p.b, j, columns, k, depth, b);
      } else {
        stage_across<T>(p.b, k, depth, j, columns, kTileLanes, b, kTileLanes, panel);
      }
      LeftOperand left{nullptr, 0, 4};
      if (in_place) {
        left.data = reinterpret_cast<const char*>(static_cast<const T*>(p.a.data) + i * p.a.stride_l + k);
        left.row = p.a.stride_l * static_cast<int64_t>(sizeof(T));
      } else if (kAcross) {
        stage_across<T>(p.a, k, depth, i, rows, rows, a, a_row, 0);
        left = {reinterpret_cast<const char*>(a), 4, 4 * a_row};
      } else {
        if constexpr (kTransposeA) {
          stage_across<T>(p.a, k, depth, i, rows, rows, across, across_row, 0);
          transpose_words(across, across_row, words_of<T>(depth), rows, a, a_row);
        } else {
          stage_along<T>(p.a, i, rows, k, depth, a, a_row);
        }
        left = {reinterpret_cast<const char*>(a), 4 * a_row, 4};
      }
      const float* panels = p.packed ? p.packed + packed_floats<T>(p.columns, k) + j / kTileLanes * panel : b;
      const int64_t count = words_of<T>(depth);
#ifdef PYATTN_ISA_AVX512_AMX
      if constexpr (kAmx) {
        amx_product<true>(left.data, left.row, rows, panels, panel, kTileLanes, count, columns, c, c_row);
        continue;
      }
#endif
      multiply_block<kDot<T>>(left, rows, panels, panel, count, columns, c, c_row);
    }
    done(c, c_row, i, rows, j, columns);
  });
}

}  // namespace
}  // namespace pyattn::PYATTN_ISA
