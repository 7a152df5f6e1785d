// The two layers of squeeze-and-excite against naive loops in double precision.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/args.h"
#include "harness.h"

namespace effnet {
namespace driver {

// The two layers' inputs.
struct Excite {
  int64_t n, c, r;
  Tensor pooled, w1, b1, w2, b2, grad_gate;
  Excite(int64_t n, int64_t c, int64_t r, DType dtype)
      : n(n),
        c(c),
        r(r),
        pooled(n * c, DType::kFloat32, -1, 1),
        w1(r * c, dtype, -0.5, 0.5),
        b1(r, dtype, -1, 1),
        w2(c * r, dtype, -0.5, 0.5),
        b2(c, dtype, -1, 1),
        grad_gate(n * c, DType::kFloat32, -1, 1) {}
};

inline void test_excite(const Excite& e, bool bias, int threads) {
  context = "excite " + std::to_string(e.n) + "x" + std::to_string(e.c) + "x" + std::to_string(e.r);
  const int64_t n = e.n, c = e.c, r = e.r;
  Tensor hidden(n * r), gate(n * c);
  ExciteArgs args = {n,
                     c,
                     r,
                     e.w1.dtype(),
                     e.pooled.floats(),
                     e.w1.data(),
                     bias ? e.b1.data() : nullptr,
                     e.w2.data(),
                     bias ? e.b2.data() : nullptr,
                     hidden.floats(),
                     gate.floats(),
                     activation,
                     gate_kind,
                     workspace,
                     threads};
  launch("excite", kernels->excite, args);
  Doubles h(n * r), g(n * c), gh(n * r), gl(n * c);
  Doubles gp(n * c), gw1(r * c), gb1(r), gw2(c * r), gb2(c);
  for (int64_t b = 0; b < n; b++) {
    for (int64_t j = 0; j < r; j++) {
      h[b * r + j] = bias ? e.b1[j] : 0;
      for (int64_t i = 0; i < c; i++) h[b * r + j] += e.w1[j * c + i] * e.pooled[b * c + i];
    }
    for (int64_t i = 0; i < c; i++) {
      double logit = bias ? e.b2[i] : 0;
      for (int64_t j = 0; j < r; j++) logit += e.w2[i * r + j] * act(h[b * r + j]);
      g[b * c + i] = gate_of(logit);
      gl[b * c + i] = e.grad_gate[b * c + i] * gate_slope(g[b * c + i]);
      gb2[i] += gl[b * c + i];
      for (int64_t j = 0; j < r; j++) {
        gw2[i * r + j] += gl[b * c + i] * act(h[b * r + j]);
        gh[b * r + j] += gl[b * c + i] * e.w2[i * r + j] * act_slope(h[b * r + j]);
      }
    }
    for (int64_t j = 0; j < r; j++) {
      gb1[j] += gh[b * r + j];
      for (int64_t i = 0; i < c; i++) {
        gw1[j * c + i] += gh[b * r + j] * e.pooled[b * c + i];
        gp[b * c + i] += gh[b * r + j] * e.w1[j * c + i];
      }
    }
  }
  expect("hidden", hidden, h);
  expect("gate", gate, g);
  Tensor grad_w1(r * c), grad_b1(r), grad_w2(c * r), grad_b2(c), grad_pooled(n * c), scratch(n * r);
  ExciteBackwardArgs back = {n,
                             c,
                             r,
                             e.w1.dtype(),
                             e.pooled.floats(),
                             hidden.floats(),
                             gate.floats(),
                             e.grad_gate.floats(),
                             e.w1.data(),
                             e.w2.data(),
                             grad_w1.floats(),
                             grad_b1.floats(),
                             grad_w2.floats(),
                             grad_b2.floats(),
                             grad_pooled.floats(),
                             scratch.floats(),
                             activation,
                             gate_kind,
                             workspace,
                             threads};
  launch("excite_backward", kernels->excite_backward, back);
  expect("grad_se_reduce_weight", grad_w1, gw1);
  expect("grad_se_reduce_bias", grad_b1, gb1);
  expect("grad_se_expand_weight", grad_w2, gw2);
  expect("grad_se_expand_bias", grad_b2, gb2);
  expect("grad_pooled", grad_pooled, gp);
}

inline void test_excite(DType dtype, int threads) {
  for (bool bias : {false, true}) {
    test_excite(Excite(2, 5, 3, dtype), bias, threads);
    test_excite(Excite(3, 37, 19, dtype), bias, threads);
    test_excite(Excite(1, 200, 90, dtype), bias, threads);
  }
}

}  // namespace driver
}  // namespace effnet
