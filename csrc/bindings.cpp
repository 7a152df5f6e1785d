// effnet_fast._C: pointers, sizes and strides in, an exception out. No torch headers.
//
// Tensors come as addresses; the caller has checked dtypes, shapes and layouts, and this file
// guards what would corrupt memory: sizes, strides, and the instruction set against the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#define EFFNET_NAMESPACE host
#include "binding_parts.h"
#include "common/geometry.h"
#include "cpu/args.h"
#ifdef EFFNET_CUDA_ARCHS
#include "cuda/bindings.h"
#endif
#include "instruction_sets.h"
#include "mbconv_bindings.h"
#include "network_bindings.h"
#include "stem_bindings.h"
#include "watch.h"

namespace py = pybind11;

namespace effnet {

namespace {

using namespace host;

// strides over n, h, w in elements
using Strides = std::array<int64_t, 3>;

Image image(Address data, const Strides& strides) {
  return {at(data), strides[0], strides[1], strides[2]};
}

Image contiguous_image(Address data, int64_t c, int64_t h, int64_t w) {
  return {at(data), h * w * c, w * c, c};
}

// BatchNorm as z * scale + shift, and 1 / its standard deviation. Plain loops over few arrays:
// the compiler turns them into vector code.
struct BnVectors {
  std::vector<float> scale, shift, rstd;
  BnVectors(const BatchNorm& bn, double eps, int64_t c) : scale(c), shift(c), rstd(c) {
    const float *weight = at<float>(bn[0]), *bias = at<float>(bn[1]);
    const float *mean = at<float>(bn[2]), *var = at<float>(bn[3]);
    const float epsilon = static_cast<float>(eps);
    float *const scales = scale.data(), *const shifts = shift.data(), *const rstds = rstd.data();
    for (int64_t i = 0; i < c; i++) rstds[i] = 1.0f / std::sqrt(var[i] + epsilon);
    for (int64_t i = 0; weight && i < c; i++) scales[i] = weight[i] * rstds[i];
    if (!weight) std::copy(rstd.begin(), rstd.end(), scales);
    for (int64_t i = 0; i < c; i++) shifts[i] = -mean[i] * scales[i];
    for (int64_t i = 0; bias && i < c; i++) shifts[i] += bias[i];
  }
};

void dwconv_eval(const std::string& isa, const ShapeTuple& shape, bool is_bf16, bool weight_bf16,
                 Address x, const Strides& x_strides, Address weight, const BatchNorm& bn,
                 double eps, Address y, Address pooled, int threads) {
  const Kernels& kernels = kernels_for(isa);
  const DwconvShape s = dwconv_shape(shape);
  const BnVectors vectors(bn, eps, s.c);
  const int64_t chunks = row_chunks(s.oh);
  const Partials partial(s.n * chunks * s.c);
  DwconvForwardArgs args = {s,
                            dtype_of(is_bf16),
                            dtype_of(weight_bf16),
                            image(x, x_strides),
                            contiguous_image(y, s.c, s.oh, s.ow),
                            at(weight),
                            vectors.scale.data(),
                            vectors.shift.data(),
                            partial.data(),
                            false,
                            workspace,
                            thread_count(threads)};
  launch(kernels.dwconv_forward, args);
  FoldArgs fold = {partial.data(),    s.n,    chunks, s.c, 1.0f / static_cast<float>(s.oh * s.ow),
                   at<float>(pooled), threads};
  launch(kernels.fold_sum, fold);
}

void dwconv_train(const std::string& isa, const ShapeTuple& shape, bool is_bf16, bool weight_bf16,
                  Address x, const Strides& x_strides, Address weight, Address z, Address mean,
                  Address var, int threads) {
  const Kernels& kernels = kernels_for(isa);
  const DwconvShape s = dwconv_shape(shape);
  const int64_t chunks = row_chunks(s.oh);
  const Partials partial(s.n * chunks * 3 * s.c);
  DwconvForwardArgs args = {s,
                            dtype_of(is_bf16),
                            dtype_of(weight_bf16),
                            image(x, x_strides),
                            contiguous_image(z, s.c, s.oh, s.ow),
                            at(weight),
                            nullptr,
                            nullptr,
                            partial.data(),
                            true,
                            workspace,
                            thread_count(threads)};
  launch(kernels.dwconv_forward, args);
  FoldChanArgs fold = {partial.data(), s.n,    chunks, s.c, s.oh, s.ow, at<float>(mean),
                       at<float>(var), threads};
  launch(kernels.fold_chan, fold);
}

// Moves BatchNorm's running statistics towards the batch's by the share `momentum`.
void move_statistics(int64_t c, Address mean, Address var, Address running_mean,
                     Address running_var, double correction, double momentum) {
  const float share = static_cast<float>(momentum), keep = static_cast<float>(1.0 - momentum);
  const float unbiased = static_cast<float>(correction);
  const float *new_mean = at<float>(mean), *new_var = at<float>(var);
  float *old_mean = at<float>(running_mean), *old_var = at<float>(running_var);
  for (int64_t i = 0; i < c; i++) old_mean[i] = keep * old_mean[i] + share * new_mean[i];
  for (int64_t i = 0; i < c; i++) old_var[i] = keep * old_var[i] + share * (unbiased * new_var[i]);
}

// sums [2,C]: sum du and sum du * zh; they are formed where `training` or where their address is
// given. grad_x, grad_weight and sums may be 0: not wanted.
void dwconv_backward(const std::string& isa, const ShapeTuple& shape, bool is_bf16,
                     bool weight_bf16, Address x, const Strides& x_strides, Address z,
                     Address grad_y, Address weight, const BatchNorm& bn, double eps, bool training,
                     Address grad_x, Address grad_weight, Address sums, int threads) {
  const Kernels& kernels = kernels_for(isa);
  const DwconvShape s = dwconv_shape(shape);
  const BnVectors vectors(bn, eps, s.c);
  const int64_t pixels = s.n * s.oh * s.ow;
  std::vector<float> totals(2 * s.c), means(2 * s.c);
  if (training || sums) {
    const int64_t chunks = pixel_chunks(pixels);
    const Partials partial(chunks * 2 * s.c);
    BnReduceArgs reduce = {{1, s.c, pixels},     dtype_of(is_bf16),    at(z),
                           at(grad_y),           vectors.scale.data(), vectors.shift.data(),
                           at<float>(bn[2]),     vectors.rstd.data(),  partial.data(),
                           thread_count(threads)};
    launch(kernels.bn_backward_reduce, reduce);
    FoldArgs fold = {partial.data(), 1, chunks, 2 * s.c, 1.0f, totals.data(), threads};
    launch(kernels.fold_sum, fold);
    if (sums) std::copy(totals.begin(), totals.end(), at<float>(sums));
  }
  if (!grad_x && !grad_weight) return;
  for (int64_t i = 0; i < 2 * s.c; i++) means[i] = totals[i] / static_cast<float>(pixels);
  const int64_t parts = weight_groups(s.n, s.oh, s.ow) * row_chunks(s.oh);
  const int64_t taps = s.c * s.k * s.k;
  const Partials partial(grad_weight ? parts * taps : 0);
  DwconvBackwardArgs args = {s,
                             dtype_of(is_bf16),
                             dtype_of(weight_bf16),
                             image(x, x_strides),
                             contiguous_image(z, s.c, s.oh, s.ow),
                             contiguous_image(grad_y, s.c, s.oh, s.ow),
                             contiguous_image(grad_x, s.c, s.h, s.w),
                             at(weight),
                             vectors.scale.data(),
                             vectors.shift.data(),
                             at<float>(bn[2]),
                             vectors.rstd.data(),
                             training ? means.data() : nullptr,
                             training ? means.data() + s.c : nullptr,
                             partial.data(),
                             workspace,
                             thread_count(threads)};
  launch(kernels.dwconv_backward, args);
  if (!grad_weight) return;
  FoldArgs fold = {partial.data(), 1, parts, taps, 1.0f, at<float>(grad_weight), threads};
  launch(kernels.fold_sum, fold);
}

// y = act(bn(z)) + residual over `pixels` rows of C; y may be z.
void bn_act(const std::string& isa, int64_t pixels, int64_t c, bool is_bf16, bool silu, Address z,
            const BatchNorm& bn, double eps, Address residual, Address y, int threads) {
  require(pixels >= 0 && c > 0, "bn_act: the sizes must be positive");
  const BnVectors vectors(bn, eps, c);
  AffineActArgs args = {{1, c, pixels},       dtype_of(is_bf16),    at(z), at(residual),
                        vectors.scale.data(), vectors.shift.data(), at(y), silu,
                        thread_count(threads)};
  launch(kernels_for(isa).affine_act, args);
}

// out[n,c] = factor * sum over hw of x, or of x * grad_y where given.
void squeeze(const std::string& isa, int64_t n, int64_t c, int64_t hw, bool is_bf16, Address x,
             Address grad_y, float factor, Address out, int threads) {
  const Kernels& kernels = kernels_for(isa);
  require(n > 0 && c > 0 && hw > 0, "squeeze: every size must be positive");
  const int64_t chunks = pixel_chunks(hw);
  const Partials partial(n * chunks * c);
  SqueezeArgs args = {{n, c, hw}, dtype_of(is_bf16), at(x),
                      at(grad_y), partial.data(),    thread_count(threads)};
  launch(kernels.squeeze, args);
  FoldArgs fold = {partial.data(), n, chunks, c, factor, at<float>(out), threads};
  launch(kernels.fold_sum, fold);
}

void excite(const std::string& isa, int64_t n, int64_t c, int64_t r, bool weight_bf16,
            Address pooled, Address reduce_weight, Address reduce_bias, Address expand_weight,
            Address expand_bias, Address hidden, Address gate, int threads) {
  require(n >= 0 && c > 0 && r > 0, "excite: the sizes must be positive");
  ExciteArgs args = {n,
                     c,
                     r,
                     dtype_of(weight_bf16),
                     at<float>(pooled),
                     at(reduce_weight),
                     at(reduce_bias),
                     at(expand_weight),
                     at(expand_bias),
                     at<float>(hidden),
                     at<float>(gate),
                     workspace,
                     thread_count(threads)};
  launch(kernels_for(isa).excite, args);
}

void excite_backward(const std::string& isa, int64_t n, int64_t c, int64_t r, bool weight_bf16,
                     Address pooled, Address hidden, Address gate, Address grad_gate,
                     Address reduce_weight, Address expand_weight, Address grad_reduce_weight,
                     Address grad_reduce_bias, Address grad_expand_weight, Address grad_expand_bias,
                     Address grad_pooled, int threads) {
  require(n >= 0 && c > 0 && r > 0, "excite_backward: the sizes must be positive");
  const Partials grad_hidden(n * r);
  ExciteBackwardArgs args = {n,
                             c,
                             r,
                             dtype_of(weight_bf16),
                             at<float>(pooled),
                             at<float>(hidden),
                             at<float>(gate),
                             at<float>(grad_gate),
                             at(reduce_weight),
                             at(expand_weight),
                             at<float>(grad_reduce_weight),
                             at<float>(grad_reduce_bias),
                             at<float>(grad_expand_weight),
                             at<float>(grad_expand_bias),
                             at<float>(grad_pooled),
                             grad_hidden.data(),
                             workspace,
                             thread_count(threads)};
  launch(kernels_for(isa).excite_backward, args);
}

void gate(const std::string& isa, int64_t n, int64_t c, int64_t hw, bool is_bf16, Address x,
          Address gate, Address offset, Address y, int threads) {
  require(n >= 0 && c > 0 && hw >= 0, "gate: the sizes must be positive");
  GateArgs args = {{n, c, hw}, dtype_of(is_bf16),    at(x), at<float>(gate), at<float>(offset),
                   at(y),      thread_count(threads)};
  launch(kernels_for(isa).gate, args);
}

}  // namespace
}  // namespace effnet

