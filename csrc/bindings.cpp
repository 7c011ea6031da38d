// The only file that knows Python. Tensors arrive as addresses, sizes and strides: no torch here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>

#include "cpu/isa.h"
#include "cuda/launch.h"
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

// All of a call but its tensors: made once for each kind of call, and then run on one call's addresses after another.
AttentionParams plan(int dtype, const std::array<int64_t, 7>& sizes, const std::array<int64_t, 4>& query_stride,
                     const std::array<int64_t, 4>& key_stride, const std::array<int64_t, 4>& value_stride,
                     const std::array<int64_t, 2>& lse_stride, int mask_dtype,
                     const std::array<int64_t, 4>& mask_stride, int64_t alibi_stride_b, int64_t page_size,
                     std::optional<int64_t> q_offset, int64_t window_left, int64_t window_right, double scale,
                     double softcap, int32_t dropout_threshold) {
  // Further out a float's range would end on the way; there a cap makes no difference, or scores of nothing.
  constexpr double kLeastSoftcap = 1e-30, kMostSoftcap = 1e30;
  AttentionParams p{};
  p.dtype = dtype_of(dtype);
  const auto [B, Hq, Hkv, Lq, Lk, D, Dv] = sizes;
  p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.Lq = Lq, p.Lk = Lk, p.D = D, p.Dv = Dv;
  p.query_stride = strides(query_stride), p.key_stride = strides(key_stride), p.value_stride = strides(value_stride);
  p.lse_stride_b = lse_stride[0], p.lse_stride_h = lse_stride[1];
  p.mask_dtype = dtype_of(mask_dtype);
  p.mask_stride_b = mask_stride[0], p.mask_stride_h = mask_stride[1];
  p.mask_stride_q = mask_stride[2], p.mask_stride_k = mask_stride[3];
  p.alibi_stride_b = alibi_stride_b;
  p.page_size = page_size;
  p.bottom_right = !q_offset;
  p.q_offset = q_offset.value_or(0);
  p.window_left = window_side(window_left);
  p.window_right = window_side(window_right);
  p.scale = static_cast<float>(scale);
  p.softcap = softcap > 0 && softcap < kMostSoftcap ? static_cast<float>(std::max(softcap, kLeastSoftcap)) : 0;
  p.dropout_threshold = dropout_threshold;
  return p;
}

// In the order of `_call` in pyattn/backends/cpu; 0 is "not given".
using Addresses = std::array<uintptr_t, 14>;

int64_t longest(const int32_t* cu_seqlens, int64_t B) {
  int64_t most = 0;
  for (int64_t b = 0; b < B; ++b) most = std::max<int64_t>(most, cu_seqlens[b + 1] - cu_seqlens[b]);
  return most;
}

void set_tensors(AttentionParams& p, const Addresses& addresses, const std::array<int64_t, 4>& out_stride,
                 int64_t dropout_seed) {
  const auto [query, key, value, out, lse, mask, alibi_slopes, sinks, q_offsets, kv_lengths, kv_starts, block_table,
              cu_seqlens_q, cu_seqlens_k] = addresses;
  p.query = pointer<void>(query), p.key = pointer<void>(key), p.value = pointer<void>(value);
  p.out = pointer<void>(out), p.out_stride = strides(out_stride), p.lse = pointer<float>(lse);
  p.mask = pointer<void>(mask), p.alibi_slopes = pointer<float>(alibi_slopes), p.sinks = pointer<float>(sinks);
  p.q_offsets = pointer<int64_t>(q_offsets), p.kv_lengths = pointer<int64_t>(kv_lengths);
  p.kv_starts = pointer<int64_t>(kv_starts), p.block_table = pointer<int32_t>(block_table);
  p.cu_seqlens_q = pointer<int32_t>(cu_seqlens_q), p.cu_seqlens_k = pointer<int32_t>(cu_seqlens_k);
  if (p.cu_seqlens_q) p.Lq = longest(p.cu_seqlens_q, p.B);
  if (p.cu_seqlens_k) p.Lk = longest(p.cu_seqlens_k, p.B);
  p.dropout_seed = static_cast<uint64_t>(dropout_seed);
}

