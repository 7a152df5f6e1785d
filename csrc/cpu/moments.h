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

// Merges a tile's values into sums [3][kLanes]: mean and M2 of z - pivot over the `count` values
// before it, and the pivot.
template <int TILE>
EFFNET_INLINE void merge_tile(const Vec* z, int64_t count, float* sums) {
  if (count == 0) store(sums + 2 * kLanes, pivot_of(z[0]));
  const Vec pivot = load(sums + 2 * kLanes);
  Vec d[TILE], total = {}, m2 = {};
#pragma GCC unroll 8
  for (int t = 0; t < TILE; t++) {
    d[t] = z[t] - pivot;
    total += d[t];
  }
  const Vec mean = total * (1.0f / TILE);
#pragma GCC unroll 8
  for (int t = 0; t < TILE; t++) m2 += (d[t] - mean) * (d[t] - mean);
  Vec old_mean = load(sums), old_m2 = load(sums + kLanes);
  merge_moments(mean, m2, TILE, count, &old_mean, &old_m2);
  store(sums, old_mean);
  store(sums + kLanes, old_m2);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
