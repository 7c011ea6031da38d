// Attention of few queries against many keys: what decoding with a KV cache does, and what it costs is reading K and V.
//
// The queries of all query heads that share a key head are the `rows`, so each key and value is read from memory once.
// The keys are split into chunks of kChunk; the chunks of a head are merged by their maxima and sums in rising order,
// whoever computes them (pipeline.h): the bits do not depend on the number of threads. A chunk is three passes, so that
// memory sees two long streams, of keys and of values:
//
//   scores    for few rows lanes are the elements of a head: kLanes keys by one row, then the sums over the lanes of
//   all
//             of them; for more, lanes are keys, transposed as the forward transposes queries
//   softmax   of the whole chunk
//   outputs   lanes are the elements of a value: kMaxRows rows by 4 vectors in registers
//
// Keys and values are taken kStep at a time and addressed one by one, so pages (block_table) are read where they lie.
// What is not made of whole vectors of floats, or of bfloat16 for the dot product, is converted or padded first.
#include <cmath>

#include "../pipeline.h"
#include "../samples.h"
#include "../scratch.h"
#include "blocks.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int kChunk = 1024;
constexpr int kStep = 64;
constexpr int kRow = kChunk + 2 * kPanel;  // of scores: rows a power of two apart would share a set of the cache
constexpr int kFewRows = 4;                // up to so many, transposing the keys costs more than it saves

// An online softmax under way: maxima in log2 units, sums, and outputs not yet divided by them.
struct Partial {
  float* row_max;  // [rows]
  float* row_sum;  // [rows][kLanes]: a sum in each lane
  float* o;        // [rows][o_row]
};

struct Workspace {
  int rows;          // queries of all heads that share a key head, at the most
  int64_t q_row;     // elements of a row of q: D in whole vectors
  int64_t o_row;     // floats of a row of the output: Dv in whole vectors
  void* q;           // [rows][q_row]: the queries, padded with zeros
  float* s;          // [rows][kRow]: scores, then weights
  bf16* half;        // [rows][kRow]: the weights, with the dot product
  float* k;          // [kStep][q_row]: keys converted to float, or padded
  float* v;          // [kStep][o_row]: values converted to float, or padded
  void* zeros;       // stands for a row that must not be read
  int32_t *lo, *hi;  // [rows]: the key range of each row
  Partial chunk;
  Partial head;  // of the head that the thread owns

  size_t carve(void* base, const AttentionParams& p) {
    const bool dot = kHasBf16Dot && p.dtype == DType::bf16;
    q_row = round_up(p.D, dot ? 2 * kLanes : kLanes);
    o_row = round_up(p.Dv, dot ? 2 * kLanes : kLanes);
    Carver carver(base);
    q = carver.take<float>(rows * q_row);
    s = carver.take<float>(rows * kRow);
    half = carver.take<bf16>(dot ? rows * kRow : 0);
    k = carver.take<float>(kStep * q_row);
    v = carver.take<float>(kStep * o_row);
    zeros = carver.take<float>(q_row > o_row ? q_row : o_row);
    lo = carver.take<int32_t>(rows);
    hi = carver.take<int32_t>(rows);
    for (Partial* partial : {&chunk, &head}) {
      partial->row_max = carver.take<float>(rows);
      partial->row_sum = carver.take<float>(rows * kLanes);
      partial->o = carver.take<float>(rows * o_row);
    }
    return carver.used();
  }

  Workspace(const AttentionParams& p, int64_t most_queries) : rows(static_cast<int>(p.Hq / p.Hkv * most_queries)) {
    carve(thread_scratch(carve(nullptr, p)), p);
    std::memset(zeros, 0, static_cast<size_t>(q_row > o_row ? q_row : o_row) * sizeof(float));
  }

  void clear(const Partial& partial, int used_rows) const {
    for (int i = 0; i < used_rows; ++i) {
      partial.row_max[i] = -kInf;
      store(partial.row_sum + i * kLanes, vf{});
    }
    std::memset(partial.o, 0, static_cast<size_t>(used_rows * o_row) * sizeof(float));
  }

  // Raises the maximum of row i to `largest`, if that is more. Returns what to subtract from scores: it, or 0 for -inf.
  float raise_maximum(const Partial& partial, int i, float largest) const {
    const float before = partial.row_max[i];
    if (!(largest > before)) return before == -kInf ? 0 : before;
    const vf alpha = broadcast(std::exp2(before - largest));
    partial.row_max[i] = largest;
    store(partial.row_sum + i * kLanes, load(partial.row_sum + i * kLanes) * alpha);
    for (int64_t e = 0; e < o_row; e += kLanes) {
      float* o = partial.o + i * o_row + e;
      store(o, load(o) * alpha);
    }
    return largest;
  }

