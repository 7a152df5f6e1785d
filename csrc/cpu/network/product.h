// Register tiles of a product: up to kTilePixels pixels by kTileUnits units of 16 output channels.
//
// Operands in words of 32 bits as args.h lays them out: A [K / 16][pixels][16], B [K][units *
// 16]. A word holds one fp32 number or two bf16 ones; K counts words.
#pragma once

#include "cpu/network/args.h"
#include "cpu/simd/tile.h"

namespace effnet {
namespace EFFNET_ISA {

constexpr int kUnit = 16;
constexpr int kParts = kUnit / kLanes;  // vectors of a unit
#if defined(__AVX512F__)
// 28 accumulators, 2 weights and 2 broadcasts in 32 registers: 28 FMA for 16 loads; 27 for 12 with
// 3 units.
constexpr int kTileUnits = 2, kTilePixels = 14, kWidePixels = 9;
#elif defined(EFFNET_NEON)
// 24 accumulators, 6 operands by lane and 2 weights in 32 registers: 96 FMA for 22 loads.
constexpr int kTileUnits = 1, kTilePixels = 6, kWidePixels = 0;
#else
// 12 accumulators, the unit's weights and one broadcast in 16 registers.
constexpr int kTileUnits = 1, kTilePixels = 12 / kParts, kWidePixels = 0;
#endif

// One tile's operands. `start` is added to the sums when they are done: [PIXELS][UNITS * 16] of an
// earlier part of K where start_step is UNITS * 16, one row for all pixels where it is 0.
struct TileOperands {
  float* out;  // [PIXELS][UNITS * 16], may be `start`
  const float* start;
  int64_t start_step;
  const float* a;
  int64_t a_step;  // words from one block of 16 words to the next
  const float* b;
  int64_t k;
  const float* ahead;  // weights fetched into the L2 cache on the way, kAhead words per block of K
};
constexpr int64_t kAhead = 4 * kUnit;
// Products of fp32 that are added up in a row: a sum of 1152 in one row errs by four times as much
// as torch's, which adds parts.
constexpr int64_t kChain = 8 * kUnit;

// FETCH: also fetches the pixels after these, for the next tile: they come from beyond the L2 cache
// in pieces too short for the hardware's own fetching.
template <typename Multiply, int PIXELS, int UNITS, bool FETCH>
EFFNET_NOINLINE void product_tile(const TileOperands& t) {
  constexpr int kVecs = UNITS * kParts;
  Vec sum[PIXELS][kVecs] = {};
  const float *a = t.a, *b = t.b;
  const int64_t a_step = t.a_step;
  const float* ahead = t.ahead;
  for (int64_t k = t.k; k > 0; k -= kUnit, a += a_step, ahead += kAhead) {
#pragma GCC unroll 16
    for (int i = 0; i < kAhead; i += kUnit) __builtin_prefetch(ahead + i, 0, 2);
    b = add_products<Multiply, FETCH>(sum, a, kUnit, b, min_of(k, kUnit));
  }
#pragma GCC unroll 16
  for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++)
      store(t.out + (p * kVecs + v) * kLanes,
            sum[p][v] + load(t.start + p * t.start_step + v * kLanes));
}

using ProductTile = void (*)(const TileOperands&);

// Panels have kTileUnits units but for the last, which has what is left over too.
constexpr int kMaxUnits = 2 * kTileUnits - 1;

// Tiles have 1 to kTilePixels pixels, those of more than kTileUnits units up to kWidePixels.
template <int UNITS>
using PixelCounts =
    std::make_integer_sequence<int, (UNITS > kTileUnits ? kWidePixels : kTilePixels)>;

template <typename Multiply, int UNITS, bool FETCH>
struct ProductTiles {
  template <int PIXELS>
  static constexpr ProductTile of = product_tile<Multiply, PIXELS, UNITS, FETCH>;
};

template <typename Multiply, int UNITS, bool FETCH>
inline ProductTile product_tile_of(int64_t pixels) {
  using Tiles = ProductTiles<Multiply, UNITS, FETCH>;
  return tile_of_rows<ProductTile, Tiles>(pixels, PixelCounts<UNITS>());
}

}  // namespace EFFNET_ISA
}  // namespace effnet
