// The CUDA driver's functions that csrc/cuda/launch.cpp calls, with the emulator behind them: a libcuda.so.1 for
// machines without a GPU, built by the tests (tests/emulator.py).
//
// An image is the path of a library that holds one kernel, and one line `NAME VALUE` for each flag that the kernel
// reads at run time; the library is loaded once.
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <sstream>
#include <string>

#include "emulator/tensor_map.h"

namespace {

using SetFlag = bool (*)(const std::string&, int);
using Run = const char* (*)(const void*, int64_t, int, size_t, bool, uint32_t);

struct Image {
  void* library;
  std::map<std::string, int> flags;
};

std::string message;
bool racing = false;
uint32_t seed = 0;
int launches = 0, tensor_maps = 0;
constexpr int kDevices = 2;
int contexts[kDevices];
thread_local int* current = nullptr;  // as in a thread that has not used CUDA

int failure(const std::string& what) {
  message = what;
  return 999;
}

}  // namespace

extern "C" {

void emulator_configure(bool is_racing, uint32_t a_seed) {
  racing = is_racing, seed = a_seed, launches = tensor_maps = 0;
}
int emulator_launches() { return launches; }
int emulator_tensor_maps() { return tensor_maps; }

int cuGetErrorString(int, const char** text) {
  *text = message.c_str();
  return 0;
}

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}

int cuCtxGetCurrent(void** context) {
  *context = current;
  return 0;
}

int cuCtxSetCurrent(void* context) {
  current = static_cast<int*>(context);
  return 0;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < kDevices ? 0 : failure("there is no device " + std::to_string(ordinal));
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &contexts[device];
  return 0;
}

int cuLibraryLoadData(void** library, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
  std::istringstream text(static_cast<const char*>(code));
  std::string path, name;
  std::getline(text, path);
  auto* image = new Image{dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL), {}};
  if (!image->library) return failure(dlerror());
  for (int value; text >> name >> value;) image->flags[name] = value;
  *library = image;
  return 0;
}

int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  auto only = reinterpret_cast<const char* (*)()>(dlsym(static_cast<Image*>(library)->library, "emulator_kernel"));
  if (std::string(name) != only()) return failure(std::string("there is no kernel ") + name);
  *kernel = library;
  return 0;
}

int cuKernelSetAttribute(int, int, void*, int) { return 0; }

int cuKernelGetFunction(void** function, void* kernel) {
  *function = kernel;
  return 0;
}

int cuLaunchKernel(void* kernel, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                   unsigned shared, void*, void** params, void**) {
  ++launches;
  if (!current) return failure("no context is current");
  auto* image = static_cast<Image*>(kernel);
  auto set_flag = reinterpret_cast<SetFlag>(dlsym(image->library, "emulator_set_flag"));
  for (const auto& [name, value] : image->flags)
    if (!set_flag(name, value)) return failure("there is no flag " + name);
  auto run = reinterpret_cast<Run>(dlsym(image->library, "emulator_run"));
  const char* error = run(params[0], blocks, static_cast<int>(threads), shared, racing, seed);
  return error ? failure(error) : 0;
}

int cuTensorMapEncodeTiled(void* to, int data_type, uint32_t rank, void* address, const uint64_t* sizes,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                           int interleave, int swizzle, int l2_promotion, int fill) {
  ++tensor_maps;
  if (reinterpret_cast<uintptr_t>(to) % 64) return failure("a tensor map is not at a multiple of 64");
  if (!address) return failure("a tensor map of no tensor");
  emulator::TensorMap map{};
  map.address = reinterpret_cast<uintptr_t>(address);
  std::copy_n(sizes, rank, map.size);
  std::copy_n(strides, rank - 1, map.stride);
  std::copy_n(box, rank, map.box);
  std::copy_n(element_strides, rank, map.element_stride);
  map.data_type = data_type, map.rank = rank, map.interleave = interleave, map.swizzle = swizzle;
  map.l2_promotion = l2_promotion, map.fill = fill;
  std::memcpy(to, &map, sizeof map);
  return 0;
}
}
