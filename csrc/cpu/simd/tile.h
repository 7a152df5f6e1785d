// The inner loop of every register tile of a product, and tables of tiles by their number of rows.
#pragma once

#include <utility>

#include "cpu/simd/multiply.h"

namespace effnet {
namespace EFFNET_ISA {

#if defined(EFFNET_NEON)
// sum[r][v] += a[r][LANE] * b[v]: NEON's multiplication takes one lane of a register.
template <int LANE, int ROWS, int VECS>
EFFNET_INLINE void add_lane(Vec (&sum)[ROWS][VECS], const Vec (&a)[ROWS], const float* b) {
#pragma GCC unroll 4
  for (int v = 0; v < VECS; v++) {
    const float32x4_t weight = (float32x4_t)load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
      sum[r][v] = (Vec)vfmaq_laneq_f32((float32x4_t)sum[r][v], weight, (float32x4_t)a[r], LANE);
  }
}
#endif

// sum[r][v] += a[r * step + i] * b[i][v] for i in [0, words), b [words][VECS * kLanes]. Returns the
// end of b. FETCH: also fetches the rows of a after these, one by one.
template <typename Multiply, bool FETCH = false, int ROWS, int VECS>
EFFNET_INLINE const float* add_products(Vec (&sum)[ROWS][VECS], const float* a, int64_t step,
                                        const float* b, int64_t words) {
  int64_t i = 0;
#if defined(EFFNET_NEON)
  for (; i + kLanes <= words; i += kLanes, b += kLanes * VECS * kLanes) {
    Vec x[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) x[r] = load(a + r * step + i);
#pragma GCC unroll 4
    for (int l = 0; l < kLanes && FETCH; l++) __builtin_prefetch(a + (ROWS + i + l) * step, 0, 3);
    add_lane<0>(sum, x, b);
    add_lane<1>(sum, x, b + VECS * kLanes);
    add_lane<2>(sum, x, b + 2 * VECS * kLanes);
    add_lane<3>(sum, x, b + 3 * VECS * kLanes);
  }
#endif
  for (; i < words; i++, b += VECS * kLanes) {
    Vec weight[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) weight[v] = in_register(load(b + v * kLanes));
    if constexpr (FETCH) __builtin_prefetch(a + (ROWS + i) * step, 0, 3);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
      const Vec x = in_register(broadcast(a + r * step + i));
#pragma GCC unroll 4
      for (int v = 0; v < VECS; v++) sum[r][v] = Multiply::add(sum[r][v], x, weight[v]);
    }
  }
  return b;
}

// The tile of `rows` rows, of a table of those with 1 to as many as the sequence counts.
// Tiles::of<ROWS> is one of them.
template <typename Tile, typename Tiles, int... COUNT>
inline Tile tile_of_rows(int64_t rows, std::integer_sequence<int, COUNT...>) {
  static constexpr Tile tiles[] = {Tiles::template of<COUNT + 1>...};
  return tiles[rows - 1];
}

}  // namespace EFFNET_ISA
}  // namespace effnet
