// The passes of MBConv in training, as Python calls them. A norm is the address of fp32 [5,C], rows
// scale, shift, mean, rstd, var; sums [2,C] are sum du and sum du * zh; 0 stands for an absent
// tensor. See effnet_fast/ops/mbconv_training.py.
#include "bindings/mbconv.h"

#include <algorithm>

#include "bindings/bind.h"
#include "bindings/norms.h"
#include "cpu/isa_dispatch.h"

namespace effnet {

void mbconv_pointwise(const std::string& isa, const ProductShape& shape, bool is_bf16,
                      bool weight_bf16, Address x, Address x_norm, Address gate, Address weight,
                      const BatchNorm& bn, double eps, Address z, Address norm,
                      const ActivationTuple& activation, int threads) {
  require_positive(shape);
  require(!gate || x_norm, "mbconv_pointwise: a gate needs the norm of x");
  const auto [n, hw, c, out] = shape;
  const Isa& set = isa_for(isa);
  const Kernels& kernels = *set.kernels;
  const int64_t parts = host::pointwise_parts(hw);
  const Partials partial(bn[2] ? 0 : n * parts * 3 * out);  // statistics given: no moments
  PointwiseForwardArgs args = {n,
                               hw,
                               c,
                               out,
                               dtype_of(is_bf16),
                               dtype_of(weight_bf16),
                               at(x),
                               norm_vectors(x_norm, c),
                               at<float>(gate),
                               at(weight),
                               at(z),
                               partial.data(),
                               activation_of(activation),
                               workspace,
                               thread_count(threads),
                               set.amx};
  launch(kernels.mbconv->pointwise_forward, args);
  make_norm(at<float>(norm), partial.data(), n, parts, out, hw, 1, bn, eps);
}

// sums [3,N,C]; e or grad_weight may be 0: not wanted. The activation is z2's.
void mbconv_project_backward(const std::string& isa, const ProductShape& shape, bool is_bf16,
                             bool weight_bf16, Address grad_y, Address row_scale, Address z3,
                             Address norm3, Address sums3, Address weight, Address z2,
                             Address norm2, Address gate, Address e, Address sums,
                             Address grad_weight, const ActivationTuple& activation, int threads) {
  require_positive(shape);
  const auto [n, hw, c, out] = shape;
  const Isa& set = isa_for(isa);
  const Kernels& kernels = *set.kernels;
  const int64_t floats = kernels.mbconv->padded(out) * kernels.mbconv->padded(c);
  const host::WeightSplit split(n, hw, floats);
  const GradParts grad(norm3, sums3, out, n * hw);
  const int64_t sum_floats = e ? n * split.parts * 3 * c : 0;
  const Partials partial(sum_floats + (grad_weight ? split.tasks() * floats : 0));
  float* const weight_partial = grad_weight ? partial.data() + sum_floats : nullptr;
  ProjectBackwardArgs args = {n,
                              hw,
                              c,
                              out,
                              dtype_of(is_bf16),
                              dtype_of(weight_bf16),
                              at(grad_y),
                              at(z3),
                              at<float>(row_scale),
                              grad.vectors,
                              at(weight),
                              at(z2),
                              norm_vectors(norm2, c),
                              at<float>(gate),
                              at(e),
                              partial.data(),
                              weight_partial,
                              activation_of(activation),
                              workspace,
                              thread_count(threads),
                              set.amx};
  launch(kernels.mbconv->project_backward, args);
  if (e) {
    const float one[3] = {1.0f, 1.0f, 1.0f};
    float* const to = at<float>(sums);
    fold_per_image(partial.data(), n, split.parts, c, one, {to, to + n * c, to + 2 * n * c});
  }
  if (!grad_weight) return;
  FoldWeightArgs fold = {weight_partial, split.tasks(),          out,    c,
                         false,          at<float>(grad_weight), threads};
  launch(kernels.mbconv->fold_weight, fold);
}

namespace {

// The gradient f of u1: f [N,HW,out], or q [N,out] of which f = q * activation'(u1); the other is
// 0.
struct GradU {
  Address f, q;
  Activation activation;
};

// grad_x or grad_weight may be 0: not wanted. shape: (n, hw, channels of x, channels of z1).
void expand_backward(const std::string& isa, const ProductShape& shape, bool is_bf16,
                     bool weight_bf16, GradU of, Address z1, Address norm1, Address sums1,
                     Address weight, Address x, Address residual, Address grad_x,
                     Address grad_weight, int threads) {
  require_positive(shape);
  const auto [n, hw, c, out] = shape;
  const Isa& set = isa_for(isa);
  const Kernels& kernels = *set.kernels;
  const int64_t floats = kernels.mbconv->padded(out) * kernels.mbconv->padded(c);
  const host::WeightSplit split(n, hw, floats);
  const GradParts grad(norm1, sums1, out, n * hw);
  const Partials partial(grad_weight ? split.tasks() * floats : 0);
  ExpandBackwardArgs args = {n,
                             hw,
                             c,
                             out,
                             dtype_of(is_bf16),
                             dtype_of(weight_bf16),
                             at(of.f),
                             at(z1),
                             at<float>(of.q),
                             norm_vectors(norm1, out).shift,
                             grad.vectors,
                             at(weight),
                             at(x),
                             at(residual),
                             at(grad_x),
                             partial.data(),
                             of.activation,
                             workspace,
                             thread_count(threads),
                             set.amx};
  launch(kernels.mbconv->expand_backward, args);
  if (!grad_weight) return;
  FoldWeightArgs fold = {partial.data(), split.tasks(),          c,      out,
                         true,           at<float>(grad_weight), threads};
  launch(kernels.mbconv->fold_weight, fold);
}

}  // namespace

void mbconv_expand_backward(const std::string& isa, const ProductShape& shape, bool is_bf16,
                            bool weight_bf16, Address f, Address z1, Address norm1, Address sums1,
                            Address weight, Address x, Address residual, Address grad_x,
                            Address grad_weight, int threads) {
  expand_backward(isa, shape, is_bf16, weight_bf16, {f, 0, {}}, z1, norm1, sums1, weight, x,
                  residual, grad_x, grad_weight, threads);
}

void pointwise_bn_silu_pool_backward(const std::string& isa, const ProductShape& shape,
                                     bool is_bf16, bool weight_bf16, Address q, Address z,
                                     Address norm, Address sums, Address weight, Address x,
                                     Address grad_x, Address grad_weight,
                                     const ActivationTuple& activation, int threads) {
  expand_backward(isa, shape, is_bf16, weight_bf16, {0, q, activation_of(activation)}, z, norm,
                  sums, weight, x, 0, grad_x, grad_weight, threads);
}

void mbconv_depthwise(const std::string& isa, const ShapeTuple& shape, bool is_bf16,
                      bool weight_bf16, Address x, Address x_norm, Address weight,
                      const BatchNorm& bn, double eps, Address z, Address norm,
                      const ActivationTuple& activation, int threads) {
  const DwconvShape s = dwconv_shape(shape);
  const Kernels& kernels = kernels_for(isa);
  const int64_t chunks = host::depthwise_chunks(s.n, s.oh);
  const Partials partial(bn[2] ? 0 : s.n * chunks * 3 * s.c);  // statistics given: no moments
  DepthwiseForwardArgs args = {s,
                               dtype_of(is_bf16),
                               dtype_of(weight_bf16),
                               at(x),
                               norm_vectors(x_norm, s.c),
                               at(weight),
                               at(z),
                               partial.data(),
                               activation_of(activation),
                               workspace,
                               thread_count(threads)};
  launch(kernels.mbconv->depthwise_forward, args);
  make_norm(at<float>(norm), partial.data(), s.n, chunks, s.c, s.oh, s.ow, bn, eps);
}

// f, grad_weight may be 0: not wanted; sums [2,C] come with f where x_norm is given. gate and q are
// both 0 without squeeze-and-excite. The activation is both z2's and x's.
void mbconv_depthwise_backward(const std::string& isa, const ShapeTuple& shape, bool is_bf16,
                               bool weight_bf16, Address e, Address gate, Address q, Address z2,
                               Address norm2, Address sums2, Address x, Address x_norm,
                               Address residual, Address weight, Address f, Address grad_weight,
                               Address sums, const ActivationTuple& activation, int threads) {
  const DwconvShape s = dwconv_shape(shape);
  require(!gate == !q, "mbconv_depthwise_backward: gate and q come together");
  const Kernels& kernels = kernels_for(isa);
  const int64_t parts = s.n * host::depthwise_chunks(s.n, s.oh), taps = s.c * s.k * s.k;
  const GradParts grad(norm2, sums2, s.c, s.n * s.oh * s.ow);
  const int64_t sum_floats = sums ? parts * 2 * s.c : 0;
  const Partials partial(sum_floats + (grad_weight ? parts * taps : 0));
  float* const weight_partial = grad_weight ? partial.data() + sum_floats : nullptr;
  DepthwiseBackwardArgs args = {s,
                                dtype_of(is_bf16),
                                dtype_of(weight_bf16),
                                at(e),
                                at(z2),
                                at<float>(gate),
                                at<float>(q),
                                norm_vectors(norm2, s.c).shift,
                                grad.vectors,
                                at(x),
                                norm_vectors(x_norm, s.c),
                                at(residual),
                                at(weight),
                                at(f),
                                sums ? partial.data() : nullptr,
                                weight_partial,
                                activation_of(activation),
                                workspace,
                                thread_count(threads)};
  launch(kernels.mbconv->depthwise_backward, args);
  if (sums) fold_sums(partial.data(), parts, 2 * s.c, at<float>(sums));
  if (!grad_weight) return;
  FoldArgs fold = {weight_partial, 1, parts, taps, 1.0f, at<float>(grad_weight), threads};
  launch(kernels.fold_sum, fold);
}

// pooled [N,C]: means of a2; slopes [2,N,C]: the sums of act'(u2) and of act'(u2) * zh2.
void mbconv_squeeze(const std::string& isa, const PlaneTuple& shape, bool is_bf16, Address z,
                    Address norm, Address pooled, Address slopes, const ActivationTuple& activation,
                    int threads) {
  require_positive(shape);
  const auto [n, hw, c] = shape;
  const int64_t parts = host::pointwise_parts(hw);
  const Partials partial(n * parts * 3 * c);
  MBConvSqueezeArgs args = {n,
                            hw,
                            c,
                            dtype_of(is_bf16),
                            at(z),
                            norm_vectors(norm, c),
                            partial.data(),
                            activation_of(activation),
                            thread_count(threads)};
  launch(kernels_for(isa).mbconv->squeeze, args);
  const float factors[3] = {1.0f / static_cast<float>(hw), 1.0f, 1.0f};
  float* const to = at<float>(slopes);
  fold_per_image(partial.data(), n, parts, c, factors, {at<float>(pooled), to, to + n * c});
}

void mbconv_finish(const std::string& isa, const PlaneTuple& shape, bool is_bf16, Address z,
                   Address norm, Address row_scale, Address residual, Address y, int threads) {
  require_positive(shape);
  const auto [n, hw, c] = shape;
  MBConvFinishArgs args = {n,
                           hw,
                           c,
                           dtype_of(is_bf16),
                           at(z),
                           norm_vectors(norm, c),
                           at<float>(row_scale),
                           at(residual),
                           at(y),
                           nullptr,
                           nullptr,
                           thread_count(threads)};
  launch(kernels_for(isa).mbconv->finish, args);
}

// sums [2,C].
void mbconv_finish_backward(const std::string& isa, const PlaneTuple& shape, bool is_bf16,
                            Address grad_y, Address row_scale, Address z, Address norm,
                            Address sums, int threads) {
  require_positive(shape);
  const auto [n, hw, c] = shape;
  const Kernels& kernels = kernels_for(isa);
  const int64_t parts = host::pointwise_parts(hw);
  const Partials partial(n * parts * 2 * c);
  MBConvFinishArgs args = {n,
                           hw,
                           c,
                           dtype_of(is_bf16),
                           at(z),
                           norm_vectors(norm, c),
                           at<float>(row_scale),
                           nullptr,
                           nullptr,
                           at(grad_y),
                           partial.data(),
                           thread_count(threads)};
  launch(kernels.mbconv->finish_backward, args);
  fold_sums(partial.data(), n * parts, 2 * c, at<float>(sums));
}

// What excite's backward leaves: q = grad_pooled / pixels, in place, and
// sums2 [2,C] = sum over n of gate * sums[1 or 2] + q * slopes[0 or 1].
void mbconv_excite_sums(int64_t n, int64_t c, int64_t pixels, Address grad_pooled, Address gate,
                        Address sums, Address slopes, Address sums2) {
  require(n >= 0 && c > 0 && pixels > 0, "mbconv: every size must be positive");
  float *q = at<float>(grad_pooled), *out = at<float>(sums2);
  const float *g = at<float>(gate), *s = at<float>(sums), *t = at<float>(slopes);
  const float share = 1.0f / static_cast<float>(pixels);
  std::fill(out, out + 2 * c, 0.0f);
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = i * c; j < (i + 1) * c; j++) q[j] *= share;
    for (int64_t row = 0; row < 2; row++)
      for (int64_t j = 0; j < c; j++)
        out[row * c + j] +=
            g[i * c + j] * s[((row + 1) * n + i) * c + j] + q[i * c + j] * t[(row * n + i) * c + j];
  }
}

void bind_mbconv(py::module_& m) {
  m.def("mbconv_squeeze", &mbconv_squeeze);
  m.def("mbconv_finish", &mbconv_finish);
  m.def("mbconv_finish_backward", &mbconv_finish_backward);
  m.def("mbconv_excite_sums", &mbconv_excite_sums);
  m.def("mbconv_depthwise", &mbconv_depthwise);
  m.def("mbconv_depthwise_backward", &mbconv_depthwise_backward);
  m.def("mbconv_pointwise", &mbconv_pointwise);
  m.def("mbconv_project_backward", &mbconv_project_backward);
  m.def("mbconv_expand_backward", &mbconv_expand_backward);
  m.def("pointwise_bn_silu_pool_backward", &pointwise_bn_silu_pool_backward);
}

}  // namespace effnet
