// Attention of few queries against many keys: what decoding with a KV cache does, and what it costs is reading K and V.
//
// The queries of all query heads that share a key head read its keys once. The keys are split into chunks of kChunk;
// the chunks of a head are merged by their maxima and sums in rising order, whoever computes them (pipeline.h): the
// bits do not depend on the number of threads. A chunk is three passes:
//
//   scores    few queries: lanes are the elements of a head; each key times all queries, then the sums over the lanes;
//             more: lanes are keys, transposed as the forward transposes queries
//   softmax   of the whole chunk
//   outputs   lanes are the elements of a value
//
// Processors fetch ahead what is read in the order of memory, and nothing else as fast. So where the heads of a key lie
// side by side, as in a page, a thread takes them together, one step of keys after the other. Keys are read where they
// lie (block_table), in runs of neighbours; only what is not made of whole vectors, or of one page, is copied.
#include <cmath>

#include "../pipeline.h"
#include "../samples.h"
#include "../scratch.h"
#include "decode_tiles.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int kStep = 64;
constexpr int kFewRows = 8;        // queries up to which transposing the keys costs more than it saves
constexpr int kFewRowsAtOnce = 4;  // of them, against the same keys in registers
constexpr int kRowsTogether = 64;  // of all heads that are taken together: their scores stay in the cache

// An online softmax under way: maxima in log2 units, sums, and outputs not yet divided by them.
struct Partial {
  float* row_max;  // [rows]
  float* row_sum;  // [rows][kLanes]: a sum in each lane
  float* o;        // [rows][o_row]
};

struct Workspace {
  int rows;          // queries of the key heads that are taken together, at the most
  int64_t q_row;     // elements of a row of q: D in whole vectors
  int64_t o_row;     // floats of a row of the output: Dv in whole vectors
  void* q;           // [rows][q_row]: the queries, padded with zeros
  float* s;          // [rows][kRow]: scores, then weights
  bf16* half;        // [rows][kRow]: the weights, with the dot product
  void* copies;      // [kStep][q_row or o_row]: keys, or values, that cannot be read where they lie
  float* k;          // [kStep][q_row]: keys transposed
  vf* sums;          // [kFewRowsAtOnce][kKeyRun]: scores that are still to be summed over their lanes
  void* zeros;       // stands for a row that there is none of
  int32_t *lo, *hi;  // [rows]: the key range of each row
  Partial chunk;
  Partial head;  // of the heads that the thread owns

