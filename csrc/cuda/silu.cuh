// SiLU, x * sigmoid(x), and its derivative: epilogue maths of the CUDA kernels.
//
// Included by cuda/primitives.cuh alone, which has defined exp2_approx and rcp_approx.
#pragma once

namespace effnet {
namespace cuda {

// NaN at -inf times 0 and at NaN, as stock's x / (1 + exp(-x)).
__device__ inline float sigmoid(float u) {
  return rcp_approx(1.0f + exp2_approx(-1.442695040888963407f * u));
}

__device__ inline float silu(float u) { return u * sigmoid(u); }

// d silu(u) / du, given s = sigmoid(u).
__device__ inline float silu_grad(float u, float s) { return s * (1.0f + u * (1.0f - s)); }
__device__ inline float silu_grad(float u) { return silu_grad(u, sigmoid(u)); }

}  // namespace cuda
}  // namespace effnet
