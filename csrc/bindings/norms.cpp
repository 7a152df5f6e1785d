// BatchNorm and folds of partial sums, and the ops on z and its norm, as Python calls them.
#include "bindings/norms.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "bindings/bind.h"
#include "cpu/isa_dispatch.h"

namespace effnet {

BnVectors::BnVectors(const BatchNorm& bn, double eps, int64_t c) : scale(c), shift(c), rstd(c) {
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

NormVectors norm_vectors(Address norm, int64_t c) {
  if (!norm) return {nullptr, nullptr, nullptr, nullptr};
  const float* rows = at<float>(norm);
  return {rows, rows + c, rows + 2 * c, rows + 3 * c};
}

namespace {

// Mean and variance of the moments (mean, M2, pivot) of `count(part)` values each, by Chan's
// formula in double.
template <typename Count>
void merge_moments(const float* partial, int64_t parts, int64_t c, const Count& count, double* mean,
                   double* var) {
  std::fill(mean, mean + c, 0.0);
  std::fill(var, var + c, 0.0);
  double total = 0.0;
  for (int64_t part = 0; part < parts; part++, partial += 3 * c) {
    const double more = static_cast<double>(count(part)), share = more / (total + more);
    for (int64_t i = 0; i < c; i++) {
      const double delta = static_cast<double>(partial[2 * c + i]) + partial[i] - mean[i];
      mean[i] += delta * share;
      var[i] += partial[c + i] + delta * delta * (share * total);
    }
    total += more;
  }
  for (int64_t i = 0; i < c; i++) var[i] /= total;
}

}  // namespace

void make_norm(float* norm, const float* partial, int64_t n, int64_t chunks, int64_t c,
               int64_t rows, int64_t columns, const BatchNorm& bn, double eps) {
  std::vector<double> mean(c), var(c);
  if (bn[2]) {
    std::copy(at<float>(bn[2]), at<float>(bn[2]) + c, mean.begin());
    std::copy(at<float>(bn[3]), at<float>(bn[3]) + c, var.begin());
  } else {
    const auto count = [&](int64_t part) {
      return host::part_of(rows, chunks, part % chunks).size() * columns;
    };
    merge_moments(partial, n * chunks, c, count, mean.data(), var.data());
  }
  const float *weight = at<float>(bn[0]), *bias = at<float>(bn[1]);
  for (int64_t i = 0; i < c; i++) {
    const double rstd = 1.0 / std::sqrt(var[i] + eps);
    const float scale = static_cast<float>((weight ? weight[i] : 1.0) * rstd);
    norm[i] = scale;
    norm[c + i] = static_cast<float>((bias ? bias[i] : 0.0) - mean[i] * scale);
    norm[2 * c + i] = static_cast<float>(mean[i]);
    norm[3 * c + i] = static_cast<float>(rstd);
    norm[4 * c + i] = static_cast<float>(var[i]);
  }
}

GradParts::GradParts(Address norm, Address sums, int64_t c, int64_t count) : values(2 * c) {
  const NormVectors v = norm_vectors(norm, c);
  const float *bias = at<float>(sums), *weight = bias + c;
  for (int64_t i = 0; sums && i < c; i++) {
    const double scale = -static_cast<double>(v.scale[i]) / static_cast<double>(count);
    values[i] = static_cast<float>(scale * v.rstd[i] * weight[i]);
    values[c + i] = static_cast<float>(scale * bias[i]);
  }
  vectors = {v.scale, v.mean, sums ? values.data() : nullptr, sums ? values.data() + c : nullptr};
}

void fold_sums(const float* partial, int64_t parts, int64_t c, float* out) {
  std::vector<double> sums(c);
  for (int64_t part = 0; part < parts; part++)
    for (int64_t i = 0; i < c; i++) sums[i] += partial[part * c + i];
  for (int64_t i = 0; i < c; i++) out[i] = static_cast<float>(sums[i]);
}

void fold_per_image(const float* partial, int64_t n, int64_t parts, int64_t c, const float* factors,
                    const std::array<float*, 3>& out) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t row = 0; row < 3; row++) {
      float* to = out[row] + i * c;
      const float* from = partial + (i * parts * 3 + row) * c;
      std::copy(from, from + c, to);
      for (int64_t part = 1; part < parts; part++)
        for (int64_t j = 0; j < c; j++) to[j] += from[part * 3 * c + j];
      for (int64_t j = 0; j < c; j++) to[j] *= factors[row];
    }
}

void move_statistics(int64_t c, Address mean, Address var, Address running_mean,
                     Address running_var, double correction, double momentum) {
  const float share = static_cast<float>(momentum), keep = static_cast<float>(1.0 - momentum);
  const float unbiased = static_cast<float>(correction);
  const float *new_mean = at<float>(mean), *new_var = at<float>(var);
  float *old_mean = at<float>(running_mean), *old_var = at<float>(running_var);
  for (int64_t i = 0; i < c; i++) old_mean[i] = keep * old_mean[i] + share * new_mean[i];
  for (int64_t i = 0; i < c; i++) old_var[i] = keep * old_var[i] + share * (unbiased * new_var[i]);
}

