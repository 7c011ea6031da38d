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
// a head that a thread takes; segments begin at even keys.
#include <cmath>

#include "../parallel.h"
#include "../scratch.h"
#include "blocks.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr double kLn2 = 0.69314718055994531;

// What one thread works in.
struct Workspace {
  float* q;        // [tile][query_words][kTileLanes]: the queries, transposed
  float* s;        // [kBlockN][kTileLanes]: scores, then weights, of one tile
  float* o;        // [tile][Dv rounded up][kTileLanes]: the output, transposed
  float* bias;     // [kBlockN][kTileLanes]: attn_mask of one tile, transposed
  float* k;        // [kBlockN][D]: keys converted to float
  float* v;        // [kBlockN][Dv]: values converted to float, or interleaved in pairs
  void* pages_k;   // [kBlockN][D]: keys gathered from pages
  void* pages_v;   // [kBlockN][Dv]: values gathered from pages
  float* v_pairs;  // [Lk / 2][Dv]: with the dot product, all values of the head interleaved in pairs
  void* v_finite;  // [kBlockN][Dv]: values of which rows with NaN or inf are set to 0
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
    v = carver.take<float>(p.dtype == DType::f32 ? 0 : kBlockN * p.Dv);
    pages_k = carver.take<float>(p.block_table ? kBlockN * p.D : 0);
    pages_v = carver.take<float>(p.block_table ? kBlockN * p.Dv : 0);
    v_pairs = carver.take<float>(kHasBf16Dot && p.dtype == DType::bf16 && !p.block_table ? (p.Lk + 1) / 2 * p.Dv : 0);
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
  bool masked;  // some query of the block may not see some key of it
  Rows k;
  KeyOperand v;
};

// The first `kPanels` panels from lane `lane` of the block on take in one segment.
template <bool kIsDot, int kPanels>
__attribute__((noinline)) void tile_step(const AttentionParams& p, const Workspace& w, const BlockRanges& ranges,
                                         Segment& segment, int lane, bool has_bias) {
  constexpr int kVecs = kPanels * kPanelVecs;
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const int in_tile = lane % kTileLanes;
  const int64_t tile = lane / kTileLanes;
  const float* q = w.q + tile * query_words<kIsDot>(D) * kTileLanes + in_tile;
  float* o = w.o + tile * round_up(Dv, kLanes) * kTileLanes + in_tile;
  float* s = w.s + in_tile;
  const float scale = p.scale * kLog2e;

  vf largest[kVecs];
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) largest[j] = broadcast(-kInf);
  for_row_tiles(segment.count, [&](int i, auto rows) {
    score_tile<kIsDot, rows(), kVecs>(segment.k[i], segment.k.row_bytes, D, q, scale, s + i * kTileLanes, largest);
  });
  HiddenRows& hidden = segment.v.hidden;
  if (segment.masked) {
    mask_scores<kVecs>(s, has_bias ? w.bias + in_tile : nullptr, ranges.lo + lane, ranges.hi + lane,
                       static_cast<int32_t>(segment.first), segment.count, largest);
    for (int n = 0; n < hidden.count; ++n) {
      hidden.live[n] = 0;
      for (int i = 0; i < kPanels * kPanel; ++i)
        hidden.live[n] |= uint64_t{s[hidden.row[n] * kTileLanes + i] != -kInf} << i;
    }
  }
  softmax_step<kIsDot, kVecs>(s, segment.count, largest, w.row_max + lane, w.row_sum + lane, w.alpha + lane);
  const int rows_of_v = kIsDot ? (segment.count + 1) / 2 : segment.count;
  for_row_tiles(Dv, [&](int e, auto rows) {
    output_tile<kIsDot, rows(), kVecs>(segment.v.data + e, segment.v.row, rows_of_v, s, w.alpha + lane,
                                       o + e * kTileLanes);
  });
}

template <bool kIsDot, int kPanels = kMaxPanels>
PYATTN_INLINE void call_tile_step(int panels, const AttentionParams& p, const Workspace& w, const BlockRanges& ranges,
                                  Segment& segment, int lane, bool has_bias) {
  if (panels == kPanels)
    tile_step<kIsDot, kPanels>(p, w, ranges, segment, lane, has_bias);
  else if constexpr (kPanels > 1)
    call_tile_step<kIsDot, kPanels - 1>(panels, p, w, ranges, segment, lane, has_bias);
}

// out = O / sum, transposed back; lse = log(sum) + maximum.
template <class T>
void finish(const AttentionParams& p, const Workspace& w, int rows, T* out, float* lse) {
  for (int i = 0; i < rows; ++i) {
    lse[i] = static_cast<float>((static_cast<double>(w.row_max[i]) + std::log2(w.row_sum[i])) * kLn2);
    w.alpha[i] = w.row_sum[i] == 0 ? 0 : 1 / w.row_sum[i];
  }
  store_transposed(w.o, w.alpha, rows, static_cast<int>(p.Dv), out, p.out_stride.l);
}

// The operands of one key head, and of the query heads that share it.
template <class T>
struct Head {
  const T* query;  // of the first query head
  KeyRows<T> keys, values;
  const char* mask;
  T* out;
  float* lse;

  Head(const AttentionParams& p, int64_t b, int64_t kv_head)
      : keys(p, p.key, p.key_stride, b, kv_head), values(p, p.value, p.value_stride, b, kv_head) {
    const int64_t h = kv_head * (p.Hq / p.Hkv);
    query = static_cast<const T*>(p.query) + b * p.query_stride.b + h * p.query_stride.h;
    out = static_cast<T*>(p.out) + b * p.out_stride.b + h * p.out_stride.h;
    lse = p.lse + (b * p.Hq + h) * p.Lq;
    mask = static_cast<const char*>(p.mask);
    if (mask) mask += (b * p.mask_stride_b + h * p.mask_stride_h) * size_of(p.mask_dtype);
  }
};

