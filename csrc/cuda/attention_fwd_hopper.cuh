// The forward for sm_90a: what moves data, what multiplies and what takes exponentials work at the same time
// (FlashAttention-3, Shah et al. 2024, arXiv:2407.08608).
//
// A block owns BLOCK_M rows of one sample and head after the other, 64 for each of its consumers, and goes over the
// keys they see. Few queries of several heads that share their keys are rows of one tile (ROWS), and where these are
// still few, a block has a part of the keys and leaves a partial result, as those of attention_fwd.cuh do. hopper.cuh
// has the roles.
//
//   tiles (pyattn/backends/cuda/kernels.py)         registers of a consumer for out, scores, weights
//     D    64   192 x 128, 3 consumers               32 + 64 + 32
//     D    96   192 x  96, 3 consumers               48 + 48 + 24
//     D   128   128 x 176, 2 consumers               64 + 88 + 44
//     D   192   128 x 112, 2 consumers               96 + 56 + 28
//     D   256   128 x  80, 2 consumers              128 + 40 + 20
//
//   shared memory  query [BLOCK_M, D], later out: two where there is room; two of key [BLOCK_N, D], value [BLOCK_N, Dv]
//
//   time       tensor cores                         consumer 0               consumer 1
//    |         0: S1 = Q K1^T, O += P0 V0           waits for S1             softmax of S1
//    |         1: S2 = Q K2^T, O += P1 V1           softmax of S1            waits for S2
//    v         0: S2 = Q K2^T, O += P1 V1           ...                      softmax of S2
//
// Scores of the next tile are multiplied before the values of the last one, so that a softmax runs under products of
// its own, too. Consumers give the tensor cores their products in turns.
#include "hopper.cuh"

constexpr int NT = BLOCK_N / 8, DT = BLOCK_DV / 8, STAGES = 2;
using QueryTile = PanelTile<BLOCK_M, BLOCK_D>;
using KeyTile = PanelTile<BLOCK_N, BLOCK_D>;
using ValueTile = PanelTile<BLOCK_N, BLOCK_DV>;
using OutTile = PanelTile<BLOCK_M, BLOCK_DV>;
constexpr int QUERY_BYTES = QueryTile::BYTES > OutTile::BYTES ? QueryTile::BYTES : OutTile::BYTES;
constexpr int KEYS_BYTES = STAGES * (KeyTile::BYTES + ValueTile::BYTES);
// Room for the next query lets a block begin the next tile while it writes the last.
constexpr int QUERY_STAGES = 2 * QUERY_BYTES + KEYS_BYTES + BARRIERS_BYTES <= SHARED_LIMIT ? 2 : 1;
static_assert(BLOCK_M == 64 * CONSUMERS && BLOCK_N % 16 == 0, "tiles and warps");

struct alignas(64) MappedParams {
  prim::TensorMap query;       // [B, L, H, D], boxes of [1, BLOCK_M / ROWS, ROWS, 64]
  prim::TensorMap key, value;  // [B, H, L, D], boxes of [1, 1, BLOCK_N, 64]
  Params params;
};

enum Kind { QUERY, KEY, VALUE };

struct Shared {  // where what lies
  uint32_t queries = prim::shared_base(), keys = queries + QUERY_STAGES * QUERY_BYTES;
  uint32_t values = keys + STAGES * KeyTile::BYTES, barriers = values + STAGES * ValueTile::BYTES;

  DEV QueryTile query(int stage) const { return {queries + stage * QUERY_BYTES}; }
  DEV OutTile out(int stage) const { return {queries + stage * QUERY_BYTES}; }
  DEV KeyTile key(int stage) const { return {keys + stage * KeyTile::BYTES}; }
  DEV ValueTile value(int stage) const { return {values + stage * ValueTile::BYTES}; }
  DEV uint32_t landed() const { return barriers; }  // values that are to be scrubbed
  DEV uint32_t full(Kind kind, int stage) const { return barriers + 8 + 16 * (kind * STAGES + stage); }
  DEV uint32_t empty(Kind kind, int stage) const { return full(kind, stage) + 8; }

