// Mean and sum of squared deviations of part of the values, merged by Chan's formula.
//
// Source: Chan, Golub, LeVeque 1983, "Algorithms for Computing the Sample Variance"
#pragma once

#include "cuda/primitives.cuh"

namespace effnet {
namespace cuda {

// The mean is that of value - pivot, the pivot being one of the values: a mean far from zero then
// costs no digits.
struct Moments {
  float count, pivot, mean, m2;
};

__device__ __forceinline__ float pivot_of(float value) {
  return value - value == 0.0f ? value : 0.0f;  // finite, or none
}

__device__ __forceinline__ Moments merged(const Moments& a, const Moments& b) {
  if (b.count == 0.0f) return a;
  if (a.count == 0.0f) return b;
  const float count = a.count + b.count, share = b.count / count;
  const float mean = (b.pivot - a.pivot) + b.mean, delta = mean - a.mean;
  // Weighted, not a.mean + delta * share: an infinite mean stays so, as stock's does.
  return {count, a.pivot, fmaf(mean, share, a.mean * (a.count / count)),
          a.m2 + b.m2 + delta * delta * (a.count * share)};
}

}  // namespace cuda
}  // namespace effnet
