// Which weights dropout keeps. Twin of `dropout_factor` in pyattn/reference.py: Philox 4x32-10 (Salmon et al. 2011,
// "Parallel random numbers: as easy as 1, 2, 3") with the counter (key / 8, row, query head, sample) gives the 16
// random bits of 8 keys.
#pragma once
#include "../params.h"
#include "vec.h"

namespace pyattn::PYATTN_ISA {
namespace {

// Of one head of one sample.
class Dropout {
 public:
  float factor;  // of what is kept: the inverse of its share

  Dropout(const AttentionParams& p, int64_t head)
      : factor(p.dropout_threshold < kHalves
                   ? static_cast<float>(kHalves) / static_cast<float>(kHalves - p.dropout_threshold)
                   : 0),
        threshold_(p.dropout_threshold),
        sample_(static_cast<uint32_t>(p.first_sample)) {
    for (int round = 0; round < kRounds; ++round) {
      keys_[round][0] = static_cast<uint32_t>(p.dropout_seed) + static_cast<uint32_t>(round) * 0x9E3779B9u;
      keys_[round][1] = static_cast<uint32_t>(p.dropout_seed >> 32) + static_cast<uint32_t>(round) * 0xBB67AE85u;
    }
    head_product_ = kMultiply1 * static_cast<uint32_t>(head);
  }

  explicit operator bool() const { return threshold_ != 0; }

  // For the keys [key, key + count), two at a time, and kVecs vectors of rows from `row` on: visit(r, j, keep,
  // keep_next) with all bits of a lane set where key + r, and key + r + 1, are kept for that row of vector j. `key` is
  // even.
  template <int kVecs, class Visit>
  PYATTN_INLINE void for_pairs(int64_t row, int64_t key, int count, const Visit& visit) const {
    // Of the first two rounds this depends on the rows alone.
    Pair products[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        vu rows;
#pragma GCC unroll 8
        for (int n = 0; n < kLanes / 2; ++n) rows[n] = static_cast<uint32_t>(row) + j * kLanes + 2 * n + odd;
        products[j].half[odd] = multiply_low(rows ^ (uint64_t{high(head_product_)} ^ keys_[0][0]), kMultiply0);
      }
    }
    for (int64_t group = key / 8; 8 * group < key + count; ++group) {
      const Scalars scalars = scalars_of(static_cast<uint32_t>(group));
      const int first = static_cast<int>(8 * group - key);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        vi words[4];
        random_words(products[j], scalars, words);
#pragma GCC unroll 4
        for (int n = 0; n < 8; n += 2) {
          if (first + n < 0 || first + n >= count) continue;
          const int shift = n < 4 ? 0 : 16;
          visit(first + n, j, ((words[n & 3] >> shift) & 0xffff) >= broadcast(threshold_),
                ((words[(n & 3) + 1] >> shift) & 0xffff) >= broadcast(threshold_));
        }
      }
    }
  }

 private:
  static constexpr int32_t kHalves = 65536;
  static constexpr int kRounds = 10;
  static constexpr uint64_t kMultiply0 = 0xD2511F53, kMultiply1 = 0xCD9E8D57;

  // 32-bit words of kLanes rows, in 64 bits each: the even rows, then the odd ones. What the upper halves hold is
  // noise.
  struct Pair {
    vu half[2];
  };
  // What a group of keys contributes to the first three rounds; the same for all rows.
  struct Scalars {
    uint32_t round2, round3_0, round3_2, round3_3;
  };

  static constexpr uint32_t high(uint64_t product) { return static_cast<uint32_t>(product >> 32); }
  static constexpr uint32_t low(uint64_t product) { return static_cast<uint32_t>(product); }

  Scalars scalars_of(uint32_t group) const {
    const uint64_t first = kMultiply0 * group;
    const uint32_t c2 = high(first) ^ sample_ ^ keys_[0][1];
    const uint64_t second = kMultiply1 * c2;
    const uint32_t c0 = high(second) ^ low(head_product_) ^ keys_[1][0];
    const uint64_t third = kMultiply0 * c0;
    return {low(first) ^ keys_[1][1], low(second) ^ keys_[2][0], high(third) ^ keys_[2][1], low(third)};
  }

  PYATTN_INLINE void random_words(const Pair& products, const Scalars& scalars, vi (&words)[4]) const {
    vu c[2][4];
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const vu product = products.half[odd];
      const vu third = multiply_low((product >> 32) ^ uint64_t{scalars.round2}, kMultiply1);
      c[odd][0] = (third >> 32) ^ uint64_t { scalars.round3_0 };
      c[odd][1] = third;
      c[odd][2] = product ^ uint64_t{scalars.round3_2};
      c[odd][3] = vu{} + uint64_t{scalars.round3_3};
#pragma GCC unroll 8
      for (int round = 3; round < kRounds; ++round) {
        const vu a = multiply_low(c[odd][0], kMultiply0), b = multiply_low(c[odd][2], kMultiply1);
        c[odd][0] = (b >> 32) ^ c[odd][1] ^ uint64_t { keys_[round][0] };
        c[odd][1] = b;
        c[odd][2] = (a >> 32) ^ c[odd][3] ^ uint64_t { keys_[round][1] };
        c[odd][3] = a;
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) words[n] = (vi)((c[0][n] & 0xffffffff) | (c[1][n] << 32));
  }

  int32_t threshold_;
  uint32_t sample_;
  uint64_t head_product_;  // of the first round
  uint32_t keys_[kRounds][2];
};

}  // namespace
}  // namespace pyattn::PYATTN_ISA
