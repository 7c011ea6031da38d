// A streaming multiprocessor in slow motion, on a CPU: one block at a time, each of its threads a fiber.
//
// A fiber runs until it meets the others of its warp (`meet`) or of its block (`barrier`). Memory is watched rather
// than timed: a shared word remembers which warp wrote and which warps read it since the last barrier, and whether a
// copy to it is under way. So a missing wait or barrier is an error whatever the order of the threads; the two modes
// change it all the same. In `late` mode copies land when a wait demands it, and lanes take turns; in `racing` mode
// copies land at once, and each warp, in random order, runs ahead as far as it can.
//
// It knows nothing of time, and of the memory model between blocks. x86-64 only.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

constexpr size_t kStack = 1 << 16;

struct Copy {
  uint32_t to;
  const void* from;
  int size, bytes;  // the rest is zeros
};

enum class State { ready, waiting, done };

struct Fiber {
  void* stack_pointer = nullptr;
  int thread = 0;
  State state = State::ready;
  const void* in = nullptr;  // of a collective
  void* out = nullptr;
  std::vector<Copy> open;  // copies that no group has yet
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  int arrived = 0;
  const char* collective = nullptr;
};

struct Word {
  uint32_t written = 0, read = 0;  // the number of barriers before, plus 1; 0: never
  uint16_t writer = 0;
  uint32_t readers = 0;  // a bit a warp
  int in_flight = 0;
};

struct Machine {
  bool racing = false;
  uint32_t random = 1;
  int64_t block = 0;
  int threads = 0, live = 0, at_barrier = 0;
  uint32_t epoch = 1;
  std::vector<unsigned char> shared;
  std::vector<Word> words;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<char[]>> stacks;
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  void (*kernel)(const void*) = nullptr;
  const void* params = nullptr;
  std::string error;
};
inline Machine machine;

extern "C" void emulator_switch(void** from, void* to);
asm(R"(.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

inline void yield() { emulator_switch(&machine.current->stack_pointer, machine.scheduler); }

// Ends the block: the scheduler sees the error, and no fiber runs again.
inline void fail(const std::string& what) {
  if (machine.error.empty())
    machine.error =
        "block " + std::to_string(machine.block) + ", thread " + std::to_string(machine.current->thread) + ": " + what;
  yield();
  abort();
}

inline void enter() {
  machine.kernel(machine.params);
  Fiber& me = *machine.current;
  if (!me.open.empty() || !me.groups.empty()) {
    for (const auto& group : me.groups)
      if (!group.empty()) fail("returned while copies were under way");
    if (!me.open.empty()) fail("returned with copies that were never committed");
  }
  me.state = State::done;
  --machine.live;
  if (machine.at_barrier && machine.at_barrier == machine.live) fail("returned while others wait at a barrier");
  yield();
}

inline int this_warp() { return machine.current->thread / 32; }

inline uint32_t next_random() { return machine.random = machine.random * 1664525u + 1013904223u, machine.random >> 8; }

// ---- shared memory ------------------------------------------------------------------------------------------------

inline unsigned char* shared_at(uint32_t address, int bytes, int alignment) {
  if (address % alignment) fail("shared address " + std::to_string(address) + " is not aligned");
  if (address + bytes > machine.shared.size())
    fail("shared address " + std::to_string(address) + " is beyond " + std::to_string(machine.shared.size()));
  return machine.shared.data() + address;
}

inline uint32_t shared_offset(const void* at) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(at) - machine.shared.data());
}

inline void fail_at(uint32_t word, const char* what) { fail("shared word " + std::to_string(word) + " " + what); }

inline void watch_read(uint32_t address, int bytes) {
  for (uint32_t i = address / 4; i < (address + bytes + 3) / 4; ++i) {
    Word& word = machine.words[i];
    if (word.in_flight) fail_at(i, "is read while a copy to it is under way");
    if (word.written == machine.epoch && word.writer != this_warp())
      fail_at(i, "is read without a barrier after another warp wrote it");
    if (word.read != machine.epoch) word.read = machine.epoch, word.readers = 0;
    word.readers |= 1u << this_warp();
  }
}

