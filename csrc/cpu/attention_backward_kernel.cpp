// Attention backward on a CPU: P recomputed from lse, block by block of 64 queries of one head.
//
// As in the forward, lanes are queries: S^T = K Q^T and dP^T = V dO^T read keys and values where they lie, and
// dQ^T += K^T dS^T stays with the block. For the other two products, dK += dS^T Q and dV += P^T dO, the elements of a
// head are the lanes and P and dS, as they have been stored, the scalars. With D_i = dO_i . O_i - dlse_i
// (Dao et al. 2022, arXiv:2205.14135, algorithm 4):
//
//   P = exp(S - lse)    dS = P * (dP - D)    dmask = dS    dQ = scale dS K    dK = scale dS^T Q    dV = P^T dO
//
// The blocks of all query heads that share a key head add to its dK and dV, kept in float, one after the other: a
// block adds to a segment of keys once the blocks before it have passed that segment (pipeline.h). So several threads
// can work on one head, and the sums have the same bits for every number of threads.
//
// With the bfloat16 dot product P and dS are rounded to bfloat16, in pairs of queries for dK and dV, and dS also in
// pairs of keys for dQ, which reads K interleaved in pairs of keys.
#include <cmath>

#include "../pipeline.h"
#include "../scratch.h"
#include "blocks.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int kSegment = 96;  // keys of a segment: P and dS of a block stay near

PYATTN_INLINE int padded(int64_t size) { return static_cast<int>(round_up(size, kLanes)); }

// What one thread works in.
struct Workspace {
  float* q;           // [tile][query_words][kTileLanes]: the queries, transposed
  float* grad_out;    // as q, of the output's gradient
  float* q_rows;      // [kBlockM][D padded]: the queries; with the dot product [kBlockM / 2], interleaved in pairs
  float* grad_rows;   // as q_rows, of the output's gradient
  float* lse;         // [kBlockM], in log2 units; inf where a query sees no key
  float* delta;       // [kBlockM]: dO . O - dlse
  float* p;           // [kSegment][kBlockM]: P; with the dot product of kMaxRows keys only
  float* ds;          // [kSegment][kBlockM]: dS; with the dot product [kSegment / 2], in pairs of keys
  bf16* p_half;       // [kSegment][kBlockM]: P, with the dot product
  bf16* ds_half;      // [kSegment][kBlockM]: dS, with the dot product
  float* grad_query;  // [tile][D padded][kTileLanes]: transposed
  float* scale;       // [kBlockM]: the scale, for every query
  float* bias;        // [kSegment][kTileLanes]: attn_mask of one tile, transposed
  float* grad_bias;   // [kSegment][kBlockM]: the gradient of a tile of attn_mask, transposed
  float* k;           // [kSegment][D]: keys converted to float, or interleaved in pairs
  float* v;           // [kSegment][Dv]: values converted to float
  float* k_finite;    // [kSegment][D]: keys of which rows with NaN or inf are set to 0
  float* k_pairs;     // [Lk / 2][D]: with the dot product, the keys of a head interleaved in pairs
  float* grad_key;    // [Lk][D padded]: of the head that the thread owns
  float* grad_value;  // [Lk][Dv padded]

  size_t carve(void* base, const AttentionBackwardParams& p_) {
    const bool dot = kHasBf16Dot && p_.dtype == DType::bf16, converts = p_.dtype != DType::f32;
    const int64_t D = padded(p_.D), Dv = padded(p_.Dv);
    Carver carver(base);
    q = carver.take<float>(D * kBlockM);
    grad_out = carver.take<float>(Dv * kBlockM);
    q_rows = carver.take<float>(D * kBlockM);
    grad_rows = carver.take<float>(Dv * kBlockM);
    lse = carver.take<float>(kBlockM);
    delta = carver.take<float>(kBlockM);
    p = carver.take<float>((dot ? kMaxRows : kSegment) * kBlockM);
    ds = carver.take<float>(kSegment * kBlockM);
    p_half = carver.take<bf16>(dot ? kSegment * kBlockM : 0);
    ds_half = carver.take<bf16>(dot ? kSegment * kBlockM : 0);
    grad_query = carver.take<float>(D * kBlockM);
    scale = carver.take<float>(kBlockM);
    bias = carver.take<float>(p_.mask ? round_up(kSegment, kLanes) * kTileLanes : 0);
    grad_bias = carver.take<float>(p_.grad_mask ? kSegment * kBlockM : 0);
    k = carver.take<float>(converts ? kSegment * p_.D : 0);
    v = carver.take<float>(converts ? kSegment * p_.Dv : 0);
    k_finite = carver.take<float>(kSegment * p_.D);
    k_pairs = carver.take<float>(dot ? (p_.Lk + 1) / 2 * p_.D : 0);
    grad_key = carver.take<float>(p_.Lk * D);
    grad_value = carver.take<float>(p_.Lk * Dv);
    return carver.used();
  }

