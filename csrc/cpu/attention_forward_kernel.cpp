// Attention forward on a CPU: tiled online softmax over blocks of 64 queries of one head.
//
// Lanes are queries. A block computes S^T = K Q^T and O^T += V^T P^T, so keys and values are read where they lie, one
// scalar broadcast at a time, and maximum, sum and rescale of the softmax are vertical operations without a
// horizontal reduction. Only the queries and the output are transposed, in registers, once a block.
//
//   block    64 queries: 1 register tile of 4 panels of 16 lanes (AVX-512), or 4 tiles of 1 panel
//   tile     kMaxRows keys (or value columns) x the live panels: see tiles.h
//   segment  keys for which K and V are staged at once: kBlockN where every query of the block sees every key, strips
//            of 16 along the edges of the structured mask, where dead panels are left out
//
// Float16, and bfloat16 where there is no bfloat16 dot product, are converted to float a segment at a time. With the
// dot product, K and Q are read as pairs along d, and V is interleaved into pairs of keys, once for all the blocks of
// a head that a thread takes; segments begin at even keys. AMX reads these pairs transposed, and takes whole segments
// at a time.
#include <cmath>

#include "../parallel.h"
#include "../samples.h"
#include "../scratch.h"
#include "amx.h"
#include "blocks.h"
#include "dropout.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int64_t kAcrossRow = kBlockN / 2 | kLanes;  // an odd number of cache lines
constexpr int64_t kMostPairs =
    1 << 20;  // interleaved pairs of values that a thread keeps: memory must not grow with Lk

// What one thread works in.
struct Workspace {
  float* q;         // [tile][query_words][kTileLanes]: the queries, transposed
  float* s;         // [kBlockN][kTileLanes]: scores, then weights, of one tile
  float* o;         // [tile][Dv rounded up][kTileLanes]: the output, transposed
  float* bias;      // [kBlockN][kTileLanes]: attn_mask of one tile, transposed
  float* k;         // [kBlockN][D]: keys converted to float
  float* v;         // [kBlockN][Dv]: values converted to float, or interleaved in pairs
  void* pages_k;    // [kBlockN][D]: keys gathered from pages
  void* pages_v;    // [kBlockN][Dv]: values gathered from pages
  bool has_pairs;   // whether `v_pairs` holds the values of the head; else they are interleaved a segment at a time
  float* v_pairs;   // [Lk / 2][Dv]: with the dot product, all values of the head interleaved in pairs; AMX: transposed
  float* v_across;  // [Dv][kAcrossRow]: with AMX, the pairs of a segment transposed
  void* v_finite;   // [kBlockN][Dv]: values of which rows with NaN or inf are set to 0
  int64_t v_pairs_row;
  float* row_max;  // [kBlockM], in log2 units
  float* row_sum;  // [kBlockM]
  float* alpha;    // [kBlockM]: what earlier weights must be multiplied by, in registers it would crowd a tile

  size_t carve(void* base, const AttentionParams& p) {
    Carver carver(base);
    q = carver.take<float>(round_up(p.D, kLanes) * kBlockM);
    s = carver.take<float>(kBlockN * kTileLanes);
    o = carver.take<float>(round_up(p.Dv, kLanes) * kBlockM);
    bias = carver.take<float>(p.mask ? kBlockN * kTileLanes : 0);
    k = carver.take<float>(p.dtype == DType::f32 ? 0 : kBlockN * p.D);
    v = carver.take<float>(p.dtype == DType::f32 ? 0 : kBlockN * round_up(p.Dv, kLanes));
    pages_k = carver.take<float>(p.block_table ? kBlockN * p.D : 0);
    pages_v = carver.take<float>(p.block_table ? kBlockN * p.Dv : 0);
    const bool dot = kHasBf16Dot && p.dtype == DType::bf16;
    v_pairs_row = kHasAmx ? round_up((p.Lk + 1) / 2, kLanes) | kLanes : p.Dv;
    const int64_t pairs = (kHasAmx ? p.Dv : (p.Lk + 1) / 2) * v_pairs_row;
    has_pairs = dot && !p.block_table && pairs <= kMostPairs;
    v_pairs = carver.take<float>(has_pairs ? pairs : 0);
    v_across = carver.take<float>(kHasAmx && dot ? p.Dv * kAcrossRow : 0);
    v_finite = carver.take<float>(kBlockN * p.Dv);
    row_max = carver.take<float>(kBlockM);
    row_sum = carver.take<float>(kBlockM);
    alpha = carver.take<float>(kBlockM);
    return carver.used();
  }
};