  size_t carve(void* base, const AttentionParams& p) {
    const bool dot = kHasBf16Dot && p.dtype == DType::bf16;
    q_row = round_up(p.D, dot ? 2 * kLanes : kLanes);
    o_row = round_up(p.Dv, dot ? 2 * kLanes : kLanes);
    Carver carver(base);
    q = carver.take<float>(rows * q_row);
    s = carver.take<float>(rows * kRow);
    half = carver.take<bf16>(dot ? rows * kRow : 0);
    copies = carver.take<float>(kStep * (q_row > o_row ? q_row : o_row));
    k = carver.take<float>(kStep * q_row);
    sums = carver.take<vf>(kFewRowsAtOnce * kKeyRun);
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

  Workspace(const AttentionParams& p, int most_rows) : rows(most_rows) {
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

// Key heads of one sample that are taken together.
template <class T>
struct Heads {
  using Operand = std::conditional_t<kDot<T>, bf16, float>;  // what products are made of

  const AttentionParams& p;  // of the sample
  const Workspace& w;
  int num_heads;
  int64_t first_head;  // of the query
  int rows_of_head;    // queries of all heads that share a key head
  int num_rows;        // queries of all heads
  int step;
  KeyRanges ranges;
  KeyRows<T> keys, values;

  Heads(const AttentionParams& p_, const Workspace& w_, int64_t kv_head, int num_heads_)
      : p(p_),
        w(w_),
        num_heads(num_heads_),
        first_head(kv_head * (p_.Hq / p_.Hkv)),
        rows_of_head(static_cast<int>(p_.Hq / p_.Hkv * p_.Lq)),
        num_rows(num_heads * rows_of_head),
        step(step_of(p_, rows_of_head, num_heads)),
        ranges(p_),
        keys(p_, p_.key, p_.key_stride, kv_head),
        values(p_, p_.value, p_.value_stride, kv_head) {}

  // So that few queries find the keys of a step side by side in a page, and it is done with when they leave it.
  static int step_of(const AttentionParams& p, int rows_of_head, int num_heads) {
    if (rows_of_head > kFewRows || (!p.block_table && num_heads == 1)) return kStep;
    if (!p.block_table) return kValueRun;
    return p.page_size % kStep == 0 ? kStep : p.page_size % (2 * kValueRun) == 0 ? 2 * kValueRun : kValueRun;
  }

  int64_t head_of(int i) const { return first_head + i / p.Lq; }

  template <class U>
  U* row_of(void* tensor, const Strides& stride, int i) const {
    return static_cast<U*>(tensor) + head_of(i) * stride.h + i % p.Lq * stride.l;
  }

  // Chunk number n of the keys that are seen into w.chunk.
  void chunk(int64_t n, const KeyRange& seen) const {
    const int64_t base = seen.lo / kStep * kStep + n * kChunk;
    const int64_t begin = std::max(base, seen.lo), end = std::min(base + kChunk, seen.hi);
    for (int i = 0; i < num_rows; ++i) {
      pack_query(i);
      const KeyRange range = ranges.row(i % p.Lq);
      w.lo[i] = static_cast<int32_t>(range.lo);
      w.hi[i] = static_cast<int32_t>(range.hi);
    }
    w.clear(w.chunk, num_rows);
    const bool few = rows_of_head <= kFewRows;
    for_runs(keys, few ? kKeyRun : kStep, begin, end, values.row(begin),
             [&](int head, int64_t key, int run, const T* rows, const T* next) {
               scores(head, base, key, run, rows, next);
             });
    const int count = static_cast<int>(end - base);
    finish_scores(base, count);
    weights(count);
    for_runs(values, few ? kValueRun : kStep, begin, end, nullptr,
             [&](int head, int64_t key, int run, const T* rows, const T* next) {
               outputs(head, base, key, run, rows, next);
             });
  }

  // Calls visit(head, key, count, rows, next) for runs of at most `longest` keys of [begin, end), those of a step for
  // all heads before the next step. `rows` is null where keys of the run are not neighbours; `next` is what is read
  // afterwards, `last_next` after all.
  template <class Visit>
  void for_runs(const KeyRows<T>& from, int longest, int64_t begin, int64_t end, const T* last_next,
                const Visit& visit) const {
    const T* rows = from.row(begin);
    const T* next_step;
    for (int64_t key = begin, stop; key < end; key = stop, rows = next_step) {
      stop = std::min(key / step * step + step, end);
      next_step = stop < end ? from.row(stop) : last_next;
      const bool neighbours = from.neighbours(key, static_cast<int>(stop - key));
      for (int head = 0; head < num_heads; ++head) {
        const T* rows_of_run = rows + head * from.head_stride;
        const T* next_head = head + 1 < num_heads ? rows_of_run + from.head_stride : next_step;
        for (int64_t first = key, last; first < stop; first = last) {
          last = std::min(first / longest * longest + longest, stop);
          const int count = static_cast<int>(last - first);
          const T* next = rows_of_run + count * from.stride;
          visit(head, first, count, neighbours ? rows_of_run : nullptr, last < stop ? next : next_head);
          rows_of_run = next;
        }
      }
    }
  }

  // What to ask for of the rows that are read after `run`: where there is little to compute, processors of AMD are as
  // fast by themselves, but do not know where the next page is.
  Coming<T> coming_after(const Run<T>& run, const T* coming, int count, int64_t size) const {
    constexpr int kFirst = 16 / sizeof(T);
    const bool alone = !kIntel && rows_of_head == 1;
    if (alone && coming == run.rows + count * run.stride) coming = nullptr;
    return {coming, run.stride, alone ? kFirst : count, static_cast<int>(size)};
  }

  // Whether some row may not see some of the keys.
  bool masked(int64_t first, int count) const {
    bool any = p.mask != nullptr;
    for (int i = 0; i < p.Lq; ++i) any |= w.lo[i] > first || w.hi[i] < first + count;
    return any;
  }

  // Keys, or values, [key, key + count) of a head: where they are, at `rows`, if they can be, else copies, padded with
  // zeros. With `hides` values that are not finite become zeros. `rows` is null if they are not neighbours.
  Run<T> run_of(const KeyRows<T>& from, int head, int64_t key, int count, const T* rows, int64_t size, int64_t padded,
                bool hides) const {
    bool copies = size != padded || !rows;
    for (int r = 0; hides && r < count && !copies; ++r) copies = holds_not_finite(rows + r * from.stride);
    if (!copies) return {rows, from.stride};
    T* copy = static_cast<T*>(w.copies);
    from.for_runs(key, count, [&](int, const T* row, int number) {
      for (row += head * from.head_stride; number > 0; --number, row += from.stride, copy += padded) {
        const int64_t used = hides && holds_not_finite(row) ? 0 : size;
        std::memcpy(copy, row, static_cast<size_t>(used) * sizeof(T));
        std::memset(copy + used, 0, static_cast<size_t>(padded - used) * sizeof(T));
      }
    });
    return {static_cast<const T*>(w.copies), padded};
  }

  // Row i of the queries as operands, padded with zeros: where there are few, the vectors of a head's queries in turns.
  void pack_query(int i) const {
    const bool many = rows_of_head > kFewRows;
    const T* query = row_of<const T>(const_cast<void*>(p.query), p.query_stride, i);
    Operand* row = static_cast<Operand*>(many ? w.q : w.copies);
    if (many) row += i * w.q_row;
    if constexpr (kDot<T>)
      std::memcpy(row, query, static_cast<size_t>(p.D) * sizeof(T));
    else
      convert_row(query, static_cast<int>(p.D), row);
    for (int64_t e = p.D; e < w.q_row; ++e) row[e] = Operand{};
    if (many) return;
    Operand* q = static_cast<Operand*>(w.q) + (i - i % rows_of_head) * w.q_row + i % rows_of_head * kElements<T>;
    for (int64_t e = 0; e < w.q_row; e += kElements<T>) std::memcpy(q + e * rows_of_head, row + e, sizeof(vf));
  }

  void scores(int head, int64_t base, int64_t key, int count, const T* rows, const T* next) const {
    const bool many = rows_of_head > kFewRows;
    const Run<T> run = run_of(keys, head, key, count, rows, p.D, many ? p.D : w.q_row, false);
    const int at = static_cast<int>(key - base);
    if (many) return scores_of_many(run, at, count);
    const Coming<T> coming = coming_after(run, next, count, p.D);
    const Operand* q = static_cast<const Operand*>(w.q) + head * rows_of_head * w.q_row;
    float* s = w.s + head * rows_of_head * kRow + at;
    for (int i = 0; i < rows_of_head; i += kFewRowsAtOnce)
      call_with_rows<kFewRowsAtOnce>(min_int(kFewRowsAtOnce, rows_of_head - i), [&](auto tile_rows) {
        scores_of_few<tile_rows()>(run, count, q + i * kElements<T>, i == 0 ? coming : Coming<T>{}, s + i * kRow,
                                   at % kLanes);
      });
  }

  // Lanes are the elements of a head. The scores of the run's first key stand at s, which is number `at` of a vector.
  template <int kRows>
  PYATTN_INLINE void scores_of_few(const Run<T>& run, int count, const Operand* q, const Coming<T>& coming, float* s,
                                   int at) const {
    constexpr int kKeys = kRows <= 2 ? 1 : 2;  // more than one, and memory is not read in its order
    const int64_t q_vectors = rows_of_head * kElements<T>;
    int r = 0;
    for (; r + kKeys <= count; r += kKeys) {
      coming.ask(r, r + kKeys);
      key_products<kRows, kKeys>(run.rows + r * run.stride, run.stride, q, q_vectors, w.q_row, w.sums + at + r);
    }
    for (; r < count; ++r)
      key_products<kRows, 1>(run.rows + r * run.stride, run.stride, q, q_vectors, w.q_row, w.sums + at + r);
    sum_products<kRows>(w.sums, at + count, HeadTerms(p, first_head).scale, s - at);
  }

  // Lanes are keys, transposed: that costs more, but once for all rows.
  void scores_of_many(const Run<T>& run, int at, int count) const {
    constexpr int kVecs = kTileLanes / kLanes;
    const int D = static_cast<int>(p.D), before = at % kStep;
    const auto row = [&](int r) __attribute__((always_inline)) {
      return r < before ? static_cast<const T*>(w.zeros) : run.rows + (r - before) * run.stride;
    };
    pack_rows<T>(row, before + count, D, w.k);
    const vf scale = broadcast(HeadTerms(p, first_head).scale);
    alignas(64) float partial[kMaxRows * kTileLanes];
    const int64_t row_bytes = w.q_row * static_cast<int64_t>(sizeof(Operand));
    for (int first = 0; first < before + count; first += kTileLanes) {
      for_row_tiles(num_rows, [&](int i, auto rows) {
        constexpr int kRows = rows();
        const auto scale_and_store = [&](const vf(&c)[kRows][kVecs]) __attribute__((always_inline)) {
#pragma GCC unroll 6
          for (int n = 0; n < kRows; ++n)
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; ++j)
              store(w.s + (i + n) * kRow + at - before + first + j * kLanes, c[n][j] * scale);
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

  // Softcap, ALiBi, attn_mask and the rows' ranges, for the `count` keys from `base` on. A masked score may have been
  // NaN.
  void finish_scores(int64_t base, int count) const {
    for (int i = 0; i < num_rows; ++i) {
      float* s = w.s + i * kRow;
      const HeadTerms head(p, head_of(i));
      for (int r = 0; head.softcap.limit != 0 && r < count; r += kLanes) store(s + r, head.softcap(load(s + r)));
      if (head.slope != 0) {
        const float position = static_cast<float>(base - i % p.Lq - ranges.offset);
        for (int r = 0; r < count; r += kLanes) {
          const vf distance = broadcast(static_cast<float>(r)) + load(kLaneNumbers) + broadcast(position);
          store(s + r, load(s + r) - broadcast(head.slope) * max(distance, -distance));
        }
      }
      const int seen = min_int(count, w.hi[i] - base);
      int r = 0;
      for (; r < count && base + r < w.lo[i]; ++r) s[r] = -kInf;
      if (p.mask && r < seen) {
        with_mask(i, base + r, [&](const auto* mask) {
          for (; r < seen; ++r, mask += p.mask_stride_k) {
            const float bias = bias_of(*mask);
            s[r] = bias == -kInf ? bias : s[r] + bias;
          }
        });
      }
      for (r = std::max(r, seen); r < round_up(count, kLanes); ++r) s[r] = -kInf;
    }
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

  void outputs(int head, int64_t base, int64_t key, int count, const T* rows, const T* next) const {
    const bool is_masked = masked(key, count);
    const Run<T> run = run_of(values, head, key, count, rows, p.Dv, w.o_row, is_masked);
    const Coming<T> coming = coming_after(run, next, count, p.Dv);
    const int at = static_cast<int>(key - base);
    if constexpr (kDot<T>) {
      const T* zeros = static_cast<const T*>(w.zeros);
      add_outputs(head, at, count / 2, {run.rows, run.rows + run.stride, 2 * run.stride, 0}, coming);
      if (count % 2) add_outputs(head, at + count - 1, 1, {run.rows + (count - 1) * run.stride, zeros, 0, 0}, {});
    } else {
      add_outputs(head, at, count, {run.rows, nullptr, run.stride, 0}, coming);
    }
    for (int r = 0; is_masked && r < count; ++r) {
      const T* row = values.row(key + r, head);
      if (holds_not_finite(row)) add_hidden(head, at + r, base, row);
    }
  }

  // The products of the head's weights from number `at` of the chunk on; a word is one value, or with the dot product
  // two.
  void add_outputs(int head, int at, int words, const Values<T>& values, const Coming<T>& coming) const {
    const Operand* weights;
    if constexpr (kDot<T>)
      weights = w.half;
    else
      weights = w.s;
    for_row_tiles(rows_of_head, [&](int i, auto rows) {
      const int64_t row = head * rows_of_head + i;
      add_value_products<rows(), vecs_of(rows())>(reinterpret_cast<const char*>(weights + row * kRow + at), values,
                                                  i == 0 ? coming : Coming<T>{}, words, w.chunk.o + row * w.o_row,
                                                  w.o_row, static_cast<int>(w.o_row / kLanes));
    });
  }

  // 0 * NaN is NaN: such values count only for the queries that see them.
  bool holds_not_finite(const T* row) const {
    int any = 0;
    for (int e = 0; e < p.Dv; ++e) any |= not_finite(row[e]);
    return any != 0;
  }

  // Adds such a value, number `at` of the chunk from key `base` on.
  void add_hidden(int head, int at, int64_t base, const T* value) const {
    for (int i = head * rows_of_head; i < (head + 1) * rows_of_head; ++i) {
      bool live = base + at >= w.lo[i] && base + at < w.hi[i];
      if (p.mask) with_mask(i, base + at, [&](const auto* mask) { live = live && bias_of(*mask) != -kInf; });
      for (int e = 0; live && e < p.Dv; ++e)
        w.chunk.o[i * w.o_row + column<T>(e)] += w.s[i * kRow + at] * to_float(value[e]);
    }
  }

  void finish(const Partial& sums) const {
    float* row = static_cast<float*>(w.copies);
    for (int i = 0; i < num_rows; ++i) {
      T* out = row_of<T>(p.out, p.out_stride, i);
      float sum = 0;
      for (int j = 0; j < kLanes; ++j) sum += sums.row_sum[i * kLanes + j];
      const RowEnd end(sums.row_max[i], sum, p.sinks ? p.sinks[head_of(i)] : -kInf);
      for (int64_t e = 0; e < p.Dv; ++e) row[e] = sums.o[i * w.o_row + column<T>(e)];
      store_row(row, static_cast<int>(p.Dv), end.factor, out);
      p.lse[head_of(i) * p.lse_stride_h + i % p.Lq] = end.lse;
    }
  }
};

// The key heads of a sample from `head` on that a thread takes together, and the keys that some row sees.
struct Unit {
  const AttentionParams* sample;
  int64_t head;
  int num_heads;
  KeyRange seen;
};

// A row without keys may stand anywhere: no page is past the length.
KeyRange seen_of(const AttentionParams& sample) {
  if (sample.Lq == 0) return {0, 0};
  const KeyRanges ranges(sample);
  return {ranges.row(0).lo, std::min(ranges.row(sample.Lq - 1).hi, ranges.length)};
}

int64_t chunks_of(const KeyRange& seen) {
  return seen.lo < seen.hi ? (seen.hi - seen.lo / kStep * kStep + kChunk - 1) / kChunk : 0;
}

// How many key heads to take together: as many as lie side by side, while there is work enough for all threads.
int64_t heads_together(const AttentionParams& sample, int64_t chunks_of_all, int threads) {
  const int64_t rows = sample.Hq / sample.Hkv * sample.Lq;
  const bool side_by_side = sample.block_table || sample.key_stride.h < sample.key_stride.l;
  if (!side_by_side || rows == 0 || rows > kFewRows || chunks_of_all == 0) return 1;
  const int64_t units = (4 * threads + chunks_of_all - 1) / chunks_of_all;  // that each sample should have
  return std::max<int64_t>(std::min(kRowsTogether / rows, sample.Hkv / units), 1);
}

template <class T>
void decode(const AttentionParams& p, const std::vector<AttentionParams>& samples, int threads) {
  if (p.Hkv == 0) return;
  std::vector<Unit> units;
  std::vector<int64_t> chunks;  // of each unit
  int64_t chunks_of_all = 0, most_rows = 0;
  for (const AttentionParams& sample : samples) chunks_of_all += chunks_of(seen_of(sample));
  for (const AttentionParams& sample : samples) {
    const KeyRange seen = seen_of(sample);
    const int64_t together = heads_together(sample, chunks_of_all, threads);
    most_rows = std::max(most_rows, together * p.Hq / p.Hkv * sample.Lq);
    for (int64_t head = 0; head < p.Hkv; head += together) {
      units.push_back({&sample, head, min_int(together, p.Hkv - head), seen});
      chunks.push_back(chunks_of(seen));
    }
  }
  const auto heads = [&](int64_t u, const Workspace& w) {
    return Heads<T>(*units[u].sample, w, units[u].head, units[u].num_heads);
  };
  std::vector<Partial> sums(units.size());
  parallel_pipeline(
      chunks, threads, [&] { return Workspace(p, static_cast<int>(most_rows)); },
      [&](int64_t u, const Workspace& w) { w.clear(sums[u] = w.head, w.rows); },
      [&](int64_t u, int64_t n, const Turn& turn, const Workspace& w) {
        const Heads<T> taken = heads(u, w);
        taken.chunk(n, units[u].seen);
        turn.wait(1);
        w.merge(sums[u], taken.num_rows);
      },
      [&](int64_t u, const Workspace& w) { heads(u, w).finish(sums[u]); });
}

}  // namespace

void attention_decode(const AttentionParams& p, const std::vector<AttentionParams>& samples, int threads) {
  with_dtype(p.dtype, [&](auto element) { decode<decltype(element)>(p, samples, threads); });
}

}  // namespace pyattn::PYATTN_ISA
