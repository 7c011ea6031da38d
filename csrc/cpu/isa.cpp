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
    if (avx512) list.push_back(PYATTN_KERNELS(avx512));
#ifdef PYATTN_HAVE_AVX512_BF16
    // Intel's cores take its dot product every other cycle, which is half the rate of two multiply-adds in float32.
    const auto where = __builtin_cpu_is("intel") ? list.end() : list.begin();
    if (avx512 && __builtin_cpu_supports("avx512bf16")) list.insert(where, PYATTN_KERNELS(avx512_bf16));
#endif
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
