// Sums of values and of their squares per channel, in double, of z less a pivot.
//
// The pivot, a task's first value, keeps a mean far from zero from costing digits; doubles keep the
// sums from adding an error of their own, which all pixels of a channel would share.
#pragma once

#include "cpu/simd/vec.h"

namespace effnet {
namespace EFFNET_ISA {

typedef double DVec __attribute__((vector_size(kLanes * 4)));  // half as many lanes
typedef float HalfVec __attribute__((vector_size(kLanes * 2)));

// The halves of a vector as doubles.
struct Doubles {
  DVec low, high;
  Doubles() = default;
  EFFNET_INLINE explicit Doubles(Vec v) {
    HalfVec halves[2];
    std::memcpy(halves, &v, sizeof(v));
    low = __builtin_convertvector(halves[0], DVec);
    high = __builtin_convertvector(halves[1], DVec);
  }
};

EFFNET_INLINE void add(double* sums, DVec low, DVec high) {
  DVec* to = reinterpret_cast<DVec*>(sums);
  to[0] += low;
  to[1] += high;
}

// One channel vector's sums over a task.
struct alignas(64) Moments {
  double sum[kLanes], squares[kLanes];  // of z - pivot
  float pivot[kLanes];

  EFFNET_INLINE Vec begin(Vec first, bool fresh) {
    if (fresh) {
      std::memset(sum, 0, sizeof(sum) + sizeof(squares));
      store(pivot, first - first == 0.0f ? first : Vec{});
    }
    return load(pivot);
  }
  // Takes `count` values by their sum, less the pivot of each, and their squares about their mean.
  EFFNET_INLINE void take(Vec total, Vec m2, int64_t count) {
    const Doubles t(total), m(m2);
    const double share = 1.0 / static_cast<double>(count);
    add(sum, t.low, t.high);
    add(squares, m.low + t.low * t.low * share, m.high + t.high * t.high * share);
  }
  // Writes mean and M2, less the pivot, of `count` values, and the pivot, to rows of C floats.
  void write(float* out, int64_t c, int64_t lanes, int64_t count) const {
    for (int64_t l = 0; l < lanes; l++) {
      const double mean = sum[l] / static_cast<double>(count);
      out[l] = static_cast<float>(mean);
      out[c + l] = static_cast<float>(squares[l] - mean * sum[l]);
      out[2 * c + l] = pivot[l];
    }
  }
};

constexpr int64_t kMomentFloats = sizeof(Moments) / sizeof(float);

// Floats rounded up to whole cache lines.
EFFNET_INLINE int64_t whole_lines(int64_t floats) { return ceil_div(floats, 16) * 16; }

// Takes a tile of values.
template <int TILE>
EFFNET_INLINE void take_tile(Moments& moments, const Vec* z, bool fresh) {
  const Vec pivot = moments.begin(z[0], fresh);
  Vec d[TILE], total = {}, m2 = {};
#pragma GCC unroll 8
  for (int t = 0; t < TILE; t++) {
    d[t] = z[t] - pivot;
    total += d[t];
  }
  const Vec mean = total * (1.0f / TILE);
#pragma GCC unroll 8
  for (int t = 0; t < TILE; t++) m2 += (d[t] - mean) * (d[t] - mean);
  moments.take(total, m2, TILE);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
