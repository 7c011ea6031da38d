// The machine from Hopper on (sm_90a): copies in bulk by an engine (TMA), barriers that count bytes, products of a
// warpgroup. As in prim.cuh, whose other half this is; the host twin is csrc/emulator/prim.h.
#pragma once
#include "prim.cuh"

namespace prim {

// An operand in shared memory, with the 128-byte swizzle. K-major: rows of 64 columns, eight of them `stride` bytes
// from the next eight. MN-major: columns of 64 rows, eight of them `stride` bytes from the next eight, 64 rows
// `leading` bytes from the next 64. (PTX ISA, "Matrix descriptor".)
DEV uint64_t operand(uint32_t address, uint32_t leading, uint32_t stride) {
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

}  // namespace prim

#ifdef __CUDACC_RTC__

// A kernel that is alone on a multiprocessor: its warpgroups may give and take registers.
#define KERNEL_ALONE(name, Params) \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) name(const __grid_constant__ Params p)

namespace prim {

// ---- copies in bulk, and barriers that count bytes ---------------------------------------------------

struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// A barrier is 8 bytes of shared memory. A phase ends when `count` have arrived and all bytes that they expect have
// landed; waiters say the phase's parity, 0 first. Made by one thread, then fenced, then `sync`.
DEV void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

DEV void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEV void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and says that so many bytes will land.
DEV void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEV void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred p;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra again;\n"
      "done: }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A box of a tensor of four dimensions, x the innermost, whose bytes the barrier counts; beyond the tensor are zeros.
DEV void copy_box(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// What of a box lies beyond the tensor is not written.
DEV void store_box(const TensorMap& map, uint32_t from, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(from), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

DEV void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most `pending` of this thread's groups still read shared memory.
template <int pending>
DEV void store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// What this thread has stored to shared memory so far may be read by products and copies, after a barrier.
DEV void fence_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers 1 to 15 of so many threads, a multiple of 32; who arrives does not wait.
DEV void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEV void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// To four floats that begin at a multiple of 16 bytes.
DEV void atomic_add(float* address, const float (&x)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
}

// How many registers a thread of this warpgroup has from now on: what some give others can take.
template <int count>
DEV void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
DEV void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- products of a warpgroup --------------------------------------------------------------------------------

// c [64, N] = a [64, 16] b [16, N], or += ; N is twice the count of c. They are made while threads go on: c, and what
// is read, are not to be touched before a wait, and a fence is to stand between the last use of these registers and the
// first product.
#define EIGHT(i)                                                                                              \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define SUMS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SUMS_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SUMS_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SUMS_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SUMS_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SUMS_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define SUMS_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define SUMS_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define SUMS_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define SUMS_12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define SUMS_13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define SUMS_14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define SUMS_15 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define LIST(...) __VA_ARGS__
// N, the text and the constraints of its sums, and the numbers of the operands after them.
#define PRODUCT(N, TYPE, SUMS, CONSTRAINTS, A, B, P, T) PRODUCT_AS(N, TYPE, SUMS, CONSTRAINTS, A, B, P, "0", T)
#define PRODUCT_MN(N, TYPE, SUMS, CONSTRAINTS, A, B, P, T) PRODUCT_AS(N, TYPE, SUMS, CONSTRAINTS, A, B, P, "1", T)
#define PRODUCT_AS(N, TYPE, SUMS, CONSTRAINTS, A, B, P, A_MN_MAJOR, T)                                              \
  asm volatile("{.reg .pred p;\n setp.ne.b32 p, %" #P ", 0;\n wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
               "." TYPE " {" SUMS "}, %" #A ", %" #B ", p, 1, 1, " A_MN_MAJOR ", %" #T ";}"                         \
               : LIST CONSTRAINTS                                                                                   \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(b_mn_major)))
#define PRODUCT_R(N, TYPE, SUMS, CONSTRAINTS, A0, A1, A2, A3, B, P, T)                                              \
  asm volatile("{.reg .pred p;\n setp.ne.b32 p, %" #P ", 0;\n wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
               "." TYPE " {" SUMS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #T ";}"        \
               : LIST CONSTRAINTS                                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(b_mn_major)))
#define BOTH_TYPES(MACRO, N, SUMS, CONSTRAINTS, ...)  \
  if (bf16)                                           \
    MACRO(N, "bf16", SUMS, CONSTRAINTS, __VA_ARGS__); \
  else                                                \
    MACRO(N, "f16", SUMS, CONSTRAINTS, __VA_ARGS__)

template <bool b_mn_major, bool a_mn_major = false, int count>
DEV void multiply_async(float (&c)[count], uint64_t a, uint64_t b, bool accumulate, bool bf16) {
  if constexpr (a_mn_major) {
    static_assert(count == 32, "there is no such product of this width here");
    BOTH_TYPES(PRODUCT_MN, 64, SUMS_0 SUMS_1 SUMS_2 SUMS_3, (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24)), 32, 33, 34, 35);
  } else if constexpr (count == 16) {
    BOTH_TYPES(PRODUCT, 32, SUMS_0 SUMS_1, (EIGHT(0), EIGHT(8)), 16, 17, 18, 19);
  } else if constexpr (count == 24) {
    BOTH_TYPES(PRODUCT, 48, SUMS_0 SUMS_1 SUMS_2, (EIGHT(0), EIGHT(8), EIGHT(16)), 24, 25, 26, 27);
  } else if constexpr (count == 32) {
    BOTH_TYPES(PRODUCT, 64, SUMS_0 SUMS_1 SUMS_2 SUMS_3, (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24)), 32, 33, 34, 35);
  } else if constexpr (count == 40) {
    BOTH_TYPES(PRODUCT, 80, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4, (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32)),
               40, 41, 42, 43);
  } else if constexpr (count == 48) {
    BOTH_TYPES(PRODUCT, 96, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5,
               (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40)), 48, 49, 50, 51);
  } else if constexpr (count == 56) {
    BOTH_TYPES(PRODUCT, 112, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5 SUMS_6,
               (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48)), 56, 57, 58, 59);
  } else if constexpr (count == 64) {
    BOTH_TYPES(PRODUCT, 128, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5 SUMS_6 SUMS_7,
               (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56)), 64, 65, 66, 67);
  } else if constexpr (count == 72) {
    BOTH_TYPES(PRODUCT, 144, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5 SUMS_6 SUMS_7 SUMS_8,
               (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56), EIGHT(64)), 72,
               73, 74, 75);
  } else if constexpr (count == 80) {
    BOTH_TYPES(
        PRODUCT, 160, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5 SUMS_6 SUMS_7 SUMS_8 SUMS_9,
        (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56), EIGHT(64), EIGHT(72)),
        80, 81, 82, 83);
  } else if constexpr (count == 88) {
    BOTH_TYPES(PRODUCT, 176, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5 SUMS_6 SUMS_7 SUMS_8 SUMS_9 SUMS_10,
               (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56), EIGHT(64),
                EIGHT(72), EIGHT(80)),
               88, 89, 90, 91);
  } else if constexpr (count == 96) {
    BOTH_TYPES(PRODUCT, 192, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5 SUMS_6 SUMS_7 SUMS_8 SUMS_9 SUMS_10 SUMS_11,
               (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56), EIGHT(64),
                EIGHT(72), EIGHT(80), EIGHT(88)),
               96, 97, 98, 99);
  } else if constexpr (count == 128) {
    BOTH_TYPES(PRODUCT, 256,
               SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5 SUMS_6 SUMS_7 SUMS_8 SUMS_9 SUMS_10 SUMS_11 SUMS_12 SUMS_13
                   SUMS_14 SUMS_15,
               (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56), EIGHT(64),
                EIGHT(72), EIGHT(80), EIGHT(88), EIGHT(96), EIGHT(104), EIGHT(112), EIGHT(120)),
               128, 129, 130, 131);
  } else {
    static_assert(count < 0, "there is no product of this width here");
  }
}

