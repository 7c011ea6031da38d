// The gradients of keys and values for sm_90a. A block owns BLOCK_N keys of one sample and key head after the other, 64
// for each of its consumers, and goes over the rows that see them, in each query head of the group: every gradient has
// one owner, so there are no atomics. hopper.cuh has the roles.
//
//   tiles (pyattn/backends/cuda/kernels.py)         registers of a consumer for dK, dV, S, dP, P, dS
//     D    64   128 keys x 96 rows, 2 consumers      32 +  32 + 48 + 48 + 24 + 24
//     D    96   128 keys x 64 rows, 2 consumers      48 +  48 + 32 + 32 + 16 + 16
//     D   128   128 keys x 64 rows, 2 consumers      64 +  64 + 32 + 32 + 16 + 16
//     D   192   128 keys x 48 rows, 2 consumers      96 or 96 + 24 + 24 + 12 + 12: in two passes, see GRADIENTS
//     D   256   128 keys x 32 rows, 2 consumers     128 or 128 + 16 + 16 + 8 + 8
//
//   shared memory  key [BLOCK_N, D], later dK; value [BLOCK_N, Dv], later dV; two of query [BLOCK_M, D], grad_out
//                  [BLOCK_M, Dv], lse and delta
//
// Tiles are transposed: a consumer has its keys as the rows of S^T = K Q^T and dP^T = V dO^T, and so P^T and dS^T are
// left operands of dV += P^T dO and dK += dS^T Q as they are, in registers.
//
//   time       tensor cores                   a consumer
//    |         S1, dP1                        waits for S1
//    |         dP1                            P1 = exp(S1 - lse)
//    |         dV += P1 dO                    dS1 = P1 (dP1 - delta)
//    v         dK += dS1 Q, S2, dP2           waits for S2
#include "gradient.cuh"
#include "hopper.cuh"

// GRADIENTS: 1 of values, 2 of keys, 3 of both.
constexpr int MT = BLOCK_M / 8, DT = BLOCK_D / 8, DVT = BLOCK_DV / 8, STAGES = 2;
using KeyTile = PanelTile<BLOCK_N, BLOCK_D>;
using ValueTile = PanelTile<BLOCK_N, BLOCK_DV>;
using QueryTile = PanelTile<BLOCK_M, BLOCK_D>;
using GradTile = PanelTile<BLOCK_M, BLOCK_DV>;
static_assert(BLOCK_N == 64 * CONSUMERS && BLOCK_M % 16 == 0, "tiles and warps");

struct alignas(64) MappedParams {
  prim::TensorMap query, key, value, grad_out;  // boxes of [1, 1, BLOCK_M or BLOCK_N, 64]
  Params params;
};

struct Pair {
  float of[2];
};

// lse times log2(e), and delta, of a tile's rows; 0 past the last one, where query and grad_out are 0, too.
struct Terms {
  static constexpr int BYTES = 2 * BLOCK_M * 4;
  uint32_t base;

  DEV void store(const Params& p, const Sample& s, int head, int first_row) const {
    const int64_t begin = s.b * p.lse_b + head * p.lse_h + s.first_q + first_row;
    for (int i = lane(); i < BLOCK_M; i += 32) {
      const bool exists = first_row + i < s.Lq;
      prim::store_shared(base + i * 4, exists ? lse_term(p.lse[begin + i]) : 0);
      prim::store_shared(base + (BLOCK_M + i) * 4, exists ? p.delta[begin + i] : 0);
    }
    prim::sync_warp();
  }

  // Of this thread's two rows of the n-th eight.
  DEV Pair lse(int n) const { return load(base + fragment_col(n, 0) * 4); }
  DEV Pair delta(int n) const { return load(base + (BLOCK_M + fragment_col(n, 0)) * 4); }
  DEV static Pair load(uint32_t from) {
    Pair pair;
    prim::load_shared(from, pair.of);
    return pair;
  }
};

enum Kind { ROW, KEY };  // a tile of rows, of which there are two, and that of keys

struct Shared {  // where what lies
  KeyTile key{prim::shared_base()};
  ValueTile value{key.base + KeyTile::BYTES};
  uint32_t queries = value.base + ValueTile::BYTES, grads = queries + STAGES * QueryTile::BYTES;
  uint32_t all_terms = grads + STAGES * GradTile::BYTES, barriers = all_terms + STAGES * Terms::BYTES;

