// NaN, infinities and zeros of either sign through activations, in every lane.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "harness.h"

namespace effnet {
namespace driver {

// A clamp returns what it is given or a bound, bit by bit, and a NaN of a NaN: a CPU's own minimum
// and maximum may return the bound then. SiLU and hard-swish keep NaN too.
inline void test_special_values() {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const float values[] = {kNan, 0.0f, -0.0f, kInf, -kInf, 1e-40f, -3.0f, 7.0f};
  constexpr int64_t kCount = 8, kChannels = 3 * 16 + 5;
  const Activation before = activation;
  for (const Activation& of : {Activation{kClamp, 0.0f, 6.0f}, kOtherActivations[0],
                               kOtherActivations[1], kOtherActivations[2], before}) {
    activation = of;
    context = "special values, activation " + std::to_string(of.kind);
    Tensor x(kCount * kChannels), y(kCount * kChannels), wrong(1), scale(kChannels),
        shift(kChannels);
    for (int64_t i = 0; i < kChannels; i++) scale.set(i, 1), shift.set(i, -0.0);  // keeps -0
    for (int64_t i = 0; i < x.size(); i++) x.floats()[i] = values[(i + i / kChannels) % kCount];
    AffineActArgs args = {
        {1, kChannels, kCount}, DType::kFloat32, x.data(),   nullptr, scale.floats(),
        shift.floats(),         y.data(),        activation, 1};
    launch("affine_act", kernels->affine_act, args);
    int64_t differing = 0;
    for (int64_t i = 0; i < x.size(); i++) {
      const float u = x.floats()[i], a = y.floats()[i];
      if (u != u)
        differing += a == a;
      else if (of.kind == kClamp)
        differing += a != act(u) || std::signbit(a) != std::signbit(static_cast<float>(act(u)));
    }
    wrong.set(0, static_cast<double>(differing));
    expect("values that differ", wrong, {0.0});
  }
  activation = before;
}

}  // namespace driver
}  // namespace effnet