  explicit Workspace(const AttentionBackwardParams& p_) {
    carve(thread_scratch(carve(nullptr, p_)), p_);
    for (int i = 0; i < kBlockM; ++i) scale[i] = p_.scale;
  }
};

// Keys [first, first + count) with their operands as the tiles read them.
struct Segment {
  int64_t first;
  int count;
  bool masked;  // some query of the block may not see some key of it
  Rows k, v;
};

// P and dS of one segment for kPanels panels, from lane `lane` of the block on.
template <bool kIsDot, int kPanels, bool kMasked>
__attribute__((noinline)) void weights_step(const AttentionBackwardParams& p, const Workspace& w,
                                            const BlockRanges& ranges, const Segment& segment, int lane,
                                            float* grad_bias) {
  constexpr int kVecs = kPanels * kPanelVecs;
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const int in_tile = lane % kTileLanes;
  const int64_t tile = lane / kTileLanes;
  const float* q = w.q + tile * query_words<kIsDot>(D) * kTileLanes + in_tile;
  const float* grad_out = w.grad_out + tile * query_words<kIsDot>(Dv) * kTileLanes + in_tile;
  const float *lse = w.lse + lane, *delta = w.delta + lane;
  const float* bias = kMasked && p.mask ? w.bias + in_tile : nullptr;
  const vf scale = broadcast(p.scale * kLog2e), minus_inf = broadcast(-kInf);
  alignas(64) float partial[kMaxRows * kTileLanes];

  for_row_tiles<kIsDot>(segment.count, [&](int first, auto rows) {
    constexpr int kRows = rows();
    float* weights = w.p + (kIsDot ? 0 : first * kBlockM) + lane;
    const auto visible = [&](int i, int j) __attribute__((always_inline)) {
      const vi key = broadcast(static_cast<int32_t>(segment.first) + first + i);
      const vi in_range = (key >= load(ranges.lo + lane + j * kLanes)) & (key < load(ranges.hi + lane + j * kLanes));
      return bias ? in_range & (load(bias + (first + i) * kTileLanes + j * kLanes) != minus_inf) : in_range;
    };
    const auto store_p = [&](const vf(&s)[kRows][kVecs]) __attribute__((always_inline)) {
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) {
          vf x = s[i][j] * scale - load(lse + j * kLanes);
          if (kMasked && bias) x += load(bias + (first + i) * kTileLanes + j * kLanes);
          vf weight = exp2(x);
          if constexpr (kMasked) weight = visible(i, j) ? weight : vf{};
          store(weights + i * kBlockM + j * kLanes, weight);
          if constexpr (kIsDot) store_weights(w.p_half + (first + i) * kBlockM + lane + j * kLanes, weight);
        }
      }
    };
    const auto store_ds = [&](const vf(&dp)[kRows][kVecs]) __attribute__((always_inline)) {
      vf ds[kRows][kVecs];
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) {
          ds[i][j] = load(weights + i * kBlockM + j * kLanes) * (dp[i][j] - load(delta + j * kLanes));
          if constexpr (kMasked) ds[i][j] = visible(i, j) ? ds[i][j] : vf{};
          if (kMasked && grad_bias) {
            float* sum = grad_bias + (first + i) * kBlockM + lane + j * kLanes;
            store(sum, load(sum) + ds[i][j]);
          }
          if constexpr (!kIsDot) store(w.ds + (first + i) * kBlockM + lane + j * kLanes, ds[i][j]);
        }
      }