  // sums += chunk
  void merge(const Partial& sums, int used_rows) const {
    for (int i = 0; i < used_rows; ++i) {
      const vf factor = broadcast(std::exp2(chunk.row_max[i] - raise_maximum(sums, i, chunk.row_max[i])));
      const auto add = [&](float* to, const float* from) { store(to, load(to) + load(from) * factor); };
      add(sums.row_sum + i * kLanes, chunk.row_sum + i * kLanes);
      for (int64_t e = 0; e < o_row; e += kLanes) add(sums.o + i * o_row + e, chunk.o + i * o_row + e);
    }
  }
};

// sums[i] += q . keys[i] over kVecs vectors of words, lane by lane
template <int kVecs, class T>
PYATTN_INLINE void add_key_scores(const T* q, const T* const* keys, int64_t first, vf (&sums)[kLanes]) {
  constexpr int kElements = kLanes * 4 / static_cast<int>(sizeof(T));
  vf query[kVecs];
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) query[j] = load_unaligned(q + first + j * kElements);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j)
      sums[i] = multiply_add<kDot<T>>(sums[i], query[j], load_unaligned(keys[i] + first + j * kElements));
  }
}

// The scores of kLanes keys and one row, of `size` elements in whole vectors.
template <class T>
PYATTN_INLINE vf key_scores(const T* q, const T* const* keys, int64_t size) {
  constexpr int kElements = kLanes * 4 / static_cast<int>(sizeof(T));
  vf sums[kLanes] = {};
  int64_t e = 0;
  for (; e + 4 * kElements <= size; e += 4 * kElements) add_key_scores<4>(q, keys, e, sums);
  for (; e + 2 * kElements <= size; e += 2 * kElements) add_key_scores<2>(q, keys, e, sums);
  for (; e < size; e += kElements) add_key_scores<1>(q, keys, e, sums);
  return sum_lanes(sums);
}

// The values of one step as the right operand; those of the next are asked for as they are read. Pairs of bfloat16 are
// made in registers, in the order of columns that takes one instruction a vector: see `column`.
template <class Operand>
struct Values {
  const Operand *const *rows, *const *next;
  int64_t lane;

  PYATTN_INLINE vf vec(int w, int j) const {
    if constexpr (std::is_same_v<Operand, float>) {
      __builtin_prefetch(next[w] + lane + j * kLanes, 0, 2);
      return load_unaligned(rows[w] + lane + j * kLanes);
    }
#ifdef PYATTN_BF16_DOT
    const int64_t first = (lane + j * kLanes) / (2 * kLanes) * 2 * kLanes;
    __builtin_prefetch(next[2 * w + j % 2] + first, 0, 2);
    const __m512i a = _mm512_loadu_si512(rows[2 * w] + first), b = _mm512_loadu_si512(rows[2 * w + 1] + first);
    return (vf)(j % 2 ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b));
#endif
  }
  Values from_lane(int64_t first) const { return {rows, next, lane + first}; }
};

// Where element e of a value stands in a row of the output.
template <class T>
constexpr int64_t column(int64_t e) {
  return kDot<T> ? e / 32 * 32 + e % 8 / 4 * 16 + e % 32 / 8 * 4 + e % 4 : e;
}

// One key head of one sample.
template <class T>
struct Head {
  using Operand = std::conditional_t<kDot<T>, bf16, float>;  // what products are made of

  // The keys, or the values, of one step.
  struct Step {
    int count;
    const T* rows[kStep];
  };

  const AttentionParams& p;  // of the sample
  const Workspace& w;
  int64_t first_head;
  int num_rows;  // queries of all heads that share the key head
  KeyRanges ranges;
  KeyRows<T> keys, values;

  Head(const AttentionParams& p_, const Workspace& w_, int64_t kv_head)
      : p(p_),
        w(w_),
        first_head(kv_head * (p_.Hq / p_.Hkv)),
        num_rows(static_cast<int>(p_.Hq / p_.Hkv * p_.Lq)),
        ranges(p_),
        keys(p_, p_.key, p_.key_stride, kv_head),
        values(p_, p_.value, p_.value_stride, kv_head) {}

  int64_t head_of(int i) const { return first_head + i / p.Lq; }