// Keys [first, first + count) with their operands as the tiles read them.
struct Segment {
  int64_t first;
  int count;
  Rows k;
  KeyOperand v;
};

// The first `kPanels` panels from lane `lane` of the block on take in one segment; kPlain where its scores are plain
// products.
template <bool kIsDot, int kPanels, bool kPlain>
__attribute__((noinline)) void tile_step(const AttentionParams& p, const Workspace& w, const ScoreTerms& terms,
                                         const Dropout& dropout, Segment& segment, int64_t query, int lane) {
  constexpr int kVecs = kPanels * kPanelVecs;
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const int in_tile = lane % kTileLanes;
  const int64_t tile = lane / kTileLanes;
  const float* q = w.q + tile * query_words<kIsDot>(D) * kTileLanes + in_tile;
  float* o = w.o + tile * round_up(Dv, kLanes) * kTileLanes + in_tile;
  float* s = w.s + in_tile;
  const float scale = terms.scale;

  vf largest[kVecs];
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) largest[j] = broadcast(-kInf);
  for_row_tiles(segment.count, [&](int i, auto rows) {
    if constexpr (kPlain) {
      score_tile<kIsDot, rows(), kVecs>(segment.k[i], segment.k.row_bytes, D, q, scale, s + i * kTileLanes, largest);
    } else {
      vf unfinished[kVecs] = {};
      score_tile<kIsDot, rows(), kVecs>(segment.k[i], segment.k.row_bytes, D, q, scale, s + i * kTileLanes, unfinished);
      finish_scores<kIsDot, kVecs>(s + i * kTileLanes, kTileLanes, i, rows(), terms, largest);
    }
  });
  segment.v.hidden.note_live(s, kPanels * kPanel);
  softmax_step<kIsDot, kVecs>(s, segment.count, largest, w.row_max + lane, w.row_sum + lane, w.alpha + lane);
  if (dropout) drop_weights<kIsDot, kVecs>(dropout, query, segment.first, segment.count, s);
  const int rows_of_v = kIsDot ? (segment.count + 1) / 2 : segment.count;
  for_row_tiles(Dv, [&](int e, auto rows) {
    output_tile<kIsDot, rows(), kVecs>(segment.v.data + e, segment.v.row, rows_of_v, s, w.alpha + lane,
                                       o + e * kTileLanes);
  });
}

#ifdef PYATTN_ISA_AVX512_AMX
// The same by AMX.
template <int kPanels, bool kPlain>
__attribute__((noinline)) void amx_tile_step(const AttentionParams& p, const Workspace& w, const ScoreTerms& terms,
                                             const Dropout& dropout, Segment& segment, int64_t query, int lane) {
  constexpr int kVecs = kPanels * kPanelVecs, kColumns = kVecs * kLanes;
  float* s = w.s + lane;
  float* o = w.o + lane;
  amx_product<false>(segment.k.data, segment.k.row_bytes, segment.count, w.q + lane, 0, kTileLanes, (p.D + 1) / 2,
                     kColumns, s, kTileLanes);
  vf largest[kVecs];
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) largest[j] = broadcast(-kInf);
  for (int r = 0; r < segment.count; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      float* score = s + r * kTileLanes + j * kLanes;
      const vf x = load(score) * broadcast(terms.scale);
      if (kPlain) largest[j] = max(largest[j], x);
      store(score, x);
    }
  }
  if (!kPlain) finish_scores<true, kVecs>(s, kTileLanes, 0, segment.count, terms, largest);
  segment.v.hidden.note_live(s, kColumns);
  softmax_step<true, kVecs>(s, segment.count, largest, w.row_max + lane, w.row_sum + lane, w.alpha + lane);
  if (dropout) drop_weights<true, kVecs>(dropout, query, segment.first, segment.count, s);
  for (int e = 0; e < p.Dv; ++e) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      float* out = o + e * kTileLanes + j * kLanes;
      store(out, load(out) * load(w.alpha + lane + j * kLanes));
    }
  }
  amx_product<true>(reinterpret_cast<const char*>(segment.v.data), 4 * segment.v.row, p.Dv, s, 0, kTileLanes,
                    (segment.count + 1) / 2, kColumns, o, kTileLanes);
}

