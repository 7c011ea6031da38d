// Attention of few queries against many keys: what decoding with a KV cache does, and what it costs is reading K and V.
//
// The queries of all query heads that share a key head are the `rows`, so each key and value is read from memory once.
// The keys are split into chunks of kChunk; the chunks of a head are merged by their maxima and sums in rising order,
// whoever computes them (pipeline.h): the bits do not depend on the number of threads. Within a chunk, kStep keys at a
// time:
//
//   scores    lanes are the elements of a head: kLanes keys by one row, then the sums over the lanes of all of them
//   softmax   online, as in the forward
//   output    lanes are the elements of a value: kMaxRows rows by 4 vectors in registers
//
// Keys are addressed one by one, so pages (block_table) are read where they lie. 16-bit values are converted to float,
// or interleaved in pairs of keys for the bfloat16 dot product, a step at a time.
#include <cmath>

#include "../pipeline.h"
#include "../scratch.h"
#include "blocks.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int kChunk = 1024;
constexpr int kStep = 64;  // a bit of a word for each key
constexpr double kLn2 = 0.69314718055994531;

// An online softmax under way: maxima in log2 units, sums, and outputs not yet divided by them.
struct Partial {
  float *row_max, *row_sum;  // [rows]
  float* o;                  // [rows][o_row]
};

struct Workspace {
  int rows;          // queries of all heads that share a key head
  int64_t q_row;     // elements of a row of q: D in whole vectors
  int64_t o_row;     // floats of a row of the output: Dv in whole vectors
  void* q;           // [rows][q_row]: the queries, padded with zeros
  float* s;          // [rows][kStep]: scores, then weights
  bf16* half;        // [rows][kStep]: the weights, with the dot product
  float* k;          // [kStep][q_row]: keys converted to float
  float* v;          // [kStep][o_row]: values converted to float, or interleaved in pairs
  uint64_t* live;    // [rows]: the keys that a row sees, where some value is not finite
  void* zeros;       // stands for a row that must not be read
  int32_t *lo, *hi;  // [rows]: the key range of each row
  Partial chunk;
  Partial head;  // of the head that the thread owns

  size_t carve(void* base, const AttentionParams& p) {
    const bool dot = kHasBf16Dot && p.dtype == DType::bf16;
    rows = static_cast<int>(p.Hq / p.Hkv * p.Lq);
    q_row = round_up(p.D, dot ? 2 * kLanes : kLanes);
    o_row = round_up(p.Dv, kLanes);
    Carver carver(base);
    q = carver.take<float>(rows * q_row);
    s = carver.take<float>(rows * kStep);
    half = carver.take<bf16>(dot ? rows * kStep : 0);
    k = carver.take<float>(p.dtype == DType::f32 ? 0 : kStep * q_row);
    v = carver.take<float>(kStep * o_row);
    live = carver.take<uint64_t>(rows);
    zeros = carver.take<float>(q_row > o_row ? q_row : o_row);
    lo = carver.take<int32_t>(rows);
    hi = carver.take<int32_t>(rows);
    for (Partial* partial : {&chunk, &head}) {
      partial->row_max = carver.take<float>(rows);
      partial->row_sum = carver.take<float>(rows);
      partial->o = carver.take<float>(rows * o_row);
    }
    return carver.used();
  }

  explicit Workspace(const AttentionParams& p) {
    carve(thread_scratch(carve(nullptr, p)), p);
    std::memset(zeros, 0, static_cast<size_t>(q_row > o_row ? q_row : o_row) * sizeof(float));
  }

  void clear(const Partial& partial) const {
    for (int i = 0; i < rows; ++i) {
      partial.row_max[i] = -kInf;
      partial.row_sum[i] = 0;
    }
    std::memset(partial.o, 0, static_cast<size_t>(rows * o_row) * sizeof(float));
  }