#ifdef PYATTN_ISA_AVX512_BF16
#pragma GCC unroll 6
      for (int i = 0; kIsDot && i < kRows; i += 2) {
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) {
          const vf second = i + 1 < kRows ? ds[i + 1 < kRows ? i + 1 : i][j] : vf{};
          const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, ds[i][j]);
          bf16* half = w.ds_half + (first + i) * kBlockM + lane + j * kLanes;
          _mm256_store_si256(reinterpret_cast<__m256i*>(half), _mm512_castsi512_si256(both));
          if (i + 1 < kRows)
            _mm256_store_si256(reinterpret_cast<__m256i*>(half + kBlockM), _mm512_extracti64x4_epi64(both, 1));
          store(w.ds + (first + i) / 2 * kBlockM + lane + j * kLanes, interleave(both));
        }
      }
#endif
    };
    row_products<kIsDot, kRows, kVecs>(segment.k[first], segment.k.row_bytes, D, q, partial, store_p);
    row_products<kIsDot, kRows, kVecs>(segment.v[first], segment.v.row_bytes, Dv, grad_out, partial, store_ds);
  });
}

template <bool kIsDot, int kPanels = kMaxPanels>
PYATTN_INLINE void call_weights_step(int panels, const AttentionBackwardParams& p, const Workspace& w,
                                     const BlockRanges& ranges, const Segment& segment, int lane, float* grad_bias) {
  if (panels == kPanels)
    segment.masked ? weights_step<kIsDot, kPanels, true>(p, w, ranges, segment, lane, grad_bias)
                   : weights_step<kIsDot, kPanels, false>(p, w, ranges, segment, lane, grad_bias);
  else if constexpr (kPanels > 1)
    call_weights_step<kIsDot, kPanels - 1>(panels, p, w, ranges, segment, lane, grad_bias);
}

// A block of queries of one head, with what it needs of its sample.
template <class T>
struct Block {
  const AttentionBackwardParams& p;
  const Workspace& w;
  int64_t b, h, kv_head, first_query;
  BlockRanges ranges;
  const T *key, *value;
  const char* mask;

  Block(const AttentionBackwardParams& p_, const Workspace& w_, int64_t b_, int64_t h_, int64_t first_query_)
      : p(p_),
        w(w_),
        b(b_),
        h(h_),
        kv_head(h_ / (p_.Hq / p_.Hkv)),
        first_query(first_query_),
        ranges(p_, KeyRanges(p_, b_), first_query_),
        key(static_cast<const T*>(p_.key) + b_ * p_.key_stride.b + kv_head * p_.key_stride.h),
        value(static_cast<const T*>(p_.value) + b_ * p_.value_stride.b + kv_head * p_.value_stride.h),
        mask(static_cast<const char*>(p_.mask)) {
    if (mask) mask += (b * p.mask_stride_b + h * p.mask_stride_h) * size_of(p.mask_dtype);
    const T* query = rows_of<const T>(p.query, p.query_stride);
    const T* grad_out = rows_of<const T>(p.grad_out, p.grad_out_stride);
    const T* out = rows_of<const T>(p.out, p.out_stride);
    const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
    pack_queries(query, p.query_stride.l, ranges.rows, D, w.q);
    pack_queries(grad_out, p.grad_out_stride.l, ranges.rows, Dv, w.grad_out);
    pack_right(query, p.query_stride.l, D, w.q_rows);
    pack_right(grad_out, p.grad_out_stride.l, Dv, w.grad_rows);
    const int64_t row = (b * p.Hq + h) * p.Lq + first_query;
    for (int i = 0; i < ranges.live_lanes; ++i) {
      const bool live = i < ranges.rows && p.lse[row + i] != -kInf;
      w.lse[i] = live ? static_cast<float>(p.lse[row + i] * 1.4426950408889634) : kInf;
      w.delta[i] = 0;
      if (!live) continue;
      w.delta[i] = dot_product(grad_out + i * p.grad_out_stride.l, out + i * p.out_stride.l, Dv);
      if (p.grad_lse) w.delta[i] -= p.grad_lse[row + i];
    }
  }

  // The first row of the block.
  template <class U>
  U* rows_of(const void* tensor, const Strides& stride) const {
    return static_cast<U*>(const_cast<void*>(tensor)) + b * stride.b + h * stride.h + first_query * stride.l;
  }

