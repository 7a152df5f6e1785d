// Register tiles shared by the depthwise convolution's forward and backward passes.
//
// A tile is one row and channel vector of up to kMaxTile outputs. It reads fp32 without masks or
// border cases, at any pixel stride: x where it lies, or a copy with zero columns for the padding
// and zero lanes beyond C.
#pragma once

#include "cpu/args.h"
#include "cpu/simd/vec.h"

namespace effnet {
namespace EFFNET_ISA {

constexpr int kMaxTile = 8;  // outputs per register tile: 8 FMA chains cover 4 cycles x 2 ports

// Whether x of `images` images comes from further than the L2 cache, of 2 MiB. Half or twice as
// much does little.
inline bool beyond_l2(const DwconvShape& s, int64_t images, int64_t element_size) {
  return images * s.h * s.w * s.c * element_size > 2 << 20;
}

// Channels [c0, c0 + vecs * kLanes), cut at C.
struct ChannelBlock {
  int64_t c0, vecs, c;
  EFFNET_INLINE int64_t lanes(int64_t v) const { return min_of(kLanes, c - c0 - v * kLanes); }
};

// How the work is dealt out: (image, chunk of rows) x block of channels. The blocks may depend on
// the number of threads, since no sum crosses channels.
struct Blocks {
  int64_t c, all, count, vecs;  // vecs: of the largest block
  Blocks(int64_t c, int64_t other_tasks, int threads, int64_t max_vecs)
      : c(c), all(ceil_div(c, kLanes)), count(ceil_div(all, max_of(1, max_vecs))) {
    if (other_tasks % threads) count = ceil_div(count, threads) * threads;
    count = min_of(count, all);
    vecs = ceil_div(all, count);
  }
  ChannelBlock operator[](int64_t i) const {
    const Range part = part_of(all, count, i);
    return {part.begin * kLanes, part.size(), c};
  }
};

// acc[t] += sum_j w[j] * in[(t * STEP + j) * pixel]; TAPS = 0 takes the number of taps at run time.
template <int TAPS, int STEP, int TILE>
EFFNET_INLINE void correlate(Vec* acc, const float* in, int64_t pixel, const float* w,
                             int64_t taps) {
  if constexpr (TAPS > 0) {
    Vec weight[TAPS];
#pragma GCC unroll 8
    for (int j = 0; j < TAPS; j++) weight[j] = load(w + j * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < (TILE - 1) * STEP + TAPS; i++) {
      const Vec x = in_register(load(in + i * pixel));
#pragma GCC unroll 8
      for (int j = 0; j < TAPS; j++) {
        int t = (i - j) / STEP;
        if (i >= j && (i - j) % STEP == 0 && t < TILE) acc[t] += weight[j] * x;
      }
    }
  } else {
    for (int64_t j = 0; j < taps; j++) {
      Vec weight = load(w + j * kLanes);
#pragma GCC unroll 8
      for (int t = 0; t < TILE; t++) acc[t] += weight * load(in + (t * STEP + j) * pixel);
    }
  }
}

// Splits `width` outputs into tiles of nearly equal width, at most kMaxTile: `wide` tiles of
// `size` outputs and then the rest of `size - 1`.
struct RowTiles {
  int64_t count, size, wide;
  explicit RowTiles(int64_t width)
      : count(ceil_div(width, kMaxTile)),
        size(ceil_div(width, count)),
        wide(width - count * (size - 1)) {}
};

// Calls f.template operator()<TILE>() with TILE = size in [1, kMaxTile].
template <typename F>
EFFNET_INLINE void with_tile(int64_t size, const F& f) {
  switch (size) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    case 6:
      return f.template operator()<6>();
    case 7:
      return f.template operator()<7>();
    default:
      return f.template operator()<8>();
  }
}

// weight [C,1,K,K] -> [v][K*K][kLanes] as fp32, zero in lanes beyond C.
template <typename W>
void pack_weight(float* out, const W* weight, int64_t kk, const ChannelBlock& block) {
  for (int64_t v = 0; v < block.vecs; v++, out += kk * kLanes)
    for (int64_t begin = 0; begin < kk; begin += kLanes) {
      const W* in = weight + (block.c0 + v * kLanes) * kk + begin;
      const int64_t lanes = block.lanes(v), taps = min_of(kLanes, kk - begin);
      Vec rows[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; l++) rows[l] = l < lanes ? load_n(in + l * kk, taps) : Vec{};
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++)
        if (i < taps) store(out + (begin + i) * kLanes, rows[i]);
    }
}

