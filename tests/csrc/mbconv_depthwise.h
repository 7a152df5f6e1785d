// The depthwise passes of MBConv in training against naive loops in double precision.
#pragma once

#include "mbconv.h"
#include "problem.h"

namespace effnet {
namespace driver {

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

inline void test_depthwise(const Problem& problem, bool activated, Wanted wanted, int threads) {
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
  for (int64_t i = 0; i < x.size(); i++) a[i] = activated ? act(norm1.u(x[i], i % p.c)) : x[i];
  problem.for_products([&](int64_t at, int64_t weight, int64_t to) {
    exact[to] += a[index(at)] * problem.weight[weight];
  });
  Tensor z(out, dtype), partial(p.n * chunks * 3 * p.c);
  const NormVectors vectors = activated ? norm1.vectors() : NormVectors{};
  DepthwiseForwardArgs forward = {problem.shape(),
                                  dtype,
                                  problem.weight.dtype(),
                                  x.data(),
                                  vectors,
                                  problem.weight.data(),
                                  z.data(),
                                  wanted.data ? partial.floats() : nullptr,
                                  activation,
                                  workspace,
                                  threads};
  launch("depthwise_forward", kernels->mbconv->depthwise_forward, forward);
  expect("z", z, exact, 1);
  if (wanted.data) expect_moments(partial, z, chunks, problem.oh, problem.ow, p.c);
  const Tensor e(out, dtype, -1, 1), z2(out, dtype, -2, 2), gate(p.n * p.c, DType::kFloat32, 0, 1);
  const Tensor q(p.n * p.c, DType::kFloat32, -0.2, 0.2);
  Tensor f(x.size(), dtype), sums(p.n * chunks * 2 * p.c), taps(p.n * chunks * p.c * p.k * p.k);
  DepthwiseBackwardArgs args = {problem.shape(),
                                dtype,
                                problem.weight.dtype(),
                                e.data(),
                                z2.data(),
                                wanted.gate ? gate.floats() : nullptr,
                                wanted.gate ? q.floats() : nullptr,
                                norm2.shift.floats(),
                                norm2.grads(wanted.added),
                                x.data(),
                                vectors,
                                wanted.added ? residual.data() : nullptr,
                                problem.weight.data(),
                                wanted.data ? f.data() : nullptr,
                                activated && wanted.data ? sums.floats() : nullptr,
                                wanted.weight ? taps.floats() : nullptr,
                                activation,
                                workspace,
                                threads};
  launch("depthwise_backward", kernels->mbconv->depthwise_backward, args);
  Doubles da(x.size()), grad(p.c * p.k * p.k), sums_exact(2 * p.c);
  problem.for_products([&](int64_t at, int64_t weight, int64_t to) {
    const int64_t c = to % p.c, nc = to / (out / p.n) * p.c + c;
    const double da2 = wanted.gate ? e[to] * gate[nc] + q[nc] : e[to];
    const double du = da2 * act_slope(norm2.u(z2[to], c));
    const double dz = norm2.dz(du, z2[to], c, wanted.added);
    da[index(at)] += dz * problem.weight[weight];
    grad[weight] += dz * a[index(at)];
  });
  for (int64_t i = 0; i < x.size(); i++)
    da[i] = activated ? da[i] * act_slope(norm1.u(x[i], i % p.c))
                      : da[i] + (wanted.added ? residual[i] : 0);
  if (wanted.weight) expect("grad_weight", summed(taps, 1, p.n * chunks, p.c * p.k * p.k), grad, 4);
  if (!wanted.data) return;
  expect("f", f, da, 1);
  if (!activated) return;
  for (int64_t i = 0; i < x.size(); i++) {
    sums_exact[i % p.c] += f[i];
    sums_exact[p.c + i % p.c] += f[i] * norm1.zh(x[i], i % p.c);
  }
  expect("sums of f", summed(sums, 1, p.n * chunks, 2 * p.c), sums_exact, 4);
}

}  // namespace driver
}  // namespace effnet
