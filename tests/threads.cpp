// Every kernel on several threads, for `make tsan`: ThreadSanitizer watches, and the bits must be those of one thread.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/isa.h"
#include "params.h"

using namespace pyattn;

namespace {

using Floats = std::vector<float>;

Floats random_floats(int64_t size) {
  Floats x(static_cast<size_t>(size));
  for (float& value : x) value = static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f;
  return x;
}

// One call with all the memory it needs; `options` is read bit by bit.
struct Problem : AttentionBackwardParams {
  const bool packed, few_queries, causal, has_family, has_dropout_and_mask;
  std::vector<int32_t> starts_q, starts_k;
  std::vector<Floats> memory;

  float* floats(int64_t size) { return memory.emplace_back(random_floats(size)).data(); }

  explicit Problem(int options)
      : AttentionBackwardParams{},
        packed(options & 1),
        few_queries(options & 2),
        causal(options & 4),
        has_family(options & 8),
        has_dropout_and_mask(options & 16) {
    dtype = DType::f32, B = 3, Hq = 4, Hkv = 2, D = 32, Dv = 24;
    starts_q = few_queries ? std::vector<int32_t>{0, 2, 5, 9} : std::vector<int32_t>{0, 150, 180, 400};
    starts_k = {0, 300, 301, 900};
    Lq = few_queries ? 4 : 220, Lk = few_queries ? 1500 : 600;
    const int64_t rows_q = packed ? starts_q.back() : B * Lq, rows_k = packed ? starts_k.back() : B * Lk;
    const auto strides = [&](int64_t heads, int64_t length, int64_t size) {
      return packed ? Strides{0, size, heads * size} : Strides{heads * length * size, length * size, size};
    };
    query_stride = grad_query_stride = strides(Hq, Lq, D), key_stride = grad_key_stride = strides(Hkv, Lk, D);
    value_stride = grad_value_stride = strides(Hkv, Lk, Dv), out_stride = grad_out_stride = strides(Hq, Lq, Dv);
    lse_stride_b = packed ? 0 : Hq * Lq, lse_stride_h = packed ? rows_q : Lq;
    if (packed) cu_seqlens_q = starts_q.data(), cu_seqlens_k = starts_k.data();
    query = floats(rows_q * Hq * D), key = floats(rows_k * Hkv * D), value = floats(rows_k * Hkv * Dv);
    grad_out = floats(rows_q * Hq * Dv), grad_lse = floats(rows_q * Hq);
    bottom_right = true, window_left = kUnlimited, window_right = causal ? 0 : kUnlimited, scale = 0.2f;
    if (has_family) alibi_slopes = floats(Hq), sinks = floats(Hq), softcap = 3;
    if (has_dropout_and_mask) dropout_threshold = 6000, dropout_seed = 77;
    if (has_dropout_and_mask && !packed) {
      mask = floats(Lq * Lk), mask_dtype = DType::f32, mask_stride_q = Lk, mask_stride_k = 1;
      grad_mask_b = grad_mask_h = 1, grad_mask_q = Lq, grad_mask_k = Lk;
    }
    const size_t first_result = memory.size();
    out = floats(rows_q * Hq * Dv), lse = floats(rows_q * Hq), grad_query = floats(rows_q * Hq * D);
    grad_key = floats(rows_k * Hkv * D), grad_value = floats(rows_k * Hkv * Dv);
    if (mask) grad_mask = floats(Lq * Lk);
    if (sinks) grad_sinks = floats(Hq);
    results_from = first_result;
  }

  std::vector<Floats> compute(int threads) {
    const CpuKernels& kernels = available_kernels().front();
    kernels.attention_forward(*this, threads);
    kernels.attention_backward(*this, threads);
    return {memory.begin() + static_cast<std::ptrdiff_t>(results_from), memory.end()};
  }

  size_t results_from;
};

}  // namespace

int main() {
  for (int options = 0; options < 32; ++options) {
    Problem problem(options);
    const std::vector<Floats> alone = problem.compute(1);
    for (int threads : {4, 3, 4}) {
      if (problem.compute(threads) == alone) continue;
      std::printf("options %d: other bits with %d threads\n", options, threads);
      return 1;
    }
  }
  std::puts("threads: ok");
}