template <class T>
void forward_block(const AttentionParams& p, const Workspace& w, const KeyRanges& key_ranges, const Head<T>& head,
                   int64_t group_head, int64_t first_query) {
  const BlockRanges ranges(p, key_ranges, first_query);
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const T* query = head.query + group_head * p.query_stride.h + first_query * p.query_stride.l;
  const char* mask = head.mask ? head.mask + group_head * p.mask_stride_h * size_of(p.mask_dtype) : nullptr;
  const bool has_bias = mask != nullptr;

  pack_queries(query, p.query_stride.l, ranges.rows, D, w.q);
  for (int lane = 0; lane < ranges.live_lanes; lane += kLanes) {
    float* column = w.o + lane / kTileLanes * round_up(p.Dv, kLanes) * kTileLanes + lane % kTileLanes;
    for (int64_t e = 0; e < round_up(p.Dv, kLanes); ++e) store(column + e * kTileLanes, vf{});
  }
  for (int i = 0; i < ranges.live_lanes; ++i) {
    w.row_max[i] = -kInf;
    w.row_sum[i] = 0;
  }
  Segment segment;
  for_segments(ranges, p.Lk, kBlockN, [&](int64_t first, int count, bool edge) {
    segment.first = first;
    segment.count = count;
    segment.masked = edge || has_bias;
    int64_t k_stride, v_stride;
    const T* key = head.keys.rows(first, count, D, w.pages_k, k_stride);
    segment.k = stage_rows(key, k_stride, count, D, w.k);
    const T* value = head.values.rows(first, count, Dv, w.pages_v, v_stride);
    const float* pairs = kDot<T> && !p.block_table ? w.v_pairs + first / 2 * Dv : nullptr;
    segment.v.stage(value, v_stride, count, Dv, segment.masked, pairs, w.v, w.v_finite);
    for (int begin = 0; begin < ranges.live_lanes; begin += kTileLanes) {
      int lane = begin, end = min_int(begin + kTileLanes, ranges.live_lanes);
      ranges.narrow(first, count, lane, end);
      if (lane >= end) continue;
      if (has_bias) load_bias(p, mask, first_query + begin, first, ranges.rows - begin, count, w.bias);
      call_tile_step<kDot<T>>((end - lane) / kPanel, p, w, ranges, segment, lane, has_bias);
      float* o = w.o + lane / kTileLanes * round_up(Dv, kLanes) * kTileLanes + lane % kTileLanes;
      segment.v.hidden.add(value, v_stride, Dv, w.s + lane % kTileLanes, kTileLanes, end - lane, o);
    }
  });
  T* out = head.out + group_head * p.out_stride.h + first_query * p.out_stride.l;
  finish(p, w, ranges.rows, out, head.lse + group_head * p.Lq + first_query);
}

// A task is every `slices`-th block of the query heads that share a key head, the long causal ones first.
template <class T>
void forward(const AttentionParams& p, int threads) {
  constexpr int64_t kTasksPerThread = 8;
  const int64_t blocks = (p.Lq + kBlockM - 1) / kBlockM, all_blocks = p.B * p.Hkv > 0 ? p.Hq / p.Hkv * blocks : 0;
  const int64_t wanted = threads > 1 ? kTasksPerThread * threads / (p.B * p.Hkv > 0 ? p.B * p.Hkv : 1) + 1 : 1;
  const int64_t slices = wanted < all_blocks ? wanted : all_blocks;
  parallel_for(p.B * p.Hkv * slices, threads, [&](int64_t task) {
    const int64_t b = task / slices / p.Hkv, kv_head = task / slices % p.Hkv;
    Workspace w;
    w.carve(thread_scratch(w.carve(nullptr, p)), p);
    const KeyRanges ranges(p, b);
    const Head<T> head(p, b, kv_head);
    if constexpr (kDot<T>) {
      const int64_t from = ranges.row(0).lo / 2 * 2, to = even_end(ranges.row(p.Lq - 1).hi, p.Lk);
      const int64_t stride = p.value_stride.l;
      if (from < to && !p.block_table)
        interleave_rows(head.values.first + from * stride, stride, to - from, p.Dv, w.v_pairs + from / 2 * p.Dv, p.Dv);
    }
    for (int64_t i = task % slices; i < all_blocks; i += slices)
      forward_block(p, w, ranges, head, i / blocks, (blocks - 1 - i % blocks) * kBlockM);
  });
}

}  // namespace

void attention_forward(const AttentionParams& p, int threads) {
  // Waking a thread costs more than it brings below some 100 microseconds of work, or of reading keys.
  const double pairs = 2.0 * static_cast<double>(p.Lk * (p.D + p.Dv));
  const double flops = pairs * static_cast<double>(p.B * p.Hq * p.Lq), reads = pairs * static_cast<double>(p.B * p.Hkv);
  if (flops < 5e6 && reads < 1e6) threads = 1;
  // Of pages the number says nothing of the length: other samples of the batch may need them.
  if (p.Lq <= kDecodeQueries && (p.Lk > kDecodeKeys || p.block_table)) return attention_decode(p, threads);
  with_dtype(p.dtype, [&](auto element) { forward<decltype(element)>(p, threads); });
}

}  // namespace pyattn::PYATTN_ISA
