// The register tiles of decoding: products of few queries and a run of keys, and of their weights and a run of values,
// in the order in which these lie in memory.
#pragma once
// The cores that have AMX add up products of floats twice as fast as those of pairs of bfloat16 (VDPBF16PS).
#define PYATTN_NO_DOT_BESIDE_AMX
#include "blocks.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int kChunk = 1024;  // keys between two merges
#if defined(PYATTN_ISA_AVX512) || defined(PYATTN_ISA_AVX512_AMX)
constexpr bool kIntel = true;  // AMD's processors with AVX-512 have its bfloat16, and no AMX
#else
constexpr bool kIntel = false;
#endif
// Keys of a run at the most, where there are few queries. The sums of values are made run by run.
constexpr int kKeyRun = kIntel ? 64 : 16, kValueRun = 16;
constexpr int kRow = kChunk + 2 * kPanel;  // of scores: rows a power of two apart would share a set of the cache
constexpr int kAccumulators = kMaxRows * kTileLanes / kLanes;  // sums that are kept in registers

template <class T>
constexpr int kElements = kDot<T> ? 2 * kLanes : kLanes;  // of a vector of words

// Neighbours among the keys, or values, of one head.
template <class T>
struct Run {
  const T* rows;
  int64_t stride;
};

// The rows that are read next, if the processor must be asked to fetch them.
template <class T>
struct Coming {
  const T* rows;  // or null
  int64_t stride;
  int count, size;

  // Asks for rows [first, end). Inlined, or the compiler takes it for a function without an effect.
  PYATTN_INLINE void ask(int first, int end) const {
    if (!rows) return;
    for (int r = first; r < end && r < count; ++r)
      for (int e = 0; e < size; e += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(rows + r * stride + e);
  }
};

// sums[i][r] = query i times key r, lane by lane, for kRows of the queries of a head; q is [vector][query of the head].
// A query has `size` elements, whole vectors, which lie q_vectors apart.
template <int kRows, int kKeys, class T, class Operand>
PYATTN_INLINE void key_products(const T* keys, int64_t stride, const Operand* q, int64_t q_vectors, int64_t size,
                                vf* sums) {
  vf c[kRows][kKeys] = {};
#pragma GCC unroll 2
  for (int64_t e = 0; e < size; e += kElements<T>, q += q_vectors) {
    vf key[kKeys];
#pragma GCC unroll 4
    for (int r = 0; r < kKeys; ++r) key[r] = load_words(keys + r * stride + e);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const vf query = load_unaligned(q + i * kElements<T>);
#pragma GCC unroll 4
      for (int r = 0; r < kKeys; ++r) c[i][r] = multiply_add<kDot<T>>(c[i][r], query, key[r]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < kKeys; ++r) sums[i * kKeyRun + r] = c[i][r];
}

// s[i][r] = scale * sums[i][r], summed over the lanes, for whole vectors of keys up to `end`.
template <int kRows>
PYATTN_INLINE void sum_products(const vf* sums, int end, float scale, float* s) {
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    for (int lane = 0; lane < end; lane += kLanes) {
      vf of_keys[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) of_keys[r] = sums[i * kKeyRun + lane + r];
      store(s + i * kRow + lane, sum_lanes(of_keys) * broadcast(scale));
    }
  }
}

// The values of a run as the right operand. With the dot product its rows are pairs of keys, which begin at `first` and
// `second`, made in registers, in the order of columns that takes one instruction a vector: see `column`.
template <class T>
struct Values {
  const T *first, *second;
  int64_t stride;
  int lane;

  PYATTN_INLINE vf vec(int w, int j) const {
#ifdef PYATTN_BF16_DOT
    if constexpr (kDot<T>) {
      const int64_t at = w * stride + (lane + j * kLanes) / (2 * kLanes) * 2 * kLanes;
      const __m512i a = _mm512_loadu_si512(first + at), b = _mm512_loadu_si512(second + at);
      return (vf)(j % 2 ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b));
    }
#endif
    return load_floats(first + w * stride + lane + j * kLanes);
  }
  Values from_lane(int more) const { return {first, second, stride, lane + more}; }
};

// sums[i] += the weights of row i times the values, of `vecs` vectors, for kRows rows.
template <int kRows, int kVecs, class T>
PYATTN_INLINE void add_value_products(const char* weights, Values<T> values, const Coming<T>& coming, int words,
                                      float* sums, int64_t sums_row, int vecs) {
  constexpr int64_t kWeightsRow = kRow * (kDot<T> ? 2 : 4);
  const int more = coming.rows ? (coming.count * kVecs + vecs - 1) / vecs : 0;
  int asked = 0;
  for (; vecs >= kVecs; vecs -= kVecs, values = values.from_lane(kVecs * kLanes), sums += kVecs * kLanes) {
    coming.ask(asked, asked + more);
    asked += more;
    add_product<kDot<T>, kRows, kVecs>(weights, kWeightsRow, 4, values, words, sums, sums_row);
  }
  if constexpr (kVecs > 1)
    if (vecs > 0) add_value_products<kRows, kVecs - 1>(weights, values, {}, words, sums, sums_row, vecs);
}

// The vectors of a value that are added up at once for so many rows; even, for pairs.
constexpr int vecs_of(int rows) { return rows * 8 <= kAccumulators ? 8 : rows * 4 <= kAccumulators ? 4 : 2; }

// Where element e of a value stands in a row of the output.
template <class T>
constexpr int64_t column(int64_t e) {
  return kDot<T> ? e / 32 * 32 + e % 8 / 4 * 16 + e % 32 / 8 * 4 + e % 4 : e;
}

}  // namespace
}  // namespace pyattn::PYATTN_ISA