// The segment's values as AMX reads them, of which those that hold NaN or inf are hidden where `masked`.
void stage_across(const AttentionParams& p, const Workspace& w, Segment& segment, const bf16* value, int64_t stride,
                  bool masked) {
  KeyOperand& v = segment.v;
  const int Dv = static_cast<int>(p.Dv);
  v.hidden.count = 0;
  if (masked) value = v.hidden.hide(value, stride, segment.count, Dv, w.v_finite);
  if (w.has_pairs && v.hidden.count == 0) {
    v.data = w.v_pairs + segment.first / 2, v.row = w.v_pairs_row;
    return;
  }
  const int64_t row = round_up(Dv, kLanes);
  interleave_rows(value, stride, segment.count, Dv, w.v, row);
  transpose_words(w.v, row, (segment.count + 1) / 2, Dv, w.v_across, kAcrossRow);
  v.data = w.v_across, v.row = kAcrossRow;
}

// Keys [from, to) of the values of a head, interleaved in pairs and transposed, to w.v_pairs.
void stage_all_across(const AttentionParams& p, const Workspace& w, const bf16* value, int64_t from, int64_t to) {
  const int64_t stride = p.value_stride.l, row = round_up(p.Dv, kLanes);
  for (int64_t key = from / (2 * kLanes) * (2 * kLanes); key < to; key += 2 * kLanes) {
    interleave_rows(value + key * stride, stride, std::min<int64_t>(to - key, 2 * kLanes), p.Dv, w.v, row);
    transpose_words(w.v, row, kLanes, p.Dv, w.v_pairs + key / 2, w.v_pairs_row);
  }
}

// Rows of an odd number of elements, with a zero behind them.
Rows stage_odd(const bf16* rows, int64_t stride, int count, int size, float* to) {
  bf16* out = reinterpret_cast<bf16*>(to);
  for (int r = 0; r < count; ++r, out += size + 1) {
    std::memcpy(out, rows + r * stride, static_cast<size_t>(size) * sizeof(bf16));
    out[size] = bf16{};
  }
  return {reinterpret_cast<const char*>(to), static_cast<int64_t>((size + 1) * sizeof(bf16))};
}
#endif

template <bool kIsDot, int kPanels = kMaxPanels>
PYATTN_INLINE void call_tile_step(int panels, const AttentionParams& p, const Workspace& w, const ScoreTerms& terms,
                                  const Dropout& dropout, Segment& segment, int64_t query, int lane) {
#ifdef PYATTN_ISA_AVX512_AMX
  if constexpr (kIsDot) {
    if (panels == kPanels)
      terms.any() ? amx_tile_step<kPanels, false>(p, w, terms, dropout, segment, query, lane)
                  : amx_tile_step<kPanels, true>(p, w, terms, dropout, segment, query, lane);
    else if constexpr (kPanels > 1)
      call_tile_step<kIsDot, kPanels - 1>(panels, p, w, terms, dropout, segment, query, lane);
    return;
  }
#endif
  if (panels == kPanels)
    terms.any() ? tile_step<kIsDot, kPanels, false>(p, w, terms, dropout, segment, query, lane)
                : tile_step<kIsDot, kPanels, true>(p, w, terms, dropout, segment, query, lane);
  else if constexpr (kPanels > 1)
    call_tile_step<kIsDot, kPanels - 1>(panels, p, w, terms, dropout, segment, query, lane);
}

