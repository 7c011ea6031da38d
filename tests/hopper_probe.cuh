// out = (query key^T) value, tile by tile: all that a kernel for Hopper is made of, and nothing else.
//
// A warp copies, two warpgroups multiply 64 rows each. Keys and values have two stages; a stage is full when its bytes
// have landed, and empty when all eight warps have said so.
#include "prim_hopper.cuh"

struct alignas(64) Params {
  prim::TensorMap query, key, value, out;  // [1, 1, rows, 128] each
  int tiles;
};

constexpr int ROWS = 128, KEYS = 64, COLS = 128, STAGES = 2, CONSUMERS = 2;
constexpr int PANELS = COLS / 64, ROW_BYTES = 128;  // of a panel
constexpr int QUERY_PANEL = ROWS * ROW_BYTES, KEY_PANEL = KEYS * ROW_BYTES;
constexpr int QUERY_BYTES = PANELS * QUERY_PANEL, KEY_BYTES = PANELS * KEY_PANEL;
constexpr int THREADS = 128 * (1 + CONSUMERS);

struct Shared {  // where what lies
  uint32_t query = prim::shared_base(), key = query + QUERY_BYTES, value = key + STAGES * KEY_BYTES;
  uint32_t barriers = value + STAGES * KEY_BYTES;

  DEV uint32_t ready() const { return barriers; }
  DEV uint32_t full(int stage) const { return barriers + 8 + 8 * stage; }
  DEV uint32_t empty(int stage) const { return barriers + 8 + 8 * (STAGES + stage); }
};

DEV void produce(const Params& p, const Shared& s) {
  prim::barrier_expect(s.ready(), QUERY_BYTES);
  for (int i = 0; i < PANELS; ++i) prim::copy_box(s.query + i * QUERY_PANEL, p.query, s.ready(), 64 * i, 0, 0, 0);
  for (int tile = 0; tile < p.tiles; ++tile) {
    const int stage = tile % STAGES;
    prim::barrier_wait(s.empty(stage), tile / STAGES % 2 ^ 1);
    prim::barrier_expect(s.full(stage), 2 * KEY_BYTES);
    for (int i = 0; i < PANELS; ++i) {
      const int at = stage * KEY_BYTES + i * KEY_PANEL;
      prim::copy_box(s.key + at, p.key, s.full(stage), 64 * i, tile * KEYS, 0, 0);
      prim::copy_box(s.value + at, p.value, s.full(stage), 64 * i, tile * KEYS, 0, 0);
    }
  }
}

DEV void consume(const Params& p, const Shared& s, int group) {
  const int lane = prim::thread() % 32;
  float out[COLS / 2], scores[KEYS / 2];
#pragma unroll
  for (int i = 0; i < COLS / 2; ++i) out[i] = 0;
  prim::barrier_wait(s.ready(), 0);
  for (int tile = 0; tile < p.tiles; ++tile) {
    const int stage = tile % STAGES;
    prim::barrier_wait(s.full(stage), tile / STAGES % 2);
    prim::products_fence();
#pragma unroll
    for (int k = 0; k < COLS; k += 16) {
      const uint32_t a = s.query + k / 64 * QUERY_PANEL + group * 64 * ROW_BYTES + k % 64 * 2;
      const uint32_t b = s.key + stage * KEY_BYTES + k / 64 * KEY_PANEL + k % 64 * 2;
      prim::multiply_async<false>(scores, prim::operand(a, 16, 1024), prim::operand(b, 16, 1024), k > 0, BF16);
    }
    prim::products_commit();
    prim::products_wait<0>();
    uint32_t weights[KEYS / 16][4];
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) weights[i / 4][i % 4] = prim::pack(scores[2 * i], scores[2 * i + 1], BF16);
    prim::products_fence();
#pragma unroll
    for (int k = 0; k < KEYS; k += 16) {
      const uint32_t b = s.value + stage * KEY_BYTES + k * ROW_BYTES;
      prim::multiply_async<true>(out, weights[k / 16], prim::operand(b, KEY_PANEL, 1024), true, BF16);
    }
    prim::products_commit();
    prim::products_wait<0>();
    if (lane == 0) prim::barrier_arrive(s.empty(stage));
  }

  // Nobody else reads these rows of the query: what was found takes their place.
  const int row = group * 64 + prim::thread() / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < COLS / 4; ++i) {
    const int r = row + i % 2 * 8, col = i / 2 * 8 + lane % 4 * 2;
    const uint32_t to = s.query + col / 64 * QUERY_PANEL + r * ROW_BYTES + ((col % 64 / 8 ^ r % 8) * 16) + col % 8 * 2;
    prim::store_shared(to, prim::pack(out[2 * i], out[2 * i + 1], BF16));
  }
  prim::fence_stores();
  prim::named_sync(1 + group, 128);
  if (prim::thread() % 128 == 0) {
    for (int i = 0; i < PANELS; ++i)
      prim::store_box(p.out, s.query + i * QUERY_PANEL + group * 64 * ROW_BYTES, 64 * i, 64 * group, 0, 0);
    prim::store_commit();
    prim::store_wait<0>();
  }
}

KERNEL_ALONE(hopper_probe, Params) {
  const Shared s;
  if (prim::thread() == 0) {
    prim::barrier_init(s.ready(), 1);
    for (int stage = 0; stage < STAGES; ++stage) {
      prim::barrier_init(s.full(stage), 1);
      prim::barrier_init(s.empty(stage), 4 * CONSUMERS);
    }
    prim::barrier_init_fence();
  }
  prim::sync();
  const int group = prim::thread() / 128 - 1;
  if (group < 0) {
    prim::give_registers<24>();
    if (prim::thread() == 0) produce(p, s);
  } else {
    prim::take_registers<240>();
    consume(p, s, group);
  }
}
