// Geometry of a convolution's rows and of the chunks that they are dealt out in.
//
// Included inside the namespace of each instruction set (see cpu/vec.h): none of this may be shared
// between objects compiled for different machines.
#pragma once

#include <cstdint>

#ifndef EFFNET_NAMESPACE
#error "define EFFNET_NAMESPACE before common/geometry.h"
#endif
#ifndef EFFNET_HD
#define EFFNET_HD
#endif

namespace effnet {
namespace EFFNET_NAMESPACE {

EFFNET_HD inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
EFFNET_HD inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
EFFNET_HD inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// The remainder in [0, b), for b > 0.
EFFNET_HD inline int64_t floor_mod(int64_t a, int64_t b) { return (a % b + b) % b; }

struct Range {
  int64_t begin, end;
  EFFNET_HD int64_t size() const { return end - begin; }
};

// Part `index` of `parts` nearly equal parts of [0, total).
EFFNET_HD inline Range part_of(int64_t total, int64_t parts, int64_t index) {
  return {total * index / parts, total * (index + 1) / parts};
}

}  // namespace EFFNET_NAMESPACE
}  // namespace effnet
