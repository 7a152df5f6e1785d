// The epilogue of a pointwise convolution: BatchNorm as an affine map, the activation and the
// residual.
//
// Computes: y = act(z * scale + shift) + residual; y may be z
// Layout:   contiguous channels-last
// Bytes:    z once, residual once, y once
// FLOPs:    about 20 per element with SiLU, 4 or 5 with clamp
// Source:   original
// Truth:    effnet_fast/reference/pointwise_bn_act.py
#include "cpu/kernels.h"
#include "cpu/simd/activations.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

template <typename T, typename A, bool RESIDUAL>
bool run(const AffineActArgs& args) {
  const int64_t c = args.shape.c, pixels = args.shape.n * args.shape.hw;
  const bool large = pixels * c > 8192;
  const A act(args.activation);
#pragma omp parallel for num_threads(args.threads) schedule(static) if (large)
  for (int64_t p = 0; p < pixels; p++) {
    const T* z = static_cast<const T*>(args.z) + p * c;
    const T* residual = static_cast<const T*>(args.residual) + p * c;
    T* y = static_cast<T*>(args.y) + p * c;
    for (int64_t i = 0; i < c; i += kLanes) {
      const int64_t lanes = min_of(kLanes, c - i);
      Vec u = load_n(z + i, lanes) * load_n(args.scale + i, lanes) + load_n(args.shift + i, lanes);
      u = act.value(u);
      if constexpr (RESIDUAL) u += load_n(residual + i, lanes);
      store_n(y + i, u, lanes);
    }
  }
  return true;
}

template <typename T>
bool by_mode(const AffineActArgs& args) {
  return with_activation(args.activation, [&]<typename A>() {
    return args.residual ? run<T, A, true>(args) : run<T, A, false>(args);
  });
}

}  // namespace

bool affine_act(const AffineActArgs& args) {
  return args.dtype == DType::kFloat32 ? by_mode<float>(args) : by_mode<bf16>(args);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
