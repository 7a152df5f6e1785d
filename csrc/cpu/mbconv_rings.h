// Rows of images as the depthwise passes of MBConv keep them: fp32 planes [row][vector][pitch] in
// the L2 cache, one vector of channels per pixel, between columns of zeros. The rows go round.
#pragma once

#include "cpu/dwconv_tiles.h"

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
      std::memset(at + end * kLanes, 0, sizeof(float) * static_cast<size_t>((pitch - end) * kLanes));
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

}  // namespace EFFNET_ISA
}  // namespace effnet
