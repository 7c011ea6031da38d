// What the kernels for sm_90a share: tiles that TMA copies and wgmma multiplies, rings of stages, which tiles a block
// has.
//
// A block has a warp that copies (the producer, in a warpgroup that gives its registers) and two or three warpgroups
// that compute (the consumers), 64 rows each. A stage of shared memory is full when its bytes have landed, and empty
// when all warps of the consumers have said so.
#pragma once
#include "prim_hopper.cuh"
#include "softmax.cuh"

constexpr int CONSUMERS = WARPS_M / 4 - 1, CONSUMER_WARPS = 4 * CONSUMERS;
constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 24 : 32, CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;
constexpr int SHARED_LIMIT = 227 * 1024, BARRIERS_BYTES = 256;
static_assert((CONSUMERS == 2 || CONSUMERS == 3) && WARPS_N == 1, "warps");

DEV int consumer() { return prim::thread() / 128 - 1; }
DEV int warp_row() { return prim::thread() / 32 % 4 * 16; }  // of a warp's 16 rows, of the consumer's 64

// Consumers give the tensor cores their products in turns, so that one takes exponentials while others multiply. Each
// waits at a barrier of its own for the one before it; the first turn is that of consumer 0.
constexpr int TURN = 1, TOGETHER = TURN + CONSUMERS;  // named barriers, one of each for each consumer
constexpr int ALL = TOGETHER + CONSUMERS;             // and one for all

DEV void take_turn() { prim::named_sync(TURN + consumer(), 256); }
DEV void pass_turn() { prim::named_arrive(TURN + (consumer() + 1) % CONSUMERS, 256); }
DEV void begin_turns() {
  if (consumer() == CONSUMERS - 1) pass_turn();
}

// All warps of this consumer, or of all.
DEV void wait_for_consumer() { prim::named_sync(TOGETHER + consumer(), 128); }
DEV void wait_for_consumers() { prim::named_sync(ALL, 128 * CONSUMERS); }

// ---- tiles in shared memory ---------------------------------------------------------------------------------------

// Panels of 64 columns of 16-bit elements, whose rows have 128 bytes with TMA's swizzle.
template <int ROWS_, int COLS_>
struct PanelTile {
  static constexpr int NUM_ROWS = ROWS_, NUM_COLS = COLS_, PANELS = (COLS_ + 63) / 64;
  static constexpr int PANEL_BYTES = ROWS_ * 128, BYTES = PANELS * PANEL_BYTES;
  static_assert(ROWS_ % 8 == 0 && COLS_ % 16 == 0, "eight rows are a swizzle, sixteen columns a product");
  uint32_t base;

  // The operand of a product over columns [col, col + 16), with rows from `row` on. Addresses in it count 16 bytes;
  // what is constant is added last, and costs no register.
  DEV uint64_t columns(int row, int col) const {
    return prim::operand(base + row * 128, 16, 1024) + (col / 64 * PANEL_BYTES + col % 64 * 2) / 16;
  }
  // The operand of a product over rows [row, row + 16), with columns from those of a panel on.
  DEV uint64_t rows(int row, int panel = 0) const {
    return prim::operand(base, PANEL_BYTES, 1024) + (panel * PANEL_BYTES + row * 128) / 16;
  }

  // Of the eight elements from column 8 * chunk on.
  DEV uint32_t at(int row, int chunk) const {
    return base + chunk / 8 * PANEL_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16;
  }

  // From the row of a head; by one thread.
  DEV void copy(const prim::TensorMap& map, uint32_t full, int row, int head, int b) const {
    prim::barrier_expect(full, BYTES);
    for (int i = 0; i < PANELS; ++i) prim::copy_box(base + i * PANEL_BYTES, map, full, 64 * i, row, head, b);
  }

  // Makes rows outside [begin, end) zeros, for products: no weight of 0 makes a NaN vanish. By a warp.
  DEV void scrub(int begin, int end) const {
    for (int i = lane(); i < NUM_ROWS * PANELS * 8; i += 32) {
      const int row = i / (PANELS * 8);
      if (row < begin || row >= end) prim::store_shared(at(row, i % (PANELS * 8)), prim::Words{});
    }
    prim::fence_stores();
    prim::sync_warp();
  }

