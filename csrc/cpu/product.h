// Register tiles of a product: up to kTilePixels pixels by kTileUnits units of 16 output channels.
//
// Operands in words of 32 bits as network.h lays them out: A [K / 16][pixels][16], B [K][units *
// 16]. A word holds one fp32 number or two bf16 ones; K counts words.
#pragma once

#include "cpu/network.h"
#include "cpu/vec.h"

namespace effnet {
namespace EFFNET_ISA {

constexpr int kUnit = 16;
constexpr int kParts = kUnit / kLanes;  // vectors of a unit
#if defined(__AVX512F__)
// 28 accumulators, 2 weights and 2 broadcasts in 32 registers: 28 FMA for 16 loads.
constexpr int kTileUnits = 2, kTilePixels = 14;
#else
// 12 accumulators, the unit's weights and one broadcast in 16 registers.
constexpr int kTileUnits = 1, kTilePixels = 12 / kParts;
#endif

struct MultiplyFloat {
  static EFFNET_INLINE Vec add(Vec sum, Vec a, Vec b) { return sum + a * b; }
};
#if defined(__AVX512BF16__)
struct MultiplyPairs {
  static EFFNET_INLINE Vec add(Vec sum, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// out [PIXELS][UNITS * 16] = shift + A B. a_step: words from one block of 16 words to the next.
template <typename Multiply, int PIXELS, int UNITS>
EFFNET_NOINLINE void product_tile(float* out, const float* a, int64_t a_step, const float* b,
                                  const float* shift, int64_t k) {
  constexpr int kVecs = UNITS * kParts;
  Vec sum[PIXELS][kVecs];
#pragma GCC unroll 16
  for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) sum[p][v] = load(shift + v * kLanes);
  for (; k > 0; k -= kUnit, a += a_step) {
    const int64_t words = min_of(k, kUnit);
    for (int64_t i = 0; i < words; i++, b += UNITS * kUnit) {
      Vec weight[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; v++) weight[v] = in_register(load(b + v * kLanes));
#pragma GCC unroll 16
      for (int p = 0; p < PIXELS; p++) {
        const Vec x = in_register(broadcast(a + p * kUnit + i));
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; v++) sum[p][v] = Multiply::add(sum[p][v], x, weight[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) store(out + (p * kVecs + v) * kLanes, sum[p][v]);
}

using ProductTile = void (*)(float*, const float*, int64_t, const float*, const float*, int64_t);

// The tile of `pixels` pixels, 1 to kTilePixels, and UNITS units.
template <typename Multiply, int UNITS>
inline ProductTile product_tile_of(int64_t pixels) {
#if defined(__AVX512F__)
#define EFFNET_TILE(n) product_tile<Multiply, n, UNITS>
  static constexpr ProductTile tiles[] = {
      EFFNET_TILE(1),  EFFNET_TILE(2),  EFFNET_TILE(3),  EFFNET_TILE(4), EFFNET_TILE(5),
      EFFNET_TILE(6),  EFFNET_TILE(7),  EFFNET_TILE(8),  EFFNET_TILE(9), EFFNET_TILE(10),
      EFFNET_TILE(11), EFFNET_TILE(12), EFFNET_TILE(13), EFFNET_TILE(14)};
#undef EFFNET_TILE
#elif defined(__AVX2__)
  static constexpr ProductTile tiles[] = {
      product_tile<Multiply, 1, UNITS>, product_tile<Multiply, 2, UNITS>,
      product_tile<Multiply, 3, UNITS>, product_tile<Multiply, 4, UNITS>,
      product_tile<Multiply, 5, UNITS>, product_tile<Multiply, 6, UNITS>};
#else
  static constexpr ProductTile tiles[] = {product_tile<Multiply, 1, UNITS>,
                                          product_tile<Multiply, 2, UNITS>,
                                          product_tile<Multiply, 3, UNITS>};
#endif
  static_assert(sizeof(tiles) / sizeof(tiles[0]) == kTilePixels);
  return tiles[pixels - 1];
}

}  // namespace EFFNET_ISA
}  // namespace effnet