PYBIND11_MODULE(_C, m) {
  using namespace effnet;
  m.doc() = "Kernels of effnet_fast; called through effnet_fast.ops.";
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const Isa& isa : instruction_sets()) names.push_back(isa.name);
        return names;
      },
      "Instruction sets in this build, in ascending order of preference.");
  m.def("best_isa", [] { return std::string(best_isa().name); });
  m.def(
      "isa_unavailable_reason",
      [](const std::string& name) -> py::object {
        const Isa* isa = find_isa(name);
        if (!isa) return py::str("instruction set '" + name + "' is not in this build");
        return isa->missing.empty() ? py::object(py::none()) : py::str(isa->missing);
      },
      "None where this CPU can run the instruction set, else the reason.");
  m.def(
      "running_calls", [] { return Share::calls().load(); },
      "Kernels that run at this moment, which share the cores.");
  m.def(
      "kept_bytes",
      [] {
        const int64_t floats = kernel_scratch().held() + partial_scratch().held();
        return floats * static_cast<int64_t>(sizeof(float));
      },
      "Bytes of scratch memory that this thread keeps for its next calls.");
  m.def("compiler", [] { return std::string("g++ " __VERSION__); });
#ifdef EFFNET_CUDA_ARCHS
  m.def("cuda_built", [] { return true; });
  m.def("cuda_archs", [] { return std::string(EFFNET_CUDA_ARCHS); });
  m.def("cuda_probe", &cuda::probe, py::arg("device") = 0);
  cuda::bind(m.def_submodule("cuda"));
#else
  m.def("cuda_built", [] { return false; });
  m.def("cuda_archs", [] { return std::string(); });
  m.def(
      "cuda_probe",
      [](int) {
        return std::string("this build has no CUDA part: nvcc was not found or EFFNET_FAST_CUDA=0");
      },
      py::arg("device") = 0);
#endif
  m.def("dwconv_eval", &dwconv_eval);
  m.def("dwconv_train", &dwconv_train);
  m.def("move_statistics", &move_statistics);
  m.def("dwconv_backward", &dwconv_backward);
  m.def("bn_act", &bn_act);
  m.def("squeeze", &squeeze);
  m.def("excite", &excite);
  m.def("excite_backward", &excite_backward);
  m.def("gate", &gate);
  bind_mbconv(m);
  bind_network(m);
  bind_stem(m);
  bind_watch(m);
}
