// The samples of a call, or the sequences of a packed batch, one by one: what a kernel computes.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "params.h"

namespace pyattn {

// The first row of sample b.
template <class T>
T* sample_rows(T* tensor, DType dtype, const Strides& stride, const int32_t* cu_seqlens, int64_t b) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  const int64_t elements = b * stride.b + (cu_seqlens ? cu_seqlens[b] * stride.l : 0);
  return reinterpret_cast<Byte*>(tensor) + elements * size_of(dtype);
}

// Sample b alone: the same call with B = 1, and not packed.
inline AttentionParams sample_of(const AttentionParams& p, int64_t b) {
  AttentionParams s = p;
  s.B = 1;
  s.first_sample += b;
  s.query = sample_rows(p.query, p.dtype, p.query_stride, p.cu_seqlens_q, b);
  s.out = sample_rows(p.out, p.dtype, p.out_stride, p.cu_seqlens_q, b);
  s.lse += b * p.lse_stride_b;
  if (p.cu_seqlens_q) {
    s.Lq = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
    s.lse += p.cu_seqlens_q[b];
  }
  if (p.cu_seqlens_k) s.Lk = p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b];
  if (p.block_table) {
    s.block_table += b * (p.Lk / p.page_size);
  } else {
    s.key = sample_rows(p.key, p.dtype, p.key_stride, p.cu_seqlens_k, b);
    s.value = sample_rows(p.value, p.dtype, p.value_stride, p.cu_seqlens_k, b);
  }
  if (p.mask) s.mask = static_cast<const char*>(p.mask) + b * p.mask_stride_b * size_of(p.mask_dtype);
  if (p.alibi_slopes) s.alibi_slopes += b * p.alibi_stride_b;
  if (p.q_offsets) s.q_offsets += b;
  if (p.kv_lengths) s.kv_lengths += b;
  if (p.kv_starts) s.kv_starts += b;
  s.cu_seqlens_q = s.cu_seqlens_k = nullptr;
  return s;
}

inline AttentionBackwardParams sample_of(const AttentionBackwardParams& p, int64_t b) {
  AttentionBackwardParams s = p;
  static_cast<AttentionParams&>(s) = sample_of(static_cast<const AttentionParams&>(p), b);
  s.grad_out = sample_rows(p.grad_out, p.dtype, p.grad_out_stride, p.cu_seqlens_q, b);
  if (p.grad_lse) s.grad_lse += s.lse - p.lse;
  s.grad_query = sample_rows(p.grad_query, p.dtype, p.grad_query_stride, p.cu_seqlens_q, b);
  s.grad_key = sample_rows(p.grad_key, p.dtype, p.grad_key_stride, p.cu_seqlens_k, b);
  s.grad_value = sample_rows(p.grad_value, p.dtype, p.grad_value_stride, p.cu_seqlens_k, b);
  return s;
}

// The keys in use of a sample.
inline int64_t keys_of(const AttentionParams& sample) {
  const KeyRanges ranges(sample);
  return ranges.length > ranges.start ? ranges.length - ranges.start : 0;
}

// Query-key pairs of one head of a sample, but for causal masks and windows.
inline int64_t pairs_of(const AttentionParams& sample) { return sample.Lq * keys_of(sample); }

// The samples in the order in which threads should take them: what is long comes first, so that no thread is left alone
// with it in the end.
template <class Params>
std::vector<Params> longest_first(const Params& p) {
  std::vector<Params> samples;
  samples.reserve(static_cast<size_t>(p.B));
  for (int64_t b = 0; b < p.B; ++b) samples.push_back(sample_of(p, b));
  std::stable_sort(samples.begin(), samples.end(),
                   [](const Params& x, const Params& y) { return pairs_of(x) > pairs_of(y); });
  return samples;
}

}  // namespace pyattn