  DEV QueryTile query(int stage) const { return {queries + stage * QueryTile::BYTES}; }
  DEV GradTile grad_out(int stage) const { return {grads + stage * GradTile::BYTES}; }
  DEV Terms terms(int stage) const { return {all_terms + stage * Terms::BYTES}; }
  DEV uint32_t landed() const { return barriers; }
  DEV uint32_t full(Kind kind, int stage) const { return barriers + 8 + 16 * (kind * STAGES + stage); }
  DEV uint32_t empty(Kind kind, int stage) const { return full(kind, stage) + 8; }

  DEV void init() const {
    prim::barrier_init(landed(), 1);
    for (const Kind kind : {ROW, KEY})
      for (int stage = 0; stage < STAGES; ++stage) {
        prim::barrier_init(full(kind, stage), kind == ROW ? 3 : 2);  // query, grad_out, terms; key, value
        prim::barrier_init(empty(kind, stage), CONSUMER_WARPS);
      }
    prim::barrier_init_fence();
  }
};

// The tiles of rows that see an item's keys, in one query head after the other.
struct RowTiles {
  int first_key, group;
  Tiles tiles;
  int per_head, count;

  DEV RowTiles(const Params& p, const Item& item)
      : first_key(item.tile * BLOCK_N),
        group(p.Hq / p.Hkv),
        tiles(query_tiles(item.s, first_key)),
        per_head(tiles.begin < tiles.end ? (tiles.end - tiles.begin + BLOCK_M - 1) / BLOCK_M : 0),
        count(per_head * group) {}

  DEV int head(const Item& item, int i) const { return item.head * group + i / per_head; }
  DEV int first_row(int i) const { return tiles.begin + i % per_head * BLOCK_M; }
};

DEV void produce(const MappedParams& maps, const Shared& shared) {
  const Params& p = maps.params;
  const bool packed = p.cu_seqlens_q;
  Producer producer{shared.landed()};
  Ring<1> key_at;
  Ring<STAGES> at;
  for_items(p, true, [&](const Item& item) {
    const Sample& s = item.s;
    const RowTiles rows(p, item);
    const int b = packed ? 0 : s.b;
    int i = 0;
    // The first rows before the keys, whose place gradients may still need.
    do {
      if (i < rows.count) {
        const int head = rows.head(item, i), first_row = rows.first_row(i), last = s.Lq - first_row;
        const bool clean = !packed || BLOCK_M <= last;
        const uint32_t full = shared.full(ROW, at.stage);
        prim::barrier_wait(shared.empty(ROW, at.stage), at.parity ^ 1);
        producer.copy(shared.query(at.stage), maps.query, full, s.first_q + first_row, head, b, clean, 0, last);
        producer.copy(shared.grad_out(at.stage), maps.grad_out, full, s.first_q + first_row, head, b, clean, 0, last);
        shared.terms(at.stage).store(p, s, head, first_row);
        if (lane() == 0) prim::barrier_arrive(full);
        at.next();
      }
      if (i == 0) {
        const bool clean = only_keys_in_use(p, s, rows.first_key);
        const int begin = s.start - rows.first_key, end = s.length - rows.first_key, row = s.first_k + rows.first_key;
        prim::barrier_wait(shared.empty(KEY, 0), key_at.parity ^ 1);
        producer.copy(shared.key, maps.key, shared.full(KEY, 0), row, item.head, b, clean, begin, end);
        producer.copy(shared.value, maps.value, shared.full(KEY, 0), row, item.head, b, clean, begin, end);
        key_at.next();
      }
    } while (++i < rows.count);
  });
}

// Whether the next scores are begun before the last gradients are there: both take registers.
DEV bool early() {
  return ((GRADIENTS & 2 ? BLOCK_D : 0) + (GRADIENTS & 1 ? BLOCK_DV : 0) + BLOCK_M * 3) / 2 <= 208;
}

constexpr int TOGETHER = 1;  // named barriers, one for each consumer