namespace {

// y = act(bn(z)) + residual over `pixels` rows of C; y may be z.
void bn_act(const std::string& isa, int64_t pixels, int64_t c, bool is_bf16, Address z,
            const BatchNorm& bn, double eps, Address residual, Address y,
            const ActivationTuple& activation, int threads) {
  require(pixels >= 0 && c > 0, "bn_act: the sizes must be positive");
  const BnVectors vectors(bn, eps, c);
  AffineActArgs args = {{1, c, pixels}, dtype_of(is_bf16),         at(z),
                        at(residual),   vectors.scale.data(),      vectors.shift.data(),
                        at(y),          activation_of(activation), thread_count(threads)};
  launch(kernels_for(isa).affine_act, args);
}

// y = act(z * scale + shift) over `pixels` rows of C.
void norm_silu(const std::string& isa, int64_t pixels, int64_t c, bool is_bf16, Address z,
               Address norm, Address y, const ActivationTuple& activation, int threads) {
  require(pixels > 0 && c > 0, "norm_silu: the sizes must be positive");
  const NormVectors vectors = norm_vectors(norm, c);
  AffineActArgs args = {{1, c, pixels},       dtype_of(is_bf16), at(z), nullptr,
                        vectors.scale,        vectors.shift,     at(y), activation_of(activation),
                        thread_count(threads)};
  launch(kernels_for(isa).affine_act, args);
}

// sums [2,C] of du = grad_y * act'(u) and of du * zh over `pixels` rows of C.
void norm_silu_sums(const std::string& isa, int64_t pixels, int64_t c, bool is_bf16, Address grad_y,
                    Address z, Address norm, Address sums, const ActivationTuple& activation,
                    int threads) {
  require(pixels > 0 && c > 0, "norm_silu_sums: the sizes must be positive");
  const NormVectors vectors = norm_vectors(norm, c);
  const int64_t chunks = host::pixel_chunks(pixels);
  const Partials partial(chunks * 2 * c);
  BnReduceArgs args = {{1, c, pixels},
                       dtype_of(is_bf16),
                       at(z),
                       at(grad_y),
                       vectors.scale,
                       vectors.shift,
                       vectors.mean,
                       vectors.rstd,
                       partial.data(),
                       activation_of(activation),
                       thread_count(threads)};
  launch(kernels_for(isa).bn_backward_reduce, args);
  fold_sums(partial.data(), chunks, 2 * c, at<float>(sums));
}

// The norm of z [n,hw,c], by its own statistics or by those of bn.
void norm_statistics(const std::string& isa, const PlaneTuple& shape, bool is_bf16, Address z,
                     const BatchNorm& bn, double eps, Address norm, int threads) {
  require_positive(shape);
  const auto [n, hw, c] = shape;
  const int64_t parts = host::pointwise_parts(hw);
  const Partials partial(bn[2] ? 0 : n * parts * 3 * c);
  MBConvMomentsArgs args = {
      n, hw, c, dtype_of(is_bf16), at(z), partial.data(), workspace, thread_count(threads)};
  if (!bn[2]) launch(kernels_for(isa).mbconv->moments, args);
  make_norm(at<float>(norm), partial.data(), n, parts, c, hw, 1, bn, eps);
}

// dz of z over `pixels` rows of C, grad_y that of act(u); sums are 0 where BatchNorm does not
// normalise by the batch.
void norm_silu_backward(const std::string& isa, int64_t pixels, int64_t c, bool is_bf16,
                        Address grad_y, Address z, Address norm, Address sums, Address dz,
                        const ActivationTuple& activation, int threads) {
  require(pixels > 0 && c > 0, "norm_silu_backward: the sizes must be positive");
  const GradParts grad(norm, sums, c, pixels);
  MBConvNormBackwardArgs args = {pixels,
                                 c,
                                 dtype_of(is_bf16),
                                 at(grad_y),
                                 at(z),
                                 norm_vectors(norm, c).shift,
                                 grad.vectors,
                                 at(dz),
                                 activation_of(activation),
                                 thread_count(threads)};
  launch(kernels_for(isa).mbconv->norm_backward, args);
}

}  // namespace

void bind_norms(py::module_& m) {
  m.def("move_statistics", &move_statistics);
  m.def("bn_act", &bn_act);
  m.def("norm_silu", &norm_silu);
  m.def("norm_silu_sums", &norm_silu_sums);
  m.def("norm_statistics", &norm_statistics);
  m.def("norm_silu_backward", &norm_silu_backward);
}

}  // namespace effnet
