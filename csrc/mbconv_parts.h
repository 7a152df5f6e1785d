// What the bindings of MBConv's passes share: BatchNorm's vectors and folds of partial sums, in
// double.
#pragma once

#include <array>
#include <cmath>
#include <vector>

#include "binding_parts.h"
#include "common/mbconv_split.h"
#include "cpu/mbconv_args.h"

namespace effnet {
namespace {

NormVectors norm_vectors(Address norm, int64_t c) {
  if (!norm) return {nullptr, nullptr, nullptr, nullptr};
  const float* rows = at<float>(norm);
  return {rows, rows + c, rows + 2 * c, rows + 3 * c};
}

// Mean and variance of the moments (mean, M2, pivot) of `count(part)` values each, by Chan's
// formula in double.
template <typename Count>
void fold_moments(const float* partial, int64_t parts, int64_t c, const Count& count, double* mean,
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

// The norm of z from the moments of its tasks, `chunks` parts of each image's `rows` rows, or from
// the mean and variance given.
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
    fold_moments(partial, n * chunks, c, count, mean.data(), var.data());
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

// dz = scale * du + (z - mean) * slope + offset, from norm and sums over `count` values a channel.
struct GradParts {
  std::vector<float> values;
  GradVectors vectors;
  GradParts(Address norm, Address sums, int64_t c, int64_t count) : values(2 * c) {
    const NormVectors v = norm_vectors(norm, c);
    const float *bias = at<float>(sums), *weight = bias + c;
    for (int64_t i = 0; sums && i < c; i++) {
      const double scale = -static_cast<double>(v.scale[i]) / static_cast<double>(count);
      values[i] = static_cast<float>(scale * v.rstd[i] * weight[i]);
      values[c + i] = static_cast<float>(scale * bias[i]);
    }
    vectors = {v.scale, v.mean, values.data(), values.data() + c};
  }
};

// out [c] = the sums over parts of partial [parts,c].
void fold_sums(const float* partial, int64_t parts, int64_t c, float* out) {
  std::vector<double> sums(c);
  for (int64_t part = 0; part < parts; part++)
    for (int64_t i = 0; i < c; i++) sums[i] += partial[part * c + i];
  for (int64_t i = 0; i < c; i++) out[i] = static_cast<float>(sums[i]);
}

// Each out [N,C] = its factor * the sums over parts of its row of partial [N,parts,3,C].
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

}  // namespace
}  // namespace effnet
