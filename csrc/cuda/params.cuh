// What a kernel is given at run time. pyattn/backends/cuda/launch.py reads the fields from this file, one a line, and
// fills them by name: 8-byte ones come first, so nothing is padded between them. Strides are in elements; a pointer may
// be null where "or null" stands. What is fixed when a kernel is compiled stands at the head of tile.cuh.
#pragma once
#include "prim.cuh"

struct Params {
  const uint16_t* query;        // [B, Hq, Lq, D]; packed [total_q, Hq, D], query_b = 0
  const uint16_t* key;          // [B, Hkv, Lk, D]; packed [total_k, Hkv, D]; pages [num_pages, Hkv, page_size, D]
  const uint16_t* value;        // as key, with Dv
  uint16_t* out;                // as query, with Dv
  float* lse;                   // [B, Hq, Lq]; packed [Hq, total_q]
  float* partial_out;           // [num_splits, *lse.shape, Dv], or null: the keys are not split
  float* partial_lse;           // [num_splits, *lse.shape]
  const void* mask;             // [B, Hq, Lq, Lk] through its strides (0 broadcasts); type MASK
  const float* alibi_slopes;    // [Hq] or [B, Hq]
  const void* sinks;            // [Hq] of sinks_type, or null
  const void* q_offsets;        // [B], or null: q_offset, or length - Lq where bottom_right
  const void* kv_lengths;       // [B], or null: Lk
  const void* kv_starts;        // [B], or null: 0
  const int32_t* block_table;   // [B, max_pages], where PAGE_SIZE
  const int32_t* cu_seqlens_q;  // [B + 1], or null: not packed
  const int32_t* cu_seqlens_k;  // [B + 1], or null: not packed
  const uint64_t* seed;         // of dropout, where DROPOUT
  const uint16_t* grad_out;     // as out
  const float* grad_lse;        // as lse, or null
  float* delta;                 // as lse
  uint16_t* grad_query;         // as query
  uint16_t* grad_key;           // as key
  uint16_t* grad_value;         // as value
  float* query_sums;            // [*lse.shape, D], where UNORDERED: zeros, to which the gradient of the query is added
  void* grad_mask;              // of the mask's own sizes, dense
  int64_t query_b;
  int64_t query_h;
  int64_t query_l;
  int64_t key_b;  // from page to page, where PAGE_SIZE
  int64_t key_h;
  int64_t key_l;
  int64_t value_b;
  int64_t value_h;
  int64_t value_l;
  int64_t out_b;
  int64_t out_h;
  int64_t out_l;
  int64_t lse_b;
  int64_t lse_h;
  int64_t mask_b;
  int64_t mask_h;
  int64_t mask_q;
  int64_t mask_k;
  int64_t alibi_b;
  int64_t table_b;
  int64_t table_p;
  int64_t grad_out_b;
  int64_t grad_out_h;
  int64_t grad_out_l;
  int64_t grad_query_b;
  int64_t grad_query_h;
  int64_t grad_query_l;
  int64_t grad_key_b;
  int64_t grad_key_h;
  int64_t grad_key_l;
  int64_t grad_value_b;
  int64_t grad_value_h;
  int64_t grad_value_l;
  int64_t num_rows;      // of lse
  int64_t q_offset;      // pos(i) = i + q_offset
  int64_t window_left;   // above 2^61: unlimited
  int64_t window_right;  // above 2^61: unlimited
  int32_t B;
  int32_t Hq;
  int32_t Hkv;
  int32_t Lq;
  int32_t Lk;  // with pages: what the block table can address
  int32_t D;
  int32_t Dv;
  int32_t total_q;  // packed
  int32_t total_k;
  int32_t tiles;  // of a sample, and in all: see tile_of
  int32_t slots;
  int32_t items;           // tiles of rows, of all heads, where a block has more than one
  int32_t heads_together;  // of which tiles come before those of other heads
  int32_t chunk;           // items that a block takes at a time: 1 or 2
  int32_t num_splits;      // parts of the keys, of `split` keys each
  int32_t split;
  int32_t num_pages;
  int32_t mask_B;  // sizes of the mask itself: 1 where it is broadcast
  int32_t mask_H;
  int32_t mask_Lq;
  int32_t mask_Lk;
  int32_t bottom_right;       // the last row meets the last key
  int32_t sinks_type;         // 0 bfloat16, 1 float16, 2 float32
  int32_t q_offsets_are_64;   // bits; otherwise 32
  int32_t kv_lengths_are_64;  // bits
  int32_t kv_starts_are_64;   // bits
  int32_t threshold;          // of dropout: weights whose 16 random bits are less are dropped
  float scale;                // times log2(e); with a softcap over it
  float softcap;              // times log2(e)
  float keep_scale;           // of dropout: what kept weights are multiplied by
  float grad_scale;           // the scale
};
