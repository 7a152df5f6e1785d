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
#elif defined(EFFNET_NEON)
#include <arm_neon.h>
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
// Vector registers, by which tiles are cut.
#if defined(__AVX512F__) || defined(EFFNET_NEON)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
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
#define EFFNET_NOINLINE __attribute__((noinline))

EFFNET_INLINE Vec splat(float v) { return Vec{} + v; }
EFFNET_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
EFFNET_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }
// *p in every lane, by the load itself: splat(*p) takes a slot of the arithmetic units.
EFFNET_INLINE Vec broadcast(const float* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(*p);
#elif defined(__AVX2__)
  return (Vec)_mm256_broadcast_ss(p);
#elif defined(EFFNET_NEON)
  // A multiplication takes its factor from one lane: this is a load alone.
  const float v = *p;
  return Vec{v, v, v, v};
#else
  return splat(*p);
#endif
}

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

// Fetches VECTORS consecutive vectors into the L2 cache. A loop that visits several pixels channel
// by channel calls it for what its next visits read, in the order of addresses: the hardware's own
// fetching follows that order, while scattered loads wait for the few buffers of the L1 cache.
template <int VECTORS, typename T>
EFFNET_INLINE void fetch(const T* p) {
#pragma GCC unroll 16
  for (int i = 0; i < VECTORS; i++) __builtin_prefetch(p + i * kLanes, 0, 2);
}

// Keeps GCC from repeating v's load in every instruction that uses it.
EFFNET_INLINE Vec in_register(Vec v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#elif defined(EFFNET_NEON)
  __asm__("" : "+w"(v));
#endif
  return v;
}

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

// rows[i][j] <-> rows[j][i]: log2(kLanes) times, row i and row i + kLanes / 2 are interleaved.
EFFNET_INLINE void transpose(Vec* rows) {
  constexpr int kHalf = kLanes / 2;
  IVec low, high;
  for (int i = 0; i < kLanes; i++) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kHalf;
  }
#pragma GCC unroll 4
  for (int width = 1; width < kLanes; width *= 2) {
    Vec mixed[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; i++) {
      mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + kHalf], low);
      mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kHalf], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) rows[i] = mixed[i];
  }
}

// Whether an image [..][c] of these bytes is better stored past the caches: so large that nothing
// of it is left in the L2 cache when it is read, in whole cache lines. A plain store reads its line
// first.
template <typename T>
inline bool streams(const void* image, int64_t values, int64_t c) {
  constexpr int64_t kStreamBytes = 5 << 20;
  return kLanes == 16 && sizeof(T) == 4 && c % kLanes == 0 && values * 4 >= kStreamBytes &&
         reinterpret_cast<uintptr_t>(image) % 64 == 0;
}
// Like store_n, past the caches where `stream`; `end_streams` before other threads read.
template <typename T>
EFFNET_INLINE void store_n(T* p, Vec v, int64_t n, [[maybe_unused]] bool stream) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    if (stream) return _mm512_stream_ps(p, (__m512)v);
#endif
  store_n(p, v, n);
}
EFFNET_INLINE void end_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
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