inline void pack_weight(float* out, const void* weight, DType dtype, int64_t kk,
                        const ChannelBlock& block) {
  if (dtype == DType::kFloat32)
    pack_weight(out, static_cast<const float*>(weight), kk, block);
  else
    pack_weight(out, static_cast<const bf16*>(weight), kk, block);
}

// The way back: [v][K*K][kLanes] -> [C,K,K].
inline void unpack_weight(float* out, const float* in, int64_t kk, const ChannelBlock& block) {
  for (int64_t v = 0; v < block.vecs; v++, in += kk * kLanes)
    for (int64_t begin = 0; begin < kk; begin += kLanes) {
      float* to = out + (block.c0 + v * kLanes) * kk + begin;
      const int64_t lanes = block.lanes(v), taps = min_of(kLanes, kk - begin);
      Vec rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) rows[i] = i < taps ? load(in + (begin + i) * kLanes) : Vec{};
      transpose(rows);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; l++)
        if (l < lanes) store_n(to + l * kk, rows[l], taps);
    }
}

// A per-channel vector -> [v][kLanes], zero beyond C.
inline void pack_vector(float* out, const float* in, const ChannelBlock& block) {
  for (int64_t v = 0; v < block.vecs; v++)
    store(out + v * kLanes, load_n(in + block.c0 + v * kLanes, block.lanes(v)));
}

// A tile's input for one channel vector.
struct Source {
  const float* data;
  int64_t pixel, row;  // strides
};

// Which of the columns [left, left + columns) lie in [0, w), counted from left.
EFFNET_INLINE Range columns_inside(int64_t left, int64_t columns, int64_t w) {
  const int64_t begin = min_of(columns, max_of(0, -left));
  return {begin, max_of(begin, min_of(columns, w - left))};
}

// Copies columns [0, columns) of `rows` rows at x, zero outside `inside`, to the patch.
template <typename T>
EFFNET_INLINE void stage_patch(float* patch, const T* x, const Image& image, int64_t rows,
                               int64_t columns, Range inside, int64_t lanes) {
  for (int64_t i = 0; i < rows; i++, x += image.h_stride) {
    int64_t j = 0;
    for (; j < inside.begin; j++, patch += kLanes) store(patch, Vec{});
    if (lanes >= kLanes)
      for (; j < inside.end; j++, patch += kLanes) store(patch, load(x + j * image.w_stride));
    else
      for (; j < inside.end; j++, patch += kLanes)
        store(patch, load_n(x + j * image.w_stride, lanes));
    for (; j < columns; j++, patch += kLanes) store(patch, Vec{});
  }
}

// A tile of x: where it lies if it is full vectors of fp32 inside the image, else copied to
// `patch`.
template <typename T>
EFFNET_INLINE Source source(float* patch, const T* x, const Image& image, int64_t rows,
                            int64_t columns, Range inside, int64_t lanes) {
  if constexpr (sizeof(T) == 4)
    if (inside.size() == columns && lanes >= kLanes) return {x, image.w_stride, image.h_stride};
  stage_patch(patch, x, image, rows, columns, inside, lanes);
  return {patch, kLanes, columns * kLanes};
}

// Fetches LINES vectors of one row at a time, and goes on where it ended: see fetch in vec.h.
template <typename T, int LINES>
struct Fetch {
  int64_t vecs, pixel_stride, pixel = 0, v = 0;
  void run(const T* row) const {
    const T* at = row + pixel * pixel_stride;
    int64_t next = v;
#pragma GCC unroll 16
    for (int line = 0; line < LINES; line++) {
      __builtin_prefetch(at + next * kLanes, 0, 2);
      if (++next == vecs) next = 0, at += pixel_stride;
    }
  }
  void advance() {
    for (v += LINES; v >= vecs; v -= vecs) pixel++;
  }
};

// TILE outputs of one channel vector, `step` elements apart.
template <int TILE, typename T>
EFFNET_INLINE void store_tile(T* out, int64_t step, const Vec* tile, int64_t lanes,
                              bool stream = false) {
  if (lanes >= kLanes) {
#pragma GCC unroll 8
    for (int t = 0; t < TILE; t++) store_n(out + t * step, tile[t], kLanes, stream);
  } else {
#pragma GCC unroll 8
    for (int t = 0; t < TILE; t++) store_n(out + t * step, tile[t], lanes);
  }
}

template <typename T>
EFFNET_INLINE T* pixel(const Image& image, int64_t n, int64_t h, int64_t w) {
  return static_cast<T*>(image.data) + n * image.n_stride + h * image.h_stride + w * image.w_stride;
}

}  // namespace EFFNET_ISA
}  // namespace effnet
