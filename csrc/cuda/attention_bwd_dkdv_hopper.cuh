// The gradients of keys and values for sm_90a. A block owns BLOCK_N keys of one sample and key head after the other, 64
// for each of its consumers, and goes over the rows that see them, in each query head of the group: every gradient has
// one owner, so there are no atomics but where they are asked for. hopper.cuh has the roles.
//
//   tiles (pyattn/backends/cuda/kernels.py)         registers of a consumer for dK, dV, S, dP, P, dS
//     D    64   128 keys x 96 rows, 2 consumers      32 +  32 + 48 + 48 + 24 + 24
//     D    96   128 keys x 64 rows, 2 consumers      48 +  48 + 32 + 32 + 16 + 16
//     D   128   128 keys x 64 rows, 2 consumers      64 +  64 + 32 + 32 + 16 + 16
//     D   192   128 keys x 64 rows, 2 consumers      96 or 96 + 32 + 32 + 16 + 16: in two passes, see GRADIENTS
//     D   256   128 keys x 32 rows, 2 consumers     128 or 128 + 16 + 16 +  8 +  8
//     UNORDERED: 64 rows, and 32 more registers when those for S and dP are free; not at D 256
//
//   shared memory  key [BLOCK_N, D], later dK; value [BLOCK_N, Dv], later dV; three of query [BLOCK_M, D], grad_out
//                  [BLOCK_M, Dv], lse and delta, two where there is no room; with UNORDERED two of dS^T [BLOCK_N,
//                  BLOCK_M]
//
// Tiles are transposed: a consumer has its keys as the rows of S^T = K Q^T and dP^T = V dO^T, and so P^T and dS^T are
// left operands of dV += P^T dO and dK += dS^T Q as they are, in registers. Consumers give the tensor cores their
// products in turns.
//
//   time       tensor cores, early              a consumer             tensor cores, not early     a consumer
//    |         S2, dP2, dV += P1 dO, dK += ..   waits for S2, dP2      S2, dP2                     waits for S2
//    |         dV += P1 dO, dK += dS1 Q         P2, dS2                dP2                         P2
//    v         S3, dP3, dV += P2 dO, dK += ..   waits for S3, dP3      dV += P2 dO, dK += dS2 Q    dS2
//
// With UNORDERED the gradient of the query is summed here as well, in float and by atomics, in whatever order blocks
// come: five products instead of seven, and results whose last bits vary. dQ = dS K sums over the keys of all
// consumers, so dS^T goes through shared memory; a consumer then has 64 columns of dQ at a time.
#include "gradient.cuh"
#include "hopper.cuh"

