// Squeeze-and-excite: two small layers and the gate, forward and backward.
//
// Computes: hidden = W1 pooled + b1, gate = sigmoid(W2 act(hidden) + b2), y = x * gate, the
//           sigmoid perhaps hard and act SiLU or clamp(lo, hi);
//           backward of the layers: from the gate's gradient those of W1, b1, W2, b2 and pooled,
//           and with the sums of an MBConv's squeeze and project passes those of BN2
// Layout:   contiguous channels-last; weights [R,C] and [C,R]; vectors over (n, c) in fp32
// Tiling:   reduce: a block owns 4 rows of W1, 4 images and a part of C, one of `splits`; expand: a
//           block owns 32 rows of W2 and 4 images, adds up the splits, and gives each row to a
//           warp. backward: tiles of 32 x 32 through shared memory, four results a thread
// Bytes:    forward the weights once per 4 images, from the L2 cache; backward about three times
// FLOPs:    4 * N * R * C forward, 8 * N * R * C backward
// Source:   Hu, Shen, Sun 2018, "Squeeze-and-Excitation Networks"
// Truth:    effnet_fast/reference/squeeze_excite.py
#include "cuda/channels.cuh"

namespace effnet {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 4;    // rows of W1 of a block
constexpr int kImages = 4;  // images of a block
constexpr int kGateRows = 32;
constexpr int kSide = 32;  // of a tile in backward
constexpr int kUnroll = 4;

// The sum over a warp, in every lane.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) v += shuffle_xor(v, step);
  return v;
}

// partial[split,n,r] = sum over the split's part of C of W1[r,c] * pooled[n,c]
template <typename W>
__global__ void __launch_bounds__(kThreads) excite_reduce_kernel(const ExciteArgs a) {
  EFFNET_SHARED(float, sums, [kWarps][kRows * kImages]);
  const int64_t r0 = block_x() * kRows, n0 = block_y() * kImages, split = block_z();
  const int64_t begin = a.c * split / a.splits, end = a.c * (split + 1) / a.splits;
  const W* weight = static_cast<const W*>(a.se_reduce_weight);
  float sum[kRows][kImages] = {};
#pragma unroll 2
  for (int64_t c = begin + thread_x(); c < end; c += kThreads) {
    float w[kRows], x[kImages];
#pragma unroll
    for (int i = 0; i < kRows; i++)
      w[i] = r0 + i < a.r ? to_float(weight[(r0 + i) * a.c + c]) : 0.0f;
#pragma unroll
    for (int j = 0; j < kImages; j++)
      x[j] = n0 + j < a.n ? load(a.pooled + (n0 + j) * a.c + c) : 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; i++)
#pragma unroll
      for (int j = 0; j < kImages; j++) sum[i][j] = fmaf(w[i], x[j], sum[i][j]);
  }
  const int lane = thread_x() % kWarp, warp = thread_x() / kWarp;
#pragma unroll
  for (int i = 0; i < kRows; i++)
#pragma unroll
    for (int j = 0; j < kImages; j++) {
      const float all = warp_sum(sum[i][j]);
      if (lane == 0) sums[warp][i * kImages + j] = all;
    }
  sync_threads();
  const int i = thread_x() / kImages, j = thread_x() % kImages;
  if (thread_x() >= kRows * kImages || r0 + i >= a.r || n0 + j >= a.n) return;
  float all = 0.0f;
  for (int k = 0; k < kWarps; k++) all += sums[k][thread_x()];
  a.partial[(split * a.n + n0 + j) * a.r + r0 + i] = all;
}

