// What the bindings hand to a kernel: plain structs, no Python, no torch.
#pragma once
#include <cstdint>

namespace pyattn {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, boolean = 3 };

// Strides in elements. The last dimension of query, key, value and out has stride 1.
struct Strides {
  int64_t b, h, l;
};

struct AttentionParams {
  DType dtype;                        // of query, key, value and out
  int64_t B, Hq, Hkv, Lq, Lk, D, Dv;  // with a block_table Lk = max_pages * page_size
  const void* query;                  // [B, Hq, Lq, D]
  const void* key;                    // [B, Hkv, Lk, D]
  const void* value;                  // [B, Hkv, Lk, Dv]
  void* out;                          // [B, Hq, Lq, Dv]
  Strides query_stride, key_stride, value_stride, out_stride;
  const int32_t* block_table;  // [B, max_pages], or null: key and value are then [num_pages, Hkv, page_size, D]
  int64_t page_size;
  float* lse;  // [B, Hq, Lq], dense

  const void* mask;  // [B, Hq, Lq, Lk] through its strides (0 broadcasts), or null
  DType mask_dtype;
  int64_t mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k;

  const int64_t* q_offsets;   // [B], or null: q_offset, or kv_len - Lq where bottom_right
  const int64_t* kv_lengths;  // [B], or null: Lk
  const int64_t* kv_starts;   // [B], or null: 0
  int64_t q_offset;
  bool bottom_right;
  int64_t window_left, window_right;  // kUnlimited where there is no limit
  float scale;
};

// The backward: the forward's call with its results in `out` and `lse`, and the gradients.
struct AttentionBackwardParams : AttentionParams {
  const void* grad_out;   // [B, Hq, Lq, Dv]
  const float* grad_lse;  // [B, Hq, Lq], dense, or null
  void* grad_query;       // [B, Hq, Lq, D]
  void* grad_key;         // [B, Hkv, Lk, D]
  void* grad_value;       // [B, Hkv, Lk, Dv]
  Strides grad_out_stride, grad_query_stride, grad_key_stride, grad_value_stride;
  void* grad_mask;                                             // in mask_dtype, dense, of the sizes below, or null
  int64_t grad_mask_b, grad_mask_h, grad_mask_q, grad_mask_k;  // the size of each dimension, or 1 where it broadcasts
};

// Far above any length, and far enough below 2^63 that sums of two do not overflow.
constexpr int64_t kUnlimited = int64_t{1} << 61;

// The keys that one query row may see: [lo, hi) within [0, Lk], empty where lo == hi.
struct KeyRange {
  int64_t lo, hi;
};

// Twin of `key_range` in pyattn/reference.py. Both ends rise with the row.
struct KeyRanges {
  int64_t start, length, offset, left, right, Lk;

  KeyRanges(const AttentionParams& p, int64_t b)
      : start(p.kv_starts ? p.kv_starts[b] : 0),
        length(p.kv_lengths ? p.kv_lengths[b] : p.Lk),
        offset(clamped(p.q_offsets      ? p.q_offsets[b]
                       : p.bottom_right ? length - p.Lq
                                        : p.q_offset)),
        left(p.window_left),
        right(p.window_right),
        Lk(p.Lk) {}

  static int64_t clamped(int64_t x) { return x < -kUnlimited ? -kUnlimited : x > kUnlimited ? kUnlimited : x; }

  KeyRange row(int64_t i) const {
    const int64_t pos = i + offset;
    const int64_t first = pos - left > start ? pos - left : start;
    const int64_t last = pos + right + 1 < length ? pos + right + 1 : length;
    const int64_t lo = first < Lk ? first : Lk;
    return {lo, last > lo ? last : lo};
  }
};

}  // namespace pyattn
