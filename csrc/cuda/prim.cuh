// The machine, one function a primitive: the only inline PTX of the project, with prim_hopper.cuh, which has what came
// with Hopper. csrc/emulator/prim.h is the host twin, with which the same kernels run on a CPU.
//
// Device code includes no header but these: NVRTC compiles a kernel in a few tenths of a second with nothing installed.
// Shared memory is addressed by 32-bit offsets, as its instructions do. Sources: the PTX ISA, by instruction.
#pragma once

#ifndef __CUDACC_RTC__
#include "emulator/prim.h"
#else

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

#define DEV __device__ __forceinline__
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ Params p)
#define INFINITY __int_as_float(0x7f800000)

namespace prim {

// ---- where ------------------------------------------------------------------------------------------------

DEV int thread() { return threadIdx.x; }
DEV int block() { return blockIdx.x; }
DEV int grid() { return gridDim.x; }  // blocks

// x, of which the compiler knows no more: what is computed from it is not kept in registers across a loop, but computed
// again.
DEV int fresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The first byte of the block's dynamic shared memory.
DEV uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_bytes));
}

// ---- together ---------------------------------------------------------------------------------------------

DEV void sync() { __syncthreads(); }
DEV void sync_warp() { __syncwarp(); }
DEV float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEV uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// ---- arithmetic -------------------------------------------------------------------------------------------

// 2^x, log2(x) and 1 / x, to about 2 ulp; of -inf, and 0, too.
DEV float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEV float log2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEV float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to nearest even, in one word; `low` is the element that comes first.
DEV uint32_t pack(float low, float high, bool bf16) {
  uint32_t word;
  if (bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

DEV float to_float(uint16_t bits, bool bf16) {
  if (bf16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// The order of additions to one address is any.
DEV void atomic_add(float* address, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}

// ---- shared memory ----------------------------------------------------------------------------------------

struct Words {
  uint32_t w[4];
};

DEV Words load_global(const void* address) {  // a multiple of 16
  const uint4 x = *static_cast<const uint4*>(address);
  return {x.x, x.y, x.z, x.w};
}

DEV void store_global(void* address, const Words& x) {  // likewise
  *static_cast<uint4*>(address) = {x.w[0], x.w[1], x.w[2], x.w[3]};
}

DEV void store_shared(uint32_t address, const Words& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]),
               "r"(x.w[3])
               : "memory");
}

DEV void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

DEV void store_shared(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

DEV float load_shared(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

DEV void load_shared(uint32_t address, float (&x)[2]) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(address) : "memory");
}

DEV Words load_shared_words(uint32_t address) {
  Words x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])
               : "r"(address)
               : "memory");
  return x;
}

// 16 bytes from global memory, when a wait says so. With `bytes` 0 they are zeros, and nothing is read.
DEV void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// As many as 4 bytes.
DEV void copy_async_word(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

DEV void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `pending` of this thread's groups are under way. A `sync` makes what has landed visible to others.
template <int pending>
DEV void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- matrices ---------------------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. Thread l gets
// elements (l / 4, 2 * (l % 4)) and the next of each, transposed those of the transposed matrices.
DEV void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

DEV void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c [16, 8] += a [16, 16] * b [16, 8]: mma.m16n8k16, whose fragments csrc/emulator/fragments.h spells out.
DEV void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
  if (bf16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace prim
#endif