DEV void consume(const Params& p, const Shared& shared) {
  const int tile_row = consumer() * 64 + warp_row();
  const float unit = unit_of(p);
  Ring<1> key_at;
  Ring<STAGES> at;

  for_items(p, true, [&](const Item& item) {
    const Sample& s = item.s;
    const RowTiles rows(p, item);
    const int first_key = rows.first_key + tile_row;
    Fragment<1, DT> grad_key;
    Fragment<1, DVT> grad_value;
    Fragment<1, MT> weight, grad, derivative;  // [keys, rows]; the last of the softcap
    uint32_t weights[MT / 2][4], grads[MT / 2][4];
    grad_key.fill(0), grad_value.fill(0);

    prim::barrier_wait(shared.full(KEY, 0), key_at.parity);
    for (int i = 0; i < rows.count; ++i) {
      prim::barrier_wait(shared.full(ROW, at.stage), at.parity);
      const QueryTile query = shared.query(at.stage);
      const GradTile grad_out = shared.grad_out(at.stage);
      const Terms terms = shared.terms(at.stage);
      prim::products_fence(weight.x, grad.x, grad_key.x, grad_value.x);
      begin_multiply_rows(weight, shared.key, consumer() * 64, query);
      if (GRADIENTS & 2) begin_multiply_rows(grad, shared.value, consumer() * 64, grad_out);
      // Scores are there, and what was begun for the last rows.
      if (GRADIENTS & 2)
        prim::products_wait<1>(weight.x, weights, grads);
      else
        prim::products_wait<0>(weight.x, weights);
      if (i) release(shared.empty(ROW, at.stage ^ 1));
      const int head = rows.head(item, i), first_row = rows.first_row(i);
      const float slope = slope_of(p, s.b, head);
      if (!folds() || MASK) {
#pragma unroll
        for (int n = 0; n < MT; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const Score score = score_of(p, s, weight.x[0][n][e], first_row + fragment_col(n, e),
                                         first_key + fragment_row(0, e), rows.first_key, head, slope);
            weight.x[0][n][e] = score.value;
            if (SOFTCAP) derivative.x[0][n][e] = score.derivative;
          }
      }
      if (rows.tiles.needs_mask(first_row, BLOCK_M)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Range range = s.row_range(first_key + fragment_row(0, 2 * half));
#pragma unroll
          for (int n = 0; n < MT; ++n)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
              const int row = first_row + fragment_col(n, e);
              if (row < range.lo || row >= range.hi) weight.x[0][n][e] = -INFINITY;
            }
        }
      }
#pragma unroll
      for (int n = 0; n < MT; ++n) {
        const Pair lse = terms.lse(n);
#pragma unroll
        for (int e = 0; e < 4; ++e) weight.x[0][n][e] = weight_of(weight.x[0][n][e] * unit - lse.of[e % 2]);
      }
      pack(weights, weight);
      prim::products_fence(weights, grads);
      if (GRADIENTS & 1) begin_multiply_add(grad_value, weights, grad_out);
      if (GRADIENTS & 2) {
        if (GRADIENTS & 1)
          prim::products_wait<1>(grad.x);
        else
          prim::products_wait<0>(grad.x);
#pragma unroll
        for (int n = 0; n < MT; ++n) {
          const Pair delta = terms.delta(n);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            grad.x[0][n][e] = weight.x[0][n][e] * (grad.x[0][n][e] - delta.of[e % 2]);
            if (SOFTCAP) grad.x[0][n][e] *= derivative.x[0][n][e];
          }
        }
        pack(grads, grad);
        prim::products_fence(grads);
        begin_multiply_add(grad_key, grads, query);
      }
      if (!early()) prim::products_wait<0>(weights, grads);
      at.next();
    }
    prim::products_wait<0>(grad_key.x, grad_value.x);
    if (rows.count) release(shared.empty(ROW, at.stage ^ 1));

    prim::named_sync(TOGETHER + consumer(), 128);  // no product reads these keys and values any more
    const int64_t to_key = s.b * p.grad_key_b + item.head * p.grad_key_h + (s.first_k + first_key) * p.grad_key_l;
    const int64_t to_value =
        s.b * p.grad_value_b + item.head * p.grad_value_h + (s.first_k + first_key) * p.grad_value_l;
    const float of_key[2] = {p.grad_scale, p.grad_scale}, of_value[2] = {1, 1};
    if (GRADIENTS & 1)
      shared.value.store(grad_value, of_value, tile_row, p.grad_value + to_value, p.grad_value_l, s.Lk - first_key,
                         p.Dv);
    if (GRADIENTS & 2)
      shared.key.store(grad_key, of_key, tile_row, p.grad_key + to_key, p.grad_key_l, s.Lk - first_key, p.D);
    release(shared.empty(KEY, 0));
    key_at.next();
  });
}

KERNEL_ALONE(attention_bwd_dkdv_hopper, MappedParams) {
  const Shared shared;
  if (prim::thread() == 0) shared.init();
  prim::sync();
  if (prim::thread() < 128) {
    prim::give_registers<PRODUCER_REGISTERS>();
    if (prim::thread() < 32) produce(p, shared);
  } else {
    prim::take_registers<CONSUMER_REGISTERS>();
    consume(p.params, shared);
  }
}
