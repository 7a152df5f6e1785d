// The stem's passes, as Python calls them; norm and sums as in mbconv.cpp.
#include <array>
#include <string>
#include <vector>

#include "bindings/bind.h"
#include "bindings/norms.h"
#include "common/stem_split.h"
#include "cpu/isa_dispatch.h"
#include "cpu/stem_args.h"

namespace effnet {
namespace {

// (n, c, h, w, out, oh, ow, kh, kw, stride_h, stride_w, pad_left, pad_top)
using StemTuple = std::array<int64_t, 13>;
// Strides of x over n, c, h and w, in elements.
using StemStrides = std::array<int64_t, 4>;

StemConvShape stem_shape(const StemTuple& s) {
  const StemConvShape shape = {s[0], s[1], s[2], s[3],  s[4],  s[5], s[6],
                               s[7], s[8], s[9], s[10], s[11], s[12]};
  for (size_t i = 0; i < 11; i++) require(s[i] > 0, "stem: every size must be positive");
  require(shape.pad_l >= 0 && shape.pad_t >= 0, "stem: the padding must not be negative");
  return shape;
}

StemImage stem_image(Address x, const StemStrides& strides) {
  for (int64_t stride : strides) require(stride >= 0, "stem: a stride must not be negative");
  return {at(x), strides[0], strides[1], strides[2], strides[3]};
}

// z and its norm, by the batch's statistics where those of bn are 0.
void stem_conv(const std::string& isa, const StemTuple& shape, bool is_bf16, bool weight_bf16,
               Address x, const StemStrides& x_strides, Address weight, const BatchNorm& bn,
               double eps, Address z, Address norm, int threads) {
  const StemConvShape s = stem_shape(shape);
  const int64_t chunks = host::row_chunks(s.oh);
  const Partials partial(bn[2] ? 0 : s.n * chunks * 3 * s.out);
  StemForwardArgs args = {s,
                          dtype_of(is_bf16),
                          dtype_of(weight_bf16),
                          stem_image(x, x_strides),
                          at(weight),
                          nullptr,
                          nullptr,
                          at(z),
                          partial.data(),
                          {},
                          workspace,
                          thread_count(threads)};
  launch(kernels_for(isa).stem_forward, args);
  make_norm(at<float>(norm), partial.data(), s.n, chunks, s.out, s.oh, s.ow, bn, eps);
}

void stem_eval(const std::string& isa, const StemTuple& shape, bool is_bf16, bool weight_bf16,
               Address x, const StemStrides& x_strides, Address weight, const BatchNorm& bn,
               double eps, Address y, const ActivationTuple& activation, int threads) {
  const StemConvShape s = stem_shape(shape);
  require(bn[2] && bn[3], "stem: inference needs mean and variance");
  std::vector<float> norm(5 * s.out);
  make_norm(norm.data(), nullptr, 0, 0, s.out, 0, 0, bn, eps);
  StemForwardArgs args = {s,
                          dtype_of(is_bf16),
                          dtype_of(weight_bf16),
                          stem_image(x, x_strides),
                          at(weight),
                          norm.data(),
                          norm.data() + s.out,
                          at(y),
                          nullptr,
                          activation_of(activation),
                          workspace,
                          thread_count(threads)};
  launch(kernels_for(isa).stem_forward, args);
}

// grad_weight [out,C,Kh,Kw] in fp32; sums are 0 where BatchNorm does not normalise by the batch.
void stem_weight_backward(const std::string& isa, const StemTuple& shape, bool is_bf16,
                          Address grad_y, Address z, Address norm, Address sums, Address x,
                          const StemStrides& x_strides, Address grad_weight,
                          const ActivationTuple& activation, int threads) {
  const StemConvShape s = stem_shape(shape);
  const Kernels& kernels = kernels_for(isa);
  const int64_t columns = kernels.mbconv->padded(s.out), taps = s.kh * s.kw;
  const int64_t floats = taps * s.c * columns;
  const int64_t tasks = host::stem_weight_tasks(s.n * s.oh, floats);
  const GradParts grad(norm, sums, s.out, s.n * s.oh * s.ow);
  const Partials partial(tasks * floats);
  StemBackwardArgs args = {s,
                           dtype_of(is_bf16),
                           stem_image(x, x_strides),
                           at(grad_y),
                           at(z),
                           norm_vectors(norm, s.out).shift,
                           grad.vectors,
                           partial.data(),
                           activation_of(activation),
                           workspace,
                           thread_count(threads)};
  launch(kernels.stem_backward, args);
  std::vector<float> sum(floats);
  fold_sums(partial.data(), tasks, floats, sum.data());
  float* const out = at<float>(grad_weight);
  for (int64_t i = 0; i < taps * s.c; i++)
    for (int64_t o = 0; o < s.out; o++)
      out[(o * s.c + i % s.c) * taps + i / s.c] = sum[i * columns + o];
}

}  // namespace

void bind_stem(py::module_& m) {
  m.def("stem_conv", &stem_conv);
  m.def("stem_eval", &stem_eval);
  m.def("stem_weight_backward", &stem_weight_backward);
}

}  // namespace effnet