  DEV void init() const {
    prim::barrier_init(landed(), 1);
    for (const Kind kind : {QUERY, KEY, VALUE})
      for (int stage = 0; stage < STAGES; ++stage) {
        prim::barrier_init(full(kind, stage), 1);
        prim::barrier_init(empty(kind, stage), CONSUMER_WARPS);
      }
  }
};

// Of an item: its heads, and its part of the keys, in whole tiles. Parts count as heads: those of the first come first.
struct Part {
  int first_head, split;
  Tiles tiles;

  DEV Part(const Params& p, const Item& item) : tiles(key_tiles_of(item)) {
    const int heads = p.Hq / ROWS;
    split = item.head / heads, first_head = (item.head - split * heads) * ROWS;
    if (!p.partial_out) return;
    tiles.begin = larger(tiles.begin, split * p.split);
    tiles.end = smaller(tiles.end, (split + 1) * p.split);
  }
};

DEV void produce(const MappedParams& maps, const Shared& shared) {
  const Params& p = maps.params;
  const bool packed = p.cu_seqlens_q;
  Producer producer{shared.landed()};
  Ring<STAGES> at;
  Ring<QUERY_STAGES> query_at;
  for_items(p, false, [&](const Item& item) {
    const Sample& s = item.s;
    const int first_query = s.first_q + first_query_of(item), b = packed ? 0 : s.b;
    const Part part(p, item);
    const Tiles& tiles = part.tiles;
    const int key_head = part.first_head / (p.Hq / p.Hkv);
    int first_key = tiles.begin;
    // The first keys before the query, whose place an output may still need.
    do {
      const bool any = first_key < tiles.end;
      if (any) {
        prim::barrier_wait(shared.empty(KEY, at.stage), at.parity ^ 1);
        producer.copy(shared.key(at.stage), maps.key, shared.full(KEY, at.stage), s.first_k + first_key, key_head, b);
      }
      if (first_key == tiles.begin) {
        prim::barrier_wait(shared.empty(QUERY, query_at.stage), query_at.parity ^ 1);
        producer.copy(shared.query(query_at.stage), maps.query, shared.full(QUERY, query_at.stage), part.first_head,
                      first_query, b);
        query_at.next();
      }
      if (any) {
        prim::barrier_wait(shared.empty(VALUE, at.stage), at.parity ^ 1);
        producer.copy(shared.value(at.stage), maps.value, shared.full(VALUE, at.stage), s.first_k + first_key, key_head,
                      b, only_keys_in_use(p, s, first_key), s.start - first_key, s.length - first_key);
        at.next();
      }
      first_key += BLOCK_N;
    } while (first_key < tiles.end);
  });
}

// Of one row of a thread's two, what a part of the keys gives.
DEV void store_partial(const Params& p, const Fragment<1, DT>& out, float norm, int half, int64_t i_row, float lse) {
  if (lane() % 4 == 0) p.partial_lse[i_row] = lse;
  float* to = p.partial_out + i_row * p.Dv;
#pragma unroll
  for (int d = 0; d < DT; ++d) {
    const int col = fragment_col(d, 0);  // Dv is even
    if (col < p.Dv) to[col] = out.x[0][d][2 * half] * norm, to[col + 1] = out.x[0][d][2 * half + 1] * norm;
  }
}

