// Attention backward on a CPU: P recomputed from lse, block by block of 64 queries of one head.
//
// As in the forward, lanes are queries: S^T = K Q^T and dP^T = V dO^T read keys and values where they lie, and
// dQ^T += K^T dS^T stays with the block. For the other two products, dK += dS^T Q and dV += P^T dO, the elements of a
// head are the lanes and P and dS, as they have been stored, the scalars. With D_i = dO_i . O_i - dlse_i
// (Dao et al. 2022, arXiv:2205.14135, algorithm 4):
//
//   P = exp(S - lse)    dS = P * (dP - D)    dmask = dS    dQ = scale dS K    dK = scale dS^T Q    dV = P^T dO
//
// A softcap multiplies dS by its derivative once dmask is taken; with dropout dP and the P of dV are 0 where it
// dropped; a sink is a key with a dP of 0, so dsink = -sum over the rows of exp(sink - lse) D.
//
// The blocks of all query heads that share a key head add to its dK and dV, kept in float, one after the other: a
// block adds to a segment of keys once the blocks before it have passed that segment (pipeline.h). So several threads
// can work on one head, and the sums have the same bits for every number of threads.
//
// With the bfloat16 dot product P and dS are rounded to bfloat16, in pairs of queries for dK and dV, and dS also in
// pairs of keys for dQ, which reads K interleaved in pairs of keys.
#include <cmath>

#include "../pipeline.h"
#include "../samples.h"
#include "../scratch.h"
#include "blocks.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int kSegment = 96;  // keys of a segment: P and dS of a block stay near

PYATTN_INLINE int padded(int64_t size) { return static_cast<int>(round_up(size, kLanes)); }

// P, which is at most 1, also where a rounding of lse is more than the range of floats.
PYATTN_INLINE vf weight_of(vf score, vf lse) { return exp2(min(vf{}, score - lse)); }

// What one thread works in.
struct Workspace {
  float* q;           // [tile][query_words][kTileLanes]: the queries, transposed
  float* grad_out;    // as q, of the output's gradient
  float* q_rows;      // [kBlockM][D padded]: the queries; with the dot product [kBlockM / 2], interleaved in pairs
  float* grad_rows;   // as q_rows, of the output's gradient
  float* lse;         // [kBlockM], in log2 units; inf where a query sees no key
  float* delta;       // [kBlockM]: dO . O - dlse
  float* p;           // [kSegment][kBlockM]: P; with the dot product of kMaxRows keys only
  float* dp;          // [kMaxRows][kBlockM]: dP
  float* slope;       // [kMaxRows][kBlockM]: the derivative of the softcap
  int32_t* keep;      // [kSegment][kBlockM]: all bits set where dropout keeps P, else 0
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
    dp = carver.take<float>(kMaxRows * kBlockM);
    slope = carver.take<float>(p_.softcap != 0 ? kMaxRows * kBlockM : 0);
    keep = carver.take<int32_t>(p_.dropout_threshold ? kSegment * kBlockM : 0);
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

// Rounded for the products: dS of keys `key` and key + 1, if there is such a one, for one vector of lanes.
template <bool kHasSecond>
PYATTN_INLINE void store_ds_pair([[maybe_unused]] const Workspace& w, [[maybe_unused]] int key,
                                 [[maybe_unused]] int lane, [[maybe_unused]] vf first, [[maybe_unused]] vf second) {
#ifdef PYATTN_BF16_DOT
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(kHasSecond ? second : vf{}, first);
  bf16* half = w.ds_half + key * kBlockM + lane;
  _mm256_store_si256(reinterpret_cast<__m256i*>(half), _mm512_castsi512_si256(both));
  if (kHasSecond) _mm256_store_si256(reinterpret_cast<__m256i*>(half + kBlockM), _mm512_extracti64x4_epi64(both, 1));
  store(w.ds + key / 2 * kBlockM + lane, interleave(both));
#endif
}

// P and dS of `rows` keys from `first` of the segment on, of which w.p holds the products and w.dp holds dP.
template <bool kIsDot, int kVecs>
__attribute__((noinline)) void finish_weights(const Workspace& w, const ScoreTerms& terms, const Dropout& dropout,
                                              int first, int rows, int lane, float* grad_bias) {
  float* weights = w.p + (kIsDot ? 0 : first * kBlockM) + lane;
  const bool has_softcap = terms.softcap.limit != 0;
  const vf minus_inf = broadcast(-kInf);
  vf largest[kVecs] = {};
  finish_scores<kIsDot, kVecs>(weights, kBlockM, first, rows, terms, largest, has_softcap ? w.slope + lane : nullptr);
  const auto finish = [&](int r, int j) __attribute__((always_inline)) {
    const int at = r * kBlockM + j * kLanes, in_segment = (first + r) * kBlockM + lane + j * kLanes;
    const vf score = load(weights + at);
    const vi masked = score == minus_inf;  // beside a NaN: the row's lse and dP may be one
    const vf weight = masked ? vf{} : weight_of(score, load(w.lse + lane + j * kLanes));
    vf kept = weight, dp = load(w.dp + lane + at);
    if (dropout) {
      const vi keep = load(w.keep + in_segment);
      kept = (vf)((vi)kept & keep);
      dp = (vf)((vi)(dp * broadcast(dropout.factor)) & keep);
    }
    vf ds = weight * (dp - load(w.delta + lane + j * kLanes));
    ds = masked ? vf{} : ds;
    if (grad_bias) store(grad_bias + in_segment, load(grad_bias + in_segment) + ds);
    if (has_softcap) ds = masked ? vf{} : ds * load(w.slope + lane + at);
    if constexpr (kIsDot)
      store_weights(w.p_half + in_segment, kept);
    else
      store(weights + at, kept);
    return ds;
  };
  for (int r = 0; r < rows; r += kIsDot ? 2 : 1) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      const vf ds = finish(r, j);
      if constexpr (!kIsDot)
        store(w.ds + (first + r) * kBlockM + lane + j * kLanes, ds);
      else if (r + 1 < rows)
        store_ds_pair<true>(w, first + r, lane + j * kLanes, ds, finish(r + 1, j));
      else
        store_ds_pair<false>(w, first + r, lane + j * kLanes, ds, vf{});
    }
  }
}