// 1 / (1 + exp(-x)): 0 below about -88, as 1 / (1 + inf) is; of a NaN anything.
#if defined(__AVX512F__)
EFFNET_INLINE Vec logistic(Vec x) {
  // -x * log2(e) = n + f, n in sixteenths and |f| <= 1/32; exp(-x) = 2^floor(n) * table * 2^f.
  const __m512 table = {1.0f,           1.04427378243f, 1.09050773267f, 1.13878863476f,
                        1.18920711500f, 1.24185781207f, 1.29683955465f, 1.35425554693f,
                        1.41421356237f, 1.47682614594f, 1.54221082541f, 1.61049033195f,
                        1.68179283051f, 1.75625216037f, 1.83400808641f, 1.91520656140f};
  const __m512 high = _mm512_set1_ps(-1.44269504088896341f), one = _mm512_set1_ps(1.0f);
  // The constant's own error of 1.3e-8 would make the result too small by |x| times that.
  const __m512 low = _mm512_set1_ps(-1.92596299e-8f);
  const __m512 round = _mm512_set1_ps(786432.0f);  // 1.5 * 2^19: adding it rounds to sixteenths
  constexpr int kSmallerMagnitude = 2;             // with x's sign
  const __m512 v = _mm512_range_ps((__m512)x, _mm512_set1_ps(104.0f), kSmallerMagnitude);
  const __m512 rounded = _mm512_fmadd_ps(v, high, round), n = _mm512_sub_ps(rounded, round);
  const __m512 f = _mm512_fmadd_ps(v, low, _mm512_fmsub_ps(v, high, n));
  const __m512 power = _mm512_scalef_ps(_mm512_permutexvar_ps((__m512i)rounded, table), n);
  // Taylor's series, its term of degree 4 put on the one of degree 2: relative error 1.6e-9.
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(5.55041087e-02f), _mm512_set1_ps(2.40234288e-01f));
  p = _mm512_fmadd_ps(_mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147181e-01f)), f, one);
  const __m512 d = _mm512_fmadd_ps(power, p, one), guess = _mm512_rcp14_ps(d);
  const __m512 r = _mm512_fmadd_ps(guess, _mm512_fnmadd_ps(d, guess, one), guess);
  // The Newton step makes inf * 0 of d = inf: there the result is 0 (class 5, +inf, answer 8, +0).
  return (Vec)_mm512_fixupimm_ps(r, d, _mm512_set1_epi32(8 << 20), 0);
}
#else
// The smaller and the larger of two, of a NaN either: minimum and maximum as the CPU has them.
EFFNET_INLINE Vec smaller(Vec a, Vec b) {
#if defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(EFFNET_NEON)
  return (Vec)vminq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return a < b ? a : b;
#endif
}
EFFNET_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(EFFNET_NEON)
  return (Vec)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return a > b ? a : b;
#endif
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
constexpr float kMinusLog2E = -1.44269504088896341f;

// p * 2^n for p in (0.7, 1.5), `rounded` = n + kRound: n is added to the exponent. Beyond the
// largest float it is inf, with n = 128 at the most.
EFFNET_INLINE Vec scaled(Vec p, Vec rounded) {
  const IVec bits = (IVec)p + ((IVec)rounded << 23);
  [[maybe_unused]] constexpr int32_t kInf = 0x7f800000;
#if defined(__AVX2__)
  return (Vec)_mm256_min_epi32((__m256i)bits, _mm256_set1_epi32(kInf));
#elif defined(EFFNET_NEON)
  return (Vec)vminq_s32((int32x4_t)bits, vdupq_n_s32(kInf));
#else
  return (Vec)bits;  // the caller sees to it that p is 1 there
#endif
}

// exp(-x) has this argument: the result is 1 from 17.4 on, and exp(89) is inf.
EFFNET_INLINE Vec exp_argument(Vec x) { return larger(smaller(x, splat(87.0f)), splat(-89.0f)); }

EFFNET_INLINE Vec logistic(Vec x) {
  constexpr float kLog2EHigh = -1.4423828125f, kLog2ELow = -3.12228388896341e-4f;
  const Vec v = exp_argument(x);
  const Vec rounded = v * kMinusLog2E + kRound;  // n in [-126, 128]
  const Vec n = rounded - kRound;
  Vec f = (v * kLog2EHigh - n) + v * kLog2ELow;  // in two parts: there may be no FMA
#if !defined(__AVX2__) && !defined(EFFNET_NEON)
  f = v < -88.72f ? Vec{} : f;  // 2^128 comes out as inf
#endif
  // 2^f on [-0.5, 0.5], minimax of degree 6 (Lawson iteration), exactly 1 at 0: relative error
  // 2.0e-09.
  Vec p = splat(1.535336194e-04f);
  p = p * f + 1.339887440e-03f;
  p = p * f + 9.618437357e-03f;
  p = p * f + 5.550332471e-02f;
  p = p * f + 2.402264791e-01f;
  p = p * f + 6.931472029e-01f;
  p = p * f + 1.0f;
  return 1.0f / (1.0f + scaled(p, rounded));
}
#endif

EFFNET_INLINE Vec sigmoid(Vec x) { return x == x ? logistic(x) : x; }
EFFNET_INLINE Vec silu(Vec x) { return x * logistic(x); }

// a = silu(u) and d a / d u = s + a * (1 - s), s = sigmoid(u); of -inf both are NaN, of +inf the
// slope is, as in PyTorch.
struct SiluAndSlope {
  Vec value, slope;
};
EFFNET_INLINE SiluAndSlope silu_and_slope(Vec u) {
  const Vec s = logistic(u), a = u * s;
  return {a, s + a * (1.0f - s)};
}
EFFNET_INLINE Vec silu_grad(Vec u) { return silu_and_slope(u).slope; }

}  // namespace EFFNET_ISA
}  // namespace effnet