  template <class U>
  U* row_of(void* tensor, const Strides& stride, int i) const {
    return static_cast<U*>(tensor) + head_of(i) * stride.h + i % p.Lq * stride.l;
  }

  // Chunk number n into w.chunk; false if no row sees a key of it.
  bool chunk(int64_t n) const {
    // A row without keys may stand anywhere: no page is past the length.
    const int64_t last_hi = ranges.row(p.Lq - 1).hi, end = last_hi < ranges.length ? last_hi : ranges.length;
    const int64_t first = ranges.row(0).lo + n * kChunk;
    if (first >= end) return false;
    Operand* q = static_cast<Operand*>(w.q);
    for (int i = 0; i < num_rows; ++i, q += w.q_row) {
      pack_row(row_of<const T>(const_cast<void*>(p.query), p.query_stride, i), p.D, w.q_row, q);
      const KeyRange range = ranges.row(i % p.Lq);
      w.lo[i] = static_cast<int32_t>(range.lo);
      w.hi[i] = static_cast<int32_t>(range.hi);
    }
    w.clear(w.chunk, num_rows);
    const int count = min_int(kChunk, end - first);
    for_steps(keys, first, count, [&](int at, Step& now, const Step& next) {
      scores(at, now, next);
      finish_scores(first, at, now.count);
    });
    weights(count);
    for_steps(values, first, count, [&](int at, Step& now, const Step& next) {
      const bool hides = masked(first + at, now.count) && hide(now);
      outputs(at, now, next);
      if (hides) add_hidden(first, at, now);
    });
    return true;
  }

  // Calls visit(position in the chunk, this step, the next step) for the steps of a chunk.
  template <class Visit>
  void for_steps(const KeyRows<T>& from, int64_t first, int count, const Visit& visit) const {
    Step steps[2];
    locate(from, first, 0, count, steps[0]);
    for (int at = 0, now = 0; at < count; at += kStep, now ^= 1) {
      locate(from, first, at + kStep, count, steps[now ^ 1]);
      visit(at, steps[now], steps[now ^ 1]);
    }
  }

  // What stands past the end is computed with, but not used, or only asked for.
  void locate(const KeyRows<T>& from, int64_t first, int at, int count, Step& step) const {
    step.count = at < count ? min_int(kStep, count - at) : 0;
    from.for_each(first + at, step.count, [&](int r, const T* row) { step.rows[r] = row; });
    for (int r = step.count; r < kStep; ++r) step.rows[r] = static_cast<const T*>(w.zeros);
  }

  // Whether some row may not see some of the keys.
  bool masked(int64_t first, int count) const {
    bool any = p.mask != nullptr;
    for (int i = 0; i < p.Lq; ++i) any |= w.lo[i] > first || w.hi[i] < first + count;
    return any;
  }

  // Inlined, or the compiler takes it for a function without an effect.
  PYATTN_INLINE static void prefetch(const T* row, int64_t size) {
    const char* line = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < size * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(line + i, 0, 2);
  }

  // Rows as operands of whole vectors: where they are if they can be, else `copies`; then the next ones are asked for
  // here. They are not copied for nothing: loads by pointers that have just been stored wait for all that came before.
  const Operand* const* operands(const T* const* rows, const T* const* next, int count, int64_t size, int64_t padded,
                                 float* copies, const Operand** pointers) const {
    if constexpr (std::is_same_v<T, Operand>)
      if (size == padded) return rows;
    for (int r = 0; r < count; ++r) {
      prefetch(next[r], size);
      Operand* copy = reinterpret_cast<Operand*>(copies) + r * padded;
      pack_row(rows[r], size, padded, copy);
      pointers[r] = copy;
    }
    return pointers;
  }

  static void pack_row(const T* row, int64_t size, int64_t padded, Operand* copy) {
    if constexpr (kDot<T>)
      std::memcpy(copy, row, static_cast<size_t>(size) * sizeof(T));
    else
      convert_row(row, static_cast<int>(size), copy);
    for (int64_t e = size; e < padded; ++e) copy[e] = Operand{};
  }

  void scores(int at, const Step& now, const Step& next) const {
    if (num_rows > kFewRows)
      scores_of_many(now, next, w.s + at);
    else
      scores_of_few(now, next, w.s + at);
  }

