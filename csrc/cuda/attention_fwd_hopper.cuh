// The forward for sm_90a: what moves data, what multiplies and what takes exponentials work at the same time
// (FlashAttention-3, Shah et al. 2024, arXiv:2407.08608).
//
// A block owns BLOCK_M rows of one sample and head after the other, 64 for each of its consumers, and goes over the keys
// they see.
//
//   roles          warp 0        copies query, keys and values by TMA, as soon as there is room
//                  warps 1-3     none: registers are given by the warpgroup
//                  warps 4-      consumers, a warpgroup each: products, softmax, output
//
//   tiles (pyattn/backends/cuda/kernels.py)         registers of a consumer for out, scores, weights
//     D    64   192 x 128, 3 consumers               32 + 64 + 32
//     D    96   128 x 176, 2 consumers               48 + 88 + 44
//     D   128   128 x 176, 2 consumers               64 + 88 + 44
//     D   192   128 x  96, 2 consumers               96 + 48 + 24
//     D   256   128 x  80, 2 consumers              128 + 40 + 20
//
//   shared memory  query [BLOCK_M, D], later out; STAGES of key [BLOCK_N, D]; STAGES of value [BLOCK_N, Dv]: each in
//                  panels of 64 columns with the 128-byte swizzle; barriers
//
//   barriers       full   the bytes of a stage have landed
//                  empty  all warps of the consumers are done with it
//                  turn   a consumer may give the tensor cores its products (those of 0, of 1, ... , of 0)
//
//   time       tensor cores                         consumer 0               consumer 1
//    |         0: S1 = Q K1^T, O += P0 V0           waits for S1             softmax of S1
//    |         1: S2 = Q K2^T, O += P1 V1           softmax of S1            waits for S2
//    v         0: S2 = Q K2^T, O += P1 V1           ...                      softmax of S2
//
// Scores of the next tile are multiplied before the values of the last one, so that a softmax runs under products of its
// own, too. Values outside the keys in use are made zeros in shared memory: no weight of 0 makes a NaN vanish.
#include "prim_hopper.cuh"
#include "softmax.cuh"

constexpr int CONSUMERS = WARPS_M / 4 - 1, STAGES = 2;
constexpr int NT = BLOCK_N / 8, DT = BLOCK_DV / 8;
constexpr int ROW_BYTES = 128;  // of a panel
constexpr int D_PANELS = (BLOCK_D + 63) / 64, DV_PANELS = (BLOCK_DV + 63) / 64;
constexpr int QUERY_PANEL = BLOCK_M * ROW_BYTES, KEY_PANEL = BLOCK_N * ROW_BYTES;
constexpr int KEY_BYTES = D_PANELS * KEY_PANEL, VALUE_BYTES = DV_PANELS * KEY_PANEL;  // of a stage
constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 24 : 32, CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;
static_assert(BLOCK_M == 64 * CONSUMERS && BLOCK_N % 16 == 0 && WARPS_N == 1, "tiles and warps");

struct alignas(64) MappedParams {
  prim::TensorMap query, key, value;  // boxes of [1, 1, BLOCK_M or BLOCK_N, 64]
  Params params;
};

struct Shared {  // where what lies
  uint32_t query = prim::shared_base();
  uint32_t key = query + (D_PANELS > DV_PANELS ? D_PANELS : DV_PANELS) * QUERY_PANEL;
  uint32_t value = key + STAGES * KEY_BYTES, barriers = value + STAGES * VALUE_BYTES;

  DEV uint32_t query_full() const { return barriers; }
  DEV uint32_t query_empty() const { return barriers + 8; }
  DEV uint32_t landed() const { return barriers + 16; }  // values that are not full yet
  DEV uint32_t key_full(int stage) const { return barriers + 24 + 8 * stage; }
  DEV uint32_t key_empty(int stage) const { return barriers + 24 + 8 * (STAGES + stage); }
  DEV uint32_t value_full(int stage) const { return barriers + 24 + 8 * (2 * STAGES + stage); }
  DEV uint32_t value_empty(int stage) const { return barriers + 24 + 8 * (3 * STAGES + stage); }
};

