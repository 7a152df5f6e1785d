// Depthwise convolution with BatchNorm and an activation, backward: data and weight gradient in one
// pass.
//
// Computes: du = (grad_y * gate + shift) * act'(after(z))
//           dz = scale * (du - mean(du) - zh * mean(du * zh))    (eval: the two means are absent)
//           a = x, or act(before(x)); da = conv_transpose(dz, weight), dW = correlate(a, dz)
//           grad_x = f = da * act'(before(x)), or da; sum f and sum f * zh of x; act is SiLU or
//           clamp(lo, hi), for each of which the kernels are compiled
// Layout:   channels-last, x with any strides over N, H, W; all else without gaps
// Tiling:   a block owns up to 64 channels of a strip of columns of x, and goes down it in bands of
//           rows and from image to image. grad_y and z of the next band arrive in shared memory
//           while it computes; dz takes the place of grad_y there, formed once per staged element.
//           A thread owns a tile of pixels of x, two channels of each: with every dz that meets a
//           tap of them it adds to the tile's da and to its taps' dW, so that x needs no halo and
//           each dz is read from shared memory once for both
// Bytes:    grad_y, z, x once ((K - 1) columns of the former two more per strip, from the L2
//           cache), grad_x once
// FLOPs:    4 * K * K per pixel of x at stride 1, about 20 for dz and 20 for f
// Source:   original; Ioffe and Szegedy 2015, section 3, for the gradient through BatchNorm
// Truth:    effnet_fast/reference/dwconv_bn_silu.py
#include "cuda/dwconv_dz.cuh"

