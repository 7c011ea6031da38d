#include "isa.h"

namespace pyattn {

const std::vector<CpuKernels>& available_kernels() {
  static const std::vector<CpuKernels> kernels = [] {
    std::vector<CpuKernels> list;
#define PYATTN_KERNELS(ISA)                                                  \
  CpuKernels{#ISA,         ISA::attention_forward, ISA::attention_backward,  \
             ISA::product, ISA::projection,        ISA::projection_backward, \
             ISA::rotary,  ISA::pack_weight,       ISA::peak_gflops}
#if defined(PYATTN_HAVE_AVX512) || defined(PYATTN_HAVE_AVX2)
    __builtin_cpu_init();
#endif
#ifdef PYATTN_HAVE_AVX512
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef PYATTN_HAVE_AVX512_BF16
    if (avx512 && __builtin_cpu_supports("avx512bf16")) list.push_back(PYATTN_KERNELS(avx512_bf16));
#endif
    if (avx512) list.push_back(PYATTN_KERNELS(avx512));
#endif
#ifdef PYATTN_HAVE_AVX2
    // Every processor with AVX2 so far has F16C.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back(PYATTN_KERNELS(avx2));
#endif
    list.push_back(PYATTN_KERNELS(portable));
#undef PYATTN_KERNELS
    return list;
  }();
  return kernels;
}

}  // namespace pyattn
