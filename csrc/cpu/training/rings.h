// Rows of images as the depthwise passes of MBConv keep them: fp32 planes [row][vector][pitch] in
// the L2 cache, one vector of channels per pixel, between columns of zeros. The rows go round.
#pragma once

#include "cpu/ops/dwconv_tiles.h"

#include "common/mbconv_split.h"

namespace effnet {
namespace EFFNET_ISA {

constexpr int64_t kRingBytes = 1 << 20;  // of all rings of a task

struct Ring {
  float* data;
  int64_t rows, vecs, pitch;  // pitch in vectors

  int64_t floats() const { return rows * vecs * pitch * kLanes; }
  int64_t slot(int64_t row) const { return row % rows; }
  // The slot `ahead` rows behind `first`, ahead < rows.
  EFFNET_INLINE int64_t after(int64_t first, int64_t ahead) const {
    return first + ahead < rows ? first + ahead : first + ahead - rows;
  }
  EFFNET_INLINE float* plane(int64_t slot, int64_t v) const {
    return data + (slot * vecs + v) * pitch * kLanes;
  }
  // Makes the columns outside [begin, end) zero, in all rows: nothing else writes to them.
  void clear_borders(int64_t begin, int64_t end) const {
    for (int64_t i = 0; i < rows * vecs; i++) {
      float* at = data + i * pitch * kLanes;
      std::memset(at, 0, sizeof(float) * static_cast<size_t>(begin * kLanes));
      std::memset(at + end * kLanes, 0,
                  sizeof(float) * static_cast<size_t>((pitch - end) * kLanes));
    }
  }
};

// Calls f(v, lanes, j) for `columns` pixels of a row and all vectors of a block, in the order of
// addresses, a few pixels at a time.
template <typename F>
EFFNET_INLINE void for_row(const ChannelBlock& block, int64_t columns, const F& f) {
  constexpr int64_t kBlock = 4;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t end = min_of(columns, begin + kBlock);
    for (int64_t v = 0; v < block.vecs; v++) {
      const int64_t lanes = block.lanes(v);
      for (int64_t j = begin; j < end; j++) f(v, lanes, j);
    }
  }
}

// Taps kw = q, q + stride, ... of each kernel row in descending order, row after row of K places:
// the data gradient at one column parity is then a plain correlation of dz with stride 1.
inline void flip_weight(float* flipped, const float* weight, int64_t k, int64_t stride,
                        int64_t vecs) {
  for (int64_t row = 0; row < vecs * k; row++) {
    float* out = flipped + row * k * kLanes;
    const float* in = weight + row * k * kLanes;
    for (int64_t q = 0; q < stride; q++)
      for (int64_t kw = q + (k - 1 - q) / stride * stride; q < k && kw >= q; kw -= stride)
        store(out, load(in + kw * kLanes)), out += kLanes;
  }
}

// The columns of the data gradient that meet the taps kw = q, q + stride, ...
struct Parity {
  int64_t first_tap = 0, taps;  // their place in a flipped kernel row
  int64_t column, width;        // the first column, and how many there are, `stride` apart
  int64_t shift;                // dz column of the first one's first tap, behind `left` zeros
  Parity(const DwconvShape& s, int64_t q, int64_t left) {
    const auto taps_of = [&](int64_t i) { return i < s.k ? (s.k - 1 - i) / s.stride + 1 : 0; };
    for (int64_t i = 0; i < q; i++) first_tap += taps_of(i);
    taps = taps_of(q);
    column = floor_mod(q - s.pad_l, s.stride);
    width = s.w > column ? ceil_div(s.w - column, s.stride) : 0;
    shift = left + (column + s.pad_l - q) / s.stride - (taps - 1);
  }
};

}  // namespace EFFNET_ISA
}  // namespace effnet
