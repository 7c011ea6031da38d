// Multi-head projections on a CPU: a matrix product whose blocks end in bias, RMSNorm and rotary while they are still
// in the cache, and are written head by head; and the way back.
//
//   many rows   blocks of gemm.h, made of whole heads
//   few rows    lanes along the depth, each weight read once and where it lies: the speed of memory
#include <algorithm>
#include <cmath>
#include <numeric>

#include "gemm.h"

namespace pyattn::PYATTN_ISA {
namespace {

constexpr int kFewWeights = 4;  // rows of the weight at once, by as many rows of x as fill the registers
constexpr int kFewTile = kLanes / kFewWeights;

// A row's angles: columns of the rotary tables.
struct Angles {
  const float *cos, *sin;
};

Angles angles_of(const ProjectionParams& p, int64_t row) {
  const int64_t b = row / p.x.L, l = row % p.x.L;
  const int64_t position = p.positions ? p.positions[b * p.positions_stride_b + l] : l;
  return {p.cos + position * (p.R / 2), p.sin + position * (p.R / 2)};
}

// Turns the pairs of a head in place; sign is -1 for the way back.
void rotate(float* __restrict y, const Angles& angles, int64_t half, bool interleaved, float sign) {
  const float* __restrict cos = angles.cos, * __restrict sin = angles.sin;
  if (interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = y[2 * i], b = y[2 * i + 1], s = sign * sin[i];
      y[2 * i] = a * cos[i] - b * s;
      y[2 * i + 1] = b * cos[i] + a * s;
    }
    return;
  }
  float* __restrict other = y + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = y[i], b = other[i], s = sign * sin[i];
    y[i] = a * cos[i] - b * s;
    other[i] = b * cos[i] + a * s;
  }
}

// The sum of f(i) over [0, n), in as many parts as there are lanes.
template <class F>
float sum_of(int64_t n, const F& f) {
  float parts[16] = {}, sum = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; ++j) parts[j] += f(i + j);
  for (; i < n; ++i) parts[i % 16] += f(i);
  for (const float part : parts) sum += part;
  return sum;
}

float rstd_of(const float* y, int64_t D, float eps) {
  return 1 / std::sqrt(sum_of(D, [=](int64_t i) { return y[i] * y[i]; }) / static_cast<float>(D) + eps);
}

template <class T>
void store_run(const float* in, int64_t D, T* out) {
  int64_t e = 0;
  for (; e + kLanes <= D; e += kLanes) store_floats(out + e, load_unaligned(in + e));
  for (; e < D; ++e) from_float(in[e], out[e]);
}

// Which of q, k and v a head belongs to; afterwards `head` counts from the first of it.
int part_of(const ProjectionParams& p, int64_t& head) {
  int part = 0;
  while (head >= p.num_heads[part]) head -= p.num_heads[part++];
  return part;
}

// Whether a head must be in one piece for what follows the product.
bool needs_heads(const ProjectionParams& p) { return p.cos || p.norms[0] || p.norms[1]; }

// What follows the product, of a run of elements of one head of one row, from `column` on; in place, and written.
template <class T>
void finish_run(const ProjectionParams& p, int64_t row, int64_t column, int64_t n, const Angles& angles, float* y) {
  int64_t head = column / p.D;
  const int part = part_of(p, head);
  if (p.bias)
    for (int64_t i = 0; i < n; ++i) y[i] += p.bias[column + i];
  if (p.residual.data) {
    const T* residual = element<const T>(p.residual, row, column);
    for (int64_t i = 0; i < n; ++i) y[i] += to_float(residual[i]);
  }
  if (part < 2) {
    if (p.saved.data) store_run(y, n, element<T>(p.saved, row, column));
    if (const float* norm = p.norms[part]) {
      const float rstd = rstd_of(y, n, p.eps);
      for (int64_t i = 0; i < n; ++i) y[i] *= rstd * norm[i];
    }
    if (p.cos) rotate(y, angles, p.R / 2, p.interleaved, 1);
  }
  store_run(y, n, element<T>(p.heads[part], row, head * p.D + column % p.D));
}

template <class T>
void finish_rows(const ProjectionParams& p, float* c, int64_t c_row, int64_t first_row, int64_t rows, int64_t column,
                 int64_t columns) {
  for (int64_t r = first_row; r < first_row + rows; ++r, c += c_row) {
    const Angles angles = p.cos ? angles_of(p, r) : Angles{};
    for (int64_t e = 0; e < columns;) {
      const int64_t run = std::min(p.D - (column + e) % p.D, columns - e);
      finish_run<T>(p, r, column + e, run, angles, c + e);
      e += run;
    }
  }
}

// ---- few rows ----

