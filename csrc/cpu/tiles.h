// The register tiles of attention: scores, online softmax and output of one tile, with all accumulators in registers.
//
// Lanes are queries, in panels of 16. A tile is kTileLanes queries wide: 4 panels with AVX-512, else 1; each function
// works on its first kVecs vectors. Buffers have a row of kTileLanes for each key, or for each word of a query or
// output. Scores live in units of log2: exp(x) = 2^(x log2 e).
#pragma once
#include <limits>
#include <type_traits>

#include "dropout.h"
#include "isa.h"
#include "vec.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int kPanel = 16;
constexpr int kPanelVecs = kPanel / kLanes;
constexpr int kTileLanes = kPanel * kMaxPanels;
constexpr int kMaxSum = 128;  // words of a score that are summed in one go
constexpr float kInf = std::numeric_limits<float>::infinity();

alignas(64) constexpr float kLaneNumbers[] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
    22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
    44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63,
};

PYATTN_INLINE int min_int(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }
PYATTN_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// limit * tanh(x): a minimax quotient on [-8.5, 8.5], beyond which tanh is 1 or -1; the relative error is 3.3e-7,
// nearly all of it from rounding.
class Softcap {
 public:
  float limit;  // 0: none

  explicit Softcap(float limit_) : limit(limit_) {
    constexpr float p[] = {0.99999998819563832f, 0.13413241658148256f, 3.5340205697322233e-3f, 2.12509402919037e-5f,
                           1.426908333487152e-8f};
    for (int i = 0; i < 5; ++i) numerator_[i] = limit * p[i];
  }

  PYATTN_INLINE vf operator()(vf x) const {
    constexpr float q[] = {1.f, 0.46746564396936674f, 2.6022727494148603e-2f, 3.348854490058273e-4f,
                           8.145064323308542e-7f};
    x = max(broadcast(-8.5f), min(broadcast(8.5f), x));
    const vf square = x * x;
    vf numerator = broadcast(numerator_[4]), denominator = broadcast(q[4]);
#pragma GCC unroll 8
    for (int i = 3; i >= 0; --i) {
      numerator = numerator * square + broadcast(numerator_[i]);
      denominator = denominator * square + broadcast(q[i]);
    }
    return divide(x * numerator, denominator);
  }

  // 1 - tanh(x)^2 = 4 u / (1 + u)^2 with u = exp(-2 |x|): as precise where tanh is nearly 1.
  static PYATTN_INLINE vf derivative(vf x) {
    const vf u = exp2(min(x, -x) * broadcast(2.88539008177792681f)), sum = 1 + u;  // 2 log2(e)
    return divide(4 * u, sum * sum);
  }

 private:
  float numerator_[5];
};

template <bool kIsDot>
PYATTN_INLINE vf multiply_add(vf c, vf a, vf b) {
#ifdef PYATTN_BF16_DOT
  if constexpr (kIsDot) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
  return c + a * b;
}

// Weights rounded for the dot product: as store_floats, but for subnormal numbers, which become 0.
PYATTN_INLINE void store_weights([[maybe_unused]] bf16* p, [[maybe_unused]] vf x) {
#ifdef PYATTN_BF16_DOT
  _mm256_store_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
#endif
}

#ifdef PYATTN_BF16_DOT
// Two halves of 16 bfloat16 become 16 pairs.
PYATTN_INLINE vf interleave(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vf)_mm512_permutexvar_epi16(order, halves);
}
#endif

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
// run would wait for each other. With kPairs a run begins at an even row.
template <bool kPairs = false, class F>
PYATTN_INLINE void for_row_tiles(int count, const F& f) {
  constexpr int kStep = kPairs ? 2 : 1;
  for (int i = 0; i < count;) {
    const int left = count - i, half = (left + 2 * kStep - 1) / (2 * kStep) * kStep;
    const int rows = left >= 2 * kMaxRows || left == kMaxRows ? kMaxRows : left > kMaxRows ? half : left;
    call_with_rows(rows, [&](auto constant) { f(i, constant); });
    i += rows;
  }
}

// Right operands of a product: vec(w, j) is vector j of row w, from_lane(n) the operand without its first n lanes.

// Rows of floats that lie `stride` floats apart.
struct EvenRows {
  const float* data;
  int64_t stride;

  PYATTN_INLINE vf vec(int w, int j) const { return load_unaligned(data + w * stride + j * kLanes); }
  EvenRows from_lane(int64_t lane) const { return {data + lane, stride}; }
};

