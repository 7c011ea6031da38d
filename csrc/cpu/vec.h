// One vector of floats for each instruction set, with the few operations that plain C++ cannot say well.
//
// Everything else (arithmetic, comparisons, `mask ? a : b`) is written with GCC's vector types. A translation
// unit sees exactly one instruction set, in a namespace of its own: PYATTN_ISA.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#pragma GCC diagnostic push  // g++ 11 and 12 take the undefined inputs of its own intrinsics for mistakes
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace pyattn::PYATTN_ISA {

#define PYATTN_INLINE __attribute__((always_inline)) inline

#if defined(PYATTN_ISA_AVX512_BF16) || defined(PYATTN_ISA_AVX512) || defined(PYATTN_ISA_AVX512_AMX)
#define PYATTN_AVX512 1
constexpr int kLanes = 16;     // floats in a vector
constexpr int kMaxPanels = 4;  // panels of 16 queries in one register tile
constexpr int kMaxRows = 6;    // rows of a register tile: 6 x 4 accumulators of 32 registers
#elif defined(PYATTN_ISA_AVX2)
constexpr int kLanes = 8;
constexpr int kMaxPanels = 1;
constexpr int kMaxRows = 6;  // 6 x 2 accumulators of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kMaxPanels = 1;
#ifdef __aarch64__
constexpr int kMaxRows = 6;  // 6 x 4 accumulators of 32 registers
#else
constexpr int kMaxRows = 2;  // 2 x 4 accumulators of 16 registers
#endif
#endif

#if defined(PYATTN_ISA_AVX512_BF16) || (defined(PYATTN_ISA_AVX512_AMX) && !defined(PYATTN_NO_DOT_BESIDE_AMX))
#define PYATTN_BF16_DOT 1
constexpr bool kHasBf16Dot = true;  // two bfloat16 products added to each float lane
#else
constexpr bool kHasBf16Dot = false;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef float vf_unaligned __attribute__((vector_size(4 * kLanes), aligned(1), may_alias));

typedef uint64_t vu __attribute__((vector_size(4 * kLanes)));  // half as many lanes

PYATTN_INLINE vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
PYATTN_INLINE vf load_unaligned(const void* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
PYATTN_INLINE void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }
PYATTN_INLINE void store_unaligned(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }
PYATTN_INLINE void store(int32_t* p, vi x) { *reinterpret_cast<vi*>(p) = x; }
PYATTN_INLINE vi load(const int32_t* p) { return *reinterpret_cast<const vi*>(p); }

// max and min of a NaN in b are that NaN.
#if defined(PYATTN_AVX512)
PYATTN_INLINE vf broadcast(float x) { return _mm512_set1_ps(x); }
PYATTN_INLINE vi broadcast(int32_t x) { return (vi)_mm512_set1_epi32(x); }
PYATTN_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
PYATTN_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
#elif defined(PYATTN_ISA_AVX2)
PYATTN_INLINE vf broadcast(float x) { return _mm256_set1_ps(x); }
PYATTN_INLINE vi broadcast(int32_t x) { return (vi)_mm256_set1_epi32(x); }
PYATTN_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
PYATTN_INLINE vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
#else
PYATTN_INLINE vf broadcast(float x) { return vf{x, x, x, x}; }
PYATTN_INLINE vi broadcast(int32_t x) { return vi{x, x, x, x}; }
PYATTN_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
PYATTN_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
#endif

// The low 32 bits of each lane times b.
PYATTN_INLINE vu multiply_low(vu a, uint32_t b) {
#if defined(PYATTN_AVX512)
  return (vu)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(PYATTN_ISA_AVX2)
  return (vu)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (vu)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffff) * uint64_t{b};
#endif
}

// A value of which the optimiser knows nothing, in a register.
PYATTN_INLINE void hide(vf& x) {
#ifdef __x86_64__
  asm volatile("" : "+v"(x));
#else
  asm volatile("" : "+w"(x));
#endif
}

// 2^x for x <= 0 or little above; 0 for -inf, NaN for NaN. A minimax polynomial on [-1/2, 1/2] with p(0) = 1;
// the relative error is 1.6e-7.
PYATTN_INLINE vf exp2(vf x) {
  constexpr float c[] = {1.f, 0.693146978f, 0.240222421f, 0.0555073374f, 0.00967151279f, 0.00132647273f};
#if defined(PYATTN_AVX512)
  constexpr int kNearest = 8;
  const vf n = _mm512_roundscale_ps(x, kNearest), f = _mm512_reduce_ps(x, kNearest);  // f is 0 where x is -inf
#else
  // 2^-127 is where the exponent field, and with it the result, becomes 0. The operands' order keeps a NaN.
  x = max(broadcast(-127.f), x);
  const vf magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x + magic, n = shifted - magic, f = x - n;
#endif
  vf p = broadcast(c[5]);
#pragma GCC unroll 8
  for (int i = 4; i >= 0; --i) p = p * f + broadcast(c[i]);
#if defined(PYATTN_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  return (vf)((vi)p + ((vi)shifted << 23));
#endif
}

