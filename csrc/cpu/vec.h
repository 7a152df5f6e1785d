// One SIMD register of floats for the instruction set that this object is compiled for, and the
// epilogue maths on it. Everything lives in namespace effnet::<isa>, so that the linker cannot
// merge AVX-512 code into the path that an older machine takes.
#pragma once

#ifndef EFFNET_ISA
#error "compile with -DEFFNET_ISA=<instruction set>"
#endif
#define EFFNET_NAMESPACE EFFNET_ISA

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/geometry.h"

namespace effnet {
namespace EFFNET_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float VecU __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2)));
typedef uint16_t HVecU __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

#define EFFNET_INLINE inline __attribute__((always_inline))

EFFNET_INLINE Vec splat(float v) { return Vec{} + v; }
EFFNET_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
EFFNET_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }

EFFNET_INLINE Vec widen(HVec h) { return (Vec)(__builtin_convertvector(h, UVec) << 16); }
EFFNET_INLINE Vec load(const bf16* p) { return widen((HVec) * reinterpret_cast<const HVecU*>(p)); }
// Round to nearest even; a NaN stays one.
EFFNET_INLINE HVec narrow(Vec v) {
#if defined(__AVX512BF16__)
  return (HVec)_mm512_cvtneps_pbh((__m512)v);
#else
  UVec u = (UVec)v;
  UVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  UVec quiet = (u >> 16) | 0x40u;
  UVec nan = (UVec)(v != v);
  return __builtin_convertvector((nan & quiet) | (~nan & rounded), HVec);
#endif
}
EFFNET_INLINE void store(bf16* p, Vec v) { *reinterpret_cast<HVecU*>(p) = narrow(v); }

// The first n lanes, n in [1, kLanes]; lanes beyond are 0 on load and untouched on store.
template <typename T>
EFFNET_INLINE Vec load_n(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  else
    return widen((HVec)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
#else
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < n; i++) buffer[i] = p[i];
  return load(buffer);
#endif
}
template <typename T>
EFFNET_INLINE void store_n(T* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
  else
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)narrow(v));
#else
  T buffer[kLanes];
  store(buffer, v);
  for (int64_t i = 0; i < n; i++) p[i] = buffer[i];
#endif
}
// The value that a store of type T keeps.
template <typename T>
EFFNET_INLINE Vec as_stored(Vec v) {
  return v;
}
template <>
EFFNET_INLINE Vec as_stored<bf16>(Vec v) {
  return widen(narrow(v));
}

EFFNET_INLINE float load_scalar(const void* p, bool is_bf16, int64_t i) {
  if (!is_bf16) return static_cast<const float*>(p)[i];
  uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Sum of the lanes in a fixed order.
EFFNET_INLINE float sum_lanes(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

// 2^f on [-0.5, 0.5], minimax of degree 6 (Lawson iteration), exactly 1 at 0: relative
// error 2.0e-09.
EFFNET_INLINE Vec exp2_fraction(Vec f) {
  Vec p = splat(1.535336194e-04f);
  p = p * f + 1.339887440e-03f;
  p = p * f + 9.618437357e-03f;
  p = p * f + 5.550332471e-02f;
  p = p * f + 2.402264791e-01f;
  p = p * f + 6.931472029e-01f;
  return p * f + 1.0f;
}

// 1 / (1 + exp(-x)): 0 below about -88, as 1 / (1 + inf) is; NaN stays NaN.
EFFNET_INLINE Vec sigmoid(Vec x) {
  constexpr float kMinusLog2E = -1.44269504088896341f;
  constexpr float kLimit = 104.0f;  // exp(104) is inf
#if defined(__AVX512F__)
  __m512 c = _mm512_set1_ps(kMinusLog2E);
  // max and min give their second operand where the other is NaN.
  __m512 v = _mm512_max_ps(_mm512_set1_ps(-kLimit), (__m512)x);
  v = _mm512_min_ps(_mm512_set1_ps(kLimit), v);
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, c), _MM_FROUND_TO_NEAREST_INT);
  // The constant's own error of 1.3e-8 would make the result too small by |x| times that.
  __m512 low = _mm512_set1_ps(-1.92596299e-8f);
  Vec f = (Vec)_mm512_fmadd_ps(v, low, _mm512_fmsub_ps(v, c, n));
  __m512 d = _mm512_add_ps(_mm512_scalef_ps((__m512)exp2_fraction(f), n), _mm512_set1_ps(1.0f));
  __m512 r = _mm512_rcp14_ps(d);
  __m512 error = _mm512_fnmadd_ps(d, r, _mm512_set1_ps(1.0f));
  r = _mm512_fmadd_ps(r, error, r);
  // The Newton step makes inf * 0 of d = inf: there the result is 0 (class 5, +inf, answer 8, +0).
  return (Vec)_mm512_fixupimm_ps(r, d, _mm512_set1_epi32(8 << 20), 0);
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLog2EHigh = -1.4423828125f, kLog2ELow = -3.12228388896341e-4f;
  Vec v = x < kLimit ? x : splat(kLimit);
  v = v > -kLimit ? v : splat(-kLimit);
  Vec n = (v * kMinusLog2E + kRound) - kRound;
  n = n < 128.0f ? n : splat(128.0f);  // 2^128 comes out as inf below
  n = n > -126.0f ? n : splat(-126.0f);
  Vec f = (v * kLog2EHigh - n) + v * kLog2ELow;  // in two parts: there may be no FMA
  f = v < -88.0f ? Vec{} : f;
  IVec exponent = __builtin_convertvector(n, IVec) << 23;
  Vec e = (Vec)((IVec)exp2_fraction(f) + exponent);
  Vec s = 1.0f / (1.0f + e);
  return x == x ? s : x;
#endif
}

EFFNET_INLINE Vec silu(Vec x) { return x * sigmoid(x); }
// d silu(u) / du = s * (1 + u * (1 - s)), s = sigmoid(u)
EFFNET_INLINE Vec silu_grad(Vec u) {
  Vec s = sigmoid(u);
  return s * (1.0f + u * (1.0f - s));
}

}  // namespace EFFNET_ISA
}  // namespace effnet
