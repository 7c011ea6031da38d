// The rate of multiply-adds that one core reaches with all operands in registers: what a kernel is measured
// against.
#include <chrono>

#include "amx.h"
#include "isa.h"
#include "vec.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int kChains = 12;  // independent accumulators: enough to hide the latency, few enough for 16 registers

constexpr int kRounds = 200000;

// The best rate of a few runs of kRounds rounds, each of so many operations.
template <class Run>
double best_gflops(double flops, const Run& run) {
  double best = 0;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto begin = std::chrono::steady_clock::now();
    run();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    const double rate = 1e-9 * flops * kRounds / seconds.count();
    best = rate > best ? rate : best;
  }
  return best;
}

template <class Step>
double gflops(int flops_per_lane, const Step& step) {
  return best_gflops(flops_per_lane * kLanes * kChains, [&] {
    vf c[kChains] = {};
    for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) {
        c[i] = step(c[i]);
        hide(c[i]);
      }
    }
  });
}

}  // namespace

double peak_gflops(DType dtype) {
  vf a = broadcast(0.999f), b = broadcast(1e-3f);
  hide(a);
  hide(b);
#ifdef PYATTN_ISA_AVX512_BF16
  if (dtype == DType::bf16) return gflops(4, [&](vf c) { return (vf)_mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); });
#endif
#ifdef PYATTN_ISA_AVX512_AMX
  if (dtype == DType::bf16) {
    const AmxTiles tiles(kAmxRows, kAmxRows, kAmxWords);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    return best_gflops(4.0 * 4 * kAmxRows * kAmxLanes * kAmxWords, [] {
      for (int round = 0; round < kRounds; ++round) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    });
  }
#endif
  (void)dtype;
  return gflops(2, [&](vf c) { return c * a + b; });
}

}  // namespace pyattn::PYATTN_ISA
