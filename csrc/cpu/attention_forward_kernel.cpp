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
#include "operands.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int kStrip = 16;
constexpr double kLn2 = 0.69314718055994531;

// What one thread works in.
struct Workspace {
  float* q;        // [tile][query_words][kTileLanes]: the queries, transposed
  float* s;        // [kBlockN][kTileLanes]: scores, then weights, of one tile
  float* o;        // [tile][Dv rounded up][kTileLanes]: the output, transposed
  float* bias;     // [kBlockN][kTileLanes]: attn_mask of one tile, transposed
  float* k;        // [kBlockN][D]: keys converted to float
  float* v;        // [kBlockN][Dv]: values converted to float, or interleaved in pairs
  float* v_pairs;  // [Lk / 2][Dv]: with the dot product, all values of the head interleaved in pairs
  void* v_finite;  // [kBlockN][Dv]: values of which rows with NaN or inf are set to 0
  float* row_max;  // [kBlockM], in log2 units
  float* row_sum;  // [kBlockM]
  float* alpha;    // [kBlockM]: what earlier weights must be multiplied by, in registers it would crowd a tile
  int32_t* lo;     // [kBlockM]: the key range of each query
  int32_t* hi;     // [kBlockM]

  size_t carve(void* base, const AttentionParams& p) {
    Carver carver(base);
    q = carver.take<float>(round_up(p.D, kLanes) * kBlockM);
    s = carver.take<float>(kBlockN * kTileLanes);
    o = carver.take<float>(round_up(p.Dv, kLanes) * kBlockM);
    bias = carver.take<float>(p.mask ? kBlockN * kTileLanes : 0);
    k = carver.take<float>(p.dtype == DType::f32 ? 0 : kBlockN * p.D);
    v = carver.take<float>(p.dtype == DType::f32 ? 0 : kBlockN * p.Dv);
    v_pairs = carver.take<float>(kHasBf16Dot && p.dtype == DType::bf16 ? (p.Lk + 1) / 2 * p.Dv : 0);
    v_finite = carver.take<float>(kBlockN * p.Dv);
    row_max = carver.take<float>(kBlockM);
    row_sum = carver.take<float>(kBlockM);
    alpha = carver.take<float>(kBlockM);
    lo = carver.take<int32_t>(kBlockM);
    hi = carver.take<int32_t>(kBlockM);
    return carver.used();
  }
};

// Keys [first, first + count) with their operands as the tiles read them.
struct Segment {
  int64_t first;
  int count;
  bool edge;      // some query of the block does not see some key of it
  const char* k;  // rows of float, or of bfloat16 pairs
  int64_t k_row_bytes;
  const float* v;        // rows of float; with the dot product, a row is a pair of keys
  int64_t v_row;         // floats from one row to the next
  int not_finite_count;  // rows of V that hold NaN or inf, set to 0 in `v`; looked for only where keys are
                         // masked
  int not_finite[kBlockN];
};

// 0 * NaN is NaN: where a key is masked for some query, a value that is not finite must stay out of the
// matrix product. Lists such rows, and returns values that have zeros in their place.
template <class T>
const T* hide_not_finite(const T* value, int64_t& stride, int size, Segment& segment, void* clean) {
  for (int r = 0; r < segment.count; ++r) {
    int any = 0;
    for (int e = 0; e < size; ++e) any |= not_finite(value[r * stride + e]);
    if (any) segment.not_finite[segment.not_finite_count++] = r;
  }
  if (segment.not_finite_count == 0) return value;
  T* copy = static_cast<T*>(clean);
  for (int r = 0, next = 0; r < segment.count; ++r) {
    const bool hide = next < segment.not_finite_count && segment.not_finite[next] == r;
    next += hide;
    for (int e = 0; e < size; ++e) copy[r * size + e] = hide ? T{} : value[r * stride + e];
  }
  stride = size;
  return copy;
}