  // Lanes are the elements of a head: one sum over the lanes of kLanes keys a row.
  void scores_of_few(const Step& now, const Step& next, float* s) const {
    const int whole = static_cast<int>(round_up(now.count, kLanes));
    const Operand* pointers[kStep];
    const Operand* const* rows = operands(now.rows, next.rows, whole, p.D, w.q_row, w.k, pointers);
    const vf scale = broadcast(HeadTerms(p, first_head).scale);
    for (int r = 0; r < whole; r += kLanes) {
      const Operand* q = static_cast<const Operand*>(w.q);
      for (int i = 0, asked = 0; i < num_rows; ++i, q += w.q_row) {
        // A few rows at a time: many at once would hold up the loads of this step.
        for (; rows != pointers && asked < (i + 1) * kLanes / num_rows; ++asked) prefetch(next.rows[r + asked], p.D);
        store(s + i * kRow + r, key_scores(q, rows + r, w.q_row) * scale);
      }
    }
  }

  // Lanes are keys, transposed: that costs more, but once for all rows.
  void scores_of_many(const Step& now, const Step& next, float* s) const {
    constexpr int kVecs = kTileLanes / kLanes;
    const int D = static_cast<int>(p.D);
    const auto row = [&](int r) __attribute__((always_inline)) {
      prefetch(next.rows[r], p.D);
      return now.rows[r];
    };
    pack_rows<T>(row, now.count, D, w.k);
    const vf scale = broadcast(HeadTerms(p, first_head).scale);
    alignas(64) float partial[kMaxRows * kTileLanes];
    const int64_t row_bytes = w.q_row * static_cast<int64_t>(sizeof(Operand));
    for (int first = 0; first < now.count; first += kTileLanes) {
      for_row_tiles(num_rows, [&](int i, auto rows) {
        constexpr int kRows = rows();
        const auto scale_and_store = [&](const vf(&c)[kRows][kVecs]) __attribute__((always_inline)) {
#pragma GCC unroll 6
          for (int n = 0; n < kRows; ++n)
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; ++j) store(s + (i + n) * kRow + first + j * kLanes, c[n][j] * scale);
        };
        row_products<kDot<T>, kRows, kVecs>(static_cast<const char*>(w.q) + i * row_bytes, row_bytes, D,
                                            w.k + first * query_words<kDot<T>>(D), partial, scale_and_store);
      });
    }
  }

  // Calls f with the mask's elements for row i from key `first` on.
  template <class F>
  void with_mask(int i, int64_t first, const F& f) const {
    const int64_t offset = head_of(i) * p.mask_stride_h + i % p.Lq * p.mask_stride_q + first * p.mask_stride_k;
    with_mask_dtype(p.mask_dtype, [&](auto element) { f(static_cast<const decltype(element)*>(p.mask) + offset); });
  }

  // Softcap, ALiBi, attn_mask and the rows' ranges. A masked score may have been NaN.
  void finish_scores(int64_t first, int at, int count) const {
    const bool is_masked = masked(first + at, count);
    for (int i = 0; i < num_rows; ++i) {
      float* s = w.s + i * kRow + at;
      const HeadTerms head(p, head_of(i));
      for (int r = 0; head.softcap.limit != 0 && r < count; r += kLanes) store(s + r, head.softcap(load(s + r)));
      if (head.slope != 0) {
        const float position = static_cast<float>(first + at - i % p.Lq - ranges.offset);
        for (int r = 0; r < count; r += kLanes) {
          const vf distance = load(kLaneNumbers + r) + broadcast(position);
          store(s + r, load(s + r) - broadcast(head.slope) * max(distance, -distance));
        }
      }
      if (p.mask) {
        with_mask(i, first + at, [&](const auto* mask) {
          for (int r = 0; r < count; ++r) {
            const float bias = bias_of(mask[r * p.mask_stride_k]);
            s[r] = bias == -kInf ? bias : s[r] + bias;
          }
        });
      }
      for (int r = 0; is_masked && r < count; ++r)
        if (first + at + r < w.lo[i] || first + at + r >= w.hi[i]) s[r] = -kInf;
      for (int r = count; r % kLanes; ++r) s[r] = -kInf;
    }
  }

  // 0 * NaN is NaN: puts zeros in the place of values that are not finite; false if there are none.
  bool hide(Step& now) const {
    bool any = false;
    for (int r = 0; r < now.count; ++r) {
      int hides = 0;
      for (int e = 0; e < p.Dv; ++e) hides |= not_finite(now.rows[r][e]);
      if (hides) now.rows[r] = static_cast<const T*>(w.zeros);
      any |= hides != 0;
    }
    return any;
  }

  // Adds them for the rows that do see them.
  void add_hidden(int64_t first, int at, const Step& now) const {
    values.for_each(first + at, now.count, [&](int r, const T* value) {
      if (now.rows[r] == value) return;
      const int64_t key = first + at + r;
      for (int i = 0; i < num_rows; ++i) {
        bool live = key >= w.lo[i] && key < w.hi[i];
        if (p.mask) with_mask(i, key, [&](const auto* mask) { live = live && bias_of(*mask) != -kInf; });
        for (int e = 0; live && e < p.Dv; ++e)
          w.chunk.o[i * w.o_row + column<T>(e)] += w.s[i * kRow + at + r] * to_float(value[e]);
      }
    });
  }

  // Scores to weights 2^(score - maximum), in place and, with the dot product, in `half`.
  void weights(int count) const {
    for (int i = 0; i < num_rows; ++i) {
      float* s = w.s + i * kRow;
      vf largest = load(s), sum = {};
      for (int r = kLanes; r < count; r += kLanes) largest = max(largest, load(s + r));
      const vf shift = broadcast(w.raise_maximum(w.chunk, i, max_lane(largest)));
      for (int r = 0; r < count; r += kLanes) {
        const vf weight = exp2(load(s + r) - shift);
        sum += weight;
        store(s + r, weight);
        if constexpr (kDot<T>) store_weights(w.half + i * kRow + r, weight);
      }
      store(w.chunk.row_sum + i * kLanes, sum);
    }
  }

  void outputs(int at, const Step& now, const Step& next) const {
    const int words = kDot<T> ? (now.count + 1) / 2 : now.count;
    const Operand* pointers[kStep];
    const Operand* const* rows =
        operands(now.rows, next.rows, kDot<T> ? 2 * words : words, p.Dv, w.o_row, w.v, pointers);
    const Operand* const* coming = rows;
    if constexpr (std::is_same_v<T, Operand>)
      if (rows != pointers) coming = next.rows;
    const char* weights =
        kDot<T> ? reinterpret_cast<const char*>(w.half + at) : reinterpret_cast<const char*>(w.s + at);
    add_products<kDot<T>>(weights, kRow * static_cast<int64_t>(sizeof(Operand)), num_rows,
                          Values<Operand>{rows, coming, 0}, words, w.chunk.o, w.o_row,
                          static_cast<int>(w.o_row / kLanes));
  }

  void finish(const Partial& sums) const {
    for (int i = 0; i < num_rows; ++i) {
      T* out = row_of<T>(p.out, p.out_stride, i);
      float sum = 0;
      for (int j = 0; j < kLanes; ++j) sum += sums.row_sum[i * kLanes + j];
      const RowEnd end(sums.row_max[i], sum, p.sinks ? p.sinks[head_of(i)] : -kInf);
      for (int64_t e = 0; e < p.Dv; ++e) w.v[e] = sums.o[i * w.o_row + column<T>(e)];
      store_row(w.v, static_cast<int>(p.Dv), end.factor, out);
      p.lse[head_of(i) * p.lse_stride_h + i % p.Lq] = end.lse;
    }
  }
};

