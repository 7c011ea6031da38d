// The one allocator of temporary memory: a block for each thread, kept between calls and counted.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pyattn {

// At least `bytes` of this thread's scratch, aligned to 64. Invalidates what the thread was given before.
void* thread_scratch(size_t bytes);

// The most that all threads together have asked for since the last reset, in bytes; no kernel may be running at a
// reset.
int64_t scratch_peak_bytes(bool reset);

// Carves typed arrays out of one block: lay out twice, first to measure (base null), then for real.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(base_ ? base_ + used_ : nullptr);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return result;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace pyattn
