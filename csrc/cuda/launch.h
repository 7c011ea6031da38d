// Kernels on NVIDIA GPUs through the driver's API, opened at run time: nothing links to CUDA.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "params.h"

namespace pyattn {

// Opens the driver, "libcuda.so.1" wherever there is one. Throws std::runtime_error, as everything here
// does when the driver fails.
void cuda_open(const std::string& library);

// 13000 is 13.0: the newest CUDA whose machine code the driver takes.
int cuda_driver_version();

// A kernel of an image of machine code, loaded on a device; any thread may launch it, whatever its current device.
class CudaKernel {
 public:
  CudaKernel(const std::string& image, const std::string& name, int threads, int shared_bytes, int device);

  // On a stream of the device; `params` are the kernel's only argument, by value.
  void launch(int64_t blocks, uintptr_t stream, const void* params) const;

 private:
  void *context_ = nullptr, *function_ = nullptr;
  int threads_, shared_bytes_;
};

// CUtensorMap of cuda.h, a kernel's argument for TMA; only the driver and the GPU know what is in it.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

using Dims = std::vector<int64_t>;  // an entry a dimension, in torch's order: innermost last

// The map of a tensor of bf16 or f16, from which TMA copies boxes; what of a box lies outside the tensor is zeros.
// Strides are in bytes, `box` in elements. With `swizzle`, a box whose rows are 128 bytes has them swizzled in shared
// memory; narrower rows are left as they are, and wider ones refused. A map is kept for the next call with the same
// arguments. What the driver would refuse without saying why throws std::invalid_argument.
TensorMap tensor_map(DType dtype, uintptr_t address, const Dims& sizes, const Dims& strides, const Dims& box,
                     bool swizzle);

}  // namespace pyattn
