// The CUDA kernels' launchers as Python functions: those of effnet_fast._C.cuda, and of the host
// run.
//
// The caller has checked dtypes, shapes and layouts, and allocated what is written; the launchers
// refuse sizes that their kernels were not made for.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "bindings/bind.h"
#include "cuda/args.h"

namespace py = pybind11;

namespace effnet {
namespace cuda {
namespace {

using Address = uintptr_t;
using Strides = std::array<int64_t, 3>;  // over n, h, w in elements
// weight, bias, mean, variance, 0 where absent; dtype of the first two and of the others; eps
using BnTuple = std::tuple<std::array<Address, 4>, int, int, float>;
using QueueTuple = std::pair<int, Address>;             // device, stream
using ActivationTuple = std::tuple<int, float, float>;  // kind, lo, hi

template <typename T = void>
T* address(Address a) {
  return reinterpret_cast<T*>(a);
}

Queue queue_of(const QueueTuple& q) { return {q.first, address(q.second)}; }

DType dtype_of(int dtype) {
  if (dtype < 0 || dtype > 2) throw std::invalid_argument("dtype must be 0, 1 or 2");
  return static_cast<DType>(dtype);
}

Activation activation_of(const ActivationTuple& a) {
  return {std::get<0>(a), std::get<1>(a), std::get<2>(a)};
}

// (n, c, h, w, oh, ow, k, stride, pad_left, pad_top)
DwconvShape shape_of(const std::array<int64_t, 10>& s) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9]};
}

// (rows, cols, lanes, nx, ny, bands, images)
Tile tile_of(const std::array<int64_t, 7>& t) { return {t[0], t[1], t[2], t[3], t[4], t[5], t[6]}; }

Image image_of(Address data, const Strides& s) { return {address(data), s[0], s[1], s[2]}; }

BatchNorm bn_of(const BnTuple& bn) {
  const auto& [a, dtype, stats_dtype, eps] = bn;
  return {address(a[0]),
          address(a[1]),
          address(a[2]),
          address(a[3]),
          dtype_of(dtype),
          dtype_of(stats_dtype),
          eps};
}

using ShapeTuple = std::array<int64_t, 10>;
using TileTuple = std::array<int64_t, 7>;

// Chunks of an image, and of all images: the partials that a launch writes.
std::pair<int64_t, int64_t> dwconv_parts(const ShapeTuple& shape, const TileTuple& tile,
                                         bool backward) {
  const auto grid = backward ? dwconv_backward_grid : dwconv_forward_grid;
  const DwconvGrid g = grid(shape_of(shape), tile_of(tile));
  return {g.chunks, g.parts};
}

int64_t dwconv_shared_bytes(const ShapeTuple& shape, int dtype, const TileTuple& tile,
                            bool backward) {
  const auto bytes = backward ? dwconv_backward_shared_bytes : dwconv_forward_shared_bytes;
  return bytes(shape_of(shape), dtype_of(dtype), tile_of(tile));
}

void dwconv_fwd(const QueueTuple& queue, const ShapeTuple& shape, int dtype, int weight_dtype,
                const TileTuple& tile, Address x, const Strides& x_strides, Address weight,
                const BnTuple& before, const BnTuple& after, Address y, Address partial,
                float factor, const ActivationTuple& activation) {
  launch_dwconv_bn_silu_fwd(
      {shape_of(shape), dtype_of(dtype), dtype_of(weight_dtype), tile_of(tile),
       image_of(x, x_strides), address(weight), bn_of(before), bn_of(after), address(y),
       address<float>(partial), factor, activation_of(activation)},
      queue_of(queue));
}

void dwconv_bwd(const QueueTuple& queue, const ShapeTuple& shape, int dtype, int weight_dtype,
                const TileTuple& tile, Address x, const Strides& x_strides, const BnTuple& before,
                Address grad_y, Address z, Address gate, Address shift, const BnTuple& after,
                Address sums, double count, Address weight, Address grad_x, Address partial,
                const ActivationTuple& activation) {
  launch_dwconv_bn_silu_bwd(
      {shape_of(shape), dtype_of(dtype), dtype_of(weight_dtype), tile_of(tile),
       image_of(x, x_strides), bn_of(before), address(grad_y), address(z), address<float>(gate),
       address<float>(shift), bn_of(after), address<float>(sums), count, address(weight),
       address(grad_x), address<float>(partial), activation_of(activation)},
      queue_of(queue));
}

void reduce(const QueueTuple& queue, const std::array<int64_t, 4>& sizes, int dtype, int what,
            Address x, Address grad_y, const BnTuple& bn, Address keep, float factor,
            Address partial, const ActivationTuple& activation) {
  if (what < 0 || what > 4) throw std::invalid_argument("reduction must be 0 to 4");
  launch_reduce({sizes[0], sizes[1], sizes[2], sizes[3], dtype_of(dtype),
                 static_cast<Reduction>(what), address(x), address(grad_y), bn_of(bn),
                 address<float>(keep), factor, address<float>(partial), activation_of(activation)},
                queue_of(queue));
}