// Where somebody stands in a ring of stages; the parity of what it waits for changes each time around.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  DEV void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// One of p.items: a tile of rows of a sample and head. Under a causal mask the last rows see most: they come first. So
// many heads go together that their keys and values stay in the L2 cache.
struct Item {
  int head;
  Place place;
  Sample s;
  int num_tiles, first_row;

  DEV Item(const Params& p, int item)
      : head(item / (p.slots * p.heads_together) * p.heads_together + item % p.heads_together),
        place(tile_of(p, item % (p.slots * p.heads_together) / p.heads_together, p.cu_seqlens_q, p.total_q, 1,
                      BLOCK_M)),
        s(p, place.b),
        num_tiles((s.Lq + BLOCK_M - 1) / BLOCK_M),
        first_row((num_tiles - 1 - place.tile) * BLOCK_M) {}

  DEV bool exists() const { return place.tile < num_tiles; }
  DEV Tiles tiles() const { return key_tiles(s, first_row, smaller(first_row + BLOCK_M, s.Lq) - 1); }
};

// ---- the producer -------------------------------------------------------------------------------------------------

DEV void copy_panels(uint32_t to, const prim::TensorMap& map, uint32_t barrier, int panels, int panel_bytes, int row,
                     int head, int b) {
  prim::barrier_expect(barrier, panels * panel_bytes);
  for (int i = 0; i < panels; ++i) prim::copy_box(to + i * panel_bytes, map, barrier, 64 * i, row, head, b);
}

// Zeros for the values of a tile that are in memory but not in use.
DEV void scrub(uint32_t value, const Sample& s, int first_key) {
  for (int i = lane(); i < BLOCK_N * DV_PANELS * 8; i += 32) {
    const int n = i / 8 % BLOCK_N, key = first_key + n;
    if (key >= s.start && key < s.length) continue;
    prim::store_shared(value + i / 8 / BLOCK_N * KEY_PANEL + n * ROW_BYTES + i % 8 * 16, prim::Words{});
  }
  prim::fence_stores();
  prim::sync_warp();
}

DEV void produce(const MappedParams& maps, const Shared& shared) {
  const Params& p = maps.params;
  const bool elected = lane() == 0, packed = p.cu_seqlens_q;
  Turn at;
  uint32_t query_parity = 1, landed_parity = 0;
  for (int i = prim::block(); i < p.items; i += prim::grid()) {
    const Item item(p, i);
    if (!item.exists()) continue;
    const Sample& s = item.s;
    const Tiles tiles = item.tiles();
    const int key_head = item.head / (p.Hq / p.Hkv), in_memory = packed ? p.total_k - s.first_k : s.Lk;
    const int map_b = packed ? 0 : s.b;
    int first_key = tiles.begin;
    // The first keys before the query, whose place the last output may still need.
    do {
      if (first_key < tiles.end) {
        prim::barrier_wait(shared.key_empty(at.stage), at.parity ^ 1);
        if (elected)
          copy_panels(shared.key + at.stage * KEY_BYTES, maps.key, shared.key_full(at.stage), D_PANELS, KEY_PANEL,
                      s.first_k + first_key, key_head, map_b);
      }
      if (first_key == tiles.begin) {
        prim::barrier_wait(shared.query_empty(), query_parity);
        query_parity ^= 1;
        if (elected)
          copy_panels(shared.query, maps.query, shared.query_full(), D_PANELS, QUERY_PANEL, s.first_q + item.first_row,
                      item.head, map_b);
      }
      if (first_key < tiles.end) {
        const bool clean = first_key >= s.start && smaller(first_key + BLOCK_N, in_memory) <= s.length;
        const uint32_t value = shared.value + at.stage * VALUE_BYTES, full = shared.value_full(at.stage);
        prim::barrier_wait(shared.value_empty(at.stage), at.parity ^ 1);
        if (elected)
          copy_panels(value, maps.value, clean ? full : shared.landed(), DV_PANELS, KEY_PANEL, s.first_k + first_key,
                      key_head, map_b);
        if (!clean) {
          prim::barrier_wait(shared.landed(), landed_parity);
          landed_parity ^= 1;
          scrub(value, s, first_key);
          if (elected) prim::barrier_arrive(full);
        }
        at.next();
      }
      first_key += BLOCK_N;
    } while (first_key < tiles.end);
  }
}

