// The only file that knows Python. Tensors arrive as addresses, sizes and strides: no torch here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "cpu/isa.h"
#include "parallel.h"
#include "scratch.h"

namespace py = pybind11;
using namespace pyattn;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Strides strides(const std::array<int64_t, 4>& s) { return {s[0], s[1], s[2]}; }

DType dtype_of(int code) {
  if (code < 0 || code > 3)
    throw std::invalid_argument("dtype must be a code from 0 to 3, got " + std::to_string(code));
  return static_cast<DType>(code);
}

int64_t window_side(int64_t side) { return side < 0 || side > kUnlimited ? kUnlimited : side; }

// The arguments that forward and backward share, in the order of `_arguments` in pyattn/backends/cpu.py. An address of
// 0 is "not given".
AttentionParams attention_params(int dtype, const std::array<int64_t, 7>& sizes, uintptr_t query,
                                 const std::array<int64_t, 4>& query_stride, uintptr_t key,
                                 const std::array<int64_t, 4>& key_stride, uintptr_t value,
                                 const std::array<int64_t, 4>& value_stride, uintptr_t out,
                                 const std::array<int64_t, 4>& out_stride, uintptr_t lse, uintptr_t mask,
                                 int mask_dtype, const std::array<int64_t, 4>& mask_stride, uintptr_t block_table,
                                 int64_t page_size, uintptr_t q_offsets, uintptr_t kv_lengths, uintptr_t kv_starts,
                                 std::optional<int64_t> q_offset, int64_t window_left, int64_t window_right,
                                 double scale) {
  AttentionParams p;
  p.dtype = dtype_of(dtype);
  const auto [B, Hq, Hkv, Lq, Lk, D, Dv] = sizes;
  p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.Lq = Lq, p.Lk = Lk, p.D = D, p.Dv = Dv;
  p.query = pointer<void>(query), p.query_stride = strides(query_stride);
  p.key = pointer<void>(key), p.key_stride = strides(key_stride);
  p.value = pointer<void>(value), p.value_stride = strides(value_stride);
  p.out = pointer<void>(out), p.out_stride = strides(out_stride);
  p.lse = pointer<float>(lse);
  p.mask = pointer<void>(mask), p.mask_dtype = dtype_of(mask_dtype);
  p.mask_stride_b = mask_stride[0], p.mask_stride_h = mask_stride[1];
  p.mask_stride_q = mask_stride[2], p.mask_stride_k = mask_stride[3];
  p.block_table = pointer<int32_t>(block_table), p.page_size = page_size;
  p.q_offsets = pointer<int64_t>(q_offsets);
  p.kv_lengths = pointer<int64_t>(kv_lengths);
  p.kv_starts = pointer<int64_t>(kv_starts);
  p.bottom_right = !q_offset;
  p.q_offset = q_offset.value_or(0);
  p.window_left = window_side(window_left);
  p.window_right = window_side(window_right);
  p.scale = static_cast<float>(scale);
  return p;
}

template <class... Args>
auto forward_binding(AttentionParams (*params)(Args...)) {
  return [params](const std::string& isa, int threads, Args... args) {
    const AttentionParams p = params(args...);
    const CpuKernels& kernels = kernels_for(isa);
    const py::gil_scoped_release release;
    kernels.attention_forward(p, threads);
  };
}

// The gradients' arguments come first, then those of the forward.
template <class... Args>
auto backward_binding(AttentionParams (*params)(Args...)) {
  return
      [params](const std::string& isa, int threads, uintptr_t grad_out, const std::array<int64_t, 4>& grad_out_stride,
               uintptr_t grad_lse, uintptr_t grad_query, const std::array<int64_t, 4>& grad_query_stride,
               uintptr_t grad_key, const std::array<int64_t, 4>& grad_key_stride, uintptr_t grad_value,
               const std::array<int64_t, 4>& grad_value_stride, uintptr_t grad_mask,
               const std::array<int64_t, 4>& grad_mask_sizes, Args... args) {
        AttentionBackwardParams p;
        static_cast<AttentionParams&>(p) = params(args...);
        p.grad_out = pointer<void>(grad_out), p.grad_out_stride = strides(grad_out_stride);
        p.grad_lse = pointer<float>(grad_lse);
        p.grad_query = pointer<void>(grad_query), p.grad_query_stride = strides(grad_query_stride);
        p.grad_key = pointer<void>(grad_key), p.grad_key_stride = strides(grad_key_stride);
        p.grad_value = pointer<void>(grad_value), p.grad_value_stride = strides(grad_value_stride);
        p.grad_mask = pointer<void>(grad_mask);
        p.grad_mask_b = grad_mask_sizes[0], p.grad_mask_h = grad_mask_sizes[1];
        p.grad_mask_q = grad_mask_sizes[2], p.grad_mask_k = grad_mask_sizes[3];
        const CpuKernels& kernels = kernels_for(isa);
        const py::gil_scoped_release release;
        kernels.attention_backward(p, threads);
      };
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  watch_forks();
  m.def("attention_forward", forward_binding(&attention_params));
  m.def("attention_backward", backward_binding(&attention_params));
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const CpuKernels& kernels : available_kernels()) names.emplace_back(kernels.isa);
    return names;
  });
  m.def(
      "peak_gflops", [](const std::string& isa, int dtype) { return kernels_for(isa).peak_gflops(dtype_of(dtype)); },
      py::call_guard<py::gil_scoped_release>());
  m.attr("BLOCK_M") = kBlockM;
  m.attr("BLOCK_N") = kBlockN;
  m.attr("DECODE_QUERIES") = kDecodeQueries;
  m.attr("DECODE_KEYS") = kDecodeKeys;
  m.def("scratch_peak_bytes", &scratch_peak_bytes);
}