  static float dot_product(const T* x, const T* y, int size) {
    vf sums = {};
    int e = 0;
    for (; e + kLanes <= size; e += kLanes) sums += load_floats(x + e) * load_floats(y + e);
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += sums[i];
    for (; e < size; ++e) sum += to_float(x[e]) * to_float(y[e]);
    return sum;
  }

  // The right operand of a product over queries; rows past the end are 0.
  void pack_right(const T* in, int64_t stride, int size, float* out) const {
    const int64_t row = padded(size);
    int used;
    if constexpr (kDot<T>) {
      interleave_rows(in, stride, ranges.rows, size, out, row);
      used = (ranges.rows + 1) / 2;
    } else {
      convert_rows(in, stride, ranges.rows, size, out, row);
      used = ranges.rows;
    }
    const int wanted = kDot<T> ? ranges.live_lanes / 2 : ranges.live_lanes;
    for (int64_t i = used * row; i < wanted * row; ++i) out[i] = 0;
  }

  Segment stage(int64_t first, int count, bool masked) const {
    return {first, count, masked, stage_rows(key + first * p.key_stride.l, p.key_stride.l, count, p.D, w.k),
            stage_rows(value + first * p.value_stride.l, p.value_stride.l, count, p.Dv, w.v)};
  }

  // P and dS of a segment for the lanes [lane, end); dS is also added to grad_bias, unless that is null.
  void weights(const Segment& segment, int lane, int end, float* grad_bias) const {
    for (int begin = lane; begin < end;) {
      const int tile_end = min_int(begin / kTileLanes * kTileLanes + kTileLanes, end);
      if (mask)
        load_bias(p, mask, first_query + begin / kTileLanes * kTileLanes, segment.first,
                  ranges.rows - begin / kTileLanes * kTileLanes, segment.count, w.bias);
      call_weights_step<kDot<T>>((tile_end - begin) / kPanel, p, w, ranges, segment, begin, grad_bias);
      begin = tile_end;
    }
  }
};

// grad_query[e][lane] += sum over keys of key[key][e] * dS[key][lane]
template <bool kIsDot, int kPanels>
__attribute__((noinline)) void add_query_gradient(const AttentionBackwardParams& p, const Workspace& w,
                                                  const KeyOperand& keys, int count, int lane) {
  constexpr int kVecs = kPanels * kPanelVecs;
  float* sums = w.grad_query + lane / kTileLanes * padded(p.D) * kTileLanes + lane % kTileLanes;
  for_row_tiles(static_cast<int>(p.D), [&](int e, auto rows) {
    add_product<kIsDot, rows(), kVecs>(reinterpret_cast<const char*>(keys.data + e), 4, 4 * keys.row,
                                       EvenRows{w.ds + lane, kBlockM}, kIsDot ? (count + 1) / 2 : count,
                                       sums + e * kTileLanes, kTileLanes);
  });
}

template <bool kIsDot, int kPanels = kMaxPanels>
PYATTN_INLINE void call_add_query_gradient(int panels, const AttentionBackwardParams& p, const Workspace& w,
                                           const KeyOperand& keys, int count, int lane) {
  if (panels == kPanels)
    add_query_gradient<kIsDot, kPanels>(p, w, keys, count, lane);
  else if constexpr (kPanels > 1)
    call_add_query_gradient<kIsDot, kPanels - 1>(panels, p, w, keys, count, lane);
}

// What the blocks of one key head share.
struct HeadSums {
  float *key, *value;    // [Lk][padded]: the gradients
  const float* k_pairs;  // [Lk / 2][D]: with the dot product, the keys
};