  // A warp's 16 rows, times `factors`: calls write(row, column, eight elements), by way of the rows of this tile from
  // `row` on, so that threads beside each other write beside each other.
  template <class Write>
  DEV void store(const Fragment<1, NUM_COLS / 8>& x, const float (&factors)[2], int row, Write write) const {
    row = prim::fresh(row);  // addresses are computed here, not kept while products need the registers
#pragma unroll
    for (int d = 0; d < NUM_COLS / 8; ++d)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        prim::store_shared(
            at(row + fragment_row(0, 2 * half), d) + lane() % 4 * 4,
            prim::pack(x.x[0][d][2 * half] * factors[half], x.x[0][d][2 * half + 1] * factors[half], BF16));
    prim::sync_warp();
#pragma unroll
    for (int i = 0; i < 2 * NUM_COLS; i += 32) {
      const int r = (i + lane()) / (NUM_COLS / 8), d = (i + lane()) % (NUM_COLS / 8);
      write(r, d * 8, prim::load_shared_words(at(row + r, d)));
    }
    prim::fence_stores();  // the tile may be copied to again
    prim::sync_warp();
  }

  // The same to rows of D columns that follow each other, `num_rows` of them.
  DEV void store(const Fragment<1, NUM_COLS / 8>& x, const float (&factors)[2], int row, uint16_t* to, int64_t stride,
                 int num_rows, int D) const {
    store(x, factors, row, [=](int r, int col, const prim::Words& words) {
      if (r < num_rows && col < D) prim::store_global(to + r * stride + col, words);
    });
  }
};

// The producer's warp, to which tiles are copied that must be scrubbed before they are full.
struct Producer {
  uint32_t landed, parity = 0;

  // Copies a tile as soon as it may; makes rows outside [begin, end) zeros if it is not `clean`.
  template <class Tile>
  DEV void copy(Tile tile, const prim::TensorMap& map, uint32_t full, int row, int head, int b, bool clean = true,
                int begin = 0, int end = 0) {
    if (lane() == 0) tile.copy(map, clean ? full : landed, row, head, b);
    if (clean) return;
    prim::barrier_wait(landed, parity);
    parity ^= 1;
    tile.scrub(begin, end);
    if (lane() == 0) prim::barrier_arrive(full);
  }
};

// Where somebody stands in a ring of stages; the parity of what it waits for changes each time around.
template <int stages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  DEV void next() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// A consumer's warp no longer needs a stage.
DEV void release(uint32_t empty) {
  if (lane() == 0) prim::barrier_arrive(empty);
}

// ---- products -----------------------------------------------------------------------------------------------------

// A fragment as products take it.
template <int N>
DEV float (&sums_of(Fragment<1, N>& x))[4 * N] {
  return reinterpret_cast<float (&)[4 * N]>(x.x);
}

// c = a b^T, begun: a consumer's rows of a, from `row` on, and all rows of b, over all columns.
template <int NT, class A, class B>
DEV void begin_multiply_rows(Fragment<1, NT>& c, A a, int row, B b) {
  static_assert(A::NUM_COLS == B::NUM_COLS && B::NUM_ROWS == 8 * NT, "shapes do not match");
#pragma unroll
  for (int k = 0; k < A::NUM_COLS; k += 16)
    prim::multiply_async<false>(sums_of(c), a.columns(row, k), b.columns(0, k), k > 0, BF16);
  prim::products_commit();
}

// c += a b, begun: a in registers, over all rows of b.
template <int NT, int KT, class B>
DEV void begin_multiply_add(Fragment<1, NT>& c, const uint32_t (&a)[KT][4], B b) {
  static_assert(B::NUM_COLS == 8 * NT && B::NUM_ROWS == 16 * KT, "shapes do not match");
#pragma unroll
  for (int k = 0; k < KT; ++k) prim::multiply_async<true>(sums_of(c), a[k], b.rows(16 * k), true, BF16);
  prim::products_commit();
}

