// A product of bf16 pairs by the tile unit (AMX): 32 pixels by 2 units per step.
//
// Only called where the CPU has AMX and the operating system has lent it to the process.
#pragma once

#include "cpu/product.h"

namespace effnet {
namespace EFFNET_ISA {

#if defined(__AVX512BF16__)

constexpr int kAmxPixels = 32;

// Eight tiles of 16 rows by 64 bytes: 0-3 sums, 4-5 activations, 6-7 weights.
inline void amx_begin() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}
inline void amx_end() { _tile_release(); }

// out [kAmxPixels][32] = shift + A B for 2 units; pixels beyond the real ones are garbage in `a`
// and in `out`. k: words, a multiple of 16.
inline void amx_tile_2(float* out, const float* a, int64_t a_step, const float* b,
                       const float* shift, int64_t k) {
  _tile_loadd(0, shift, 0);
  _tile_loadd(1, shift + kUnit, 0);
  _tile_loadd(2, shift, 0);
  _tile_loadd(3, shift + kUnit, 0);
  for (; k > 0; k -= kUnit, a += a_step, b += 2 * kUnit * kUnit) {
    _tile_loadd(6, b, 128);
    _tile_loadd(7, b + kUnit, 128);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * kUnit, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 128);
  _tile_stored(1, out + kUnit, 128);
  _tile_stored(2, out + 32 * 16, 128);
  _tile_stored(3, out + 32 * 16 + kUnit, 128);
}

// The same for 16 pixels.
inline void amx_tile_1(float* out, const float* a, int64_t a_step, const float* b,
                       const float* shift, int64_t k) {
  _tile_loadd(0, shift, 0);
  _tile_loadd(1, shift + kUnit, 0);
  for (; k > 0; k -= kUnit, a += a_step, b += 2 * kUnit * kUnit) {
    _tile_loadd(6, b, 128);
    _tile_loadd(7, b + kUnit, 128);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, out, 128);
  _tile_stored(1, out + kUnit, 128);
}

#endif

}  // namespace EFFNET_ISA
}  // namespace effnet
