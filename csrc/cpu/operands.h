// The operands as the tiles read them: queries and masks transposed, 16-bit keys and values converted to float, or
// values interleaved in pairs of keys for the bfloat16 dot product.
#pragma once
#include <type_traits>

#include "../params.h"
#include "tiles.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kMinBias = -2.3e38f;  // finite biases are clamped here: times log2(e) it is still finite

template <class T>
constexpr bool kDot = kHasBf16Dot && std::is_same_v<T, bf16>;

// Calls f with a value of the element type.
template <class F>
PYATTN_INLINE void with_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32) f(float{});
  if (dtype == DType::bf16) f(bf16{});
  if (dtype == DType::f16) f(f16{});
}
template <class F>
PYATTN_INLINE void with_mask_dtype(DType dtype, const F& f) {
  if (dtype == DType::boolean) return f(bool{});
  with_dtype(dtype, f);
}

// Words of a transposed query: floats, or pairs of bfloat16. Whole vectors of them, so that transposes need no end.
template <bool kIsDot>
PYATTN_INLINE int64_t query_words(int64_t D) {
  return round_up(kIsDot ? (D + 1) / 2 : D, kLanes);
}

// kLanes words: floats, or pairs of bfloat16 along the row.
template <class T>
PYATTN_INLINE vf load_words(const T* row) {
  if constexpr (kDot<T>)
    return load_unaligned(row);
  else
    return load_floats(row);
}

// Rows of queries, or of keys in the place of queries, transposed to [tile][word][lane]; words past the end and lanes
// past `rows`, up to whole panels, are 0. row(i) points to row i.
template <class T, class Row>
PYATTN_INLINE void pack_rows(const Row& row, int rows, int size, float* out) {
  constexpr int kColumns = kLanes * (kDot<T> ? 2 : 1);  // of a square block of words
  const int64_t words = query_words<kDot<T>>(size);
  for (int lane = 0; lane < round_up(rows, kPanel); lane += kLanes) {
    float* column = out + lane / kTileLanes * words * kTileLanes + lane % kTileLanes;
    for (int first = 0; first < size; first += kColumns, column += kLanes * kTileLanes) {
      vf block[kLanes];
      if (lane + kLanes <= rows && first + kColumns <= size) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = load_words(row(lane + i) + first);
      } else {
        alignas(64) T padded[kColumns];
        const size_t bytes = static_cast<size_t>(min_int(kColumns, size - first)) * sizeof(T);
        for (int i = 0; i < kLanes; ++i) {
          for (int c = 0; c < kColumns; ++c) padded[c] = T{};
          if (lane + i < rows) std::memcpy(padded, row(lane + i) + first, bytes);
          block[i] = load_words(padded);
        }
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(column + i * kTileLanes, block[i]);
    }
  }
}

template <class T>
void pack_queries(const T* query, int64_t stride, int rows, int size, float* out) {
  pack_rows<T>([=](int i) { return query + i * stride; }, rows, size, out);
}

template <class T>
PYATTN_INLINE void convert_row(const T* in, int size, float* out) {
  int e = 0;
  for (; e + kLanes <= size; e += kLanes) store_unaligned(out + e, load_floats(in + e));
  for (; e < size; ++e) out[e] = to_float(in[e]);
}

template <class T>
void convert_rows(const T* in, int64_t stride, int rows, int size, float* out, int64_t out_stride) {
  for (int r = 0; r < rows; ++r) convert_row(in + r * stride, size, out + r * out_stride);
}

// out = factor * in, which is aligned
template <class T>
PYATTN_INLINE void store_row(const float* in, int size, float factor, T* out) {
  int e = 0;
  for (; e + kLanes <= size; e += kLanes) store_floats(out + e, load(in + e) * broadcast(factor));
  for (; e < size; ++e) from_float(in[e] * factor, out[e]);
}

// Zeros in the first `lanes` lanes, whole panels, of columns [tile][size rounded up to kLanes][kTileLanes].
[[maybe_unused]] void clear_columns(float* columns, int lanes, int64_t size) {
  for (int lane = 0; lane < lanes; lane += kLanes) {
    float* column = columns + lane / kTileLanes * round_up(size, kLanes) * kTileLanes + lane % kTileLanes;
    for (int64_t e = 0; e < round_up(size, kLanes); ++e) store(column + e * kTileLanes, vf{});
  }
}

// Two rows become one row of pairs; b may be null and counts as zeros.
PYATTN_INLINE void interleave_pair(const bf16* a, const bf16* b, int64_t size, float* out) {
  uint32_t* words = reinterpret_cast<uint32_t*>(out);
  int64_t e = 0;
#ifdef PYATTN_AVX512
  constexpr int kElements = 2 * kLanes;
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(kLanes));
  for (; e + kElements <= size; e += kElements) {
    const __m512i low = _mm512_loadu_si512(a + e), high = b ? _mm512_loadu_si512(b + e) : _mm512_setzero_si512();
    _mm512_storeu_si512(words + e, _mm512_permutex2var_epi16(low, first, high));
    _mm512_storeu_si512(words + e + kLanes, _mm512_permutex2var_epi16(low, second, high));
  }