// out[r * out_row + n] = row r of x, as words, times row n of the weight; kRows rows of x and kFewWeights of the
// weight.
template <class T, int kRows>
void few_products(const float* x, int64_t x_row, const T* weight, int64_t weight_stride, int64_t weights, int64_t depth,
                  float* out, int64_t out_row) {
  constexpr int kStep = kLanes * (kDot<T> ? 2 : 1);
  const T* w[kFewWeights];
  for (int n = 0; n < kFewWeights; ++n) w[n] = weight + std::min<int64_t>(n, weights - 1) * weight_stride;
  vf sums[kLanes] = {};
  int64_t k = 0;
  const auto step = [&](const T* const(&from)[kFewWeights], int64_t at) __attribute__((always_inline)) {
    vf words[kFewWeights];
#pragma GCC unroll 4
    for (int n = 0; n < kFewWeights; ++n) words[n] = load_words(from[n] + at);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const vf other = load_unaligned(x + r * x_row + words_of<T>(k));
#pragma GCC unroll 4
      for (int n = 0; n < kFewWeights; ++n)
        sums[r * kFewWeights + n] = multiply_add<kDot<T>>(sums[r * kFewWeights + n], other, words[n]);
    }
  };
  for (; k + kStep <= depth; k += kStep) step(w, k);
  if (k < depth) {
    T ends[kFewWeights][kStep] = {};
    const T* end[kFewWeights];
    for (int n = 0; n < kFewWeights; ++n) {
      std::memcpy(ends[n], w[n] + k, static_cast<size_t>(depth - k) * sizeof(T));
      end[n] = ends[n];
    }
    step(end, 0);
  }
  const vf all = sum_lanes(sums);
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kFewWeights && n < weights; ++n) out[r * out_row + n] = all[r * kFewWeights + n];
}

template <class T, int kRows = kFewTile>
void call_few_products(int64_t rows, const float* x, int64_t x_row, const T* weight, int64_t weight_stride,
                       int64_t weights, int64_t depth, float* out, int64_t out_row) {
  if (rows >= kRows)
    few_products<T, kRows>(x, x_row, weight, weight_stride, weights, depth, out, out_row);
  else if constexpr (kRows > 1)
    call_few_products<T, kRows - 1>(rows, x, x_row, weight, weight_stride, weights, depth, out, out_row);
}

template <class T>
void project_few(const ProjectionParams& p, int64_t all_columns, int threads) {
  const int64_t words = round_up(words_of<T>(p.depth), kLanes);
  const int64_t block = needs_heads(p) ? std::max<int64_t>(kLeastColumns / p.D, 1) * p.D : kLeastColumns;
  parallel_for((all_columns + block - 1) / block, threads, [&](int64_t task) {
    const int64_t column = task * block, columns = std::min(block, all_columns - column);
    float *x = nullptr, *c = nullptr;
    const auto carve = [&](void* base) {
      Carver carver(base);
      x = carver.take<float>(p.rows * words);
      c = carver.take<float>(p.rows * columns);
      return carver.used();
    };
    carve(thread_scratch(carve(nullptr)));
    std::memset(x, 0, static_cast<size_t>(p.rows * words) * sizeof(float));
    stage_along<T>(p.x, 0, p.rows, 0, p.depth, x, words);
    for (int64_t n = 0; n < columns; n += kFewWeights) {
      const T* weight = static_cast<const T*>(p.weight) + (column + n) * p.weight_stride;
      for (int64_t r = 0; r < p.rows; r += kFewTile)
        call_few_products<T>(p.rows - r, x + r * words, words, weight, p.weight_stride, columns - n, p.depth,
                             c + r * columns + n, columns);
    }
    finish_rows<T>(p, c, columns, 0, p.rows, column, columns);
  });
}

// ---- the way back ----

// From the gradient of what finish_run wrote to that of its product, in place; adds to the norm's gradient.
template <class T>
void back_through_head(const ProjectionParams& p, int64_t row, int64_t head, int part, const Angles& angles, float* y,
                       float* g, double* grad_norms) {
  const int64_t D = p.D;
  if (part == 2) return;
  if (p.cos) rotate(g, angles, p.R / 2, p.interleaved, -1);
  const float* norm = p.norms[part];
  if (!norm) return;
  convert_row(element<const T>(p.saved, row, head * D), static_cast<int>(D), y);
  const float rstd = rstd_of(y, D, p.eps);
  double* grad_norm = grad_norms + part * D;
  for (int64_t i = 0; i < D; ++i) {
    y[i] *= rstd;
    grad_norm[i] += g[i] * y[i];
    g[i] *= norm[i];
  }
  const float mean = sum_of(D, [=](int64_t i) { return g[i] * y[i]; }) / static_cast<float>(D);
  for (int64_t i = 0; i < D; ++i) g[i] = rstd * (g[i] - y[i] * mean);
}

