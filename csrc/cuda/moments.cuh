// Mean and sum of squared deviations of part of the values, merged by Chan's formula.
//
// Source: Chan, Golub, LeVeque 1983, "Algorithms for Computing the Sample Variance"
#pragma once

#include "cuda/primitives.cuh"

namespace effnet {
namespace cuda {

// The mean is that of value - pivot, the pivot being one of the values: a mean far from zero then
// costs no digits.
template <typename R>
struct MomentsOf {
  R count, pivot, mean, m2;
};
using Moments = MomentsOf<float>;

__device__ __forceinline__ float pivot_of(float value) {
  return value - value == 0.0f ? value : 0.0f;  // finite, or none
}

template <typename R>
__device__ __forceinline__ MomentsOf<R> merged(const MomentsOf<R>& a, const MomentsOf<R>& b) {
  if (b.count == R{0}) return a;
  if (a.count == R{0}) return b;
  const R count = a.count + b.count, share = b.count / count;
  const R mean = (b.pivot - a.pivot) + b.mean, delta = mean - a.mean;
  // Weighted, not a.mean + delta * share: an infinite mean stays so, as stock's does.
  return {count, a.pivot, mean * share + a.mean * (a.count / count),
          a.m2 + b.m2 + delta * delta * (a.count * share)};
}

}  // namespace cuda
}  // namespace effnet
