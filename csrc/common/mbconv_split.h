// How the passes of MBConv deal out their pixels: by the shape alone, so that every sum has the
// same order whatever the number of threads. Included as geometry.h is.
#pragma once

#include "common/geometry.h"

namespace effnet {
namespace EFFNET_NAMESPACE {

// Parts of each image's pixels in a forward product: about 448 pixels each.
inline int64_t pointwise_parts(int64_t hw) {
  const int64_t parts = max_of(1, ceil_div(hw, 448));
  return parts == 1 ? 1 : parts + parts % 2;
}

// Tasks of a backward product, each with a partial weight gradient of its own: groups of images,
// or parts of each image.
struct WeightSplit {
  int64_t groups, parts;
  WeightSplit(int64_t n, int64_t hw, int64_t weight_floats) {
    constexpr int64_t kMaxTasks = 32, kPixels = 256, kMaxFloats = 2 << 20;
    const int64_t most = max_of(2, min_of(kMaxTasks, kMaxFloats / weight_floats));
    int64_t tasks = 2;
    while (2 * tasks <= most && 2 * tasks * kPixels <= n * hw) tasks *= 2;
    groups = min_of(n, tasks);
    parts = min_of(hw, ceil_div(tasks, groups));
  }
  int64_t tasks() const { return groups * parts; }
};

// Chunks of an image's output rows in the depthwise passes: each recomputes what lies K - 1 rows
// beyond, so they are large, and as many as give 32 tasks.
inline int64_t depthwise_chunks(int64_t n, int64_t oh) {
  return max_of(1, min_of(ceil_div(32, n), oh / 28));
}

}  // namespace EFFNET_NAMESPACE
}  // namespace effnet
