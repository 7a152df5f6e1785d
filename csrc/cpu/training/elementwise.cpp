// The passes of MBConv that read images once and multiply nothing: squeeze, the block's end, and
// BatchNorm before and behind a dense convolution that a library computes.
//
// Computes: squeeze          per (n,c) the sums of a2 = act(u2), of act'(u2), of act'(u2) * zh2
//           finish           y = (z * scale + shift) * row_scale + residual
//           finish_backward  per channel the sums of du and du * zh, du = row_scale * grad_y
//           moments          (mean, M2) of z - pivot over each task, with the pivot
//           norm_backward    dz = scale * (grad_y * act'(u)) + (z - mean) * slope + offset
// Layout:   channels-last without gaps
// Tiling:   a task owns some pixels of one image and goes through them a few at a time, in the
//           order of addresses
// Bytes:    every input once, y and dz once
// FLOPs:    about 25 per element of an activated z, 12 with clamp; 4 of z3
// Source:   original
// Truth:    tests/support/reference_passes.py
#include "cpu/simd/activations.h"
#include "cpu/simd/moments.h"
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

// A task's pixels [begin, end) of a channel vector into its moments; eight at a time but the last.
template <typename T>
EFFNET_INLINE void take_moments(Moments& moments, const T* z, int64_t c, int64_t lanes,
                                int64_t pixels, bool fresh) {
  Vec values[kBlock];
  for (int64_t p = 0; p < pixels; p++) values[p] = load_n(z + p * c, lanes);
  if (pixels == kBlock) return take_tile<kBlock>(moments, values, fresh);
  for (int64_t p = 0; p < pixels; p++) take_tile<1>(moments, values + p, fresh && p == 0);
}

template <typename T>
bool moments(const MBConvMomentsArgs& args) {
  const int64_t c = args.c, vecs = ceil_div(c, kLanes), parts = pointwise_parts(args.hw);
  const int64_t floats = whole_lines(vecs * kMomentFloats);
  float* const scratch = args.workspace(floats * args.threads);
  if (!scratch) return false;
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t task = 0; task < args.n * parts; task++) {
    Moments* const own = reinterpret_cast<Moments*>(scratch + omp_get_thread_num() * floats);
    const T* z = static_cast<const T*>(args.z) + task / parts * args.hw * c;
    const Range pixels = part_of(args.hw, parts, task % parts);
    for_blocks(pixels, c, [&](int64_t i, int64_t lanes, int64_t begin, int64_t end) {
      fetch<kBlock>(z + end * c + i * kBlock);
      take_moments(own[i / kLanes], z + begin * c + i, c, lanes, end - begin,
                   begin == pixels.begin);
    });
    for (int64_t v = 0; v < vecs; v++)
      own[v].write(args.partial + task * 3 * c + v * kLanes, c, min_of(kLanes, c - v * kLanes),
                   pixels.size());
  }
  return true;
}

template <typename T, typename A>
bool norm_backward(const MBConvNormBackwardArgs& args) {
  const int64_t c = args.c;
  const GradVectors& of = args.vectors;
  const bool by_batch = of.slope, large = args.pixels * c > 8192;
  const A act(args.activation);
#pragma omp parallel for num_threads(args.threads) schedule(static) if (large)
  for (int64_t p = 0; p < args.pixels; p++) {
    const T* z = static_cast<const T*>(args.z) + p * c;
    const T* grad = static_cast<const T*>(args.grad_y) + p * c;
    T* dz = static_cast<T*>(args.dz) + p * c;
    for (int64_t i = 0; i < c; i += kLanes) {
      const int64_t lanes = min_of(kLanes, c - i);
      const Vec value = load_n(z + i, lanes), scale = load_n(of.scale + i, lanes);
      const Vec u = value * scale + load_n(args.shift + i, lanes);
      Vec out = act.gradient(load_n(grad + i, lanes), u) * scale;
      if (by_batch)
        out += (value - load_n(of.mean + i, lanes)) * load_n(of.slope + i, lanes) +
               load_n(of.offset + i, lanes);
      store_n(dz + i, out, lanes);
    }
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

bool mbconv_moments(const MBConvMomentsArgs& args) {
  return args.dtype == DType::kFloat32 ? moments<float>(args) : moments<bf16>(args);
}

bool mbconv_norm_backward(const MBConvNormBackwardArgs& args) {
  return with_activation(args.activation, [&]<typename A>() {
    return args.dtype == DType::kFloat32 ? norm_backward<float, A>(args)
                                         : norm_backward<bf16, A>(args);
  });
}

}  // namespace EFFNET_ISA
}  // namespace effnet
