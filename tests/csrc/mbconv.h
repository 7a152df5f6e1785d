// The passes of MBConv in training against naive loops in double precision.
#pragma once

#include "common/mbconv_split.h"
#include "cpu/mbconv_args.h"
#include "problem.h"

namespace effnet {
namespace driver {

// The vectors of one BatchNorm, and of its gradient.
struct Norm {
  Tensor scale, shift, mean, rstd, slope, offset;
  explicit Norm(int64_t c)
      : scale(c, DType::kFloat32, 0.5, 1.5),
        shift(c, DType::kFloat32, -0.5, 0.5),
        mean(c, DType::kFloat32, -0.5, 0.5),
        rstd(c, DType::kFloat32, 0.5, 1.5),
        slope(c, DType::kFloat32, -0.3, 0.3),
        offset(c, DType::kFloat32, -0.3, 0.3) {}
  NormVectors vectors() const {
    return {scale.floats(), shift.floats(), mean.floats(), rstd.floats()};
  }
  GradVectors grads() const {
    return {scale.floats(), mean.floats(), slope.floats(), offset.floats()};
  }
  double u(double z, int64_t i) const { return z * scale[i] + shift[i]; }
  double zh(double z, int64_t i) const { return (z - mean[i]) * rstd[i]; }
  double dz(double du, double z, int64_t i) const {
    return scale[i] * du + (z - mean[i]) * slope[i] + offset[i];
  }
};

struct Pixels {
  int64_t n, hw, c, out;
};

inline const Pixels kPixels[] = {{2, 5, 3, 7}, {1, 131, 19, 33}, {3, 16, 40, 5}, {2, 460, 34, 17}};

// z and its moments; activated and gated as the projection is, or plain as the expansion.
inline void test_pointwise_forward(const Pixels& p, DType dtype, bool activated, int threads) {
  const Tensor x(p.n * p.hw * p.c, dtype, -2, 2), weight(p.out * p.c, dtype, -0.5, 0.5);
  const Tensor gate(p.n * p.c, DType::kFloat32, 0, 1);
  const Norm norm(p.c);
  const int64_t parts = host::pointwise_parts(p.hw);
  Tensor z(p.n * p.hw * p.out, dtype), partial(p.n * parts * 3 * p.out);
  PointwiseForwardArgs args = {p.n,
                               p.hw,
                               p.c,
                               p.out,
                               dtype,
                               dtype,
                               x.data(),
                               activated ? norm.vectors() : NormVectors{},
                               activated ? gate.floats() : nullptr,
                               weight.data(),
                               z.data(),
                               partial.floats(),
                               workspace,
                               threads};
  launch("pointwise_forward", kernels->mbconv->pointwise_forward, args);
  Doubles exact(z.size());
  for (int64_t i = 0; i < p.n * p.hw; i++)
    for (int64_t o = 0; o < p.out; o++)
      for (int64_t c = 0; c < p.c; c++) {
        const double a =
            activated ? silu(norm.u(x[i * p.c + c], c)) * gate[i / p.hw * p.c + c] : x[i * p.c + c];
        exact[i * p.out + o] += a * weight[o * p.c + c];
      }
  expect("z", z, exact, 1);
  Tensor mean(p.n * parts * p.out), m2(p.n * parts * p.out);
  Doubles means(mean.size()), squares(mean.size());
  for (int64_t i = 0; i < mean.size(); i++) {
    const int64_t task = i / p.out, o = i % p.out, at = task * 3 * p.out + o;
    mean.set(i, partial[at] + partial[at + 2 * p.out]);
    m2.set(i, partial[at + p.out]);
    const host::Range own = host::part_of(p.hw, parts, task % parts);
    const auto value = [&](int64_t q) { return z[(task / parts * p.hw + q) * p.out + o]; };
    for (int64_t q = own.begin; q < own.end; q++) means[i] += value(q) / own.size();
    for (int64_t q = own.begin; q < own.end; q++)
      squares[i] += (value(q) - means[i]) * (value(q) - means[i]);
  }
  expect("mean of z", mean, means, 1);
  expect("M2 of z", m2, squares, 1);
}

// Folds partial weight gradients as the bindings do.
inline Tensor folded(const Tensor& partial, int64_t parts, int64_t rows, int64_t columns,
                     bool transposed, int threads) {
  Tensor out(rows * columns);
  FoldWeightArgs fold = {partial.floats(), parts, rows, columns, transposed, out.floats(), threads};
  launch("fold_weight", kernels->mbconv->fold_weight, fold);
  return out;
}

inline void test_project_backward(const Pixels& p, DType dtype, int threads) {
  const int64_t pixels = p.n * p.hw;
  const Tensor grad_y(pixels * p.out, dtype, -1, 1), z3(pixels * p.out, dtype, -2, 2);
  const Tensor z2(pixels * p.c, dtype, -2, 2), weight(p.out * p.c, dtype, -0.5, 0.5);
  const Tensor gate(p.n * p.c, DType::kFloat32, 0, 1), row_scale(p.n, DType::kFloat32, 0, 2);
  const Norm norm2(p.c), norm3(p.out);
  const int64_t floats = kernels->mbconv->padded(p.out) * kernels->mbconv->padded(p.c);
  const host::WeightSplit split(p.n, p.hw, floats);
  Tensor e(pixels * p.c, dtype), partial_sums(p.n * split.parts * 3 * p.c);
  Tensor partial(split.tasks() * floats);
  ProjectBackwardArgs args = {p.n,
                              p.hw,
                              p.c,
                              p.out,
                              dtype,
                              dtype,
                              grad_y.data(),
                              z3.data(),
                              row_scale.floats(),
                              norm3.grads(),
                              weight.data(),
                              z2.data(),
                              norm2.vectors(),
                              gate.floats(),
                              e.data(),
                              partial_sums.floats(),
                              partial.floats(),
                              workspace,
                              threads};
  launch("project_backward", kernels->mbconv->project_backward, args);
  Doubles exact(e.size()), grad(p.out * p.c), sums(3 * p.n * p.c);
  for (int64_t i = 0; i < pixels; i++)
    for (int64_t o = 0; o < p.out; o++) {
      const double du = grad_y[i * p.out + o] * row_scale[i / p.hw];
      const double dz = norm3.dz(du, z3[i * p.out + o], o);
      for (int64_t c = 0; c < p.c; c++) {
        exact[i * p.c + c] += dz * weight[o * p.c + c];
        grad[o * p.c + c] += dz * silu(norm2.u(z2[i * p.c + c], c)) * gate[i / p.hw * p.c + c];
      }
    }
  expect("e", e, exact, 1);
  expect("grad_weight", folded(partial, split.tasks(), p.out, p.c, false, threads), grad, p.hw);
  Tensor actual(sums.size());
  for (int64_t i = 0; i < pixels * p.c; i++) {
    const int64_t n = i / (p.hw * p.c), c = i % p.c;
    const double u = norm2.u(z2[i], c), term = e[i] * silu_grad(u);
    sums[n * p.c + c] += e[i] * silu(u);
    sums[(p.n + n) * p.c + c] += term;
    sums[(2 * p.n + n) * p.c + c] += term * norm2.zh(z2[i], c);
  }
  for (int64_t i = 0; i < actual.size(); i++) {
    const int64_t row = i / (p.n * p.c), n = i / p.c % p.n;
    double total = 0;
    for (int64_t part = 0; part < split.parts; part++)
      total += partial_sums[((n * split.parts + part) * 3 + row) * p.c + i % p.c];
    actual.set(i, total);
  }
  expect("sums of e", actual, sums, p.hw);
}

inline void test_expand_backward(const Pixels& p, DType dtype, int threads) {
  const int64_t pixels = p.n * p.hw;
  const Tensor f(pixels * p.out, dtype, -1, 1), z1(pixels * p.out, dtype, -2, 2);
  const Tensor x(pixels * p.c, dtype, -2, 2), weight(p.out * p.c, dtype, -0.5, 0.5);
  const Tensor residual(pixels * p.c, dtype, -1, 1);
  const Norm norm(p.out);
  const int64_t floats = kernels->mbconv->padded(p.out) * kernels->mbconv->padded(p.c);
  const host::WeightSplit split(p.n, p.hw, floats);
  Tensor grad_x(pixels * p.c, dtype), partial(split.tasks() * floats);
  ExpandBackwardArgs args = {p.n,           p.hw,
                             p.c,           p.out,
                             dtype,         dtype,
                             f.data(),      z1.data(),
                             norm.grads(),  weight.data(),
                             x.data(),      residual.data(),
                             grad_x.data(), partial.floats(),
                             workspace,     threads};
  launch("expand_backward", kernels->mbconv->expand_backward, args);
  Doubles exact(grad_x.size()), grad(p.out * p.c);
  for (int64_t i = 0; i < grad_x.size(); i++) exact[i] = residual[i];
  for (int64_t i = 0; i < pixels; i++)
    for (int64_t o = 0; o < p.out; o++) {
      const double dz = norm.dz(f[i * p.out + o], z1[i * p.out + o], o);
      for (int64_t c = 0; c < p.c; c++) {
        exact[i * p.c + c] += dz * weight[o * p.c + c];
        grad[o * p.c + c] += dz * x[i * p.c + c];
      }
    }
  expect("grad_x", grad_x, exact, 1);
  expect("grad_weight", folded(partial, split.tasks(), p.c, p.out, true, threads), grad, p.hw);
}

inline void test_elementwise(const Pixels& p, DType dtype, int threads) {
  const int64_t size = p.n * p.hw * p.c, parts = host::pointwise_parts(p.hw);
  const Tensor z(size, dtype, -2, 2), other(size, dtype, -1, 1);
  const Tensor row_scale(p.n, DType::kFloat32, 0, 2);
  const Norm norm(p.c);
  Tensor y(size, dtype), three(p.n * parts * 3 * p.c), two(p.n * parts * 2 * p.c);
  MBConvSqueezeArgs squeeze = {p.n,    p.hw, p.c, dtype, z.data(), norm.vectors(), three.floats(),
                               threads};
  launch("squeeze", kernels->mbconv->squeeze, squeeze);
  MBConvFinishArgs finish = {p.n,
                             p.hw,
                             p.c,
                             dtype,
                             z.data(),
                             norm.vectors(),
                             row_scale.floats(),
                             other.data(),
                             y.data(),
                             other.data(),
                             two.floats(),
                             threads};
  launch("finish", kernels->mbconv->finish, finish);
  launch("finish_backward", kernels->mbconv->finish_backward, finish);
  Doubles exact(size), three_exact(3 * p.c), two_exact(2 * p.c);
  for (int64_t i = 0; i < size; i++) {
    const int64_t c = i % p.c;
    const double u = norm.u(z[i], c), scale = row_scale[i / (p.hw * p.c)], zh = norm.zh(z[i], c);
    exact[i] = u * scale + other[i];
    three_exact[c] += silu(u);
    three_exact[p.c + c] += silu_grad(u);
    three_exact[2 * p.c + c] += silu_grad(u) * zh;
    two_exact[c] += other[i] * scale;
    two_exact[p.c + c] += other[i] * scale * zh;
  }
  const auto total = [&](const Tensor& partial, int64_t rows) {
    Tensor out(rows * p.c);
    for (int64_t i = 0; i < rows * p.c; i++) {
      double sum = 0;
      for (int64_t part = 0; part < p.n * parts; part++) sum += partial[part * rows * p.c + i];
      out.set(i, sum);
    }
    return out;
  };
  expect("y", y, exact, 1);
  expect("squeezed", total(three, 3), three_exact, p.hw);
  expect("sums of du", total(two, 2), two_exact, p.hw);
}

// Copies a problem's input, which has gaps, into a tensor without.
inline Tensor dense_input(const Problem& problem) {
  const Case& p = problem.p;
  Tensor x(p.n * p.h * p.w * p.c, problem.dtype);
  for (int64_t i = 0; i < x.size(); i++) {
    const int64_t at = i / p.c;
    x.set(i, problem.x[problem.x_index(at / (p.h * p.w), at / p.w % p.h, at % p.w) + i % p.c]);
  }
  return x;
}

inline void test_depthwise(const Problem& problem, bool activated, int threads) {
  const Case& p = problem.p;
  const DType dtype = problem.dtype;
  const Tensor x = dense_input(problem), residual(x.size(), dtype, -1, 1);
  const int64_t out = problem.out_size(), chunks = host::depthwise_chunks(p.n, problem.oh);
  const Norm norm1(p.c), norm2(p.c);
  const auto index = [&](int64_t at) {  // of the dense input
    const int64_t n = at / problem.image, h = at % problem.image / problem.row;
    const int64_t rest = at % problem.image % problem.row;
    return ((n * p.h + h) * p.w + rest / problem.pixel) * p.c + rest % problem.pixel;
  };
  Doubles a(x.size()), exact(out);
  for (int64_t i = 0; i < x.size(); i++) a[i] = activated ? silu(norm1.u(x[i], i % p.c)) : x[i];
  problem.for_products([&](int64_t at, int64_t weight, int64_t to) {
    exact[to] += a[index(at)] * problem.weight[weight];
  });
  Tensor z(out, dtype), partial(p.n * chunks * 3 * p.c);
  const NormVectors vectors = activated ? norm1.vectors() : NormVectors{};
  DepthwiseForwardArgs forward = {
      problem.shape(),       dtype,    problem.weight.dtype(), x.data(),  vectors,
      problem.weight.data(), z.data(), partial.floats(),       workspace, threads};
  launch("depthwise_forward", kernels->mbconv->depthwise_forward, forward);
  expect("z", z, exact, 1);
  const Tensor e(out, dtype, -1, 1), z2(out, dtype, -2, 2), gate(p.n * p.c, DType::kFloat32, 0, 1);
  const Tensor q(p.n * p.c, DType::kFloat32, -0.2, 0.2);
  Tensor f(x.size(), dtype), sums(p.n * chunks * 2 * p.c), taps(p.n * chunks * p.c * p.k * p.k);
  DepthwiseBackwardArgs args = {problem.shape(),
                                dtype,
                                problem.weight.dtype(),
                                e.data(),
                                z2.data(),
                                gate.floats(),
                                q.floats(),
                                norm2.shift.floats(),
                                norm2.grads(),
                                x.data(),
                                vectors,
                                residual.data(),
                                problem.weight.data(),
                                f.data(),
                                activated ? sums.floats() : nullptr,
                                taps.floats(),
                                workspace,
                                threads};
  launch("depthwise_backward", kernels->mbconv->depthwise_backward, args);
  Doubles da(x.size()), grad(p.c * p.k * p.k), sums_exact(2 * p.c);
  problem.for_products([&](int64_t at, int64_t weight, int64_t to) {
    const int64_t c = to % p.c, nc = to / (out / p.n) * p.c + c;
    const double du = (e[to] * gate[nc] + q[nc]) * silu_grad(norm2.u(z2[to], c));
    const double dz = norm2.dz(du, z2[to], c);
    da[index(at)] += dz * problem.weight[weight];
    grad[weight] += dz * a[index(at)];
  });
  for (int64_t i = 0; i < x.size(); i++)
    da[i] = activated ? da[i] * silu_grad(norm1.u(x[i], i % p.c)) : da[i] + residual[i];
  expect("f", f, da, 1);
  const auto total = [&](const Tensor& of, int64_t columns) {
    Tensor sum(columns);
    for (int64_t i = 0; i < columns; i++) {
      double value = 0;
      for (int64_t part = 0; part < p.n * chunks; part++) value += of[part * columns + i];
      sum.set(i, value);
    }
    return sum;
  };
  expect("grad_weight", total(taps, p.c * p.k * p.k), grad, 4);
  if (!activated) return;
  for (int64_t i = 0; i < x.size(); i++) {
    sums_exact[i % p.c] += f[i];
    sums_exact[p.c + i % p.c] += f[i] * norm1.zh(x[i], i % p.c);
  }
  expect("sums of f", total(sums, 2 * p.c), sums_exact, 4);
}

inline void test_mbconv(DType dtype, int threads) {
  for (const Pixels& p : kPixels) {
    context = "mbconv " + std::to_string(p.n) + "x" + std::to_string(p.hw) + "x" +
              std::to_string(p.c) + "x" + std::to_string(p.out);
    for (bool activated : {false, true}) test_pointwise_forward(p, dtype, activated, threads);
    test_project_backward(p, dtype, threads);
    test_expand_backward(p, dtype, threads);
    test_elementwise(p, dtype, threads);
  }
}

}  // namespace driver
}  // namespace effnet
