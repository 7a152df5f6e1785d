// The depthwise convolution with BatchNorm and SiLU, as Python calls it.
#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "bindings/bind.h"
#include "bindings/norms.h"
#include "cpu/isa_dispatch.h"

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

void dwconv_eval(const std::string& isa, const ShapeTuple& shape, bool is_bf16, bool weight_bf16,
                 Address x, const Strides& x_strides, Address weight, const BatchNorm& bn,
                 double eps, Address y, Address pooled, const ActivationTuple& activation,
                 int threads) {
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
                            activation_of(activation),
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
                            {},
                            workspace,
                            thread_count(threads)};
  launch(kernels.dwconv_forward, args);
  MergeMomentsArgs fold = {partial.data(), s.n,    chunks, s.c, s.oh, s.ow, at<float>(mean),
                           at<float>(var), threads};
  launch(kernels.merge_moments, fold);
}

// sums [2,C]: sum du and sum du * zh; they are formed where `training` or where their address is
// given. grad_x, grad_weight and sums may be 0: not wanted.
void dwconv_backward(const std::string& isa, const ShapeTuple& shape, bool is_bf16,
                     bool weight_bf16, Address x, const Strides& x_strides, Address z,
                     Address grad_y, Address weight, const BatchNorm& bn, double eps, bool training,
                     Address grad_x, Address grad_weight, Address sums,
                     const ActivationTuple& activation, int threads) {
  const Kernels& kernels = kernels_for(isa);
  const DwconvShape s = dwconv_shape(shape);
  const BnVectors vectors(bn, eps, s.c);
  const int64_t pixels = s.n * s.oh * s.ow;
  std::vector<float> totals(2 * s.c), means(2 * s.c);
  if (training || sums) {
    const int64_t chunks = pixel_chunks(pixels);
    const Partials partial(chunks * 2 * s.c);
    BnReduceArgs reduce = {{1, s.c, pixels},
                           dtype_of(is_bf16),
                           at(z),
                           at(grad_y),
                           vectors.scale.data(),
                           vectors.shift.data(),
                           at<float>(bn[2]),
                           vectors.rstd.data(),
                           partial.data(),
                           activation_of(activation),
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
                             activation_of(activation),
                             workspace,
                             thread_count(threads)};
  launch(kernels.dwconv_backward, args);
  if (!grad_weight) return;
  FoldArgs fold = {partial.data(), 1, parts, taps, 1.0f, at<float>(grad_weight), threads};
  launch(kernels.fold_sum, fold);
}

}  // namespace

void bind_dwconv(py::module_& m) {
  m.def("dwconv_eval", &dwconv_eval);
  m.def("dwconv_train", &dwconv_train);
  m.def("dwconv_backward", &dwconv_backward);
}

}  // namespace effnet