template <class T>
void stage(const AttentionParams& p, const T* key, const T* value, bool masked, const Workspace& w, Segment& segment) {
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  int64_t v_stride = p.value_stride.l;
  key += segment.first * p.key_stride.l;
  value += segment.first * v_stride;
  segment.not_finite_count = 0;
  if (masked) value = hide_not_finite(value, v_stride, Dv, segment, w.v_finite);
  if constexpr (std::is_same_v<T, float> || kDot<T>) {
    segment.k = reinterpret_cast<const char*>(key);
    segment.k_row_bytes = p.key_stride.l * static_cast<int64_t>(sizeof(T));
  } else {
    convert_rows(key, p.key_stride.l, segment.count, D, w.k);
    segment.k = reinterpret_cast<const char*>(w.k);
    segment.k_row_bytes = D * static_cast<int64_t>(sizeof(float));
  }
  if constexpr (std::is_same_v<T, float>) {
    segment.v = value;
    segment.v_row = v_stride;
  } else if (kDot<T> && segment.not_finite_count == 0) {
    segment.v = w.v_pairs + segment.first / 2 * Dv;
    segment.v_row = Dv;
  } else {
    if constexpr (kDot<T>)
      interleave_rows(value, v_stride, segment.count, Dv, w.v);
    else
      convert_rows(value, v_stride, segment.count, Dv, w.v);
    segment.v = w.v;
    segment.v_row = Dv;
  }
}

// Adds the values that `hide_not_finite` took out, for the queries that do see them.
template <class T>
void add_not_finite(const Segment& segment, const T* value, int64_t stride, int size, const float* s,
                    const uint64_t* live, int lanes, float* o) {
  for (int n = 0; n < segment.not_finite_count; ++n) {
    const int r = segment.not_finite[n];
    const T* row = value + (segment.first + r) * stride;
    for (int lane = 0; lane < lanes; ++lane) {
      if (!(live[n] >> lane & 1)) continue;
      float weight = s[(kDot<T> ? r / 2 : r) * kTileLanes + lane];
      if (kDot<T>) weight = bits_to_float(r % 2 ? float_to_bits(weight) & 0xffff0000 : float_to_bits(weight) << 16);
      for (int e = 0; e < size; ++e) o[e * kTileLanes + lane] += weight * to_float(row[e]);
    }
  }
}

// The first `kPanels` panels from lane `lane` of the block on take in one segment.
template <class T, int kPanels>
__attribute__((noinline)) void tile_step(const AttentionParams& p, const Workspace& w, const Segment& segment,
                                         const T* value, int lane, bool has_bias) {
  constexpr int kVecs = kPanels * kPanelVecs;
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const int in_tile = lane % kTileLanes;
  const int64_t tile = lane / kTileLanes;
  const float* q = w.q + tile * query_words<T>(D) * kTileLanes + in_tile;
  float* o = w.o + tile * round_up(Dv, kLanes) * kTileLanes + in_tile;
  float* s = w.s + in_tile;
  const bool masked = segment.edge || has_bias;
  const float scale = p.scale * kLog2e;

  vf largest[kVecs];
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) largest[j] = broadcast(-kInf);
  for_row_tiles(segment.count, [&](int i, auto rows) {
    score_tile<kDot<T>, rows(), kVecs>(segment.k + i * segment.k_row_bytes, segment.k_row_bytes, D, q, scale,
                                       s + i * kTileLanes, largest);
  });
  uint64_t live[kBlockN];  // for each hidden row of V, the lanes that see it
  if (masked) {
    mask_scores<kVecs>(s, has_bias ? w.bias + in_tile : nullptr, w.lo + lane, w.hi + lane,
                       static_cast<int32_t>(segment.first), segment.count, largest);
    for (int n = 0; n < segment.not_finite_count; ++n) {
      live[n] = 0;
      for (int i = 0; i < kPanels * kPanel; ++i)
        live[n] |= uint64_t{s[segment.not_finite[n] * kTileLanes + i] != -kInf} << i;
    }
  }
  softmax_step<kDot<T>, kVecs>(s, segment.count, largest, w.row_max + lane, w.row_sum + lane, w.alpha + lane);
  const int rows_of_v = kDot<T> ? (segment.count + 1) / 2 : segment.count;
  for_row_tiles(Dv, [&](int e, auto rows) {
    output_tile<kDot<T>, rows(), kVecs>(segment.v + e, segment.v_row, rows_of_v, s, w.alpha + lane, o + e * kTileLanes);
  });
  if (segment.not_finite_count > 0) add_not_finite(segment, value, p.value_stride.l, Dv, s, live, kPanels * kPanel, o);
}

