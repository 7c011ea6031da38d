// The instruction sets that the kernels are compiled for, and the choice among them at run time.
#pragma once
#include <cstdint>
#include <vector>

#include "../params.h"

namespace pyattn {

// A tile of the forward: so many queries against so many keys, with every instruction set.
constexpr int kBlockM = 64;
constexpr int kBlockN = 192;

// The forward of so few queries against more keys than these, or against pages, and without dropout, is computed by
// attention_decode.
constexpr int kDecodeQueries = 16;
constexpr int kDecodeKeys = 64;

// What every instruction set provides. `peak_gflops` measures the rate of multiply-adds of one thread, with
// the bfloat16 dot product, or AMX, where `dtype` is bfloat16 and there is one. avx512_amx has the backward of
// avx512.
struct CpuKernels {
  const char* isa;
  void (*attention_forward)(const AttentionParams&, int threads);
  void (*attention_backward)(const AttentionBackwardParams&, int threads);
  void (*product)(const ProductParams&, int threads);
  void (*projection)(const ProjectionParams&, int threads);
  void (*projection_backward)(const ProjectionParams&, int threads);
  void (*rotary)(const ProjectionParams&, int threads);
  int64_t (*pack_weight)(DType dtype, const Matrix& weight, int64_t columns, int64_t depth, float* out, int threads);
  double (*peak_gflops)(DType dtype);
};

#define PYATTN_DECLARE(ISA)                                                                                  \
  namespace ISA {                                                                                            \
  void attention_forward(const AttentionParams&, int threads);                                               \
  void attention_backward(const AttentionBackwardParams&, int threads);                                      \
  void attention_decode(const AttentionParams&, const std::vector<AttentionParams>& samples, int threads);   \
  void product(const ProductParams&, int threads);                                                           \
  void projection(const ProjectionParams&, int threads);                                                     \
  void projection_backward(const ProjectionParams&, int threads);                                            \
  void rotary(const ProjectionParams&, int threads);                                                         \
  int64_t pack_weight(DType, const Matrix& weight, int64_t columns, int64_t depth, float* out, int threads); \
  double peak_gflops(DType dtype);                                                                           \
  }
PYATTN_DECLARE(avx512_amx)
PYATTN_DECLARE(avx512_bf16)
PYATTN_DECLARE(avx512)
PYATTN_DECLARE(avx2)
PYATTN_DECLARE(portable)
#undef PYATTN_DECLARE

// Those compiled in that this processor can run, best first.
const std::vector<CpuKernels>& available_kernels();

}  // namespace pyattn
