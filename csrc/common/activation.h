// An activation and a gate as kernels take them: plain data, for C++ and CUDA alike.
#pragma once

namespace effnet {

enum ActivationKind : int { kSilu = 0, kClamp = 1, kHardSwish = 2 };
enum GateKind : int { kSigmoid = 0, kHardSigmoid = 1 };

// kClamp: u < lo becomes lo, u > hi becomes hi; a bound that is NaN bounds nothing. Identity is
// (kClamp, NaN, NaN), ReLU (kClamp, 0, NaN), ReLU6 (kClamp, 0, 6). The others have no bounds.
struct Activation {
  int kind;
  float lo, hi;
};

}  // namespace effnet