// c[i][lane] += sum over words of a[i][word] * b[word][lane]. The rows of a lie `a_row` bytes apart, its words `a_word`
// bytes.
template <bool kIsDot, int kRows, int kVecs, class B>
PYATTN_INLINE void multiply(const char* a, int64_t a_row, int64_t a_word, const B& b, int words,
                            vf (&c)[kRows][kVecs]) {
#pragma GCC unroll 2
  for (int w = 0; w < words; ++w) {
    vf row[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) row[j] = b.vec(w, j);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const vf word = broadcast_word(a + i * a_row + w * a_word);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) c[i][j] = multiply_add<kIsDot>(c[i][j], word, row[j]);
    }
  }
}

// Calls done(c) with c[i][lane] = the product of row i of a, of `size` elements, and b[word][lane]. Long sums are made
// of partial sums of at most kMaxSum words, kept in `partial` [kRows][kTileLanes], since the error of a running sum
// grows with its length.
template <bool kIsDot, int kRows, int kVecs, class Done>
PYATTN_INLINE void row_products(const char* a, int64_t a_row, int size, const float* b, float* partial,
                                const Done& done) {
  const int words = kIsDot ? size / 2 : size;
  for (int first = 0;; first += kMaxSum) {
    const int count = words - first > kMaxSum ? kMaxSum : words - first;
    const bool last = first + count == words;
    vf c[kRows][kVecs] = {};
    multiply<kIsDot>(a + 4 * first, a_row, 4, EvenRows{b + first * kTileLanes, kTileLanes}, count, c);
    if (kIsDot && size % 2 && last) {
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        uint16_t half;
        std::memcpy(&half, a + i * a_row + 4 * words, 2);
        const vf word = broadcast(bits_to_float(half));
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j)
          c[i][j] = multiply_add<kIsDot>(c[i][j], word, load(b + words * kTileLanes + j * kLanes));
      }
    }
    if (first) {
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) c[i][j] += load(partial + i * kTileLanes + j * kLanes);
    }
    if (last) return done(c);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) store(partial + i * kTileLanes + j * kLanes, c[i][j]);
  }
}

// s[i][lane] = scale * (row i of k) . (query of the lane); raises `largest` to the scores.
template <bool kIsDot, int kRows, int kVecs>
PYATTN_INLINE void score_tile(const char* k, int64_t k_row, int size, const float* q, float scale, float* s,
                              vf (&largest)[kVecs]) {
  const auto scale_and_store = [&](const vf(&c)[kRows][kVecs]) __attribute__((always_inline)) {
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const vf x = c[i][j] * broadcast(scale);
        largest[j] = max(largest[j], x);
        store(s + i * kTileLanes + j * kLanes, x);
      }
    }
  };
  row_products<kIsDot, kRows, kVecs>(k, k_row, size, q, s, scale_and_store);
}

// o[i][lane] = o[i][lane] * alpha[lane] + sum over key rows of v[row][i] * p[row][lane]
template <bool kIsDot, int kRows, int kVecs>
PYATTN_INLINE void output_tile(const float* v, int64_t v_row, int rows, const float* p, const float* alpha, float* o) {
  vf c[kRows][kVecs] = {};
  multiply<kIsDot>(reinterpret_cast<const char*>(v), 4, 4 * v_row, EvenRows{p, kTileLanes}, rows, c);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      float* out = o + i * kTileLanes + j * kLanes;
      store(out, load(out) * load(alpha + j * kLanes) + c[i][j]);
    }
  }
}

// sums[i][lane] += sum over words of a[i][word] * b[word][lane], as in `multiply`.
template <bool kIsDot, int kRows, int kVecs, class B>
PYATTN_INLINE void add_product(const char* a, int64_t a_row, int64_t a_word, const B& b, int words, float* sums,
                               int64_t sums_row) {
  vf c[kRows][kVecs] = {};
  multiply<kIsDot>(a, a_row, a_word, b, words, c);
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      float* sum = sums + i * sums_row + j * kLanes;
      store(sum, load(sum) + c[i][j]);
    }
  }
}

// The same for `rows` rows and kVecs vectors of lanes.
template <bool kIsDot, int kVecs, class B>
__attribute__((noinline)) void add_product_panel(const char* a, int64_t a_row, int rows, const B& b, int words,
                                                 float* sums, int64_t sums_row) {
  for_row_tiles(rows, [&](int i, auto tile_rows) {
    add_product<kIsDot, tile_rows(), kVecs>(a + i * a_row, a_row, 4, b, words, sums + i * sums_row, sums_row);
  });
}

// The same for `vecs` vectors of lanes.
template <bool kIsDot, int kVecs = kTileLanes / kLanes, class B>
void add_products(const char* a, int64_t a_row, int rows, B b, int words, float* sums, int64_t sums_row, int vecs) {
  for (; vecs >= kVecs; vecs -= kVecs, b = b.from_lane(kVecs * kLanes), sums += kVecs * kLanes)
    add_product_panel<kIsDot, kVecs>(a, a_row, rows, b, words, sums, sums_row);
  if constexpr (kVecs > 1)
    if (vecs > 0) add_products<kIsDot, kVecs - 1>(a, a_row, rows, b, words, sums, sums_row, vecs);
}

