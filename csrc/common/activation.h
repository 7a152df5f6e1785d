// Which activation follows a convolution and which function makes a gate: plain data, for CPU and
// CUDA, as effnet_fast/reference/activations.py numbers them.
#pragma once

namespace effnet {

// silu(u) = u / (1 + exp(-u)); clamp(u) = min(max(u, lo), hi); hardswish(u) = u clamp(u + 3, 0, 6)
// / 6.
enum ActivationKind : int { kSilu = 0, kClamp = 1, kHardSwish = 2 };

// A bound that is NaN bounds nothing: no comparison with it is true. Only kClamp reads them.
struct Activation {
  int kind;
  float lo, hi;
};

// sigmoid(x) = 1 / (1 + exp(-x)); hardsigmoid(x) = clamp(x + 3, 0, 6) / 6.
enum GateKind : int { kSigmoid = 0, kHardSigmoid = 1 };

}  // namespace effnet