void forward(AttentionParams p, size_t isa, int threads, const Addresses& addresses,
             const std::array<int64_t, 4>& out_stride, int64_t dropout_seed) {
  set_tensors(p, addresses, out_stride, dropout_seed);
  const CpuKernels& kernels = available_kernels().at(isa);
  const py::gil_scoped_release release;
  kernels.attention_forward(p, threads);
}

// grad_addresses: of grad_out, grad_lse, grad_query, grad_key, grad_value, grad_mask, grad_sinks; grad_strides of the
// first and the three of query, key and value.
void backward(const AttentionParams& plan, size_t isa, int threads, const Addresses& addresses,
              const std::array<int64_t, 4>& out_stride, int64_t dropout_seed,
              const std::array<uintptr_t, 7>& grad_addresses, const std::array<std::array<int64_t, 4>, 4>& grad_strides,
              const std::array<int64_t, 4>& grad_mask_sizes) {
  AttentionBackwardParams p{};
  static_cast<AttentionParams&>(p) = plan;
  set_tensors(p, addresses, out_stride, dropout_seed);
  const auto [grad_out, grad_lse, grad_query, grad_key, grad_value, grad_mask, grad_sinks] = grad_addresses;
  p.grad_out = pointer<void>(grad_out), p.grad_lse = pointer<float>(grad_lse);
  p.grad_query = pointer<void>(grad_query), p.grad_key = pointer<void>(grad_key);
  p.grad_value = pointer<void>(grad_value);
  p.grad_mask = pointer<void>(grad_mask), p.grad_sinks = pointer<float>(grad_sinks);
  p.grad_out_stride = strides(grad_strides[0]), p.grad_query_stride = strides(grad_strides[1]);
  p.grad_key_stride = strides(grad_strides[2]), p.grad_value_stride = strides(grad_strides[3]);
  p.grad_mask_b = grad_mask_sizes[0], p.grad_mask_h = grad_mask_sizes[1];
  p.grad_mask_q = grad_mask_sizes[2], p.grad_mask_k = grad_mask_sizes[3];
  const CpuKernels& kernels = available_kernels().at(isa);
  const py::gil_scoped_release release;
  kernels.attention_backward(p, threads);
}

// Address, strides of batch, head and row, rows of a sample, columns of a head; all 0 for none.
using MatrixFields = std::array<int64_t, 6>;

Matrix matrix(const MatrixFields& m) {
  return {pointer<void>(static_cast<uintptr_t>(m[0])),
          m[1],
          m[2],
          m[3],
          std::max<int64_t>(m[4], 1),
          std::max<int64_t>(m[5], 1)};
}

void product(size_t isa, int threads, int dtype, const std::array<int64_t, 3>& sizes, const MatrixFields& a,
             bool transpose_a, const MatrixFields& b, const MatrixFields& c) {
  const CpuKernels& kernels = available_kernels().at(isa);
  const ProductParams p{dtype_of(dtype), sizes[0], sizes[1], sizes[2], matrix(a), transpose_a, matrix(b), matrix(c)};
  const py::gil_scoped_release release;
  kernels.product(p, threads);
}

// The floats that a packed weight, [columns, depth], takes; packs it unless `out` is 0.
int64_t pack_weight(size_t isa, int threads, int dtype, const MatrixFields& weight, uintptr_t out) {
  const CpuKernels& kernels = available_kernels().at(isa);
  const Matrix m = matrix(weight);
  const py::gil_scoped_release release;
  return kernels.pack_weight(dtype_of(dtype), m, weight[4], weight[5], pointer<float>(out), threads);
}

