// The gradient of the query for sm_90a. A block owns BLOCK_M rows of one sample and head after the other, 64 for each
// of its consumers, and goes over the keys they see, as in the forward: every gradient has one owner, so there are no
// atomics. hopper.cuh has the roles.
//
//   tiles (pyattn/backends/cuda/kernels.py)         registers of a consumer for dQ, S, dP, dS
//     D    64   128 x 128, 2 consumers               32 + 64 + 64 + 32
//     D    96   128 x 128, 2 consumers               48 + 64 + 64 + 32
//     D   128   128 x  96, 2 consumers               64 + 48 + 48 + 24
//     D   192   128 x  64, 2 consumers               96 + 32 + 32 + 16
//     D   256   128 x  32, 2 consumers              128 + 16 + 16 +  8
//
//   shared memory  query [BLOCK_M, D], later dQ; grad_out [BLOCK_M, Dv]; three of key [BLOCK_N, D], two where there is
//   no
//                  room; two of value [BLOCK_N, Dv]
//
// S = Q K^T and dP = dO V^T of the next keys are begun before dQ += dS K of the last ones, under which dS is computed;
// dS never leaves its registers. Consumers give the tensor cores their products in turns.
#include "gradient.cuh"
#include "hopper.cuh"

constexpr int NT = BLOCK_N / 8, DT = BLOCK_D / 8;
using QueryTile = PanelTile<BLOCK_M, BLOCK_D>;
using GradTile = PanelTile<BLOCK_M, BLOCK_DV>;
using KeyTile = PanelTile<BLOCK_N, BLOCK_D>;
using ValueTile = PanelTile<BLOCK_N, BLOCK_DV>;
constexpr int ROWS_BYTES = QueryTile::BYTES + GradTile::BYTES, VALUE_STAGES = 2;
constexpr int LEAST_BYTES = ROWS_BYTES + 2 * KeyTile::BYTES + VALUE_STAGES * ValueTile::BYTES + BARRIERS_BYTES;
constexpr int KEY_STAGES = LEAST_BYTES + KeyTile::BYTES <= SHARED_LIMIT ? 3 : 2;
static_assert(BLOCK_M == 64 * CONSUMERS && BLOCK_N % 16 == 0, "tiles and warps");

struct alignas(64) MappedParams {
  prim::TensorMap query, key, value, grad_out;  // boxes of [1, 1, BLOCK_M or BLOCK_N, 64]
  Params params;
};

enum Kind { ROW, KEY, VALUE };

struct Shared {  // where what lies
  QueryTile query{prim::shared_base()};
  GradTile grad_out{query.base + QueryTile::BYTES};
  uint32_t keys = grad_out.base + GradTile::BYTES, values = keys + KEY_STAGES * KeyTile::BYTES;
  uint32_t barriers = values + VALUE_STAGES * ValueTile::BYTES;

  DEV KeyTile key(int stage) const { return {keys + stage * KeyTile::BYTES}; }
  DEV ValueTile value(int stage) const { return {values + stage * ValueTile::BYTES}; }
  DEV uint32_t landed() const { return barriers; }
  DEV uint32_t full(Kind kind, int stage) const { return barriers + 8 + 16 * (kind * KEY_STAGES + stage); }
  DEV uint32_t empty(Kind kind, int stage) const { return full(kind, stage) + 8; }

  DEV void init() const {
    prim::barrier_init(landed(), 1);
    for (const Kind kind : {ROW, KEY, VALUE})
      for (int stage = 0; stage < KEY_STAGES; ++stage) {
        prim::barrier_init(full(kind, stage), kind == ROW ? 2 : 1);
        prim::barrier_init(empty(kind, stage), CONSUMER_WARPS);
      }
  }
};

DEV void produce(const MappedParams& maps, const Shared& shared) {
  const Params& p = maps.params;
  const bool packed = p.cu_seqlens_q;
  Producer producer{shared.landed()};
  Ring<1> row_at;
  Ring<KEY_STAGES> key_at;
  Ring<VALUE_STAGES> value_at;
  for_items(p, false, [&](const Item& item) {
    const Sample& s = item.s;
    const int first_row = first_query_of(item), key_head = item.head / (p.Hq / p.Hkv), b = packed ? 0 : s.b;
    const Tiles tiles = key_tiles_of(item);
    prim::barrier_wait(shared.empty(ROW, 0), row_at.parity ^ 1);
    producer.copy(shared.query, maps.query, shared.full(ROW, 0), s.first_q + first_row, item.head, b);
    producer.copy(shared.grad_out, maps.grad_out, shared.full(ROW, 0), s.first_q + first_row, item.head, b);
    row_at.next();
    for (int first_key = tiles.begin; first_key < tiles.end; first_key += BLOCK_N) {
      const bool clean = only_keys_in_use(p, s, first_key);
      const int begin = s.start - first_key, end = s.length - first_key;
      prim::barrier_wait(shared.empty(KEY, key_at.stage), key_at.parity ^ 1);
      producer.copy(shared.key(key_at.stage), maps.key, shared.full(KEY, key_at.stage), s.first_k + first_key, key_head,
                    b, clean, begin, end);
      key_at.next();
      prim::barrier_wait(shared.empty(VALUE, value_at.stage), value_at.parity ^ 1);
      producer.copy(shared.value(value_at.stage), maps.value, shared.full(VALUE, value_at.stage), s.first_k + first_key,
                    key_head, b, clean, begin, end);
      value_at.next();
    }
  });
}

