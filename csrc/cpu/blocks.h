// A block of queries of one head: which keys it sees, in segments, and the keys and values of a segment as the tiles
// read them.
#pragma once
#include "operands.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int kStrip = 16;

PYATTN_INLINE int64_t blocks_of(const AttentionParams& sample) { return (sample.Lq + kBlockM - 1) / kBlockM; }

// The key ranges of a block of queries, [lo[i], hi[i]) each; both ends rise with the query.
struct BlockRanges {
  int rows;        // queries of the block
  int live_lanes;  // rounded up to whole panels
  alignas(64) int32_t lo[kBlockM];
  alignas(64) int32_t hi[kBlockM];

  BlockRanges(const AttentionParams& p, const KeyRanges& ranges, int64_t first_query)
      : rows(min_int(kBlockM, p.Lq - first_query)), live_lanes(static_cast<int>(round_up(rows, kPanel))) {
    for (int i = 0; i < live_lanes; ++i) {
      const KeyRange range = i < rows ? ranges.row(first_query + i) : KeyRange{0, 0};
      lo[i] = static_cast<int32_t>(range.lo);
      hi[i] = static_cast<int32_t>(range.hi);
    }
  }

  // Narrows the lanes [lane, end) to the panels of which some query sees a key of [first, first + count).
  void narrow(int64_t first, int count, int& lane, int& end) const {
    const auto last_row = [&](int panel) { return min_int(panel + kPanel, rows) - 1; };
    while (lane < end && hi[last_row(lane)] <= first) lane += kPanel;
    while (lane < end && lo[end - kPanel] >= first + count) end -= kPanel;
  }
};

PYATTN_INLINE int64_t even_end(int64_t key, int64_t Lk) { return key < Lk ? round_up(key, 2) : key; }

// Calls process(first, count, edge) for the segments of keys, in rising order: up to `block` keys where every query
// sees every key, strips of kStrip at the edges. All begin and end at even keys, or at Lk: a pair of keys never
// reaches over the end of a segment, where nobody looks for NaN.
template <class Process>
PYATTN_INLINE void for_segments(const BlockRanges& ranges, int64_t Lk, int block, const Process& process) {
  // Keys that some query sees are [lowest, highest); those that every query sees are [inner_lo, inner_hi).
  const int32_t first_hi = ranges.hi[0], last_lo = ranges.lo[ranges.rows - 1];
  const int64_t lowest = ranges.lo[0] / 2 * 2, highest = even_end(ranges.hi[ranges.rows - 1], Lk);
  const int64_t inner_lo = round_up(last_lo, 2), inner_hi = first_hi < Lk ? first_hi / 2 * 2 : first_hi;
  const auto strips = [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; k += kStrip) process(k, min_int(kStrip, to - k), true);
  };
  if (inner_lo < inner_hi) {
    strips(lowest, inner_lo);
    for (int64_t k = inner_lo; k < inner_hi; k += block) process(k, min_int(block, inner_hi - k), false);
    strips(inner_hi, highest);
  } else {
    strips(lowest, highest);
  }
}

// 0 * NaN is NaN: where a key is masked for some query, a row that is not finite must stay out of the matrix product
// over keys. Such rows are set to 0 there, and added one by one for the queries that see them.
struct HiddenRows {
  int count = 0;
  int row[kBlockN];
  uint64_t live[kBlockN];  // for each hidden row, the lanes that see it

  // Lists the rows that hold NaN or inf, and returns rows that have zeros in their place, written to `clean`.
  template <class T>
  const T* hide(const T* rows, int64_t& stride, int number, int size, void* clean) {
    count = 0;
    for (int r = 0; r < number; ++r) {
      int any = 0;
      for (int e = 0; e < size; ++e) any |= not_finite(rows[r * stride + e]);
      if (any) row[count++] = r;
    }
    if (count == 0) return rows;
    T* copy = static_cast<T*>(clean);
    for (int r = 0, next = 0; r < number; ++r) {
      const bool is_hidden = next < count && row[next] == r;
      next += is_hidden;
      for (int e = 0; e < size; ++e) copy[r * size + e] = is_hidden ? T{} : rows[r * stride + e];
    }
    stride = size;
    return copy;
  }

