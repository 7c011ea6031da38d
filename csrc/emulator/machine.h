// A streaming multiprocessor in slow motion, on a CPU: one block at a time, each of its threads a fiber.
//
// A fiber runs until it meets the others of its warp (`meet`) or of its block (`barrier`), or waits for something else
// (`wait_until`). Memory is watched rather than timed. Each warp has a clock, and knows how far it has heard of the
// others' (vector clocks, Mattern 1989): whoever waits at a barrier hears of all that was done before it. A shared word
// remembers when which warp wrote it and which warps have read it since, and whether a copy to it is under way. So a
// missing wait or barrier is an error whatever the order of the threads; the two modes change it all the same. In
// `late` mode copies land when a wait demands it, and lanes take turns; in `racing` mode copies land at once, and each
// warp, in random order, runs ahead as far as it can. What Hopper does by itself, in bulk, is in async.h.
//
// It knows nothing of time, and of the memory model between blocks. x86-64 only.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

constexpr size_t kStack = 1 << 16;
constexpr int kWarps = 16, kEngine = kWarps;  // what copies in bulk has a clock, too

// By whom how much has been heard of.
struct Clock {
  uint32_t of[kWarps + 1] = {};

  void hear(const Clock& other) {
    for (int i = 0; i <= kWarps; ++i)
      if (of[i] < other.of[i]) of[i] = other.of[i];
  }
};

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
  std::function<bool()> until;  // what it waits for, if it is not the others of its warp or block
  const void* in = nullptr;     // of a collective
  void* out = nullptr;
  std::vector<Copy> open;  // copies that no group has yet
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  int arrived = 0;
  const char* collective = nullptr;
};

struct Word {
  uint32_t written = 0;        // by the writer's clock; 0: never
  uint32_t read[kWarps] = {};  // by each reader's clock, since it was written
  uint32_t readers = 0;        // a bit a warp
  uint16_t writer = 0;
  uint16_t in_flight = 0;  // copies to it
  uint16_t in_use = 0;     // products, and copies from it, that may still read it
};

struct Machine {
  bool racing = false, scheduling = false;
  uint32_t random = 1;
  int64_t block = 0, blocks = 0;
  int threads = 0, live = 0, at_barrier = 0;
  std::vector<unsigned char> shared;
  std::vector<Word> words;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Clock clocks[kWarps + 1];
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
  if (machine.scheduling) return;  // nobody is to be interrupted
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
inline Clock& this_clock() { return machine.clocks[this_warp()]; }

inline void wait_until(std::function<bool()> holds) {
  if (holds()) return;
  machine.current->until = std::move(holds);
  machine.current->state = State::waiting;
  yield();
}

// What the warp has done so far is told to whoever hears `clock`; what it does from now on is later.
inline void tell(Clock& clock) {
  clock.hear(this_clock());
  ++this_clock().of[this_warp()];
}

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

// That a warp, or the engine, which has heard of `clock`, may read or write a word.
inline void check_read(uint32_t i, const Clock& clock) {
  const Word& word = machine.words[i];
  if (word.in_flight) fail_at(i, "is read while a copy to it is under way");
  if (word.written > clock.of[word.writer]) fail_at(i, "is read without a barrier after another warp wrote it");
}

inline void check_write(uint32_t i, const Clock& clock, bool lands) {
  const Word& word = machine.words[i];
  if (!lands && word.in_flight) fail_at(i, "is written while a copy to it is under way");
  if (word.in_use) fail_at(i, "is written while a product or a copy still reads it");
  if (word.written > clock.of[word.writer]) fail_at(i, "is written without a barrier after another warp wrote it");
  for (uint32_t left = word.readers; left; left &= left - 1) {
    const int reader = __builtin_ctz(left);
    if (word.read[reader] > clock.of[reader]) fail_at(i, "is written without a barrier after another warp read it");
  }
}

inline void note_read(uint32_t i) {
  machine.words[i].read[this_warp()] = this_clock().of[this_warp()];
  machine.words[i].readers |= 1u << this_warp();
}

inline void note_write(uint32_t i, int writer, uint32_t when) {
  Word& word = machine.words[i];
  word.written = when, word.writer = static_cast<uint16_t>(writer), word.readers = 0;
}

inline void watch_read(uint32_t address, int bytes) {
  for (uint32_t i = address / 4; i < (address + bytes + 3) / 4; ++i) check_read(i, this_clock()), note_read(i);
}

inline void watch_write(uint32_t address, int bytes, bool lands) {
  for (uint32_t i = address / 4; i < (address + bytes + 3) / 4; ++i) {
    check_write(i, this_clock(), lands);
    note_write(i, this_warp(), this_clock().of[this_warp()]);
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
  machine.at_barrier = 0;
  Clock all;
  const int num_warps = machine.threads / 32;
  for (int w = 0; w < num_warps; ++w) all.hear(machine.clocks[w]);
  for (int w = 0; w < num_warps; ++w) machine.clocks[w] = all, ++machine.clocks[w].of[w];
  for (Fiber& fiber : machine.fibers)
    if (fiber.state == State::waiting && !fiber.until) fiber.state = State::ready;
}

// ---- copies ---------------------------------------------------------------------------------------------------------

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

}  // namespace emulator