#endif
  for (; e < size; ++e) words[e] = a[e].bits | uint32_t{b ? b[e].bits : uint16_t{0}} << 16;
}

// Pairs of rows become rows of pairs; an odd last row is paired with zeros.
[[maybe_unused]] void interleave_rows(const bf16* in, int64_t stride, int64_t rows, int64_t size, float* out,
                                      int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += 2, out += out_stride)
    interleave_pair(in + r * stride, r + 1 < rows ? in + (r + 1) * stride : nullptr, size, out);
}

// out[row][word] = in[word][row], in whole squares of lanes.
[[maybe_unused]] void transpose_words(const float* in, int64_t in_row, int64_t words, int64_t rows, float* out,
                                      int64_t out_row) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t w = 0; w < words; w += kLanes) {
      vf block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(in + (w + i) * in_row + r);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes && r + i < rows; ++i) store(out + (r + i) * out_row + w, block[i]);
    }
  }
}

// The first `rows` lanes of columns [size][kTileLanes], each times its factor, as rows of the tensor.
template <class T>
void store_transposed(const float* columns, const float* factor, int rows, int size, T* out, int64_t stride) {
  for (int lane = 0; lane < rows; lane += kLanes) {
    const float* column = columns + lane / kTileLanes * round_up(size, kLanes) * kTileLanes + lane % kTileLanes;
    const vf lane_factor = load(factor + lane);
    for (int e = 0; e < size; e += kLanes, column += kLanes * kTileLanes) {
      vf block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(column + i * kTileLanes) * lane_factor;
      transpose(block);
      T* corner = out + lane * stride + e;
      const bool whole = lane + kLanes <= rows && e + kLanes <= size;
      alignas(64) T padded[kLanes * kLanes];
      T* to = whole ? corner : padded;
      const int64_t to_stride = whole ? stride : kLanes;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_floats(to + i * to_stride, block[i]);
      if (whole) continue;
      for (int i = 0; i < kLanes && lane + i < rows; ++i)
        for (int c = 0; c < kLanes && e + c < size; ++c) corner[i * stride + c] = padded[i * kLanes + c];
    }
  }
}

PYATTN_INLINE bool not_finite(float x) { return (float_to_bits(x) & 0x7f800000) == 0x7f800000; }
PYATTN_INLINE bool not_finite(bf16 x) { return (x.bits & 0x7f80) == 0x7f80; }
PYATTN_INLINE bool not_finite(f16 x) { return (x.bits & 0x7c00) == 0x7c00; }

template <class M>
PYATTN_INLINE float bias_of(M x) {
  const float bias = to_float(x);
  return bias == -kInf ? bias : (bias < kMinBias ? kMinBias : bias) * kLog2e;
}
PYATTN_INLINE float bias_of(bool attend) { return attend ? 0.f : -kInf; }

// attn_mask of `keys` keys and the tile's queries, transposed to [key][lane] and in log2 units.
template <class M>
void load_bias(const M* mask, int64_t stride_q, int64_t stride_k, int queries, int keys, float* bias) {
  if (stride_q == 0) {
    for (int r = 0; r < keys; ++r) {
      const vf value = broadcast(bias_of(mask[r * stride_k]));
      for (int lane = 0; lane < kTileLanes; lane += kLanes) store(bias + r * kTileLanes + lane, value);
    }
    return;
  }
  for (int lane = 0; lane < kTileLanes && lane < queries; lane += kLanes) {
    for (int r = 0; r < keys; r += kLanes) {
      alignas(64) float values[kLanes][kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const M* row = mask + (lane + i) * stride_q + r * stride_k;
        const int count = lane + i < queries ? min_int(kLanes, keys - r) : 0;
        if (stride_k == 1 && count == kLanes) {
          for (int j = 0; j < kLanes; ++j) values[i][j] = bias_of(row[j]);
        } else {
          for (int j = 0; j < kLanes; ++j) values[i][j] = j < count ? bias_of(row[j * stride_k]) : 0;
        }
      }
      vf block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(values[i]);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(bias + (r + i) * kTileLanes + lane, block[i]);
    }
  }
}

[[maybe_unused]] void load_bias(const AttentionParams& p, const char* mask, int64_t query, int64_t key, int queries,
                                int keys, float* bias) {
  const int64_t offset = query * p.mask_stride_q + key * p.mask_stride_k;
  with_mask_dtype(p.mask_dtype, [&](auto element) {
    const auto* first = reinterpret_cast<const decltype(element)*>(mask) + offset;
    load_bias(first, p.mask_stride_q, p.mask_stride_k, queries, keys, bias);
  });
}

}  // namespace
}  // namespace pyattn::PYATTN_ISA
