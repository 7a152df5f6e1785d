// The passes of MBConv in training that filter nothing, against naive loops in double precision.
#pragma once

#include "common/mbconv_split.h"
#include "cpu/training/args.h"
#include "harness.h"

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
  // by_batch: whether the two means are subtracted.
  GradVectors grads(bool by_batch = true) const {
    return {scale.floats(), mean.floats(), by_batch ? slope.floats() : nullptr,
            by_batch ? offset.floats() : nullptr};
  }
  double u(double z, int64_t i) const { return z * scale[i] + shift[i]; }
  double zh(double z, int64_t i) const { return (z - mean[i]) * rstd[i]; }
  double dz(double du, double z, int64_t i, bool by_batch = true) const {
    return scale[i] * du + (by_batch ? (z - mean[i]) * slope[i] + offset[i] : 0);
  }
};

// An operand of a product as the kernels take it: bf16 pairs are rounded once.
inline double operand(double v, DType dtype) {
  const bool rounds = bf16_products && dtype == DType::kBFloat16;
  return rounds ? from_bf16(to_bf16(static_cast<float>(v))) : v;
}
// What one operand costs that is rounded the other way, its neighbour in double just as near.
inline double one_rounding(double product, DType dtype) {
  return bf16_products && dtype == DType::kBFloat16 ? tolerance_bf16 * product : 0;
}

inline Doubles values(const Tensor& of) {
  Doubles out(static_cast<size_t>(of.size()));
  for (int64_t i = 0; i < of.size(); i++) out[i] = of[i];
  return out;
}

// Moments (mean, M2, pivot) [N,parts,3,C] of z [N,rows,columns,C], of which a task has its part of
// an image's rows.
inline void expect_moments(const Tensor& partial, const Tensor& z, int64_t parts, int64_t rows,
                           int64_t columns, int64_t c) {
  Tensor mean(partial.size() / 3), m2(mean.size());
  Doubles means(mean.size()), squares(mean.size());
  for (int64_t i = 0; i < mean.size(); i++) {
    const int64_t task = i / c, o = i % c, at = task * 3 * c + o;
    mean.set(i, partial[at] + partial[at + 2 * c]);
    m2.set(i, partial[at + c]);
    const host::Range own = host::part_of(rows, parts, task % parts);
    const int64_t first = task / parts * rows + own.begin, count = own.size() * columns;
    const auto value = [&](int64_t q) { return z[(first * columns + q) * c + o]; };
    for (int64_t q = 0; q < count; q++) means[i] += value(q) / count;
    for (int64_t q = 0; q < count; q++) squares[i] += (value(q) - means[i]) * (value(q) - means[i]);
  }
  expect("mean of z", mean, means, 1);
  expect("M2 of z", m2, squares, 1);
}

// Sums over the parts of each image: [N,columns] of partial [N,parts,columns].
inline Tensor summed(const Tensor& partial, int64_t n, int64_t parts, int64_t columns) {
  Tensor out(n * columns);
  for (int64_t i = 0; i < out.size(); i++) {
    double sum = 0;
    for (int64_t part = 0; part < parts; part++)
      sum += partial[(i / columns * parts + part) * columns + i % columns];
    out.set(i, sum);
  }
  return out;
}

// What a caller may leave out: what is read besides and BatchNorm's two means, the data's result,
// the weight gradient, the gate.
struct Wanted {
  bool added, data, weight, gate;
};
inline const Wanted kEverything = {true, true, true, true};
inline const Wanted kWanted[] = {
    {false, true, false, true}, {false, false, true, true}, {true, true, true, false}};

struct Pixels {
  int64_t n, hw, c, out;
};

// Of bf16 pairs, whose weight gradients are summed when so many pixels are there.
inline const Pixels kManyPixels[] = {{1, 270, 1600, 20}, {1, 270, 20, 1600}};

// The last two cut K.
inline const Pixels kPixels[] = {{2, 5, 3, 7},     {1, 131, 19, 33},  {3, 16, 40, 5},
                                 {2, 460, 34, 17}, {1, 20, 300, 280}, {1, 18, 404, 24}};

// z and its moments; activated and perhaps gated as the projection is, or plain as the expansion.
inline void test_pointwise_forward(const Pixels& p, DType dtype, bool activated, bool gated,
                                   bool moments, int threads) {
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
                               gated ? gate.floats() : nullptr,
                               weight.data(),
                               z.data(),
                               moments ? partial.floats() : nullptr,
                               activation,
                               workspace,
                               threads,
                               amx};
  launch("pointwise_forward", kernels->mbconv->pointwise_forward, args);
  Doubles exact(z.size()), a = values(x);
  for (int64_t i = 0; activated && i < x.size(); i++)
    a[i] = operand(
        act(norm.u(a[i], i % p.c)) * (gated ? gate[i / (p.hw * p.c) * p.c + i % p.c] : 1), dtype);
  const Doubles w = values(weight);
  for (int64_t i = 0; i < p.n * p.hw; i++)
    for (int64_t o = 0; o < p.out; o++)
      for (int64_t c = 0; c < p.c; c++) exact[i * p.out + o] += a[i * p.c + c] * w[o * p.c + c];
  expect("z", z, exact, 1, one_rounding(2, dtype));
  if (moments) expect_moments(partial, z, parts, p.hw, 1, p.out);
}