template <class T>
void decode(const AttentionParams& p, const std::vector<AttentionParams>& samples, int threads) {
  std::vector<int64_t> chunks;  // of each key head of each sample
  int64_t most_queries = 0;
  for (const AttentionParams& sample : samples) {
    chunks.insert(chunks.end(), static_cast<size_t>(p.Hkv), (sample.Lk + kChunk - 1) / kChunk);
    most_queries = std::max(most_queries, sample.Lq);
  }
  const auto head = [&](int64_t unit, const Workspace& w) { return Head<T>(samples[unit / p.Hkv], w, unit % p.Hkv); };
  std::vector<Partial> sums(chunks.size());
  parallel_pipeline(
      chunks, threads, [&] { return Workspace(p, most_queries); },
      [&](int64_t unit, const Workspace& w) { w.clear(sums[unit] = w.head, w.rows); },
      [&](int64_t unit, int64_t n, const Turn& turn, const Workspace& w) {
        const Head<T> keys = head(unit, w);
        if (!keys.chunk(n)) return;
        turn.wait(1);
        w.merge(sums[unit], keys.num_rows);
      },
      [&](int64_t unit, const Workspace& w) { head(unit, w).finish(sums[unit]); });
}

}  // namespace

void attention_decode(const AttentionParams& p, const std::vector<AttentionParams>& samples, int threads) {
  with_dtype(p.dtype, [&](auto element) { decode<decltype(element)>(p, samples, threads); });
}

}  // namespace pyattn::PYATTN_ISA
