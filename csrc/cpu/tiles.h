// The register tiles of attention: scores, online softmax and output of one tile, with all accumulators in registers.
//
// Lanes are queries, in panels of 16. A tile is kTileLanes queries wide: 4 panels with AVX-512, else 1; each function
// works on its first kVecs vectors. Buffers have a row of kTileLanes for each key, or for each word of a query or
// output. Scores live in units of log2: exp(x) = 2^(x log2 e).
#pragma once
#include <limits>
#include <type_traits>

#include "isa.h"
#include "vec.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int kPanel = 16;
constexpr int kPanelVecs = kPanel / kLanes;
constexpr int kTileLanes = kPanel * kMaxPanels;
constexpr int kMaxSum = 128;  // words of a score that are summed in one go
constexpr float kInf = std::numeric_limits<float>::infinity();

PYATTN_INLINE int min_int(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }
PYATTN_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <bool kIsDot>
PYATTN_INLINE vf multiply_add(vf c, vf a, vf b) {
#ifdef PYATTN_ISA_AVX512_BF16
  if constexpr (kIsDot) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
  return c + a * b;
}

// A 32-bit word, a float or a pair of bfloat16, into every lane.
PYATTN_INLINE vf broadcast_word(const char* p) {
  float word;
  std::memcpy(&word, p, 4);
  return broadcast(word);
}

// Calls f with rows, of at most kMaxRows, as a compile-time constant.
template <int kRows = kMaxRows, class F>
PYATTN_INLINE void call_with_rows(int rows, const F& f) {
  if (rows == kRows)
    f(std::integral_constant<int, kRows>{});
  else if constexpr (kRows > 1)
    call_with_rows<kRows - 1>(rows, f);
}

// Calls f(first, rows) over runs of at most kMaxRows that are as even as they can be: the accumulators of a short last
// run would wait for each other.
template <class F>
PYATTN_INLINE void for_row_tiles(int count, const F& f) {
  for (int i = 0; i < count;) {
    const int left = count - i;
    const int rows = left >= 2 * kMaxRows || left == kMaxRows ? kMaxRows : left > kMaxRows ? (left + 1) / 2 : left;
    call_with_rows(rows, [&](auto constant) { f(i, constant); });
    i += rows;
  }
}

// s[i][lane] = scale * sum over words of k[i][word] * q[word][lane]; raises `largest` to the scores. Long
// sums are made of partial sums of at most kMaxSum words, since the error of a running sum grows with its
// length.
template <bool kIsDot, int kRows, int kVecs>
PYATTN_INLINE void score_tile(const char* k, int64_t row_bytes, int size, const float* q, float scale, float* s,
                              vf (&largest)[kVecs]) {
  vf c[kRows][kVecs];
  const auto step = [&](const float* q_row, const auto& word) __attribute__((always_inline)) {
    vf b[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) b[j] = load(q_row + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const vf a = word(k + i * row_bytes);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) c[i][j] = multiply_add<kIsDot>(c[i][j], a, b[j]);
    }
  };
  const int words = kIsDot ? size / 2 : size;
  int w = 0;
  do {
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) c[i][j] = vf{};
    const int first = w, end = words - w > kMaxSum ? w + kMaxSum : words;
#pragma GCC unroll 2
    for (; w < end; ++w)
      step(q + w * kTileLanes,
           [w](const char* row) __attribute__((always_inline)) { return broadcast_word(row + 4 * w); });
    if (kIsDot && size % 2 && w == words) {
      step(q + words * kTileLanes, [words](const char* row) __attribute__((always_inline)) {
        uint16_t last;
        std::memcpy(&last, row + 4 * words, 2);
        return broadcast(bits_to_float(last));
      });
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        float* score = s + i * kTileLanes + j * kLanes;
        if (first) c[i][j] += load(score);
        if (w < words) {
          store(score, c[i][j]);
        } else {
          const vf x = c[i][j] * broadcast(scale);
          largest[j] = max(largest[j], x);
          store(score, x);
        }
      }
    }
  } while (w < words);
}

// o[i][lane] = o[i][lane] * alpha[lane] + sum over key rows of v[row][i] * p[row][lane]
template <bool kIsDot, int kRows, int kVecs>
PYATTN_INLINE void output_tile(const float* v, int64_t v_row, int rows, const float* p, const float* alpha, float* o) {
  vf c[kRows][kVecs] = {};
#pragma GCC unroll 2
  for (int r = 0; r < rows; ++r) {
    vf b[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) b[j] = load(p + r * kTileLanes + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const vf a = broadcast_word(reinterpret_cast<const char*>(v + r * v_row + i));
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) c[i][j] = multiply_add<kIsDot>(c[i][j], a, b[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      float* out = o + i * kTileLanes + j * kLanes;
      store(out, load(out) * load(alpha + j * kLanes) + c[i][j]);
    }
  }
}

// Scores plus bias, -inf where masked; `largest` anew. A masked score may have been NaN.
template <int kVecs>
PYATTN_INLINE void mask_scores(float* s, const float* bias, const int32_t* lo, const int32_t* hi, int32_t key, int keys,
                               vf (&largest)[kVecs]) {
  const vf minus_inf = broadcast(-kInf);
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) largest[j] = minus_inf;
  for (int r = 0; r < keys; ++r) {
    const vi this_key = broadcast(key + r);
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      float* score = s + r * kTileLanes + j * kLanes;
      vf x = load(score);
      if (bias) {
        const vf b = load(bias + r * kTileLanes + j * kLanes);
        x = b == minus_inf ? minus_inf : x + b;
      }
      x = (this_key >= load(lo + j * kLanes)) & (this_key < load(hi + j * kLanes)) ? x : minus_inf;
      largest[j] = max(largest[j], x);
      store(score, x);
    }
  }
}

// Scores to weights 2^(score - maximum), in place: floats, or with the dot product pairs of bfloat16, of
// which row r holds keys 2r and 2r + 1. Updates maximum and sum.
template <bool kIsDot, int kVecs>
PYATTN_INLINE void softmax_step(float* s, int keys, const vf (&largest)[kVecs], float* row_max, float* row_sum,
                                float* alpha) {
  const vf minus_inf = broadcast(-kInf);
  vf shift[kVecs], sum[kVecs] = {};
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) {
    const vf before = load(row_max + j * kLanes), now = max(before, largest[j]);
    store(row_max + j * kLanes, now);
    shift[j] = now == minus_inf ? vf{} : now;
    store(alpha + j * kLanes, exp2(before - shift[j]));
  }
  if constexpr (kIsDot) {
#ifdef PYATTN_ISA_AVX512_BF16
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int r = 0; r < keys; r += 2) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const float* pair = s + r * kTileLanes + j * kLanes;
        const vf a = exp2(load(pair) - shift[j]);
        const vf b = r + 1 < keys ? exp2(load(pair + kTileLanes) - shift[j]) : vf{};
        sum[j] += a + b;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        store(s + r / 2 * kTileLanes + j * kLanes, (vf)_mm512_permutexvar_epi16(interleave, both));
      }
    }
#endif
  } else {
    for (int r = 0; r < keys; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        float* score = s + r * kTileLanes + j * kLanes;
        const vf weight = exp2(load(score) - shift[j]);
        sum[j] += weight;
        store(score, weight);
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j)
    store(row_sum + j * kLanes, load(row_sum + j * kLanes) * load(alpha + j * kLanes) + sum[j]);
}

}  // namespace
}  // namespace pyattn::PYATTN_ISA