// P and dS of one segment for kPanels panels, from lane `lane` of the block on, that of query `query`; kPlain where
// scores are plain products and nothing is dropped.
template <bool kIsDot, int kPanels, bool kPlain>
__attribute__((noinline)) void weights_step(const AttentionBackwardParams& p, const Workspace& w,
                                            const ScoreTerms& terms, const Dropout& dropout, const Segment& segment,
                                            int64_t query, int lane, float* grad_bias) {
  constexpr int kVecs = kPanels * kPanelVecs;
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const int in_tile = lane % kTileLanes;
  const int64_t tile = lane / kTileLanes;
  const float* q = w.q + tile * query_words<kIsDot>(D) * kTileLanes + in_tile;
  const float* grad_out = w.grad_out + tile * query_words<kIsDot>(Dv) * kTileLanes + in_tile;
  const float *lse = w.lse + lane, *delta = w.delta + lane;
  const vf scale = broadcast(terms.scale);
  alignas(64) float partial[kMaxRows * kTileLanes];

  if (!kPlain && dropout) {
    dropout.for_pairs<kVecs>(query, segment.first, segment.count, [&](int r, int j, vi keep, vi keep_next) {
      int32_t* to = w.keep + r * kBlockM + lane + j * kLanes;
      store(to, keep);
      store(to + kBlockM, keep_next);
    });
  }
  for_row_tiles<kIsDot>(segment.count, [&](int first, auto rows) {
    constexpr int kRows = rows();
    float* weights = w.p + (kIsDot ? 0 : first * kBlockM) + lane;
    const auto store_p = [&](const vf(&s)[kRows][kVecs]) __attribute__((always_inline)) {
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) {
          vf x = s[i][j] * scale;
          if constexpr (kPlain) {
            x = weight_of(x, load(lse + j * kLanes));
            if constexpr (kIsDot) store_weights(w.p_half + (first + i) * kBlockM + lane + j * kLanes, x);
          }
          store(weights + i * kBlockM + j * kLanes, x);
        }
      }
    };
    const auto store_ds = [&](const vf(&dp)[kRows][kVecs]) __attribute__((always_inline)) {
      vf ds[kRows][kVecs];
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) {
          if constexpr (kPlain) {
            ds[i][j] = load(weights + i * kBlockM + j * kLanes) * (dp[i][j] - load(delta + j * kLanes));
            if constexpr (!kIsDot) store(w.ds + (first + i) * kBlockM + lane + j * kLanes, ds[i][j]);
          } else {
            store(w.dp + i * kBlockM + lane + j * kLanes, dp[i][j]);
          }
        }
      }