  // Notes which of the first `lanes` lanes see each hidden row: those whose score is not -inf.
  void note_live(const float* scores, int lanes) {
    for (int n = 0; n < count; ++n) {
      live[n] = 0;
      for (int i = 0; i < lanes; ++i) live[n] |= uint64_t{scores[row[n] * kTileLanes + i] != -kInf} << i;
    }
  }

  // The weight of row r and a lane in the right operand of the product, of which `weights` are the rows.
  template <class T>
  static float weight(const float* weights, int64_t weights_row, int r, int lane) {
    const float word = weights[(kDot<T> ? r / 2 : r) * weights_row + lane];
    if (!kDot<T>) return word;
    return bits_to_float(r % 2 ? float_to_bits(word) & 0xffff0000 : float_to_bits(word) << 16);
  }

  // o[e][lane] += weight of the row and lane * rows[row][e]
  template <class T>
  void add(const T* rows, int64_t stride, int size, const float* weights, int64_t weights_row, int lanes,
           float* o) const {
    for (int n = 0; n < count; ++n) {
      const int r = row[n];
      for (int lane = 0; lane < lanes; ++lane) {
        if (!(live[n] >> lane & 1)) continue;
        const float factor = weight<T>(weights, weights_row, r, lane);
        for (int e = 0; e < size; ++e) o[e * kTileLanes + lane] += factor * to_float(rows[r * stride + e]);
      }
    }
  }
};

// What the scores of one head of one sample are made of, beside the products.
struct HeadTerms {
  Softcap softcap;
  float scale;  // of the products of queries and keys: to log2 units, or with a softcap to that of its limit
  float slope;
  const char* mask;  // of the head, or null

  HeadTerms(const AttentionParams& p, int64_t h)
      : softcap(p.softcap * kLog2e),
        scale(p.softcap != 0 ? p.scale / p.softcap : p.scale * kLog2e),
        slope(p.alibi_slopes ? p.alibi_slopes[h] * kLog2e : 0),
        mask(static_cast<const char*>(p.mask)) {
    if (mask) mask += h * p.mask_stride_h * size_of(p.mask_dtype);
  }

  // For the keys from `key` on and the block's lanes from `lane` on, which lie in one tile; `bias` is that of the tile.
  ScoreTerms terms(const BlockRanges& ranges, const KeyRanges& key_ranges, int64_t first_query, int lane, int64_t key,
                   bool masked, const float* bias) const {
    return {softcap,
            scale,
            slope,
            static_cast<float>(first_query + lane + key_ranges.offset - key),
            mask ? bias + lane % kTileLanes : nullptr,
            masked ? ranges.lo + lane : nullptr,
            ranges.hi + lane,
            static_cast<int32_t>(key)};
  }
};

// The keys, or values, of one head of one sample: one after the other, or in pages.
template <class T>
struct KeyRows {
  const T* first;  // key 0, or the head's first key of page 0
  int64_t stride, head_stride;
  const int32_t* pages;  // of this sample, or null
  int64_t page_size, page_stride, length;

  KeyRows(const AttentionParams& p, const void* tensor, const Strides& strides, int64_t kv_head)
      : first(static_cast<const T*>(tensor) + kv_head * strides.h),
        stride(strides.l),
        head_stride(strides.h),
        pages(p.block_table),
        page_size(p.page_size),
        page_stride(strides.b),
        length(p.kv_lengths ? *p.kv_lengths : p.Lk) {}

  // Where a key stands in its page. In 32 bits, which hold any key: half the time of a division.
  int64_t in_page(int64_t key) const { return static_cast<uint32_t>(key) % static_cast<uint32_t>(page_size); }

