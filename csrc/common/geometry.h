// Geometry of a convolution's rows and of the chunks that they are dealt out in.
//
// Included inside the namespace of each instruction set (see cpu/simd/vec.h): none of this may be
// shared between objects compiled for different machines.
#pragma once

#include <cstdint>

#ifndef EFFNET_NAMESPACE
#error "define EFFNET_NAMESPACE before common/geometry.h"
#endif

namespace effnet {
namespace EFFNET_NAMESPACE {

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// The remainder in [0, b), for b > 0.
inline int64_t floor_mod(int64_t a, int64_t b) { return (a % b + b) % b; }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part `index` of `parts` nearly equal parts of [0, total).
inline Range part_of(int64_t total, int64_t parts, int64_t index) {
  return {total * index / parts, total * (index + 1) / parts};
}

// Chunks of output rows, each with its own partial sums: about 16 rows, an even number of chunks so
// that two threads share them evenly (threads that share a row write to each other's neighbouring
// lines). Depends on the shape alone, and so does the order of the sums.
inline int64_t row_chunks(int64_t oh) {
  if (oh <= 8) return 1;
  const int64_t chunks = ceil_div(oh, 16);
  return chunks + chunks % 2;
}

// Groups of images that share one partial weight gradient: at most 16, and about 1024 outputs each.
inline int64_t weight_groups(int64_t n, int64_t oh, int64_t ow) {
  return max_of(1, min_of(min_of(n, 16), n * oh * ow / 1024));
}

// Chunks of at most 128 pixels in the reductions over whole planes, an even number as above.
inline int64_t pixel_chunks(int64_t pixels) {
  if (pixels < 16) return 1;
  const int64_t chunks = ceil_div(pixels, 128);
  return chunks + chunks % 2;
}

}  // namespace EFFNET_NAMESPACE
}  // namespace effnet
