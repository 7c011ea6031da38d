#include "launch.h"

#include <dlfcn.h>

#include <stdexcept>

namespace pyattn {
namespace {

constexpr int kMaxDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int64_t kMaxBlocks = 0x7fffffff;

// What is used of cuda.h, which may not be there. All of it is in every driver since CUDA 12.0.
struct Driver {
  int (*GetErrorString)(int, const char**);
  int (*DriverGetVersion)(int*);
  int (*CtxGetCurrent)(void**);
  int (*CtxGetDevice)(int*);
  int (*LibraryLoadData)(void**, const void*, void*, void*, unsigned, void*, void*, unsigned);
  int (*LibraryGetKernel)(void**, void*, const char*);
  int (*KernelSetAttribute)(int, int, void*, int);
  int (*KernelGetFunction)(void**, void*);
  int (*LaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                      void**);
};

Driver driver{};

template <class Function>
void find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("the CUDA driver has no ") + name + ": it is older than 12.0");
}

void check(int code, const char* what) {
  if (!code) return;
  const char* text = nullptr;
  if (driver.GetErrorString(code, &text) || !text) text = "unknown error";
  throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(code) + ", " + text);
}

}  // namespace

void cuda_open(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(std::string("the CUDA driver cannot be opened: ") + dlerror());
  Driver found{};
  find(library, "cuGetErrorString", found.GetErrorString);
  find(library, "cuDriverGetVersion", found.DriverGetVersion);
  find(library, "cuCtxGetCurrent", found.CtxGetCurrent);
  find(library, "cuCtxGetDevice", found.CtxGetDevice);
  find(library, "cuLibraryLoadData", found.LibraryLoadData);
  find(library, "cuLibraryGetKernel", found.LibraryGetKernel);
  find(library, "cuKernelSetAttribute", found.KernelSetAttribute);
  find(library, "cuKernelGetFunction", found.KernelGetFunction);
  find(library, "cuLaunchKernel", found.LaunchKernel);
  driver = found;
}

int cuda_driver_version() {
  int version = 0;
  check(driver.DriverGetVersion(&version), "cuDriverGetVersion");
  return version;
}

CudaKernel::CudaKernel(const std::string& image, const std::string& name, int threads, int shared_bytes)
    : threads_(threads), shared_bytes_(shared_bytes) {
  if (!driver.LaunchKernel) throw std::runtime_error("the CUDA driver has not been opened");
  void *context = nullptr, *library = nullptr, *kernel = nullptr;
  int device = 0;
  check(driver.CtxGetCurrent(&context), "cuCtxGetCurrent");
  if (!context) throw std::runtime_error("this thread has no current CUDA device");
  check(driver.CtxGetDevice(&device), "cuCtxGetDevice");
  // Never unloaded: a kernel may be part of a graph.
  check(driver.LibraryLoadData(&library, image.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0), "cuLibraryLoadData");
  check(driver.LibraryGetKernel(&kernel, library, name.c_str()), "cuLibraryGetKernel");
  check(driver.KernelSetAttribute(kMaxDynamicSharedBytes, shared_bytes, kernel, device), "cuKernelSetAttribute");
  check(driver.KernelGetFunction(&function_, kernel), "cuKernelGetFunction");  // loads it now, not in a graph's capture
}

void CudaKernel::launch(int64_t blocks, uintptr_t stream, const void* params) const {
  if (blocks > kMaxBlocks)
    throw std::runtime_error("a launch has at most 2^31 - 1 blocks, this one " + std::to_string(blocks));
  void* arguments[] = {const_cast<void*>(params)};
  check(driver.LaunchKernel(function_, static_cast<unsigned>(blocks), 1, 1, static_cast<unsigned>(threads_), 1, 1,
                            static_cast<unsigned>(shared_bytes_), reinterpret_cast<void*>(stream), arguments, nullptr),
        "cuLaunchKernel");
}

}  // namespace pyattn