  // Raises the maximum of row i to `largest`, if that is more. Returns what to subtract from scores: it, or 0 for -inf.
  float raise_maximum(const Partial& partial, int i, float largest) const {
    const float before = partial.row_max[i];
    if (!(largest > before)) return before == -kInf ? 0 : before;
    const float alpha = std::exp2(before - largest);
    partial.row_max[i] = largest;
    partial.row_sum[i] *= alpha;
    for (int64_t e = 0; e < o_row; e += kLanes) {
      float* o = partial.o + i * o_row + e;
      store(o, load(o) * broadcast(alpha));
    }
    return largest;
  }

  // head += chunk
  void merge(const Partial& sums) const {
    for (int i = 0; i < rows; ++i) {
      const float factor = std::exp2(chunk.row_max[i] - raise_maximum(sums, i, chunk.row_max[i]));
      sums.row_sum[i] += factor * chunk.row_sum[i];
      for (int64_t e = 0; e < o_row; e += kLanes) {
        float* o = sums.o + i * o_row + e;
        store(o, load(o) + load(chunk.o + i * o_row + e) * broadcast(factor));
      }
    }
  }
};

// The scores of kLanes keys and one row: q is padded to whole vectors, the keys are not.
template <class T>
PYATTN_INLINE vf key_scores(const T* q, const T* const* keys, int size) {
  constexpr int kElements = kLanes * 4 / static_cast<int>(sizeof(T));
  const int whole = size / kElements * kElements;
  vf sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const T* key = keys[i];
    vf sum = {};
    for (int e = 0; e < whole; e += kElements)
      sum = multiply_add<kDot<T>>(sum, load_unaligned(q + e), load_unaligned(key + e));
    if (whole < size) sum = multiply_add<kDot<T>>(sum, load_unaligned(q + whole), load_some(key + whole, size - whole));
    sums[i] = sum;
  }
  return sum_lanes(sums);
}

// One key head of one sample.
template <class T>
struct Head {
  using Operand = std::conditional_t<kDot<T>, bf16, float>;  // what scores are made of

  const AttentionParams& p;
  const Workspace& w;
  int64_t b, first_head;
  KeyRows<T> keys, values;

  Head(const AttentionParams& p_, const Workspace& w_, int64_t unit)
      : p(p_),
        w(w_),
        b(unit / p_.Hkv),
        first_head(unit % p_.Hkv * (p_.Hq / p_.Hkv)),
        keys(p_, p_.key, p_.key_stride, b, unit % p_.Hkv),
        values(p_, p_.value, p_.value_stride, b, unit % p_.Hkv) {}

  template <class U>
  U* row_of(void* tensor, const Strides& stride, int i) const {
    return static_cast<U*>(tensor) + b * stride.b + (first_head + i / p.Lq) * stride.h + i % p.Lq * stride.l;
  }

  // Chunk number n into w.chunk; false if no row sees a key of it.
  bool chunk(int64_t n) const {
    const KeyRanges ranges(p, b);
    const int64_t first = ranges.row(0).lo + n * kChunk, end = ranges.row(p.Lq - 1).hi;
    if (first >= end) return false;
    Operand* q = static_cast<Operand*>(w.q);
    for (int i = 0; i < w.rows; ++i, q += w.q_row) {
      const T* query = row_of<const T>(const_cast<void*>(p.query), p.query_stride, i);
      if constexpr (kDot<T>)
        std::memcpy(q, query, static_cast<size_t>(p.D) * sizeof(T));
      else
        convert_row(query, static_cast<int>(p.D), q);
      for (int64_t e = p.D; e < w.q_row; ++e) q[e] = Operand{};
      const KeyRange range = ranges.row(i % p.Lq);
      w.lo[i] = static_cast<int32_t>(range.lo);
      w.hi[i] = static_cast<int32_t>(range.hi);
    }
    w.clear(w.chunk);
    const int64_t last = first + kChunk < end ? first + kChunk : end;
    for (int64_t key = first; key < last; key += kStep) step(key, min_int(kStep, last - key));
    return true;
  }

