// Kernels on NVIDIA GPUs through the driver's API, opened at run time: nothing links to CUDA.
#pragma once
#include <cstdint>
#include <string>

namespace pyattn {

// Opens the driver, "libcuda.so.1" wherever there is one. Throws std::runtime_error, as everything here.
void cuda_open(const std::string& library);

// 13000 is 13.0: the newest CUDA whose machine code the driver takes.
int cuda_driver_version();

// A kernel of an image of machine code, loaded on the current device.
class CudaKernel {
 public:
  CudaKernel(const std::string& image, const std::string& name, int threads, int shared_bytes);

  // On a stream of the device; `params` are the kernel's only argument, by value.
  void launch(int64_t blocks, uintptr_t stream, const void* params) const;

 private:
  void* function_ = nullptr;
  int threads_, shared_bytes_;
};

}  // namespace pyattn
