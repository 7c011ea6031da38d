// The rate of multiply-adds that one core reaches with all operands in registers: what a kernel is measured
// against.
#include <chrono>

#include "isa.h"
#include "vec.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int kChains = 12;  // independent accumulators: enough to hide the latency, few enough for 16 registers

template <class Step>
double gflops(int flops_per_lane, const Step& step) {
  constexpr int kRounds = 200000;
  double best = 0;
  vf c[kChains] = {};
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto begin = std::chrono::steady_clock::now();
    for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) {
        c[i] = step(c[i]);
        hide(c[i]);
      }
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    const double rate = 1e-9 * flops_per_lane * kLanes * kChains * kRounds / seconds.count();
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace

double peak_gflops(DType dtype) {
  vf a = broadcast(0.999f), b = broadcast(1e-3f);
  hide(a);
  hide(b);
#ifdef PYATTN_ISA_AVX512_BF16
  if (dtype == DType::bf16) return gflops(4, [&](vf c) { return (vf)_mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); });
#endif
  (void)dtype;
  return gflops(2, [&](vf c) { return c * a + b; });
}

}  // namespace pyattn::PYATTN_ISA