#pragma GCC unroll 6
      for (int i = 0; kPlain && kIsDot && i < kRows; i += 2) {
        constexpr int kLast = kRows - 1;
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) {
          if (i < kLast)
            store_ds_pair<true>(w, first + i, lane + j * kLanes, ds[i][j], ds[i < kLast ? i + 1 : i][j]);
          else
            store_ds_pair<false>(w, first + i, lane + j * kLanes, ds[i][j], vf{});
        }
      }
    };
    row_products<kIsDot, kRows, kVecs>(segment.k[first], segment.k.row_bytes, D, q, partial, store_p);
    row_products<kIsDot, kRows, kVecs>(segment.v[first], segment.v.row_bytes, Dv, grad_out, partial, store_ds);
    if constexpr (!kPlain) finish_weights<kIsDot, kVecs>(w, terms, dropout, first, kRows, lane, grad_bias);
  });
}

template <bool kIsDot, int kPanels = kMaxPanels>
PYATTN_INLINE void call_weights_step(int panels, const AttentionBackwardParams& p, const Workspace& w,
                                     const ScoreTerms& terms, const Dropout& dropout, const Segment& segment,
                                     int64_t query, int lane, float* grad_bias) {
  if (panels == kPanels)
    terms.any() || dropout ? weights_step<kIsDot, kPanels, false>(p, w, terms, dropout, segment, query, lane, grad_bias)
                           : weights_step<kIsDot, kPanels, true>(p, w, terms, dropout, segment, query, lane, grad_bias);
  else if constexpr (kPanels > 1)
    call_weights_step<kIsDot, kPanels - 1>(panels, p, w, terms, dropout, segment, query, lane, grad_bias);
}

// A block of queries of one head of a sample.
template <class T>
struct Block {
  const AttentionBackwardParams& p;  // of the sample
  const Workspace& w;
  int64_t h, kv_head, first_query;
  KeyRanges key_ranges;
  BlockRanges ranges;
  HeadTerms head;
  Dropout dropout;
  const T *key, *value;

  Block(const AttentionBackwardParams& p_, const Workspace& w_, int64_t h_, int64_t first_query_)
      : p(p_),
        w(w_),
        h(h_),
        kv_head(h_ / (p_.Hq / p_.Hkv)),
        first_query(first_query_),
        key_ranges(p_),
        ranges(p_, key_ranges, first_query_),
        head(p_, h_),
        dropout(p_, h_),
        key(static_cast<const T*>(p_.key) + kv_head * p_.key_stride.h),
        value(static_cast<const T*>(p_.value) + kv_head * p_.value_stride.h) {
    const T* query = rows_of<const T>(p.query, p.query_stride);
    const T* grad_out = rows_of<const T>(p.grad_out, p.grad_out_stride);
    const T* out = rows_of<const T>(p.out, p.out_stride);
    const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
    pack_queries(query, p.query_stride.l, ranges.rows, D, w.q);
    pack_queries(grad_out, p.grad_out_stride.l, ranges.rows, Dv, w.grad_out);
    pack_right(query, p.query_stride.l, D, w.q_rows);
    pack_right(grad_out, p.grad_out_stride.l, Dv, w.grad_rows);
    const int64_t row = h * p.lse_stride_h + first_query;
    for (int i = 0; i < ranges.live_lanes; ++i) {
      const bool live = i < ranges.rows && p.lse[row + i] != -kInf;
      w.lse[i] = live ? static_cast<float>(p.lse[row + i] * 1.4426950408889634) : kInf;
      w.delta[i] = 0;
      if (!live) continue;
      w.delta[i] = dot_product(grad_out + i * p.grad_out_stride.l, out + i * p.out_stride.l, Dv);
      if (p.grad_lse) w.delta[i] -= p.grad_lse[row + i];
    }
  }

  // The block's share in the gradient of the head's sink. In double: it is a single number, in which nothing averages.
  double sink_gradient() const {
    const float* lse = p.lse + h * p.lse_stride_h + first_query;
    double sum = 0;
    for (int i = 0; i < ranges.rows; ++i)
      if (lse[i] != -kInf) sum -= std::exp(static_cast<double>(p.sinks[h]) - lse[i]) * w.delta[i];
    return sum;
  }

