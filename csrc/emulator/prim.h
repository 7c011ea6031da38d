// The host twin of csrc/cuda/prim.cuh: the same functions, on the machine of machine.h.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "launch.h"

#define DEV inline
#define KERNEL(name) KERNEL_ALONE(name, Params)
#define KERNEL_ALONE(name, Params)                                                     \
  void name(const Params& p);                                                          \
  static void emulated_kernel(const void* p) { name(*static_cast<const Params*>(p)); } \
  using EmulatedParams = Params;                                                       \
  void name(const Params& p)

namespace prim {

DEV int thread() { return emulator::machine.current->thread; }
DEV int block() { return static_cast<int>(emulator::machine.block); }
DEV int grid() { return static_cast<int>(emulator::machine.blocks); }
DEV int fresh(int x) { return x; }
DEV uint32_t shared_base() { return 0; }

DEV void sync() { emulator::barrier(); }
DEV void sync_warp() {
  emulator::meet("sync_warp", nullptr, nullptr, [](emulator::Fiber*) {});
}

DEV float shuffle_xor(float value, int mask) {
  float result;
  emulator::meet("shuffle_xor", &value, &result, [mask](emulator::Fiber* lanes) {
    float values[32];
    for (int i = 0; i < 32; ++i) values[i] = *static_cast<const float*>(lanes[i].in);
    for (int i = 0; i < 32; ++i) *static_cast<float*>(lanes[i].out) = values[i ^ mask];
  });
  return result;
}

DEV uint32_t shuffle(uint32_t value, int lane) {
  struct {
    uint32_t value;
    int lane;
  } in{value, lane};
  uint32_t result;
  emulator::meet("shuffle", &in, &result, [](emulator::Fiber* lanes) {
    using In = decltype(in);
    for (int i = 0; i < 32; ++i) {
      const int from = static_cast<const In*>(lanes[i].in)->lane % 32;
      *static_cast<uint32_t*>(lanes[i].out) = static_cast<const In*>(lanes[from].in)->value;
    }
  });
  return result;
}

DEV float exp2(float x) { return std::exp2(x); }
DEV float log2(float x) { return std::log2(x); }
DEV float reciprocal(float x) { return 1 / x; }

inline float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t from_float(float x, bool bf16) {
  if (!bf16) {
    const _Float16 half = static_cast<_Float16>(x);
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
  }
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

DEV uint32_t pack(float low, float high, bool bf16) {
  return from_float(low, bf16) | static_cast<uint32_t>(from_float(high, bf16)) << 16;
}

DEV float to_float(uint16_t bits, bool bf16) { return emulator::to_float(bits, bf16); }

DEV void atomic_add(float* address, float value) { *address += value; }
DEV void atomic_add(float* address, const float (&x)[4]) {
  if (reinterpret_cast<uintptr_t>(address) % 16) emulator::fail("four floats must begin at a multiple of 16 bytes");
  for (int i = 0; i < 4; ++i) address[i] += x[i];
}

struct Words {
  uint32_t w[4];
};

template <class T>
void store_shared(uint32_t address, const T& x) {
  unsigned char* to = emulator::shared_at(address, sizeof(T), sizeof(T));
  emulator::watch_write(address, sizeof(T), false);
  memcpy(to, &x, sizeof(T));
}

template <class T>
void load_shared_as(T& x, uint32_t address) {
  const unsigned char* from = emulator::shared_at(address, sizeof(T), sizeof(T));
  emulator::watch_read(address, sizeof(T));
  memcpy(&x, from, sizeof(T));
}

DEV float load_shared(uint32_t address) {
  float x;
  load_shared_as(x, address);
  return x;
}

DEV void load_shared(uint32_t address, float (&x)[2]) { load_shared_as(x, address); }

DEV Words load_shared_words(uint32_t address) {
  Words x;
  load_shared_as(x, address);
  return x;
}

DEV Words load_global(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) emulator::fail("16 bytes are loaded where they are not aligned");
  Words x;
  memcpy(&x, address, 16);
  return x;
}

DEV void store_global(void* address, const Words& x) {
  if (reinterpret_cast<uintptr_t>(address) % 16) emulator::fail("16 bytes are stored where they are not aligned");
  memcpy(address, &x, 16);
}

DEV void copy_async(uint32_t to, const void* from, int bytes) { emulator::copy({to, from, 16, bytes}); }
DEV void copy_async_word(uint32_t to, const void* from, int bytes) { emulator::copy({to, from, 4, bytes}); }
DEV void copy_commit() { emulator::commit(); }
template <int pending>
void copy_wait() {
  emulator::wait(pending);
}

template <bool transposed>
void load_matrices_as(uint32_t (&r)[4], uint32_t address) {
  const unsigned char* row = emulator::shared_at(address, 16, 16);
  emulator::watch_read(address, 16);
  emulator::meet(transposed ? "load_matrices_transposed" : "load_matrices", row, r, [](emulator::Fiber* lanes) {
    uint16_t rows[32][8];
    uint32_t banks[4] = {};
    for (int l = 0; l < 32; ++l) {
      memcpy(rows[l], lanes[l].in, 16);
      banks[l / 8] |= 1u << emulator::shared_offset(lanes[l].in) / 16 % 8;
    }
    for (const uint32_t used : banks)
      if (used != 0xff) emulator::fail("the rows of a matrix do not lie in different banks");
    for (int l = 0; l < 32; ++l)
      for (int j = 0; j < 4; ++j) {
        const int a = l / 4, b = l % 4 * 2;
        uint32_t& word = static_cast<uint32_t*>(lanes[l].out)[j];
        const auto* matrix = rows + 8 * j;
        word = transposed ? matrix[b][a] | static_cast<uint32_t>(matrix[b + 1][a]) << 16
                          : matrix[a][b] | static_cast<uint32_t>(matrix[a][b + 1]) << 16;
      }
  });
}

DEV void load_matrices(uint32_t (&r)[4], uint32_t address) { load_matrices_as<false>(r, address); }
DEV void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) { load_matrices_as<true>(r, address); }

