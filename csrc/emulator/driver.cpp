// The CUDA driver's functions that csrc/cuda/launch.cpp calls, with the emulator behind them: a libcuda.so.1 for
// machines without a GPU, built by the tests (tests/emulator.py).
//
// An image is the path of a library that holds one kernel, and one line `NAME VALUE` for each flag that the kernel
// reads at run time; the library is loaded once.
#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <sstream>
#include <string>

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
int launches = 0;

int failure(const std::string& what) {
  message = what;
  return 999;
}

}  // namespace

extern "C" {

void emulator_configure(bool is_racing, uint32_t a_seed) { racing = is_racing, seed = a_seed, launches = 0; }
int emulator_launches() { return launches; }

int cuGetErrorString(int, const char** text) {
  *text = message.c_str();
  return 0;
}

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}

int cuCtxGetCurrent(void** context) {
  static int only;
  *context = &only;
  return 0;
}

int cuCtxGetDevice(int* device) {
  *device = 0;
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
  auto* image = static_cast<Image*>(kernel);
  auto set_flag = reinterpret_cast<SetFlag>(dlsym(image->library, "emulator_set_flag"));
  for (const auto& [name, value] : image->flags)
    if (!set_flag(name, value)) return failure("there is no flag " + name);
  auto run = reinterpret_cast<Run>(dlsym(image->library, "emulator_run"));
  const char* error = run(params[0], blocks, static_cast<int>(threads), shared, racing, seed);
  return error ? failure(error) : 0;
}
}