// hidden from its splits, and the gate of 32 channels. Shared memory: act(hidden) [images,R].
template <typename W>
__global__ void __launch_bounds__(kThreads) excite_expand_kernel(const ExciteArgs a) {
  float* const reduced = dynamic_shared<float>();
  const int64_t c0 = block_x() * kGateRows, n0 = block_y() * kImages;
  const int64_t images = min_of(a.n - n0, int64_t{kImages});
  const W* se_reduce_bias = static_cast<const W*>(a.se_reduce_bias);
  for (int64_t i = thread_x(); i < kImages * a.r; i += kThreads) {
    if (i >= images * a.r) {
      reduced[i] = 0.0f;
      continue;
    }
    float h = se_reduce_bias ? to_float(se_reduce_bias[i % a.r]) : 0.0f;
    for (int64_t split = 0; split < a.splits; split++)
      h += load(a.partial + (split * a.n + n0) * a.r + i);
    reduced[i] = activated(a.activation, h);
    if (block_x() == 0) a.hidden[n0 * a.r + i] = h;
  }
  sync_threads();
  const int lane = thread_x() % kWarp, warp = thread_x() / kWarp;
  const W* weight = static_cast<const W*>(a.se_expand_weight);
  const W* bias = static_cast<const W*>(a.se_expand_bias);
  for (int row = warp; row < kGateRows && c0 + row < a.c; row += kWarps) {
    const int64_t c = c0 + row;
    float sum[kImages] = {};
#pragma unroll 2
    for (int64_t r = lane; r < a.r; r += kWarp) {
      const float w = to_float(weight[c * a.r + r]);
#pragma unroll
      for (int j = 0; j < kImages; j++) sum[j] = fmaf(w, reduced[j * a.r + r], sum[j]);
    }
#pragma unroll
    for (int j = 0; j < kImages; j++) {
      const float logit = warp_sum(sum[j]) + (bias ? to_float(bias[c]) : 0.0f);
      if (lane == j && j < images) a.gate[(n0 + j) * a.c + c] = gate_of(a.gate_kind, logit);
    }
  }
}

using Plane = float[kSide][kSide + 1];

// A thread's four results of a tile of 32 x 32: rows y, y + 8, .. of column x.
struct Quad {
  int x, y;
  float sum[4];
  __device__ Quad() : x(thread_x() % kSide), y(thread_x() / kSide), sum{} {}
  __device__ __forceinline__ int row(int i) const { return y + i * (kThreads / kSide); }
};

// Fills a tile with value(row, column).
template <typename Value>
__device__ __forceinline__ void fill(Plane& tile, const Quad& at, const Value& value) {
#pragma unroll
  for (int i = 0; i < 4; i++) tile[at.row(i)][at.x] = value(at.row(i), at.x);
}

__device__ __forceinline__ float grad_logit(const ExciteBackwardArgs& a, int64_t n, int64_t c) {
  if (n >= a.n || c >= a.c) return 0.0f;
  const float gate = load(a.gate + n * a.c + c);
  return grad_through_gate(a.gate_kind, load(a.grad_gate + n * a.c + c), gate);
}

// dW2 and db2 of 32 channels x 32 hidden ones; and these channels' part of W2^T grad_logit.
template <typename W>
__global__ void __launch_bounds__(kThreads) excite_bwd_expand_kernel(const ExciteBackwardArgs a) {
  EFFNET_SHARED(float, weight, [kSide][kSide + 1]);
  EFFNET_SHARED(float, logit, [kSide][kSide + 1]);
  EFFNET_SHARED(float, reduced, [kSide][kSide + 1]);
  const int64_t c0 = block_x() * kSide, r0 = block_y() * kSide;
  const W* se_expand_weight = static_cast<const W*>(a.se_expand_weight);
  Quad grad;
  float bias = 0.0f;
  fill(weight, grad, [&](int c, int r) {
    const bool exists = c0 + c < a.c && r0 + r < a.r;
    return exists ? to_float(se_expand_weight[(c0 + c) * a.r + r0 + r]) : 0.0f;
  });
  for (int64_t n0 = 0; n0 < a.n; n0 += kSide) {
    fill(logit, grad, [&](int n, int c) { return grad_logit(a, n0 + n, c0 + c); });
    fill(reduced, grad, [&](int n, int r) {
      const bool exists = n0 + n < a.n && r0 + r < a.r;
      return exists ? activated(a.activation, load(a.hidden + (n0 + n) * a.r + r0 + r)) : 0.0f;
    });
    sync_threads();
    Quad part;
    for (int k = 0; k < kSide; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        grad.sum[i] = fmaf(logit[k][grad.row(i)], reduced[k][grad.x], grad.sum[i]);
        part.sum[i] = fmaf(logit[part.row(i)][k], weight[k][part.x], part.sum[i]);
      }
      if (thread_x() < kSide) bias += logit[k][thread_x()];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t n = n0 + part.row(i), r = r0 + part.x;
      if (n < a.n && r < a.r) a.partial[(block_x() * a.n + n) * a.r + r] = part.sum[i];
    }
    sync_threads();
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int64_t c = c0 + grad.row(i), r = r0 + grad.x;
    if (c < a.c && r < a.r) a.grad_se_expand_weight[c * a.r + r] = grad.sum[i];
  }
  if (block_y() == 0 && thread_x() < kSide && c0 + thread_x() < a.c)
    a.grad_se_expand_bias[c0 + thread_x()] = bias;
}

