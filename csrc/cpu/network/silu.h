// Activations of values that are kept as T, for the inference kernels.
//
// SiLU has a form of its own for each T with AVX-512, for fp32 with AVX2 and NEON. Its relative
// error against float64 with AVX-512: fp32 within 3 ulp for |x| < 10 and 11 up to 80, where the
// result nears 0 or x; bf16 within 1.3e-4 before it is rounded, a fifteenth of its last digit. All
// make NaN of -inf, as x / (1 + exp(-x)) does. docs/reliability.md has all errors.
#pragma once

#include "cpu/simd/activations.h"

#include <type_traits>

namespace effnet {
namespace EFFNET_ISA {

#if defined(__AVX512F__)

// 2^(i / 32), as the two halves of a table of 32.
constexpr float kRoots[32] = {
    1.0f,           1.02189714865f, 1.04427378243f, 1.06714040068f, 1.09050773267f, 1.11438674260f,
    1.13878863476f, 1.16372485877f, 1.18920711500f, 1.21524735998f, 1.24185781207f, 1.26905095720f,
    1.29683955465f, 1.32523664316f, 1.35425554693f, 1.38390988196f, 1.41421356237f, 1.44518080698f,
    1.47682614594f, 1.50916442759f, 1.54221082541f, 1.57598084511f, 1.61049033195f, 1.64575547816f,
    1.68179283051f, 1.71861929812f, 1.75625216037f, 1.79470907500f, 1.83400808641f, 1.87416763411f,
    1.91520656140f, 1.95714412418f};

template <typename T>
EFFNET_INLINE Vec silu_as(Vec x) {
  const __m512 log2e = _mm512_set1_ps(-1.44269504088896341f), one = _mm512_set1_ps(1.0f);
  if constexpr (sizeof(T) == 2) {
    // exp(-x) = 2^t, t = floor + f: a cubic in f, relative error 8.6e-5; the guess errs by 6e-5.
    constexpr int kFloor = 1;
    const __m512 t = _mm512_mul_ps((__m512)x, log2e), f = _mm512_reduce_ps(t, kFloor);
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.07706706f), _mm512_set1_ps(0.22764498f));
    p = _mm512_fmadd_ps(_mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69511679f)), f, one);
    return x * (Vec)_mm512_rcp14_ps(_mm512_add_ps(_mm512_scalef_ps(p, t), one));
  } else {
    // exp(-x) = 2^n * 2^f, n in 32nds and |f| <= 1/64: a table and a parabola, relative error
    // 5.3e-8. Beyond +-104 exp(-x) is inf or 0 whatever x is.
    const __m512 round = _mm512_set1_ps(393216.0f);  // 1.5 * 2^18: adding it rounds to 32nds
    constexpr int kSmallerMagnitude = 2;             // with x's sign
    const __m512 v = _mm512_range_ps((__m512)x, _mm512_set1_ps(104.0f), kSmallerMagnitude);
    const __m512 rounded = _mm512_fmadd_ps(v, log2e, round), n = _mm512_sub_ps(rounded, round);
    const __m512 f = _mm512_fmsub_ps(v, log2e, n);
    const __m512 root = _mm512_permutex2var_ps(_mm512_loadu_ps(kRoots), (__m512i)rounded,
                                               _mm512_loadu_ps(kRoots + 16));
    const __m512 power = _mm512_scalef_ps(root, n);
    const __m512 p = _mm512_fmadd_ps(
        _mm512_fmadd_ps(f, _mm512_set1_ps(0.24022676f), _mm512_set1_ps(0.69315733f)), f, one);
    const __m512 d = _mm512_fmadd_ps(power, p, one), guess = _mm512_rcp14_ps(d);
    const __m512 r = _mm512_fmadd_ps(guess, _mm512_fnmadd_ps(d, guess, one), guess);
    // As in `logistic`: 0 where d is inf.
    return x * (Vec)_mm512_fixupimm_ps(r, d, _mm512_set1_epi32(8 << 20), 0);
  }
}

#elif defined(__AVX2__) || defined(EFFNET_NEON)

// As `logistic`, but with log2(e) in one part and a degree less: relative error of 2^f 9.1e-8. The
// quotient is formed at once.
template <typename T>
EFFNET_INLINE Vec silu_as(Vec x) {
  const Vec v = exp_argument(x), rounded = v * kMinusLog2E + kRound;
  const Vec f = v * kMinusLog2E - (rounded - kRound);
  Vec p = splat(1.326471451e-03f);
  p = p * f + 9.671512991e-03f;
  p = p * f + 5.550733954e-02f;
  p = p * f + 2.402224243e-01f;
  p = p * f + 6.931470037e-01f;
  p = p * f + 1.0f;
  return x / (1.0f + scaled(p, rounded));
}

#else

template <typename T>
EFFNET_INLINE Vec silu_as(Vec x) {
  return silu(x);
}

#endif

template <typename T, typename A>
EFFNET_INLINE Vec activate_as(const A& act, Vec u) {
  if constexpr (std::is_same_v<A, Silu>)
    return silu_as<T>(u);
  else
    return act.value(u);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