template <class T>
void backward_block(const Block<T>& block, const HeadSums& sums, const Turn& turn) {
  const AttentionBackwardParams& p = block.p;
  const Workspace& w = block.w;
  const int D = static_cast<int>(p.D);
  for (int64_t i = 0; i < padded(D) * kBlockM; i += kLanes) store(w.grad_query + i, vf{});
  KeyOperand keys;
  for_segments(block.ranges, p.Lk, kSegment, [&](int64_t first, int count, bool edge) {
    int lane = 0, end = block.ranges.live_lanes;
    block.ranges.narrow(first, count, lane, end);
    if (lane >= end) return;
    const Segment segment = block.stage(first, count, edge || block.mask);
    block.weights(segment, lane, end, nullptr);

    const float* ready = kDot<T> ? sums.k_pairs + first / 2 * D : w.k;
    const T* key = block.key + first * p.key_stride.l;
    // Hidden keys need not be added: their scores are not finite, so the dS of a query that sees one is NaN, and times
    // 0.
    keys.stage(key, p.key_stride.l, count, D, segment.masked, ready, w.k, w.k_finite);
    for (int begin = lane; begin < end;) {
      const int tile_end = min_int(begin / kTileLanes * kTileLanes + kTileLanes, end);
      call_add_query_gradient<kDot<T>>((tile_end - begin) / kPanel, p, w, keys, count, begin);
      begin = tile_end;
    }

    turn.wait(first + count);
    constexpr int kPerWord = kDot<T> ? 2 : 1;  // queries
    const auto add = [&](const float* weights, const bf16* half, const float* rows, int64_t size, float* to) {
      const char* from =
          kDot<T> ? reinterpret_cast<const char*>(half + lane) : reinterpret_cast<const char*>(weights + lane);
      const EvenRows right{rows + lane / kPerWord * padded(size), padded(size)};
      add_products<kDot<T>>(from, kBlockM * 4 / kPerWord, count, right, (end - lane) / kPerWord,
                            to + first * padded(size), padded(size), padded(size) / kLanes);
    };
    add(w.p, w.p_half, w.grad_rows, p.Dv, sums.value);
    add(w.ds, w.ds_half, w.q_rows, p.D, sums.key);
    turn.pass(first + count);
  });
  store_transposed(w.grad_query, w.scale, block.ranges.rows, D,
                   block.template rows_of<T>(p.grad_query, p.grad_query_stride), p.grad_query_stride.l);
}

// rows[i] = factor * sums[i]
template <class T>
void store_rows(const float* sums, int64_t rows, int size, float factor, T* out, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) store_row(sums + i * padded(size), size, factor, out + i * stride);
}

template <class T>
void backward(const AttentionBackwardParams& p, int threads) {
  const int64_t blocks = (p.Lq + kBlockM - 1) / kBlockM, units = p.B * p.Hkv, group = units > 0 ? p.Hq / p.Hkv : 0;
  const std::unique_ptr<HeadSums[]> sums(new HeadSums[static_cast<size_t>(units)]);
  const auto begin = [&](int64_t unit, const Workspace& w) {
    sums[unit] = {w.grad_key, w.grad_value, w.k_pairs};
    for (int64_t i = 0; i < p.Lk * padded(p.D); i += kLanes) store(w.grad_key + i, vf{});
    for (int64_t i = 0; i < p.Lk * padded(p.Dv); i += kLanes) store(w.grad_value + i, vf{});
    if constexpr (kDot<T>) {
      const T* key = static_cast<const T*>(p.key) + unit / p.Hkv * p.key_stride.b + unit % p.Hkv * p.key_stride.h;
      interleave_rows(key, p.key_stride.l, p.Lk, p.D, w.k_pairs, p.D);
    }
  };
  const auto run = [&](int64_t unit, int64_t item, const Turn& turn, const Workspace& w) {
    const int64_t h = unit % p.Hkv * group + item / blocks;
    backward_block(Block<T>(p, w, unit / p.Hkv, h, item % blocks * kBlockM), sums[unit], turn);
  };
  const auto end = [&](int64_t unit, const Workspace& w) {
    const int64_t b = unit / p.Hkv, h = unit % p.Hkv;
    const auto out = [&](void* tensor, const Strides& s) { return static_cast<T*>(tensor) + b * s.b + h * s.h; };
    store_rows(w.grad_key, p.Lk, static_cast<int>(p.D), p.scale, out(p.grad_key, p.grad_key_stride),
               p.grad_key_stride.l);
    store_rows(w.grad_value, p.Lk, static_cast<int>(p.Dv), 1, out(p.grad_value, p.grad_value_stride),
               p.grad_value_stride.l);
  };
  parallel_pipeline(units, group * blocks, threads, [&] { return Workspace(p); }, begin, run, end);
}

// ---- the gradient of attn_mask -------------------------------------------------------------------------------