  void step(int64_t first, int count) const {
    const T* v_rows[kStep];
    values.for_each(first, count, [&](int r, const T* row) { v_rows[r] = row; });
    scores(first, count);
    bool masked = p.mask != nullptr;
    for (int i = 0; i < p.Lq; ++i) masked |= w.lo[i] > first || w.hi[i] < first + count;
    uint64_t hidden = 0;
    if (masked) {
      mask_scores(first, count);
      hidden = hide(v_rows, count);
    }
    weights(count);
    outputs(v_rows, count);
    if (hidden) add_hidden(first, hidden);
  }

  void scores(int64_t first, int count) const {
    const Operand* rows[kStep];
    keys.for_each(first, count, [&](int r, const T* row) {
      if constexpr (std::is_same_v<T, Operand>) {
        rows[r] = row;
      } else {
        convert_row(row, static_cast<int>(p.D), w.k + r * w.q_row);
        rows[r] = w.k + r * w.q_row;
      }
    });
    const int whole = static_cast<int>(round_up(count, kLanes));
    for (int r = count; r < whole; ++r) rows[r] = rows[0];
    const vf scale = broadcast(p.scale * kLog2e);
    for (int r = 0; r < whole; r += kLanes) {
      const Operand* q = static_cast<const Operand*>(w.q);
      for (int i = 0; i < w.rows; ++i, q += w.q_row)
        store(w.s + i * kStep + r, key_scores(q, rows + r, static_cast<int>(p.D)) * scale);
    }
    for (int i = 0; i < w.rows; ++i)
      for (int r = count; r < whole; ++r) w.s[i * kStep + r] = -kInf;
  }

  // Scores plus bias, -inf where masked. A masked score may have been NaN.
  void mask_scores(int64_t first, int count) const {
    for (int i = 0; i < w.rows; ++i) {
      float* s = w.s + i * kStep;
      if (p.mask) {
        const int64_t offset = b * p.mask_stride_b + (first_head + i / p.Lq) * p.mask_stride_h +
                               i % p.Lq * p.mask_stride_q + first * p.mask_stride_k;
        with_mask_dtype(p.mask_dtype, [&](auto element) {
          const auto* mask = static_cast<const decltype(element)*>(p.mask) + offset;
          for (int r = 0; r < count; ++r) {
            const float bias = bias_of(mask[r * p.mask_stride_k]);
            s[r] = bias == -kInf ? bias : s[r] + bias;
          }
        });
      }
      for (int r = 0; r < count; ++r)
        if (first + r < w.lo[i] || first + r >= w.hi[i]) s[r] = -kInf;
    }
  }

  // 0 * NaN is NaN: puts zeros in the place of values that are not finite, and returns which these are.
  uint64_t hide(const T** v_rows, int count) const {
    uint64_t hidden = 0;
    for (int r = 0; r < count; ++r) {
      int any = 0;
      for (int e = 0; e < p.Dv; ++e) any |= not_finite(v_rows[r][e]);
      if (!any) continue;
      hidden |= uint64_t{1} << r;
      v_rows[r] = static_cast<const T*>(w.zeros);
    }
    for (int i = 0; hidden && i < w.rows; ++i) {
      w.live[i] = 0;
      for (int r = 0; r < count; ++r) w.live[i] |= uint64_t{w.s[i * kStep + r] != -kInf} << r;
    }
    return hidden;
  }

  // Adds them for the rows that do see them.
  void add_hidden(int64_t first, uint64_t hidden) const {
    for (int r = 0; r < kStep; ++r) {
      if (!(hidden >> r & 1)) continue;
      values.for_each(first + r, 1, [&](int, const T* value) {
        for (int i = 0; i < w.rows; ++i)
          for (int e = 0; e < p.Dv && (w.live[i] >> r & 1); ++e)
            w.chunk.o[i * w.o_row + e] += w.s[i * kStep + r] * to_float(value[e]);
      });
    }
  }