// a / b for a normal b, to an ulp.
PYATTN_INLINE vf divide(vf a, vf b) {
#if defined(PYATTN_AVX512)
  const vf inverse = _mm512_rcp14_ps(b), guess = a * inverse;  // and one step of Newton's: less than a division
  return guess + (a - b * guess) * inverse;
#else
  return a / b;
#endif
}

// ---- 16-bit floats ----

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

PYATTN_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
PYATTN_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

PYATTN_INLINE float to_float(float x) { return x; }
PYATTN_INLINE float to_float(bf16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
PYATTN_INLINE float to_float(f16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = (x.bits & 0x7fffu) << 13;
  const float magnitude = bits_to_float(rest) * 0x1p112f;  // moves the exponent's bias; right for subnormals too
  const uint32_t special = rest >= 0x0f800000u ? 0x7f800000u : 0u;
  return bits_to_float(sign | special | float_to_bits(magnitude));
}

PYATTN_INLINE void from_float(float x, float& out) { out = x; }
PYATTN_INLINE void from_float(float x, bf16& out) {
  const uint32_t bits = float_to_bits(x), rounded = bits + 0x7fff + ((bits >> 16) & 1);
  out.bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : rounded >> 16);
}
PYATTN_INLINE void from_float(float x, f16& out) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    result = 0x7c00;  // rounds to infinity
  } else if (magnitude < 0x38800000) {
    // Below the least normal number: adding 0.5 leaves the rounded subnormal in the low bits of the sum.
    result = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    result = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | result);
}

// kLanes elements as floats.
PYATTN_INLINE vf load_floats(const float* p) { return load_unaligned(p); }
#if defined(PYATTN_AVX512)
PYATTN_INLINE vf load_floats(const bf16* p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
}
PYATTN_INLINE vf load_floats(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif defined(PYATTN_ISA_AVX2)
PYATTN_INLINE vf load_floats(const bf16* p) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
}
PYATTN_INLINE vf load_floats(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#else
template <class T>
PYATTN_INLINE vf load_floats(const T* p) {
  return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
#endif

// kLanes floats rounded to the element type.
PYATTN_INLINE void store_floats(float* p, vf x) { store_unaligned(p, x); }
template <class T>
PYATTN_INLINE void store_floats(T* p, vf x) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p[i]);
}
#if defined(PYATTN_AVX512)
PYATTN_INLINE void store_floats(f16* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(PYATTN_ISA_AVX2)
PYATTN_INLINE void store_floats(f16* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#endif
#ifdef PYATTN_AVX512
PYATTN_INLINE void store_floats(bf16* p, vf x) {
  const __m512i bits = (__m512i)x, odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
}
#endif

// ---- transposes ----

// One step of a transpose: exchanges the off-diagonal blocks of size kStep between two rows.
template <int kStep>
PYATTN_INLINE void exchange(vf& a, vf& b) {
  vi low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = (i & kStep) ? i - kStep + kLanes : i;
    high[i] = (i & kStep) ? i + kLanes : i + kStep;
  }
  const vf x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
  a = x;
  b = y;
}

template <int kStep>
PYATTN_INLINE void transpose_step(vf (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep]);
}

// rows[i][j] becomes rows[j][i].
PYATTN_INLINE void transpose(vf (&rows)[kLanes]) {
  if constexpr (kLanes > 8) transpose_step<8>(rows);
  if constexpr (kLanes > 4) transpose_step<4>(rows);
  transpose_step<2>(rows);
  transpose_step<1>(rows);
}

// The lanes of b whose number has the bit kStep, and the others of a; left to itself the compiler shuffles.
template <int kStep>
PYATTN_INLINE vf blend(vf a, vf b) {
  [[maybe_unused]] constexpr int kLanesOfB = 0xffff / ((1 << kStep) + 1) << kStep;
#if defined(PYATTN_AVX512)
  return _mm512_mask_blend_ps(kLanesOfB, a, b);
#elif defined(PYATTN_ISA_AVX2)
  return _mm256_blend_ps(a, b, kLanesOfB & 0xff);
#else
  return vf{a[0], kStep == 1 ? b[1] : a[1], kStep == 2 ? b[2] : a[2], b[3]};
#endif
}

// The sum of the lanes of a[i], in lane i. Overwrites a. Of what is added up at each step one half stays in its lanes:
// there are fewer ports for shuffles than for anything else.
template <int kStep = kLanes / 2>
PYATTN_INLINE vf sum_lanes(vf (&a)[kLanes]) {
  vi swapped;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) swapped[i] = i ^ kStep;
#pragma GCC unroll 8
  for (int i = 0; i < kStep; ++i)
    a[i] = blend<kStep>(a[i], a[i + kStep]) + __builtin_shuffle(blend<kStep>(a[i + kStep], a[i]), swapped);
  if constexpr (kStep > 1)
    return sum_lanes<kStep / 2>(a);
  else
    return a[0];
}

template <int kStep = kLanes / 2>
PYATTN_INLINE float max_lane(vf x) {
  vi other;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) other[i] = i ^ kStep;
  x = max(x, __builtin_shuffle(x, other));
  if constexpr (kStep > 1)
    return max_lane<kStep / 2>(x);
  else
    return x[0];
}

}  // namespace pyattn::PYATTN_ISA
