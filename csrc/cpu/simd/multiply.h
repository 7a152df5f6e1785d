// What a product does with words of 32 bits: a word is one fp32 number, or two bf16 ones whose
// products are both added.
#pragma once

#include "cpu/simd/vec.h"

namespace effnet {
namespace EFFNET_ISA {

struct MultiplyFloat {
  static EFFNET_INLINE Vec add(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)

struct MultiplyPairs {
  static EFFNET_INLINE Vec add(Vec sum, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};

// The tile unit (AMX) for the calling thread: eight tiles of 16 rows by 64 bytes. Only where the
// CPU has it and the operating system has lent it to the process.
inline void amx_begin() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}
inline void amx_end() { _tile_release(); }

#endif

}  // namespace EFFNET_ISA
}  // namespace effnet