  // A key of this head, or of the `head`-th after it.
  const T* row(int64_t key, int head = 0) const {
    const T* first_of_head = first + head * head_stride;
    if (!pages) return first_of_head + key * stride;
    const int32_t page = pages[static_cast<uint32_t>(key) / static_cast<uint32_t>(page_size)];
    return first_of_head + page * page_stride + in_page(key) * stride;
  }

  // Whether keys [key, key + count) lie `stride` apart.
  bool neighbours(int64_t key, int count) const { return !pages || in_page(key) + count <= page_size; }

  // Calls visit(index, rows, number) for runs of neighbours of [key, key + count), which must exist.
  template <class Visit>
  PYATTN_INLINE void for_runs(int64_t key, int count, const Visit& visit) const {
    for (int i = 0, number; i < count; i += number) {
      number = pages ? min_int(count - i, page_size - in_page(key + i)) : count;
      visit(i, row(key + i), number);
    }
  }

  // Keys [key, key + count) as rows `row_stride` apart: in place, or gathered from pages, with zeros past the length.
  const T* rows(int64_t key, int count, int64_t size, void* gathered, int64_t& row_stride) const {
    row_stride = pages ? size : stride;
    if (!pages) return first + key * stride;
    T* out = static_cast<T*>(gathered);
    const int existing = min_int(count, length > key ? length - key : 0);
    for_runs(key, existing, [&](int i, const T* row, int number) {
      for (T* to = out + i * size; number > 0; --number, row += stride, to += size)
        std::memcpy(to, row, static_cast<size_t>(size) * sizeof(T));
    });
    std::memset(out + existing * size, 0, static_cast<size_t>((count - existing) * size) * sizeof(T));
    return out;
  }
};

// Rows as the left operand of a product along d: floats, or bfloat16 in pairs.
struct Rows {
  const char* data;
  int64_t row_bytes;

  const char* operator[](int i) const { return data + i * row_bytes; }
};

// `count` rows where they lie, or converted to float in `converted`.
template <class T>
Rows stage_rows(const T* rows, int64_t stride, int count, int64_t size, float* converted) {
  if constexpr (std::is_same_v<T, float> || kDot<T>) {
    return {reinterpret_cast<const char*>(rows), stride * static_cast<int64_t>(sizeof(T))};
  } else {
    convert_rows(rows, stride, count, static_cast<int>(size), converted, size);
    return {reinterpret_cast<const char*>(converted), size * static_cast<int64_t>(sizeof(float))};
  }
}

// The rows of keys of one segment as the left operand of a product over keys: floats, or with the dot product pairs of
// rows interleaved. Rows that hold NaN or inf are hidden where `masked`.
struct KeyOperand {
  const float* data;  // rows of float; with the dot product, a row is a pair of keys
  int64_t row;        // floats from one row to the next
  HiddenRows hidden;

  // Takes `ready`, the same rows converted or interleaved already, if there are such and none is hidden.
  // `scratch` [kBlockN][size] and `clean` take what must be made anew.
  template <class T>
  void stage(const T* rows, int64_t stride, int count, int size, bool masked, const float* ready, float* scratch,
             void* clean) {
    hidden.count = 0;
    if (masked) rows = hidden.hide(rows, stride, count, size, clean);
    if constexpr (std::is_same_v<T, float>) {
      data = rows;
      row = stride;
      return;
    }
    row = size;
    if (ready && hidden.count == 0) {
      data = ready;
      return;
    }
    data = scratch;
    if constexpr (kDot<T>)
      interleave_rows(rows, stride, count, size, scratch, size);
    else if constexpr (!std::is_same_v<T, float>)
      convert_rows(rows, stride, count, size, scratch, size);
  }
};

}  // namespace
}  // namespace pyattn::PYATTN_ISA