inline void watch_write(uint32_t address, int bytes, bool lands) {
  for (uint32_t i = address / 4; i < (address + bytes + 3) / 4; ++i) {
    Word& word = machine.words[i];
    if (!lands && word.in_flight) fail_at(i, "is written while a copy to it is under way");
    if (word.written == machine.epoch && word.writer != this_warp())
      fail_at(i, "is written without a barrier after another warp wrote it");
    if (word.read == machine.epoch && word.readers & ~(1u << this_warp()))
      fail_at(i, "is written without a barrier after another warp read it");
    word.written = machine.epoch, word.writer = static_cast<uint16_t>(this_warp());
  }
}

// ---- threads together -----------------------------------------------------------------------------------------------

// All lanes of a warp: the last to come does `op` for all. `in` and `out` are each lane's own.
template <class Op>
void meet(const char* name, const void* in, void* out, Op op) {
  const int w = this_warp();
  Warp& warp = machine.warps[w];
  if (warp.arrived && strcmp(warp.collective, name))
    fail(std::string(name) + ": other lanes of the warp are at " + warp.collective);
  warp.collective = name;
  machine.current->in = in, machine.current->out = out;
  if (++warp.arrived < 32) {
    machine.current->state = State::waiting;
    yield();
    return;
  }
  warp.arrived = 0;
  op(&machine.fibers[w * 32]);
  for (int i = 0; i < 32; ++i) machine.fibers[w * 32 + i].state = State::ready;
}

inline void barrier() {
  if (++machine.at_barrier < machine.live) {
    machine.current->state = State::waiting;
    yield();
    return;
  }
  machine.at_barrier = 0, ++machine.epoch;
  for (Fiber& fiber : machine.fibers)
    if (fiber.state == State::waiting) fiber.state = State::ready;
}

// ---- copies
// -----------------------------------------------------------------------------------------------------------

inline void land(const Copy& copy) {
  unsigned char* to = shared_at(copy.to, copy.size, copy.size);
  memset(to, 0, copy.size);
  memcpy(to, copy.from, copy.bytes);
}

inline void copy(const Copy& copy) {
  if (reinterpret_cast<uintptr_t>(copy.from) % copy.size) fail("a copy's source is not aligned");
  shared_at(copy.to, copy.size, copy.size);
  watch_write(copy.to, copy.size, false);
  for (int i = 0; i < copy.size / 4; ++i) ++machine.words[copy.to / 4 + i].in_flight;
  if (machine.racing) land(copy);
  machine.current->open.push_back(copy);
}

inline void commit() {
  machine.current->groups.push_back(std::move(machine.current->open));
  machine.current->open.clear();
}

inline void wait(size_t pending) {
  auto& groups = machine.current->groups;
  for (; groups.size() > pending; groups.pop_front())
    for (const Copy& copy : groups.front()) {
      if (!machine.racing) land(copy);
      for (int i = 0; i < copy.size / 4; ++i) --machine.words[copy.to / 4 + i].in_flight;
      watch_write(copy.to, copy.size, true);
    }
}

// ---- a launch
// -----------------------------------------------------------------------------------------------------------

inline void run_block(int64_t block, int threads, size_t shared_bytes) {
  Machine& m = machine;
  m.block = block, m.threads = m.live = threads, m.at_barrier = 0, m.epoch = 1;
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
}

// Runs a kernel; returns what went wrong, or null.
inline const char* run(void (*kernel)(const void*), const void* params, int64_t blocks, int threads,
                       size_t shared_bytes, bool racing, uint32_t seed) {
  Machine& m = machine;
  m.kernel = kernel, m.params = params, m.racing = racing, m.random = seed * 2654435761u + 1;
  m.error.clear();
  for (int64_t i = 0; i < blocks && m.error.empty(); ++i) run_block(racing ? blocks - 1 - i : i, threads, shared_bytes);
  return m.error.empty() ? nullptr : m.error.c_str();
}

}  // namespace emulator
