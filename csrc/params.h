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
  int64_t B, Hq, Hkv, Lq, Lk, D, Dv;  // packed: the longest lengths; with a block_table Lk = max_pages * page_size
  const void* query;                  // [B, Hq, Lq, D]; packed [total_q, Hq, D], stride.b = 0
  const void* key;                    // [B, Hkv, Lk, D]; packed [total_k, Hkv, D]
  const void* value;                  // [B, Hkv, Lk, Dv]; packed [total_k, Hkv, Dv]
  void* out;                          // [B, Hq, Lq, Dv]; packed [total_q, Hq, Dv]
  Strides query_stride, key_stride, value_stride, out_stride;
  const int32_t* cu_seqlens_q;  // [B + 1], or null: not packed
  const int32_t* cu_seqlens_k;  // [B + 1], or null: not packed, or pages
  const int32_t* block_table;   // [B, max_pages], or null: key and value are then [num_pages, Hkv, page_size, D]
  int64_t page_size;
  float* lse;  // [B, Hq, Lq]; packed [Hq, total_q]
  int64_t lse_stride_b, lse_stride_h;

  const void* mask;  // [B, Hq, Lq, Lk] through its strides (0 broadcasts), or null
  DType mask_dtype;
  int64_t mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k;

  const float* alibi_slopes;  // [B, Hq], or null
  int64_t alibi_stride_b;
  const float* sinks;         // [Hq], or null
  const int64_t* q_offsets;   // [B], or null: q_offset, or kv_len - Lq where bottom_right
  const int64_t* kv_lengths;  // [B], or null: Lk
  const int64_t* kv_starts;   // [B], or null: 0
  int64_t q_offset;
  bool bottom_right;
  int64_t window_left, window_right;  // kUnlimited where there is no limit
  float scale;
  float softcap;              // 0: none
  int32_t dropout_threshold;  // of 65536: a weight is dropped if its 16 random bits are less; 0: none
  uint64_t dropout_seed;
  int64_t first_sample;  // the number of sample 0, by which dropout counts
};

// The backward: the forward's call with its results in `out` and `lse`, and the gradients.
struct AttentionBackwardParams : AttentionParams {
  const void* grad_out;   // as out
  const float* grad_lse;  // as lse, or null
  void* grad_query;       // as query
  void* grad_key;         // as key
  void* grad_value;       // as value
  Strides grad_out_stride, grad_query_stride, grad_key_stride, grad_value_stride;
  void* grad_mask;                                             // in mask_dtype, dense, of the sizes below, or null
  int64_t grad_mask_b, grad_mask_h, grad_mask_q, grad_mask_k;  // the size of each dimension, or 1 where it broadcasts
  float* grad_sinks;                                           // [Hq], where there are sinks
};

// A matrix whose rows are [B, L] and whose columns are [H, D]. The elements of a head lie side by side.
struct Matrix {
  void* data;
  int64_t stride_b, stride_h, stride_l;
  int64_t L, D;
};

// c = A B, of [rows, depth] and [depth, columns].
struct ProductParams {
  DType dtype;
  int64_t rows, columns, depth;
  Matrix a;
  bool transpose_a;  // a is [depth, rows]
  Matrix b, c;
};

// Heads from x weight^T: bias, residual, RMSNorm, rotary. The heads of q come first, then those of k, then those of v.
// The backward turns gradients of q, k and v into those of the product's rows.
struct ProjectionParams {
  DType dtype;
  int64_t rows, depth, D;  // rows of x, columns of x, of a head of the outputs
  Matrix x;
  const void* weight;  // [heads * D, depth]
  int64_t weight_stride;
  const float* packed;    // the weight as pack_weight leaves it, or null
  const float* bias;      // [heads * D], or null
  Matrix residual;        // as the outputs, or null data
  int64_t num_heads[3];   // of q, k and v
  Matrix heads[3];        // q, k and v, or their gradients
  Matrix saved;           // heads of q and k before norm and rotary, or null data
  const float* norms[2];  // [D] of q and of k, or null
  float eps;
  const float *cos, *sin;  // [max_pos, R / 2], or null
  int64_t R;
  bool interleaved, inverse;
  const int64_t* positions;  // [B or 1, L], or null: 0 to L - 1
  int64_t positions_stride_b;
  Matrix grad_rows;   // [rows, heads * D]: the backward's result
  float* grad_norms;  // [blocks of kProjectionRows][2][D]: parts of the norms' gradients
};

constexpr int64_t kProjectionRows = 64;
constexpr int64_t kFewRows = 32;  // of a projection that reads each weight where it lies, once for a few rows

constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::boolean ? 1 : 2; }

// Far above any length, and far enough below 2^63 that sums of two do not overflow.
constexpr int64_t kUnlimited = int64_t{1} << 61;

// The keys that one query row may see: [lo, hi) within [0, Lk], empty where lo == hi.
struct KeyRange {
  int64_t lo, hi;
};

// Of one sample (samples.h). Twin of `key_range` in pyattn/reference.py. Both ends rise with the row.
struct KeyRanges {
  int64_t start, length, offset, left, right, Lk;

  explicit KeyRanges(const AttentionParams& p)
      : start(p.kv_starts ? *p.kv_starts : 0),
        length(p.kv_lengths ? *p.kv_lengths : p.Lk),
        offset(clamped(p.q_offsets      ? *p.q_offsets
                       : p.bottom_right ? length - p.Lq
                                        : p.q_offset)),
        left(p.window_left < kUnlimited ? p.window_left : kUnlimited),
        right(p.window_right < kUnlimited ? p.window_right : kUnlimited),
        Lk(p.Lk) {}

  // Within half of what is unlimited, so that no position is beyond an unlimited window.
  static int64_t clamped(int64_t x) {
    constexpr int64_t kFar = kUnlimited / 2;
    return x < -kFar ? -kFar : x > kFar ? kFar : x;
  }

  KeyRange row(int64_t i) const {
    const int64_t pos = i + offset;
    const int64_t first = pos - left > start ? pos - left : start;
    const int64_t last = pos + right + 1 < length ? pos + right + 1 : length;
    const int64_t lo = first < Lk ? first : Lk;
    return {lo, last > lo ? last : lo};
  }
};

}  // namespace pyattn