// sizes: outer, parts, rows of a part, c; rows: the first and how many are folded; strides: of out
// over outer, rows, c.
void fold_sum(const QueueTuple& queue, Address partial, const std::array<int64_t, 4>& sizes,
              const std::array<int64_t, 2>& rows, const std::array<int64_t, 3>& strides,
              float first_factor, Address out) {
  launch_fold_sum({address<float>(partial), sizes[0], sizes[1], sizes[2], sizes[3], rows[0],
                   rows[1], strides[0], strides[1], strides[2], first_factor, address<float>(out)},
                  queue_of(queue));
}

void merge_moments(const QueueTuple& queue, Address partial, int64_t parts, int64_t c, Address mean,
                   Address var) {
  launch_merge_moments(
      {address<float>(partial), parts, c, address<float>(mean), address<float>(var)},
      queue_of(queue));
}

// sizes: n, c, hw.
void bn_act(const QueueTuple& queue, const std::array<int64_t, 3>& sizes, int dtype, Address z,
            Address residual, const BnTuple& bn, Address keep, Address y,
            const ActivationTuple& activation) {
  launch_bn_act({sizes[0], sizes[1], sizes[2], dtype_of(dtype), address(z), address(residual),
                 bn_of(bn), address<float>(keep), activation_of(activation), address(y)},
                queue_of(queue));
}

void gate(const QueueTuple& queue, const std::array<int64_t, 3>& sizes, int dtype, Address x,
          Address gate, Address shift, Address y) {
  launch_gate({sizes[0], sizes[1], sizes[2], dtype_of(dtype), address(x), address<float>(gate),
               address<float>(shift), address(y)},
              queue_of(queue));
}

// sizes: n, c, r, splits.
void excite_fwd(const QueueTuple& queue, const std::array<int64_t, 4>& sizes, int weight_dtype,
                Address pooled, Address se_reduce_weight, Address se_reduce_bias,
                Address se_expand_weight, Address se_expand_bias, Address partial, Address hidden,
                Address gate, const ActivationTuple& activation, int gate_kind) {
  launch_excite_fwd(
      {sizes[0], sizes[1], sizes[2], sizes[3], dtype_of(weight_dtype), address<float>(pooled),
       address(se_reduce_weight), address(se_reduce_bias), address(se_expand_weight),
       address(se_expand_bias), address<float>(partial), address<float>(hidden),
       address<float>(gate), activation_of(activation), gate_kind},
      queue_of(queue));
}

// sizes: n, c, r; grads: se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias.
void excite_bwd(const QueueTuple& queue, const std::array<int64_t, 3>& sizes, int weight_dtype,
                Address pooled, Address hidden, Address gate, Address grad_gate,
                Address se_reduce_weight, Address se_expand_weight, Address partial,
                Address grad_hidden, const std::array<Address, 4>& grads, Address grad_pooled,
                float factor, Address grad_sums, Address squeeze_sums, Address grad_bn,
                const ActivationTuple& activation, int gate_kind) {
  launch_excite_bwd({sizes[0],
                     sizes[1],
                     sizes[2],
                     dtype_of(weight_dtype),
                     address<float>(pooled),
                     address<float>(hidden),
                     address<float>(gate),
                     address<float>(grad_gate),
                     address(se_reduce_weight),
                     address(se_expand_weight),
                     address<float>(partial),
                     address<float>(grad_hidden),
                     address<float>(grads[0]),
                     address<float>(grads[1]),
                     address<float>(grads[2]),
                     address<float>(grads[3]),
                     address<float>(grad_pooled),
                     factor,
                     address<float>(grad_sums),
                     address<float>(squeeze_sums),
                     address<float>(grad_bn),
                     activation_of(activation),
                     gate_kind},
                    queue_of(queue));
}

}  // namespace

void bind(py::module_& m) {
  m.def("probe", &probe, py::arg("device") = 0,
        "The empty text where the kernels can run on the device, or a reason.");
  m.def("dwconv_parts", &dwconv_parts);
  m.def("dwconv_shared_bytes", &dwconv_shared_bytes);
  m.def("dwconv_fwd", &dwconv_fwd);
  m.def("dwconv_bwd", &dwconv_bwd);
  m.def("reduce", &reduce);
  m.def("fold_sum", &fold_sum);
  m.def("merge_moments", &merge_moments);
  m.def("bn_act", &bn_act);
  m.def("gate", &gate);
  m.def("excite_fwd", &excite_fwd);
  m.def("excite_bwd", &excite_bwd);
}

}  // namespace cuda
}  // namespace effnet