// ---- the consumers ------------------------------------------------------------------------------------------------

constexpr int TURN = 1, GROUP = TURN + CONSUMERS;  // named barriers, one of each for each consumer

DEV void release(uint32_t empty) {
  if (lane() == 0) prim::barrier_arrive(empty);
}

// A fragment as products take it.
template <int N>
DEV float (&sums_of(Fragment<1, N>& x))[4 * N] {
  return reinterpret_cast<float(&)[4 * N]>(x.x);
}

// scores = query key^T, begun.
DEV void multiply_keys(Fragment<1, NT>& scores, uint32_t query, uint32_t key) {
#pragma unroll
  for (int k = 0; k < BLOCK_D; k += 16)
    prim::multiply_async<false>(sums_of(scores),
                                prim::operand(query + k / 64 * QUERY_PANEL + k % 64 * 2, 16, 8 * ROW_BYTES),
                                prim::operand(key + k / 64 * KEY_PANEL + k % 64 * 2, 16, 8 * ROW_BYTES), k > 0, BF16);
  prim::products_commit();
}

// out += weights value, begun.
DEV void multiply_values(Fragment<1, DT>& out, const uint32_t (&weights)[NT / 2][4], uint32_t value) {
#pragma unroll
  for (int k = 0; k < BLOCK_N; k += 16)
    prim::multiply_async<true>(sums_of(out), weights[k / 16],
                               prim::operand(value + k * ROW_BYTES, KEY_PANEL, 8 * ROW_BYTES), true, BF16);
  prim::products_commit();
}

// Rounded to the input's type: the layout of sums is that of a left operand.
DEV void pack_weights(uint32_t (&weights)[NT / 2][4], const Fragment<1, NT>& s) {
#pragma unroll
  for (int k = 0; k < NT / 2; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      weights[k][i] = prim::pack(s.x[0][2 * k + i / 2][i % 2 * 2], s.x[0][2 * k + i / 2][i % 2 * 2 + 1], BF16);
}

// A warp's 16 rows, by way of shared memory, so that threads beside each other write beside each other.
DEV void write_out(const Params& p, const Item& item, const Fragment<1, DT>& out, const float (&norm)[2],
                   uint32_t staging, int warp_row) {
#pragma unroll
  for (int d = 0; d < DT; ++d)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = fragment_row(0, 2 * half);
      prim::store_shared(
          staging + d / 8 * QUERY_PANEL + r * ROW_BYTES + (d % 8 ^ r % 8) * 16 + lane() % 4 * 4,
          prim::pack(out.x[0][d][2 * half] * norm[half], out.x[0][d][2 * half + 1] * norm[half], BF16));
    }
  prim::sync_warp();
  const Sample& s = item.s;
  const int first_row = item.first_row + warp_row;
  uint16_t* to = p.out + s.b * p.out_b + item.head * p.out_h + (s.first_q + first_row) * p.out_l;
#pragma unroll
  for (int i = 0; i < 16 * DT; i += 32) {
    const int r = (i + lane()) / DT, d = (i + lane()) % DT;
    const prim::Words words =
        prim::load_shared_words(staging + d / 8 * QUERY_PANEL + r * ROW_BYTES + (d % 8 ^ r % 8) * 16);
    if (first_row + r < s.Lq && d * 8 < p.Dv) prim::store_global(to + r * p.out_l + d * 8, words);
  }
}

