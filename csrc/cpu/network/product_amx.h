// A product of bf16 pairs by the tile unit (AMX): 32 pixels by 2 units per step.
//
// Only called where the CPU has AMX and the operating system has lent it to the process.
#pragma once

#include "cpu/network/product.h"

namespace effnet {
namespace EFFNET_ISA {

constexpr int kAmxPixels = 32;

#if defined(__AVX512BF16__)

// Tiles 0-3 are sums, 4-5 activations, 6-7 weights.
//
// The operands of kAmxPixels pixels and 2 units; pixels beyond the real ones are garbage in `a` and
// in `out`. k: a multiple of 16.
inline void amx_tile_2(const TileOperands& t) {
  const int64_t row = t.start_step * static_cast<int64_t>(sizeof(float));
  _tile_loadd(0, t.start, row);
  _tile_loadd(1, t.start + kUnit, row);
  _tile_loadd(2, t.start + 16 * t.start_step, row);
  _tile_loadd(3, t.start + 16 * t.start_step + kUnit, row);
  const float *a = t.a, *b = t.b, *ahead = t.ahead;
  for (int64_t k = t.k; k > 0; k -= kUnit, a += t.a_step, b += 2 * kUnit * kUnit) {
#pragma GCC unroll 16
    for (int i = 0; i < kAhead; i += kUnit) __builtin_prefetch(ahead + i, 0, 2);
    ahead += kAhead;
    _tile_loadd(6, b, 128);
    _tile_loadd(7, b + kUnit, 128);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * kUnit, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, t.out, 128);
  _tile_stored(1, t.out + kUnit, 128);
  _tile_stored(2, t.out + 32 * 16, 128);
  _tile_stored(3, t.out + 32 * 16 + kUnit, 128);
}

// The same for 16 pixels.
inline void amx_tile_1(const TileOperands& t) {
  const int64_t row = t.start_step * static_cast<int64_t>(sizeof(float));
  _tile_loadd(0, t.start, row);
  _tile_loadd(1, t.start + kUnit, row);
  const float *a = t.a, *b = t.b, *ahead = t.ahead;
  for (int64_t k = t.k; k > 0; k -= kUnit, a += t.a_step, b += 2 * kUnit * kUnit) {
#pragma GCC unroll 16
    for (int i = 0; i < kAhead; i += kUnit) __builtin_prefetch(ahead + i, 0, 2);
    ahead += kAhead;
    _tile_loadd(6, b, 128);
    _tile_loadd(7, b + kUnit, 128);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, t.out, 128);
  _tile_stored(1, t.out + kUnit, 128);
}

#endif

}  // namespace EFFNET_ISA
}  // namespace effnet