DEV void consume(const Params& p, const Shared& shared) {
  const int tile_row = consumer() * 64 + warp_row();
  const float unit = unit_of(p);
  Ring<STAGES> key_at, value_at;
  Ring<QUERY_STAGES> query_at;
  begin_turns();

  for_items(p, false, [&](const Item& item) {
    const Sample& s = item.s;
    const Part part(p, item);
    const Tiles& tiles = part.tiles;
    const int first_query = first_query_of(item), first_head = part.first_head;
    Rows<1> rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = tile_row + fragment_row(0, 2 * half);
      rows.begin(p, s, 0, half, first_query + r / ROWS, first_head + r % ROWS, !p.partial_out);
    }
    Fragment<1, DT> out;
    Fragment<1, NT> scores;
    uint32_t weights[NT / 2][4];
    float shrink[1][2];
    out.fill(0);

    const QueryTile query = shared.query(query_at.stage);
    prim::barrier_wait(shared.full(QUERY, query_at.stage), query_at.parity);
    if (tiles.begin < tiles.end) {
      prim::barrier_wait(shared.full(KEY, key_at.stage), key_at.parity);
      take_turn();
      prim::products_fence(scores.x);
      begin_multiply_rows(scores, query, consumer() * 64, shared.key(key_at.stage));
      pass_turn();
      prim::products_wait<0>(scores.x);
      release(shared.empty(KEY, key_at.stage));
      key_at.next();
      finish_scores(scores, p, s, tiles, rows, tiles.begin, tiles.begin);
      online_softmax_step(scores, rows, unit, shrink);
      pack(weights, scores);
      for (int first_key = tiles.begin + BLOCK_N; first_key < tiles.end; first_key += BLOCK_N) {
        prim::barrier_wait(shared.full(KEY, key_at.stage), key_at.parity);
        take_turn();
        prim::products_fence(scores.x, weights, out.x);
        begin_multiply_rows(scores, query, consumer() * 64, shared.key(key_at.stage));
        prim::barrier_wait(shared.full(VALUE, value_at.stage), value_at.parity);
        begin_multiply_add(out, weights, shared.value(value_at.stage));
        pass_turn();
        prim::products_wait<1>(scores.x);
        release(shared.empty(KEY, key_at.stage));
        key_at.next();
        finish_scores(scores, p, s, tiles, rows, first_key, first_key);
        online_softmax_step(scores, rows, unit, shrink);
        prim::products_wait<0>(out.x, weights);
        release(shared.empty(VALUE, value_at.stage));
        value_at.next();
        pack(weights, scores);
        rescale(out, shrink);
      }
      prim::barrier_wait(shared.full(VALUE, value_at.stage), value_at.parity);
      prim::products_fence(weights, out.x);
      begin_multiply_add(out, weights, shared.value(value_at.stage));
      prim::products_wait<0>(out.x);
      release(shared.empty(VALUE, value_at.stage));
      value_at.next();
    }

    float norm[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = rows.total(0, half);
      norm[half] = sum == 0 ? 1 : prim::reciprocal(sum);
      const int row = rows.row[0][half];
      if (row >= s.Lq) continue;
      const int64_t i_row = s.b * p.lse_b + rows.head[0][half] * p.lse_h + s.first_q + row;
      const float lse = (rows.max[0][half] + prim::log2(sum)) * LN2;
      if (p.partial_out)
        store_partial(p, out, norm[half], half, part.split * p.num_rows + i_row, lse);
      else if (lane() % 4 == 0)
        p.lse[i_row] = lse;
    }
    wait_for_consumer();  // no product reads these rows of the query any more
    if (!p.partial_out)
      shared.out(query_at.stage).store(out, norm, tile_row, [&](int r, int col, const prim::Words& words) {
        r += tile_row;
        const int row = first_query + r / ROWS, head = first_head + r % ROWS;
        uint16_t* to = p.out + s.b * p.out_b + head * p.out_h + (s.first_q + row) * p.out_l;
        if (row < s.Lq && col < p.Dv) prim::store_global(to + col, words);
      });
    release(shared.empty(QUERY, query_at.stage));
    query_at.next();
  });
}

KERNEL_ALONE(attention_fwd_hopper, MappedParams) {
  const Shared shared;
  run_roles(shared, [&] { produce(p, shared); }, [&] { consume(p.params, shared); });
}