int64_t count_heads(const ProjectionParams& p) { return p.num_heads[0] + p.num_heads[1] + p.num_heads[2]; }

}  // namespace

void projection(const ProjectionParams& p, int threads) {
  const int64_t columns = count_heads(p) * p.D;
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.rows <= kFewRows) return project_few<T>(p, columns, threads);
    const Matrix weight{const_cast<void*>(p.weight), 0, 0, p.weight_stride, columns, p.depth};
    const Product product{p.rows, columns, p.depth, p.x, weight, p.packed};
    const int64_t whole = needs_heads(p) ? p.D : 1, unit = p.packed ? std::lcm(whole, int64_t{kTileLanes}) : whole;
    matrix_product<T, false, true>(product, unit, threads,
                                   [&](float* c, int64_t c_row, int64_t row, int64_t rows, int64_t column,
                                       int64_t columns) { finish_rows<T>(p, c, c_row, row, rows, column, columns); });
  });
}

void projection_backward(const ProjectionParams& p, int threads) {
  const int64_t heads = count_heads(p);
  parallel_for((p.rows + kProjectionRows - 1) / kProjectionRows, threads, [&](int64_t task) {
    float *y = nullptr, *g = nullptr;
    double* grad_norms = nullptr;
    const auto carve = [&](void* base) {
      Carver carver(base);
      y = carver.take<float>(p.D);
      g = carver.take<float>(p.D);
      grad_norms = carver.take<double>(2 * p.D);
      return carver.used();
    };
    carve(thread_scratch(carve(nullptr)));
    std::fill_n(grad_norms, 2 * p.D, 0.0);
    with_dtype(p.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t r = task * kProjectionRows; r < std::min((task + 1) * kProjectionRows, p.rows); ++r) {
        const Angles angles = p.cos ? angles_of(p, r) : Angles{};
        for (int64_t all = 0; all < heads; ++all) {
          int64_t head = all;
          const int part = part_of(p, head);
          convert_row(element<const T>(p.heads[part], r, head * p.D), static_cast<int>(p.D), g);
          back_through_head<T>(p, r, all, part, angles, y, g, grad_norms);
          store_run(g, p.D, element<T>(p.grad_rows, r, all * p.D));
        }
      }
    });
    if (p.grad_norms) std::copy_n(grad_norms, 2 * p.D, p.grad_norms + task * 2 * p.D);
  });
}

// Turns x into heads[0].
void rotary(const ProjectionParams& p, int threads) {
  parallel_for((p.rows + kProjectionRows - 1) / kProjectionRows, threads, [&](int64_t task) {
    float* y = static_cast<float*>(thread_scratch(static_cast<size_t>(p.D) * sizeof(float)));
    with_dtype(p.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t r = task * kProjectionRows; r < std::min((task + 1) * kProjectionRows, p.rows); ++r) {
        const Angles angles = angles_of(p, r);
        for (int64_t h = 0; h < p.num_heads[0]; ++h) {
          convert_row(element<const T>(p.x, r, h * p.D), static_cast<int>(p.D), y);
          rotate(y, angles, p.R / 2, p.interleaved, p.inverse ? -1 : 1);
          store_run(y, p.D, element<T>(p.heads[0], r, h * p.D));
        }
      }
    });
  });
}

// Returns the floats that a packed weight takes; packs it unless `out` is null.
int64_t pack_weight(DType dtype, const Matrix& weight, int64_t columns, int64_t depth, float* out, int threads) {
  int64_t floats = 0;
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    floats = packed_floats<T>(columns, depth);
    if (!out) return;
    std::memset(out, 0, static_cast<size_t>(floats) * sizeof(float));
    parallel_for((depth + kDepth - 1) / kDepth, threads, [&](int64_t task) {
      const int64_t k = task * kDepth;
      pack_columns<T>(weight, 0, columns, k, std::min(kDepth, depth - k), out + packed_floats<T>(columns, k));
    });
  });
  return floats;
}

void product(const ProductParams& p, int threads) {
  const Product product{p.rows, p.columns, p.depth, p.a, p.b};
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const auto write = [&](const float* c, int64_t c_row, int64_t row, int64_t rows, int64_t column, int64_t columns) {
      for (int64_t r = row; r < row + rows; ++r, c += c_row)
        for_runs<T>(p.c, r, column, columns, [&](T* run, int64_t offset, int64_t n) { store_run(c + offset, n, run); });
    };
    if (p.transpose_a)
      matrix_product<T, true, false>(product, 1, threads, write);
    else
      matrix_product<T, false, false>(product, 1, threads, write);
  });
}

}  // namespace pyattn::PYATTN_ISA
