// The passes of MBConv that read images once and multiply nothing: squeeze, and the block's end.
//
// Computes: squeeze          per (n,c) the sums of a2 = act(u2), of act'(u2), of act'(u2) * zh2
//           finish           y = (z * scale + shift) * row_scale + residual
//           finish_backward  per channel the sums of du and du * zh, du = row_scale * grad_y
// Layout:   channels-last without gaps
// Tiling:   a task owns some pixels of one image and goes through them a few at a time, in the
//           order of addresses
// Bytes:    every input once, y once
// FLOPs:    about 25 per element of z2, 12 with clamp; 4 of z3
// Source:   original
// Truth:    tests/support/reference_passes.py
#include "cpu/simd/activations.h"
#include "cpu/training/kernels.h"
#include "cpu/training/panel_product.h"

namespace effnet {
namespace EFFNET_ISA {
namespace {

constexpr int64_t kBlock = 8;  // pixels per visit of a channel vector

// Calls f(first vector's channel, lanes, begin, end) for blocks of a task's pixels.
template <typename F>
EFFNET_INLINE void for_blocks(Range own, int64_t c, const F& f) {
  for (int64_t begin = own.begin; begin < own.end; begin += kBlock)
    for (int64_t i = 0; i < c; i += kLanes)
      f(i, min_of(kLanes, c - i), begin, min_of(own.end, begin + kBlock));
}

EFFNET_INLINE void add_n(float* sums, Vec value, int64_t lanes) {
  store_n(sums, load_n(sums, lanes) + value, lanes);
}

template <typename T, typename A>
bool squeeze(const MBConvSqueezeArgs& args) {
  const int64_t c = args.c, parts = pointwise_parts(args.hw);
  const A act(args.activation);
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t task = 0; task < args.n * parts; task++) {
    const T* z = static_cast<const T*>(args.z) + task / parts * args.hw * c;
    float* sums = args.partial + task * 3 * c;
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(3 * c));
    const Range own = part_of(args.hw, parts, task % parts);
    for_blocks(own, c, [&](int64_t i, int64_t lanes, int64_t begin, int64_t end) {
      const Vec scale = load_n(args.norm.scale + i, lanes);
      const Vec shift = load_n(args.norm.shift + i, lanes);
      const Vec mean = load_n(args.norm.mean + i, lanes), rstd = load_n(args.norm.rstd + i, lanes);
      fetch<kBlock>(z + end * c + i * kBlock);
      Vec sum0 = {}, sum1 = {}, sum2 = {};
      for (int64_t p = begin; p < end; p++) {
        const Vec zv = load_n(z + p * c + i, lanes), u = zv * scale + shift;
        const ValueAndSlope activated = act.both(u);
        sum0 += activated.value;
        sum1 += activated.slope;
        sum2 += activated.slope * ((zv - mean) * rstd);
      }
      add_n(sums + i, sum0, lanes);
      add_n(sums + c + i, sum1, lanes);
      add_n(sums + 2 * c + i, sum2, lanes);
    });
  }
  return true;
}

template <typename T>
bool finish(const MBConvFinishArgs& args) {
  const int64_t c = args.c, pixels = args.n * args.hw;
  const bool large = pixels * c > 8192;
#pragma omp parallel for num_threads(args.threads) schedule(static) if (large)
  for (int64_t p = 0; p < pixels; p++) {
    const float row_scale = args.row_scale ? args.row_scale[p / args.hw] : 1.0f;
    const T* z = static_cast<const T*>(args.z) + p * c;
    const T* residual = args.residual ? static_cast<const T*>(args.residual) + p * c : nullptr;
    T* y = static_cast<T*>(args.y) + p * c;
    for (int64_t i = 0; i < c; i += kLanes) {
      const int64_t lanes = min_of(kLanes, c - i);
      Vec u = load_n(z + i, lanes) * load_n(args.norm.scale + i, lanes) +
              load_n(args.norm.shift + i, lanes);
      u *= row_scale;
      if (residual) u += load_n(residual + i, lanes);
      store_n(y + i, u, lanes);
    }
  }
  return true;
}

template <typename T>
bool finish_backward(const MBConvFinishArgs& args) {
  const int64_t c = args.c, parts = pointwise_parts(args.hw);
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t task = 0; task < args.n * parts; task++) {
    const int64_t n = task / parts, first = n * args.hw * c;
    const T* z = static_cast<const T*>(args.z) + first;
    const T* grad = static_cast<const T*>(args.grad_y) + first;
    const float row_scale = args.row_scale ? args.row_scale[n] : 1.0f;
    float* sums = args.partial + task * 2 * c;
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(2 * c));
    const Range own = part_of(args.hw, parts, task % parts);
    for_blocks(own, c, [&](int64_t i, int64_t lanes, int64_t begin, int64_t end) {
      const Vec mean = load_n(args.norm.mean + i, lanes), rstd = load_n(args.norm.rstd + i, lanes);
      fetch<kBlock>(z + end * c + i * kBlock);
      fetch<kBlock>(grad + end * c + i * kBlock);
      Vec sum0 = {}, sum1 = {};
      for (int64_t p = begin; p < end; p++) {
        const Vec du = load_n(grad + p * c + i, lanes) * row_scale;
        sum0 += du;
        sum1 += du * ((load_n(z + p * c + i, lanes) - mean) * rstd);
      }
      add_n(sums + i, sum0, lanes);
      add_n(sums + c + i, sum1, lanes);
    });
  }
  return true;
}

}  // namespace

bool mbconv_squeeze(const MBConvSqueezeArgs& args) {
  return with_activation(args.activation, [&]<typename A>() {
    return args.dtype == DType::kFloat32 ? squeeze<float, A>(args) : squeeze<bf16, A>(args);
  });
}

bool mbconv_finish(const MBConvFinishArgs& args) {
  return args.dtype == DType::kFloat32 ? finish<float>(args) : finish<bf16>(args);
}

bool mbconv_finish_backward(const MBConvFinishArgs& args) {
  return args.dtype == DType::kFloat32 ? finish_backward<float>(args) : finish_backward<bf16>(args);
}

}  // namespace EFFNET_ISA
}  // namespace effnet
