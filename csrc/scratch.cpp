#include "scratch.h"

#include <atomic>
#include <new>

namespace pyattn {
namespace {

std::atomic<int64_t> total_bytes{0};
std::atomic<int64_t> peak_bytes{0};

struct Block {
  void* data = nullptr;
  size_t size = 0;

  void resize(size_t bytes) {
    if (data) {
      ::operator delete(data, std::align_val_t{64});
      total_bytes -= static_cast<int64_t>(size);
      data = nullptr;
      size = 0;
    }
    if (bytes == 0) return;
    data = ::operator new(bytes, std::align_val_t{64});
    size = bytes;
    const int64_t total = total_bytes += static_cast<int64_t>(bytes);
    int64_t peak = peak_bytes;
    while (peak < total && !peak_bytes.compare_exchange_weak(peak, total)) {
    }
  }
  ~Block() { resize(0); }
};

thread_local Block block;

}  // namespace

void* thread_scratch(size_t bytes) {
  if (bytes > block.size) block.resize(bytes);
  return block.data;
}

int64_t scratch_peak_bytes(bool reset) {
  const int64_t peak = peak_bytes;
  if (reset) peak_bytes = total_bytes.load();
  return peak;
}

}  // namespace pyattn
