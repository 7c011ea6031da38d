// How a kernel runs on the emulated machine: its blocks one after the other, the warps of a block in turns.
#pragma once
#include "async.h"

namespace emulator {

inline void run_block(int64_t block, int threads, size_t shared_bytes) {
  Machine& m = machine;
  m.block = block, m.threads = m.live = threads, m.at_barrier = 0;
  for (int i = 0; i <= kWarps; ++i) m.clocks[i] = {}, m.clocks[i].of[i] = 1;
  reset_async();
  m.shared.assign(shared_bytes, 0xff);  // NaN, in each of the types
  m.words.assign((shared_bytes + 3) / 4, {});
  m.fibers.assign(threads, {});
  m.warps.assign(threads / 32, {});
  while (m.stacks.size() < static_cast<size_t>(threads)) m.stacks.emplace_back(new char[kStack]);
  for (int i = 0; i < threads; ++i) {
    m.fibers[i].thread = i;
    uintptr_t top = reinterpret_cast<uintptr_t>(m.stacks[i].get() + kStack) & ~uintptr_t{15};
    void** stack = reinterpret_cast<void**>(top - 8);  // as after a call
    *--stack = reinterpret_cast<void*>(&enter);
    m.fibers[i].stack_pointer = stack - 6;  // the registers that a switch restores
  }
  const int num_warps = threads / 32;
  while (m.live && m.error.empty()) {
    bool any = false;
    const int first = m.racing ? next_random() % num_warps : 0, rotation = m.racing ? next_random() % 32 : 0;
    for (int k = 0; k < num_warps && m.error.empty(); ++k) {
      const int w = (first + k) % num_warps;
      bool ran = true;
      while (ran && m.error.empty()) {  // racing: until every lane waits for another warp
        ran = false;
        for (int l = 0; l < 32 && m.error.empty(); ++l) {
          Fiber& fiber = m.fibers[w * 32 + (l + rotation) % 32];
          if (fiber.until) {
            m.current = &fiber, m.scheduling = true;
            const bool holds = fiber.until();
            m.scheduling = false;
            if (!holds) continue;
            fiber.until = nullptr, fiber.state = State::ready;
          }
          if (fiber.state != State::ready) continue;
          ran = any = true;
          m.current = &fiber;
          emulator_switch(&m.scheduler, fiber.stack_pointer);
        }
        if (!m.racing) break;
      }
    }
    if (!any && m.live && m.error.empty())
      m.error = "block " + std::to_string(block) + ": deadlock, " + std::to_string(m.live) + " threads are left, " +
                std::to_string(m.at_barrier) + " of them at a barrier";
  }
  if (m.error.empty()) {
    const char* left = left_async();
    if (left) m.error = "block " + std::to_string(block) + ": returned while " + left + " were under way";
  }
}

// Runs a kernel; returns what went wrong, or null.
inline const char* run(void (*kernel)(const void*), const void* params, int64_t blocks, int threads,
                       size_t shared_bytes, bool racing, uint32_t seed) {
  Machine& m = machine;
  m.kernel = kernel, m.params = params, m.blocks = blocks, m.racing = racing, m.random = seed * 2654435761u + 1;
  m.error.clear();
  if (threads > 32 * kWarps) m.error = "a block has at most " + std::to_string(32 * kWarps) + " threads here";
  for (int64_t i = 0; i < blocks && m.error.empty(); ++i) run_block(racing ? blocks - 1 - i : i, threads, shared_bytes);
  return m.error.empty() ? nullptr : m.error.c_str();
}

}  // namespace emulator
