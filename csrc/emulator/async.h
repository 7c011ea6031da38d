// What Hopper does beside its threads: copies in bulk by an engine (TMA), barriers that count bytes, and products of a
// warpgroup, which read shared memory and write registers while the threads go on.
//
// All of it is late in `late` mode: bytes land when somebody waits for them, products are made when they are waited
// for. In `racing` mode it happens at once. In both, accumulators are NaN until they are waited for, and what threads
// have stored to shared memory is to be fenced before the engine or a product may read it.
#pragma once
#include <algorithm>
#include <cmath>
#include <map>

#include "fragments.h"
#include "machine.h"
#include "tensor_map.h"

namespace emulator {

// ---- what threads have stored, for those who are none ---------------------------------------------------------------

// fence.proxy.async: what the warp has stored so far may be read by the engine and by products.
inline std::vector<uint32_t> fences[kWarps];

inline void fence_stores() {
  fences[this_warp()].push_back(this_clock().of[this_warp()]);
  ++this_clock().of[this_warp()];
}

// That what a thread has stored in a word has been fenced since.
inline void check_fenced(uint32_t i) {
  const Word& word = machine.words[i];
  if (!word.written || word.writer == kEngine) return;
  const auto& times = fences[word.writer];
  const auto fence = std::lower_bound(times.begin(), times.end(), word.written);
  if (fence == times.end() || *fence > this_clock().of[word.writer])
    fail_at(i, "is used by a product or a copy without a fence after a thread stored it");
}

// That the engine, or a product, may read a word: like a thread, and only what has been fenced.
inline void check_async_read(uint32_t i) {
  check_read(i, this_clock());
  check_fenced(i);
}

// ---- barriers that count arrivals and bytes (mbarrier) --------------------------------------------------------------

struct Transfer {
  const TensorMap* map;
  uint32_t to;
  int at[5];
  uint32_t when;  // by the engine's clock
};

struct ByteBarrier {
  int count = 0, missing = 0;  // arrivals
  int64_t bytes = 0;           // that are expected and have not landed
  uint32_t phase = 0;
  int waiting = 0;
  int maker = 0;  // a warp, and when by its clock
  uint32_t made = 0;
  Clock gathered, told[2];
  std::vector<Transfer> transfers;
};
inline std::map<uint32_t, ByteBarrier> byte_barriers;

inline ByteBarrier& byte_barrier(uint32_t address) {
  const auto found = byte_barriers.find(address);
  if (found == byte_barriers.end()) fail("there is no barrier at shared address " + std::to_string(address));
  ByteBarrier& barrier = found->second;
  if (barrier.made > this_clock().of[barrier.maker]) fail("a barrier is used without another after it was made");
  return barrier;
}

inline int box_bytes(const TensorMap& map) {
  int bytes = 2;
  for (int d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return bytes;
}

// Calls visit(shared address, element in memory or null) for each element of a box; beyond the tensor there is none.
template <class Visit>
void for_box(const TensorMap& map, uint32_t base, const int (&at)[5], Visit visit) {
  const int elements = box_bytes(map) / 2;
  for (int i = 0; i < elements; ++i) {
    uint64_t offset = 0;
    bool inside = true;
    for (int d = 0, rest = i; d < map.rank; rest /= map.box[d], ++d) {
      const int64_t x = int64_t(at[d]) + rest % map.box[d];
      inside &= x >= 0 && x < int64_t(map.size[d]);
      offset += d ? x * map.stride[d - 1] : 2 * x;
    }
    uint32_t address = base + 2 * i;
    if (map.swizzle == 3) address ^= (address >> 7 & 7) << 4;  // CU_TENSOR_MAP_SWIZZLE_128B
    visit(address, inside ? reinterpret_cast<uint16_t*>(map.address + offset) : nullptr);
  }
}

inline void check_box(const TensorMap& map, uint32_t address) {
  if (address % (map.swizzle == 3 ? 1024 : 128)) fail("a box is not aligned in shared memory");
  if (reinterpret_cast<uintptr_t>(&map) % 64) fail("a tensor map is not aligned");
  shared_at(address, box_bytes(map), 16);
}

inline void land(const Transfer& transfer) {
  for_box(*transfer.map, transfer.to, transfer.at, [](uint32_t address, const uint16_t* from) {
    const uint16_t bits = from ? *from : 0;
    memcpy(&machine.shared[address], &bits, 2);
  });
}

inline void complete(ByteBarrier& barrier) {
  for (const Transfer& transfer : barrier.transfers) {
    const int bytes = box_bytes(*transfer.map);
    land(transfer);
    for (uint32_t i = transfer.to / 4; i < (transfer.to + bytes) / 4; ++i) {
      --machine.words[i].in_flight;
      note_write(i, kEngine, transfer.when);
    }
    barrier.bytes -= bytes;
    Clock landed;
    landed.of[kEngine] = transfer.when;
    barrier.gathered.hear(landed);
  }
  barrier.transfers.clear();
}

// Whether all has arrived; then the next phase begins.
inline void settle(ByteBarrier& barrier) {
  if (machine.racing || (barrier.waiting && !barrier.missing)) complete(barrier);
  if (barrier.missing || barrier.bytes || !barrier.transfers.empty()) return;
  barrier.told[barrier.phase & 1] = barrier.gathered;
  barrier.gathered = {};
  barrier.missing = barrier.count;
  ++barrier.phase;
}

inline void barrier_init(uint32_t address, int count) {
  shared_at(address, 8, 8);
  if (byte_barriers.count(address)) fail("a barrier is made twice");
  ByteBarrier& barrier = byte_barriers[address];
  barrier.count = barrier.missing = count;
  barrier.maker = this_warp(), barrier.made = this_clock().of[this_warp()];
}

// fence.mbarrier_init: the engine, too, may use what the warp has made so far.
inline uint32_t inits_fenced[kWarps];
inline void barrier_init_fence() { inits_fenced[this_warp()] = this_clock().of[this_warp()]; }

inline void barrier_arrive(uint32_t address, int bytes) {
  ByteBarrier& barrier = byte_barrier(address);
  if (!barrier.missing) fail("more arrivals at a barrier than it counts");
  barrier.bytes += bytes;
  tell(barrier.gathered);
  --barrier.missing;
  settle(barrier);
}

inline void barrier_wait(uint32_t address, uint32_t parity) {
  ByteBarrier& barrier = byte_barrier(address);
  ++barrier.waiting;
  wait_until([&barrier, parity] {
    if ((barrier.phase & 1) == parity) settle(barrier);
    return (barrier.phase & 1) != parity;
  });
  --barrier.waiting;
  this_clock().hear(barrier.told[parity]);
}

inline void copy_box(uint32_t to, const TensorMap& map, uint32_t barrier_address, const int (&at)[5]) {
  ByteBarrier& barrier = byte_barrier(barrier_address);
  check_box(map, to);
  if (barrier.made > inits_fenced[barrier.maker]) fail("a barrier has not been fenced after it was made");
  Transfer transfer{&map, to, {at[0], at[1], at[2], at[3], at[4]}, ++machine.clocks[kEngine].of[kEngine]};
  for (uint32_t i = to / 4; i < (to + box_bytes(map)) / 4; ++i) {
    check_write(i, this_clock(), false);
    check_fenced(i);
    ++machine.words[i].in_flight;
  }
  barrier.transfers.push_back(transfer);
  settle(barrier);
}

// ---- copies to global memory ----------------------------------------------------------------------------------------

struct Store {
  const TensorMap* map;
  uint32_t from;
  int at[5];
};
struct Stores {  // of a thread
  std::vector<Store> open;
  std::deque<std::vector<Store>> groups;
};
inline std::map<int, Stores> stores;

inline void put(const Store& store) {
  for_box(*store.map, store.from, store.at, [](uint32_t address, uint16_t* to) {
    if (to) memcpy(to, &machine.shared[address], 2);
  });
}

inline void store_box(const TensorMap& map, uint32_t from, const int (&at)[5]) {
  check_box(map, from);
  const Store store{&map, from, {at[0], at[1], at[2], at[3], at[4]}};
  for (uint32_t i = from / 4; i < (from + box_bytes(map)) / 4; ++i) check_async_read(i), ++machine.words[i].in_use;
  if (machine.racing) put(store);
  stores[machine.current->thread].open.push_back(store);
}

inline void store_commit() {
  Stores& mine = stores[machine.current->thread];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

inline void store_wait(size_t pending) {
  Stores& mine = stores[machine.current->thread];
  for (; mine.groups.size() > pending; mine.groups.pop_front())
    for (const Store& store : mine.groups.front()) {
      if (!machine.racing) put(store);
      for (uint32_t i = store.from / 4; i < (store.from + box_bytes(*store.map)) / 4; ++i)
        --machine.words[i].in_use, note_read(i);
    }
}

// ---- barriers by number ---------------------------------------------------------------------------------------------

struct NamedBarrier {
  int arrived = 0, expected = 0;
  uint64_t generation = 0;
  Clock gathered, told;
};
inline std::map<int, NamedBarrier> named_barriers;

inline NamedBarrier& named_arrive(int id, int threads) {
  if (id < 1 || id > 15) fail("a barrier's number must be 1 to 15");
  NamedBarrier& barrier = named_barriers[id];
  if (barrier.arrived && barrier.expected != threads) fail("threads disagree on how many a barrier is for");
  barrier.expected = threads;
  tell(barrier.gathered);
  if (++barrier.arrived == threads) {
    barrier.told = barrier.gathered, barrier.gathered = {}, barrier.arrived = 0;
    ++barrier.generation;
  }
  return barrier;
}

inline void named_sync(int id, int threads) {
  const uint64_t generation = named_barriers[id].generation;
  NamedBarrier& barrier = named_arrive(id, threads);
  wait_until([&barrier, generation] { return barrier.generation != generation; });
  this_clock().hear(barrier.told);
}

// ---- registers ------------------------------------------------------------------------------------------------------

constexpr int kRegisters = 65536;
inline std::vector<int> registers;  // of a thread of each warp
inline int pool;                    // their sum when the block began: what nobody got then nobody gets later

inline void set_registers(int count, bool more) {
  if (count % 8 || count < 24 || count > 256) fail("a thread has 24 to 256 registers, a multiple of 8");
  int& mine = registers[this_warp()];
  if (more ? count < mine : count > mine) fail("registers are taken where they should be given, or given where taken");
  wait_until([&mine, count] {
    int total = -mine + count;
    for (const int others : registers) total += others;
    return total <= pool;
  });
  mine = count;
}

// ---- products of a warpgroup (wgmma) --------------------------------------------------------------------------------

// An operand in shared memory. Elements lie in rows of 128 bytes whose chunks of 16 are permuted by the row (the
// 128-byte swizzle). "Rows" count along M or N, "columns" along K. K-major: a row holds 64 columns, eight rows are
// `stride` bytes from the next eight. MN-major: a column holds 64 rows; eight columns are `stride` bytes from the next
// eight, 64 rows `leading` bytes from the next 64.
struct Operand {
  uint32_t start, leading, stride;
  bool mn_major;

  Operand(uint64_t descriptor, bool mn_major)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        mn_major(mn_major) {
    if (descriptor >> 62 != 1) fail("an operand must have the 128-byte swizzle");
    if (descriptor >> 49 & 7) fail("an operand must have a base offset of 0");
  }

  uint32_t at(int row, int col) const {
    const uint32_t address = mn_major ? start + row / 64 * leading + col / 8 * stride + col % 8 * 128 + row % 64 * 2
                                      : start + row / 8 * stride + row % 8 * 128 + col * 2;
    return address ^ (address >> 7 & 7) << 4;
  }
};

struct Product {
  float* sums[32];
  uint32_t a_registers[32][4];
  bool a_in_registers, accumulate, bf16;
  uint64_t a, b;
  bool a_mn_major, b_mn_major;
  int columns;  // N
  std::vector<uint32_t> words;
};

struct Products {  // of a warp
  bool fenced = false;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::map<float*, std::pair<int, std::vector<float>>> sums;  // how many products are to come, and what there is
};
inline Products products[kWarps];

// What one lane brings to a product.
struct ProductLane {
  float* sums;
  int count;
  const uint32_t* a_registers;  // or null: a is in shared memory
  uint64_t a, b;
  bool a_mn_major, b_mn_major, accumulate, bf16;
};

inline float to_float(uint16_t bits, bool bf16) {
  if (bf16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
  }
  _Float16 half;
  memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

inline float shared_float(uint32_t address, bool bf16) {
  uint16_t bits;
  memcpy(&bits, shared_at(address, 2, 2), 2);
  return to_float(bits, bf16);
}

// A warp's 16 of the 64 rows: sums [16, N] += a [16, 16] * b [16, N].
inline void compute(const Product& product, std::vector<float>& sums) {
  const Operand a(product.a_in_registers ? uint64_t{1} << 62 : product.a, product.a_mn_major);
  const Operand b(product.b, product.b_mn_major);
  const int N = product.columns, first_row = this_warp() % 4 * 16;
  std::vector<float> A(16 * 16), B(16 * N);
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r)
      for (int h = 0; h < 2; ++h) {
        const Element e = fragment_a(l, r, h);
        A[e.row * 16 + e.col] =
            product.a_in_registers
                ? to_float(static_cast<uint16_t>(product.a_registers[l][r] >> (16 * h)), product.bf16)
                : shared_float(a.at(first_row + e.row, e.col), product.bf16);
      }
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < N; ++n) B[k * N + n] = shared_float(b.at(n, k), product.bf16);
  for (int l = 0; l < 32; ++l)
    for (int v = 0; v < N / 2; ++v) {
      const Element e = fragment_sums(l, v);
      float& sum = sums[l * (N / 2) + v];
      if (!product.accumulate) sum = 0;
      for (int k = 0; k < 16; ++k) sum += A[e.row * 16 + k] * B[k * N + e.col];
    }
}

// The words of shared memory that a product reads.
inline std::vector<uint32_t> words_of(const Product& product) {
  std::vector<uint32_t> words;
  const Operand b(product.b, product.b_mn_major);
  for (int n = 0; n < product.columns; ++n)
    for (int k = 0; k < 16; ++k) words.push_back(b.at(n, k) / 4);
  if (!product.a_in_registers) {
    const Operand a(product.a, product.a_mn_major);
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k) words.push_back(a.at(this_warp() % 4 * 16 + m, k) / 4);
  }
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  return words;
}

inline void multiply_async(const ProductLane& mine) {
  meet("multiply_async", &mine, nullptr, [](Fiber* lanes) {
    Products& all = products[this_warp()];
    if (!all.fenced) fail("a product without a fence of its registers before it");
    const ProductLane& first = *static_cast<const ProductLane*>(lanes[0].in);
    Product product{};
    product.a_in_registers = first.a_registers, product.accumulate = first.accumulate, product.bf16 = first.bf16;
    product.a = first.a, product.b = first.b, product.a_mn_major = first.a_mn_major;
    product.b_mn_major = first.b_mn_major, product.columns = 2 * first.count;
    for (int l = 0; l < 32; ++l) {
      const ProductLane& lane = *static_cast<const ProductLane*>(lanes[l].in);
      if (lane.a != first.a || lane.b != first.b || lane.accumulate != first.accumulate)
        fail("the lanes of a warp disagree on a product");
      product.sums[l] = lane.sums;
      if (lane.a_registers) memcpy(product.a_registers[l], lane.a_registers, 16);
    }
    product.words = words_of(product);
    for (const uint32_t i : product.words) check_async_read(i), ++machine.words[i].in_use;
    auto& [left, sums] = all.sums[product.sums[0]];
    if (!left++) {
      sums.resize(32 * first.count);
      for (int l = 0; l < 32; ++l) memcpy(&sums[l * first.count], product.sums[l], 4 * first.count);
    }
    for (float* sum : product.sums) std::fill_n(sum, first.count, NAN);
    if (machine.racing) compute(product, sums);
    all.open.push_back(std::move(product));
  });
}

inline void products_fence() {
  meet("products_fence", nullptr, nullptr, [](Fiber*) { products[this_warp()].fenced = true; });
}

inline void products_commit() {
  meet("products_commit", nullptr, nullptr, [](Fiber*) {
    Products& all = products[this_warp()];
    all.groups.push_back(std::move(all.open));
    all.open.clear();
  });
}

inline void products_wait(size_t pending) {
  meet("products_wait", nullptr, nullptr, [pending](Fiber*) {
    Products& all = products[this_warp()];
    for (; all.groups.size() > pending; all.groups.pop_front()) {
      all.fenced = false;  // its registers may be touched now
      for (const Product& product : all.groups.front()) {
        auto& [left, sums] = all.sums[product.sums[0]];
        if (!machine.racing) compute(product, sums);
        for (const uint32_t i : product.words) --machine.words[i].in_use, note_read(i);
        if (--left) continue;
        for (int l = 0; l < 32; ++l) memcpy(product.sums[l], &sums[l * product.columns / 2], 2 * product.columns);
        all.sums.erase(product.sums[0]);
      }
    }
  });
}

// ---- between blocks -------------------------------------------------------------------------------------------------

inline void reset_async() {
  byte_barriers.clear(), stores.clear(), named_barriers.clear();
  for (int w = 0; w < kWarps; ++w) fences[w].clear(), products[w] = {}, inits_fenced[w] = 0;
  registers.assign(machine.threads / 32, std::min(256, kRegisters / machine.threads / 8 * 8));
  pool = machine.threads / 32 * registers[0];
}

// What a block has left behind, or null.
inline const char* left_async() {
  for (const auto& [address, barrier] : byte_barriers)
    if (!barrier.transfers.empty() || barrier.bytes) return "copies";
  for (const auto& [thread, mine] : stores)
    if (!mine.open.empty() || !mine.groups.empty()) return "stores";
  for (const Products& all : products)
    if (!all.open.empty() || !all.groups.empty()) return "products";
  return nullptr;
}

}  // namespace emulator