template <class T, int kPanels = kMaxPanels>
PYATTN_INLINE void call_tile_step(int panels, const AttentionParams& p, const Workspace& w, const Segment& segment,
                                  const T* value, int lane, bool has_bias) {
  if (panels == kPanels)
    tile_step<T, kPanels>(p, w, segment, value, lane, has_bias);
  else if constexpr (kPanels > 1)
    call_tile_step<T, kPanels - 1>(panels, p, w, segment, value, lane, has_bias);
}

// out = O / sum, transposed back; lse = log(sum) + maximum.
template <class T>
void finish(const AttentionParams& p, const Workspace& w, int rows, T* out, float* lse) {
  const int Dv = static_cast<int>(p.Dv);
  for (int i = 0; i < rows; ++i)
    lse[i] = static_cast<float>((static_cast<double>(w.row_max[i]) + std::log2(w.row_sum[i])) * kLn2);
  for (int lane = 0; lane < rows; lane += kLanes) {
    const float* column = w.o + lane / kTileLanes * round_up(Dv, kLanes) * kTileLanes + lane % kTileLanes;
    const vf sum = load(w.row_sum + lane), inverse = sum == vf{} ? vf{} : broadcast(1.f) / sum;
    for (int e = 0; e < Dv; e += kLanes, column += kLanes * kTileLanes) {
      vf block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(column + i * kTileLanes) * inverse;
      transpose(block);
      T* corner = out + lane * p.out_stride.l + e;
      const bool whole = lane + kLanes <= rows && e + kLanes <= Dv;
      alignas(64) T padded[kLanes * kLanes];
      T* to = whole ? corner : padded;
      const int64_t to_stride = whole ? p.out_stride.l : kLanes;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_floats(to + i * to_stride, block[i]);
      if (whole) continue;
      for (int i = 0; i < kLanes && lane + i < rows; ++i)
        for (int c = 0; c < kLanes && e + c < Dv; ++c) corner[i * p.out_stride.l + c] = padded[i * kLanes + c];
    }
  }
}

// The operands of one key head, and of the query heads that share it.
template <class T>
struct Head {
  const T *query, *key, *value;  // of the first query head
  const char* mask;
  T* out;
  float* lse;

  Head(const AttentionParams& p, int64_t b, int64_t kv_head) {
    const int64_t h = kv_head * (p.Hq / p.Hkv);
    query = static_cast<const T*>(p.query) + b * p.query_stride.b + h * p.query_stride.h;
    key = static_cast<const T*>(p.key) + b * p.key_stride.b + kv_head * p.key_stride.h;
    value = static_cast<const T*>(p.value) + b * p.value_stride.b + kv_head * p.value_stride.h;
    out = static_cast<T*>(p.out) + b * p.out_stride.b + h * p.out_stride.h;
    lse = p.lse + (b * p.Hq + h) * p.Lq;
    mask = static_cast<const char*>(p.mask);
    if (mask) mask += (b * p.mask_stride_b + h * p.mask_stride_h) * size_of(p.mask_dtype);
  }
};

PYATTN_INLINE int64_t even_end(int64_t key, int64_t Lk) { return key < Lk ? round_up(key, 2) : key; }