// Rounded to the input's type: the layout of sums is that of a left operand.
template <int KT>
DEV void pack(uint32_t (&a)[KT][4], const Fragment<1, 2 * KT>& x) {
#pragma unroll
  for (int k = 0; k < KT; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[k][i] = prim::pack(x.x[0][2 * k + i / 2][i % 2 * 2], x.x[0][2 * k + i / 2][i % 2 * 2 + 1], BF16);
}

// ---- where a block works ------------------------------------------------------------------------------------------

// Queries of a tile, each with ROWS rows, a divisor of BLOCK_M: those of as many heads of a key head.
DEV int queries_of_tile() { return BLOCK_M / ROWS; }

// One of p.items: a tile of a sample and head, whose rows are queries or keys. So many heads go together that what they
// share stays in the L2 cache. Where a block has `chunk` = 2 items at a time, they are the first tile and the last, the
// second and the last but one, and so on, which take equally long together under a causal mask.
struct Item {
  int head;
  Place place;
  Sample s;
  int num_tiles, tile;

  DEV Item(const Params& p, int item, bool of_keys)
      : Item(p, item / together(p), item % together(p), of_keys, of_keys ? BLOCK_N : queries_of_tile()) {}
  DEV Item(const Params& p, int heads, int rest, bool of_keys, int block)
      : head(heads * p.heads_together + rest / p.chunk % p.heads_together),
        place(tile_of(p, rest / p.chunk / p.heads_together * p.chunk + rest % p.chunk,
                      of_keys ? p.cu_seqlens_k : p.cu_seqlens_q, of_keys ? p.total_k : p.total_q, 1, block)),
        s(p, smaller(place.b, p.B - 1)),
        num_tiles(((of_keys ? s.Lk : s.Lq) + block - 1) / block),
        tile(p.chunk == 1     ? place.tile
             : place.tile % 2 ? num_tiles - 1 - place.tile / 2
                              : place.tile / 2) {}

  DEV static int together(const Params& p) { return (p.slots + p.chunk - 1) / p.chunk * p.chunk * p.heads_together; }
  DEV bool exists(const Params& p) const { return place.b < p.B && place.tile < num_tiles; }
};

// Calls visit(item) for each item of this block.
template <class Visit>
DEV void for_items(const Params& p, bool of_keys, Visit visit) {
  for (int first = prim::block() * p.chunk; first < p.items; first += prim::grid() * p.chunk)
    for (int i = first; i < first + p.chunk; ++i) {
      const Item item(p, i, of_keys);
      if (item.exists(p)) visit(item);
    }
}

// Of an item of queries. Under a causal mask the last rows see most: they come first.
DEV int first_query_of(const Item& item) { return (item.num_tiles - 1 - item.tile) * queries_of_tile(); }
DEV Tiles key_tiles_of(const Item& item) {
  const int first_query = first_query_of(item);
  return key_tiles(item.s, first_query, smaller(first_query + queries_of_tile(), item.s.Lq) - 1);
}

// Whether what is in memory of a tile of keys is in use: beyond a tensor TMA finds zeros.
DEV bool only_keys_in_use(const Params& p, const Sample& s, int first_key) {
  const int in_memory = p.cu_seqlens_k ? p.total_k - s.first_k : s.Lk;
  return first_key >= s.start && smaller(first_key + BLOCK_N, in_memory) <= s.length;
}

// ---- roles --------------------------------------------------------------------------------------------------------

// What a block does, from its first instruction on.
template <class Shared, class Produce, class Consume>
DEV void run_roles(const Shared& shared, Produce produce, Consume consume) {
  if (prim::thread() == 0) {
    shared.init();
    prim::barrier_init_fence();
  }
  prim::sync();
  if (prim::thread() < 128) {
    prim::give_registers<PRODUCER_REGISTERS>();
    if (prim::thread() < 32) produce();
  } else {
    prim::take_registers<CONSUMER_REGISTERS>();
    consume();
  }
}
