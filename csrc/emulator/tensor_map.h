// A tensor map as the emulated driver fills it: the arguments of cuTensorMapEncodeTiled as they came, dimensions
// innermost first. A kernel gets these 128 bytes where a GPU's kernel gets its encoded map, so an emulated TMA copy
// reads here which elements a box has, and the tests what the driver was asked for.
#pragma once
#include <cstdint>

namespace emulator {

struct TensorMap {
  uint64_t address;
  uint64_t size[5];
  uint64_t stride[4];  // in bytes, from the second dimension on
  uint32_t box[5];
  uint32_t element_stride[5];
  uint8_t data_type, rank, interleave, swizzle, l2_promotion, fill;  // as cuda.h numbers them
  uint8_t unused[2];
};
static_assert(sizeof(TensorMap) == 128);

}  // namespace emulator