// sizes: rows, depth, D, R. addresses: weight, the packed weight, bias, norms of q and k, cos, sin, positions,
// grad_norms; 0 is "not given". matrices: x, residual, saved, grad_rows. flags: interleaved, inverse.
void projection(const std::string& op, size_t isa, int threads, int dtype, const std::array<int64_t, 4>& sizes,
                const std::array<uintptr_t, 9>& addresses, int64_t weight_stride, int64_t positions_stride_b,
                const std::array<MatrixFields, 4>& matrices, const std::array<int64_t, 3>& num_heads,
                const std::array<MatrixFields, 3>& heads, double eps, const std::array<bool, 2>& flags) {
  const CpuKernels& kernels = available_kernels().at(isa);
  ProjectionParams p{};
  p.dtype = dtype_of(dtype);
  p.rows = sizes[0], p.depth = sizes[1], p.D = sizes[2], p.R = sizes[3];
  const auto [weight, packed, bias, q_norm, k_norm, cos, sin, positions, grad_norms] = addresses;
  p.weight = pointer<void>(weight), p.weight_stride = weight_stride, p.bias = pointer<float>(bias);
  p.packed = pointer<float>(packed);
  p.norms[0] = pointer<float>(q_norm), p.norms[1] = pointer<float>(k_norm), p.eps = static_cast<float>(eps);
  p.cos = pointer<float>(cos), p.sin = pointer<float>(sin);
  p.positions = pointer<int64_t>(positions), p.positions_stride_b = positions_stride_b;
  p.x = matrix(matrices[0]), p.residual = matrix(matrices[1]), p.saved = matrix(matrices[2]);
  p.grad_rows = matrix(matrices[3]), p.grad_norms = pointer<float>(grad_norms);
  for (size_t i = 0; i < 3; ++i) p.num_heads[i] = num_heads[i], p.heads[i] = matrix(heads[i]);
  p.interleaved = flags[0], p.inverse = flags[1];
  const auto run = op == "forward"    ? kernels.projection
                   : op == "backward" ? kernels.projection_backward
                   : op == "rotary"   ? kernels.rotary
                                      : throw std::invalid_argument("op must be forward, backward or rotary");
  const py::gil_scoped_release release;
  run(p, threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  watch_forks();
  py::class_<AttentionParams>(m, "AttentionPlan")
      .def(py::init(&plan), py::kw_only(), py::arg("dtype"), py::arg("sizes"), py::arg("query_stride"),
           py::arg("key_stride"), py::arg("value_stride"), py::arg("lse_stride"), py::arg("mask_dtype"),
           py::arg("mask_stride"), py::arg("alibi_stride_b"), py::arg("page_size"), py::arg("q_offset"),
           py::arg("window_left"), py::arg("window_right"), py::arg("scale"), py::arg("softcap"),
           py::arg("dropout_threshold"))
      .def("forward", &forward)
      .def("backward", &backward);
  py::class_<CudaKernel>(m, "CudaKernel")
      .def(py::init([](const py::bytes& image, const std::string& name, int threads, int shared_bytes, int device) {
             return CudaKernel(image, name, threads, shared_bytes, device);
           }),
           py::arg("image"), py::arg("name"), py::arg("threads"), py::arg("shared_bytes"), py::arg("device"))
      .def("launch", [](const CudaKernel& kernel, int64_t blocks, uintptr_t stream, const py::bytes& params) {
        const char* bytes = PyBytes_AsString(params.ptr());
        const py::gil_scoped_release release;
        kernel.launch(blocks, stream, bytes);
      });
  m.def("cuda_open", &cuda_open);
  m.def("cuda_driver_version", &cuda_driver_version);
  m.def(
      "tensor_map",
      [](int dtype, uintptr_t address, const Dims& sizes, const Dims& strides, const Dims& box, bool swizzle) {
        const TensorMap map = tensor_map(dtype_of(dtype), address, sizes, strides, box, swizzle);
        return py::bytes(reinterpret_cast<const char*>(map.bytes), sizeof map.bytes);
      },
      py::kw_only(), py::arg("dtype"), py::arg("address"), py::arg("sizes"), py::arg("strides"), py::arg("box"),
      py::arg("swizzle") = true);
  m.def("product", &product);
  m.def("pack_weight", &pack_weight);
  m.def("projection", &projection);
  m.attr("FEW_ROWS") = kFewRows;
  m.attr("PROJECTION_ROWS") = kProjectionRows;
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const CpuKernels& kernels : available_kernels()) names.emplace_back(kernels.isa);
    return names;
  });
  m.def(
      "peak_gflops", [](size_t isa, int dtype) { return available_kernels().at(isa).peak_gflops(dtype_of(dtype)); },
      py::call_guard<py::gil_scoped_release>());
  m.attr("BLOCK_M") = kBlockM;
  m.attr("BLOCK_N") = kBlockN;
  m.attr("DECODE_QUERIES") = kDecodeQueries;
  m.attr("DECODE_KEYS") = kDecodeKeys;
  m.def("scratch_peak_bytes", &scratch_peak_bytes);
}
