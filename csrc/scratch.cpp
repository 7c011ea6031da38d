#include "scratch.h"

#include <atomic>
#include <new>

namespace pyattn {
namespace {

// What threads have asked for since the last reset, all together, and the most that this was.
std::atomic<int64_t> total_bytes{0};
std::atomic<int64_t> peak_bytes{0};
std::atomic<int64_t> resets{0};

struct Block {
  void* data = nullptr;
  size_t size = 0;
  int64_t counted = 0;  // of total_bytes
  int64_t counted_at = 0;

  void resize(size_t bytes) {
    if (data) ::operator delete(data, std::align_val_t{64});
    data = nullptr;
    size = 0;
    if (bytes == 0) return;
    data = ::operator new(bytes, std::align_val_t{64});
    size = bytes;
  }
  void count(int64_t bytes) {
    const int64_t now = resets;
    const int64_t before = counted_at == now ? counted : 0;
    counted = bytes;
    counted_at = now;
    const int64_t total = total_bytes += bytes - before;
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
  block.count(static_cast<int64_t>(bytes));
  return block.data;
}

int64_t scratch_peak_bytes(bool reset) {
  const int64_t peak = peak_bytes;
  if (reset) {
    ++resets;
    total_bytes = 0;
    peak_bytes = 0;
  }
  return peak;
}

}  // namespace pyattn
