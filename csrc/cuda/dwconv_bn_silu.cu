// Depthwise convolution with BatchNorm and an activation, forward.
//
// Computes: a = x, or act(before(x)); z = conv(a, weight); with `after` y = act(after(z)) and the
//           sums of y over each chunk, else y = z and (count, pivot, mean, M2) of z, both of y as
//           stored; act is SiLU or clamp(lo, hi)
// Layout:   channels-last, x with any strides over N, H, W; y without gaps
// Tiling:   a block owns up to 64 channels of a strip of columns, and goes down it in bands of rows
//           and from image to image. The next band's rows arrive in shared memory, 16 bytes a copy,
//           while it computes. A thread keeps two channels' weights and a tile of outputs in
//           registers, so that a staged element is read from shared memory once per row of tiles
//           and per (TC + K - 1) / TC columns
// Bytes:    x once ((K - 1) columns more per strip, from the L2 cache), y once
// FLOPs:    2 * K * K per output, about 10 for each SiLU, 4 for each clamp
// Source:   original; Chan, Golub, LeVeque 1983 for merging moments
// Truth:    effnet_fast/reference/dwconv_bn_silu.py
#include "cuda/dwconv_tiles.cuh"
#include "cuda/moments.cuh"

namespace effnet {
namespace cuda {
namespace {

// What ptxas is told of a block, which sets a thread's registers. 3x3 fits in 96: held to
// them, as two blocks of 320 threads are, a multiprocessor takes five blocks of 128, not four.
template <int K>
constexpr int kBoundThreads = K == 3 ? 320 : kMaxThreads;

struct Params {
  DwconvForwardArgs args;
  DwconvGrid grid;
  Window window;
  bool x_aligned, paired;  // 16-byte pieces of x; pairs of channels of y
};

// Shared memory: the ring, scale and shift of `before` and of `after`, for each thread and channel
// its Moments, of which `after` takes the first float for the sum of y, and weights. What a thread
// carries from band to band thus costs no registers while it convolves.
template <typename T>
struct Shared {
  T* ring;
  float *scale, *shift, *after_scale, *after_shift;
  Moments* sums;
  float* weight;
  __device__ explicit Shared(const Window& w)
      : ring(dynamic_shared<T>()),
        scale(reinterpret_cast<float*>(ring + w.ring_rows * w.pitch)),
        shift(scale + w.channels),
        after_scale(shift + w.channels),
        after_shift(after_scale + w.channels),
        sums(reinterpret_cast<Moments*>(after_shift + w.channels)),
        weight(reinterpret_cast<float*>(sums + 2 * block_dim_x())) {}
};

int64_t shared_bytes(const Window& w, int64_t element, int64_t taps, const Tile& t) {
  const int64_t floats = taps * (w.channels + 2) + (4 + 4 * t.nx * t.ny) * w.channels;
  return w.ring_rows * w.pitch * element + floats * 4;
}

template <typename T, int S>
__device__ void copy_rows(const Params& p, const Shared<T>& shared, const Place& place,
                          const Cursor& at) {
  const DwconvShape& s = p.args.shape;
  const Window& w = p.window;
  const int rows = at.whole ? w.rows : w.fresh, skipped = w.rows - rows;
  const int64_t band_rows = p.args.tile.ny * p.args.tile.rows;
  const int top = static_cast<int>(at.band * band_rows * S - s.pad_t) + skipped;
  const int left =
      static_cast<int>(place.column_tile * p.args.tile.nx * p.args.tile.cols * S - s.pad_l);
  Walk<T> walk(w.cols, w.channels);
  const View<T> view(p.args.x, at.n, s.h, s.w, place.c0 + walk.channel, s.c, p.x_aligned);
  for (; walk.row < rows; walk.next()) {
    int slot = at.slot + skipped + walk.row;
    if (slot >= w.ring_rows) slot -= w.ring_rows;
    T* to = shared.ring + slot * w.pitch + walk.col * w.channels + walk.channel;
    copy_piece(to, view, top + walk.row, left + walk.col);
  }
  cp_async_commit();
}

// act(x * scale + shift) of what this thread has copied; padding stays 0.
template <typename T, int S, typename Form>
__device__ __forceinline__ void activate_rows(const Params& p, const Shared<T>& shared,
                                              const Place& place, const Cursor& at,
                                              const Form& form) {
  const DwconvShape& s = p.args.shape;
  const Window& w = p.window;
  const int rows = at.whole ? w.rows : w.fresh, skipped = w.rows - rows;
  const int64_t band_rows = p.args.tile.ny * p.args.tile.rows;
  const int top = static_cast<int>(at.band * band_rows * S - s.pad_t) + skipped;
  const int left =
      static_cast<int>(place.column_tile * p.args.tile.nx * p.args.tile.cols * S - s.pad_l);
  Walk<T> walk(w.cols, w.channels);
  const View<T> view(p.args.x, at.n, s.h, s.w, place.c0 + walk.channel, s.c, p.x_aligned);
  for (; walk.row < rows; walk.next()) {
    if (!view.inside(top + walk.row, left + walk.col)) continue;
    int slot = at.slot + skipped + walk.row;
    if (slot >= w.ring_rows) slot -= w.ring_rows;
    uint4* piece = reinterpret_cast<uint4*>(shared.ring + slot * w.pitch + walk.col * w.channels +
                                            walk.channel);
    float v[kVector<T>], scale[kVector<T>], shift[kVector<T>];
    unpack<T>(load_shared(piece), v);
    load_floats(scale, shared.scale + walk.channel);
    load_floats(shift, shared.shift + walk.channel);
#pragma unroll
    for (int i = 0; i < kVector<T>; i++) v[i] = form.value(v[i] * scale[i] + shift[i]);
    store_shared(piece, pack<T, uint4>(v));
  }
}

// A thread's tile of outputs from the window that starts at `slot`.
template <typename T, int K, int S, int TR, int TC>
__device__ __forceinline__ void convolve(const Window& w, const T* ring, int slot, const Lane& lane,
                                         const float2 (&weight)[K * K], float2 (&z)[TR][TC]) {
#pragma unroll
  for (int i = 0; i < TR; i++)
#pragma unroll
    for (int t = 0; t < TC; t++) z[i][t] = make_float2(0.0f, 0.0f);
  slot += lane.y * TR * S;
  if (slot >= w.ring_rows) slot -= w.ring_rows;
  const T* column = ring + lane.x * TC * S * w.channels + lane.channel;
#pragma unroll
  for (int row = 0; row < (TR - 1) * S + K; row++) {
    float2 x[(TC - 1) * S + K];
    const T* from = column + slot * w.pitch;
#pragma unroll
    for (int j = 0; j < (TC - 1) * S + K; j++) x[j] = pair_at(from + j * w.channels);
#pragma unroll
    for (int i = 0; i < TR; i++) {
      const int kh = row - i * S;
      if (kh < 0 || kh >= K) continue;
#pragma unroll
      for (int kw = 0; kw < K; kw++)
#pragma unroll
        for (int t = 0; t < TC; t++) {
          z[i][t].x = fmaf(x[t * S + kw].x, weight[kh * K + kw].x, z[i][t].x);
          z[i][t].y = fmaf(x[t * S + kw].y, weight[kh * K + kw].y, z[i][t].y);
        }
    }
    if (++slot == w.ring_rows) slot = 0;
  }
}

// Moments of the first `rows` x `cols` of a tile, merged into those before.
template <int TR, int TC>
__device__ __forceinline__ void add_moments(Moments& m, const float (&z)[TR][TC], int rows,
                                            int cols) {
  if (m.count == 0.0f) m.pivot = pivot_of(z[0][0]);
  const float count = static_cast<float>(rows * cols);
  float sum = 0.0f, m2 = 0.0f;
#pragma unroll
  for (int i = 0; i < TR; i++)
#pragma unroll
    for (int t = 0; t < TC; t++)
      if (i < rows && t < cols) sum += z[i][t] - m.pivot;
  const float mean = sum / count;
#pragma unroll
  for (int i = 0; i < TR; i++)
#pragma unroll
    for (int t = 0; t < TC; t++)
      if (i < rows && t < cols) {
        const float d = (z[i][t] - m.pivot) - mean;
        m2 = fmaf(d, d, m2);
      }
  m = merged(m, {count, m.pivot, mean, m2});
}

// Writes a tile of outputs, and adds it to the thread's sums.
template <typename T, int TR, int TC>
__device__ __forceinline__ void finish_tile(const Params& p, const Place& place,
                                            const Shared<T>& shared, const Lane& lane, int64_t n,
                                            int oh, int ow, float2 (&z)[TR][TC]) {
  const DwconvShape& s = p.args.shape;
  const int rows = min_of(TR, static_cast<int>(s.oh) - oh);
  const int cols = min_of(TC, static_cast<int>(s.ow) - ow);
  const int64_t c = place.c0 + lane.channel;
  T* y = static_cast<T*>(p.args.y) + ((n * s.oh + oh) * s.ow + ow) * s.c + c;
  const bool activates = p.args.after.mean != nullptr;
  float2 scale = {}, shift = {}, pool = {};
  if (activates) {
    scale = pair_at(shared.after_scale + lane.channel);
    shift = pair_at(shared.after_shift + lane.channel);
  }
#pragma unroll
  for (int i = 0; i < TR; i++) {
    if (activates)  // a row at a time: all at once would take too many registers
      with_activation(p.args.activation, [&](const auto& form) {
#pragma unroll
        for (int t = 0; t < TC; t++) {
          z[i][t].x = form.value(z[i][t].x * scale.x + shift.x);
          z[i][t].y = form.value(z[i][t].y * scale.y + shift.y);
        }
      });
#pragma unroll
    for (int t = 0; t < TC; t++) {
      z[i][t] = rounded<T>(z[i][t]);
      if (i < rows && t < cols) {
        store_pair(y + (i * s.ow + t) * s.c, z[i][t], s.c - c, p.paired);
        pool.x += z[i][t].x;
        pool.y += z[i][t].y;
      }
    }
  }
  Moments* sums = shared.sums + lane.position * p.window.channels + lane.channel;
  if (activates) {
    sums[0].count += pool.x;
    sums[1].count += pool.y;
    return;
  }
  float part[TR][TC];
#pragma unroll
  for (int i = 0; i < TR * TC; i++) part[i / TC][i % TC] = z[i / TC][i % TC].x;
  add_moments<TR, TC>(sums[0], part, rows, cols);
#pragma unroll
  for (int i = 0; i < TR * TC; i++) part[i / TC][i % TC] = z[i / TC][i % TC].y;
  add_moments<TR, TC>(sums[1], part, rows, cols);
}

__device__ __forceinline__ void clear_sums(Moments* sums, const Lane& lane, int channels) {
  sums[lane.position * channels + lane.channel] = Moments{};
  sums[lane.position * channels + lane.channel + 1] = Moments{};
}

// Sums of y over the block's part of image n, the positions in order, where they are wanted.
__device__ void write_pool(const Params& p, const Place& place, const Moments* sums, int64_t n) {
  if (!p.args.partial) return;
  const int channels = p.window.channels, positions = block_dim_x() * 2 / channels;
  for (int i = thread_x(); i < channels && place.c0 + i < p.args.shape.c; i += block_dim_x()) {
    float sum = 0.0f;
    for (int position = 0; position < positions; position++)
      sum += sums[position * channels + i].count;
    const int64_t row = n * p.grid.chunks + place.chunk;
    p.args.partial[row * p.args.shape.c + place.c0 + i] = p.args.factor * sum;
  }
}

// Moments of all that the block has written, the positions in order.
__device__ void write_moments(const Params& p, const Place& place, const Moments* sums) {
  const int channels = p.window.channels, positions = block_dim_x() * 2 / channels;
  const int64_t c = p.args.shape.c;
  for (int i = thread_x(); i < channels && place.c0 + i < c; i += block_dim_x()) {
    Moments m = sums[i];
    for (int position = 1; position < positions; position++)
      m = merged(m, sums[position * channels + i]);
    float* out = p.args.partial + int64_t{4} * place.part * c + place.c0 + i;
    out[0] = m.count;
    out[c] = m.pivot;
    out[2 * c] = m.mean;
    out[3 * c] = m.m2;
  }
}

// scale and shift of the block's channels, 0 beyond C.
__device__ void load_affine(float* scale, float* shift, const BatchNorm& bn, int64_t c0,
                            int channels, int64_t c) {
  if (!bn.mean) return;
  for (int i = thread_x(); i < channels; i += block_dim_x()) {
    const Affine a = c0 + i < c ? affine_of(bn, c0 + i) : Affine{};
    scale[i] = a.scale;
    shift[i] = a.shift;
  }
}

template <typename T, int K, int S, int TR, int TC>
__global__ void __launch_bounds__(kBoundThreads<K>, 2) dwconv_bn_silu_fwd_kernel(const Params p) {
  const DwconvShape& s = p.args.shape;
  const Place place = place_of(p.grid, s, p.args.tile);
  const Lane lane(p.args.tile);
  const Shared<T> shared(p.window);
  const int channels = p.window.channels;
  const int band_begin = static_cast<int>(place.row_chunk * p.args.tile.bands);
  const int band_end = static_cast<int>(min_of(band_begin + p.args.tile.bands, p.grid.bands));
  Cursor at = {place.n_begin, band_begin, 0, true};
  copy_rows<T, S>(p, shared, place, at);
  load_weight<K * K>(shared.weight, p.args.weight, p.args.weight_dtype, place.c0, channels, s.c);
  load_affine(shared.scale, shared.shift, p.args.before, place.c0, channels, s.c);
  load_affine(shared.after_scale, shared.after_shift, p.args.after, place.c0, channels, s.c);
  clear_sums(shared.sums, lane, channels);
  sync_threads();
  float2 weight[K * K];
#pragma unroll
  for (int tap = 0; tap < K * K; tap++)
    weight[tap] = pair_at(shared.weight + tap * (channels + 2) + lane.channel);
  const int ow = static_cast<int>((place.column_tile * p.args.tile.nx + lane.x) * TC);
  const bool pools = p.args.after.mean != nullptr;
  while (at.n < place.n_end) {
    const Cursor next = at.next(p.window, band_begin, band_end);
    cp_async_wait<0>();
    if (p.args.before.mean)
      with_activation(p.args.activation,
                      [&](const auto& form) { activate_rows<T, S>(p, shared, place, at, form); });
    sync_threads();
    if (next.n < place.n_end) copy_rows<T, S>(p, shared, place, next);
    const int oh = static_cast<int>((at.band * p.args.tile.ny + lane.y) * TR);
    if (oh < s.oh && ow < s.ow) {
      float2 z[TR][TC];
      convolve<T, K, S, TR, TC>(p.window, shared.ring, at.slot, lane, weight, z);
      finish_tile<T, TR, TC>(p, place, shared, lane, at.n, oh, ow, z);
    }
    if (pools && next.n != at.n) {
      sync_threads();
      write_pool(p, place, shared.sums, at.n);
      sync_threads();
      clear_sums(shared.sums, lane, channels);
    }
    at = next;
  }
  if (pools) return;
  sync_threads();
  write_moments(p, place, shared.sums);
}

template <int K, int S>
Window window_of(const DwconvGrid& grid, const Tile& t) {
  const int64_t band_rows = t.ny * t.rows, columns = t.nx * t.cols;
  Window w;
  w.rows = static_cast<int>((band_rows - 1) * S + K);
  w.fresh = static_cast<int>(band_rows * S);
  w.cols = static_cast<int>((columns - 1) * S + K);
  w.ring_rows = ring_rows(t, w.rows, w.fresh, grid.bands < t.bands ? grid.bands : t.bands);
  w.channels = static_cast<int>(2 * t.lanes);
  w.pitch = w.cols * w.channels;
  return w;
}

template <typename T, int K, int S, int TR, int TC>
void run(const DwconvForwardArgs& args, const Queue& queue) {
  const DwconvShape& s = args.shape;
  Params p = {args, dwconv_forward_grid(s, args.tile), {}, false, false};
  p.window = window_of<K, S>(p.grid, args.tile);
  p.x_aligned = aligned(args.x, s.c, sizeof(T), 16);
  p.paired = s.c % 2 == 0 && aligned(args.y, 2 * sizeof(T));
  const int threads = static_cast<int>(args.tile.lanes * args.tile.nx * args.tile.ny);
  const DeviceGuard guard(queue.device);
  launch("dwconv_bn_silu_fwd", dwconv_bn_silu_fwd_kernel<T, K, S, TR, TC>,
         grid_of(p.grid.channel_blocks * p.grid.parts, 1, 1, threads,
                 shared_bytes(p.window, sizeof(T), K * K, args.tile), queue.stream),
         p);
}

template <typename T>
void by_tile(const DwconvForwardArgs& args, const Queue& queue) {
  const int64_t k = args.shape.k, stride = args.shape.stride;
  const int64_t rows = args.tile.rows, cols = args.tile.cols;
  const bool square = rows == 4 && cols == 4, flat = rows == 2 && cols == 7;
  const bool half = rows == 2 && cols == 4;
  if (k == 3 && stride == 1 && square) return run<T, 3, 1, 4, 4>(args, queue);
  if (k == 3 && stride == 1 && flat) return run<T, 3, 1, 2, 7>(args, queue);
  if (k == 5 && stride == 1 && square) return run<T, 5, 1, 4, 4>(args, queue);
  if (k == 5 && stride == 1 && flat) return run<T, 5, 1, 2, 7>(args, queue);
  if (k == 3 && stride == 2 && half) return run<T, 3, 2, 2, 4>(args, queue);
  if (k == 5 && stride == 2 && half) return run<T, 5, 2, 2, 4>(args, queue);
  require(false, "dwconv forward: tiles of 4x4 and 2x7 at stride 1, 2x4 at stride 2 are supported");
}

}  // namespace

DwconvGrid dwconv_forward_grid(const DwconvShape& s, const Tile& t) {
  return grid_over(s, t, s.oh, s.ow);
}

int64_t dwconv_forward_shared_bytes(const DwconvShape& s, DType dtype, const Tile& t) {
  const DwconvGrid grid = dwconv_forward_grid(s, t);
  const Window w = s.k == 3 ? s.stride == 1 ? window_of<3, 1>(grid, t) : window_of<3, 2>(grid, t)
                   : s.stride == 1 ? window_of<5, 1>(grid, t)
                                   : window_of<5, 2>(grid, t);
  return shared_bytes(w, dtype == DType::kFloat32 ? 4 : 2, s.k * s.k, t);
}

void launch_dwconv_bn_silu_fwd(const DwconvForwardArgs& args, const Queue& queue) {
  check_activation(args.activation);
  if (args.dtype == DType::kFloat32) return by_tile<float>(args, queue);
  if (args.dtype == DType::kFloat16) return by_tile<__half>(args, queue);
  by_tile<__nv_bfloat16>(args, queue);
}

}  // namespace cuda
}  // namespace effnet