// grad_hidden[n,r] = act'(hidden) * the sum of the channels' parts
__global__ void __launch_bounds__(kThreads) excite_bwd_hidden_kernel(const ExciteBackwardArgs a) {
  EFFNET_SHARED(float, sums, [kWarps][kWarp]);
  const int lane = thread_x() % kWarp, slice = thread_x() / kWarp;
  const int64_t i = block_x() * kWarp + lane, all = a.n * a.r, parts = ceil_div(a.c, kSide);
  const int64_t begin = parts * slice / kWarps, end = parts * (slice + 1) / kWarps;
  float sum = 0.0f;
  if (i < all) {
#pragma unroll 4
    for (int64_t p = begin; p < end; p++) sum += load(a.partial + p * all + i);
  }
  sums[slice][lane] = sum;
  sync_threads();
  if (slice != 0 || i >= all) return;
  sum = 0.0f;
  for (int k = 0; k < kWarps; k++) sum += sums[k][lane];
  a.grad_hidden[i] = sum * slope_of(a.activation, load(a.hidden + i));
}

// dpooled of 32 channels, and BN2's gradients where their sums are given.
template <typename W>
__device__ void grad_pooled(const ExciteBackwardArgs& a, int64_t c0, Plane& hidden, Plane& weight) {
  const W* se_reduce_weight = static_cast<const W*>(a.se_reduce_weight);
  const Quad at;
  const int64_t c = c0 + at.x;
  float beta = 0.0f, gamma = 0.0f;
  for (int64_t n0 = 0; n0 < a.n; n0 += kSide) {
    Quad grad;
    for (int64_t r0 = 0; r0 < a.r; r0 += kSide) {
      fill(hidden, at, [&](int n, int r) {
        const bool exists = n0 + n < a.n && r0 + r < a.r;
        return exists ? load(a.grad_hidden + (n0 + n) * a.r + r0 + r) : 0.0f;
      });
      fill(weight, at, [&](int r, int x) {
        const bool exists = r0 + r < a.r && c0 + x < a.c;
        return exists ? to_float(se_reduce_weight[(r0 + r) * a.c + c0 + x]) : 0.0f;
      });
      sync_threads();
      for (int k = 0; k < kSide; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          grad.sum[i] = fmaf(hidden[at.row(i)][k], weight[k][at.x], grad.sum[i]);
      sync_threads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t n = n0 + at.row(i);
      if (n >= a.n || c >= a.c) continue;
      const float q = grad.sum[i] * a.factor, gate = load(a.gate + n * a.c + c);
      a.grad_pooled[n * a.c + c] = q;
      if (!a.grad_bn) continue;
      const int64_t at_nc = n * a.c + c, plane = a.n * a.c;
      beta += gate * load(a.grad_sums + at_nc) + q * load(a.squeeze_sums + at_nc);
      gamma += gate * load(a.grad_sums + plane + at_nc) + q * load(a.squeeze_sums + plane + at_nc);
    }
  }
  if (!a.grad_bn) return;
  hidden[at.y][at.x] = beta;
  weight[at.y][at.x] = gamma;
  sync_threads();
  if (at.y != 0 || c >= a.c) return;
  for (int i = 1; i < kThreads / kSide; i++) {
    beta += hidden[i][at.x];
    gamma += weight[i][at.x];
  }
  a.grad_bn[c] = beta;
  a.grad_bn[a.c + c] = gamma;
}

// dW1 of 32 hidden channels x 32 channels, and db1.
__device__ void grad_reduce(const ExciteBackwardArgs& a, int64_t c0, int64_t r0, Plane& hidden,
                            Plane& pooled) {
  Quad grad;
  float bias = 0.0f;
  for (int64_t n0 = 0; n0 < a.n; n0 += kSide) {
    fill(hidden, grad, [&](int n, int r) {
      const bool exists = n0 + n < a.n && r0 + r < a.r;
      return exists ? load(a.grad_hidden + (n0 + n) * a.r + r0 + r) : 0.0f;
    });
    fill(pooled, grad, [&](int n, int x) {
      const bool exists = n0 + n < a.n && c0 + x < a.c;
      return exists ? load(a.pooled + (n0 + n) * a.c + c0 + x) : 0.0f;
    });
    sync_threads();
    for (int k = 0; k < kSide; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        grad.sum[i] = fmaf(hidden[k][grad.row(i)], pooled[k][grad.x], grad.sum[i]);
      if (thread_x() < kSide) bias += hidden[k][thread_x()];
    }
    sync_threads();
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int64_t r = r0 + grad.row(i), c = c0 + grad.x;
    if (r < a.r && c < a.c) a.grad_se_reduce_weight[r * a.c + c] = grad.sum[i];
  }
  if (c0 == 0 && thread_x() < kSide && r0 + thread_x() < a.r)
    a.grad_se_reduce_bias[r0 + thread_x()] = bias;
}

// Blocks of row 0 take dpooled, the others a tile of dW1 each.
template <typename W>
__global__ void __launch_bounds__(kThreads) excite_bwd_reduce_kernel(const ExciteBackwardArgs a) {
  EFFNET_SHARED(float, hidden, [kSide][kSide + 1]);
  EFFNET_SHARED(float, other, [kSide][kSide + 1]);
  const int64_t c0 = block_x() * kSide;
  if (block_y() == 0)
    grad_pooled<W>(a, c0, hidden, other);
  else
    grad_reduce(a, c0, (block_y() - 1) * kSide, hidden, other);
}

// y = x * gate + shift, per image and channel.
template <typename T>
__global__ void __launch_bounds__(kChannelThreads)
    gate_kernel(const GateArgs a, const ChannelGrid grid) {
  constexpr int V = kVector<T>;
  const Pixels at(grid, V);
  const int64_t c = at.c0 + at.piece * V;
  const int channels = static_cast<int>(min_of(a.c - c, int64_t{V}));
  if (channels <= 0) return;
  float gate[V], shift[V];
#pragma unroll
  for (int i = 0; i < V; i++) {
    gate[i] = i < channels ? load(a.gate + at.n * a.c + c + i) : 0.0f;
    shift[i] = i < channels && a.shift ? load(a.shift + at.n * a.c + c + i) : 0.0f;
  }
  const T* x = static_cast<const T*>(a.x) + at.n * a.hw * a.c + c;
  T* y = static_cast<T*>(a.y) + at.n * a.hw * a.c + c;
  for (int64_t pixel = at.begin + at.row; pixel < at.end; pixel += kUnroll * grid.rows) {
    uint4 piece[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; k++)
      if (pixel + k * grid.rows < at.end)
        piece[k] = load_piece(x + (pixel + k * grid.rows) * a.c, channels, grid.aligned);
#pragma unroll
    for (int k = 0; k < kUnroll; k++) {
      if (pixel + k * grid.rows >= at.end) continue;
      float v[V];
      unpack<T>(piece[k], v);
#pragma unroll
      for (int i = 0; i < V; i++) v[i] = fmaf(v[i], gate[i], shift[i]);
      store_piece(y + (pixel + k * grid.rows) * a.c, v, channels, grid.aligned);
    }
  }
}

template <typename T>
void run_gate(const GateArgs& a, const Queue& queue) {
  const ChannelGrid grid = channel_grid(a.n, a.c, a.hw, elementwise_chunks(a.c, a.hw, kVector<T>),
                                        kVector<T>, aligned(a.x, 16) && aligned(a.y, 16));
  launch("gate", gate_kernel<T>,
         grid_of(grid.blocks, 1, 1, grid.rows * grid.pieces, 0, queue.stream), a, grid);
}

template <typename W>
void run_excite_fwd(const ExciteArgs& a, const Queue& queue) {
  const int64_t groups = ceil_div(a.n, kImages);
  launch("excite_reduce", excite_reduce_kernel<W>,
         grid_of(ceil_div(a.r, kRows), groups, a.splits, kThreads, 0, queue.stream), a);
  launch("excite_expand", excite_expand_kernel<W>,
         grid_of(ceil_div(a.c, kGateRows), groups, 1, kThreads, kImages * a.r * 4, queue.stream),
         a);
}

template <typename W>
void run_excite_bwd(const ExciteBackwardArgs& a, const Queue& queue) {
  const int64_t columns = ceil_div(a.c, kSide), rows = ceil_div(a.r, kSide);
  launch("excite_bwd_expand", excite_bwd_expand_kernel<W>,
         grid_of(columns, rows, 1, kThreads, 0, queue.stream), a);
  launch("excite_bwd_hidden", excite_bwd_hidden_kernel,
         grid_of(ceil_div(a.n * a.r, kWarp), 1, 1, kThreads, 0, queue.stream), a);
  launch("excite_bwd_reduce", excite_bwd_reduce_kernel<W>,
         grid_of(columns, 1 + rows, 1, kThreads, 0, queue.stream), a);
}

}  // namespace

