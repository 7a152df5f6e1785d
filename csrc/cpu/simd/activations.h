// Activations, their slopes and gates on vectors: a type for each kind, over which kernels are
// templates. with_activation chooses one, once per call.
//
// NaN, infinities and zeros as PyTorch has them: clamp keeps a NaN and -0, and has slope 1 at a
// NaN. gradient is that of u from that of a: the slope times it, but 0 where a does not depend on u
// even if it is infinite, as that of sqrt(a) at a = 0 is. Source: PyTorch's threshold_backward,
// hardtanh_backward, hardswish_backward, hardsigmoid_backward
#pragma once

#include "common/activation.h"
#include "cpu/simd/vec.h"

namespace effnet {
namespace EFFNET_ISA {

struct ValueAndSlope {  // a = activation(u) and d a / d u
  Vec value, slope;
};

struct Silu {
  EFFNET_INLINE explicit Silu(const Activation&) {}
  EFFNET_INLINE Vec value(Vec u) const { return silu(u); }
  EFFNET_INLINE Vec slope(Vec u) const { return silu_grad(u); }
  EFFNET_INLINE Vec gradient(Vec grad, Vec u) const { return grad * slope(u); }
  EFFNET_INLINE ValueAndSlope both(Vec u) const {
    const SiluAndSlope activated = silu_and_slope(u);
    return {activated.value, activated.slope};
  }
};

struct Clamp {
  Vec lo, hi;
  EFFNET_INLINE explicit Clamp(const Activation& of) : lo(splat(of.lo)), hi(splat(of.hi)) {}
  EFFNET_INLINE Vec value(Vec u) const {
    u = u < lo ? lo : u;
    return u > hi ? hi : u;
  }
  EFFNET_INLINE Vec slope(Vec u) const { return gradient(splat(1.0f), u); }
  EFFNET_INLINE Vec gradient(Vec grad, Vec u) const {
    const Vec above = u <= lo ? Vec{} : grad;
    return u >= hi ? Vec{} : above;
  }
  EFFNET_INLINE ValueAndSlope both(Vec u) const { return {value(u), slope(u)}; }
};

// clamp(u + 3, 0, 6), of which a sixth is hardsigmoid(u).
EFFNET_INLINE Vec six_hard_sigmoids(Vec u) {
  Vec shifted = u + 3.0f;
  shifted = shifted < 0.0f ? Vec{} : shifted;
  return shifted > 6.0f ? splat(6.0f) : shifted;
}

struct HardSwish {
  EFFNET_INLINE explicit HardSwish(const Activation&) {}
  EFFNET_INLINE Vec value(Vec u) const { return u * six_hard_sigmoids(u) / 6.0f; }
  EFFNET_INLINE Vec slope(Vec u) const { return gradient(splat(1.0f), u); }
  EFFNET_INLINE Vec gradient(Vec grad, Vec u) const {
    const Vec rising = u <= -3.0f ? Vec{} : grad * (u / 3.0f + 0.5f);
    return u >= 3.0f ? grad : rising;
  }
  EFFNET_INLINE ValueAndSlope both(Vec u) const { return {value(u), slope(u)}; }
};

// f.template operator()<A>() with the activation's type.
template <typename F>
EFFNET_INLINE auto with_activation(const Activation& of, const F& f) {
  switch (of.kind) {
    case kClamp:
      return f.template operator()<Clamp>();
    case kHardSwish:
      return f.template operator()<HardSwish>();
    default:
      return f.template operator()<Silu>();
  }
}

// Of the few values between the layers of squeeze-and-excite, the kind asked for each.
EFFNET_INLINE float activated(const Activation& of, float u) {
  return with_activation(of, [&]<typename A>() { return A(of).value(splat(u)); })[0];
}
EFFNET_INLINE float slope_of(const Activation& of, float u) {
  return with_activation(of, [&]<typename A>() { return A(of).slope(splat(u)); })[0];
}

EFFNET_INLINE Vec gate_value(int kind, Vec x) {
  return kind == kHardSigmoid ? six_hard_sigmoids(x) / 6.0f : sigmoid(x);
}
// The gradient of a gate's argument, from the gate.
EFFNET_INLINE float gate_grad(int kind, float grad, float gate) {
  if (kind == kHardSigmoid) return gate > 0.0f && gate < 1.0f ? grad / 6.0f : 0.0f;
  return grad * gate * (1.0f - gate);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