namespace effnet {
namespace cuda {
namespace {

// da of a thread's tile and its part of dW, from a, which is 0 outside the image.
template <typename T, int K, int S, int TR, int TC>
__device__ __forceinline__ void correlate(const Window& w, const T* ring, int slot,
                                          const Lane& lane, const float* weight,
                                          const float2 (&a)[TR][TC], float2 (&da)[TR][TC],
                                          float2 (&dw)[K * K]) {
  constexpr int kBefore = (K - 1) / S;  // rows of dz above those of the tile
  constexpr int kRows = kBefore + (TR - 1) / S + 1, kCols = kBefore + (TC - 1) / S + 1;
#pragma unroll
  for (int i = 0; i < TR; i++)
#pragma unroll
    for (int j = 0; j < TC; j++) da[i][j] = make_float2(0.0f, 0.0f);
  slot += lane.y * (TR / S);
  if (slot >= w.ring_rows) slot -= w.ring_rows;
  const T* column = ring + lane.x * (TC / S) * w.channels + lane.channel;
#pragma unroll
  for (int d = 0; d < kRows; d++) {
    float2 dz[kCols];
    const T* from = column + slot * w.pitch;
#pragma unroll
    for (int e = 0; e < kCols; e++) dz[e] = pair_at(from + e * w.channels);
#pragma unroll
    for (int i = 0; i < TR; i++) {
      const int kh = i + S * (kBefore - d);
      if (kh < 0 || kh >= K) continue;
#pragma unroll
      for (int kw = 0; kw < K; kw++) {
        const float2 tap = pair_at(weight + (kh * K + kw) * (w.channels + 2));
#pragma unroll
        for (int j = 0; j < TC; j++) {
          // kw = j + S * (kBefore - e)
          if ((j + S * kBefore - kw) % S != 0) continue;
          const int e = (j + S * kBefore - kw) / S;
          if (e < 0 || e >= kCols) continue;
          da[i][j].x = fmaf(dz[e].x, tap.x, da[i][j].x);
          da[i][j].y = fmaf(dz[e].y, tap.y, da[i][j].y);
          dw[kh * K + kw].x = fmaf(dz[e].x, a[i][j].x, dw[kh * K + kw].x);
          dw[kh * K + kw].y = fmaf(dz[e].y, a[i][j].y, dw[kh * K + kw].y);
        }
      }
    }
    if (++slot == w.ring_rows) slot = 0;
  }
}

// One band: a of the thread's tile, its gradients, and f written. `ih` and `iw` are the tile's
// first pixel in the image; those before it are below 0.
template <typename T, int K, int S, int TR, int TC, typename Form>
__device__ __forceinline__ void run_tile(const Params& p, const Shared<T>& shared,
                                         const Place& place, const Lane& lane, const Cursor& at,
                                         int parity, int ih, int iw, const Form& form,
                                         float2 (&dw)[K * K]) {
  const DwconvShape& s = p.args.shape;
  const Window& w = p.window;
  const float* before = shared.before + lane.channel;
  const bool activates = p.args.before.mean != nullptr;
  const T* x = shared.x +
               (parity * static_cast<int>(p.args.tile.ny) * TR + lane.y * TR) * p.x_pitch +
               lane.x * TC * w.channels + lane.channel;
  const auto inside = [&](int i, int j) {
    return static_cast<unsigned>(ih + i) < static_cast<unsigned>(s.h) &&
           static_cast<unsigned>(iw + j) < static_cast<unsigned>(s.w);
  };
  float2 a[TR][TC], da[TR][TC];
#pragma unroll
  for (int i = 0; i < TR; i++)
#pragma unroll
    for (int j = 0; j < TC; j++) {
      a[i][j] = pair_at(x + i * p.x_pitch + j * w.channels);
      if (!activates) continue;
      const float2 scale = pair_at(before + kBeforeScale * w.channels);
      const float2 shift = pair_at(before + kBeforeShift * w.channels);
      a[i][j].x = inside(i, j) ? form.value(a[i][j].x * scale.x + shift.x) : 0.0f;
      a[i][j].y = inside(i, j) ? form.value(a[i][j].y * scale.y + shift.y) : 0.0f;
      a[i][j] = rounded<T>(a[i][j]);
    }
  correlate<T, K, S, TR, TC>(w, shared.ring, at.slot, lane, shared.weight + lane.channel, a, da,
                             dw);
  const int64_t c = place.c0 + lane.channel;
  T* out = static_cast<T*>(p.args.grad_x);
  if (out) out += ((at.n * s.h + ih) * s.w + iw) * s.c + c;
  float2 sum_f = {0.0f, 0.0f}, sum_fzh = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < TR; i++)
#pragma unroll
    for (int j = 0; j < TC; j++) {
      if (!inside(i, j)) continue;
      float2 f = da[i][j], zh = {};
      if (activates) {
        const float2 scale = pair_at(before + kBeforeScale * w.channels);
        const float2 shift = pair_at(before + kBeforeShift * w.channels);
        const float2 mean = pair_at(before + kBeforeMean * w.channels);
        const float2 rstd = pair_at(before + kBeforeRstd * w.channels);
        const float2 z = pair_at(x + i * p.x_pitch + j * w.channels);
        f.x *= form.slope(z.x * scale.x + shift.x);
        f.y *= form.slope(z.y * scale.y + shift.y);
        zh = make_float2((z.x - mean.x) * rstd.x, (z.y - mean.y) * rstd.y);
      }
      f = rounded<T>(f);
      sum_f.x += f.x;
      sum_f.y += f.y;
      sum_fzh.x = fmaf(f.x, zh.x, sum_fzh.x);
      sum_fzh.y = fmaf(f.y, zh.y, sum_fzh.y);
      if (out) store_pair(out + (i * s.w + j) * s.c, f, s.c - c, p.paired);
    }
  float4& sums = shared.sums[thread_x()];
  sums = make_float4(sums.x + sum_f.x, sums.y + sum_f.y, sums.z + sum_fzh.x, sums.w + sum_fzh.y);
}

// Adds the sums of all threads that share two channels, in a fixed order, and writes them.
template <int TAPS>
__device__ void write_sums(const Params& p, const Place& place, const Lane& lane, float4 sums,
                           float2 (&dw)[TAPS]) {
  float2* const buffer = dynamic_shared<float2>();
  float2 sum_f = make_float2(sums.x, sums.y), sum_fzh = make_float2(sums.z, sums.w);
  const int lanes = p.window.channels / 2, channel = lane.channel / 2;
  const auto at = [&](int position, int row) -> float2& {
    return buffer[(position * (TAPS + 2) + row) * lanes + channel];
  };
  const auto add = [](float2& to, const float2& from) {
    to.x += from.x;
    to.y += from.y;
  };
  for (int left = block_dim_x() / lanes; left > 1;) {
    const int half = (left + 1) / 2;
    sync_threads();
    if (lane.position >= half && lane.position < left) {
#pragma unroll
      for (int tap = 0; tap < TAPS; tap++) at(lane.position - half, tap) = dw[tap];
      at(lane.position - half, TAPS) = sum_f;
      at(lane.position - half, TAPS + 1) = sum_fzh;
    }
    sync_threads();
    if (lane.position < left - half) {
#pragma unroll
      for (int tap = 0; tap < TAPS; tap++) add(dw[tap], at(lane.position, tap));
      add(sum_f, at(lane.position, TAPS));
      add(sum_fzh, at(lane.position, TAPS + 1));
    }
    left = half;
  }
  const int64_t c = place.c0 + lane.channel, all = p.args.shape.c;
  if (lane.position != 0 || c >= all) return;
  float* out = p.args.partial + int64_t{TAPS + 2} * place.part * all + c;
  const auto write = [&](int row, const float2& v) {
    out[row * all] = v.x;
    if (c + 1 < all) out[row * all + 1] = v.y;
  };
#pragma unroll
  for (int tap = 0; tap < TAPS; tap++) write(tap, dw[tap]);
  write(TAPS, sum_f);
  write(TAPS + 1, sum_fzh);
}

template <typename T, int K, int S, int TR, int TC, typename Form>
__global__ void __launch_bounds__(kMaxThreads, K == 3 ? 2 : 1)
    dwconv_bn_silu_bwd_kernel(const Params p) {
  const DwconvShape& s = p.args.shape;
  const Tile& t = p.args.tile;
  const Place place = place_of(p.grid, s, t);
  const Lane lane(t);
  const Shared<T> shared(p);
  const Form form(p.args.activation);
  const int band_begin = static_cast<int>(place.row_chunk * t.bands);
  const int band_end = static_cast<int>(min_of(band_begin + t.bands, p.grid.bands));
  Cursor at = {place.n_begin, band_begin, 0, true};
  int parity = 0;
  copy_band<T, K, S>(p, shared, place, at, parity);
  load_weight<K * K>(shared.weight, p.args.weight, p.args.weight_dtype, place.c0, p.window.channels,
                     s.c);
  load_vectors(p, shared.dz, shared.before, place);
  sync_threads();
  shared.sums[thread_x()] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float2 dw[K * K];
#pragma unroll
  for (int tap = 0; tap < K * K; tap++) dw[tap] = make_float2(0.0f, 0.0f);
  const int iw = static_cast<int>(p.left - s.pad_l + (place.column_tile * t.nx + lane.x) * TC);
  while (at.n < place.n_end) {
    const Cursor next = at.next(p.window, band_begin, band_end);
    cp_async_wait<0>();
    form_dz<T, K, S>(p, shared, place, at, form);
    sync_threads();
    if (next.n < place.n_end) copy_band<T, K, S>(p, shared, place, next, 1 - parity);
    const int ih = static_cast<int>(p.top - s.pad_t + (at.band * t.ny + lane.y) * TR);
    if (ih < s.h && iw < s.w)
      run_tile<T, K, S, TR, TC>(p, shared, place, lane, at, parity, ih, iw, form, dw);
    at = next;
    parity = 1 - parity;
  }
  if (p.args.partial) write_sums<K * K>(p, place, lane, shared.sums[thread_x()], dw);
}

Window window_of(const DwconvShape& s, const DwconvGrid& grid, const Tile& t) {
  const int64_t band_rows = t.ny * t.rows / s.stride, before = (s.k - 1) / s.stride;
  Window w;
  w.rows = static_cast<int>(before + band_rows);
  w.fresh = static_cast<int>(band_rows);
  w.cols = static_cast<int>(before + t.nx * t.cols / s.stride);
  w.ring_rows = ring_rows(t, w.rows, w.fresh, grid.bands < t.bands ? grid.bands : t.bands);
  w.channels = static_cast<int>(2 * t.lanes);
  w.pitch = w.cols * w.channels;
  return w;
}

template <typename T, int K, int S, int TR, int TC, typename Form>
void run(const DwconvBackwardArgs& args, const Queue& queue) {
  const DwconvShape& s = args.shape;
  Params p = {};
  p.args = args;
  p.grid = dwconv_backward_grid(s, args.tile);
  p.window = window_of(s, p.grid, args.tile);
  p.top = static_cast<int>(s.pad_t - s.pad_t % S);
  p.left = static_cast<int>(s.pad_l - s.pad_l % S);
  p.x_pitch = static_cast<int>(args.tile.nx * TC * p.window.channels);
  p.x_aligned = aligned(args.x, s.c, sizeof(T), 16);
  p.z_aligned = aligned(without_gaps(args.z, s.c, s.oh, s.ow), s.c, sizeof(T), 16) &&
                aligned(args.grad_y, 16);
  p.paired = s.c % 2 == 0 && aligned(args.grad_x, 2 * sizeof(T));
  p.inverse_count = static_cast<float>(1.0 / args.count);
  const int threads = static_cast<int>(args.tile.lanes * args.tile.nx * args.tile.ny);
  const DeviceGuard guard(queue.device);
  launch("dwconv_bn_silu_bwd", dwconv_bn_silu_bwd_kernel<T, K, S, TR, TC, Form>,
         grid_of(p.grid.channel_blocks * p.grid.parts, 1, 1, threads,
                 shared_bytes(p.window, sizeof(T), K * K, args.tile), queue.stream),
         p);
}

template <typename T, typename Form>
void by_tile(const DwconvBackwardArgs& args, const Queue& queue) {
  const int64_t k = args.shape.k, stride = args.shape.stride;
  require(args.tile.rows == 2 && args.tile.cols == 4,
          "dwconv backward: tiles of 2x4 are supported");
  if (k == 3 && stride == 1) return run<T, 3, 1, 2, 4, Form>(args, queue);
  if (k == 5 && stride == 1) return run<T, 5, 1, 2, 4, Form>(args, queue);
  if (k == 3) return run<T, 3, 2, 2, 4, Form>(args, queue);
  run<T, 5, 2, 2, 4, Form>(args, queue);
}

template <typename T>
void by_activation(const DwconvBackwardArgs& args, const Queue& queue) {
  if (args.activation.kind == kSilu) return by_tile<T, SiluForm>(args, queue);
  by_tile<T, ClampForm>(args, queue);
}

}  // namespace

DwconvGrid dwconv_backward_grid(const DwconvShape& s, const Tile& t) {
  return grid_over(s, t, s.pad_t % s.stride + s.h, s.pad_l % s.stride + s.w);
}

int64_t dwconv_backward_shared_bytes(const DwconvShape& s, DType dtype, const Tile& t) {
  const Window w = window_of(s, dwconv_backward_grid(s, t), t);
  return shared_bytes(w, dtype == DType::kFloat32 ? 4 : 2, s.k * s.k, t);
}

void launch_dwconv_bn_silu_bwd(const DwconvBackwardArgs& args, const Queue& queue) {
  check_activation(args.activation);
  if (args.dtype == DType::kFloat32) return by_activation<float>(args, queue);
  if (args.dtype == DType::kFloat16) return by_activation<__half>(args, queue);
  by_activation<__nv_bfloat16>(args, queue);
}

}  // namespace cuda
}  // namespace effnet
