#include "isa.h"

#ifdef PYATTN_HAVE_AVX512_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyattn {

#ifdef PYATTN_HAVE_AVX512_AMX
namespace {

// Whether the processor has AMX for bfloat16 and the system lets this process, all of its threads, use it.
bool may_use_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         !syscall(SYS_arch_prctl, kRequestPermission, kTileData);
}

}  // namespace
#endif

const std::vector<CpuKernels>& available_kernels() {
  static const std::vector<CpuKernels> kernels = [] {
    std::vector<CpuKernels> list;
#define PYATTN_KERNELS(ISA, BACKWARD)                                            \
  CpuKernels{#ISA,         ISA::attention_forward, BACKWARD::attention_backward, \
             ISA::product, ISA::projection,        ISA::projection_backward,     \
             ISA::rotary,  ISA::pack_weight,       ISA::peak_gflops}
#if defined(PYATTN_HAVE_AVX512) || defined(PYATTN_HAVE_AVX2)
    __builtin_cpu_init();
#endif
#ifdef PYATTN_HAVE_AVX512
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef PYATTN_HAVE_AVX512_AMX
    if (avx512 && may_use_amx()) list.push_back(PYATTN_KERNELS(avx512_amx, avx512));
#endif
    if (avx512) list.push_back(PYATTN_KERNELS(avx512, avx512));
#ifdef PYATTN_HAVE_AVX512_BF16
    // Intel's cores take its dot product every other cycle, which is half the rate of two multiply-adds in float32.
    const auto where = __builtin_cpu_is("intel") ? list.end() : list.begin();
    if (avx512 && __builtin_cpu_supports("avx512bf16")) list.insert(where, PYATTN_KERNELS(avx512_bf16, avx512_bf16));
#endif
#endif
#ifdef PYATTN_HAVE_AVX2
    // Every processor with AVX2 so far has F16C.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back(PYATTN_KERNELS(avx2, avx2));
#endif
    list.push_back(PYATTN_KERNELS(portable, portable));
#undef PYATTN_KERNELS
    return list;
  }();
  return kernels;
}

}  // namespace pyattn