template <class T>
void forward_block(const AttentionParams& p, const Workspace& w, const KeyRanges& ranges, const Head<T>& head,
                   int64_t group_head, int64_t first_query) {
  const int rows = min_int(kBlockM, p.Lq - first_query);
  const int live_lanes = static_cast<int>(round_up(rows, kPanel));
  const T* query = head.query + group_head * p.query_stride.h + first_query * p.query_stride.l;
  const char* mask = head.mask ? head.mask + group_head * p.mask_stride_h * size_of(p.mask_dtype) : nullptr;
  const bool has_bias = mask != nullptr;

  pack_queries(query, p.query_stride.l, rows, static_cast<int>(p.D), w.q);
  for (int lane = 0; lane < live_lanes; lane += kLanes) {
    float* column = w.o + lane / kTileLanes * round_up(p.Dv, kLanes) * kTileLanes + lane % kTileLanes;
    for (int64_t e = 0; e < round_up(p.Dv, kLanes); ++e) store(column + e * kTileLanes, vf{});
  }
  for (int i = 0; i < live_lanes; ++i) {
    const KeyRange range = i < rows ? ranges.row(first_query + i) : KeyRange{0, 0};
    w.lo[i] = static_cast<int32_t>(range.lo);
    w.hi[i] = static_cast<int32_t>(range.hi);
    w.row_max[i] = -kInf;
    w.row_sum[i] = 0;
  }

  Segment segment;
  const auto process = [&](int64_t first, int count, bool edge) {
    segment.first = first;
    segment.count = count;
    segment.edge = edge;
    stage(p, head.key, head.value, edge || has_bias, w, segment);
    for (int begin = 0; begin < live_lanes; begin += kTileLanes) {
      // Both ends of the ranges rise with the query, so the panels that see a segment follow one another.
      int lane = begin, end = min_int(begin + kTileLanes, live_lanes);
      const auto last_row = [&](int panel) { return min_int(panel + kPanel, rows) - 1; };
      while (lane < end && w.hi[last_row(lane)] <= first) lane += kPanel;
      while (lane < end && w.lo[end - kPanel] >= first + count) end -= kPanel;
      if (lane >= end) continue;
      if (has_bias) load_bias(p, mask, first_query + begin, first, rows - begin, count, w.bias);
      call_tile_step<T>((end - lane) / kPanel, p, w, segment, head.value, lane, has_bias);
    }
  };
  const auto strips = [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; k += kStrip) process(k, min_int(kStrip, to - k), true);
  };
  // Keys that some query sees are [lowest, highest); those that every query sees are [inner_lo, inner_hi).
  // All are even, or Lk: a pair of values never reaches over the end of a segment, where nobody looks for NaN.
  const int64_t lowest = w.lo[0] / 2 * 2, highest = even_end(w.hi[rows - 1], p.Lk);
  const int64_t inner_lo = round_up(w.lo[rows - 1], 2), inner_hi = w.hi[0] < p.Lk ? w.hi[0] / 2 * 2 : w.hi[0];
  if (inner_lo < inner_hi) {
    strips(lowest, inner_lo);
    for (int64_t k = inner_lo; k < inner_hi; k += kBlockN) process(k, min_int(kBlockN, inner_hi - k), false);
    strips(inner_hi, highest);
  } else {
    strips(lowest, highest);
  }
  T* out = head.out + group_head * p.out_stride.h + first_query * p.out_stride.l;
  finish(p, w, rows, out, head.lse + group_head * p.Lq + first_query);
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
      if (from < to) interleave_rows(head.value + from * stride, stride, to - from, p.Dv, w.v_pairs + from / 2 * p.Dv);
    }
    for (int64_t i = task % slices; i < all_blocks; i += slices)
      forward_block(p, w, ranges, head, i / blocks, (blocks - 1 - i % blocks) * kBlockM);
  });
}

}  // namespace

void attention_forward(const AttentionParams& p, int threads) {
  // Waking a thread costs more than it brings below some 100 microseconds of work.
  const double flops = 2.0 * static_cast<double>(p.B * p.Hq * p.Lq) * static_cast<double>(p.Lk * (p.D + p.Dv));
  if (flops < 5e6) threads = 1;
  switch (p.dtype) {
    case DType::f32:
      return forward<float>(p, threads);
    case DType::bf16:
      return forward<bf16>(p, threads);
    case DType::f16:
      return forward<f16>(p, threads);
    case DType::boolean:
      return;
  }
}

}  // namespace pyattn::PYATTN_ISA