struct Operands {
  const uint32_t* a;
  uint32_t b[2];
};

DEV void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
  const Operands operands{a, {b0, b1}};
  emulator::meet("multiply", &operands, c, [bf16](emulator::Fiber* lanes) {
    float A[16][16], B[16][8], C[16][8];
    for (int l = 0; l < 32; ++l) {
      const auto* x = static_cast<const Operands*>(lanes[l].in);
      for (int h = 0; h < 2; ++h) {
        for (int r = 0; r < 4; ++r) {
          const emulator::Element e = emulator::fragment_a(l, r, h);
          A[e.row][e.col] = to_float(static_cast<uint16_t>(x->a[r] >> (16 * h)), bf16);
        }
        for (int r = 0; r < 2; ++r) {
          const emulator::Element e = emulator::fragment_b(l, r, h);
          B[e.row][e.col] = to_float(static_cast<uint16_t>(x->b[r] >> (16 * h)), bf16);
        }
      }
      for (int r = 0; r < 4; ++r) {
        const emulator::Element e = emulator::fragment_c(l, r);
        C[e.row][e.col] = static_cast<const float*>(lanes[l].out)[r];
      }
    }
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) C[i][j] += A[i][k] * B[k][j];
    for (int l = 0; l < 32; ++l)
      for (int r = 0; r < 4; ++r) {
        const emulator::Element e = emulator::fragment_c(l, r);
        static_cast<float*>(lanes[l].out)[r] = C[e.row][e.col];
      }
  });
}

// ---- Hopper -----------------------------------------------------------------------------------------------

using TensorMap = emulator::TensorMap;

DEV void barrier_init(uint32_t barrier, int count) { emulator::barrier_init(barrier, count); }
DEV void barrier_init_fence() { emulator::barrier_init_fence(); }
DEV void barrier_arrive(uint32_t barrier) { emulator::barrier_arrive(barrier, 0); }
DEV void barrier_expect(uint32_t barrier, int bytes) { emulator::barrier_arrive(barrier, bytes); }
DEV void barrier_wait(uint32_t barrier, uint32_t parity) { emulator::barrier_wait(barrier, parity); }

DEV void copy_box(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w) {
  emulator::copy_box(to, map, barrier, {x, y, z, w, 0});
}
DEV void store_box(const TensorMap& map, uint32_t from, int x, int y, int z, int w) {
  emulator::store_box(map, from, {x, y, z, w, 0});
}
DEV void store_commit() { emulator::store_commit(); }
template <int pending>
void store_wait() {
  emulator::store_wait(pending);
}
DEV void fence_stores() { emulator::fence_stores(); }

DEV void named_sync(int id, int threads) { emulator::named_sync(id, threads); }
DEV void named_arrive(int id, int threads) { emulator::named_arrive(id, threads); }

template <int count>
void take_registers() {
  emulator::set_registers(count, true);
}
template <int count>
void give_registers() {
  emulator::set_registers(count, false);
}

template <bool b_mn_major, bool a_mn_major = false, int count>
void multiply_async(float (&c)[count], uint64_t a, uint64_t b, bool accumulate, bool bf16) {
  emulator::multiply_async({c, count, nullptr, a, b, a_mn_major, b_mn_major, accumulate, bf16});
}
template <bool b_mn_major, int count>
void multiply_async(float (&c)[count], const uint32_t (&a)[4], uint64_t b, bool accumulate, bool bf16) {
  emulator::multiply_async({c, count, a, 0, b, false, b_mn_major, accumulate, bf16});
}
template <class... Registers>
void products_fence(Registers&...) {
  emulator::products_fence();
}
DEV void products_commit() { emulator::products_commit(); }
template <int pending, class... Registers>
void products_wait(Registers&...) {
  emulator::products_wait(pending);
}

}  // namespace prim
