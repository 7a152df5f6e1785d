// What comes before the products of dwconv_bn_silu_backward.cu: grad_y, z and x on their way into
// shared memory, and dz of them.
#pragma once

#include "cuda/dwconv_tiles.cuh"

namespace effnet {
namespace cuda {
namespace {

// Tiles stand on padded coordinates, i = h + pad_t, from the last multiple of the stride that is
// not beyond the image: a tile's pixels then meet the same taps wherever it stands.
struct Params {
  DwconvBackwardArgs args;
  DwconvGrid grid;
  Window window;              // of dz
  int top, left;              // padded coordinates of the first tile
  int x_pitch;                // elements from row to row of staged x
  bool x_aligned, z_aligned;  // 16-byte pieces
  bool paired;                // pairs of channels of grad_x
  float inverse_count;        // 1 / args.count
};

// Vectors over channels in shared memory: of dz, and of `before`.
constexpr int kScale = 0, kShift = 1, kMean = 2, kSlope = 3, kOffset = 4, kVectors = 5;
constexpr int kBeforeScale = 0, kBeforeShift = 1, kBeforeMean = 2, kBeforeRstd = 3;
constexpr int kBeforeVectors = 4;

// Shared memory: the ring of dz, z of the rows that arrive, x of two bands, vectors over channels,
// each thread's sums of f and f * zh (they cost no registers there), weights. In the end the sums
// of half of the threads take its place.
template <typename T>
struct Shared {
  T *ring, *z, *x;
  float *dz, *before;
  float4* sums;
  float* weight;
  __device__ Shared(const Params& p)
      : ring(dynamic_shared<T>()),
        z(ring + p.window.ring_rows * p.window.pitch),
        x(z + p.window.rows * p.window.pitch),
        dz(reinterpret_cast<float*>(x + 2 * p.args.tile.ny * p.args.tile.rows * p.x_pitch)),
        before(dz + kVectors * p.window.channels),
        sums(reinterpret_cast<float4*>(before + kBeforeVectors * p.window.channels)),
        weight(reinterpret_cast<float*>(sums + block_dim_x())) {}
};

int64_t shared_bytes(const Window& w, int64_t element, int64_t taps, const Tile& t) {
  const int64_t x = 2 * t.ny * t.rows * t.nx * t.cols * w.channels;
  const int64_t floats =
      (kVectors + kBeforeVectors + 2 * t.nx * t.ny) * w.channels + taps * (w.channels + 2);
  const int64_t staged = ((w.ring_rows + w.rows) * w.pitch + x) * element + floats * 4;
  const int64_t sums = (t.nx * t.ny + 1) / 2 * (taps + 2) * w.channels * 4;
  return staged > sums ? staged : sums;
}

// What a band's copies have in common: the rows of dz that it lacks, and where they are.
struct Rows {
  int count, skipped, top, left;
  template <int K, int S>
  static __device__ Rows of(const Params& p, const Place& place, const Cursor& at) {
    const Tile& t = p.args.tile;
    Rows rows;
    rows.count = at.whole ? p.window.rows : p.window.fresh;
    rows.skipped = p.window.rows - rows.count;
    rows.top = static_cast<int>((p.top + at.band * t.ny * t.rows) / S) - (K - 1) / S + rows.skipped;
    rows.left = static_cast<int>((p.left + place.column_tile * t.nx * t.cols) / S) - (K - 1) / S;
    return rows;
  }
};

template <typename T, int K, int S>
__device__ void copy_band(const Params& p, const Shared<T>& shared, const Place& place,
                          const Cursor& at, int parity) {
  const DwconvShape& s = p.args.shape;
  const Window& w = p.window;
  const Tile& t = p.args.tile;
  const Rows rows = Rows::of<K, S>(p, place, at);
  const int64_t plane = s.oh * s.ow * s.c, row = s.ow * s.c;
  Walk<T> walk(w.cols, w.channels);
  const int64_t c = place.c0 + walk.channel;
  const View<T> grad({const_cast<void*>(p.args.grad_y), plane, row, s.c}, at.n, s.oh, s.ow, c, s.c,
                     p.z_aligned);
  const View<T> z({const_cast<void*>(p.args.z), plane, row, s.c}, at.n, s.oh, s.ow, c, s.c,
                  p.z_aligned);
  for (; walk.row < rows.count; walk.next()) {
    int slot = at.slot + rows.skipped + walk.row;
    if (slot >= w.ring_rows) slot -= w.ring_rows;
    const int to = walk.col * w.channels + walk.channel;
    copy_piece(shared.ring + slot * w.pitch + to, grad, rows.top + walk.row, rows.left + walk.col);
    copy_piece(shared.z + walk.row * w.pitch + to, z, rows.top + walk.row, rows.left + walk.col);
  }
  const int band_rows = static_cast<int>(t.ny * t.rows), columns = static_cast<int>(t.nx * t.cols);
  const int top = static_cast<int>(p.top + at.band * band_rows - s.pad_t);
  const int left = static_cast<int>(p.left + place.column_tile * columns - s.pad_l);
  T* to = shared.x + parity * band_rows * p.x_pitch;
  Walk<T> pixels(columns, w.channels);
  const View<T> x(p.args.x, at.n, s.h, s.w, c, s.c, p.x_aligned);
  for (; pixels.row < band_rows; pixels.next())
    copy_piece(to + pixels.row * p.x_pitch + pixels.col * w.channels + pixels.channel, x,
               top + pixels.row, left + pixels.col);
  cp_async_commit();
}

// dz of what this thread has copied, in the place of grad_y; padding stays 0.
template <typename T, int K, int S, typename Form>
__device__ void form_dz(const Params& p, const Shared<T>& shared, const Place& place,
                        const Cursor& at, const Form& form) {
  constexpr int V = kVector<T>;
  const DwconvShape& s = p.args.shape;
  const Window& w = p.window;
  const Rows rows = Rows::of<K, S>(p, place, at);
  Walk<T> walk(w.cols, w.channels);
  const int64_t c = place.c0 + walk.channel;
  const View<T> view({const_cast<void*>(p.args.z), 0, 0, 0}, 0, s.oh, s.ow, c, s.c, p.z_aligned);
  float gate[V], shift[V];
#pragma unroll
  for (int i = 0; i < V; i++) {
    const bool exists = c + i < s.c;
    gate[i] = exists && p.args.gate ? load(p.args.gate + at.n * s.c + c + i) : 1.0f;
    shift[i] = exists && p.args.shift ? load(p.args.shift + at.n * s.c + c + i) : 0.0f;
  }
  const float* vectors = shared.dz + walk.channel;
  for (; walk.row < rows.count; walk.next()) {
    if (!view.inside(rows.top + walk.row, rows.left + walk.col)) continue;
    int slot = at.slot + rows.skipped + walk.row;
    if (slot >= w.ring_rows) slot -= w.ring_rows;
    const int from = walk.col * w.channels + walk.channel;
    uint2* piece = reinterpret_cast<uint2*>(shared.ring + slot * w.pitch + from);
    const uint2* staged = reinterpret_cast<const uint2*>(shared.z + walk.row * w.pitch + from);
#pragma unroll
    for (int half = 0; half < 2; half++) {  // at once they would take too many registers
      constexpr int H = V / 2;
      float grad[H], z[H];
      unpack<T>(load_shared(piece + half), grad);
      unpack<T>(load_shared(staged + half), z);
      const float* of = vectors + half * H;
      float scale[H], bias[H], mean[H], slope[H], offset[H];
      load_floats(scale, of + kScale * w.channels);
      load_floats(bias, of + kShift * w.channels);
      load_floats(mean, of + kMean * w.channels);
      load_floats(slope, of + kSlope * w.channels);
      load_floats(offset, of + kOffset * w.channels);
#pragma unroll
      for (int i = 0; i < H; i++) {
        const float g = fmaf(grad[i], gate[half * H + i], shift[half * H + i]);
        const float du = g * form.slope(fmaf(z[i], scale[i], bias[i]));
        grad[i] = fmaf(scale[i], du, fmaf(z[i] - mean[i], slope[i], offset[i]));
      }
      store_shared(piece + half, pack<T, uint2>(grad));
    }
  }
}

// The vectors of dz: scale * du + (z - mean) * slope + offset; and those of `before`.
__device__ void load_vectors(const Params& p, float* dz, float* before, const Place& place) {
  const int channels = p.window.channels;
  for (int i = thread_x(); i < channels; i += block_dim_x()) {
    const int64_t c = place.c0 + i;
    const bool exists = c < p.args.shape.c;
    const Affine a = exists ? affine_of(p.args.after, c) : Affine{};
    float slope = 0.0f, offset = 0.0f;
    if (exists && p.args.sums) {
      offset = -a.scale * (load(p.args.sums + c) * p.inverse_count);
      slope = -a.scale * a.rstd * (load(p.args.sums + p.args.shape.c + c) * p.inverse_count);
    }
    dz[kScale * channels + i] = a.scale;
    dz[kShift * channels + i] = a.shift;
    dz[kMean * channels + i] = a.mean;
    dz[kSlope * channels + i] = slope;
    dz[kOffset * channels + i] = offset;
    if (!p.args.before.mean) continue;
    const Affine b = exists ? affine_of(p.args.before, c) : Affine{};
    before[kBeforeScale * channels + i] = b.scale;
    before[kBeforeShift * channels + i] = b.shift;
    before[kBeforeMean * channels + i] = b.mean;
    before[kBeforeRstd * channels + i] = b.rstd;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace effnet
