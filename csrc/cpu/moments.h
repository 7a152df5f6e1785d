// (count, mean, M2) of channel vectors by Chan's formula, taken of z less a pivot.
//
// Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance"
#pragma once

#include "cpu/vec.h"

namespace effnet {
namespace EFFNET_ISA {

// The pivot of a part: its first value, 0 where that is not finite. A mean far from zero then costs
// no digits.
EFFNET_INLINE Vec pivot_of(Vec z) { return z - z == 0.0f ? z : Vec{}; }

// Merges (mean, m2) of `more` values less the pivot into those of the `count` before them.
EFFNET_INLINE void merge_moments(Vec mean, Vec m2, int64_t more, int64_t count, Vec* old_mean,
                                 Vec* old_m2) {
  const Vec delta = mean - *old_mean;
  const float share = static_cast<float>(more) / static_cast<float>(count + more);
  *old_mean += delta * share;
  *old_m2 += m2 + delta * delta * (share * static_cast<float>(count));
}

}  // namespace EFFNET_ISA
}  // namespace effnet
