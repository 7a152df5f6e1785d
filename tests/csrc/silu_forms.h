// SiLU, its slope and the sigmoid as an instruction set's kernels compute them, on blocks of
// floats.
#pragma once

#include <cstdint>

namespace effnet {

constexpr int64_t kBlockFloats = 4096;

// y [kBlockFloats] of x [kBlockFloats], both aligned to 64 bytes.
using SiluForm = void (*)(const float* x, float* y);

struct SiluForms {
  SiluForm sigmoid, silu, slope;
  SiluForm stored_fp32, stored_bf16;  // null where they are silu itself
};

}  // namespace effnet
