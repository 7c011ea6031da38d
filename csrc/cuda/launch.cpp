#include "launch.h"

#include <dlfcn.h>

#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

namespace pyattn {
namespace {

constexpr int kMaxDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int64_t kMaxBlocks = 0x7fffffff;

// Of a tensor map.
constexpr int kFloat16 = 6, kBfloat16 = 9;         // CU_TENSOR_MAP_DATA_TYPE_
constexpr int kNoInterleave = 0, kNoSwizzle = 0;   // CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE
constexpr int kSwizzle128B = 3, kPromote256B = 3;  // CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B
constexpr int kFillZero = 0;                       // CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
constexpr size_t kMaxRank = 5;
constexpr int64_t kSwizzledRow = 64;  // elements in 128 bytes
constexpr size_t kKeptMaps = 4096;    // with their arguments less than 2 MB

// What is used of cuda.h, which may not be there. All of it is in every driver since CUDA 12.0.
struct Driver {
  int (*GetErrorString)(int, const char**);
  int (*DriverGetVersion)(int*);
  int (*CtxGetCurrent)(void**);
  int (*CtxSetCurrent)(void*);
  int (*DeviceGet)(int*, int);
  int (*DevicePrimaryCtxRetain)(void**, int);
  int (*LibraryLoadData)(void**, const void*, void*, void*, unsigned, void*, void*, unsigned);
  int (*LibraryGetKernel)(void**, void*, const char*);
  int (*KernelSetAttribute)(int, int, void*, int);
  int (*KernelGetFunction)(void**, void*);
  int (*LaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                      void**);
  int (*TensorMapEncodeTiled)(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                              const uint32_t*, int, int, int, int);
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

// Makes a context the thread's current one, and gives back the one that was. Threads of autograd have none until
// something needs it, and keep the one they get here.
class Current {
 public:
  explicit Current(void* context) {
    check(driver.CtxGetCurrent(&before_), "cuCtxGetCurrent");
    if (before_ != context) check(driver.CtxSetCurrent(context), "cuCtxSetCurrent");
    changed_ = before_ && before_ != context;
  }
  ~Current() {
    if (changed_) driver.CtxSetCurrent(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  void* before_ = nullptr;
  bool changed_ = false;
};

void require(bool holds, const std::string& argument, const char* needed, int64_t came) {
  if (!holds) throw std::invalid_argument(argument + " must " + needed + ", got " + std::to_string(came));
}

void require_encodable(DType dtype, uintptr_t address, const Dims& sizes, const Dims& strides, const Dims& box,
                       bool swizzle) {
  const size_t rank = sizes.size();
  require(dtype == DType::bf16 || dtype == DType::f16, "dtype", "be 1 (bf16) or 2 (f16)", static_cast<int>(dtype));
  require(address % 16 == 0, "address", "be a multiple of 16", address);
  require(rank >= 2 && rank <= kMaxRank, "sizes", "have 2 to 5 entries", rank);
  require(strides.size() == rank, "strides", "have as many entries as sizes", strides.size());
  require(box.size() == rank, "box", "have as many entries as sizes", box.size());
  for (size_t i = 0; i < rank; ++i) {
    const std::string index = "[" + std::to_string(i) + "]";
    const bool inner = i == rank - 1;
    const bool steps = strides[i] >= 0 && strides[i] < int64_t{1} << 40 && strides[i] % 16 == 0;
    require(sizes[i] >= 1 && sizes[i] <= int64_t{1} << 32, "sizes" + index, "be 1 to 2^32", sizes[i]);
    require(inner || steps, "strides" + index, "be a multiple of 16 bytes, at least 0 and below 2^40", strides[i]);
    require(!inner || strides[i] == 2, "strides" + index, "be the 2 bytes of an element", strides[i]);
    require(box[i] >= 1 && box[i] <= 256, "box" + index, "be 1 to 256", box[i]);
    require(!inner || box[i] % 8 == 0, "box" + index, "be a multiple of 8 (16 bytes)", box[i]);
    require(!inner || !swizzle || box[i] <= kSwizzledRow, "box" + index, "be at most 64 (128 bytes) with swizzle",
            box[i]);
  }
}

TensorMap encode(DType dtype, uintptr_t address, const Dims& sizes, const Dims& strides, const Dims& box,
                 bool swizzle) {
  // The driver's order is innermost first, and the innermost stride goes without saying.
  const std::vector<uint64_t> driver_sizes(sizes.rbegin(), sizes.rend());
  const std::vector<uint64_t> driver_strides(strides.rbegin() + 1, strides.rend());
  const std::vector<uint32_t> driver_box(box.rbegin(), box.rend());
  const uint32_t every_element[kMaxRank] = {1, 1, 1, 1, 1};
  const bool swizzled = swizzle && box.back() == kSwizzledRow;
  TensorMap map;
  check(driver.TensorMapEncodeTiled(&map, dtype == DType::bf16 ? kBfloat16 : kFloat16, sizes.size(),
                                    reinterpret_cast<void*>(address), driver_sizes.data(), driver_strides.data(),
                                    driver_box.data(), every_element, kNoInterleave,
                                    swizzled ? kSwizzle128B : kNoSwizzle, kPromote256B, kFillZero),
        "cuTensorMapEncodeTiled");
  return map;
}

std::map<std::tuple<DType, uintptr_t, Dims, Dims, Dims, bool>, TensorMap, std::less<>> maps;
std::mutex maps_mutex;

}  // namespace

void cuda_open(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(std::string("the CUDA driver cannot be opened: ") + dlerror());
  Driver found{};
  find(library, "cuGetErrorString", found.GetErrorString);
  find(library, "cuDriverGetVersion", found.DriverGetVersion);
  find(library, "cuCtxGetCurrent", found.CtxGetCurrent);
  find(library, "cuCtxSetCurrent", found.CtxSetCurrent);
  find(library, "cuDeviceGet", found.DeviceGet);
  find(library, "cuDevicePrimaryCtxRetain", found.DevicePrimaryCtxRetain);
  find(library, "cuLibraryLoadData", found.LibraryLoadData);
  find(library, "cuLibraryGetKernel", found.LibraryGetKernel);
  find(library, "cuKernelSetAttribute", found.KernelSetAttribute);
  find(library, "cuKernelGetFunction", found.KernelGetFunction);
  find(library, "cuLaunchKernel", found.LaunchKernel);
  find(library, "cuTensorMapEncodeTiled", found.TensorMapEncodeTiled);
  const std::lock_guard lock(maps_mutex);
  driver = found;
  maps.clear();  // another driver's
}

int cuda_driver_version() {
  int version = 0;
  check(driver.DriverGetVersion(&version), "cuDriverGetVersion");
  return version;
}

CudaKernel::CudaKernel(const std::string& image, const std::string& name, int threads, int shared_bytes, int device)
    : threads_(threads), shared_bytes_(shared_bytes) {
  if (!driver.LaunchKernel) throw std::runtime_error("the CUDA driver has not been opened");
  void *library = nullptr, *kernel = nullptr;
  int handle = 0;
  check(driver.DeviceGet(&handle, device), "cuDeviceGet");
  check(driver.DevicePrimaryCtxRetain(&context_, handle), "cuDevicePrimaryCtxRetain");  // torch's; it stays
  const Current current(context_);
  // Never unloaded: a kernel may be part of a graph.
  check(driver.LibraryLoadData(&library, image.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0), "cuLibraryLoadData");
  check(driver.LibraryGetKernel(&kernel, library, name.c_str()), "cuLibraryGetKernel");
  check(driver.KernelSetAttribute(kMaxDynamicSharedBytes, shared_bytes, kernel, handle), "cuKernelSetAttribute");
  check(driver.KernelGetFunction(&function_, kernel), "cuKernelGetFunction");  // loads it now, not in a graph's capture
}

void CudaKernel::launch(int64_t blocks, uintptr_t stream, const void* params) const {
  if (blocks > kMaxBlocks)
    throw std::runtime_error("a launch has at most 2^31 - 1 blocks, this one " + std::to_string(blocks));
  const Current current(context_);
  void* arguments[] = {const_cast<void*>(params)};
  check(driver.LaunchKernel(function_, static_cast<unsigned>(blocks), 1, 1, static_cast<unsigned>(threads_), 1, 1,
                            static_cast<unsigned>(shared_bytes_), reinterpret_cast<void*>(stream), arguments, nullptr),
        "cuLaunchKernel");
}

TensorMap tensor_map(DType dtype, uintptr_t address, const Dims& sizes, const Dims& strides, const Dims& box,
                     bool swizzle) {
  const std::lock_guard lock(maps_mutex);
  if (!driver.TensorMapEncodeTiled) throw std::runtime_error("the CUDA driver has not been opened");
  const auto arguments = std::tie(dtype, address, sizes, strides, box, swizzle);
  if (const auto kept = maps.find(arguments); kept != maps.end()) return kept->second;
  require_encodable(dtype, address, sizes, strides, box, swizzle);
  const TensorMap map = encode(dtype, address, sizes, strides, box, swizzle);
  if (maps.size() == kKeptMaps) maps.clear();
  maps.emplace(arguments, map);
  return map;
}

}  // namespace pyattn