// Folds partial weight gradients as the bindings do.
inline Tensor folded(const Tensor& partial, int64_t parts, int64_t rows, int64_t columns,
                     bool transposed, int threads) {
  Tensor out(rows * columns);
  FoldWeightArgs fold = {partial.floats(), parts, rows, columns, transposed, out.floats(), threads};
  launch("fold_weight", kernels->mbconv->fold_weight, fold);
  return out;
}

inline void test_project_backward(const Pixels& p, DType dtype, Wanted wanted, int threads) {
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
                              wanted.added ? row_scale.floats() : nullptr,
                              norm3.grads(wanted.added),
                              weight.data(),
                              z2.data(),
                              norm2.vectors(),
                              wanted.gate ? gate.floats() : nullptr,
                              wanted.data ? e.data() : nullptr,
                              partial_sums.floats(),
                              wanted.weight ? partial.floats() : nullptr,
                              activation,
                              workspace,
                              threads,
                              amx};
  launch("project_backward", kernels->mbconv->project_backward, args);
  Doubles exact(e.size()), grad(p.out * p.c), sums(3 * p.n * p.c), a = values(z2);
  const Doubles w = values(weight);
  for (int64_t i = 0; i < z2.size(); i++)
    a[i] = operand(
        act(norm2.u(a[i], i % p.c)) * (wanted.gate ? gate[i / (p.hw * p.c) * p.c + i % p.c] : 1),
        dtype);
  for (int64_t i = 0; i < pixels; i++)
    for (int64_t o = 0; o < p.out; o++) {
      const double du = grad_y[i * p.out + o] * (wanted.added ? row_scale[i / p.hw] : 1);
      const double dz = operand(norm3.dz(du, z3[i * p.out + o], o, wanted.added), dtype);
      for (int64_t c = 0; c < p.c; c++) {
        exact[i * p.c + c] += dz * w[o * p.c + c];
        grad[o * p.c + c] += dz * a[i * p.c + c];
      }
    }
  if (wanted.weight)
    expect("grad_weight", folded(partial, split.tasks(), p.out, p.c, false, threads), grad, p.hw,
           one_rounding(14, dtype));
  if (!wanted.data) return;
  expect("e", e, exact, 1, one_rounding(2, dtype));
  for (int64_t i = 0; i < pixels * p.c; i++) {
    const int64_t n = i / (p.hw * p.c), c = i % p.c;
    const double u = norm2.u(z2[i], c), term = e[i] * act_slope(u);
    sums[(3 * n) * p.c + c] += e[i] * act(u);
    sums[(3 * n + 1) * p.c + c] += term;
    sums[(3 * n + 2) * p.c + c] += term * norm2.zh(z2[i], c);
  }
  expect("sums of e", summed(partial_sums, p.n, split.parts, 3 * p.c), sums, p.hw);
}

// f as given, or q * act'(u1) as the head has it.
inline void test_expand_backward(const Pixels& p, DType dtype, Wanted wanted, bool pooled,
                                 int threads) {
  const int64_t pixels = p.n * p.hw;
  const Tensor f(pixels * p.out, dtype, -1, 1), z1(pixels * p.out, dtype, -2, 2);
  const Tensor q(p.n * p.out, DType::kFloat32, -1, 1);
  const Tensor x(pixels * p.c, dtype, -2, 2), weight(p.out * p.c, dtype, -0.5, 0.5);
  const Tensor residual(pixels * p.c, dtype, -1, 1);
  const Norm norm(p.out);
  const int64_t floats = kernels->mbconv->padded(p.out) * kernels->mbconv->padded(p.c);
  const host::WeightSplit split(p.n, p.hw, floats);
  Tensor grad_x(pixels * p.c, dtype), partial(split.tasks() * floats);
  ExpandBackwardArgs args = {p.n,
                             p.hw,
                             p.c,
                             p.out,
                             dtype,
                             dtype,
                             pooled ? nullptr : f.data(),
                             z1.data(),
                             pooled ? q.floats() : nullptr,
                             norm.shift.floats(),
                             norm.grads(wanted.added),
                             weight.data(),
                             x.data(),
                             wanted.added ? residual.data() : nullptr,
                             wanted.data ? grad_x.data() : nullptr,
                             wanted.weight ? partial.floats() : nullptr,
                             activation,
                             workspace,
                             threads,
                             amx};
  launch("expand_backward", kernels->mbconv->expand_backward, args);
  Doubles exact(grad_x.size()), grad(p.out * p.c);
  for (int64_t i = 0; wanted.added && i < grad_x.size(); i++) exact[i] = residual[i];
  const Doubles w = values(weight), of_x = values(x);
  for (int64_t i = 0; i < pixels; i++)
    for (int64_t o = 0; o < p.out; o++) {
      const double z = z1[i * p.out + o];
      const double du =
          pooled ? q[i / p.hw * p.out + o] * act_slope(norm.u(z, o)) : f[i * p.out + o];
      const double dz = operand(norm.dz(du, z, o, wanted.added), dtype);
      for (int64_t c = 0; c < p.c; c++) {
        exact[i * p.c + c] += dz * w[o * p.c + c];
        grad[o * p.c + c] += dz * of_x[i * p.c + c];
      }
    }
  if (wanted.data) expect("grad_x", grad_x, exact, 1, one_rounding(2, dtype));
  if (wanted.weight)
    expect("grad_weight", folded(partial, split.tasks(), p.c, p.out, true, threads), grad, p.hw,
           one_rounding(6, dtype));
}

