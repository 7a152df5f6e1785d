// The stem's kernels against naive loops in double precision.
#pragma once

#include <string>

#include "common/stem_split.h"
#include "cpu/stem_args.h"
#include "mbconv.h"

namespace effnet {
namespace driver {

// Sizes as in StemConvShape, and whether x is in NCHW order; gaps of x are NaN.
struct StemProblem {
  StemConvShape s;
  DType dtype;
  int64_t strides[4];
  Tensor x, weight;

  StemProblem(const StemConvShape& shape, bool nchw, DType dtype, DType weight_dtype)
      : s(shape),
        dtype(dtype),
        strides{s.c * s.h * s.w + 3, nchw ? s.h * s.w : 1, nchw ? s.w : s.w * s.c, nchw ? 1 : s.c},
        x((s.n - 1) * strides[0] + s.c * s.h * s.w, dtype),
        weight(s.out * s.c * s.kh * s.kw, weight_dtype, -0.5, 0.5) {
    for (int64_t i = 0; i < s.n * s.c * s.h * s.w; i++)
      x.set(index(i / (s.c * s.h * s.w), i / (s.h * s.w) % s.c, i / s.w % s.h, i % s.w),
            uniform(-2, 2));
  }
  int64_t index(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return n * strides[0] + c * strides[1] + h * strides[2] + w * strides[3];
  }
  StemImage image() const { return {x.data(), strides[0], strides[1], strides[2], strides[3]}; }
  int64_t out_size() const { return s.n * s.oh * s.ow * s.out; }

  // Calls f(x index, weight index, output index) for every product of the convolution.
  template <typename F>
  void for_products(const F& f) const {
    for (int64_t pixel = 0; pixel < s.n * s.oh * s.ow; pixel++)
      for (int64_t tap = 0; tap < s.kh * s.kw; tap++) {
        const int64_t h = pixel / s.ow % s.oh * s.stride_h - s.pad_t + tap / s.kw;
        const int64_t w = pixel % s.ow * s.stride_w - s.pad_l + tap % s.kw;
        if (h < 0 || h >= s.h || w < 0 || w >= s.w) continue;
        for (int64_t c = 0; c < s.c; c++)
          for (int64_t o = 0; o < s.out; o++)
            f(index(pixel / (s.oh * s.ow), c, h, w), (o * s.c + c) * s.kh * s.kw + tap,
              pixel * s.out + o);
      }
  }
};

inline void test_stem_forward(const StemProblem& problem, const Norm& norm, bool activated,
                              int threads) {
  const StemConvShape& s = problem.s;
  const int64_t chunks = host::row_chunks(s.oh);
  Doubles exact(problem.out_size());
  problem.for_products([&](int64_t x, int64_t weight, int64_t out) {
    exact[out] += problem.x[x] * problem.weight[weight];
  });
  Tensor y(problem.out_size(), problem.dtype);
  Tensor partial(activated ? 0 : s.n * chunks * 3 * s.out);
  StemForwardArgs args = {s,
                          problem.dtype,
                          problem.weight.dtype(),
                          problem.image(),
                          problem.weight.data(),
                          activated ? norm.scale.floats() : nullptr,
                          activated ? norm.shift.floats() : nullptr,
                          y.data(),
                          activated ? nullptr : partial.floats(),
                          activation,
                          workspace,
                          threads};
  launch("stem_forward", kernels->stem_forward, args);
  for (int64_t i = 0; activated && i < y.size(); i++) exact[i] = act(norm.u(exact[i], i % s.out));
  expect(activated ? "y" : "z", y, exact);
  if (!activated) expect_moments(partial, y, chunks, s.oh, s.ow, s.out);
}

inline void test_stem_backward(const StemProblem& problem, const Norm& norm, bool by_batch,
                               int threads) {
  const StemConvShape& s = problem.s;
  const int64_t columns = kernels->mbconv->padded(s.out), depth = s.kh * s.kw * s.c;
  const int64_t tasks = host::stem_weight_tasks(s.n * s.oh, depth * columns);
  Tensor z(problem.out_size(), problem.dtype, -2, 2), grad_y(z.size(), problem.dtype, -1, 1);
  Tensor partial(tasks * depth * columns), grad(s.out * depth);
  StemBackwardArgs args = {s,
                           problem.dtype,
                           problem.image(),
                           grad_y.data(),
                           z.data(),
                           norm.shift.floats(),
                           norm.grads(by_batch),
                           partial.floats(),
                           activation,
                           workspace,
                           threads};
  launch("stem_backward", kernels->stem_backward, args);
  Doubles dz(z.size()), exact(grad.size()), sums(grad.size());
  for (int64_t i = 0; i < z.size(); i++) {
    const double du = grad_y[i] * act_slope(norm.u(z[i], i % s.out));
    dz[i] = norm.dz(du, z[i], i % s.out, by_batch);
  }
  problem.for_products(
      [&](int64_t x, int64_t weight, int64_t out) { exact[weight] += dz[out] * problem.x[x]; });
  const int64_t taps = s.kh * s.kw;
  for (int64_t task = 0; task < tasks; task++)
    for (int64_t i = 0; i < depth; i++)
      for (int64_t o = 0; o < s.out; o++)
        sums[(o * s.c + i % s.c) * taps + i / s.c] += partial[(task * depth + i) * columns + o];
  for (int64_t i = 0; i < grad.size(); i++) grad.set(i, sums[i]);
  expect("grad_weight", grad, exact);
}

// n, c, h, w, out, oh, ow, kh, kw, stride_h, stride_w, pad_l, pad_t
const StemConvShape kStems[] = {
    {2, 3, 9, 7, 21, 5, 4, 3, 3, 2, 2, 1, 1}, {1, 3, 8, 31, 32, 4, 16, 3, 3, 2, 2, 0, 0},
    {2, 1, 5, 6, 7, 5, 6, 5, 5, 1, 1, 2, 2},  {1, 4, 40, 3, 40, 20, 2, 7, 7, 2, 2, 3, 3},
    {2, 70, 2, 3, 5, 2, 3, 3, 3, 1, 1, 1, 1}, {1, 2, 3, 300, 9, 2, 150, 3, 3, 2, 2, 1, 1},
    {3, 3, 1, 1, 16, 1, 1, 3, 3, 2, 2, 1, 1}, {1, 3, 7, 8, 33, 3, 6, 2, 4, 3, 1, 0, 1},
};

inline void test_stem(DType dtype, DType weight_dtype, int threads) {
  for (const StemConvShape& s : kStems)
    for (bool nchw : {false, true}) {
      context = "stem " + std::to_string(s.n) + "x" + std::to_string(s.c) + "x" +
                std::to_string(s.h) + "x" + std::to_string(s.w) + " to " + std::to_string(s.out) +
                (dtype == DType::kFloat32 ? " fp32" : " bf16") + " on " + std::to_string(threads);
      const StemProblem problem(s, nchw, dtype, weight_dtype);
      const Norm norm(s.out);
      for (bool activated : {false, true}) test_stem_forward(problem, norm, activated, threads);
      test_stem_backward(problem, norm, nchw, threads);
    }
}

}  // namespace driver
}  // namespace effnet
