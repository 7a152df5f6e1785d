// The activations and gates that the CUDA kernels apply, and their slopes.
//
// Kernels in which it costs SiLU at most 2% of its instructions choose as they run:
// `with_activation` is one branch that every thread of a launch takes alike, outside of the loops
// over elements. The others are templates over the form; docs/decisions/cuda.md has the counts.
#pragma once

#include "common/activation.h"
#include "cuda/primitives.cuh"

namespace effnet {
namespace cuda {

// value(u) is a, slope(u) is da / du; add_value(u, sum) adds a to sum and returns da / du, with
// what they share formed once.
struct SiluForm {
  __device__ explicit SiluForm(const Activation&) {}
  __device__ __forceinline__ float value(float u) const { return silu(u); }
  __device__ __forceinline__ float slope(float u) const { return silu_grad(u); }
  __device__ __forceinline__ float add_value(float u, float& sum) const {
    const float s = sigmoid(u);
    sum = fmaf(u, s, sum);
    return silu_grad(u, s);
  }
};

// Of a NaN the value stays NaN and the slope is 1; at a bound the slope is 0. All as stock.
struct ClampForm {
  float lo, hi;
  __device__ explicit ClampForm(const Activation& a) : lo(a.lo), hi(a.hi) {}
  __device__ __forceinline__ float value(float u) const {
    u = u < lo ? lo : u;
    return u > hi ? hi : u;
  }
  __device__ __forceinline__ float slope(float u) const { return u <= lo || u >= hi ? 0.0f : 1.0f; }
  __device__ __forceinline__ float add_value(float u, float& sum) const {
    sum += value(u);
    return slope(u);
  }
};

// Of kernels that apply none.
struct NoForm {
  __device__ explicit NoForm(const Activation&) {}
};

// Calls body with the activation's form.
template <typename Body>
__device__ __forceinline__ void with_activation(const Activation& a, const Body& body) {
  if (a.kind == kSilu)
    body(SiluForm(a));
  else
    body(ClampForm(a));
}

// Of single elements.
__device__ __forceinline__ float activated(const Activation& a, float u) {
  return a.kind == kSilu ? silu(u) : ClampForm(a).value(u);
}
__device__ __forceinline__ float slope_of(const Activation& a, float u) {
  return a.kind == kSilu ? silu_grad(u) : ClampForm(a).slope(u);
}

__device__ __forceinline__ bool is_identity(const Activation& a) {
  return a.kind == kClamp && a.lo != a.lo && a.hi != a.hi;
}

// The gate of a logit: sigmoid, or clamp(u + 3, 0, 6) / 6.
__device__ __forceinline__ float gate_of(int kind, float u) {
  if (kind == kSigmoid) return sigmoid(u);
  return ClampForm({kClamp, 0.0f, 6.0f}).value(u + 3.0f) * (1.0f / 6.0f);
}
// The logit's gradient from the gate's, given the gate.
__device__ __forceinline__ float grad_through_gate(int kind, float grad, float gate) {
  if (kind == kSigmoid) return grad * gate * (1.0f - gate);
  return gate > 0.0f && gate < 1.0f ? grad * (1.0f / 6.0f) : 0.0f;
}

// Throws std::invalid_argument where no kernel has them.
inline void check_activation(const Activation& a) {
  if (a.kind != kSilu && a.kind != kClamp)
    throw std::invalid_argument("activation: the CUDA kernels have SiLU (0) and clamp (1)");
}
inline void check_gate(int kind) {
  if (kind != kSigmoid && kind != kHardSigmoid)
    throw std::invalid_argument("gate: the kernels have sigmoid (0) and hardsigmoid (1)");
}

}  // namespace cuda
}  // namespace effnet