DEV void consume(const Params& p, const Shared& shared) {
  const int tile_row = consumer() * 64 + warp_row();
  const float unit = unit_of(p);
  Ring<1> row_at;
  Ring<KEY_STAGES> key_at, used_at;
  Ring<VALUE_STAGES> value_at;
  begin_turns();

  for_items(p, false, [&](const Item& item) {
    const Sample& s = item.s;
    const int first_row = first_query_of(item);
    const Tiles tiles = key_tiles_of(item);
    const float slope = slope_of(p, s.b, item.head);
    float lse[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + tile_row + fragment_row(0, 2 * half);
      const int64_t i = s.b * p.lse_b + item.head * p.lse_h + s.first_q + row;
      lse[half] = row < s.Lq ? lse_term(p.lse[i]) : INFINITY;
      delta[half] = row < s.Lq ? p.delta[i] : 0;
    }
    Fragment<1, DT> grad_query;
    Fragment<1, NT> scores, grad, derivative;  // the last of the softcap
    uint32_t packed[NT / 2][4];
    grad_query.fill(0);

    const auto begin = [&] {
      prim::barrier_wait(shared.full(KEY, key_at.stage), key_at.parity);
      prim::barrier_wait(shared.full(VALUE, value_at.stage), value_at.parity);
      begin_multiply_rows(scores, shared.query, consumer() * 64, shared.key(key_at.stage));
      begin_multiply_rows(grad, shared.grad_out, consumer() * 64, shared.value(value_at.stage));
      key_at.next();
    };
    // dS in the place of dP.
    const auto differentiate = [&](int first_key) {
      if (!folds() || MASK) {
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const Score score = score_of(p, s, scores.x[0][n][i], first_row + tile_row + fragment_row(0, i),
                                         first_key + fragment_col(n, i), first_key, item.head, slope);
            scores.x[0][n][i] = score.value;
            if (SOFTCAP) derivative.x[0][n][i] = score.derivative;
          }
      }
      if (tiles.needs_mask(first_key, BLOCK_N)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Range range = s.key_range(first_row + tile_row + fragment_row(0, 2 * half));
#pragma unroll
          for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
              const int k = first_key + fragment_col(n, i);
              if (k < range.lo || k >= range.hi) scores.x[0][n][i] = -INFINITY;
            }
        }
      }
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          grad.x[0][n][i] = weight_of(scores.x[0][n][i] * unit - lse[i / 2]) * (grad.x[0][n][i] - delta[i / 2]);
          if (SOFTCAP) grad.x[0][n][i] *= derivative.x[0][n][i];
        }
    };

    prim::barrier_wait(shared.full(ROW, 0), row_at.parity);
    if (tiles.begin < tiles.end) {
      take_turn();
      prim::products_fence(scores.x, grad.x);
      begin();
      pass_turn();
      prim::products_wait<0>(scores.x, grad.x);
      release(shared.empty(VALUE, value_at.stage));
      value_at.next();
      differentiate(tiles.begin);
      pack(packed, grad);
      for (int first_key = tiles.begin + BLOCK_N; first_key < tiles.end; first_key += BLOCK_N) {
        take_turn();
        prim::products_fence(scores.x, grad.x, packed, grad_query.x);
        begin();
        begin_multiply_add(grad_query, packed, shared.key(used_at.stage));
        pass_turn();
        prim::products_wait<1>(scores.x, grad.x);
        release(shared.empty(VALUE, value_at.stage));
        value_at.next();
        differentiate(first_key);
        prim::products_wait<0>(grad_query.x, packed);
        release(shared.empty(KEY, used_at.stage));
        used_at.next();
        pack(packed, grad);
      }
      prim::products_fence(packed, grad_query.x);
      begin_multiply_add(grad_query, packed, shared.key(used_at.stage));
      prim::products_wait<0>(grad_query.x);
      release(shared.empty(KEY, used_at.stage));
      used_at.next();
    }

    wait_for_consumer();  // no product reads these rows of the query any more
    const int row = first_row + tile_row;
    const float factors[2] = {p.grad_scale, p.grad_scale};
    shared.query.store(
        grad_query, factors, tile_row,
        p.grad_query + s.b * p.grad_query_b + item.head * p.grad_query_h + (s.first_q + row) * p.grad_query_l,
        p.grad_query_l, s.Lq - row, p.D);
    release(shared.empty(ROW, 0));
    row_at.next();
  });
}

KERNEL_ALONE(attention_bwd_dq_hopper, MappedParams) {
  const Shared shared;
  run_roles(shared, [&] { produce(p, shared); }, [&] { consume(p.params, shared); });
}