void launch_gate(const GateArgs& a, const Queue& queue) {
  require(a.n > 0 && a.c > 0 && a.hw > 0, "gate: every size must be positive");
  const DeviceGuard guard(queue.device);
  if (a.dtype == DType::kFloat32) return run_gate<float>(a, queue);
  if (a.dtype == DType::kFloat16) return run_gate<__half>(a, queue);
  run_gate<__nv_bfloat16>(a, queue);
}

void launch_excite_fwd(const ExciteArgs& a, const Queue& queue) {
  require(a.n > 0 && a.c > 0 && a.r > 0, "excite: every size must be positive");
  require(a.splits > 0 && a.splits <= a.c, "excite: splits must be 1 to C");
  check_activation(a.activation);
  check_gate(a.gate_kind);
  const DeviceGuard guard(queue.device);
  if (a.weight_dtype == DType::kFloat32) return run_excite_fwd<float>(a, queue);
  if (a.weight_dtype == DType::kFloat16) return run_excite_fwd<__half>(a, queue);
  run_excite_fwd<__nv_bfloat16>(a, queue);
}

void launch_excite_bwd(const ExciteBackwardArgs& a, const Queue& queue) {
  require(a.n > 0 && a.c > 0 && a.r > 0, "excite_backward: every size must be positive");
  check_activation(a.activation);
  check_gate(a.gate_kind);
  const DeviceGuard guard(queue.device);
  if (a.weight_dtype == DType::kFloat32) return run_excite_bwd<float>(a, queue);
  if (a.weight_dtype == DType::kFloat16) return run_excite_bwd<__half>(a, queue);
  run_excite_bwd<__nv_bfloat16>(a, queue);
}

}  // namespace cuda
}  // namespace effnet