DEV void consume(const Params& p, const Shared& shared) {
  const int group = prim::thread() / 128 - 1, warp_row = (prim::thread() / 32 - 4) * 16;
  const uint32_t query = shared.query + group * 64 * ROW_BYTES;
  const float unit = unit_of(p);
  const auto take_turn = [&] { prim::named_sync(TURN + group, 256); };
  const auto pass_turn = [&](int from) { prim::named_arrive(TURN + (from + 1) % CONSUMERS, 256); };
  Turn key_at, value_at;
  uint32_t query_parity = 0;
  if (group == CONSUMERS - 1) pass_turn(group);

  for (int i = prim::block(); i < p.items; i += prim::grid()) {
    const Item item(p, i);
    if (!item.exists()) continue;
    const Sample& s = item.s;
    const Tiles tiles = item.tiles();
    Rows<1> rows;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      rows.begin(p, s, 0, half, item.first_row + warp_row + fragment_row(0, 2 * half), item.head, true);
    Fragment<1, DT> out;
    Fragment<1, NT> scores;
    uint32_t weights[NT / 2][4];
    float shrink[1][2];
    out.fill(0);

    prim::barrier_wait(shared.query_full(), query_parity);
    query_parity ^= 1;
    if (tiles.begin < tiles.end) {
      prim::barrier_wait(shared.key_full(key_at.stage), key_at.parity);
      take_turn();
      prim::products_fence(scores.x);
      multiply_keys(scores, query, shared.key + key_at.stage * KEY_BYTES);
      pass_turn(group);
      prim::products_wait<0>(scores.x);
      release(shared.key_empty(key_at.stage));
      key_at.next();
      finish_scores(scores, p, s, tiles, rows, tiles.begin, tiles.begin);
      online_softmax_step(scores, rows, unit, shrink);
      pack_weights(weights, scores);
      for (int first_key = tiles.begin + BLOCK_N; first_key < tiles.end; first_key += BLOCK_N) {
        prim::barrier_wait(shared.key_full(key_at.stage), key_at.parity);
        take_turn();
        prim::products_fence(scores.x, weights, out.x);
        multiply_keys(scores, query, shared.key + key_at.stage * KEY_BYTES);
        prim::barrier_wait(shared.value_full(value_at.stage), value_at.parity);
        multiply_values(out, weights, shared.value + value_at.stage * VALUE_BYTES);
        pass_turn(group);
        prim::products_wait<1>(scores.x);
        release(shared.key_empty(key_at.stage));
        key_at.next();
        finish_scores(scores, p, s, tiles, rows, first_key, first_key);
        online_softmax_step(scores, rows, unit, shrink);
        prim::products_wait<0>(out.x, weights);
        release(shared.value_empty(value_at.stage));
        value_at.next();
        pack_weights(weights, scores);
        rescale(out, shrink);
      }
      prim::barrier_wait(shared.value_full(value_at.stage), value_at.parity);
      prim::products_fence(weights, out.x);
      multiply_values(out, weights, shared.value + value_at.stage * VALUE_BYTES);
      prim::products_wait<0>(out.x);
      release(shared.value_empty(value_at.stage));
      value_at.next();
    }

    float norm[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = rows.total(0, half);
      norm[half] = sum == 0 ? 1 : prim::reciprocal(sum);
      const int row = rows.row[0][half];
      if (lane() % 4 == 0 && row < s.Lq)
        p.lse[s.b * p.lse_b + item.head * p.lse_h + s.first_q + row] = (rows.max[0][half] + prim::log2(sum)) * LN2;
    }
    prim::named_sync(GROUP + group, 128);  // no product reads these rows of the query any more
    write_out(p, item, out, norm, shared.query + warp_row * ROW_BYTES, warp_row);
    prim::fence_stores();
    prim::sync_warp();
    release(shared.query_empty());
  }
}

KERNEL_OF(attention_fwd_hopper, MappedParams) {
  const Shared shared;
  if (prim::thread() == 0) {
    prim::barrier_init(shared.query_full(), 1);
    prim::barrier_init(shared.query_empty(), 4 * CONSUMERS);
    prim::barrier_init(shared.landed(), 1);
    for (int stage = 0; stage < STAGES; ++stage) {
      prim::barrier_init(shared.key_full(stage), 1);
      prim::barrier_init(shared.value_full(stage), 1);
      prim::barrier_init(shared.key_empty(stage), 4 * CONSUMERS);
      prim::barrier_init(shared.value_empty(stage), 4 * CONSUMERS);
    }
    prim::barrier_init_fence();
  }
  prim::sync();
  if (prim::thread() < 128) {
    prim::give_registers<PRODUCER_REGISTERS>();
    if (prim::thread() < 32) produce(p, shared);
  } else {
    prim::take_registers<CONSUMER_REGISTERS>();
    consume(p.params, shared);
  }
}
