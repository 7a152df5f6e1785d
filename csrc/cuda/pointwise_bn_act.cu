// BatchNorm, an activation, drop-path and residual in one pass: bn_silu and an MBConv's finish.
//
// Computes: y = act(z * scale + shift) * keep[n] + residual; act is SiLU, clamp(lo, hi) or nothing
// Layout:   contiguous channels-last
// Tiling:   a block owns a chunk of an image's pixels and up to 32 pieces of 16 bytes of channels;
//           a thread keeps its channels' scale and shift, and goes through pixels four at a time
// Bytes:    z and residual once, y once
// FLOPs:    2 per element, about 10 with SiLU, 6 with clamp
// Source:   original
// Truth:    effnet_fast/reference/pointwise_bn_act.py
#include "cuda/channels.cuh"

namespace effnet {
namespace cuda {
namespace {

constexpr int kUnroll = 4;

// a = act(a), for vectors of values; the identity costs nothing.
template <int N>
__device__ __forceinline__ void activate(const Activation& a, float (&v)[N]) {
  if (is_identity(a)) return;
  with_activation(a, [&](const auto& form) {
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = form.value(v[i]);
  });
}

template <typename T>
__global__ void __launch_bounds__(kChannelThreads)
    bn_act_kernel(const BnActArgs a, const ChannelGrid grid) {
  constexpr int V = kVector<T>;
  const Pixels at(grid, V);
  const int64_t c = at.c0 + at.piece * V;
  const int channels = static_cast<int>(min_of(a.c - c, int64_t{V}));
  if (channels <= 0) return;
  float scale[V] = {}, shift[V] = {};
#pragma unroll
  for (int i = 0; i < V; i++) {
    if (i >= channels) continue;
    const Affine bn = affine_of(a.bn, c + i);
    scale[i] = bn.scale;
    shift[i] = bn.shift;
  }
  const int64_t image = at.n * a.hw * a.c + c;
  const T* z = static_cast<const T*>(a.z) + image;
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + image : z;
  T* y = static_cast<T*>(a.y) + image;
  const float keep = a.keep ? load(a.keep + at.n) : 1.0f;
  for (int64_t pixel = at.begin + at.row; pixel < at.end; pixel += kUnroll * grid.rows) {
    uint4 pz[kUnroll], pr[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; k++) {
      const int64_t from = pixel + k * grid.rows;
      if (from >= at.end) continue;
      pz[k] = load_piece(z + from * a.c, channels, grid.aligned);
      if (a.residual) pr[k] = load_piece(residual + from * a.c, channels, grid.aligned);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; k++) {
      const int64_t to = pixel + k * grid.rows;
      if (to >= at.end) continue;
      float v[V], r[V];
      unpack<T>(pz[k], v);
      if (a.residual) unpack<T>(pr[k], r);
#pragma unroll
      for (int i = 0; i < V; i++) v[i] = fmaf(v[i], scale[i], shift[i]);
      activate(a.activation, v);
#pragma unroll
      for (int i = 0; i < V; i++) {
        if (a.keep) v[i] *= keep;
        if (a.residual) v[i] += r[i];
      }
      store_piece(y + to * a.c, v, channels, grid.aligned);
    }
  }
}

template <typename T>
void run(const BnActArgs& a, const Queue& queue) {
  const bool all = aligned(a.z, 16) && aligned(a.y, 16) && aligned(a.residual, 16);
  const ChannelGrid grid =
      channel_grid(a.n, a.c, a.hw, elementwise_chunks(a.c, a.hw, kVector<T>), kVector<T>, all);
  launch("bn_act", bn_act_kernel<T>,
         grid_of(grid.blocks, 1, 1, grid.rows * grid.pieces, 0, queue.stream), a, grid);
}

}  // namespace

void launch_bn_act(const BnActArgs& a, const Queue& queue) {
  check_activation(a.activation);
  require(a.n > 0 && a.c > 0 && a.hw > 0, "bn_act: every size must be positive");
  const DeviceGuard guard(queue.device);
  if (a.dtype == DType::kFloat32) return run<float>(a, queue);
  if (a.dtype == DType::kFloat16) return run<__half>(a, queue);
  run<__nv_bfloat16>(a, queue);
}

}  // namespace cuda
}  // namespace effnet