template <bool b_mn_major, int count>
DEV void multiply_async(float (&c)[count], const uint32_t (&a)[4], uint64_t b, bool accumulate, bool bf16) {
  if constexpr (count == 32) {
    BOTH_TYPES(PRODUCT_R, 64, SUMS_0 SUMS_1 SUMS_2 SUMS_3, (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24)), 32, 33, 34, 35,
               36, 37, 38);
  } else if constexpr (count == 40) {
    BOTH_TYPES(PRODUCT_R, 80, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4, (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32)),
               40, 41, 42, 43, 44, 45, 46);
  } else if constexpr (count == 48) {
    BOTH_TYPES(PRODUCT_R, 96, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5,
               (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40)), 48, 49, 50, 51, 52, 53, 54);
  } else if constexpr (count == 56) {
    BOTH_TYPES(PRODUCT_R, 112, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5 SUMS_6,
               (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48)), 56, 57, 58, 59, 60, 61, 62);
  } else if constexpr (count == 64) {
    BOTH_TYPES(PRODUCT_R, 128, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5 SUMS_6 SUMS_7,
               (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56)), 64, 65, 66, 67,
               68, 69, 70);
  } else if constexpr (count == 72) {
    BOTH_TYPES(PRODUCT_R, 144, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5 SUMS_6 SUMS_7 SUMS_8,
               (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56), EIGHT(64)), 72,
               73, 74, 75, 76, 77, 78);
  } else if constexpr (count == 80) {
    BOTH_TYPES(
        PRODUCT_R, 160, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5 SUMS_6 SUMS_7 SUMS_8 SUMS_9,
        (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56), EIGHT(64), EIGHT(72)),
        80, 81, 82, 83, 84, 85, 86);
  } else if constexpr (count == 88) {
    BOTH_TYPES(PRODUCT_R, 176, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5 SUMS_6 SUMS_7 SUMS_8 SUMS_9 SUMS_10,
               (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56), EIGHT(64),
                EIGHT(72), EIGHT(80)),
               88, 89, 90, 91, 92, 93, 94);
  } else if constexpr (count == 96) {
    BOTH_TYPES(PRODUCT_R, 192, SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5 SUMS_6 SUMS_7 SUMS_8 SUMS_9 SUMS_10 SUMS_11,
               (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56), EIGHT(64),
                EIGHT(72), EIGHT(80), EIGHT(88)),
               96, 97, 98, 99, 100, 101, 102);
  } else if constexpr (count == 128) {
    BOTH_TYPES(PRODUCT_R, 256,
               SUMS_0 SUMS_1 SUMS_2 SUMS_3 SUMS_4 SUMS_5 SUMS_6 SUMS_7 SUMS_8 SUMS_9 SUMS_10 SUMS_11 SUMS_12 SUMS_13
                   SUMS_14 SUMS_15,
               (EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56), EIGHT(64),
                EIGHT(72), EIGHT(80), EIGHT(88), EIGHT(96), EIGHT(104), EIGHT(112), EIGHT(120)),
               128, 129, 130, 131, 132, 133, 134);
  } else {
    static_assert(count < 0, "there is no product of this width here");
  }
}

#undef EIGHT
#undef LIST
#undef PRODUCT
#undef PRODUCT_MN
#undef PRODUCT_AS
#undef PRODUCT_R
#undef BOTH_TYPES

// The compiler takes sums for made when a product is begun: here it must have done, or not begun, all it does to them.
DEV void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
DEV void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <class T, int count>
DEV void pin(T (&x)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) pin(x[i]);
}

// Between other uses of the registers of products, which are named here, and the first of these.
template <class... Registers>
DEV void products_fence(Registers&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

DEV void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `pending` groups are under way; names the registers of those that were.
template <int pending, class... Registers>
DEV void products_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
  (pin(registers), ...);
}

}  // namespace prim
#endif