  // Scores to weights 2^(score - maximum), in place and, with the dot product, in `half`.
  void weights(int count) const {
    for (int i = 0; i < w.rows; ++i) {
      float* s = w.s + i * kStep;
      vf largest = load(s), sum = {};
      for (int r = kLanes; r < count; r += kLanes) largest = max(largest, load(s + r));
      float row_max = largest[0];
      for (int j = 1; j < kLanes; ++j) row_max = largest[j] > row_max ? largest[j] : row_max;
      const vf shift = broadcast(w.raise_maximum(w.chunk, i, row_max));
      for (int r = 0; r < count; r += kLanes) {
        const vf weight = exp2(load(s + r) - shift);
        sum += weight;
        store(s + r, weight);
        if constexpr (kDot<T>) store_floats(w.half + i * kStep + r, weight);
      }
      for (int j = 0; j < kLanes; ++j) w.chunk.row_sum[i] += sum[j];
    }
  }

  void outputs(const T* const* v_rows, int count) const {
    const int Dv = static_cast<int>(p.Dv), vecs = static_cast<int>(w.o_row / kLanes);
    if constexpr (kDot<T>) {
      for (int r = 0; r < count; r += 2)
        interleave_pair(v_rows[r], r + 1 < count ? v_rows[r + 1] : nullptr, Dv, w.v + r / 2 * w.o_row);
      add_products<true>(reinterpret_cast<const char*>(w.half), kStep * 2, w.rows, EvenRows{w.v, w.o_row},
                         (count + 1) / 2, w.chunk.o, w.o_row, vecs);
      return;
    }
    const float* rows[kStep];
    for (int r = 0; r < count; ++r) {
      if constexpr (std::is_same_v<T, float>) {
        rows[r] = v_rows[r];
        if (Dv == w.o_row) continue;
      }
      rows[r] = w.v + r * w.o_row;
      convert_row(v_rows[r], Dv, w.v + r * w.o_row);
    }
    add_products<false>(reinterpret_cast<const char*>(w.s), kStep * 4, w.rows, ScatteredRows{rows, 0}, count, w.chunk.o,
                        w.o_row, vecs);
  }

  void finish(const Partial& sums) const {
    for (int i = 0; i < w.rows; ++i) {
      T* out = row_of<T>(p.out, p.out_stride, i);
      const float inverse = sums.row_sum[i] == 0 ? 0 : 1 / sums.row_sum[i];
      store_row(sums.o + i * w.o_row, static_cast<int>(p.Dv), inverse, out);
      p.lse[(b * p.Hq + first_head) * p.Lq + i] =
          static_cast<float>((static_cast<double>(sums.row_max[i]) + std::log2(sums.row_sum[i])) * kLn2);
    }
  }
};

template <class T>
void decode(const AttentionParams& p, int threads) {
  const int64_t units = p.B * p.Hkv, chunks = (p.Lk + kChunk - 1) / kChunk;
  const std::unique_ptr<Partial[]> heads(new Partial[static_cast<size_t>(units)]);
  parallel_pipeline(
      units, chunks, threads, [&] { return Workspace(p); },
      [&](int64_t unit, const Workspace& w) { w.clear(heads[unit] = w.head); },
      [&](int64_t unit, int64_t n, const Turn& turn, const Workspace& w) {
        if (!Head<T>(p, w, unit).chunk(n)) return;
        turn.wait(1);
        w.merge(heads[unit]);
      },
      [&](int64_t unit, const Workspace& w) { Head<T>(p, w, unit).finish(w.head); });
}

}  // namespace

void attention_decode(const AttentionParams& p, int threads) {
  switch (p.dtype) {
    case DType::f32:
      return decode<float>(p, threads);
    case DType::bf16:
      return decode<bf16>(p, threads);
    case DType::f16:
      return decode<f16>(p, threads);
    case DType::boolean:
      return;
  }
}

}  // namespace pyattn::PYATTN_ISA
