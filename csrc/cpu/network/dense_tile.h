// Register tiles of a dense convolution as an implicit product: `product.h` with the operand of
// each 16 words of K somewhere else in the rows of the input.
#pragma once

#include "cpu/network/product_amx.h"

namespace effnet {
namespace EFFNET_ISA {

// 16 words of K or, where a tap of the filter ends, fewer.
struct KBlock {
  int64_t offset;  // words from the tile's first pixel to these words of it
  int64_t words;
  int64_t before;  // words of K before these
};

// One tile's operands, as TileOperands; pixels of A are STEP * 16 words apart.
struct DenseOperands {
  float* out;
  const float* start;
  int64_t start_step;
  const float* a;
  const KBlock *k, *k_end;
  const float* b;
};

template <typename Multiply, int STEP, int PIXELS, int UNITS>
EFFNET_NOINLINE void dense_tile(const DenseOperands& t) {
  constexpr int kVecs = UNITS * kParts;
  Vec sum[PIXELS][kVecs] = {};
  const float* b = t.b;
  for (const KBlock* k = t.k; k != t.k_end; k++) {
    const float* const a = t.a + k->offset;
    b = add_products<Multiply>(sum, a, STEP * kUnit, b, k->words);
  }
#pragma GCC unroll 16
  for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++)
      store(t.out + (p * kVecs + v) * kLanes,
            sum[p][v] + load(t.start + p * t.start_step + v * kLanes));
}

using DenseTile = void (*)(const DenseOperands&);

template <typename Multiply, int STEP, int UNITS>
struct DenseTiles {
  template <int PIXELS>
  static constexpr DenseTile of = dense_tile<Multiply, STEP, PIXELS, UNITS>;
};

template <typename Multiply, int STEP, int UNITS>
inline DenseTile dense_tile_of(int64_t pixels) {
  using Tiles = DenseTiles<Multiply, STEP, UNITS>;
  return tile_of_rows<DenseTile, Tiles>(pixels, PixelCounts<UNITS>());
}

#if defined(__AVX512BF16__)

// The tile unit's, of 16 * ROWS pixels and 2 units; pixels beyond the real ones are garbage.
template <int STEP, int ROWS>
inline void amx_dense_tile(const DenseOperands& t) {
  constexpr int kPixel = 64 * STEP;  // bytes
  constexpr int64_t kHalf = int64_t{16} * STEP * kUnit;
  const int64_t row = t.start_step * static_cast<int64_t>(sizeof(float));
  _tile_loadd(0, t.start, row);
  _tile_loadd(1, t.start + kUnit, row);
  if constexpr (ROWS == 2) {
    _tile_loadd(2, t.start + 16 * t.start_step, row);
    _tile_loadd(3, t.start + 16 * t.start_step + kUnit, row);
  }
  const float* b = t.b;
  for (const KBlock* k = t.k; k != t.k_end; k++, b += 2 * kUnit * kUnit) {
    const float* const a = t.a + k->offset;
    _tile_loadd(6, b, 128);
    _tile_loadd(7, b + kUnit, 128);
    _tile_loadd(4, a, kPixel);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (ROWS == 2) {
      _tile_loadd(5, a + kHalf, kPixel);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, t.out, 128);
  _tile_stored(1, t.out + kUnit, 128);
  if constexpr (ROWS == 2) {
    _tile_stored(2, t.out + 32 * 16, 128);
    _tile_stored(3, t.out + 32 * 16 + kUnit, 128);
  }
}

#endif

}  // namespace EFFNET_ISA
}  // namespace effnet
