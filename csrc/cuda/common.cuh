// What several kernels share: small arithmetic, activations, and BatchNorm as the kernels apply it.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/args.h"
#include "cuda/primitives.cuh"

namespace effnet {
namespace cuda {

template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements of 16 bytes

EFFNET_HD inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline bool aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

__device__ inline float weight_at(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return load(static_cast<const float*>(p) + i);
  if (dtype == DType::kFloat16) return to_float(static_cast<const __half*>(p)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
}

struct Affine {
  float scale, shift, mean, rstd;
};

// BatchNorm of channel c as z * scale + shift.
__device__ inline Affine affine_of(const BatchNorm& bn, int64_t c) {
  Affine a;
  a.mean = weight_at(bn.mean, bn.stats_dtype, c);
  a.rstd = 1.0f / sqrtf(weight_at(bn.var, bn.stats_dtype, c) + bn.eps);
  a.scale = bn.weight ? weight_at(bn.weight, bn.dtype, c) * a.rstd : a.rstd;
  a.shift = -a.mean * a.scale;
  if (bn.bias) a.shift += weight_at(bn.bias, bn.dtype, c);
  return a;
}

}  // namespace cuda
}  // namespace effnet