// GRADIENTS: 1 of values, 2 of keys, 3 of both.
constexpr int MT = BLOCK_M / 8, DT = BLOCK_D / 8, DVT = BLOCK_DV / 8;
using KeyTile = PanelTile<BLOCK_N, BLOCK_D>;
using ValueTile = PanelTile<BLOCK_N, BLOCK_DV>;
using QueryTile = PanelTile<BLOCK_M, BLOCK_D>;
using GradTile = PanelTile<BLOCK_M, BLOCK_DV>;
using ScoresTile = PanelTile<BLOCK_N, BLOCK_M>;  // dS^T
static_assert(BLOCK_N == 64 * CONSUMERS && (UNORDERED ? BLOCK_M == 64 : BLOCK_M % 16 == 0), "tiles and warps");

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

  // A warp's, on their way: memory is slow.
  struct Fetched {
    float lse[(BLOCK_M + 31) / 32], delta[(BLOCK_M + 31) / 32];

    DEV Fetched(const Params& p, const Sample& s, int head, int first_row) {
      const int64_t begin = s.b * p.lse_b + head * p.lse_h + s.first_q + first_row;
#pragma unroll
      for (int i = 0; i < (BLOCK_M + 31) / 32; ++i) {
        const int row = i * 32 + lane();
        const bool exists = row < BLOCK_M && first_row + row < s.Lq;
        lse[i] = exists ? p.lse[begin + row] : 0, delta[i] = exists ? p.delta[begin + row] : 0;
      }
    }
  };

  DEV void store(const Fetched& terms) const {
#pragma unroll
    for (int i = 0; i < (BLOCK_M + 31) / 32; ++i) {
      const int row = i * 32 + lane();
      if (row >= BLOCK_M) break;
      prim::store_shared(base + row * 4, lse_term(terms.lse[i]));
      prim::store_shared(base + (BLOCK_M + row) * 4, terms.delta[i]);
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

constexpr int STAGE_BYTES = QueryTile::BYTES + GradTile::BYTES + Terms::BYTES;
constexpr int SCORES_BYTES = UNORDERED ? 2 * ScoresTile::BYTES : 0;
constexpr int LEAST_BYTES = KeyTile::BYTES + ValueTile::BYTES + 2 * STAGE_BYTES + SCORES_BYTES + BARRIERS_BYTES;
constexpr int STAGES = LEAST_BYTES + STAGE_BYTES <= SHARED_LIMIT ? 3 : 2;

enum Kind { ROW, KEY, SCORES };  // of a stage; of the tile of keys; of dS^T

struct Shared {  // where what lies
  KeyTile key{prim::shared_base()};
  ValueTile value{key.base + KeyTile::BYTES};
  uint32_t queries = value.base + ValueTile::BYTES, grads = queries + STAGES * QueryTile::BYTES;
  uint32_t all_scores = grads + STAGES * GradTile::BYTES, all_terms = all_scores + SCORES_BYTES;
  uint32_t barriers = all_terms + STAGES * Terms::BYTES;

  DEV QueryTile query(int stage) const { return {queries + stage * QueryTile::BYTES}; }
  DEV GradTile grad_out(int stage) const { return {grads + stage * GradTile::BYTES}; }
  DEV Terms terms(int stage) const { return {all_terms + stage * Terms::BYTES}; }
  DEV ScoresTile scores(int stage) const { return {all_scores + stage * ScoresTile::BYTES}; }
  DEV uint32_t landed() const { return barriers; }
  DEV uint32_t full(Kind kind, int stage) const { return barriers + 8 + 16 * (kind * STAGES + stage); }
  DEV uint32_t empty(Kind kind, int stage) const { return full(kind, stage) + 8; }

  DEV void init() const {
    prim::barrier_init(landed(), 1);
    for (const Kind kind : {ROW, KEY, SCORES})
      for (int stage = 0; stage < STAGES; ++stage) {
        // Query, grad_out, terms; key, value; the warps that have keys.
        prim::barrier_init(full(kind, stage), kind == ROW ? 3 : kind == KEY ? 2 : CONSUMER_WARPS);
        prim::barrier_init(empty(kind, stage), CONSUMER_WARPS);
      }
  }
};

// Goes over the tiles of rows that see an item's keys, in one query head of the group after the other.
struct RowTiles {
  int first_key, head, last_head;
  Tiles tiles;
  int first_row;

  DEV RowTiles(const Params& p, const Item& item)
      : first_key(item.tile * BLOCK_N),
        head(item.head * (p.Hq / p.Hkv)),
        last_head(head + p.Hq / p.Hkv),
        tiles(query_tiles(item.s, first_key)),
        first_row(tiles.begin) {}

  DEV bool any() const { return tiles.begin < tiles.end; }
  DEV bool next() {  // whether there is one
    first_row += BLOCK_M;
    if (first_row >= tiles.end) first_row = tiles.begin, ++head;
    return head < last_head;
  }
};

DEV void produce(const MappedParams& maps, const Shared& shared) {
  const Params& p = maps.params;
  const bool packed = p.cu_seqlens_q;
  Producer producer{shared.landed()};
  Ring<1> key_at;
  Ring<STAGES> at;
  for_items(p, true, [&](const Item& item) {
    const Sample& s = item.s;
    RowTiles rows(p, item);
    const int b = packed ? 0 : s.b;
    bool first = true;
    do {
      if (rows.any()) {
        const int last = s.Lq - rows.first_row, row = s.first_q + rows.first_row;
        const bool clean = !packed || BLOCK_M <= last;
        const uint32_t full = shared.full(ROW, at.stage);
        const Terms::Fetched terms(p, s, rows.head, rows.first_row);
        prim::barrier_wait(shared.empty(ROW, at.stage), at.parity ^ 1);
        producer.copy(shared.query(at.stage), maps.query, full, row, rows.head, b, clean, 0, last);
        producer.copy(shared.grad_out(at.stage), maps.grad_out, full, row, rows.head, b, clean, 0, last);
        shared.terms(at.stage).store(terms);
        if (lane() == 0) prim::barrier_arrive(full);
        at.next();
      }
      if (first) {  // the first rows before the keys, whose place gradients may still need
        const bool clean = only_keys_in_use(p, s, rows.first_key);
        const int begin = s.start - rows.first_key, end = s.length - rows.first_key, row = s.first_k + rows.first_key;
        prim::barrier_wait(shared.empty(KEY, 0), key_at.parity ^ 1);
        producer.copy(shared.key, maps.key, shared.full(KEY, 0), row, item.head, b, clean, begin, end);
        producer.copy(shared.value, maps.value, shared.full(KEY, 0), row, item.head, b, clean, begin, end);
        key_at.next();
        first = false;
      }
    } while (rows.any() && rows.next());
  });
}

// Whether the next scores are begun before the last gradients: there must be registers for both, and a stage more.
DEV bool early() {
  const int sums = (GRADIENTS & 2 ? BLOCK_D : 0) + (GRADIENTS & 1 ? BLOCK_DV : 0);
  return !UNORDERED && STAGES == 3 && (sums + 3 * BLOCK_M) / 2 <= 208;
}

// What a consumer has of a tile of rows: [keys, rows].
struct Scores {
  Fragment<1, MT> weight, grad, derivative;  // the last of the softcap
  uint32_t weights[MT / 2][4], grads[MT / 2][4];

  DEV void begin(const Shared& shared, int stage) {
    begin_multiply_rows(weight, shared.key, consumer() * 64, shared.query(stage));
    if (GRADIENTS & 2) begin_multiply_rows(grad, shared.value, consumer() * 64, shared.grad_out(stage));
  }

  // Scores become weights.
  DEV void weigh(const Params& p, const Sample& s, const RowTiles& rows, const Terms& terms, int first_key) {
    const float slope = slope_of(p, s.b, rows.head), unit = unit_of(p);
    if (!folds() || MASK) {
#pragma unroll
      for (int n = 0; n < MT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Score score = score_of(p, s, weight.x[0][n][e], rows.first_row + fragment_col(n, e),
                                       first_key + fragment_row(0, e), rows.first_key, rows.head, slope);
          weight.x[0][n][e] = score.value;
          if (SOFTCAP) derivative.x[0][n][e] = score.derivative;
        }
    }
    if (rows.tiles.needs_mask(rows.first_row, BLOCK_M)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Range range = s.row_range(first_key + fragment_row(0, 2 * half));
#pragma unroll
        for (int n = 0; n < MT; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            const int row = rows.first_row + fragment_col(n, e);
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
  }

  // dP becomes dS.
  DEV void differentiate(const Terms& terms) {
#pragma unroll
    for (int n = 0; n < MT; ++n) {
      const Pair delta = terms.delta(n);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        grad.x[0][n][e] = weight.x[0][n][e] * (grad.x[0][n][e] - delta.of[e % 2]);
        if (SOFTCAP) grad.x[0][n][e] *= derivative.x[0][n][e];
      }
    }
  }
};

// This warp's rows of dS^T, where all consumers find them.
DEV void share(const Scores& scores, const ScoresTile& to, uint32_t full) {
  const int row = consumer() * 64 + warp_row();
#pragma unroll
  for (int n = 0; n < MT; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      prim::store_shared(to.at(row + fragment_row(0, 2 * half), n) + lane() % 4 * 4,
                         scores.grads[n / 2][n % 2 * 2 + half]);
  prim::fence_stores();
  prim::sync_warp();
  release(full);
}

// dQ += dS K for a tile of rows, added to what other blocks found. Consumers have 64 columns in turns, which begin with
// another one each time.
DEV void add_grad_query(const Params& p, const Sample& s, const RowTiles& rows, const Shared& shared, int stage) {
#pragma unroll
  for (int i = 0; i < KeyTile::PANELS; i += CONSUMERS) {
    const int panel = i + (consumer() + stage) % CONSUMERS;
    if (panel >= KeyTile::PANELS) break;
    Fragment<1, 8> sum;
    sum.fill(0);
    prim::products_fence(sum.x);
#pragma unroll
    for (int k = 0; k < BLOCK_N; k += 16)
      prim::multiply_async<true, true>(sums_of(sum), shared.scores(stage).rows(k), shared.key.rows(k, panel), k > 0,
                                       BF16);
    prim::products_commit();
    prim::products_wait<0>(sum.x);
    // Of two threads beside each other one has four columns of eight, the other four of the next eight.
    const bool odd = lane() % 2;
    const int row = rows.first_row + warp_row(), col = panel * 64 + odd * 8 + lane() % 4 / 2 * 4;
    float* const to = p.query_sums + (s.b * p.lse_b + rows.head * p.lse_h + s.first_q + row) * p.D + col;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = fragment_row(0, 2 * half);
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        float mine[2], other[2], four[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float first = sum.x[0][n][2 * half + i] * p.grad_scale;
          const float second = sum.x[0][n + 1][2 * half + i] * p.grad_scale;
          mine[i] = odd ? second : first;
          other[i] = prim::shuffle_xor(odd ? first : second, 1);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) four[i] = odd ? other[i] : mine[i], four[2 + i] = odd ? mine[i] : other[i];
        if (row + r < s.Lq && col + n * 8 < p.D) prim::atomic_add(to + r * p.D + n * 8, four);
      }
    }
  }
}

DEV void consume(const Params& p, const Shared& shared) {
  const int tile_row = consumer() * 64 + warp_row();
  Ring<1> key_at;
  Ring<STAGES> at, used_at;
  Ring<2> scores_at;
  begin_turns();

  for_items(p, true, [&](const Item& item) {
    const Sample& s = item.s;
    RowTiles rows(p, item);
    const int first_key = rows.first_key + tile_row;
    Fragment<1, DT> grad_key;
    Fragment<1, DVT> grad_value;
    Scores scores;
    grad_key.fill(0), grad_value.fill(0);
    const auto begin_gradients = [&](int stage) {
      if (GRADIENTS & 1) begin_multiply_add(grad_value, scores.weights, shared.grad_out(stage));
      if (GRADIENTS & 2) begin_multiply_add(grad_key, scores.grads, shared.query(stage));
    };

    prim::barrier_wait(shared.full(KEY, 0), key_at.parity);
    if (rows.any() && early()) {
      prim::barrier_wait(shared.full(ROW, at.stage), at.parity);
      take_turn();
      prim::products_fence(scores.weight.x, scores.grad.x);
      scores.begin(shared, at.stage);
      pass_turn();
      prim::products_wait<0>(scores.weight.x, scores.grad.x);
      scores.weigh(p, s, rows, shared.terms(at.stage), first_key);
      if (GRADIENTS & 2) scores.differentiate(shared.terms(at.stage));
      pack(scores.weights, scores.weight);
      pack(scores.grads, scores.grad);
      at.next();
      while (rows.next()) {
        prim::barrier_wait(shared.full(ROW, at.stage), at.parity);
        take_turn();
        prim::products_fence(scores.weight.x, scores.grad.x, scores.weights, scores.grads, grad_key.x, grad_value.x);
        scores.begin(shared, at.stage);
        begin_gradients(used_at.stage);
        pass_turn();
        if (GRADIENTS == 3)
          prim::products_wait<2>(scores.weight.x, scores.grad.x);
        else
          prim::products_wait<1>(scores.weight.x, scores.grad.x);
        scores.weigh(p, s, rows, shared.terms(at.stage), first_key);
        if (GRADIENTS & 2) scores.differentiate(shared.terms(at.stage));
        prim::products_wait<0>(scores.weights, scores.grads, grad_key.x, grad_value.x);
        release(shared.empty(ROW, used_at.stage));
        used_at.next(), at.next();
        pack(scores.weights, scores.weight);
        pack(scores.grads, scores.grad);
      }
      prim::products_fence(scores.weights, scores.grads, grad_key.x, grad_value.x);
      begin_gradients(used_at.stage);
      prim::products_wait<0>(grad_key.x, grad_value.x);
      release(shared.empty(ROW, used_at.stage));
      used_at.next();
    } else if (rows.any()) {
      do {
        prim::barrier_wait(shared.full(ROW, at.stage), at.parity);
        const Terms terms = shared.terms(at.stage);
        take_turn();
        prim::products_fence(scores.weight.x, scores.grad.x, grad_key.x, grad_value.x);
        scores.begin(shared, at.stage);
        pass_turn();
        if (GRADIENTS & 2)
          prim::products_wait<1>(scores.weight.x);
        else
          prim::products_wait<0>(scores.weight.x);
        scores.weigh(p, s, rows, terms, first_key);
        pack(scores.weights, scores.weight);
        prim::products_fence(scores.weights, scores.grads);
        if (GRADIENTS & 1) begin_multiply_add(grad_value, scores.weights, shared.grad_out(at.stage));
        if (GRADIENTS & 2) {
          if (GRADIENTS & 1)
            prim::products_wait<1>(scores.grad.x);
          else
            prim::products_wait<0>(scores.grad.x);
          scores.differentiate(terms);
          pack(scores.grads, scores.grad);
          if (UNORDERED) share(scores, shared.scores(scores_at.stage), shared.full(SCORES, scores_at.stage));
          prim::products_fence(scores.grads);
          begin_multiply_add(grad_key, scores.grads, shared.query(at.stage));
        }
        if (UNORDERED) {
          // Who has these of the next tile has had those of the last: two are enough.
          prim::barrier_wait(shared.full(SCORES, scores_at.stage), scores_at.parity);
          add_grad_query(p, s, rows, shared, scores_at.stage);
          scores_at.next();
        }
        prim::products_wait<0>(scores.weights, scores.grads, grad_key.x, grad_value.x);
        release(shared.empty(ROW, at.stage));
        at.next();
      } while (rows.next());
    }

    // No product reads these keys and values any more.
    if (UNORDERED)
      wait_for_consumers();
    else
      wait_for_consumer();
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
  run_roles(shared, [&] { produce(p, shared); }, [&] { consume(p.params, shared); });
}