  // The first row of the block.
  template <class U>
  U* rows_of(const void* tensor, const Strides& stride) const {
    return static_cast<U*>(const_cast<void*>(tensor)) + h * stride.h + first_query * stride.l;
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
      const int tile = begin / kTileLanes * kTileLanes;
      if (head.mask)
        load_bias(p, head.mask, first_query + tile, segment.first, ranges.rows - tile, segment.count, w.bias);
      const auto terms = head.terms(ranges, key_ranges, first_query, begin, segment.first, segment.masked, w.bias);
      call_weights_step<kDot<T>>((tile_end - begin) / kPanel, p, w, terms, dropout, segment, first_query + begin, begin,
                                 grad_bias);
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
  clear_columns(w.grad_query, block.ranges.live_lanes, D);
  KeyOperand keys;
  for_segments(block.ranges, p.Lk, kSegment, [&](int64_t first, int count, bool edge) {
    int lane = 0, end = block.ranges.live_lanes;
    block.ranges.narrow(first, count, lane, end);
    if (lane >= end) return;
    const Segment segment = block.stage(first, count, edge || block.head.mask);
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
  const int64_t group = p.Hkv > 0 ? p.Hq / p.Hkv : 0;
  const std::vector<AttentionBackwardParams> samples = longest_first(p);
  std::vector<int64_t> items, first_item;  // of each key head of each sample: a block of queries of one head each
  int64_t all_items = 0;
  for (const AttentionBackwardParams& sample : samples) {
    for (int64_t kv_head = 0; kv_head < p.Hkv; ++kv_head) {
      first_item.push_back(all_items);
      items.push_back(group * blocks_of(sample));
      all_items += items.back();
    }
  }
  std::vector<HeadSums> sums(items.size());
  std::vector<double> sink_gradients(p.sinks ? static_cast<size_t>(all_items) : 0);
  const auto begin = [&](int64_t unit, const Workspace& w) {
    const AttentionBackwardParams& sample = samples[unit / p.Hkv];
    sums[unit] = {w.grad_key, w.grad_value, w.k_pairs};
    for (int64_t i = 0; i < sample.Lk * padded(p.D); i += kLanes) store(w.grad_key + i, vf{});
    for (int64_t i = 0; i < sample.Lk * padded(p.Dv); i += kLanes) store(w.grad_value + i, vf{});
    if constexpr (kDot<T>) {
      const T* key = static_cast<const T*>(sample.key) + unit % p.Hkv * p.key_stride.h;
      interleave_rows(key, p.key_stride.l, sample.Lk, p.D, w.k_pairs, p.D);
    }
  };
  const auto run = [&](int64_t unit, int64_t item, const Turn& turn, const Workspace& w) {
    const AttentionBackwardParams& sample = samples[unit / p.Hkv];
    const int64_t blocks = blocks_of(sample), h = unit % p.Hkv * group + item / blocks;
    const Block<T> block(sample, w, h, item % blocks * kBlockM);
    if (p.sinks) sink_gradients[first_item[unit] + item] = block.sink_gradient();
    backward_block(block, sums[unit], turn);
  };
  const auto end = [&](int64_t unit, const Workspace& w) {
    const AttentionBackwardParams& sample = samples[unit / p.Hkv];
    const int64_t h = unit % p.Hkv;
    const Dropout dropout(sample, h);
    store_rows(w.grad_key, sample.Lk, static_cast<int>(p.D), p.scale,
               static_cast<T*>(sample.grad_key) + h * p.grad_key_stride.h, p.grad_key_stride.l);
    store_rows(w.grad_value, sample.Lk, static_cast<int>(p.Dv), dropout ? dropout.factor : 1,
               static_cast<T*>(sample.grad_value) + h * p.grad_value_stride.h, p.grad_value_stride.l);
  };
  parallel_pipeline(items, threads, [&] { return Workspace(p); }, begin, run, end);

  if (!p.sinks) return;
  std::vector<double> sink_sums(static_cast<size_t>(p.Hq));
  for (size_t unit = 0; unit < items.size(); ++unit)
    for (int64_t item = 0; item < items[unit]; ++item)
      sink_sums[static_cast<int64_t>(unit) % p.Hkv * group + item / (items[unit] / group)] +=
          sink_gradients[first_item[unit] + item];
  for (int64_t h = 0; h < p.Hq; ++h) p.grad_sinks[h] = static_cast<float>(sink_sums[h]);
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
    const AttentionBackwardParams sample = sample_of(p, b);
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      for (int64_t i = q_blocks.begin; i < q_blocks.end; ++i) {
        const Block<T> block(sample, w, h, i * kBlockM);
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
  double pairs = 0;
  for (int64_t b = 0; b < p.B; ++b) pairs += static_cast<double>(p.Hq * pairs_of(sample_of(p, b)));
  if (2.0 * pairs * static_cast<double>(3 * p.D + 2 * p.Dv) < 5e6) threads = 1;
  with_dtype(p.dtype, [&](auto element) { gradients<decltype(element)>(p, threads); });
}

}  // namespace pyattn::PYATTN_ISA