// out = factor * O / sum, transposed back, and lse.
template <class T>
void finish(const AttentionParams& p, const Workspace& w, int rows, float sink, float factor, T* out, float* lse) {
  for (int i = 0; i < rows; ++i) {
    const RowEnd end(w.row_max[i], w.row_sum[i], sink);
    lse[i] = end.lse;
    w.alpha[i] = factor * end.factor;
  }
  store_transposed(w.o, w.alpha, rows, static_cast<int>(p.Dv), out, p.out_stride.l);
}

// A block of queries of head h of one sample.
template <class T>
void forward_block(const AttentionParams& p, const Workspace& w, const KeyRanges& key_ranges, int64_t h,
                   int64_t first_query) {
  const BlockRanges ranges(p, key_ranges, first_query);
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const int64_t kv_head = h / (p.Hq / p.Hkv);
  const KeyRows<T> keys(p, p.key, p.key_stride, kv_head), values(p, p.value, p.value_stride, kv_head);
  const T* query = static_cast<const T*>(p.query) + h * p.query_stride.h + first_query * p.query_stride.l;
  const HeadTerms head(p, h);
  const Dropout dropout(p, h);

  pack_queries(query, p.query_stride.l, ranges.rows, D, w.q);
  clear_columns(w.o, ranges.live_lanes, Dv);
  for (int i = 0; i < ranges.live_lanes; ++i) {
    w.row_max[i] = -kInf;
    w.row_sum[i] = 0;
  }
  Segment segment;
  for_segments(ranges, p.Lk, kBlockN, [&](int64_t first, int count, bool edge) {
    const bool masked = edge || head.mask;
    segment.first = first;
    segment.count = count;
    int64_t k_stride, v_stride;
    const T* key = keys.rows(first, count, D, w.pages_k, k_stride);
    segment.k = stage_rows(key, k_stride, count, D, w.k);
    const T* value = values.rows(first, count, Dv, w.pages_v, v_stride);
    const float* pairs = kDot<T> && w.has_pairs ? w.v_pairs + first / 2 * Dv : nullptr;
#ifdef PYATTN_ISA_AVX512_AMX
    if constexpr (kDot<T>) {
      if (D % 2) segment.k = stage_odd(key, k_stride, count, D, w.k);
      stage_across(p, w, segment, value, v_stride, masked);
    } else
#endif
      segment.v.stage(value, v_stride, count, Dv, masked, pairs, w.v, w.v_finite);
    for (int begin = 0; begin < ranges.live_lanes; begin += kTileLanes) {
      int lane = begin, end = min_int(begin + kTileLanes, ranges.live_lanes);
      ranges.narrow(first, count, lane, end);
      if (lane >= end) continue;
      if (head.mask) load_bias(p, head.mask, first_query + begin, first, ranges.rows - begin, count, w.bias);
      const auto terms = head.terms(ranges, key_ranges, first_query, lane, first, masked, w.bias);
      call_tile_step<kDot<T>>((end - lane) / kPanel, p, w, terms, dropout, segment, first_query + lane, lane);
      float* o = w.o + lane / kTileLanes * round_up(Dv, kLanes) * kTileLanes + lane % kTileLanes;
      segment.v.hidden.add(value, v_stride, Dv, w.s + lane % kTileLanes, kTileLanes, end - lane, o);
    }
  });
  T* out = static_cast<T*>(p.out) + h * p.out_stride.h + first_query * p.out_stride.l;
  finish(p, w, ranges.rows, p.sinks ? p.sinks[h] : -kInf, dropout ? dropout.factor : 1, out,
         p.lse + h * p.lse_stride_h + first_query);
}

