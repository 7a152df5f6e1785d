// Register tiles shared by the depthwise convolution's forward and backward passes.
//
// A row is staged once into scratch as fp32, one plane of [columns][kLanes] per channel vector, with
// zero columns for the padding and zero lanes beyond C. Tiles then read it K times without
// conversion, masks or border cases. An odd column pitch keeps planes off each other's cache sets.
#pragma once

#include "cpu/args.h"
#include "cpu/vec.h"

namespace effnet {
namespace EFFNET_ISA {

constexpr int kMaxTile = 8;       // outputs per register tile: 8 FMA chains cover 4 cycles x 2 ports
constexpr int64_t kScratchBytes = 384 << 10;  // a task's rows stay within a part of the L2 cache

EFFNET_INLINE int64_t row_chunks(int64_t oh) { return ceil_div(oh, kChunkRows); }
// Groups of images that share one partial weight gradient.
EFFNET_INLINE int64_t weight_groups(int64_t n) { return min_of(n, kWeightGroups); }

// acc[t] += sum_j w[j] * in[t * STEP + j]; TAPS = 0 takes the number of taps at run time.
template <int TAPS, int STEP, int TILE>
EFFNET_INLINE void correlate(Vec* acc, const float* in, const float* w, int64_t taps) {
  if constexpr (TAPS > 0) {
    Vec weight[TAPS];
#pragma GCC unroll 8
    for (int j = 0; j < TAPS; j++) weight[j] = load(w + j * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < (TILE - 1) * STEP + TAPS; i++) {
      Vec x = load(in + i * kLanes);
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
      for (int t = 0; t < TILE; t++) acc[t] += weight * load(in + (t * STEP + j) * kLanes);
    }
  }
}

// Splits `width` outputs into tiles of nearly equal width, at most kMaxTile: `wide` tiles of
// `size` outputs and then the rest of `size - 1`.
struct RowTiles {
  int64_t count, size, wide;
  explicit RowTiles(int64_t width)
      : count(ceil_div(width, kMaxTile)), size(ceil_div(width, count)),
        wide(width - count * (size - 1)) {}
};

// Calls f.template operator()<TILE>() with TILE = size in [1, kMaxTile].
template <typename F>
EFFNET_INLINE void with_tile(int64_t size, const F& f) {
  switch (size) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 6: return f.template operator()<6>();
    case 7: return f.template operator()<7>();
    default: return f.template operator()<8>();
  }
}

// Channels [c0, c0 + vecs * kLanes), cut at C.
struct ChannelBlock {
  int64_t c0, vecs, c;
  EFFNET_INLINE int64_t lanes(int64_t v) const { return min_of(kLanes, c - c0 - v * kLanes); }
};

// How many channel vectors a task takes: as many as the scratch holds, fewer where threads idle.
EFFNET_INLINE int64_t block_vecs(int64_t c, int64_t bytes_per_vec, int64_t other_tasks,
                                 int threads) {
  int64_t vecs = ceil_div(c, kLanes);
  int64_t fit = max_of(1, kScratchBytes / max_of(1, bytes_per_vec));
  int64_t wanted = ceil_div(4 * threads, other_tasks);
  int64_t share = max_of(1, vecs / wanted);
  return min_of(vecs, min_of(fit, share));
}

// weight [C,1,K,K] -> [v][K*K][kLanes] as fp32.
inline void pack_weight(float* out, const void* weight, bool is_bf16, int64_t kk,
                        const ChannelBlock& block) {
  for (int64_t v = 0; v < block.vecs; v++)
    for (int64_t l = 0; l < kLanes; l++) {
      bool inside = l < block.lanes(v);
      for (int64_t i = 0; i < kk; i++)
        out[(v * kk + i) * kLanes + l] =
            inside ? load_scalar(weight, is_bf16, (block.c0 + v * kLanes + l) * kk + i) : 0.0f;
    }
}

// A per-channel vector -> [v][kLanes], zero beyond C.
inline void pack_vector(float* out, const float* in, const ChannelBlock& block) {
  for (int64_t v = 0; v < block.vecs; v++)
    store(out + v * kLanes, load_n(in + block.c0 + v * kLanes, block.lanes(v)));
}

// Writes columns [begin, end) of the planes at `out` (pitch in columns) with value(column, v).
template <typename F>
EFFNET_INLINE void stage_row(float* out, int64_t pitch, Range columns, int64_t vecs, const F& value) {
  for (int64_t j = columns.begin; j < columns.end; j++)
    for (int64_t v = 0; v < vecs; v++) store(out + (v * pitch + j) * kLanes, value(j, v));
}

template <typename T>
EFFNET_INLINE T* pixel(const Image& image, int64_t n, int64_t h, int64_t w) {
  return static_cast<T*>(image.data) + n * image.n_stride + h * image.h_stride + w * image.w_stride;
}

}  // namespace EFFNET_ISA
}  // namespace effnet