inline void test_elementwise(const Pixels& p, DType dtype, bool added, int threads) {
  const int64_t size = p.n * p.hw * p.c, parts = host::pointwise_parts(p.hw);
  const Tensor z(size, dtype, -2, 2), other(size, dtype, -1, 1);
  const Tensor row_scale(p.n, DType::kFloat32, 0, 2);
  const Norm norm(p.c);
  Tensor y(size, dtype), three(p.n * parts * 3 * p.c), two(p.n * parts * 2 * p.c);
  MBConvSqueezeArgs squeeze = {
      p.n, p.hw, p.c, dtype, z.data(), norm.vectors(), three.floats(), activation, threads};
  launch("squeeze", kernels->mbconv->squeeze, squeeze);
  MBConvFinishArgs finish = {p.n,
                             p.hw,
                             p.c,
                             dtype,
                             z.data(),
                             norm.vectors(),
                             added ? row_scale.floats() : nullptr,
                             added ? other.data() : nullptr,
                             y.data(),
                             other.data(),
                             two.floats(),
                             threads};
  launch("finish", kernels->mbconv->finish, finish);
  launch("finish_backward", kernels->mbconv->finish_backward, finish);
  Doubles exact(size), three_exact(p.n * 3 * p.c), two_exact(p.n * 2 * p.c);
  for (int64_t i = 0; i < size; i++) {
    const int64_t n = i / (p.hw * p.c), c = i % p.c;
    const double u = norm.u(z[i], c), scale = added ? row_scale[n] : 1, zh = norm.zh(z[i], c);
    exact[i] = u * scale + (added ? other[i] : 0);
    double* const three_sums = three_exact.data() + n * 3 * p.c + c;
    three_sums[0] += act(u);
    three_sums[p.c] += act_slope(u);
    three_sums[2 * p.c] += act_slope(u) * zh;
    double* const two_sums = two_exact.data() + n * 2 * p.c + c;
    two_sums[0] += other[i] * scale;
    two_sums[p.c] += other[i] * scale * zh;
  }
  expect("y", y, exact, 1);
  expect("squeezed", summed(three, p.n, parts, 3 * p.c), three_exact, p.hw);
  expect("sums of du", summed(two, p.n, parts, 2 * p.c), two_exact, p.hw);
}

// Images so large that results go past the caches.
inline void test_streams(int threads) {
  context = "mbconv 1x14400x96";
  const DType dtype = DType::kFloat32;
  for (bool moments : {false, true})
    test_pointwise_forward({1, 14400, 4, 96}, dtype, false, false, moments, threads);
  test_project_backward({1, 14400, 96, 4}, dtype, kEverything, threads);
}

inline void test_many_pixels(int threads) {
  const DType dtype = DType::kBFloat16;
  for (const Pixels& p : kManyPixels) {
    context = "mbconv 1x270x" + std::to_string(p.c) + "x" + std::to_string(p.out);
    test_project_backward(p, dtype, kEverything, threads);
    test_expand_backward(p, dtype, kEverything, false, threads);
  }
}

inline void test_mbconv(DType dtype, int threads) {
  for (const Pixels& p : kPixels) {
    context = "mbconv " + std::to_string(p.n) + "x" + std::to_string(p.hw) + "x" +
              std::to_string(p.c) + "x" + std::to_string(p.out);
    for (bool moments : {false, true}) {
      test_pointwise_forward(p, dtype, false, false, moments, threads);
      test_pointwise_forward(p, dtype, true, true, moments, threads);
    }
    test_pointwise_forward(p, dtype, true, false, true, threads);
    test_project_backward(p, dtype, kEverything, threads);
    for (bool pooled : {false, true}) test_expand_backward(p, dtype, kEverything, pooled, threads);
    for (bool added : {false, true}) test_elementwise(p, dtype, added, threads);
    if (&p != kPixels) continue;
    for (const Wanted& wanted : kWanted) {
      test_project_backward(p, dtype, wanted, threads);
      for (bool pooled : {false, true}) test_expand_backward(p, dtype, wanted, pooled, threads);
    }
  }
}

}  // namespace driver
}  // namespace effnet