// Every `slices`-th block of the query heads of a sample that share a key head.
struct Task {
  const AttentionParams* sample;
  int64_t kv_head, slice, slices;
};

// The work cut into some tasks for each thread, in the order of the samples; but never so finely that a task has no
// block.
std::vector<Task> tasks_of(const std::vector<AttentionParams>& samples, int threads) {
  constexpr double kTasksPerThread = 8;
  double all_pairs = 0;
  for (const AttentionParams& sample : samples) all_pairs += static_cast<double>(pairs_of(sample));
  std::vector<Task> tasks;
  for (const AttentionParams& p : samples) {
    const int64_t blocks = p.Hkv > 0 ? p.Hq / p.Hkv * blocks_of(p) : 0;
    const double share = all_pairs > 0 ? static_cast<double>(pairs_of(p)) / all_pairs : 0;
    const double wanted = threads > 1 ? kTasksPerThread * threads * share / static_cast<double>(p.Hkv) + 1 : 1;
    const int64_t slices = std::min(static_cast<int64_t>(wanted), blocks);
    for (int64_t kv_head = 0; kv_head < p.Hkv; ++kv_head)
      for (int64_t slice = 0; slice < slices; ++slice) tasks.push_back({&p, kv_head, slice, slices});
  }
  return tasks;
}

template <class T>
void forward(const AttentionParams& p, const std::vector<AttentionParams>& samples, int threads) {
  const std::vector<Task> tasks = tasks_of(samples, threads);
  parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t n) {
    const Task& task = tasks[n];
    const AttentionParams& sample = *task.sample;
    const int64_t group = p.Hq / p.Hkv, blocks = blocks_of(sample);
    Workspace w;
    w.carve(thread_scratch(w.carve(nullptr, p)), p);
    const KeyRanges ranges(sample);
    if constexpr (kDot<T>) {
      const int64_t from = ranges.row(0).lo / 2 * 2, to = even_end(ranges.row(sample.Lq - 1).hi, sample.Lk);
      const T* value = static_cast<const T*>(sample.value) + task.kv_head * p.value_stride.h;
#ifdef PYATTN_ISA_AVX512_AMX
      if (from < to && w.has_pairs) stage_all_across(sample, w, value, from, to);
#else
      if (from < to && w.has_pairs)
        interleave_rows(value + from * p.value_stride.l, p.value_stride.l, to - from, p.Dv,
                        w.v_pairs + from / 2 * p.Dv, p.Dv);
#endif
    }
    for (int64_t i = task.slice; i < group * blocks; i += task.slices)  // the long causal ones first
      forward_block<T>(sample, w, ranges, task.kv_head * group + i / blocks, (blocks - 1 - i % blocks) * kBlockM);
  });
}

}  // namespace

void attention_forward(const AttentionParams& p, int threads) {
  // Waking a thread costs more than it brings below some 100 microseconds of work, or of reading keys.
  std::vector<AttentionParams> samples = longest_first(p);
  double pairs = 0, keys = 0;
  for (const AttentionParams& sample : samples) {
    pairs += static_cast<double>(p.Hq * pairs_of(sample));
    keys += static_cast<double>(p.Hkv * keys_of(sample));
  }
  const double flops = 2.0 * static_cast<double>(p.D + p.Dv);
  if (flops * pairs < 5e6 && flops * keys < 1e6) threads = 1;
  // Of pages the number says nothing of the length: other samples of the batch may need them.
  const auto few = std::stable_partition(samples.begin(), samples.end(), [](const AttentionParams& s) {
    return s.Lq > kDecodeQueries || (s.Lk <= kDecodeKeys && !s.block_table) || s.dropout_threshold != 0;
  });
  if (few != samples.end()) attention_decode(p, {few, samples.end()}, threads);
  samples.erase(few, samples.end());
  with_dtype(p.dtype, [&](auto element) { forward<decltype(element)>(p, samples, threads); });
}

}  // namespace pyattn::PYATTN_ISA