// One tile of the mask's gradient: dS of its queries and keys, summed over all that the mask is broadcast to. S and dP
// are computed once more, which costs two products where a share in the five above would need an order among heads.
template <class T>
void mask_gradient_tile(const AttentionBackwardParams& p, const Workspace& w, int64_t b_, int64_t h_, int64_t q_block,
                        int64_t key_block) {
  struct Range {
    int64_t begin, end;
  };
  const auto all_or = [](int64_t size, int64_t one, int64_t all) {
    return size == 1 ? Range{0, all} : Range{one, one + 1};
  };
  const Range batches = all_or(p.grad_mask_b, b_, p.B), heads = all_or(p.grad_mask_h, h_, p.Hq);
  const Range q_blocks = all_or(p.grad_mask_q, q_block, (p.Lq + kBlockM - 1) / kBlockM);
  const Range key_blocks = all_or(p.grad_mask_k, key_block, (p.Lk + kSegment - 1) / kSegment);
  for (int64_t i = 0; i < kSegment * kBlockM; ++i) w.grad_bias[i] = 0;
  for (int64_t b = batches.begin; b < batches.end; ++b) {
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      for (int64_t i = q_blocks.begin; i < q_blocks.end; ++i) {
        const Block<T> block(p, w, b, h, i * kBlockM);
        for (int64_t n = key_blocks.begin; n < key_blocks.end; ++n) {
          const int64_t first = n * kSegment;
          const int count = min_int(kSegment, p.Lk - first);
          int lane = 0, end = block.ranges.live_lanes;
          block.ranges.narrow(first, count, lane, end);
          if (lane < end) block.weights(block.stage(first, count, true), lane, end, w.grad_bias);
        }
      }
    }
  }
  const int rows = p.grad_mask_q == 1 ? 1 : min_int(kBlockM, p.Lq - q_block * kBlockM);
  const int keys = p.grad_mask_k == 1 ? 1 : min_int(kSegment, p.Lk - key_block * kSegment);
  with_mask_dtype(p.mask_dtype, [&](auto element) {
    auto* out = static_cast<decltype(element)*>(p.grad_mask) +
                (b_ * p.grad_mask_h + h_) * p.grad_mask_q * p.grad_mask_k + q_block * kBlockM * p.grad_mask_k +
                key_block * kSegment;
    for (int q = 0; q < rows; ++q) {
      for (int k = 0; k < keys; ++k) {
        float sum = 0;
        for (int key = k; key < (p.grad_mask_k == 1 ? kSegment : k + 1); ++key)
          for (int lane = q; lane < (p.grad_mask_q == 1 ? kBlockM : q + 1); ++lane)
            sum += w.grad_bias[key * kBlockM + lane];
        if constexpr (!std::is_same_v<decltype(element), bool>) from_float(sum, out[q * p.grad_mask_k + k]);
      }
    }
  });
}

template <class T>
void mask_gradient(const AttentionBackwardParams& p, int threads) {
  const int64_t q_blocks = p.grad_mask_q == 1 ? 1 : (p.Lq + kBlockM - 1) / kBlockM;
  const int64_t key_blocks = p.grad_mask_k == 1 ? 1 : (p.Lk + kSegment - 1) / kSegment;
  parallel_for(p.grad_mask_b * p.grad_mask_h * q_blocks * key_blocks, threads, [&](int64_t task) {
    const int64_t head = task / (q_blocks * key_blocks), tile = task % (q_blocks * key_blocks);
    mask_gradient_tile<T>(p, Workspace(p), head / p.grad_mask_h, head % p.grad_mask_h, tile / key_blocks,
                          tile % key_blocks);
  });
}

template <class T>
void gradients(const AttentionBackwardParams& p, int threads) {
  backward<T>(p, threads);
  if (p.grad_mask) mask_gradient<T>(p, threads);
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p, int threads) {
  // Waking a thread costs more than it brings below some 100 microseconds of work.
  const double flops = 2.0 * static_cast<double>(p.B * p.Hq * p.Lq) * static_cast<double>(p.Lk * (3 * p.D + 2 * p.Dv));
  if (flops < 5e6) threads = 1;
  with_dtype(p.dtype, [&](auto element) { gradients<decltype(element)>(p, threads); });
}

}  // namespace pyattn::PYATTN_ISA
