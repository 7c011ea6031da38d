// Products of bfloat16 by AMX (Intel's Advanced Matrix Extensions): tiles of 16 rows of 64 bytes, C += A B in float32.
//
// A tile of C is 16 rows by 16 columns, one of A 16 rows by 16 pairs along the depth, one of B 16 such pairs by 16
// columns. Four tiles of C are kept, so that each tile of A and B that is loaded serves two products.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace pyattn::PYATTN_ISA {
namespace {
#ifdef PYATTN_ISA_AVX512_AMX
constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
#endif
}  // namespace
}  // namespace pyattn::PYATTN_ISA

#ifdef PYATTN_ISA_AVX512_AMX
#include <immintrin.h>

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int kAmxRows = 16, kAmxLanes = 16, kAmxWords = 16;  // words are pairs of bfloat16

// The compiler does not know that tiles read and write memory: here everything is written, and read again afterwards.
inline void order_memory(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// The shapes of the tiles: C is tiles 0 to 3, of A 4 and 5 have `rows0` and `rows1` rows, of B 6 and 7.
class AmxTiles {
 public:
  AmxTiles(int rows0, int rows1, int words) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};  // of a row
      uint8_t rows[16] = {};
    } config;
    const auto tile = [&](int i, int rows, int bytes) { config.rows[i] = rows, config.bytes[i] = bytes; };
    for (int i = 0; i < 4; ++i) tile(i, i < 2 ? rows0 : rows1, 4 * kAmxLanes);
    tile(4, rows0, 4 * words), tile(5, rows1, 4 * words);
    tile(6, words, 4 * kAmxLanes), tile(7, words, 4 * kAmxLanes);
    order_memory(&config);
    _tile_loadconfig(&config);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

// c = A B, or with kAdd c += A B, for one or two tiles of rows and of columns, `steps` tiles deep. Strides are in
// bytes.
template <bool kAdd, bool kTwoRows, bool kTwoColumns>
void amx_multiply(const char* a, int64_t a_row, const float* b, int64_t b_row, int steps, float* c, int64_t c_row) {
  float* lower = c + kAmxRows * c_row / 4;
  const char* a_lower = a + kAmxRows * a_row;
  order_memory(c);
  if (kAdd) {
    _tile_loadd(0, c, c_row);
    if (kTwoColumns) _tile_loadd(1, c + kAmxLanes, c_row);
    if (kTwoRows) _tile_loadd(2, lower, c_row);
    if (kTwoRows && kTwoColumns) _tile_loadd(3, lower + kAmxLanes, c_row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int s = 0; s < steps; ++s) {
    const float* words = b + s * kAmxWords * b_row / 4;
    _tile_loadd(4, a + s * 4 * kAmxWords, a_row);
    _tile_loadd(6, words, b_row);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoColumns) {
      _tile_loadd(7, words + kAmxLanes, b_row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoRows) {
      _tile_loadd(5, a_lower + s * 4 * kAmxWords, a_row);
      _tile_dpbf16ps(2, 5, 6);
      if (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_row);
  if (kTwoColumns) _tile_stored(1, c + kAmxLanes, c_row);
  if (kTwoRows) _tile_stored(2, lower, c_row);
  if (kTwoRows && kTwoColumns) _tile_stored(3, lower + kAmxLanes, c_row);
  order_memory(c);
}

// A step of amx_product: tiles of rows [first_row, end_row), of which the last two have `rows0` and `rows1` rows.
template <bool kAdd>
void amx_pass(const char* a, int64_t a_row, const float* b, int64_t panel, int width, int64_t columns, float* c,
              int64_t c_row, int64_t first_row, int64_t end_row, int rows0, int rows1, int depth, int steps) {
  if (first_row == end_row) return;
  const AmxTiles tiles(rows0, std::max(rows1, 1), depth);
  for (int64_t i = first_row; i < end_row; i += 2 * kAmxRows) {
    for (int64_t j = 0; j < columns; j += 2 * kAmxLanes) {
      const auto run = [&](auto multiply) {
        multiply(a + i * a_row, a_row, b + j / width * panel + j % width, 4 * width, steps, c + i * c_row + j,
                 4 * c_row);
      };
      const bool two_columns = j + kAmxLanes < columns;
      if (rows1 && two_columns)
        run(amx_multiply<kAdd, true, true>);
      else if (rows1)
        run(amx_multiply<kAdd, true, false>);
      else if (two_columns)
        run(amx_multiply<kAdd, false, true>);
      else
        run(amx_multiply<kAdd, false, false>);
    }
  }
}

// c[rows][c_row] = A B, or with kAdd += A B: rows of A lie `a_row` bytes apart, B is in panels of `width` columns,
// `panel` floats from one to the next, `words` deep, at least one. Each sum goes along the depth without a break.
// Whole tiles of columns are read and written.
template <bool kAdd>
void amx_product(const char* a, int64_t a_row, int64_t rows, const float* b, int64_t panel, int width, int64_t words,
                 int64_t columns, float* c, int64_t c_row) {
  const int64_t whole = rows / (2 * kAmxRows) * (2 * kAmxRows);
  const int rest = static_cast<int>(rows - whole), rows0 = std::min(rest, kAmxRows);
  const int steps = static_cast<int>(words / kAmxWords), depth = static_cast<int>(words % kAmxWords);
  const auto along = [&](auto add, int64_t word, int depth, int steps) {
    const char* left = a + 4 * word;
    const float* right = b + word * width;
    amx_pass<add()>(left, a_row, right, panel, width, columns, c, c_row, 0, whole, kAmxRows, kAmxRows, depth, steps);
    amx_pass<add()>(left, a_row, right, panel, width, columns, c, c_row, whole, rows, rows0, rest - rows0, depth,
                    steps);
  };
  if (steps) along(std::integral_constant<bool, kAdd>{}, 0, kAmxWords, steps);
  if (depth && steps) along(std::true_type{}, words - depth, depth, 1);
  if (depth && !steps) along(std::integral_constant<bool, kAdd>{}, 0, depth, 1);
}

}  // namespace
}  // namespace pyattn::PYATTN_ISA
#endif
