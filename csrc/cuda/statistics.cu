// Reductions over channels-last tensors, and the folding of every kernel's partial results.
//
// Computes: per image, chunk of pixels and channel the sums of `Reduction`; sums and moments of
//           partials
// Layout:   contiguous channels-last; vectors over channels in fp32
// Tiling:   reduce: a block owns a chunk of an image's pixels and up to 32 pieces of 16 bytes of
//           channels; its threads go through the pixels four loads at a time. fold: a block owns 32
//           neighbouring results, 32 threads (of moments 16) each share the parts of one
// Bytes:    x (and grad_y) once
// FLOPs:    1 to 30 per element
// Source:   original; Chan, Golub, LeVeque 1983; Ioffe and Szegedy 2015, section 3
// Truth:    effnet_fast/reference/dwconv_bn_silu.py, effnet_fast/reference/squeeze_excite.py
#include "cuda/channels.cuh"
#include "cuda/moments.cuh"

namespace effnet {
namespace cuda {
namespace {

constexpr int kFoldWidth = 32;     // results of a block, side by side
constexpr int kFoldSlices = 32;    // threads that share one result's parts
constexpr int kMomentSlices = 16;  // the same of moments, whose doubles take more registers
constexpr int kUnroll = 4;         // pixels that a thread loads at once

template <Reduction R>
constexpr int kSums = R == Reduction::kSqueeze                        ? 3
                      : R == Reduction::kBnAct || R == Reduction::kBn ? 2
                                                                      : 1;

template <Reduction R, typename Form>
__device__ __forceinline__ void accumulate(float (&sums)[kSums<R>], float x, float grad_y,
                                           const Affine& bn, float keep, const Form& form) {
  if constexpr (R == Reduction::kSum) {
    sums[0] += x;
  } else if constexpr (R == Reduction::kProduct) {
    sums[0] = fmaf(x, grad_y, sums[0]);
  } else {
    const float zh = (x - bn.mean) * bn.rstd;
    if constexpr (R == Reduction::kBn) {
      const float dy = grad_y * keep;
      sums[0] += dy;
      sums[1] = fmaf(dy, zh, sums[1]);
    } else {
      const float u = fmaf(x, bn.scale, bn.shift);
      if constexpr (R == Reduction::kSqueeze) {
        const float slope = form.add_value(u, sums[0]);
        sums[1] += slope;
        sums[2] = fmaf(slope, zh, sums[2]);
      } else {
        const float du = grad_y * form.slope(u);
        sums[0] += du;
        sums[1] = fmaf(du, zh, sums[1]);
      }
    }
  }
}

// Adds the sums of the threads that share a piece, in order, and writes them.
template <typename T, int SUMS>
__device__ void write_partial(const ReduceArgs& a, const ChannelGrid& grid, const Pixels& at,
                              const float (&sums)[kVector<T>][SUMS]) {
  constexpr int V = kVector<T>;
  float* const buffer = dynamic_shared<float>();  // [threads on a piece][pieces * V]
  const int width = grid.pieces * V;
  for (int which = 0; which < SUMS; which++) {
    sync_threads();
#pragma unroll
    for (int i = 0; i < V; i++) buffer[at.row * width + at.piece * V + i] = sums[i][which];
    sync_threads();
    float* out = a.partial + ((at.n * a.chunks + at.chunk) * SUMS + which) * a.c + at.c0;
    for (int i = thread_x(); i < width && at.c0 + i < a.c; i += block_dim_x()) {
      float sum = 0.0f;
      for (int row = 0; row < grid.rows; row++) sum += buffer[row * width + i];
      out[i] = a.factor * sum;
    }
  }
}

// Without a number of blocks ptxas makes room for more of them, and spills.
template <typename T, Reduction R, typename Form>
__global__ void __launch_bounds__(kChannelThreads, 2)
    reduce_kernel(const ReduceArgs a, const ChannelGrid grid) {
  constexpr int V = kVector<T>, SUMS = kSums<R>;
  constexpr bool kReadsGrad =
      R == Reduction::kProduct || R == Reduction::kBnAct || R == Reduction::kBn;
  const Pixels at(grid, V);
  const int64_t c = at.c0 + at.piece * V;
  const int channels = static_cast<int>(min_of(a.c - c, int64_t{V}));
  float sums[V][SUMS] = {};
  const Form form(a.activation);
  if (channels > 0) {
    Affine bn[V] = {};
    if constexpr (R != Reduction::kSum && R != Reduction::kProduct) {
#pragma unroll
      for (int i = 0; i < V; i++)
        if (i < channels) bn[i] = affine_of(a.bn, c + i);
    }
    const float keep = R == Reduction::kBn && a.keep ? load(a.keep + at.n) : 1.0f;
    const T* x = static_cast<const T*>(a.x) + at.n * a.hw * a.c + c;
    const T* grad_y = static_cast<const T*>(a.grad_y) + (kReadsGrad ? at.n * a.hw * a.c + c : 0);
    for (int64_t pixel = at.begin + at.row; pixel < at.end; pixel += kUnroll * grid.rows) {
      uint4 px[kUnroll], pg[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; k++) {
        const int64_t from = pixel + k * grid.rows;
        if (from >= at.end) continue;
        px[k] = load_piece(x + from * a.c, channels, grid.aligned);
        if constexpr (kReadsGrad) pg[k] = load_piece(grad_y + from * a.c, channels, grid.aligned);
      }
#pragma unroll
      for (int k = 0; k < kUnroll; k++) {
        if (pixel + k * grid.rows >= at.end) continue;
        float vx[V], vg[V];
        unpack<T>(px[k], vx);
        if constexpr (kReadsGrad) unpack<T>(pg[k], vg);
#pragma unroll
        for (int i = 0; i < V; i++)
          accumulate<R>(sums[i], vx[i], kReadsGrad ? vg[i] : 0.0f, bn[i], keep, form);
      }
    }
  }
  write_partial<T, SUMS>(a, grid, at, sums);
}

template <typename T, Reduction R, typename Form>
void run_reduce(const ReduceArgs& a, const Queue& queue) {
  const ChannelGrid grid =
      channel_grid(a.n, a.c, a.hw, a.chunks, kVector<T>, aligned(a.x, 16) && aligned(a.grad_y, 16));
  const int64_t shared = int64_t{grid.rows} * grid.pieces * kVector<T> * 4;
  launch("reduce", reduce_kernel<T, R, Form>,
         grid_of(grid.blocks, 1, 1, grid.rows * grid.pieces, shared, queue.stream), a, grid);
}

template <typename T, Reduction R>
void by_activation(const ReduceArgs& a, const Queue& queue) {
  if (a.activation.kind == kSilu) return run_reduce<T, R, SiluForm>(a, queue);
  run_reduce<T, R, ClampForm>(a, queue);
}

template <typename T>
void by_reduction(const ReduceArgs& a, const Queue& queue) {
  if (a.what == Reduction::kSum) return run_reduce<T, Reduction::kSum, NoForm>(a, queue);
  if (a.what == Reduction::kProduct) return run_reduce<T, Reduction::kProduct, NoForm>(a, queue);
  if (a.what == Reduction::kSqueeze) return by_activation<T, Reduction::kSqueeze>(a, queue);
  if (a.what == Reduction::kBnAct) return by_activation<T, Reduction::kBnAct>(a, queue);
  run_reduce<T, Reduction::kBn, NoForm>(a, queue);
}

__global__ void __launch_bounds__(kFoldWidth* kFoldSlices, 1) fold_sum_kernel(const FoldSumArgs a) {
  EFFNET_SHARED(float, sums, [kFoldSlices][kFoldWidth]);
  const int lane = thread_x() % kFoldWidth, slice = thread_x() / kFoldWidth;
  const int64_t blocks = ceil_div(a.c, kFoldWidth), r = block_y(), o = block_x() / blocks;
  const int64_t c = block_x() % blocks * kFoldWidth + lane;
  const int64_t begin = a.parts * slice / kFoldSlices, end = a.parts * (slice + 1) / kFoldSlices;
  float sum = 0.0f;
  if (c < a.c) {
    const float* from = a.partial + (o * a.parts * a.part_rows + a.first_row + r) * a.c + c;
#pragma unroll 4
    for (int64_t p = begin; p < end; p++) sum += load(from + p * a.part_rows * a.c);
  }
  sums[slice][lane] = sum;
  sync_threads();
  if (slice != 0 || c >= a.c) return;
  sum = 0.0f;
  for (int i = 0; i < kFoldSlices; i++) sum += sums[i][lane];
  a.out[o * a.out_o + r * a.out_r + c * a.out_c] = r == 0 ? a.first_factor * sum : sum;
}

// In double: an error of a mean is the same in every pixel of a channel, and the gradients of
// squeeze-and-excite, differences of such sums, magnify it.
using Wide = MomentsOf<double>;

__global__ void __launch_bounds__(kFoldWidth* kMomentSlices, 1)
    merge_moments_kernel(const MergeMomentsArgs a) {
  EFFNET_SHARED(Wide, all, [kMomentSlices][kFoldWidth]);
  const int lane = thread_x() % kFoldWidth, slice = thread_x() / kFoldWidth;
  const int64_t c = block_x() * kFoldWidth + lane;
  const int64_t begin = a.parts * slice / kMomentSlices,
                end = a.parts * (slice + 1) / kMomentSlices;
  Wide m = {};
  if (c < a.c) {
#pragma unroll 4
    for (int64_t p = begin; p < end; p++) {
      const float* from = a.partial + p * 4 * a.c + c;
      m = merged(m, Wide{load(from), load(from + a.c), load(from + 2 * a.c), load(from + 3 * a.c)});
    }
  }
  all[slice][lane] = m;
  for (int half = kMomentSlices / 2; half > 0; half /= 2) {
    sync_threads();
    if (slice < half) all[slice][lane] = merged(all[slice][lane], all[slice + half][lane]);
  }
  if (slice != 0 || c >= a.c) return;
  m = all[0][lane];
  a.mean[c] = static_cast<float>(m.pivot + m.mean);
  a.var[c] = static_cast<float>(m.m2 / m.count);
}

}  // namespace

// Asked of one kernel, as all are compiled for the same architectures; without a launch, an
// allocation or a wait, so that it may be asked while a CUDA graph is being captured.
std::string probe(int device) {
  return reason_against(reinterpret_cast<const void*>(&fold_sum_kernel), device);
}

void launch_reduce(const ReduceArgs& a, const Queue& queue) {
  require(a.n > 0 && a.c > 0 && a.hw > 0 && a.chunks > 0 && a.chunks <= a.hw,
          "reduce: sizes must be positive, and no more chunks than pixels");
  check_activation(a.activation);
  const DeviceGuard guard(queue.device);
  if (a.dtype == DType::kFloat32) return by_reduction<float>(a, queue);
  if (a.dtype == DType::kFloat16) return by_reduction<__half>(a, queue);
  by_reduction<__nv_bfloat16>(a, queue);
}

void launch_fold_sum(const FoldSumArgs& a, const Queue& queue) {
  require(a.outer > 0 && a.parts > 0 && a.rows > 0 && a.c > 0, "fold: sizes must be positive");
  require(a.first_row >= 0 && a.first_row + a.rows <= a.part_rows, "fold: no such rows");
  const DeviceGuard guard(queue.device);
  launch("fold_sum", fold_sum_kernel,
         grid_of(a.outer * ceil_div(a.c, kFoldWidth), a.rows, 1, kFoldWidth * kFoldSlices, 0,
                 queue.stream),
         a);
}

void launch_merge_moments(const MergeMomentsArgs& a, const Queue& queue) {
  require(a.parts > 0 && a.c > 0, "fold: sizes must be positive");
  const DeviceGuard guard(queue.device);
  launch("merge_moments", merge_moments_kernel,
         grid_of(ceil_div(a.c, kFoldWidth), 1, 1, kFoldWidth * kMomentSlices, 0, queue.stream), a);
}

}  // namespace cuda
}  // namespace effnet
