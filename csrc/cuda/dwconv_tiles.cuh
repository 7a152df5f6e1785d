// What the depthwise kernels share: how a block is cut up, and rows of pixels on their way through
// shared memory.
//
// Rows lie in a ring: while a block computes on one window of rows, the next rows arrive. Each
// thread copies 16 bytes of a pixel at a time, always the same channels, and what it has copied it
// may change before the barrier that shows it to the others.
#pragma once

#include "cuda/args.h"
#include "cuda/common.cuh"
#include "cuda/primitives.cuh"

namespace effnet {
namespace cuda {

constexpr int64_t kMaxThreads = 256;  // of a block; bounds the registers of a thread to 255

// Whether every pixel of the image starts at a multiple of `bytes`.
inline bool aligned(const Image& image, int64_t c, int64_t element, int64_t bytes) {
  const int64_t v = bytes / element;
  return c % v == 0 && aligned(image.data, bytes) && image.n_stride % v == 0 &&
         image.h_stride % v == 0 && image.w_stride % v == 0;
}

inline Image without_gaps(const void* data, int64_t c, int64_t h, int64_t w) {
  return {const_cast<void*>(data), h * w * c, w * c, c};
}

inline void check_tile(const DwconvShape& s, const Tile& t) {
  require(t.lanes >= 4 && t.lanes % 4 == 0 && t.lanes <= 32, "tile: lanes must be 4, 8, .. 32");
  require(t.nx > 0 && t.ny > 0 && t.lanes * t.nx * t.ny <= kMaxThreads,
          "tile: lanes * nx * ny must be 1 to 256 threads");
  require(t.bands > 0 && t.images > 0, "tile: bands and images must be positive");
  require(s.n > 0 && s.c > 0 && s.h > 0 && s.w > 0 && s.oh > 0 && s.ow > 0,
          "dwconv: every size must be positive");
  const int64_t most = 1 << 24;
  require(s.n < int64_t{1} << 30 && s.c < int64_t{1} << 30 && t.images < int64_t{1} << 30,
          "dwconv: batches and channels must be below 2^30");
  require(
      s.h < most && s.w < most && s.oh < most && s.ow < most && s.pad_l < most && s.pad_t < most,
      "dwconv: sides and padding must be below 2^24");
  require((s.k == 3 || s.k == 5) && (s.stride == 1 || s.stride == 2),
          "dwconv: kernels of 3 and 5 with stride 1 and 2 are supported");
  require(s.pad_l >= 0 && s.pad_t >= 0, "dwconv: the padding must not be negative");
}

// The grid over rows x cols pixels that a block's tiles of t.rows x t.cols cover.
inline DwconvGrid grid_over(const DwconvShape& s, const Tile& t, int64_t rows, int64_t cols) {
  check_tile(s, t);
  require(t.rows > 0 && t.cols > 0, "tile: rows and cols must be positive");
  DwconvGrid grid;
  grid.channel_blocks = ceil_div(s.c, 2 * t.lanes);
  grid.column_tiles = ceil_div(cols, t.nx * t.cols);
  grid.bands = ceil_div(rows, t.ny * t.rows);
  grid.row_chunks = ceil_div(grid.bands, t.bands);
  grid.groups = ceil_div(s.n, t.images);
  grid.chunks = grid.row_chunks * grid.column_tiles;
  grid.parts = grid.chunks * grid.groups;
  return grid;
}

// Sizes of a block's windows; computed on the host, the same for every block.
struct Window {
  int rows, fresh;      // rows in the ring that a band needs, and those that the one before had not
  int cols;             // columns
  int ring_rows;        // rows that the ring holds
  int channels, pitch;  // of a pixel; elements from row to row of the ring
};

// Ring rows for one window, and for what arrives meanwhile.
inline int ring_rows(const Tile& t, int64_t rows, int64_t fresh, int64_t bands) {
  const int64_t more = t.images > 1 ? rows : bands > 1 ? fresh : 0;
  return static_cast<int>(rows + more);
}

// Where a block stands: its channels, its chunk, its images.
struct Place {
  int c0, part, chunk, n_begin, n_end, row_chunk, column_tile;
};

__device__ inline Place place_of(const DwconvGrid& grid, const DwconvShape& s, const Tile& tile) {
  // A grid has fewer than 2^31 blocks.
  const int chunks = static_cast<int>(grid.chunks), columns = static_cast<int>(grid.column_tiles);
  const int channel_blocks = static_cast<int>(grid.channel_blocks);
  const int index = static_cast<int>(block_x()), images = static_cast<int>(tile.images);
  Place place;
  place.c0 = index % channel_blocks * 2 * static_cast<int>(tile.lanes);
  place.part = index / channel_blocks;
  place.chunk = place.part % chunks;
  place.n_begin = place.part / chunks * images;
  place.n_end = min_of(place.n_begin + images, static_cast<int>(s.n));
  place.column_tile = place.chunk % columns;
  place.row_chunk = place.chunk / columns;
  return place;
}

// A thread's place in its block: which two channels, and which of the tiles.
struct Lane {
  int channel, x, y, position;
  __device__ explicit Lane(const Tile& tile) {
    const int lanes = static_cast<int>(tile.lanes), nx = static_cast<int>(tile.nx);
    channel = thread_x() % lanes * 2;
    position = thread_x() / lanes;
    x = position % nx;
    y = position / nx;
  }
};

// The band that a block is at, and the ring's slot of the first row of its window.
struct Cursor {
  int n, band, slot;
  bool whole;  // none of its window's rows are there from the band before
  __device__ Cursor next(const Window& window, int band_begin, int band_end) const {
    const bool same = band + 1 < band_end;
    int to = slot + (same ? window.fresh : window.rows);
    if (to >= window.ring_rows) to -= window.ring_rows;
    return {same ? n : n + 1, same ? band + 1 : band_begin, to, !same};
  }
};

// The 16-byte pieces of rows x cols pixels that a thread copies, one after the other.
template <typename T>
struct Walk {
  int row, col, cols, row_step, col_step, channel;
  __device__ Walk(int cols, int channels) : cols(cols) {
    const int pieces = channels / kVector<T>;  // of a pixel
    const int first = thread_x() / pieces, step = block_dim_x() / pieces;
    channel = thread_x() % pieces * kVector<T>;
    row = first / cols;
    col = first % cols;
    row_step = step / cols;
    col_step = step % cols;
  }
  __device__ __forceinline__ void next() {
    row += row_step;
    col += col_step;
    if (col >= cols) col -= cols, row++;
  }
};

// Part of an image, channels from c on; rows and columns outside of it count as padding.
template <typename T>
struct View {
  const T* data;
  int64_t h_stride, w_stride;
  int h, w, channels;  // channels of a piece that exist
  bool aligned;
  __device__ View(const Image& image, int64_t n, int64_t h, int64_t w, int64_t c, int64_t all,
                  bool aligned)
      : data(static_cast<const T*>(image.data) + n * image.n_stride + c),
        h_stride(image.h_stride),
        w_stride(image.w_stride),
        h(static_cast<int>(h)),
        w(static_cast<int>(w)),
        channels(static_cast<int>(min_of(all - c, int64_t{kVector<T>}))),
        aligned(aligned) {}
  __device__ __forceinline__ bool inside(int y, int x) const {
    return static_cast<unsigned>(y) < static_cast<unsigned>(h) &&
           static_cast<unsigned>(x) < static_cast<unsigned>(w) && channels > 0;
  }
};

// Copies a piece of the pixel (y, x), or zeros where there is none.
template <typename T>
__device__ __forceinline__ void copy_piece(T* to, const View<T>& view, int y, int x) {
  const bool inside = view.inside(y, x);
  const T* from = view.data + (inside ? y * view.h_stride + x * view.w_stride : 0);
  if (view.aligned) {
    cp_async<16>(to, from, inside);
    return;
  }
  for (int v = 0; v < kVector<T>; v++)
    to[v] = inside && v < view.channels ? from[v] : from_float<T>(0.0f);
}

// Two neighbouring channels.
template <typename T>
__device__ __forceinline__ float2 pair_at(const T* p) {
  if constexpr (sizeof(T) == 4)
    return load_shared(reinterpret_cast<const float2*>(p));
  else
    return unpack2<T>(load_shared(reinterpret_cast<const uint32_t*>(p)));
}

// 2 or a multiple of 4 floats, 8 or 16 bytes at a time.
template <int N>
__device__ __forceinline__ void load_floats(float (&to)[N], const float* from) {
  if constexpr (N == 2) {
    const float2 v = load_shared(reinterpret_cast<const float2*>(from));
    to[0] = v.x;
    to[1] = v.y;
  } else {
    static_assert(N % 4 == 0);
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 v = load_shared(reinterpret_cast<const float4*>(from + i));
      to[i] = v.x;
      to[i + 1] = v.y;
      to[i + 2] = v.z;
      to[i + 3] = v.w;
    }
  }
}

// Rounds two values to T; returns them as stored.
template <typename T>
__device__ __forceinline__ float2 rounded(float2 v) {
  if constexpr (sizeof(T) == 4)
    return v;
  else
    return unpack2<T>(pack2<T>(v));
}

// Writes the first `channels` of two values: in one store where `paired`.
template <typename T>
__device__ __forceinline__ void store_pair(T* p, float2 v, int64_t channels, bool paired) {
  if (paired) {
    if (channels <= 0) return;
    if constexpr (sizeof(T) == 4)
      store(reinterpret_cast<float2*>(p), v);
    else
      store(reinterpret_cast<uint32_t*>(p), pack2<T>(v));
    return;
  }
  if (channels > 0) p[0] = from_float<T>(v.x);
  if (channels > 1) p[1] = from_float<T>(v.y);
}

// weight [C,1,K,K] of the block's channels to shared memory [K*K][channels + 2], zeros beyond C.
// The two floats keep the taps of one channel, which neighbouring threads write, in several banks.
template <int TAPS>
__device__ inline void load_weight(float* to, const void* weight, DType dtype, int64_t c0,
                                   int channels, int64_t c) {
  for (int i = thread_x(); i < channels * TAPS; i += block_dim_x()) {
    const int channel = i / TAPS, tap = i % TAPS;
    const bool exists = c0 + channel < c;
    to[tap * (channels + 2) + channel] = exists ? weight_at(weight, dtype, c0 * TAPS + i) : 0.0f;
  }
}

}  // namespace cuda
}  // namespace effnet