// What makes scores of the products scale * q . k, in this order; what is 0 or null is left out. Rows are keys, and
// count from the first of a tile.
struct ScoreTerms {
  Softcap softcap;
  float scale;             // of the products
  float slope;             // ALiBi: -slope * |position of the lane's query - row|
  float position;          // of the query of lane 0
  const float* bias;       // [row][kTileLanes]
  const int32_t *lo, *hi;  // [lane]: the keys that each query may see
  int32_t key;             // of row 0

  bool any() const { return softcap.limit != 0 || slope != 0 || bias || lo; }
};

// The scores of rows [first, first + rows), which lie `stride` floats apart from s on, and -inf where masked: a masked
// score may have been NaN. Raises `largest` to them. The derivatives of the softcap go to `softcap_slope`, unless that
// is null.
template <bool kIsDot, int kVecs>
PYATTN_INLINE void finish_scores(float* s, int64_t stride, int first, int rows, const ScoreTerms& terms,
                                 vf (&largest)[kVecs], float* softcap_slope = nullptr) {
  const vf minus_inf = broadcast(-kInf);
  for (int r = first; r < first + rows; ++r, s += stride) {
    vf x[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) x[j] = load(s + j * kLanes);
    if (terms.softcap.limit != 0) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const vf product = x[j];
        x[j] = terms.softcap(product);
        if (!softcap_slope) continue;
        const vf ratio = x[j] * broadcast(1 / terms.softcap.limit);  // precise enough beside operands of 8 bits
        store(softcap_slope + (r - first) * stride + j * kLanes,
              kIsDot ? 1 - ratio * ratio : Softcap::derivative(product));
      }
    }
    if (terms.slope != 0) {
      const float position = terms.position - static_cast<float>(r);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const vf distance = load(kLaneNumbers + j * kLanes) + broadcast(position);
        x[j] -= broadcast(terms.slope) * max(distance, -distance);
      }
    }
    if (terms.bias) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const vf bias = load(terms.bias + r * kTileLanes + j * kLanes);
        x[j] = bias == minus_inf ? minus_inf : x[j] + bias;
      }
    }
    if (terms.lo) {
      const vi key = broadcast(terms.key + r);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j)
        x[j] = (key >= load(terms.lo + j * kLanes)) & (key < load(terms.hi + j * kLanes)) ? x[j] : minus_inf;
    }
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      largest[j] = max(largest[j], x[j]);
      store(s + j * kLanes, x[j]);
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
#ifdef PYATTN_BF16_DOT
    for (int r = 0; r < keys; r += 2) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        const float* pair = s + r * kTileLanes + j * kLanes;
        const vf a = exp2(load(pair) - shift[j]);
        const vf b = r + 1 < keys ? exp2(load(pair + kTileLanes) - shift[j]) : vf{};
        sum[j] += a + b;
        store(s + r / 2 * kTileLanes + j * kLanes, interleave((__m512i)_mm512_cvtne2ps_pbh(b, a)));
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

// What ends a row: its lse, and what its output must be multiplied by. A sink is one more weight, without a value.
struct RowEnd {
  float lse, factor;

  RowEnd(float row_max, float row_sum, float sink) {
    constexpr double kLn2 = 0.69314718055994531;
    const double log_max = static_cast<double>(row_max) * kLn2;
    if (sink == -kInf) {
      lse = static_cast<float>(log_max + std::log2(row_sum) * kLn2);
      factor = row_sum == 0 ? 0 : 1 / row_sum;
      return;
    }
    const double top = std::fmax(log_max, sink), share = std::exp(log_max - top);
    const double sum = row_sum * share + std::exp(sink - top);
    lse = static_cast<float>(top + std::log(sum));
    factor = static_cast<float>(share / sum);
  }
};

// The weights of keys [key, key + keys), as softmax_step leaves them, for the lanes from query `query` on: 0 where
// dropped.
template <bool kIsDot, int kVecs>
PYATTN_INLINE void drop_weights(const Dropout& dropout, int64_t query, int64_t key, int keys, float* s) {
  dropout.for_pairs<kVecs>(query, key, keys, [&](int r, int j, vi keep, vi keep_next) __attribute__((always_inline)) {
    float* weight = s + (kIsDot ? r / 2 : r) * kTileLanes + j * kLanes;
    if constexpr (kIsDot) {
      store(weight, (vf)((vi)load(weight) & ((keep & 0xffff) | (keep_next << 16))));
    } else {
      store(weight, (vf)((vi)load(weight) & keep));
      if (r + 1 < keys) store(weight + kTileLanes, (vf)((vi)load(weight + kTileLanes) & keep_next));
    }
  });
}

}  // namespace
}  // namespace pyattn::PYATTN_ISA
